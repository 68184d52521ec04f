# SPDX-License-Identifier: MIT
"""What nanopeft/adapter.py claims, against its formulas in fp64 and without another library."""

import collections
import copy
import json
import math
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from nanopeft import adapter, gpt

# --------------------------------------------------------------------------------------------------------- small models


class Conv1D(nn.Module):
    """The shape of Hugging Face's: a linear layer with the weight as (in, out). tests/parity has the real one."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.zeros(nf))

    def forward(self, x):
        return x @ self.weight + self.bias


class Block(nn.Module):
    """x + m, alone or as the first of a tuple, with an attribute that a model may want to read."""

    attention_type = "full"

    def __init__(self, d, as_tuple=False):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(d, 2 * d), nn.Tanh(), nn.Linear(2 * d, d))
        self.as_tuple = as_tuple

    def forward(self, x, scale=1.0):
        y = x + scale * self.mlp(x)
        return (y, "cache", scale) if self.as_tuple else y


class Blocks(nn.Module):
    def __init__(self, d, n=2, as_tuple=False):
        super().__init__()
        self.h = nn.ModuleList(Block(d, as_tuple) for _ in range(n))

    def forward(self, x):
        for block in self.h:
            x = block(x)
            x = x[0] if isinstance(x, tuple) else x
        return x


def tiny_gpt(**options):
    sizes = dict(vocab_size=64, n_positions=32, n_embd=16, n_layer=2, n_head=2)
    return gpt.GPT(**{**sizes, **options})


IDS = torch.randint(64, (2, 8), generator=torch.Generator().manual_seed(7))
PLACEMENTS = ("houlsby", "pfeiffer")


def thorough(case):
    return pytest.param(case, marks=pytest.mark.thorough)


def parameters(model):
    """{name in the file: parameter} of the adapters, or of a fusion and the adapters that it fuses."""
    found = {}
    for name, layer in adapter.adapter_layers(model).items():
        kind = "fusion" if isinstance(layer.adapter, adapter.Fusion) else "adapter"
        found |= {f"{name}.{kind}.{key}": p for key, p in layer.adapter.named_parameters()}
    return found


def arguments(config):
    """add_adapter's arguments, from adapter_config."""
    keys = ("placement", "reduction", "bottleneck", "activation")
    return {"targets": config["target_modules"], **{key: config[key] for key in keys}}


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def randomize(model, std=0.5):
    """Draws all that adapters and fusion hold: at Up = 0, whatever is claimed of the output would hold."""
    for p in parameters(model).values():
        nn.init.normal_(p, std=std)
    return model


def saved(model, seed, **options):
    """(config, state) of a random pfeiffer adapter for this bare model, which stays as it is."""
    torch.manual_seed(seed)
    other = adapter.add_adapter(copy.deepcopy(model), placement="pfeiffer", **options)
    randomize(other)
    return adapter.adapter_config(other), adapter.adapter_state_dict(other)


def fused(model, n=3, **options):
    """The model with a fusion over n random adapters of different sizes and activations."""
    kinds = ("relu", "tanh", "gelu", "silu")
    return adapter.add_fusion(
        model, [saved(model, i, bottleneck=i + 1, activation=kinds[i % 4], **options) for i in range(n)]
    )


def logits(model, x):
    y = model(x)
    return getattr(y, "logits", y)


def assert_noticeable(model, x):
    """The update is at least a tenth of the output, so that an output without it could not pass for one with it."""
    with torch.no_grad():
        y = logits(model, x)
        with adapter.adapter_disabled(model):
            base = logits(model, x)
    assert (y - base).abs().max() >= 0.1 * y.abs().max()


def bits(tensors):
    return {name: t.detach().clone().contiguous().view(torch.uint8) for name, t in tensors.items()}


def assert_same_bits(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


# -------------------------------------------------------------------------------------------------- formulas, by hand

ACTIVATIONS = {
    "relu": lambda x: torch.where(x > 0, x, 0 * x),
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "tanh": lambda x: 1 - 2 / (torch.exp(2 * x) + 1),
    "gelu": lambda x: x * (1 + torch.erf(x / math.sqrt(2))) / 2,
}


def z_by_hand(state, name, activation, h):
    """Up f(Down h) from the tensors of a file, in sums written out."""
    down, a, up, b = (state[f"{name}.{key}"] for key in ("down.weight", "down.bias", "up.weight", "up.bias"))
    low = ACTIVATIONS[activation](torch.einsum("md,...d->...m", down, h) + a)
    return torch.einsum("dm,...m->...d", up, low) + b


def fusion_by_hand(state, name, activations, h):
    """Σₙ pₙ V zₙ, adapter by adapter, with p = exp(Q h · K zₙ) / Σ exp(...)."""
    weight = {key: state[f"{name}.{key}.weight"] for key in ("query", "key", "value")}
    z = [z_by_hand(state, f"{name}.adapters.{n}", f, h) for n, f in enumerate(activations)]
    q = torch.einsum("ed,...d->...e", weight["query"], h) + state[f"{name}.query.bias"]
    keys = [torch.einsum("ed,...d->...e", weight["key"], one) + state[f"{name}.key.bias"] for one in z]
    grown = [torch.exp((q * k).sum(-1, keepdim=True)) for k in keys]
    values = [torch.einsum("ed,...d->...e", weight["value"], one) for one in z]
    return sum(e / sum(grown) * v for e, v in zip(grown, values, strict=True))


def gpt_by_hand(base, ids, on_attention, on_mlp, on_block):
    """A GPT's logits, with what each placement adds to its residual stream; each is called with (layer, h)."""
    t = base.transformer
    x = t.wte(ids) + t.wpe(torch.arange(ids.size(1)))
    for i, block in enumerate(t.h):
        a = block.attn(block.ln_1(x), None, None)
        x = x + a + on_attention(i, a)
        m = block.mlp(block.ln_2(x))
        x = x + m + on_mlp(i, m)
        x = x + on_block(i, x)
    return base.lm_head(t.ln_f(x))


def nothing(i, h):
    return 0


# ---------------------------------------------------------------------------------------------------------- the formula


@settings(deadline=None, max_examples=20)
@given(
    st.sampled_from(["linear", "conv1d", "tensor", "tuple"]), st.integers(1, 12), st.integers(1, 20),
    st.sampled_from(sorted(ACTIVATIONS)), st.sampled_from([(), (3,), (2, 3), (2, 1, 3)]), st.integers(0, 99),
)  # fmt: skip
def test_a_layer_is_the_equation(kind, d, m, activation, leading, seed):
    """h + Up f(Down h), and its gradients, at the output h of a layer or a block, of any size (m above d too)."""
    torch.manual_seed(seed)
    layer = {
        "linear": lambda: nn.Linear(5, d),
        "conv1d": lambda: Conv1D(d, 5),
        "tensor": lambda: Block(d),
        "tuple": lambda: Block(d, as_tuple=True),
    }[kind]().double()
    placement, n_in = ("houlsby", 5) if kind in ("linear", "conv1d") else ("pfeiffer", d)
    model = nn.ModuleDict({"layer": layer})
    adapter.add_adapter(model, ("layer",), placement=placement, bottleneck=m, activation=activation)
    randomize(model, std=0.3)
    x = torch.randn(*leading, n_in, dtype=torch.float64, requires_grad=True)
    h = layer(x)
    h = h[0] if kind == "tuple" else h
    own = parameters(model)
    expected = h + z_by_hand(own, "layer.adapter", activation, h)
    found = model["layer"](x)
    if kind == "tuple":
        assert found[1:] == ("cache", 1.0)
        found = found[0]
    dy = torch.randn_like(expected)
    inputs = [x, *own.values()]
    right = torch.autograd.grad(expected, inputs, dy)
    # fp64: sums of at most 20 products after 12 after 24, of numbers below 10: some 100 roundings of 1.1e-16 each
    for one, other in zip((found, *torch.autograd.grad(found, inputs, dy)), (expected, *right), strict=True):
        assert one.shape == other.shape
        assert (one - other).abs().max() <= 1e-13 * max(1, other.abs().max())


@settings(deadline=None, max_examples=20)
@given(
    st.integers(1, 4), st.integers(1, 10), st.sampled_from([(), (3,), (2, 3)]), st.booleans(), st.integers(0, 99)
)  # fmt: skip
def test_fusion_is_the_equation(n, d, leading, as_tuple, seed):
    """h + Σₙ pₙ V zₙ with p = softmax over n of Q h · K zₙ, and the gradients of Q, K, V, x, for any N and shape."""
    torch.manual_seed(seed)
    base = Blocks(d, 1, as_tuple).double()
    model = randomize(fused(copy.deepcopy(base), n), std=0.4)
    x = torch.randn(*leading, d, dtype=torch.float64, requires_grad=True)
    own = parameters(model)
    h = base(x)
    expected = h + fusion_by_hand(own, "h.0.fusion", ("relu", "tanh", "gelu", "silu")[:n], h)
    found, dy = model(x), torch.randn_like(expected)
    inputs = [x, *trained(model)]
    assert len(inputs) == 1 + 5
    right = torch.autograd.grad(expected, inputs, dy)
    # fp64; scores of size 100 keep 1e-14 of their absolute value, which the softmax makes a relative error of p
    for one, other in zip((found, *torch.autograd.grad(found, inputs, dy)), (expected, *right), strict=True):
        assert one.shape == other.shape
        assert (one - other).abs().max() <= 1e-11 * max(1, other.abs().max())


@pytest.mark.parametrize("case", ["houlsby", "pfeiffer", "fusion"])
def test_a_whole_gpt_is_the_docstrings_equation(case):
    """In a GPT of two blocks, logits and all trained gradients are those of x + a + A(a), h + A(h) and h + V Σ p z."""
    torch.manual_seed(0)
    base = tiny_gpt().double()
    for p in base.parameters():
        nn.init.normal_(p, std=0.3)
    model = copy.deepcopy(base)
    if case == "fusion":
        own = parameters(randomize(fused(model), std=0.2))
        kinds = ("relu", "tanh", "gelu")
        added = dict(on_block=lambda i, h: fusion_by_hand(own, f"transformer.h.{i}.fusion", kinds, h))
    else:
        own = parameters(randomize(adapter.add_adapter(model, placement=case, bottleneck=3)))
        act = "silu" if case == "houlsby" else "relu"
        added = dict(on_block=lambda i, h: z_by_hand(own, f"transformer.h.{i}.adapter", act, h))
        if case == "houlsby":
            added = dict(
                on_attention=lambda i, h: z_by_hand(own, f"transformer.h.{i}.attn.c_proj.adapter", act, h),
                on_mlp=lambda i, h: z_by_hand(own, f"transformer.h.{i}.mlp.c_proj.adapter", act, h),
            )
    assert_noticeable(model, IDS)
    nowhere = dict(on_attention=nothing, on_mlp=nothing, on_block=nothing)
    expected, found = gpt_by_hand(base, IDS, **{**nowhere, **added}), model(IDS).logits
    dy, inputs = torch.randn_like(expected), trained(model)
    assert {id(p) for p in inputs} <= {id(p) for p in own.values()}
    right = torch.autograd.grad(expected, inputs, dy)
    # fp64 leaves some thousand roundings of 1.1e-16, which cancellation in the gradients may raise tenfold
    for one, other in zip((found, *torch.autograd.grad(found, inputs, dy)), (expected, *right), strict=True):
        if other.abs().max() > 1e-9:  # not so K's bias, whose gradient is nothing but rounding
            assert (one - other).abs().max() <= 1e-12 * other.abs().max()


# ------------------------------------------------------------------------------------------------------------ the start


@pytest.mark.parametrize("dtype", [*map(thorough, (torch.float64, torch.float16)), torch.float32, torch.bfloat16])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_training_starts_from_the_base(placement, dtype):
    """At the start the output is the base's to the last bit, in its type, and Up alone has a gradient."""
    torch.manual_seed(0)
    base = tiny_gpt().to(dtype)
    model = adapter.add_adapter(copy.deepcopy(base), placement=placement)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, base(IDS).logits)
    assert model(IDS).logits.dtype == dtype
    model(IDS).logits.float().square().sum().backward()
    own = parameters(model)
    assert len(own) == 4 * len(adapter.adapter_layers(model))
    for name, p in own.items():
        assert p.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert (p.grad.abs().max() > 0) == (".up." in name)
        assert (p.abs().max() > 0) == name.endswith("down.weight")


def test_a_cast_afterwards_casts_the_adapters():
    """A model cast before add_adapter keeps its adapters in fp32; one cast after it does not."""
    model = adapter.add_adapter(tiny_gpt().bfloat16())
    assert {p.dtype for p in trained(model)} == {torch.float32}
    assert {p.dtype for p in trained(model.bfloat16())} == {torch.bfloat16}


def test_initial_distributions():
    """Down is uniform within ±1/√d; Q and K are normal of deviation 0.02 without bias; V is 1 and 1e-6 off it."""
    torch.manual_seed(0)
    d, m = 200, 100
    model = adapter.add_adapter(Blocks(d, 1), placement="pfeiffer", bottleneck=m)
    state, config = adapter.adapter_state_dict(model), adapter.adapter_config(model)
    down = state["h.0.adapter.down.weight"]
    # the largest of n uniform draws misses the end by 1/n of the range on average; e⁻¹⁵ is the chance of 15/n
    assert (1 - 15 / down.numel()) / math.sqrt(d) <= down.abs().max() <= 1 / math.sqrt(d)
    adapter.add_fusion(adapter.remove_adapter(model), [(config, state)])
    own = {key.removeprefix("h.0.fusion."): p.detach() for key, p in parameters(model).items()}
    for key in ("query", "key"):
        values = own[f"{key}.weight"]
        n = values.numel()
        assert values.mean().abs() <= 5 * 0.02 / math.sqrt(n)  # 5 standard errors of the mean
        assert values.std().item() == pytest.approx(0.02, rel=5 / math.sqrt(2 * n))  # and of the deviation
        assert own[f"{key}.bias"].count_nonzero() == 0
    V = own["value.weight"]
    assert torch.equal(V.diagonal(), torch.ones(d))
    assert torch.equal(V - torch.diag(V.diagonal()), 1e-6 * (1 - torch.eye(d)))
    assert "value.bias" not in own


def count(model):
    return sum(p.numel() for p in trained(model))


def test_parameter_counts_of_gpt2():
    """At reduction 16 GPT-2's 124,439,808 parameters get 0.72 % (pfeiffer), 1.44 % (houlsby) or 17 % (fusion) more."""
    with torch.device("meta"):
        base = gpt.GPT(vocab_size=50257, n_positions=1024, n_embd=768, n_layer=12, n_head=12)
    total = sum(p.numel() for p in base.parameters())
    assert total == 124_439_808
    assert sum(p.numel() for m in base.modules() if isinstance(m, nn.LayerNorm) for p in m.parameters()) == 38_400
    for placement, n, expected, percent in (("houlsby", 24, 1_789_056, 1.44), ("pfeiffer", 12, 894_528, 0.72)):
        model = adapter.add_adapter(base, placement=placement)
        assert count(model) == n * 74_544 == expected and round(100 * expected / total, 2) == percent
        config = adapter.adapter_config(model)
        adapter.remove_adapter(model)
    for n in (1, 3):
        assert count(adapter.add_fusion(base, [(config, None)] * n)) == 21_252_096
        adapter.remove_adapter(base)
    assert round(100 * 21_252_096 / total) == 17 and round(21_252_096 / 894_528) == 24


@pytest.mark.parametrize("case, percent", [("houlsby", 2.1), ("pfeiffer", 1.0), ("fusion", 100 * 4 / 12 + 2 * 1.04)])
def test_multiplications_of_inference(case, percent):
    """Reduction 16 adds m / 3d = 2.1 % to the products with the blocks' weights; fusing N adds (N + 2) / 12."""
    d, model = 96, tiny_gpt(n_embd=96)
    x = torch.randn(1, 1, d)

    def flops():
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model.transformer.h[0](x, None, None)
        return counter.get_total_flops()  # of products with weights: it does not count a CPU's attention

    before = flops()
    assert before == 2 * 12 * d * d
    if case == "fusion":
        one = saved(model, 0)
        adapter.add_fusion(model, [one, one])
    else:
        adapter.add_adapter(model, placement=case)
    assert 100 * (flops() / before - 1) == pytest.approx(percent, rel=0.05)


def test_the_worked_example():
    """The docstring's numbers: (1, 2) becomes (2.5, 0.5), but -(1, 2) stays; fused with (0, 1): (1.044, 2.927)."""
    model = nn.ModuleDict({"one": nn.Identity()})
    x, A, other = torch.tensor([1.0, 2.0]), adapter.Adapter(2, 1), adapter.Adapter(2, 1)
    with torch.no_grad():
        A.down.weight.copy_(torch.tensor([[1.0, 1.0]]))
        A.up.weight.copy_(torch.tensor([[0.5], [-0.5]]))
        other.up.bias.copy_(torch.tensor([0.0, 1.0]))
        layer = adapter.AdapterLayer(model["one"], A)
        assert layer(x).tolist() == [2.5, 0.5] and layer(-x).tolist() == [-1, -2]
        fusion = adapter.Fusion([A, other])
        for p in (fusion.query.weight, fusion.key.weight, fusion.value.weight):
            p.copy_(torch.eye(2))
        p = [math.exp(score) / (math.exp(-1.5) + math.exp(2)) for score in (-1.5, 2)]
        assert [round(one, 3) for one in p] == [0.029, 0.971]
        found = adapter.AdapterLayer(model["one"], fusion)(x)
    assert [round(one, 3) for one in found.tolist()] == [1.044, 2.927]
    assert found.tolist() == pytest.approx([1 + 1.5 * p[0], 2 - 1.5 * p[0] + p[1]], rel=1e-6)


def test_without_its_nonlinearity_an_adapter_could_be_merged():
    """With f = identity, x + A(x) after W is (I + Up Down) W, so one weight does; with tanh no weight does it."""
    torch.manual_seed(0)
    linear, x = nn.Linear(5, 4, bias=False).double(), torch.randn(20, 5, dtype=torch.float64)
    for activation, merges in ((nn.Identity(), True), (torch.tanh, False)):
        model = adapter.add_adapter(nn.Sequential(copy.deepcopy(linear)), ("0",), bottleneck=2, activation=activation)
        y, A = randomize(model)(x), model[0].adapter
        one = torch.linalg.lstsq(
            torch.cat((x, torch.ones(20, 1, dtype=torch.float64)), 1), y
        )  # the best weight and bias
        merged = one.solution[:5].T
        off = (x @ merged.T + one.solution[5] - y).abs().max() / y.abs().max()
        assert off < 1e-12 if merges else off > 0.01  # fp64: sums of 6 terms
        if merges:
            expected = (torch.eye(4) + A.up.weight @ A.down.weight) @ linear.weight
            assert (merged - expected).abs().max() <= 1e-12 * expected.abs().max()


def test_on_the_residual_stream_even_a_linear_adapter_has_no_weight_to_merge_into():
    """With f = identity, the block x + W t changes by more than any other W and bias could do: Up Down reads x too."""
    torch.manual_seed(0)
    model, x = Blocks(4, 1).double(), torch.randn(50, 4, dtype=torch.float64)
    t = torch.cat((model.h[0].mlp[:2](x), torch.ones(50, 1, dtype=torch.float64)), 1)  # what W and the bias are read by
    adapter.add_adapter(model, placement="pfeiffer", bottleneck=2, activation=nn.Identity())
    y = randomize(model)(x)
    off = t @ torch.linalg.lstsq(t, y - x).solution - (y - x)  # the best that W and a bias can do
    assert off.abs().max() > 0.01 * y.abs().max()
    both = torch.cat((t, x), 1)  # with x itself as an input it would be linear
    assert (both @ torch.linalg.lstsq(both, y).solution - y).abs().max() < 1e-12 * y.abs().max()


# --------------------------------------------------------------------------------------------------------------- fusion


def identical(base, n, seed=0, bottleneck=3):
    """(the model with one random adapter, the model with a fusion of it n times), Q and K drawn, V at its start."""
    one = saved(base, seed, bottleneck=bottleneck)
    alone = adapter.add_adapter(copy.deepcopy(base), **arguments(one[0]))
    adapter.load_adapter_state_dict(alone, one[1])
    model = adapter.add_fusion(copy.deepcopy(base), [one] * n)
    for layer in adapter.adapter_layers(model).values():
        for p in (*layer.adapter.query.parameters(), *layer.adapter.key.parameters()):
            nn.init.normal_(p)
    return alone, model


@settings(deadline=None, max_examples=10)
@given(st.integers(1, 5), st.integers(1, 12), st.integers(0, 99))
def test_fusing_one_adapter_with_itself_is_that_adapter(n, d, seed):
    """With V = I it is that to rounding, whatever Q and K; at V's start output i is off by 1e-6 |Σⱼ≠ᵢ zⱼ|, no more."""
    torch.manual_seed(seed)
    base = Blocks(d, 1).double()
    alone, model = identical(base, n, seed)
    x = torch.randn(4, d, dtype=torch.float64)
    with torch.no_grad():
        z = alone(x) - base(x)
        # V z = z + 1e-6 (Σⱼ zⱼ - zᵢ); n equal z weighted by p that sum to 1 are z; rounding as in the formula's test
        off = 1e-6 * (z.sum(-1, keepdim=True) - z)
        assert (model(x) - alone(x) - off).abs().max() <= 1e-13 * max(1, z.abs().max())
        model.h[0].adapter.value.weight.copy_(torch.eye(d))
        assert (model(x) - alone(x)).abs().max() <= 1e-13 * max(1, z.abs().max())


@pytest.mark.parametrize("n", [1, 2])
def test_the_choice_among_one_is_not_learned(n):
    """With N = 1 the gradients of Q and K are exactly zero, those of V are not; with N = 2 all are not."""
    torch.manual_seed(0)
    model = fused(tiny_gpt(), n)
    for layer in adapter.adapter_layers(model).values():
        for p in (*layer.adapter.query.parameters(), *layer.adapter.key.parameters()):
            nn.init.normal_(p, std=0.1)
    model(IDS, labels=IDS).loss.backward()
    for layer in adapter.adapter_layers(model).values():
        assert layer.adapter.value.weight.grad.abs().max() > 1e-6
        for chooses in (layer.adapter.query.weight, layer.adapter.query.bias, layer.adapter.key.weight):
            assert chooses.grad.count_nonzero() == 0 if n == 1 else chooses.grad.abs().max() > 1e-6
        assert n > 1 or layer.adapter.key.bias.grad.count_nonzero() == 0


@settings(deadline=None, max_examples=5)
@given(st.permutations(range(3)), st.integers(0, 99))
def test_order_and_the_bias_of_k_do_not_matter(order, seed):
    """The adapters in another order, and K with another bias, fuse to the same output."""
    torch.manual_seed(seed)
    base = Blocks(6).double()
    adapters = [saved(base, seed + i, bottleneck=2 + i) for i in range(3)]
    model = adapter.add_fusion(copy.deepcopy(base), adapters)
    other = adapter.add_fusion(copy.deepcopy(base), [adapters[i] for i in order])
    for name, layer in adapter.adapter_layers(model).items():
        for key in ("query", "key", "value"):
            nn.init.normal_(getattr(layer.adapter, key).weight, std=0.3)
            getattr(adapter.adapter_layers(other)[name].adapter, key).load_state_dict(
                getattr(layer.adapter, key).state_dict()
            )
        nn.init.normal_(layer.adapter.key.bias)
    x = torch.randn(4, 6, dtype=torch.float64)
    # fp64: as in the formula's test
    torch.testing.assert_close(model(x), other(x), rtol=1e-11, atol=1e-11)


def test_softmax_rounds_its_result_alone():
    """In 16 bits torch's softmax is the one in fp32, rounded once, as Fusion's comment says."""
    for dtype in (torch.bfloat16, torch.float16):
        scores = (5 * torch.randn(1000, 3, generator=torch.Generator().manual_seed(0))).to(dtype)
        assert torch.equal(scores.softmax(-1), scores.float().softmax(-1).to(dtype))


def test_the_penalty_holds_v_at_the_identity():
    """It is 0.01 · Σ (V - I)² over all layers: 0 at V = I, nearly so at the start, with a gradient of 0.02 (V - I)."""
    torch.manual_seed(0)
    d, n = 6, 3
    model = fused(Blocks(d, n).double(), 2)
    start = adapter.fusion_penalty(model)
    # 1 - 1 on the diagonal, d (d - 1) times 1e-12 off it
    assert start.item() == pytest.approx(0.01 * n * d * (d - 1) * 1e-12, rel=1e-9)
    values = [layer.adapter.value.weight for layer in adapter.adapter_layers(model).values()]
    for V in values:
        nn.init.normal_(V)
    expected = 0.01 * sum((V[i, j].item() - (i == j)) ** 2 for V in values for i in range(d) for j in range(d))
    penalty = adapter.fusion_penalty(model)
    assert penalty.item() == pytest.approx(expected, rel=1e-12)  # a sum of 108 squares in fp64
    penalty.backward()
    for V in values:
        torch.testing.assert_close(V.grad, 0.02 * (V.detach() - torch.eye(d)), rtol=1e-12, atol=1e-12)
        nn.init.eye_(V)
    assert adapter.fusion_penalty(model).item() == 0
    with pytest.raises(adapter.Error, match="no fusion"):
        adapter.fusion_penalty(Blocks(d))


# ------------------------------------------------------------------------------------------------------------- training


def train(model, steps=3):
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2, weight_decay=0.1)
    for _ in range(steps):
        ids = torch.randint(64, (2, 16), generator=generator)
        optimizer.zero_grad()
        loss = model(ids, labels=ids).loss
        if any(isinstance(m, adapter.Fusion) for m in model.modules()):
            loss = loss + adapter.fusion_penalty(model)
        loss.backward()
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", [*PLACEMENTS, "fusion"])
def test_training_moves_what_is_trained_and_nothing_else(case, dtype):
    """After three steps all base tensors, and fused adapters, are the same bits; all trained ones, fp32, have moved."""
    torch.manual_seed(0)
    base = tiny_gpt().to(dtype)
    model = copy.deepcopy(base)
    if case == "fusion":
        own = parameters(fused(model))
        own = {name: p for name, p in own.items() if ".adapters." not in name}
        assert len(own) == 2 * 5
        for name, p in own.items():  # nothing but weight decay moves K's bias, and from 0 not even that
            if name.endswith("key.bias"):
                nn.init.normal_(p)
    else:
        own = parameters(adapter.add_adapter(model, placement=case, bottleneck=3))
        assert len(own) == 4 * (4 if case == "houlsby" else 2)
    assert {id(p) for p in own.values()} == {id(p) for p in trained(model)}
    frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    before, start = bits(frozen), bits(own)
    optimizer = train(model)
    assert_same_bits(before, bits(frozen))
    for name, old in start.items():
        assert not torch.equal(old, own[name].detach().view(torch.uint8)), name
        assert own[name].isfinite().all()
    assert {p.dtype for p in own.values()} == {torch.float32}
    assert {t.dtype for s in optimizer.state.values() for t in s.values()} == {torch.float32}
    assert model(IDS).logits.dtype == dtype
    assert_same_bits(bits(base.state_dict()), bits(adapter.remove_adapter(model).state_dict()))


@pytest.mark.parametrize("case", [*map(thorough, PLACEMENTS), "fusion"])
def test_training_lowers_the_loss(case):
    """The loss of a small batch falls by more than half, also where only a fusion of random adapters is trained."""
    torch.manual_seed(0)
    model = tiny_gpt()
    nn.init.normal_(model.transformer.wte.weight, std=0.5)  # a head of deviation 0.02 could not tell tokens apart
    model = fused(model) if case == "fusion" else adapter.add_adapter(model, placement=case, bottleneck=8)
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
    ids = torch.tensor([[5, 9, 2, 40, 41]] * 2)
    losses = []
    for _ in range(60):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > math.log(64) - 0.5
    assert losses[-1] < losses[0] / 2


# -------------------------------------------------------------------------------------------------------------- targets


def test_placements_and_targets_pick_layers_by_name():
    """Ends of names in a list, or one regular expression for the whole name; "blocks" is the outermost list's items."""
    h = "transformer.h"
    for arguments, expected in (
        ({}, [f"{h}.{i}.{n}.c_proj" for i in (0, 1) for n in ("attn", "mlp")]),
        ({"targets": ("mlp.c_proj",)}, [f"{h}.{i}.mlp.c_proj" for i in (0, 1)]),
        ({"targets": r".*\.1\..*c_proj"}, [f"{h}.1.attn.c_proj", f"{h}.1.mlp.c_proj"]),
        ({"placement": "pfeiffer"}, [f"{h}.0", f"{h}.1"]),
        ({"placement": "pfeiffer", "targets": r"transformer\.h\.\d+"}, [f"{h}.0", f"{h}.1"]),
        ({"placement": "pfeiffer", "targets": ["h.1"]}, [f"{h}.1"]),
        ({"placement": "pfeiffer", "targets": ["h.1.mlp"]}, [f"{h}.1.mlp"]),
        ({"placement": "pfeiffer", "targets": r".*h\.1.*"}, [f"{h}.1"]),
    ):
        model = tiny_gpt()
        assert adapter.add_adapter(model, **arguments) is model
        assert list(adapter.adapter_layers(model)) == expected
    model = Blocks(4, 12)
    model.h[3].experts = nn.ModuleList([nn.Linear(4, 4)])  # a list inside a block is no list of blocks
    adapter.add_adapter(model, placement="pfeiffer", bottleneck=2)
    assert list(adapter.adapter_layers(model)) == [f"h.{i}" for i in range(12)]


@pytest.mark.parametrize(
    "options, m", [({}, 2), ({"reduction": 5}, 6), ({"bottleneck": 40}, 40), ({"reduction": 32}, 1)]
)
def test_reduction_and_bottleneck(options, m):
    """m is d // reduction, 16 by default, or the bottleneck itself, and may be above d."""
    model = adapter.add_adapter(tiny_gpt(n_embd=32), **options)
    assert {layer.adapter.down.weight.shape for layer in adapter.adapter_layers(model).values()} == {(m, 32)}


def test_each_target_has_its_own_width():
    """Layers of different widths in one model each get an adapter of theirs, also a block whose config has no width."""
    model = nn.Sequential(nn.Linear(8, 4), Conv1D(12, 4), nn.Linear(12, 20))
    adapter.add_adapter(model, r"\d", reduction=4)
    shapes = [tuple(layer.adapter.down.weight.shape) for layer in adapter.adapter_layers(model).values()]
    assert shapes == [(1, 4), (3, 12), (5, 20)]
    model = adapter.add_adapter(Blocks(8), placement="pfeiffer", reduction=2)
    assert model.h[0].adapter.up.weight.shape == (8, 4)


@pytest.mark.parametrize("activation", [F.relu, torch.sin, nn.Softplus(), lambda x: x * x])
def test_any_function_is_an_activation(activation):
    """A function of one's own, or a module without parameters, computes what it says, and cannot go into a file."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4)).double()
    randomize(adapter.add_adapter(model, ("0",), bottleneck=3, activation=activation))
    x = torch.randn(5, 4, dtype=torch.float64)
    h, A = model[0].base_layer(x), model[0].adapter
    expected = h + activation(h @ A.down.weight.T + A.down.bias) @ A.up.weight.T + A.up.bias
    torch.testing.assert_close(model(x), expected, rtol=1e-13, atol=1e-13)  # fp64 sums of 4 terms
    with pytest.raises(TypeError, match="not JSON serializable"):
        json.dumps(adapter.adapter_config(model))


def test_a_wrapper_shows_what_it_holds():
    """weight and bias, and any other attribute, are the base layer's; an unknown one is an error as ever."""
    model = tiny_gpt()
    adapter.add_adapter(model)
    layer = model.transformer.h[0].attn.c_proj
    assert layer.weight is layer.base_layer.weight and layer.bias is layer.base_layer.bias and layer.in_features == 16
    model = adapter.add_adapter(Blocks(4, as_tuple=True), placement="pfeiffer", bottleneck=1)
    assert model.h[0].attention_type == "full" and model.h[0].as_tuple and model.h[0].mlp is model.h[0].base_layer.mlp
    assert not hasattr(model.h[0], "layer_idx")
    with pytest.raises(AttributeError, match="'Block' object has no attribute 'layer_idx'"):
        _ = model.h[0].layer_idx


def test_modes_stay_as_they_were():
    """A model in eval mode stays there, and a layer that alone is in eval mode too."""
    model = tiny_gpt()
    model.transformer.h[0].mlp.eval()
    before = {name: m.training for name, m in model.named_modules()}
    adapter.add_adapter(model, placement="pfeiffer")
    assert not model.transformer.h[0].mlp.training and model.transformer.h[0].adapter.training
    adapter.remove_adapter(model)
    assert {name: m.training for name, m in model.named_modules()} == before
    assert not any(m.training for m in adapter.add_adapter(tiny_gpt().eval()).modules())


# ------------------------------------------------------------------------------------------------- disabled and removed


@pytest.mark.parametrize("case", [*PLACEMENTS, "fusion"])
def test_disabled_and_removed_give_the_base(case):
    """Inside adapter_disabled, nested or left by an exception, and after removal, the model is the base to the bit."""
    torch.manual_seed(0)
    base = tiny_gpt().requires_grad_(False)
    model = copy.deepcopy(base)
    randomize(fused(model) if case == "fusion" else adapter.add_adapter(model, placement=case))
    assert_noticeable(model, IDS)
    expected, right = model(IDS).logits, base(IDS).logits
    with pytest.raises(KeyError), adapter.adapter_disabled(model) as same:
        assert same is model and torch.equal(model(IDS).logits, right)
        with adapter.adapter_disabled(model):
            assert torch.equal(model(IDS).logits, right)
        assert torch.equal(model(IDS).logits, right)
        raise KeyError
    assert torch.equal(model(IDS).logits, expected)
    assert adapter.remove_adapter(adapter.remove_adapter(model)) is model
    assert [type(m) for m in model.modules()] == [type(m) for m in base.modules()]
    assert_same_bits(bits(base.state_dict()), bits(model.state_dict()))
    assert torch.equal(model(IDS).logits, right)
    for config in (adapter.adapter_config, adapter.fusion_config):
        with pytest.raises(adapter.Error, match="the model has no"):
            config(model)
    adapter.add_adapter(model)


# --------------------------------------------------------------------------------------------------------------- errors


def everything_about(model):
    """All that add_adapter could change."""
    return (
        [(name, id(m), m.training, sorted(vars(m))) for name, m in model.named_modules()],
        [(name, id(p), p.requires_grad, p._version) for name, p in model.named_parameters()],
    )


class Everything(nn.Module):
    def __init__(self):
        super().__init__()
        self.h = nn.ModuleList(Block(4) for _ in range(2))
        self.tower = nn.ModuleList(Block(4) for _ in range(2))
        self.attention = nn.MultiheadAttention(4, 2)
        self.encoder = nn.TransformerEncoderLayer(4, 2, 8)
        self.ln = nn.LayerNorm(4)
        self.eval()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"placement": "parallel"}, "placement must be houlsby or pfeiffer, not 'parallel'"),
        ({"bottleneck": 0}, "a whole number above 0, not None and 0"),
        ({"bottleneck": True}, "above 0, not None and True"),
        ({"bottleneck": 2.0}, "above 0, not None and 2.0"),
        ({"reduction": 0}, "above 0, not 0 and None"),
        ({"reduction": "2"}, "above 0, not '2' and None"),
        ({"reduction": 2, "bottleneck": 2}, "give reduction or bottleneck, .* not 2 and 2"),
        ({"reduction": 0, "bottleneck": 2}, "give reduction or bottleneck, .* not 0 and 2"),
        ({"reduction": 5}, "reduction must be at most 4, the width of h.0.mlp.2, and is 5"),
        ({}, "reduction must be at most 4, .* is 16"),
        ({"activation": "swish_"}, "activation must be a function or its name in torch.nn.functional, not 'swish_'"),
        ({"activation": 3}, "activation must be .* not 3"),
        ({"activation": ""}, "activation must be .* not ''"),
        ({"activation": "bilinear"}, "activation must be .* not 'bilinear'"),
        ({"activation": "glu"}, "activation must be .* not 'glu'"),
        (
            {"targets": ("q_proj",)},
            r"q_proj.* names no layer for houlsby; there are .*h\.\*\.mlp\.\*, tower\.\*\.mlp\.\*",
        ),
        ({"targets": "mlp"}, "names no layer"),
        ({"targets": ()}, "names no layer"),
        ({"targets": [3]}, "names no layer"),
        ({"targets": ("ln",)}, "names no layer"),
        ({"targets": ("h.0",)}, "names no layer"),
        ({"targets": r"h\.[01"}, "is no regular expression"),
        ({"targets": "a{99999999999}"}, "is no regular expression"),
        ({"targets": "(" * 5000}, "is no regular expression"),
        ({"targets": ("out_proj",)}, "out_proj may be read, and not called, by its MultiheadAttention"),
        ({"targets": ("encoder.linear2",)}, "linear2 may be read, and not called, by its TransformerEncoderLayer"),
        ({"targets": ("h.0.mlp.0",), "placement": "pfeiffer"}, r"names no layer for pfeiffer; there are .*h\.\*, "),
        ({"targets": ("h",), "placement": "pfeiffer"}, "names no layer"),
        ({"targets": ("ln",), "placement": "pfeiffer"}, "names no layer"),
        (
            {"targets": "blocks", "placement": "pfeiffer"},
            "the model's one ModuleList; there are h, tower",
        ),
    ],
)
def test_wrong_arguments_are_refused_and_change_nothing(arguments, message):
    """Each wrong argument of add_adapter is refused in one line that says what is there, with the model as it was."""
    model = Everything()
    before = everything_about(model)
    with pytest.raises(adapter.Error, match=message) as caught:
        adapter.add_adapter(model, **{"targets": ("mlp.2",), **arguments})
    assert "\n" not in str(caught.value)
    assert everything_about(model) == before


def test_models_without_a_place_for_adapters_are_refused():
    """A bare layer has no name to be replaced under, and a model without linear layers no place: both are refused."""
    for model in (nn.Linear(4, 4), nn.Sequential(nn.Tanh())):
        for placement in PLACEMENTS:
            before = everything_about(model)
            with pytest.raises(adapter.Error, match="there are none"):
                adapter.add_adapter(model, placement=placement)
            assert everything_about(model) == before


def test_adding_twice_is_refused():
    """Adapters or a fusion over adapters or a fusion are refused, and what is there stays as it is."""
    torch.manual_seed(0)
    one = saved(tiny_gpt(), 0)
    for model in (adapter.add_adapter(tiny_gpt()), fused(tiny_gpt())):
        before = everything_about(model)
        for again in (lambda m: adapter.add_adapter(m, ("c_fc",)), lambda m: adapter.add_fusion(m, [one])):
            with pytest.raises(adapter.Error, match="has adapters already: remove_adapter"):
                again(model)
        assert everything_about(model) == before


def test_what_cannot_be_fused_is_refused():
    """No adapters, a houlsby one, one of other blocks, size, dtype or method: refused; the model is as it was."""
    torch.manual_seed(0)
    model, good = tiny_gpt(), saved(tiny_gpt(), 0)
    model.transformer.wte.requires_grad_(False)  # what is frozen stays frozen, and the rest trained
    integers = good[0], {key: t.int() for key, t in good[1].items()}
    other = adapter.add_adapter(tiny_gpt())
    houlsby = adapter.adapter_config(other), adapter.adapter_state_dict(other)
    missing = good[0], {key: t for key, t in good[1].items() if "h.1.adapter.up.bias" not in key}
    for adapters, message in (
        ([], "one or more adapters, all of placement pfeiffer"),
        ([good, houlsby], "all of placement pfeiffer"),
        ([good, saved(tiny_gpt(), 1, targets=["h.1"])], "on different blocks: .*h.0, .*h.1 and transformer.h.1"),
        ([good, saved(tiny_gpt(n_embd=32), 1)], r"is \(2,\) in it and \(1,\) in the model"),
        ([good, saved(tiny_gpt(n_layer=3), 1)], r"h.2.adapter.down.bias is \(1,\) in it and missing in the model"),
        ([good, integers], "is torch.int32 in the adapter; the model needs floats of 16 bits or more"),
        ([good, missing], r"h.1.adapter.up.bias is missing in it and \(16,\) in the model"),
        ([({"peft_type": "LORA"}, {})], "all of placement pfeiffer"),
    ):
        before = everything_about(model)
        with pytest.raises(adapter.Error, match=message) as caught:
            adapter.add_fusion(model, adapters)
        assert "\n" not in str(caught.value)
        assert everything_about(model) == before


# ---------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_state_dict_holds_what_was_trained_and_loads_into_another_model(placement):
    """Saved and loaded onto a bare base, through JSON, an adapter gives the same logits, and can be trained on."""
    torch.manual_seed(0)
    base = tiny_gpt()
    model = randomize(adapter.add_adapter(copy.deepcopy(base), placement=placement, bottleneck=3))
    assert_noticeable(model, IDS)
    state = adapter.adapter_state_dict(model)
    assert sum(t.numel() for t in state.values()) == count(model)
    ends = [f"adapter.{layer}.{key}" for layer in ("down", "up") for key in ("weight", "bias")]
    places = ("attn.c_proj.", "mlp.c_proj.") if placement == "houlsby" else ("",)
    assert state.keys() == {f"transformer.h.{i}.{place}{end}" for i in (0, 1) for place in places for end in ends}
    other = adapter.add_adapter(copy.deepcopy(base), **arguments(json.loads(json.dumps(adapter.adapter_config(model)))))
    assert adapter.adapter_config(other) == adapter.adapter_config(model)
    adapter.load_adapter_state_dict(other, state)
    assert torch.equal(other(IDS).logits, model(IDS).logits)
    assert count(other) == count(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fusion_is_complete_in_its_two_files(dtype):
    """Two adapters trained apart, loaded and fused, and a fusion reloaded onto a bare base give the same logits."""
    torch.manual_seed(0)
    base = tiny_gpt().to(dtype)
    adapters = [saved(base, 0), saved(base, 1, bottleneck=5, activation="gelu")]
    model = adapter.add_fusion(copy.deepcopy(base), adapters)
    train(model)
    assert_noticeable(model, IDS)
    for i, (_, state) in enumerate(adapters):  # trained apart, they are as they were
        for key, t in state.items():
            assert torch.equal(adapter.fusion_state_dict(model)[key.replace("adapter.", f"fusion.adapters.{i}.")], t)
    config = json.loads(json.dumps(adapter.fusion_config(model)))
    state = {key: t.clone() for key, t in adapter.fusion_state_dict(model).items()}
    other = adapter.add_fusion(copy.deepcopy(base), [(one, None) for one in config["adapters"]])
    adapter.load_fusion_state_dict(other, state)
    with torch.no_grad():
        assert torch.equal(other(IDS).logits, model(IDS).logits)
    assert {id(p) for p in trained(other)} == {id(p) for n, p in parameters(other).items() if ".adapters." not in n}
    assert adapter.fusion_config(other) == config


@pytest.mark.parametrize("case", ["adapter", "fusion"])
@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s, key: s.pop(key), r"bias is missing in it and \(\d,\) in the model"),
        (
            lambda s, key: s.update({"h.9.adapter.x": torch.ones(1)}),
            r"h.9.adapter.x is \(1,\) in it and missing in the model",
        ),
        (lambda s, key: s.update({key: torch.ones(7)}), r"is \(7,\) in it and \(4,\) in the model"),
        (lambda s, key: s.update({key: s[key].long()}), "is torch.int64 .* needs floats of 16 bits or more"),
        (lambda s, key: s.update({key: s[key].to(torch.float8_e4m3fn)}), "bias is torch.float8_e4m3fn in the adapter"),
    ],
)
def test_a_state_that_does_not_fit_is_not_loaded_by_half(case, change, message):
    """A tensor missing, left over or of another shape is named, and none of the others is loaded."""
    torch.manual_seed(0)
    model = (
        adapter.add_adapter(Blocks(4), placement="pfeiffer", bottleneck=2) if case == "adapter" else fused(Blocks(4))
    )
    get, load = getattr(adapter, f"{case}_state_dict"), getattr(adapter, f"load_{case}_state_dict")
    state = {key: torch.ones_like(t) for key, t in get(model).items()}
    change(state, f"h.1.{case}.up.bias" if case == "adapter" else "h.1.fusion.query.bias")
    before = bits(model.state_dict())
    with pytest.raises(adapter.Error, match=message) as caught:
        load(model, state)
    assert "\n" not in str(caught.value)
    assert_same_bits(before, bits(model.state_dict()))


def test_states_of_the_other_kind_are_refused():
    """A fusion's state does not load as an adapter's, nor the reverse."""
    torch.manual_seed(0)
    one, two = adapter.add_adapter(Blocks(4), placement="pfeiffer", bottleneck=2), fused(Blocks(4))
    for load, model, state in (
        (adapter.load_adapter_state_dict, two, adapter.adapter_state_dict(one)),
        (adapter.load_adapter_state_dict, one, adapter.fusion_state_dict(two)),
        (adapter.load_fusion_state_dict, one, adapter.fusion_state_dict(two)),
        (adapter.load_fusion_state_dict, two, adapter.adapter_state_dict(one)),
    ):
        with pytest.raises(adapter.Error, match="does not fit"):
            load(model, state)


# ----------------------------------------------------------------------------------------------- inside other machinery


@pytest.mark.parametrize("case", [*map(thorough, PLACEMENTS), "fusion"])
def test_generation_with_a_cache_is_generation_without(case):
    """Greedy tokens from gpt.generate, which keeps a cache, are the argmax of whole forward passes, one by one."""
    torch.manual_seed(0)
    model = tiny_gpt()
    randomize(fused(model) if case == "fusion" else adapter.add_adapter(model, placement=case, bottleneck=3))
    assert_noticeable(model, IDS)
    found = gpt.generate(model, IDS, 8)
    ids = IDS
    for _ in range(8):
        ids = torch.cat((ids, model(ids).logits[:, -1:].argmax(-1)), 1)
    assert torch.equal(found, ids)


@pytest.mark.parametrize("case", [*map(thorough, PLACEMENTS), "fusion"])
def test_under_autocast(case):
    """Under bf16 autocast over an fp32 base, logits and fp32 gradients are those without it, to bf16's precision."""
    torch.manual_seed(0)
    model = tiny_gpt()
    randomize(fused(model) if case == "fusion" else adapter.add_adapter(model, placement=case, bottleneck=3), std=0.2)
    exact = model(IDS).logits
    expected = torch.autograd.grad(exact.square().mean(), trained(model))
    with torch.autocast("cpu", torch.bfloat16):
        y = model(IDS).logits
    found = torch.autograd.grad(y.float().square().mean(), trained(model))
    # some 50 roundings of 2⁻⁹ one after another, which partly cancel: 10 of them, relative to the largest value
    assert (y - exact).abs().max() <= 10 * 2**-9 * exact.abs().max()
    largest = max(g.abs().max() for g in expected)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float32
        assert (one - other).abs().max() <= 10 * 2**-9 * largest


@pytest.mark.parametrize("reentrant", [False, thorough(True)])
def test_gradient_checkpointing(reentrant):
    """Recomputed under torch.utils.checkpoint, the gradients are the same bits."""
    torch.manual_seed(0)
    model = randomize(fused(Blocks(6)))
    x = torch.randn(5, 6, requires_grad=True)
    inputs = [x, *trained(model)]
    found = []
    for run in (model, lambda x: checkpoint(model, x, use_reentrant=reentrant)):
        for t in inputs:
            t.grad = None
        run(x).square().sum().backward()
        found.append([t.grad for t in inputs])
    for plain, recomputed in zip(*found, strict=True):
        assert torch.equal(plain, recomputed)


@pytest.mark.parametrize("case", [*map(thorough, PLACEMENTS), "fusion"])
def test_copies_stand_alone(case):
    """A deep copy, a pickled one and one made through the whole state_dict give the same, and share no tensor."""
    torch.manual_seed(0)
    base = tiny_gpt()

    def build(model):
        return fused(model) if case == "fusion" else adapter.add_adapter(model, placement=case, bottleneck=3)

    model = randomize(build(copy.deepcopy(base)))
    assert_noticeable(model, IDS)
    expected = model(IDS).logits.detach()
    other = build(tiny_gpt())
    assert other.load_state_dict(model.state_dict()) == ([], [])
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), other]
    for p in model.parameters():
        nn.init.zeros_(p)
    for one in copies:
        assert torch.equal(one(IDS).logits, expected)


def test_the_demonstration_prints_what_the_docstring_claims(tmp_path):
    """The file alone, in an empty folder, without nanopeft, runs its demonstration, and its figures are right."""
    shutil.copy(Path(adapter.__file__), tmp_path / "pasted.py")
    (tmp_path / "run.py").write_text(
        "import runpy, sys\n"
        "sys.modules['nanopeft'] = sys.modules['transformers'] = None\n"
        "runpy.run_path('pasted.py', run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-I", "-W", "error", "run.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # the worked example, to the digits that the docstring gives; what is computed there is tested above
    for line in (
        "[ 2.5000,  0.5000]",
        "[-1.0000, -2.0000]",
        "[ 1.0440,  2.9267]",
    ):
        assert line in done.stdout


# ----------------------------------------------------------------------------------------- what wraps a model or a part


@pytest.fixture(scope="module")
def process_group(tmp_path_factory):
    """A group of this process alone, which DDP and FSDP need."""
    store = tmp_path_factory.mktemp("store") / "file"
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def compiled(module):
    return torch.compile(module, backend="eager")


def fsdp(module):
    return FullyShardedDataParallel(module, use_orig_params=True, device_id=torch.device("cpu"))


def on_blocks(wrap):
    def wrapped(model):
        for i, block in enumerate(model.transformer.h):
            model.transformer.h[i] = wrap(block)
        return model

    return wrapped


WRAPS = {
    "compile": compiled,
    "DDP": nn.parallel.DistributedDataParallel,
    "DataParallel": nn.DataParallel,
    "compile of DDP": lambda model: compiled(nn.parallel.DistributedDataParallel(model)),
    "DDP of compile": lambda model: nn.parallel.DistributedDataParallel(compiled(model)),
    "compiled blocks": on_blocks(compiled),
    "checkpointed blocks": on_blocks(checkpoint_wrapper),
    "compiled checkpointed blocks": on_blocks(lambda block: compiled(checkpoint_wrapper(block))),
    "all, compiled": lambda model: compiled(nn.parallel.DistributedDataParallel(on_blocks(compiled)(model))),
}
SHORT = ("compiled blocks", "pfeiffer")  # of those that torch.compile makes slow


@pytest.mark.parametrize(
    "wrap, case",
    [
        pytest.param(wrap, case, marks=[pytest.mark.thorough] * ("comp" in wrap and (wrap, case) != SHORT))
        for wrap in WRAPS
        for case in (*PLACEMENTS, "fusion")
    ],
)
def test_names_are_those_of_the_bare_model(wrap, case, process_group):
    """Compiled, parallel or checkpointed, as a whole or in part, before or after: one file, for the bare model too."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    base, made = tiny_gpt(), []
    if case == "fusion":
        made = [saved(base, i, bottleneck=i + 1) for i in range(2)]

    def add(model):
        if case == "fusion":
            return adapter.add_fusion(model, made)
        return adapter.add_adapter(model, placement=case, bottleneck=3)

    bare = randomize(add(copy.deepcopy(base)))
    expected, plain, state = bare(IDS).logits, base(IDS).logits, adapter.adapter_state_dict(bare)
    after = WRAPS[wrap](copy.deepcopy(bare))
    models = [after]
    if any(name in wrap for name in ("DDP", "Data", "all")):
        with pytest.raises(adapter.Error, match="to the plain model, then wrap it"):
            add(WRAPS[wrap](copy.deepcopy(base)))
    else:
        models.append(add(WRAPS[wrap](copy.deepcopy(base))))
        adapter.load_adapter_state_dict(models[1], state)
    for model in models:
        found = adapter.adapter_state_dict(model)
        assert list(found) == list(state) and all(torch.equal(t, state[key]) for key, t in found.items())
        assert adapter.adapter_config(model) == adapter.adapter_config(bare)
        assert list(adapter.adapter_layers(model)) == list(adapter.adapter_layers(bare))
        assert torch.equal(model(IDS).logits, expected)
        with adapter.adapter_disabled(model):
            assert torch.equal(model(IDS).logits, plain)
        assert torch.equal(model(IDS).logits, expected)
        assert torch.equal(adapter.remove_adapter(model)(IDS).logits, plain)
        assert not adapter.adapter_state_dict(model)


def test_names_under_fsdp(process_group):
    """Blocks and a model in PyTorch's first FSDP have the names of the bare model as well."""
    torch.manual_seed(0)
    model = randomize(adapter.add_adapter(tiny_gpt(), bottleneck=3))
    keys = adapter.adapter_state_dict(model).keys()
    assert adapter.adapter_layers(fsdp(on_blocks(fsdp)(model))).keys() == {key.split(".adapter.")[0] for key in keys}


def test_a_module_named_module_is_no_wrapper():
    """A submodule that is really called `module` keeps its name in the file, and in the targets."""
    outer = nn.Module()
    outer.module, outer._orig = nn.Sequential(nn.Linear(4, 4), nn.Tanh()), nn.Linear(4, 4)
    adapter.add_adapter(outer, r"module\.0", bottleneck=2)
    assert adapter.adapter_layers(outer).keys() == {"module.0"}
    assert all(key.startswith("module.0.adapter.") for key in adapter.adapter_state_dict(outer))


def test_sharded_parameters_are_not_stored_empty():
    """Parameters without elements, as ZeRO leaves them between steps, are neither stored nor loaded: see whole()."""
    model = adapter.add_adapter(tiny_gpt(), bottleneck=3)
    state = {key: t.clone() for key, t in adapter.adapter_state_dict(model).items()}
    for p in model.parameters():
        p.data = p.data.new_empty(0)
    for call in (adapter.adapter_state_dict, lambda model: adapter.load_adapter_state_dict(model, state)):
        with pytest.raises(adapter.Error, match="sharded.*engine.whole"):
            call(model)


Pair = collections.namedtuple("Pair", "x rest")


@pytest.mark.parametrize("make", [lambda x: x, lambda x: (x, 1), lambda x: [x, 1], lambda x: Pair(x, 1)])
def test_outputs_that_begin_with_u(make):
    """A tensor, or a tuple, list or named tuple that begins with one, stays of its kind with A(u) added."""

    class Layer(nn.Linear):
        def forward(self, x):
            return make(super().forward(x))

    layer, x = Layer(4, 4), torch.randn(2, 4)
    found = randomize(adapter.add_adapter(nn.Sequential(layer), "0", bottleneck=2))[0]
    u = nn.Linear.forward(layer, x)
    expected = make(u + found.adapter(u))
    assert type(found(x)) is type(expected)
    for one, other in zip(found(x), expected):
        assert torch.equal(one, other) if torch.is_tensor(one) else one == other


@pytest.mark.parametrize("output", [None, {"x": torch.zeros(2, 4)}, SimpleNamespace(x=1), (None, 1), "x"])
def test_other_outputs_are_refused(output):
    """A layer that returns anything else has no u to add to: one line says so."""

    class Layer(nn.Linear):
        def forward(self, x):
            return output

    model = adapter.add_adapter(nn.Sequential(Layer(4, 4)), "0", bottleneck=2)
    with pytest.raises(adapter.Error, match="an adapter needs a layer whose output is a tensor or begins with one"):
        model(torch.zeros(2, 4))
