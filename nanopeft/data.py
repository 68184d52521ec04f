# SPDX-License-Identifier: MIT
"""Text for the runs: three tasks made from the Python that is running, .txt and .jsonl files, tokenizers, batches.

    library     the source of the standard library and of numpy: what the embedded base was pretrained on
    reference   the language reference in English, from pydoc_data: how a model of code learns to write prose
    modules     a function's source, then "# module: ", and the model writes the package that the function comes from
    x.txt       one text; its last tenth is held out
    x.jsonl     one {"prompt": ..., "completion": ...} a line; the loss is on the completion and the end of text

Training and validation are split by file, topic or line, and a .txt at one place; never token by token.
Dimensions: B examples a batch, T tokens an example.
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
from pathlib import Path

import numpy
import tiktoken
import torch

TASKS = ("library", "reference", "modules")
# The packages that `modules` tells apart, in every Python. Not http: its five files have so little in common that one
# half says nothing of the other. `library` leaves out these and http, as it did when the base was pretrained.
PACKAGES = ("asyncio", "email", "importlib", "logging", "multiprocessing", "unittest", "urllib", "xml")
NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
ENDOFTEXT = "<|endoftext|>"
# GPT-2's cut of a text into words, which merges never cross.
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Over a run of a million blanks tiktoken panics, which no except should catch.
BLANKS = re.compile(r"(?<!\s)\s{100000}")


class Error(ValueError):
    """Data that cannot be used; the message says what would be right."""


# ----------------------------------------------------------------------------------------------------------- tokenizer


def byte_alphabet():
    """GPT-2's printable stand-in for each of the 256 bytes, in the order of their token ids: {byte: character}."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(rest)}


def load_tokenizer(folder):
    """The tiktoken.Encoding of a folder's vocab.json and merges.txt (GPT-2's files)."""
    folder = Path(folder)
    byte_of = {char: byte for byte, char in byte_alphabet().items()}
    for name in ("vocab.json", "merges.txt"):
        if not os.path.isfile(folder / name):  # a pipe would be waited for
            raise Error(f"{folder / name}: no such file; vocab.json and merges.txt are GPT-2's tokenizer")
    try:
        vocab = json.loads((folder / "vocab.json").read_text("utf-8"))
        lines = (folder / "merges.txt").read_text("utf-8").splitlines()
        merges = [line.replace(" ", "") for line in lines if line and not line.startswith("#version")]
        special = {ENDOFTEXT: vocab.pop(ENDOFTEXT)}
        ranks = {bytes(byte_of[c] for c in token): id for token, id in vocab.items()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise Error(f"{folder} has no GPT-2 tokenizer (vocab.json with {ENDOFTEXT}, merges.txt): {error!r}") from None
    ids = [*vocab.values(), *special.values()]
    if any(type(id) is not int for id in ids) or sorted(ids) != [*range(len(ids))]:
        raise Error(f"{folder / 'vocab.json'}: token ids must be 0 to {len(ids) - 1}, each once")
    if not {bytes([b]) for b in range(256)} <= ranks.keys():
        raise Error(f"{folder / 'vocab.json'}: each of the 256 bytes must be a token")
    # tiktoken merges the pair whose result has the lowest id first: the ids must be in the order of the merges.
    if [*vocab] != sorted(vocab, key=vocab.get) or [*vocab][256:] != merges or len(ranks) != len(vocab):
        raise Error(f"{folder / 'vocab.json'}: token ids must follow the order of merges.txt")
    return tiktoken.Encoding(str(folder), pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special)


def save_tokenizer(encoding, folder):
    """Writes vocab.json and merges.txt, as load_tokenizer and transformers.AutoTokenizer read them."""
    folder, alphabet = Path(folder), byte_alphabet()
    ranks = encoding._mergeable_ranks
    text = {token: "".join(alphabet[b] for b in token) for token in ranks}
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) > 1:
            # The pair that made a token: what is left of it when only the merges before its own are applied.
            parts = [bytes([b]) for b in token]
            while len(parts) > 2:
                pairs = [ranks.get(a + b, rank) for a, b in zip(parts, parts[1:])]
                if min(pairs) >= rank:
                    raise Error(f"no merges of the tokenizer make {token!r}, one of its tokens")
                i = pairs.index(min(pairs))
                parts[i : i + 2] = [parts[i] + parts[i + 1]]
            merges.append(f"{text[parts[0]]} {text[parts[1]]}")
    vocab = {text[token]: rank for token, rank in sorted(ranks.items(), key=lambda item: item[1])}
    folder.mkdir(parents=True, exist_ok=True)
    vocab |= {ENDOFTEXT: encoding.eot_token}
    lines = ["#version: 0.2", *merges, ""]
    files = {"vocab.json": json.dumps(vocab, ensure_ascii=False), "merges.txt": "\n".join(lines)}
    for name, content in files.items():
        (folder / f"{name}.new").write_text(content, "utf-8")
        os.replace(folder / f"{name}.new", folder / name)  # whole or not at all


def train_tokenizer(texts, vocab_size):
    """Byte-level BPE (arXiv 1508.07909, algorithm 1): merge the most frequent pair of neighbours, again and again."""
    import regex  # a dependency of tiktoken

    words = Counter(word for text in texts for word in regex.findall(PATTERN, text))
    words = [([bytes([b]) for b in word.encode()], n) for word, n in words.items()]
    counts, where = Counter(), defaultdict(set)  # of each pair: how often it occurs, and in which words
    for i, (parts, n) in enumerate(words):
        for pair in zip(parts, parts[1:]):
            counts[pair] += n
            where[pair].add(i)
    ranks = {bytes([b]): rank for rank, b in enumerate(byte_alphabet())}
    while len(ranks) < vocab_size - 1:
        best = max(counts, key=lambda pair: (counts[pair], pair))
        ranks[b"".join(best)] = len(ranks)
        for i in where.pop(best):
            parts, n = words[i]
            for pair in zip(parts, parts[1:]):
                counts[pair] -= n
            merged = []
            for part in parts:
                if merged and (merged[-1], part) == best:
                    merged[-1] += part
                else:
                    merged.append(part)
            words[i] = merged, n
            for pair in zip(merged, merged[1:]):
                counts[pair] += n
                where[pair].add(i)
        del counts[best]
    return tiktoken.Encoding("nano", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={ENDOFTEXT: vocab_size - 1})


# ----------------------------------------------------------------------------------------------------------- documents


def source_files(folder):
    """{path relative to folder: source} of every .py file below it but tests and installed packages."""
    files = {}
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).parts
        if set(parts) & NOT_LIBRARY or parts[-1].startswith("_sysconfig"):  # the last: paths of this machine
            continue
        try:
            with tokenize.open(path) as file:  # by the file's own coding line
                files["/".join(parts)] = file.read()
        except (SyntaxError, UnicodeDecodeError):
            continue
    return files


def library():
    """The standard library's files, and numpy's, as (training, validation) texts.

    Held out is one of the library's files in 20, by a checksum of its path: the same ones on every machine.
    """
    train, valid = [*source_files(Path(numpy.__file__).parent).values()], []
    for path, source in source_files(Path(sysconfig.get_path("stdlib"))).items():
        if path.split("/")[0] not in (*PACKAGES, "http", "pydoc_data") and source:
            held_out = zlib.crc32(path.encode()) % 20 == 0
            (valid if held_out else train).append(source)
    return train, valid


def reference():
    """The topics of the language reference as (training, validation) texts; every fifth topic is held out.

    Topics repeat one another: a paragraph that is held out is taken from the training side as well.
    """
    from pydoc_data.topics import topics

    valid = [topics[name] for name in sorted(topics)[::5]]
    held_out = {paragraph for text in valid for paragraph in text.split("\n\n")}
    train = [[p for p in text.split("\n\n") if p not in held_out] for text in topics.values()]
    return ["\n\n".join(paragraphs) for paragraphs in train if paragraphs], valid


def modules():
    """Functions and methods of PACKAGES as (training, validation) lists of (prompt, package), split by file."""
    train, valid = [], []
    for package in PACKAGES:
        functions = {}
        for path, source in source_files(Path(sysconfig.get_path("stdlib"), package)).items():
            functions[path] = [(f"{f[:800]}\n# module: ", package) for f in top_functions(source)]
        counts = [0, 0]
        for found in sorted(functions.values(), key=len, reverse=True):
            side = counts[0] > counts[1]  # largest file first, so that both sides get about half
            (valid if side else train).extend(found)
            counts[side] += len(found)
    return train, valid


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


# ------------------------------------------------------------------------------------------------------------- batches


class Text:
    """Texts joined by end-of-text into one stream, from which windows of `length` tokens are cut."""

    def __init__(self, texts, encoding, length):
        tokens = [encoding.eot_token]
        for ids in encoding.encode_ordinary_batch(texts):
            tokens += [*ids, encoding.eot_token]
        if len(tokens) < length:
            what = f"{len(tokens)} tokens, in training or in validation, are fewer than the {length} of an example"
            raise Error(f"{what}: give a longer text, or a smaller --length")
        self.tokens, self.length, self.encoding, self.cut = torch.tensor(tokens), length, encoding, 0

    def sample(self, size):
        """(input_ids, labels), both (size, length), at random places."""
        start = torch.randint(len(self.tokens) - self.length + 1, (size, 1))
        ids = self.tokens[start + torch.arange(self.length)]  # (B, T)
        return ids, self.labels(ids)

    def batches(self, size):
        """(input_ids, labels) in order, each token after the first scored once."""
        windows = self.tokens.unfold(0, self.length, self.length - 1)  # (n, T), each starts where the last one ended
        for ids in windows.split(size):
            yield ids, self.labels(ids)
        rest = self.tokens[len(windows) * (self.length - 1) :][None]
        if rest.size(1) > 1:
            yield rest, self.labels(rest)

    def labels(self, ids):
        """All but the first token of a window, which a prompt in front of it would otherwise have to guess."""
        return torch.cat((torch.full_like(ids[:, :1], -100), ids[:, 1:]), 1)

    def opening(self):
        """The first tokens of the data, for a sample to go on from."""
        return self.encoding.decode(self.tokens[1:17].tolist())

    def bytes(self):
        """Bytes of text that `batches` scores."""
        return count_bytes(self.tokens.tolist(), self.encoding)


class Examples:
    """(prompt, completion) pairs; the loss is on the completion and the end of text after it.

    Of an example with more than `length` tokens, the end of the prompt is kept, and of a completion that fills it alone
    the beginning, after one token of the prompt; `cut` counts them.
    """

    def __init__(self, pairs, encoding, length):
        self.encoding, self.pad, self.items, self.cut = encoding, encoding.eot_token, [], 0
        prompts = encoding.encode_ordinary_batch([prompt for prompt, _ in pairs])
        completions = encoding.encode_ordinary_batch([completion for _, completion in pairs])
        for prompt, completion in zip(prompts, completions):
            prompt, completion = [self.pad, *prompt], [*completion, self.pad]
            self.cut += len(prompt) + len(completion) > length
            completion = completion[: length - 1]
            self.items.append((prompt[len(completion) - length :], completion))

    def pack(self, items):
        """(input_ids, labels), both (len(items), longest): padded on the right, labels -100 but for the completion."""
        ids = torch.full((len(items), max(len(p) + len(c) for p, c in items)), self.pad)
        labels = torch.full_like(ids, -100)
        for row, (p, c) in enumerate(items):
            ids[row, : len(p) + len(c)] = torch.tensor(p + c)
            labels[row, len(p) : len(p) + len(c)] = torch.tensor(c)
        return ids, labels

    def sample(self, size):
        return self.pack([self.items[i] for i in torch.randint(len(self.items), (size,)).tolist()])

    def by_length(self, size):
        """Lists of `size` items, alike in length so that little is padded."""
        items = sorted(self.items, key=lambda item: len(item[0]) + len(item[1]))
        return [items[i : i + size] for i in range(0, len(items), size)]

    def batches(self, size):
        yield from map(self.pack, self.by_length(size))

    def opening(self):
        return self.encoding.decode(self.items[0][0][1:]).lstrip("\ufffd")  # of a character that was cut in two

    def bytes(self):
        return sum(count_bytes(completion, self.encoding) for _, completion in self.items)


def count_bytes(ids, encoding):
    """Bytes of text in these tokens, end-of-text aside."""
    return sum(len(token) for token in encoding.decode_tokens_bytes([i for i in ids if i != encoding.eot_token]))


def load(name, encoding, length):
    """(training, validation) data, each `Text` or `Examples`, of a task or of a .txt or .jsonl file."""
    if name == "library":
        sides = library()
    elif name == "reference":
        sides = reference()
    elif name == "modules":
        sides = modules()
    elif name.endswith(".txt"):
        sides = split_text(read(name))
    elif name.endswith(".jsonl"):
        sides = split_pairs(read(name), name)
    else:
        raise Error(f"no data {name!r}: give {', '.join(TASKS)}, or a .txt or .jsonl file")
    kind = Examples if isinstance(sides[0][0], tuple) else Text
    return tuple(kind(side, encoding, length) for side in sides)


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
        except (ValueError, RecursionError) as error:  # no JSON, a number of 5,000 digits, 10,000 lists in each other
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
    save_tokenizer(train_tokenizer(library()[0], vocab_size=3072), Path(__file__).parent / "base")
    print("trained the base's tokenizer on the library: nanopeft/base/vocab.json, merges.txt")
