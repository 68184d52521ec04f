# SPDX-License-Identifier: MIT
"""Recomputation changes memory and time, and not a bit of any result."""

import copy
import os
import subprocess
import sys

import pytest
import torch
import torch.nn as nn
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from nanopeft import adapter, gpt, lora, prefix, prompt, ptuning, qlora, recompute
from nanopeft.recompute import Error, Recompute
from nanopeft.trainer.measure import peak_bytes

CASES = int(os.environ.get("CASES", 30))
METHODS = {
    "full": lambda model: model,
    "lora": lambda model: lora.add_lora(model, r=2, dropout=0.3),
    "qlora": lambda model: qlora.add_qlora(model, r=2, dropout=0.3),
    "adapter": lambda model: adapter.add_adapter(model, bottleneck=2),
    "prefix": lambda model: prefix.PrefixTuning(model, n_tokens=3),
    "prefix through an MLP": lambda model: prefix.PrefixTuning(model, n_tokens=3, hidden=5),
    "prompt": lambda model: prompt.PromptTuning(model, n_tokens=3),
    "ptuning": lambda model: ptuning.PTuning(model, n_tokens=3, encoder="mlp", hidden=4),
}


def small(n_layer=3, **sizes):
    return gpt.GPT(vocab_size=40, n_positions=32, n_embd=16, n_layer=n_layer, n_head=2, **sizes)


def perturb(model):
    """Gives every trained parameter a value: at B = 0 half of a gradient would be zero."""
    for p in model.parameters():
        if p.requires_grad and p.dim() > 1:
            nn.init.normal_(p, std=0.1)
    return model


def step(model, ids, mask=None):
    """(loss, gradients) of one step, always with the same random numbers."""
    torch.manual_seed(7)
    model.zero_grad()
    loss = model(input_ids=ids, attention_mask=mask, labels=ids).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(one, other):
    assert torch.equal(one[0], other[0])
    assert one[1].keys() == other[1].keys() and one[1]
    for name, grad in one[1].items():
        assert torch.equal(grad, other[1][name]), name


@settings(max_examples=CASES, deadline=None)
@given(
    method=st.sampled_from([*METHODS]), dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    every=st.integers(1, 4), n_layer=st.integers(1, 4), padded=st.booleans(), twice=st.booleans(),
)  # fmt: skip
def test_the_same_bits(method, dtype, every, n_layer, padded, twice):
    """Each method's loss and gradients are the same bits in any dtype, with dropout, padding and a repeated block."""
    torch.manual_seed(0)
    dtype = torch.float32 if dtype == torch.float64 and method == "qlora" else dtype
    model = small(n_layer).to(dtype)
    if twice and "prefix" not in method:  # two calls of one layer would share its entry in the cache
        model.transformer.h.append(model.transformer.h[0])
    model, ids = perturb(METHODS[method](model)), torch.randint(40, (3, 9))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    before, blocks = step(model, ids, mask if padded else None), base_of(model).transformer.h
    recompute.recompute(blocks, every)
    assert_same(step(model, ids, mask if padded else None), before)
    recompute.recompute(blocks, 0)
    assert not any("forward" in block.__dict__ for block in blocks)


def base_of(model):
    return getattr(model, "model", model)


MODELS = {
    "gpt2": transformers.GPT2Config(vocab_size=40, n_positions=32, n_embd=16, n_layer=2, n_head=2),
    "llama": transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32,
    ),
    "gpt_neox": transformers.GPTNeoXConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=32,
    ),
}  # fmt: skip


@pytest.mark.parametrize("method", ["full", "lora", "prefix", "prompt"])
@pytest.mark.parametrize("name", [*MODELS])
def test_transformers_models(name, method):
    """Blocks of transformers, with their keyword arguments, dropout and caches, give the same bits."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(MODELS[name]).train()
    blocks = next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == 2)
    model, ids = perturb(METHODS[method](model)), torch.randint(40, (2, 7))
    before = step(model, ids)
    recompute.recompute(blocks)
    assert_same(step(model, ids), before)


class Block(nn.Module):
    """A block with dropout, whose output is of the kind that is asked for."""

    def __init__(self, kind=torch.Tensor):
        super().__init__()
        self.fc, self.out, self.drop, self.kind = nn.Linear(8, 16), nn.Linear(16, 8), nn.Dropout(0.4), kind

    def forward(self, x):
        h = torch.tanh(self.fc(x))
        y = x + self.out(self.drop(h))
        return {torch.Tensor: y, tuple: (y, h), dict: {"y": y, "h": [h]}}[self.kind]


def gradients(block, x, call):
    torch.manual_seed(3)
    block.zero_grad()
    y = call(x)
    y.square().sum().backward()
    return [y.detach(), *(p.grad for p in block.parameters())]


def test_equals_the_whiteboard_and_torch():
    """Recompute, recompute and torch's two checkpoints give the gradients of plain autograd, to the bit."""
    torch.manual_seed(0)
    block, x = Block(), torch.randn(5, 8, requires_grad=True)
    plain = gradients(block, x, block)
    for call in (
        lambda x: Recompute.apply(block, x, *block.parameters()),
        lambda x: checkpoint(block, x, use_reentrant=True),
        lambda x: checkpoint(block, x, use_reentrant=False),
        lambda x: recompute.run(block, x),
    ):
        assert all(map(torch.equal, gradients(block, x, call), plain))


def test_a_frozen_base_is_no_trap():
    """If no input requires a gradient, torch's reentrant checkpoint trains nothing; Recompute and recompute train."""
    torch.manual_seed(0)
    block, x = Block(), torch.randn(5, 8)
    plain = gradients(block, x, block)
    with pytest.warns(UserWarning, match="None of the inputs have requires_grad=True"):
        assert not checkpoint(block, x, use_reentrant=True).requires_grad
    assert all(map(torch.equal, gradients(block, x, lambda x: Recompute.apply(block, x, *block.parameters())), plain))
    assert all(map(torch.equal, gradients(block, x, lambda x: recompute.run(block, x)), plain))


def test_random_numbers_go_on_as_without():
    """Backward leaves the random generator where it was: what is drawn after it is the same with and without."""
    drawn = []
    for every in (0, 1):
        model = nn.Sequential(Block(), Block())
        recompute.recompute(model, every)
        torch.manual_seed(5)
        loss = model(torch.ones(2, 8)).sum()
        between = torch.rand(3)
        loss.backward()
        drawn.append((between, torch.rand(3)))
    assert torch.equal(drawn[0][0], drawn[1][0]) and torch.equal(drawn[0][1], drawn[1][1])


def test_autocast():
    """Backward outside of autocast runs the second forward inside of it: the same bits as without."""
    torch.manual_seed(0)
    model, x, found = nn.Sequential(Block(), Block()), torch.randn(4, 8), []
    for every in (0, 1):
        recompute.recompute(model, every)
        model.zero_grad()
        torch.manual_seed(3)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(x).square().sum()
        loss.backward()
        found.append([p.grad for p in model.parameters()])
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("kind", [tuple, dict])
def test_any_output(kind):
    """Outputs in tuples, lists and dicts, of which a loss uses some or all, give the same bits."""
    torch.manual_seed(0)
    block, x, found = Block(kind), torch.randn(4, 8), []
    for every in (0, 1):
        recompute.recompute([block], every)
        block.zero_grad()
        torch.manual_seed(3)
        out = block(x)
        y, h = out if kind is tuple else (out["y"], out["h"][0])
        (y.sum() + h.square().sum()).backward()
        found.append([p.grad for p in block.parameters()])
    assert all(map(torch.equal, *found))


def test_backward_twice_and_without_a_graph():
    """retain_graph gives the same gradient again; under no_grad nothing is kept, and eval mode is as without."""
    torch.manual_seed(0)
    model, x = small().double(), torch.randint(40, (2, 6))
    plain = model(x).logits
    recompute.recompute(model.transformer.h)
    with torch.no_grad():
        assert torch.equal(model(x).logits, plain)
    loss = model(x).logits.square().sum()
    loss.backward(retain_graph=True)
    once = [p.grad.clone() for p in model.parameters()]
    loss.backward()
    # fp64, and the sum of two equal numbers is exact
    assert all(torch.equal(p.grad, 2 * g) for p, g in zip(model.parameters(), once))


def test_copies_and_names():
    """state_dict keeps its names, and a deep copy recomputes with its own weights."""
    model = small(2)
    names = list(model.state_dict())
    recompute.recompute(model.transformer.h)
    assert list(model.state_dict()) == names
    other, ids = copy.deepcopy(model), torch.randint(40, (2, 6))
    nn.init.zeros_(model.transformer.h[0].mlp.c_fc.weight)
    plain = copy.deepcopy(other)
    recompute.recompute(plain.transformer.h, 0)
    assert_same(step(other, ids), step(plain, ids))


def test_a_state_is_refused():
    """A block that does something else the second time is an Error, not a wrong gradient."""

    class Growing(Block):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return super().forward(x) if self.calls == 1 else super().forward(torch.cat((x, x)))

    block = Growing()
    recompute.recompute([block])
    with pytest.raises(Error, match="^forward computed something else the second time"):
        block(torch.randn(2, 8)).sum().backward()
    for every in (-1, 1.5, True):
        with pytest.raises(Error, match=f"^every must be a whole number of at least 0, not {every}$"):
            recompute.recompute([block], every)


@pytest.mark.parametrize("inside", [True, False])
def test_an_input_that_was_changed_in_place_is_refused(inside):
    """Whether the block changes its input or its caller does: from other numbers the gradient would be wrong."""

    class InPlace(Block):
        def forward(self, x):
            return super().forward(x.mul_(2) if inside else x)

    block, x = InPlace(), torch.randn(2, 8)
    recompute.recompute([block])
    y = block(x)
    if not inside:
        x.mul_(2)
    with pytest.raises(Error, match="changed in place"):
        y.sum().backward()


def peak_and_flops(every, n_layer):
    """(bytes at the fullest moment of forward and backward through the blocks, FLOPs)."""
    torch.manual_seed(0)
    model = gpt.GPT(vocab_size=16, n_positions=128, n_embd=64, n_layer=n_layer, n_head=4)
    recompute.recompute(model.transformer.h, every)
    x = torch.randn(4, 128, 64)

    def step():
        y = x
        for block in model.transformer.h:
            y = block(y)
        y.sum().backward()

    with FlopCounterMode(display=False) as flops:
        step()  # it leaves the gradients there, so that they are no part of the difference
    with peak_bytes([], torch.device("cpu")) as peak:
        step()
    return peak(), flops.get_total_flops()


@pytest.mark.parametrize("every, kept, times", [(1, 8 * 1 + 16, 1 + 2 / 9), (2, 4 * 1 + 4 * 16, 1 + 1 / 9)])
def test_memory_and_time(every, kept, times):
    """8 blocks keep 128 c; recomputed L c + a = 24 c, every second one 68 c. FLOPs grow by 2/9 and by 1/9."""
    c = 4 * 128 * 64 * 4  # n·d·e
    (before, flops), (after, more) = peak_and_flops(0, 8), peak_and_flops(every, 8)
    # Statistics of norms and attention are 2 % of 16 c; the gradient that backward holds is there in both
    assert (before - after) / c == pytest.approx(8 * 16 - kept, rel=0.03)
    assert more / flops == pytest.approx(times, abs=0.03)  # without attention, and with the first dx


def test_demonstration():
    """Run as a program the file shows equal bits and the FLOPs of a block whose last layer is half of it."""
    done = subprocess.run([sys.executable, recompute.__file__], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.count("the same bits: True") == 3 and "every=1: 1.17 times" in done.stdout
