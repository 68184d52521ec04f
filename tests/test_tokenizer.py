# SPDX-License-Identifier: MIT
"""nanopeft/trainer/tokenizer.py: any text comes back, merges are the most frequent pairs, broken files are refused."""

import json

import pytest
import tiktoken
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from nanopeft.trainer import tokenizer
from nanopeft.trainer.bases import find_checkpoint

BASE = find_checkpoint("nano")
ENCODING = tokenizer.load_tokenizer(BASE)


def test_encoding_is_tiktokens():
    """The tokenizer is a plain tiktoken.Encoding, so that code written for GPT-2's works with it."""
    assert isinstance(ENCODING, tiktoken.Encoding)
    assert ENCODING.decode([ENCODING.eot_token]) == tokenizer.ENDOFTEXT


@settings(deadline=None, max_examples=100)
@given(st.text())
def test_tokenizer_round_trip(text):
    """Decoding what was encoded gives any text back, special-token text included, which never becomes the token."""
    ids = ENCODING.encode_ordinary(text + tokenizer.ENDOFTEXT)
    assert ENCODING.eot_token not in ids
    assert ENCODING.decode(ids) == text + tokenizer.ENDOFTEXT


def test_tokenizer_files_round_trip(tmp_path):
    """Saving and loading a tokenizer gives the same files and the same tokens."""
    tokenizer.save_tokenizer(ENCODING, tmp_path)
    for name in ("vocab.json", "merges.txt"):
        assert (tmp_path / name).read_text("utf-8") == (BASE / name).read_text("utf-8")


@settings(deadline=None, max_examples=30)
@given(st.lists(st.text(alphabet="abc \n", min_size=1), min_size=1, max_size=20))
def test_training_merges_the_most_frequent_pair_first(texts):
    """The first merge of byte-level BPE is a pair that no other pair of neighbours inside a word outnumbers."""
    import regex

    counts = {}
    for text in texts:
        for word in regex.findall(tokenizer.PATTERN, text):
            for pair in zip(word, word[1:]):
                counts[pair] = counts.get(pair, 0) + 1
    if not counts:
        return
    encoding = tokenizer.train_tokenizer(texts, 258)
    first = encoding.decode_single_token_bytes(256).decode()
    assert counts[tuple(first)] == max(counts.values())


def test_trained_tokenizer_compresses_as_it_should():
    """A word seen often becomes one token, and the vocabulary has the asked size with end-of-text last."""
    encoding = tokenizer.train_tokenizer(["return self.value\n"] * 50, 257 + 13)
    assert encoding.n_vocab == encoding.eot_token + 1 == 257 + 13
    assert len(encoding.encode_ordinary(" self")) == 1
    with pytest.raises(tokenizer.Error, match="270 tokens at most"):  # 5 + 4 + 4 merges make its three long words
        tokenizer.train_tokenizer(["return self.value\n"] * 50, 257 + 14)


def test_merges_apply_in_the_order_of_training():
    """The docstring's example: after "t h" and "th e", "these" is the, s, e, and " these" keeps its space apart."""
    encoding = tokenizer.train_tokenizer(["the"] * 3 + ["th"], 257 + 2)
    assert encoding.decode_tokens_bytes(encoding.encode_ordinary("these these")) == [
        b"the", b"s", b"e", b" ", b"the", b"s", b"e",
    ]  # fmt: skip


def test_tokens_that_were_added(tmp_path):
    """A GPT-2 to which somebody added special tokens, saved by transformers 5, reads text as before."""
    tokenizer.save_tokenizer(ENCODING, tmp_path)
    theirs = transformers.GPT2Tokenizer.from_pretrained(tmp_path)
    theirs.add_special_tokens({"pad_token": "[PAD]"})
    theirs.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new" / "vocab.json").exists()
    found = tokenizer.load_tokenizer(tmp_path / "new")
    assert found.n_vocab == ENCODING.n_vocab + 1 == len(theirs) and found.eot_token == ENCODING.eot_token
    assert found.encode_ordinary("def f(x): [PAD]") == ENCODING.encode_ordinary("def f(x): [PAD]")
    assert found.decode([theirs.pad_token_id]) == "[PAD]"


@pytest.mark.parametrize("broken", ["no vocab", "no merges", "not JSON", "no end of text", "wrong order", "a list"])
def test_broken_tokenizer_is_refused(tmp_path, broken):
    """A folder without a whole GPT-2 tokenizer gives one clear line."""
    tokenizer.save_tokenizer(ENCODING, tmp_path)
    vocab = json.loads((tmp_path / "vocab.json").read_text("utf-8"))
    if broken == "no vocab":
        (tmp_path / "vocab.json").unlink()
    elif broken == "no merges":
        (tmp_path / "merges.txt").unlink()
    elif broken == "not JSON":
        (tmp_path / "vocab.json").write_text("{")
    elif broken == "no end of text":
        del vocab[tokenizer.ENDOFTEXT]
        (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    elif broken == "wrong order":
        vocab["!"], vocab["Ġt"] = vocab["Ġt"], vocab["!"]
        (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    else:
        (tmp_path / "vocab.json").write_text("[1]")
    with pytest.raises(tokenizer.Error) as error:
        tokenizer.load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)
