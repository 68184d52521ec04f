# SPDX-License-Identifier: MIT
"""Technique files repeat a few lines instead of importing each other; these tests hold the copies together."""

import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanopeft import adapter, gpt, lora, prompt, ptuning


@pytest.mark.parametrize("name", ["takes_forever", "replace"])
def test_lora_and_adapter_share_their_words(name):
    """What lora.py and adapter.py both need is the same text in both."""
    assert inspect.getsource(getattr(lora, name)) == inspect.getsource(getattr(adapter, name))


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 5), st.integers(1, 4), st.integers(2, 9), st.integers(0, 3), st.integers(0, 9))
def test_vectors_in_front_are_a_prompt(n, rows, length, padding, seed):
    """P-tuning with its slots in front, folded, computes bit for bit what prompt tuning computes with these vectors."""
    torch.manual_seed(seed)
    shape = dict(vocab_size=31, n_positions=32, n_embd=8, n_layer=2, n_head=2)
    base, ids = gpt.GPT(**shape), torch.randint(31, (rows, length + padding))
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    labels = ids.masked_fill(mask == 0, -100)
    slots = ptuning.fold_ptuning(ptuning.PTuning(base, n))
    vectors = prompt.PromptTuning(base, n)
    prompt.load_prompt_state_dict(vectors, ptuning.ptuning_state_dict(slots))
    for call in (dict(labels=labels), {}):
        ours, theirs = (model(ids, attention_mask=mask, **call) for model in (vectors, slots))
        for a, b in zip(ours[:2], theirs[:2]):
            assert (a is None and b is None) or torch.equal(a, b)
    texts = [gpt.generate(model, ids, 3, attention_mask=mask) for model in (vectors, slots)]
    assert torch.equal(*texts)
