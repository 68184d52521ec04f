# SPDX-License-Identifier: MIT
"""What --data names: a task, or .txt and .jsonl files and folders, which are read, checked, and split for validation.

    x.txt       one text
    folder      all .txt files below it, a text each
    x.jsonl     an example on each line, all lines of a file in one of these forms; other keys are passed over:

        {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]}
        {"prompt": "2 + 2 =", "completion": " 4"}                       both texts, or both lists of messages
        {"instruction": "Add.", "input": "2 and 2", "output": "4"}      Alpaca's; "input" may be missing or empty
        {"text": "2 + 2 = 4"}                                           a document of plain text

Of messages every turn of the assistant is scored, in the tokenizer's chat template, or in the plain one of data.py.

Why not split by token? Neighbouring windows of a text share names, comments and sentences. If one is trained on and the
next one validates, memorizing looks like learning. So does a copy: no paragraph and no example that validates is in
training too, nor is its prompt, unless it is an instruction for many examples.
"""

import json
import os
import re
import zlib
from collections import Counter, defaultdict
from functools import partial
from itertools import accumulate
from pathlib import Path

from nanopeft import data
from nanopeft.trainer import Error, tasks
from nanopeft.trainer.tasks import TASKS

KNOWN_TOKENS = 1 << 14
ALPACA = "Below is an instruction that describes a task"
BLANKS = re.compile(r"(?<!\s)\s{100000}")  # over a million of them tiktoken panics, which no except should catch
ENDS = (r"\n\s*\n", r"\n", r"[.!?][\"')”]*\s+|[。！？]+[”』」]*")  # of a paragraph, a line, a sentence


def load(names, encoding, length, *, valid=None, pack=False):
    """(training, validation), each a data.TokenStream or a data.CompletionDataset.

    names: a task, a path, or a list of paths. valid: paths of what to validate on; without, about a tenth is held out.
    The second knows n_leaked, how many of its examples or paragraphs were left out, because they are in training too;
    asked, see how_asked; and a checksum of the data as they were read.
    """
    names, valid = ([name] if isinstance(name, str) else name for name in (names, valid))
    if len(names) == 1 and names[0] in TASKS:
        if valid:
            raise Error(f"--valid is for files of your own: {names[0]} has validation data")
        (train, held_out), n_leaked = TASKS[names[0]](), 0
    elif valid:
        train, held_out = read_files(names), read_files(valid)
        if isinstance(train[0], str) != isinstance(held_out[0], str):
            raise Error(f"--valid {valid[0]} and --data {names[0]} must both be texts, or both be examples")
        held_out, n_leaked = leave_out(held_out, train)
        if not held_out:
            raise Error(f"--valid {valid[0]}: all of it is in --data {names[0]} too; leave the copies out of one")
    else:
        found = read_files(names)
        split = split_texts if isinstance(found[0], str) else split_examples
        train, held_out, n_leaked = split(found, names[0])
    if pack and isinstance(held_out[0], str):
        raise Error("--pack is for examples, and this is plain text, whose rows are full anyway: leave it out")
    kind = data.TokenStream if isinstance(held_out[0], str) else partial(data.CompletionDataset, pack=pack)
    asked, checksum = how_asked(train), f"{zlib.crc32(repr((train, held_out)).encode()):08x}"
    found = []
    for which, split in (("training", train), ("validation", held_out)):
        try:
            found.append(kind(split, encoding, length))
        except data.Error as error:
            raise Error(f"{which} data: {error}") from None
    found[1].n_leaked, found[1].asked, found[1].checksum = n_leaked, asked, checksum
    return found


def load_known(names, encoding, length):
    """What a base knew before the run: "library", which is the embedded base's, or files. None without names."""
    if not names:
        return None
    found = tasks.known() if names == ["library"] else read_files(names)
    kind = data.TokenStream if isinstance(found[0], str) else data.CompletionDataset
    return kind(found, encoding, length).head(KNOWN_TOKENS)


# ------------------------------------------------------------------------------------------------------------- reading

def read_files(names):
    """The texts or the examples in files. Examples are sorted: their order in a file changes nothing."""
    found = []
    for name in names:
        if name.endswith(".jsonl"):
            found += read_examples(read(name), name)
        elif name.endswith(".txt"):
            found.append(read(name))
        elif os.path.isdir(name):
            paths = sorted(path for path in Path(name).rglob("*.txt") if path.is_file())
            if not paths:
                raise Error(f"{name} has no .txt file in it, which a folder is read for: name .jsonl files one by one")
            found += [read(path) for path in paths]
        else:
            own = ", ".join(TASKS)
            raise Error(f"no data {name!r}: give .txt or .jsonl files, or a folder of .txt; or one of {own} alone")
    n_texts = sum(isinstance(one, str) for one in found)
    if n_texts not in (0, len(found)):
        raise Error(f"{' '.join(names)}: texts and examples cannot be mixed; leave the ones or the others out")
    return found if n_texts else sorted(found, key=repr)


def read(path):
    """A UTF-8 file's text, with or without a byte-order mark."""
    if not os.path.isfile(path):  # a pipe would be waited for
        raise Error(f"{path}: no such file" + ", but a folder or a device" * os.path.exists(path))
    try:
        text = Path(path).read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise Error(f"{path}, line {line}: no UTF-8: {error}; save the file as UTF-8") from None
    except OSError as error:
        raise Error(f"{path} cannot be read: {error}") from None
    if not text.strip():
        raise Error(f"{path} is empty")
    if blanks := BLANKS.search(text):
        line = text.count("\n", 0, blanks.start()) + 1
        raise Error(f"{path}, line {line}: 100,000 blanks or more in a row: shorten them")
    return text


def read_examples(text, path):
    """What each line holds: (prompt, completion), a list of messages, or a text."""
    examples, first_form = [], None
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            line = json.loads(line)
        except (ValueError, RecursionError) as error:  # no JSON, a number of 5,000 digits, 10,000 nested lists
            raise Error(f"{where}: no JSON: {error}") from None
        form, example = read_example(line, where)
        first_form = first_form or form
        if form != first_form:
            raise Error(f"{where} has {form}, and the first line {first_form}: give each form a file of its own")
        examples.append(example)
    return examples


def read_example(line, where):
    """(what form a line has, the example in it). Error for what cannot be tokenized, or has nothing to learn."""
    learned = []  # texts that must say something; a completion may be empty, as its author wrote it
    match line:
        case {"messages": list(example)}:
            form = "messages"
        case {"prompt": list(prompt), "completion": list(completion)}:
            form, example = "messages", prompt + completion
        case {"prompt": str(prompt), "completion": str(completion)}:
            form, example = "prompt and completion", (prompt, completion)
        case {"instruction": str(task), "output": str(output)} if isinstance(line.get("input") or "", str):
            form, example, learned = "instruction and output", (alpaca(task, line.get("input")), output), [output]
        case {"text": str(text)}:
            form, example, learned = "text", text, [text]
        case _:
            has = f"; it has {', '.join(map(json.dumps, line))}" if isinstance(line, dict) else ""
            forms = '"prompt" and "completion", "instruction" and "output", or "text", or a list of "messages"'
            raise Error(f"{where}: needs a text for {forms}{has}")
    if form == "messages":
        if not all(isinstance(m, dict) and {str} == {type(m.get("role")), type(m.get("content"))} for m in example):
            raise Error(f'{where}: each message needs a text for "role" and for "content"')
        example = [{"role": m["role"], "content": m["content"]} for m in example]
        learned = [m["content"] for m in example if m["role"] == "assistant"]
        if not learned:
            raise Error(f'{where}: no message has the role "assistant", and nothing else is learned')
    if not all(text.strip() for text in learned):
        raise Error(f"{where}: nothing to learn, for a text or an answer is empty: leave the line out")
    whole = "\0".join(texts_of(example))
    if re.search("[\ud800-\udfff]", whole):
        raise Error(f"{where}: a text has half of a surrogate pair, which is no character")
    if BLANKS.search(whole):
        raise Error(f"{where}: 100,000 blanks or more in a row: shorten them")
    return form, example


def alpaca(instruction, given):
    """The prompt of https://github.com/tatsu-lab/stanford_alpaca (train.py), with an input and without."""
    context = ", paired with an input that provides further context" if given else ""
    task = f"{ALPACA}{context}. Write a response that appropriately completes the request."
    given = f"### Input:\n{given}\n\n" if given else ""
    return f"{task}\n\n### Instruction:\n{instruction}\n\n{given}### Response:"


def how_asked(examples):
    """How the data put a question: "chat" as a user's turn, "alpaca" in that template, "text" as it is."""
    if any(isinstance(example, list) for example in examples):
        return "chat"
    return "alpaca" if all(isinstance(e, tuple) and e[0].startswith(ALPACA) for e in examples) else "text"


def texts_of(example):
    if isinstance(example, list):
        return [text for message in example for text in message.values()]
    return [example] if isinstance(example, str) else example


# ----------------------------------------------------------------------------------------------------------- splitting

def split_texts(texts, name):
    """(about nine tenths, the rest, how many pieces were left out of the rest: see leave_out).

    The texts are put in an order without meaning, by checksum, and cut at the end nearest to nine tenths of them all:
    of a text, a paragraph, a line, or a sentence. The rest is 5 to 15 %.
    """
    texts = sorted(texts, key=lambda text: zlib.crc32(text.encode()))
    whole, end = "".join(texts), None
    size = len(whole.rstrip())
    first, last = size * 85 // 100, size * 95 // 100
    cuts = [at for at in accumulate(map(len, texts[:-1])) if first <= at <= last]
    for pattern in ENDS:
        if not cuts:
            end, cuts = pattern, [found.end() for found in re.compile(pattern).finditer(whole, first, last)]
    cut = min(cuts or [size * 9 // 10], key=lambda cut: abs(cut - size * 0.9))
    train, held_out = [], []
    for text in texts:
        train.append(text[:cut])
        held_out.append(text[cut:])
        cut = max(0, cut - len(text))
    held_out, n_leaked = leave_out(held_out, train, end)
    if not held_out:
        raise Error(f"{name} repeats itself: nothing in its last tenth is new; leave the copies out")
    return [text for text in train if text], held_out, n_leaked


def leave_out(held_out, train, end=None):
    """(what validates but for what is in training too, how much that is): examples, or pieces of texts.

    Pieces are paragraphs, or where there is one paragraph alone, lines, or else sentences.
    """
    if not isinstance(train[0], str):
        trained_on = {same(texts_of(example)) for example in train}
        kept = [example for example in held_out if same(texts_of(example)) not in trained_on]
        return kept, len(held_out) - len(kept)
    end = end or next((end for end in ENDS if any(re.search(end, text.strip()) for text in held_out)), ENDS[-1])
    trained_on = {piece.strip() for text in train for piece in re.split(end, text)} - {""}
    pieces = [re.findall(rf"(?s)(.*?)({end}|\Z)", text) for text in held_out]
    new = [[piece + stop for piece, stop in text if piece.strip() not in trained_on] for text in pieces]
    n_leaked = sum(map(len, pieces)) - sum(map(len, new))
    return [text for text in map("".join, new) if text.strip()], n_leaked


def split_examples(examples, name):
    """(training, validation, 0). A tenth is held out by checksum: all examples of a question, or none.

    The question is the prompt, or the user's first message: conversations that begin alike share answers, and all of
    them are trained on. One of over a fifth of the examples is an instruction, not a question: its examples are told
    apart by all of their texts. Texts that differ in white space alone count as the same.
    """
    keys = [(same([question(example)]), same(texts_of(example))) for example in examples]
    counts, most, groups = Counter(asked for asked, _ in keys), max(1, len(examples) // 5), defaultdict(list)
    for example, (asked, all_of_it) in zip(examples, keys):
        groups[all_of_it if counts[asked] > most else asked].append(example)
    if len(groups) < 2:
        raise Error(f"{name} has one example, however often: two are the least, to train and to validate")
    train, held_out = [], []
    for key in sorted(groups, key=lambda key: (max(most, len(groups[key])), zlib.crc32(key.encode()))):
        validates = not held_out or (len(held_out) < len(examples) / 10 and len(groups[key]) <= most)
        (held_out if validates else train).extend(groups[key])
    return train, held_out, 0


def question(example):
    if isinstance(example, tuple):
        return example[0]
    return next((message["content"] for message in example if message["role"] == "user"), "")


def same(texts):
    """One string for all texts that differ in white space alone."""
    return "\0".join(" ".join(text.split()) for text in texts)
