# SPDX-License-Identifier: MIT
"""Text for fine-tuning: batches of plain text or of (prompt, completion) pairs, three built-in tasks, and files.

    library     source of the standard library and of numpy; the embedded base was pretrained on it
    reference   the language reference in English (pydoc_data): a model of source code learns to write prose
    modules     a function's source and "# module: "; the completion is the package that the function comes from
    x.txt       one text; its last tenth is for validation
    x.jsonl     {"prompt": ..., "completion": ...} on each line

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
Why split by file, topic or line, and not by token? Neighbouring windows of a file share names, comments and sentences.
If one is trained on and the next one validates, memorizing looks like learning.

Padding is on the right in training: no token sees the padding behind it (causal mask), and its labels are -100, so no
attention mask is needed. For generation it is on the left, because new tokens come after a row's last one. A row that
is too long loses the beginning of its prompt, since the question mostly stands at the end.
Length buckets: a batch is as wide as its longest row. Of the validation batches of `modules` (32 rows), 50 % is padding
with rows in random order, and 2 % with rows of like length together: half the work.
Nats per token depend on the tokenizer: longer tokens are harder to guess, but there are fewer. Bits per byte compare
any two models on one text: 2.46 nats a token at 3.28 bytes a token are 2.46 / ln 2 / 3.28 = 1.08 bits per byte.

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
from pathlib import Path

import torch


class Error(ValueError):
    """Data that cannot be used; the message says what would be right."""


# ------------------------------------------------------------------------------------------------------------- batches

class TokenStream:
    """Texts as one stream of tokens, cut into windows of `length`. encoding is a tiktoken.Encoding."""

    n_truncated = 0  # no text is lost

    def __init__(self, texts, encoding, length):
        tokens = [encoding.eot_token]
        for ids in encoding.encode_ordinary_batch(texts):
            tokens += [*ids, encoding.eot_token]
        if len(tokens) < length:
            what = f"{len(tokens)} tokens, in training or in validation, are fewer than the {length} of an example"
            raise Error(f"{what}: give a longer text, or a smaller --length")
        self.tokens, self.length, self.encoding = torch.tensor(tokens), length, encoding

    def sample(self, size):
        """For training: (input_ids, labels), both (size, length), windows at random places."""
        start = torch.randint(len(self.tokens) - self.length + 1, (size, 1))
        ids = self.tokens[start + torch.arange(self.length)]  # (B, T)
        return ids, self.labels(ids)

    def batches(self, size):
        """For validation: (input_ids, labels) in order, each token after the first scored once."""
        windows = self.tokens.unfold(0, self.length, self.length - 1)  # (n, T), each starts where the last one ended
        for ids in windows.split(size):
            yield ids, self.labels(ids)
        rest = self.tokens[len(windows) * (self.length - 1) :][None]
        if rest.size(1) > 1:
            yield rest, self.labels(rest)

    def labels(self, ids):
        """The ids, but -100 for a window's first: with a soft prompt in front it would be guessed from no text."""
        return torch.cat((torch.full_like(ids[:, :1], -100), ids[:, 1:]), 1)

    def opening(self):
        """The first words, as a prompt for a sample."""
        return self.encoding.decode(self.tokens[1:17].tolist())

    def bytes(self):
        """Bytes of text that `batches` scores: what bits per byte are counted over."""
        return count_bytes(self.tokens.tolist(), self.encoding)


class CompletionDataset:
    """(prompt, completion) pairs as rows of at most `length` tokens.

    items are (prompt ids with <eot> before, completion ids with <eot> after). Too long a row loses the beginning of its
    prompt; a completion that alone is too long keeps its first length - 1 tokens. n_truncated counts such rows.
    """

    def __init__(self, pairs, encoding, length):
        self.encoding, self.pad, self.items, self.n_truncated = encoding, encoding.eot_token, [], 0
        prompts = encoding.encode_ordinary_batch([prompt for prompt, _ in pairs])
        completions = encoding.encode_ordinary_batch([completion for _, completion in pairs])
        for prompt, completion in zip(prompts, completions):
            prompt, completion = [self.pad, *prompt], [*completion, self.pad]
            self.n_truncated += len(prompt) + len(completion) > length
            completion = completion[: length - 1]
            self.items.append((prompt[len(completion) - length :], completion))

    def collate(self, items):
        """(input_ids, labels), both (len(items), longest): padded on the right, labels -100 but for completions."""
        ids = torch.full((len(items), max(len(p) + len(c) for p, c in items)), self.pad)
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

    def opening(self):
        return self.encoding.decode(self.items[0][0][1:]).lstrip("\ufffd")  # the rest of a character that was cut

    def bytes(self):
        return sum(count_bytes(completion, self.encoding) for _, completion in self.items)


def count_bytes(ids, encoding):
    """Bytes of text in these tokens, end-of-text aside."""
    return sum(len(token) for token in encoding.decode_tokens_bytes([i for i in ids if i != encoding.eot_token]))


def load(name, encoding, length):
    """(training, validation), each a TokenStream or a CompletionDataset, of a task or of a .txt or .jsonl file."""
    if name in TASKS:
        splits = TASKS[name]()
    elif name.endswith(".txt"):
        splits = split_text(read(name))
    elif name.endswith(".jsonl"):
        splits = split_pairs(read(name), name)
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
    """(training, validation) lists of (prompt with a function, package), split by file into about halves."""
    train, valid = [], []
    for package in PACKAGES:
        functions = {}
        for path, source in source_files(Path(sysconfig.get_path("stdlib"), package)).items():
            functions[path] = [(f"{f[:800]}\n# module: ", package) for f in top_functions(source)]
        counts = [0, 0]
        for found in sorted(functions.values(), key=len, reverse=True):  # the largest file first: the halves even out
            to_valid = counts[0] > counts[1]
            (valid if to_valid else train).extend(found)
            counts[to_valid] += len(found)
    return train, valid


def source_files(folder):
    """{path relative to folder: source} of every .py file below it but tests and installed packages."""
    files = {}
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).parts
        if set(parts) & NOT_LIBRARY or parts[-1].startswith("_sysconfig"):  # the last has paths of this machine
            continue
        try:
            with tokenize.open(path) as file:  # decodes it as its own coding line says
                files["/".join(parts)] = file.read()
        except (SyntaxError, UnicodeDecodeError):
            continue
    return files


def top_functions(source):
    """The source of functions and methods of three lines or more, at the top level or under class, if or try."""
    lines, found, stack = source.split("\n"), [], [ast.parse(source)]  # splitlines would count form feeds as well
    while stack:
        for node in ast.iter_child_nodes(stack.pop()):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                if node.end_lineno - node.lineno >= 2:
                    found.append(textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno])))
            elif isinstance(node, (ast.ClassDef, ast.If, ast.Try)):
                stack.append(node)
    return found


TASKS = {"library": library, "reference": reference, "modules": modules}


# --------------------------------------------------------------------------------------------------------------- files

BLANKS = re.compile(r"(?<!\s)\s{100000}")  # over a million of them tiktoken panics, which no except should catch


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


def split_text(text):
    """The first nine tenths and the rest, cut at a paragraph's end, or a line's, or anywhere if the text has none."""
    nine_tenths = len(text) * 9 // 10
    for end in ("\n\n", "\n"):
        cut = text.find(end, nine_tenths) + len(end)
        if end in text[nine_tenths:] and text[cut:].strip():
            return [text[:cut]], [text[cut:]]
    return [text[:nine_tenths]], [text[nine_tenths:]]


def split_pairs(text, path):
    """(prompt, completion) of each line; the tenth with the lowest checksums is held out, repeated lines together."""
    pairs = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            example = json.loads(line)
        except (ValueError, RecursionError) as error:  # no JSON, a number of 5,000 digits, 10,000 nested lists
            raise Error(f"{path}, line {number}: no JSON: {error}") from None
        if not isinstance(example, dict) or not all(isinstance(example.get(k), str) for k in ("prompt", "completion")):
            raise Error(f'{path}, line {number}: needs a text for "prompt" and for "completion"')
        for key in ("prompt", "completion"):
            if re.search("[\ud800-\udfff]", example[key]):
                raise Error(f"{path}, line {number}: {key} has half of a surrogate pair, which is no character")
            if BLANKS.search(example[key]):
                raise Error(f"{path}, line {number}: {key} has 100,000 blanks or more in a row: shorten them")
        pairs.append((zlib.crc32(line.encode()), example["prompt"], example["completion"]))
    if len(pairs) < 2:
        raise Error(f"{path} has one example; two are the least, to train and to validate")
    pairs = [pair[1:] for pair in sorted(pairs)]
    held_out = max(1, len(pairs) // 10)
    while held_out < len(pairs) - 1 and pairs[held_out] == pairs[held_out - 1]:
        held_out += 1
    return pairs[held_out:], pairs[:held_out]


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
