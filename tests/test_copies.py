# SPDX-License-Identifier: MIT
"""Technique files repeat a few lines instead of importing each other; these tests hold the copies together."""

import inspect

import pytest
import torch
import torch.nn as nn
from hypothesis import given, settings
from hypothesis import strategies as st

from nanopeft import adapter, gpt, lora, prompt, ptuning


@pytest.mark.parametrize("name", ["takes_forever", "replace"])
def test_lora_and_adapter_share_their_words(name):
    """What lora.py and adapter.py both need is the same text in both."""
    assert inspect.getsource(getattr(lora, name)) == inspect.getsource(getattr(adapter, name))


@pytest.mark.parametrize("part", ["layer", "block"])
def test_one_layer_in_several_places(part):
    """What the model calls in three places is wrapped in all of them, is one set of parameters, and comes off again.

    The oracle is the same wrapped layer, called three times.
    """
    torch.manual_seed(0)
    x, layer = torch.randn(2, 4).double(), nn.Linear(4, 4).double()
    block = nn.Sequential(layer, nn.Tanh())
    model = nn.Sequential(*[block] * 3) if part == "block" else nn.Sequential(layer, nn.Tanh(), layer, layer)
    plain = model(x)
    lora.add_lora(model, ("0.0" if part == "block" else "0",), r=2, init="reverse")
    wrapped = next(iter(lora.lora_layers(model).values()))
    nn.init.normal_(wrapped.lora_A)
    f = (lambda x: wrapped(x).tanh()) if part == "block" else wrapped
    expected = f(f(f(x))) if part == "block" else f(f(f(x).tanh()))
    assert torch.equal(model(x), expected) and not torch.equal(expected, plain)
    assert (lora.merge_lora(model)(x) - expected).abs().max() <= 1e-12
    assert torch.equal(lora.remove_lora(lora.unmerge_lora(model))(x), plain)

    model = nn.ModuleList([block] * 3) if part == "block" else nn.ModuleList([layer] * 3)
    run = lambda: model[2](model[1](model[0](x)))  # noqa: E731
    plain = run()
    adapter.add_adapter(model, "0", bottleneck=2, placement="pfeiffer" if part == "block" else "houlsby")
    wrapped = next(iter(adapter.adapter_layers(model).values()))
    for p in wrapped.adapter.parameters():
        nn.init.normal_(p)
    assert model[0] is model[1] is model[2] is wrapped
    assert torch.equal(run(), wrapped(wrapped(wrapped(x)))) and not torch.equal(run(), plain)
    adapter.remove_adapter(model)
    assert torch.equal(run(), plain)


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
