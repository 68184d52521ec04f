# SPDX-License-Identifier: MIT
"""GPT-2's tokenizer, byte-level byte-pair encoding (BPE): trained, and read from and written to GPT-2's two files.

    training    start with the 256 bytes as tokens; merge the most frequent pair of neighbours into a new token; repeat
    encoding    cut the text into words (PATTERN); in each apply the merges, the earliest trained first
    decoding    join the bytes of the tokens

Every text is a sequence of bytes, so no text is unknown. Merges never cross a word's edge. A space belongs to the word
after it: " cat" is one token, and "cat" is another. With the merges "t h", "th e" in this order, "these" is the s e.

    vocab.json      {token: id}, the 256 bytes first, then the merges in order, then end-of-text
    merges.txt      the two parts of each merge, a line each

Encoding and decoding are tiktoken's, which merges the pair with the lowest id first: ids are in the order of training.
Papers: BPE, arXiv 1508.07909, algorithm 1; bytes instead of characters, GPT-2 (Radford et al. 2019), section 2.2.

    python -m nanopeft.trainer.tokenizer        trains the embedded base's tokenizer again, on the text of `library`
"""

import functools
import json
import os
import re
from collections import Counter, defaultdict
from pathlib import Path

import tiktoken

from nanopeft.trainer import Error, checkpoint

ENDOFTEXT = "<|endoftext|>"  # encode_ordinary never makes this token from text, even from a text that contains it
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # GPT-2's


def train_tokenizer(texts, vocab_size):
    """A tiktoken.Encoding with vocab_size - 257 merges learned from these texts, and end-of-text as the last token."""
    import regex  # a dependency of tiktoken

    words = Counter(word for text in texts for word in regex.findall(PATTERN, text))
    words = [([bytes([b]) for b in word.encode()], n) for word, n in words.items()]  # (tokens, how often)
    counts, where = Counter(), defaultdict(set)  # of each pair: how often it occurs, and in which words
    for i, (parts, n) in enumerate(words):
        for pair in zip(parts, parts[1:]):
            counts[pair] += n
            where[pair].add(i)
    ranks = {bytes([b]): rank for rank, b in enumerate(byte_alphabet())}
    while len(ranks) < vocab_size - 1:
        best = max(counts, key=lambda pair: (counts[pair], pair), default=None)
        if not counts[best]:
            raise Error(f"the texts give {len(ranks) + 1} tokens at most, not {vocab_size}: give more text")
        ranks[b"".join(best)] = len(ranks)
        for i in where.pop(best):  # only the words with this pair change, and only their pairs are counted again
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


# --------------------------------------------------------------------------------------------------------------- files

def byte_alphabet():
    """{byte: the printable character that stands for it in GPT-2's files}, in the order of the bytes' token ids."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(rest)}


@functools.cache
def byte_of():
    return {char: byte for byte, char in byte_alphabet().items()}


def token_bytes(token, byte_level):
    """The bytes of a token as vocabularies write it: in byte_alphabet, or with ▁ for a space and <0xE4> for a byte."""
    if byte_level:
        return bytes(byte_of().get(char, ord("?")) for char in token)
    return bytes.fromhex(token[3:5]) if re.fullmatch("<0x[0-9A-F]{2}>", token) else token.replace("▁", " ").encode()


def load_tokenizer(folder):
    """The tiktoken.Encoding of a folder's vocab.json and merges.txt, or of tokenizer.json where these are missing."""
    folder = Path(folder)
    alone = os.path.isfile(folder / "tokenizer.json") and not os.path.exists(folder / "vocab.json")
    names = ["tokenizer.json"] if alone else ["vocab.json", "merges.txt"]
    for name in names:
        if not os.path.isfile(folder / name):  # a pipe would be waited for
            raise Error(f"{folder / name}: no such file; vocab.json and merges.txt are GPT-2's tokenizer")
    try:
        stored = json.loads((folder / names[0]).read_text("utf-8"))
        if alone:
            vocab, merges, added = from_tokenizer_json(stored)
        else:
            vocab, added, lines = stored, [], (folder / "merges.txt").read_text("utf-8").splitlines()
            merges = [line.replace(" ", "") for line in lines if line and not line.startswith("#version")]
        special = {token: vocab.pop(token) for token in {ENDOFTEXT, *added}}
        ranks = {bytes(byte_of()[c] for c in token): id for token, id in vocab.items()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise Error(f"{folder} has no GPT-2 tokenizer in {', '.join(names)} (with {ENDOFTEXT}): {error!r}") from None
    ids = [*vocab.values(), *special.values()]
    if any(type(id) is not int for id in ids) or sorted(ids) != [*range(len(ids))]:
        raise Error(f"{folder / names[0]}: token ids must be 0 to {len(ids) - 1}, each once")
    if not {bytes([b]) for b in range(256)} <= ranks.keys():
        raise Error(f"{folder / names[0]}: each of the 256 bytes must be a token")
    if sorted(vocab, key=vocab.get)[256:] != merges or len(ranks) != len(vocab):
        raise Error(f"{folder / names[0]}: token ids must follow the order of the merges")
    return tiktoken.Encoding(str(folder), pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special)


def from_tokenizer_json(stored):
    """({token: id}, [merged token], [special token]) of what transformers writes since version 5. ValueError if it is
    no GPT-2's."""
    model, words = stored["model"], stored["pre_tokenizer"]
    kind = [model["type"], words["type"], words["add_prefix_space"], words.get("use_regex", True), stored["normalizer"]]
    if kind != ["BPE", "ByteLevel", False, True, None]:
        raise ValueError(f"{kind} is not byte-level BPE")
    added = {token["content"]: token["id"] for token in stored["added_tokens"]}  # a [PAD], say
    return model["vocab"] | added, ["".join(merge).replace(" ", "") for merge in model["merges"]], [*added]


def save_tokenizer(encoding, folder):
    """Writes vocab.json and merges.txt, as load_tokenizer and transformers.AutoTokenizer read them."""
    folder, alphabet = Path(folder), byte_alphabet()
    ranks = dict(sorted(encoding._mergeable_ranks.items(), key=lambda item: item[1]))  # {token: id} by id
    text = {token: "".join(alphabet[b] for b in token) for token in ranks}
    merges = []
    for token, rank in ranks.items():
        if len(token) > 1:
            # The pair that made this token: what is left of it after all merges that come before its own
            parts = [bytes([b]) for b in token]
            while len(parts) > 2:
                pairs = [ranks.get(a + b, rank) for a, b in zip(parts, parts[1:])]
                if min(pairs) >= rank:
                    raise Error(f"no merges of the tokenizer make {token!r}, one of its tokens")
                i = pairs.index(min(pairs))
                parts[i : i + 2] = [parts[i] + parts[i + 1]]
            merges.append(f"{text[parts[0]]} {text[parts[1]]}")
    vocab = {text[token]: rank for token, rank in ranks.items()} | {ENDOFTEXT: encoding.eot_token}
    lines = ["#version: 0.2", *merges, ""]
    files = {"vocab.json": json.dumps(vocab, ensure_ascii=False), "merges.txt": "\n".join(lines)}
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        checkpoint.write(folder / name, content.encode())


if __name__ == "__main__":
    from nanopeft import data

    save_tokenizer(train_tokenizer(data.library()[0], vocab_size=3072), Path(data.__file__).parent / "base")
    print("trained the base's tokenizer on the library: nanopeft/base/vocab.json, merges.txt")
