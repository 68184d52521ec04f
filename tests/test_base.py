# SPDX-License-Identifier: MIT
"""The embedded base: a GPT-2 checkpoint that transformers opens, small, and pretrained as far as the README says."""

import json
import math
from contextlib import nullcontext

import torch
from transformers import AutoTokenizer, GPT2LMHeadModel

from nanopeft import data, gpt, wide

FOLDER = gpt.find_checkpoint("nano")
ENCODING = data.load_tokenizer(FOLDER)


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
        ours = gpt.GPT.from_pretrained("nano").eval()(ids).logits
        theirs = GPT2LMHeadModel.from_pretrained(FOLDER, dtype=torch.float32).eval()(ids).logits
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_auto_tokenizer_opens_it():
    """AutoTokenizer gives the same tokens from the folder, on source, on prose, and on text of other scripts."""
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    assert tokenizer.eos_token_id == ENCODING.eot_token
    for text in (data.library()[1][0], data.reference()[1][0], "naïve — 你好, שלום 🙂\t\n\n  x  \u00a0y"):
        ids = tokenizer(text).input_ids
        assert ids == ENCODING.encode_ordinary(text)
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_it_has_learned_python():
    """On library files that it has not seen it needs at most 1.28 bits per byte; xz -9 needs 1.74."""
    valid = data.Text(data.library()[1], ENCODING, 512)
    model = gpt.GPT.from_pretrained("nano", torch.bfloat16).eval()
    nats = 0.0
    emulated = wide.emulates(torch.bfloat16)  # it would take four minutes
    with torch.no_grad(), wide.WideProducts() if emulated else nullcontext():
        for ids, labels in valid.batches(16):
            nats += model(ids, labels=labels).loss.item() * labels[:, 1:].numel()
    assert nats / math.log(2) / valid.bytes() <= 1.28
