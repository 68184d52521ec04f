# SPDX-License-Identifier: MIT
"""The embedded base: a GPT-2 checkpoint that transformers opens, small, and pretrained as far as the README says."""

import json
import math
import zlib
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, GPT2LMHeadModel

from nanopeft import data
from nanopeft.trainer import tasks
from nanopeft.trainer.bases import find_checkpoint, load_gpt
from nanopeft.trainer.tokenizer import load_tokenizer

FOLDER = find_checkpoint("nano")
ENCODING = load_tokenizer(FOLDER)


def test_it_is_small():
    """The base is four files of at most 12 MB, in bf16, and its config names its own begin and end of text."""
    assert {p.name for p in FOLDER.iterdir()} == {"config.json", "model.safetensors", "vocab.json", "merges.txt"}
    assert sum(p.stat().st_size for p in FOLDER.iterdir()) <= 12e6
    config = json.loads((FOLDER / "config.json").read_text())
    assert config["bos_token_id"] == config["eos_token_id"] == ENCODING.eot_token
    assert config["dtype"] == "bfloat16"


def test_transformers_opens_it():
    """GPT2LMHeadModel computes the same logits from the folder, to 1e-5 of the largest (fp32, six layers)."""
    ids = torch.randint(ENCODING.n_vocab, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = load_gpt("nano").eval()(ids).logits
        theirs = GPT2LMHeadModel.from_pretrained(FOLDER, dtype=torch.float32).eval()(ids).logits
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_auto_tokenizer_opens_it():
    """AutoTokenizer gives the same tokens from the folder, on source, on prose, and on text of other scripts."""
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    assert tokenizer.eos_token_id == ENCODING.eot_token
    source = Path(json.__file__).read_text("utf-8")
    for text in (source, tasks.reference()[1][0], "naïve — 你好, שלום 🙂\t\n\n  x  \u00a0y"):
        ids = tokenizer(text).input_ids
        assert ids == ENCODING.encode_ordinary(text)
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def bits_per_byte(texts, limit=None):
    """Of the base, in fp32, over the first `limit` batches of the texts."""
    model, valid = load_gpt("nano").eval(), data.TokenStream(texts, ENCODING, 512)
    nats, n_bytes = 0.0, 0
    with torch.no_grad():
        for ids, labels in [*valid.batches(8)][:limit]:
            scored = labels[:, 1:].flatten().tolist()
            nats += model(ids, labels=labels).loss.item() * len(scored)
            n_bytes += sum(map(len, ENCODING.decode_tokens_bytes([i for i in scored if i != ENCODING.eot_token])))
    return nats / math.log(2) / n_bytes


def test_it_has_learned_python_at_a_glance():
    """On 4,000 tokens of two modules that it has not seen it stays below 1.5 bits per byte; xz -9 needs 1.74."""
    modules = sorted(Path(json.__file__).parents[1].glob("*.py"))
    unseen = [path.read_text("utf-8") for path in modules if zlib.crc32(path.name.encode()) % 20 == 0]
    assert bits_per_byte(unseen, limit=1) <= 1.5


@pytest.mark.thorough
def test_it_has_learned_python():
    """On library files that it has not seen it needs at most 1.28 bits per byte; xz -9 needs 1.74."""
    assert bits_per_byte(tasks.library()[1]) <= 1.28
