# SPDX-License-Identifier: MIT
"""Text for fine-tuning: batches of plain text or of (prompt, completion) pairs, three built-in tasks, and files.

    library     source of the standard library and of numpy; the embedded base was pretrained on it
    reference   the language reference in English (pydoc_data): a model of source code learns to write prose
    modules     a function's source and "# module: "; the completion is the package that the function comes from
    x.txt       one text; about its last tenth is for validation
    x.jsonl     {"prompt": ..., "completion": ...} on each line; about a tenth of the prompts is for validation

Plain text is one stream of tokens, with <eot> (end-of-text) between documents. A row of a batch is a window of it:

    stream      <eot>  The    cat    sat    <eot>  A      dog    ran    <eot>
    input_ids   <eot>  The    cat    sat    <eot>                               length 5
    labels      -100   The    cat    sat    <eot>
    next window                             <eot>  A      dog    ran    <eot>   starts at the last token of this one

A pair is a row of its own. Only the completion and the <eot> after it are scored:

    input_ids   <eot>  2      +      2      =      4      <eot>  <eot>  <eot>
    labels      -100   -100   -100   -100   -100   4      <eot>  -100   -100
                |------------ prompt -----------|  completion    |-padding-|

B rows, T tokens in a row: input_ids and labels are (B, T) int64. Labels are unshifted (the model shifts them), and a
label of -100 is not scored.

Why is the prompt masked in the loss? The model is to learn p(completion | prompt). Prompts are given at inference, and
they are often longer than completions, so that their loss would outweigh that of the answers.
Why end-of-text? The first token is predicted from it. Between documents it says that what follows does not go on from
what came before. After a completion it is scored, so that the model learns to stop.
Why split by file, topic, paragraph or prompt, and not by token? Neighbouring windows share names, comments and
sentences. If one is trained on and the next one validates, memorizing looks like learning. So does a copy: no text,
paragraph or pair that validates is in training too, nor is its prompt, unless it is an instruction for many pairs.

Padding is on the right in training: no token sees the padding behind it (causal mask), and its labels are -100, so no
attention mask is needed. For generation it is on the left, because new tokens come after a row's last one.
Length buckets: a batch is as wide as its longest row, rounded up to a multiple of 16, for oneDNN keeps a compiled
product of each shape. Of the validation batches of `modules` (32 rows), 50 % is padding with rows in random order, and
7 % with rows of like length together: half the work.

Typical length: 128 to 1,024, at most the model's positions. Pitfalls: mask labels by position and not by token, or the
<eot> to stop at is masked with the padding. Prompt and completion are tokenized apart, as in generation, and a space
between them belongs to the completion (" 4").
"""

import ast
import json
import os
import re
import sysconfig
import textwrap
import tokenize
import zlib
from collections import Counter, defaultdict
from contextlib import suppress
from pathlib import Path

import torch


class Error(ValueError):
    """Data that cannot be used; the message says what would be right."""


# ------------------------------------------------------------------------------------------------------------- batches

class TokenStream:
    """Texts as one stream of tokens, cut into windows of `length`. encoding is a tiktoken.Encoding."""

    def __init__(self, texts, encoding, length):
        tokens = [encoding.eot_token]
        for ids in encoding.encode_ordinary_batch(texts):
            tokens += [*ids, encoding.eot_token]
        if len(tokens) < length:
            raise Error(f"{len(tokens)} tokens, fewer than --length {length}: give a longer text or a smaller --length")
        self.tokens, self.length, self.encoding = torch.tensor(tokens), length, encoding
        self.n_truncated = 0  # no text is lost

    def sample(self, size):
        """For training: (input_ids, labels), both (size, length), windows at random places."""
        start = torch.randint(len(self.tokens) - self.length + 1, (size, 1))
        ids = self.tokens[start + torch.arange(self.length)]  # (B, T)
        return ids, self.labels(ids)

    def batches(self, size):
        """For validation: (input_ids, labels) in order, each token after the first scored once."""
        windows = self.tokens.unfold(0, self.length, self.length - 1)  # (n, T), each starts where the last one ended
        rest = self.tokens[len(windows) * (self.length - 1) :][None]
        for ids in (*windows.split(size), rest):
            if ids.size(1) > 1:
                yield ids, self.labels(ids)

    def labels(self, ids):
        """The ids, but -100 for a window's first: with a soft prompt in front it would be guessed from no text."""
        return torch.cat((torch.full_like(ids[:, :1], -100), ids[:, 1:]), 1)


class CompletionDataset:
    """(prompt, completion) pairs as rows of at most `length` tokens.

    items are (<eot> and the prompt's ids, the completion's ids and <eot>). Too long a row loses the beginning of its
    prompt, for a question mostly ends it, and its completion keeps length - 1 tokens at most; n_truncated counts these.
    """

    def __init__(self, pairs, encoding, length):
        self.encoding, self.length, self.pad = encoding, length, encoding.eot_token
        self.items, self.n_truncated = [], 0
        prompts = encoding.encode_ordinary_batch([prompt for prompt, _ in pairs])
        completions = encoding.encode_ordinary_batch([completion for _, completion in pairs])
        for prompt, completion in zip(prompts, completions):
            prompt, completion = [self.pad, *prompt], [*completion, self.pad]
            self.n_truncated += len(prompt) + len(completion) > length
            completion = completion[: length - 1]
            self.items.append((prompt[len(completion) - length :], completion))

    def collate(self, items):
        """(input_ids, labels), both (len(items), T): padded on the right, labels -100 but for completions."""
        longest = max(len(p) + len(c) for p, c in items)
        T = max(longest, min(-(-longest // 16) * 16, self.length))  # the next multiple of 16
        ids = torch.full((len(items), T), self.pad)
        labels = torch.full_like(ids, -100)
        for row, (p, c) in enumerate(items):
            ids[row, : len(p) + len(c)] = torch.tensor(p + c)
            labels[row, len(p) : len(p) + len(c)] = torch.tensor(c)
        return ids, labels

    def sample(self, size):
        """For training: a batch of random pairs."""
        return self.collate([self.items[i] for i in torch.randint(len(self.items), (size,)).tolist()])

    def batches(self, size):
        """For validation: every pair once, in batches of like length."""
        yield from map(self.collate, self.length_buckets(size))

    def length_buckets(self, size):
        """Lists of `size` items of like length, so that little is padded."""
        items = sorted(self.items, key=lambda item: len(item[0]) + len(item[1]))
        return [items[i : i + size] for i in range(0, len(items), size)]


def load(name, encoding, length):
    """(training, validation), each a TokenStream or a CompletionDataset, of a task or of a .txt or .jsonl file."""
    if name in TASKS:
        splits = TASKS[name]()
    elif name.endswith(".txt"):
        splits = split_text(read(name), name)
    elif name.endswith(".jsonl"):
        splits = split_pairs(read_pairs(read(name), name), name)
    else:
        raise Error(f"no data {name!r}: give {', '.join(TASKS)}, or a .txt or .jsonl file")
    kind = CompletionDataset if isinstance(splits[0][0], tuple) else TokenStream
    return tuple(kind(split, encoding, length) for split in splits)


# --------------------------------------------------------------------------------------------------------------- tasks

# The packages that `modules` tells apart; every Python has them. http is not one of them: its five files have so little
# in common that one half says nothing about the other. The base was pretrained without them and without http.
PACKAGES = ("asyncio", "email", "importlib", "logging", "multiprocessing", "unittest", "urllib", "xml")
NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages"}


def library():
    """(training, validation) texts: the files of the standard library, and numpy's for training.

    One file in 20 is held out by a checksum of its path: the same files on every machine.
    """
    import numpy

    train, valid = [*source_files(Path(numpy.__file__).parent).values()], []
    for path, source in source_files(Path(sysconfig.get_path("stdlib"))).items():
        if path.split("/")[0] not in (*PACKAGES, "http", "pydoc_data") and source:
            held_out = zlib.crc32(path.encode()) % 20 == 0
            (valid if held_out else train).append(source)
    return train, valid


def reference():
    """(training, validation) texts: the topics of the language reference; every fifth one is held out.

    Topics repeat one another, so a paragraph of a topic that is held out is taken out of all training texts.
    """
    from pydoc_data.topics import topics

    valid = [topics[name] for name in sorted(topics)[::5]]
    held_out = {paragraph for text in valid for paragraph in text.split("\n\n")}
    train = [[p for p in text.split("\n\n") if p not in held_out] for text in topics.values()]
    return ["\n\n".join(paragraphs) for paragraphs in train if paragraphs], valid


def modules():
    """(training, validation) lists of (prompt with a function, package): half the files each, no function in both."""
    train, valid = [], []
    for package in PACKAGES:
        files = source_files(Path(sysconfig.get_path("stdlib"), package)).values()
        functions = [[(f"{f[:800]}\n# module: ", package) for f in top_functions(source)] for source in files]
        counts = [0, 0]
        for found in sorted(functions, key=len, reverse=True):  # the largest file first: the halves even out
            to_valid = counts[0] > counts[1]
            (valid if to_valid else train).extend(found)
            counts[to_valid] += len(found)
    trained_on = {prompt for prompt, _ in train}
    return train, [(prompt, package) for prompt, package in valid if prompt not in trained_on]


def source_files(folder):
    """{path relative to folder: source} of every .py file below it but tests and installed packages."""
    files = {}
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).parts
        if set(parts) & NOT_LIBRARY or parts[-1].startswith("_sysconfig"):  # the last has paths of this machine
            continue
        with suppress(SyntaxError, UnicodeDecodeError), tokenize.open(path) as file:  # as its own coding line says
            files["/".join(parts)] = file.read()
    return files


def top_functions(source):
    """The source of functions and methods of three lines or more, at the top level or under class, if or try."""
    lines, found, stack = source.split("\n"), [], [ast.parse(source)]  # splitlines would count form feeds as well
    while stack:
        for node in ast.iter_child_nodes(stack.pop()):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.end_lineno - node.lineno >= 2:
                found.append(textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno])))
            elif isinstance(node, (ast.ClassDef, ast.If, ast.Try)):
                stack.append(node)
    return found


TASKS = {"library": library, "reference": reference, "modules": modules}


# --------------------------------------------------------------------------------------------------------------- files

BLANKS = re.compile(r"(?<!\s)\s{100000}")  # over a million of them tiktoken panics, which no except should catch
ENDS = (r"\n\s*\n", r"\n", r"[.!?][\"')”]*\s+|[。！？]+[”』」]*")  # of a paragraph, a line, a sentence


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


def split_text(text, path):
    """About nine tenths and the rest, cut at the end nearest to nine tenths: of a paragraph, a line, or a sentence.

    The rest is 5 to 15 % of the text. A paragraph, line or sentence of it that is in training too is left out of it.
    """
    size = len(text.rstrip())
    for end in ENDS:
        if cuts := [found.end() for found in re.compile(end).finditer(text, size * 85 // 100, size * 95 // 100)]:
            break
    cut = min(cuts or [size * 9 // 10], key=lambda cut: abs(cut - size * 0.9))
    trained_on = {piece.strip() for piece in re.split(end, text[:cut])} - {""}
    pieces = re.findall(rf"(?s)(.*?)({end}|\Z)", text[cut:])
    valid = "".join(piece + stop for piece, stop in pieces if piece.strip() not in trained_on)
    if not valid.strip():
        raise Error(f"{path} repeats itself: nothing in its last tenth is new; leave the copies out")
    return [text[:cut]], [valid]


def read_pairs(text, path):
    """The (prompt, completion) of each line, sorted: their order in the file changes nothing."""
    pairs = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            example = json.loads(line)
        except (ValueError, RecursionError) as error:  # no JSON, a number of 5,000 digits, 10,000 nested lists
            raise Error(f"{path}, line {number}: no JSON: {error}") from None
        for key in ("prompt", "completion"):
            if not isinstance(example, dict) or not isinstance(example.get(key), str):
                raise Error(f'{path}, line {number}: needs a text for "prompt" and for "completion"')
            if re.search("[\ud800-\udfff]", example[key]):
                raise Error(f"{path}, line {number}: {key} has half of a surrogate pair, which is no character")
            if BLANKS.search(example[key]):
                raise Error(f"{path}, line {number}: {key} has 100,000 blanks or more in a row: shorten them")
        pairs.append((example["prompt"], example["completion"]))
    return sorted(pairs)


def split_pairs(pairs, path):
    """(training, validation) pairs. A tenth is held out by checksum: all completions of a prompt, or none.

    A prompt of over a fifth of the pairs is an instruction, not a question: its pairs are told apart by completion.
    Texts that differ in white space alone count as the same.
    """
    keys = [tuple(" ".join(text.split()) for text in pair) for pair in pairs]
    n_completions, most, groups = Counter(prompt for prompt, _ in keys), max(1, len(pairs) // 5), defaultdict(list)
    for pair, key in zip(pairs, keys):
        groups["\0".join(key) if n_completions[key[0]] > most else key[0]].append(pair)
    if len(groups) < 2:
        raise Error(f"{path} has one example, however often: two are the least, to train and to validate")
    train, valid = [], []
    for key in sorted(groups, key=lambda key: (max(most, len(groups[key])), zlib.crc32(key.encode()))):
        held_out = not valid or (len(valid) < len(pairs) / 10 and len(groups[key]) <= most)
        (valid if held_out else train).extend(groups[key])
    return train, valid


if __name__ == "__main__":
    import tiktoken

    tokens = [*map(bytes, zip(range(256))), *(w.encode() for w in "The| cat| sat|A| dog| ran| 2| +| =| 4".split("|"))]
    ranks, special = {token: i for i, token in enumerate(tokens)}, {"<|endoftext|>": len(tokens)}
    toy = tiktoken.Encoding("toy", pat_str=r" ?\S+", mergeable_ranks=ranks, special_tokens=special)
    windows = TokenStream(["The cat sat", "A dog ran"], toy, 5)
    pairs = CompletionDataset([("2 + 2 =", " 4"), ("The cat", " sat")], toy, 9)
    for title, dataset in (("windows of 5 tokens", windows), ("prompt and completion", pairs)):
        print(f"{title}, first the ids, then the labels:")
        for row in torch.cat(next(dataset.batches(2))).tolist():
            words = ["-100" if i < 0 else toy.decode([i]).replace("<|endoftext|>", "<eot>").strip() for i in row]
            print("   ", *(f"{word:6}" for word in words))
    for name, task in TASKS.items():
        train, valid = ([len("".join(text).encode()) for text in split] for split in task())
        print(f"{name}: {len(train):,} texts of {sum(train):,} bytes, and to validate {len(valid):,} of {sum(valid):,}")
