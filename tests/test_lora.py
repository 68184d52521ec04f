# SPDX-License-Identifier: MIT
"""What nanopeft/lora.py claims, against its formulas in fp64 and without another library."""

import copy
import math
import runpy
import shutil
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from nanopeft import gpt, lora

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


KINDS = ("linear", "no bias", "conv1d", "embedding")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def one_layer(kind, n_in, n_out, dtype=torch.float64):
    """A model of one layer, with weights and biases within ±1; targets for it are ("0",)."""
    layer = {
        "linear": lambda: nn.Linear(n_in, n_out),
        "no bias": lambda: nn.Linear(n_in, n_out, bias=False),
        "conv1d": lambda: Conv1D(n_out, n_in),
        "embedding": lambda: nn.Embedding(n_in, n_out),
    }[kind]()
    for p in layer.parameters():
        nn.init.uniform_(p, -1, 1)
    return nn.Sequential(layer).to(dtype)


def an_input(kind, n_in, dtype=torch.float64, shape=(5,)):
    if kind == "embedding":
        return torch.randint(n_in, shape)
    return (torch.rand(*shape, n_in) * 2 - 1).to(dtype)


def tiny_gpt(**options):
    sizes = dict(vocab_size=64, n_positions=32, n_embd=16, n_layer=2, n_head=2)
    return gpt.GPT(**{**sizes, **options})


def factors(model):
    """[(A, B)] of each wrapped layer."""
    return [tuple(p for n, p in layer.named_parameters() if "lora_" in n) for layer in lora.lora_layers(model).values()]


def randomize(model):
    """Draws both factors within ±1: at B = 0, whatever is claimed of the update would hold."""
    for pair in factors(model):
        for p in pair:
            nn.init.uniform_(p, -1, 1)
    return model


def assert_noticeable(model, *inputs):
    """The update is at least a tenth of the output, so that an output without it could not pass for one with it."""
    with torch.no_grad():
        y = model(*inputs)
        with lora.lora_disabled(model):
            base = model(*inputs)
        y, base = getattr(y, "logits", y), getattr(base, "logits", base)
        assert (y - base).abs().max() >= 0.1 * y.abs().max()


def bits(model):
    return {name: t.detach().clone().contiguous().view(torch.uint8) for name, t in model.state_dict().items()}


def assert_same_bits(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def dense(layer):
    """(W (out, in) or (V, d), s · update of the same shape) of a wrapped layer, in fp64 and element by element."""
    A, B = [p.detach().double() for n, p in layer.named_parameters() if "lora_" in n]
    update = layer.scaling * sum(B[:, k, None] * A[None, k, :] for k in range(len(A)))  # (out, in)
    W = layer.base_layer.weight.detach().double().clone()
    if isinstance(layer, lora.LoRAEmbedding):
        return W, update.t()
    return (W.t() if isinstance(layer.base_layer, Conv1D) else W), update


shapes = st.tuples(
    st.integers(1, 12), st.integers(1, 12), st.integers(1, 20)
)  # in, out, r: also above the layer's size
alphas = st.floats(0.5, 16)


# ---------------------------------------------------------------------------------------------------------- the formula


@settings(deadline=None, max_examples=25)
@given(
    st.sampled_from(KINDS), shapes, alphas, st.booleans(), st.sampled_from([(), (3,), (2, 3), (2, 1, 3), (0,), (2, 0)])
)
def test_forward_is_the_equation(kind, shape, alpha, rslora, leading):
    """y = x Wᵀ + b + s x Aᵀ Bᵀ with s = α/r or α/√r, for any shape, any rank, and empty inputs."""
    torch.manual_seed(0)
    n_in, n_out, r = shape
    model = one_layer(kind, n_in, n_out)
    randomize(lora.add_lora(model, ("0",), r=r, alpha=alpha, rslora=rslora))
    x = an_input(kind, n_in, shape=leading)
    layer = model[0]
    assert layer.scaling == pytest.approx(alpha * r ** (-0.5 if rslora else -1), rel=1e-15)
    W, update = dense(layer)
    bias = 0 if getattr(layer, "bias", None) is None else layer.bias.detach()
    expected = (W + update)[x] if kind == "embedding" else torch.einsum("...i,oi->...o", x, W + update) + bias
    # sums of at most 12 + 20 products of size up to s · 20 in fp64: 32 · 2⁻⁵³ of the largest partial sum, and slack
    bound = 64 * 2**-53 * (1 + 12 + layer.scaling * 12 * 20)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=bound)


@settings(deadline=None, max_examples=12)
@given(st.sampled_from(("linear", "no bias", "conv1d")), shapes, alphas)
def test_gradients_are_the_docstrings(kind, shape, alpha):
    """dA = s Bᵀ dyᵀ x, dB = s dyᵀ x Aᵀ and dx = dy W + s dy B A, and the frozen layer has no gradient."""
    torch.manual_seed(0)
    n_in, n_out, r = shape
    model = one_layer(kind, n_in, n_out)
    randomize(lora.add_lora(model, ("0",), r=r, alpha=alpha))
    x, dy = an_input(kind, n_in).requires_grad_(), torch.rand(5, n_out, dtype=torch.float64) * 2 - 1
    model(x).backward(dy)
    (A, B), s = factors(model)[0], alpha / r
    W, update = dense(model[0])
    with torch.no_grad():
        expected = {A: s * B.t() @ dy.t() @ x, B: s * dy.t() @ (x @ A.t()), x: dy @ W + dy @ update}
    for tensor, gradient in expected.items():
        # fp64 sums of at most 5 · 20 · 12 products, each at most s
        assert (tensor.grad - gradient).abs().max() <= 4 * 1200 * 2**-53 * (12 + 1200 * s)
    assert all(p.grad is None for p in model[0].base_layer.parameters())


def test_embedding_gradients_are_those_of_the_whole_table():
    """Through an embedding, A and B get the gradient that the table E + s (B A)ᵀ would hand down to them."""
    torch.manual_seed(0)
    model = one_layer("embedding", 7, 5)
    randomize(lora.add_lora(model, ("0",), r=3))
    A, B = factors(model)[0]
    ids, dy = torch.tensor([[1, 4, 4], [0, 6, 1]]), torch.randn(2, 3, 5, dtype=torch.float64)
    model(ids).backward(dy)
    dE = torch.zeros(7, 5, dtype=torch.float64).index_add_(0, ids.flatten(), dy.view(-1, 5))
    s = 16 / 3
    # fp64, sums of at most 7 products
    torch.testing.assert_close(A.grad, s * B.detach().t() @ dE.t(), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(B.grad, s * dE.t() @ A.detach().t(), rtol=1e-13, atol=1e-13)


# ------------------------------------------------------------------------------------------------------------ the start


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("init", ["kaiming", "gaussian", "reverse"])
@pytest.mark.parametrize("kind", KINDS)
def test_training_starts_from_the_base(kind, init, dtype):
    """At the start the output is the base's to the last bit, and only the factor that is zero has a gradient."""
    torch.manual_seed(0)
    model = one_layer(kind, 6, 5, dtype)
    x = an_input(kind, 6, dtype)
    before = model(x)
    lora.add_lora(model, ("0",), r=3, init=init)
    assert torch.equal(model(x), before)
    A, B = factors(model)[0]
    zero, other = (A, B) if init == "reverse" or kind == "embedding" else (B, A)
    assert zero.count_nonzero() == 0 and other.count_nonzero() == other.numel()
    model(x).sum().backward()
    assert other.grad.count_nonzero() == 0
    assert zero.grad.abs().max() > 0.01


def test_pissa_is_for_linear_layers_that_are_not_quantized():
    """An embedding, whose start it does not change, and weights in 8 bits are refused, and nothing has changed."""
    model = nn.Sequential(nn.Embedding(5, 8), nn.Linear(8, 8))
    with pytest.raises(lora.Error, match="0 is an embedding"):
        lora.add_lora(model, ["0", "1"], r=2, init="pissa")
    model[1].weight = nn.Parameter(torch.ones(8, 8, dtype=torch.int8), requires_grad=False)
    with pytest.raises(lora.Error, match="1 has quantized weights"):
        lora.add_lora(model, ["1"], r=2, init="pissa")
    assert not lora.lora_layers(model) and model[0].weight.requires_grad


def test_pissa_starts_from_the_largest_part_of_w():
    """s B A is the r largest singular values of W, shared evenly by A and B: numbers of a 4 x 6 matrix, whatever α.

    In fp64: the second and third singular value are 0.004 apart, and fp32's vectors off by 6e-8 · 2.9 / 0.004 = 4e-5.
    """
    W = torch.sin(torch.linspace(-1, 1, 24, dtype=torch.float64)).view(4, 6) + torch.eye(4, 6)
    row = torch.tensor([0.034582, -0.074792, 0.126549, -0.037274, -0.074354, 0.021771], dtype=torch.float64)
    S = torch.tensor([[2.902800, 0], [0, 1.004046]], dtype=torch.float64)
    near = dict(rtol=0, atol=1e-6)  # the numbers are rounded to 1e-6
    for kind, alpha in (("linear", 6), ("linear", 1), ("conv1d", 6)):
        model = one_layer(kind, 6, 4)
        model[0].weight.data = W if kind == "linear" else W.t().contiguous()
        layer = lora.add_lora(model, r=2, alpha=alpha, init="pissa")[0]
        A, B, s = layer.lora_A.detach(), layer.lora_B.detach(), alpha / 2
        assert A.is_contiguous() and B.is_contiguous()
        rest = W - s * B @ A
        torch.testing.assert_close(rest[0], row, **near)
        assert rest.square().sum().item() == pytest.approx(0.999929**2 + 0.121605**2, abs=2e-6)
        for factor in (A @ A.t(), B.t() @ B):
            torch.testing.assert_close(factor * s, S, **near)


@settings(deadline=None, max_examples=25)
@given(
    st.sampled_from(("linear", "no bias", "conv1d")), st.integers(1, 12), st.integers(1, 12), st.integers(1, 12),
    st.floats(0.1, 50), st.booleans(), st.sampled_from(DTYPES),
)  # fmt: skip
def test_pissa_starts_from_the_base_and_merges(kind, n_in, n_out, r, alpha, rslora, dtype):
    """It starts from the base within rounding; then it is W + s (B A - B₀ A₀), merged or not; disabled, the base.

    h has sums of n_in products and the update one of 2r, which is 0 but for rounding: at most n_in + 2r + 4 roundings
    of the two halves, each of size T = s |x| |A|ᵀ |B|ᵀ. Adding it to y rounds y once. A and A₀ are cast alike.
    """
    assume(r <= min(n_in, n_out))
    torch.manual_seed(0)
    model, x = one_layer(kind, n_in, n_out, dtype), an_input(kind, n_in, dtype)
    before, W = model(x), model[0].weight.detach().clone()
    layer = lora.add_lora(model, r=r, alpha=alpha, rslora=rslora, init="pissa")[0]
    A, B = layer.lora_A.detach().clone(), layer.lora_B.detach().clone()
    T = layer.scaling * (x.abs().to(A.dtype) @ A.abs().t() @ B.abs().t()).double()
    u = torch.finfo(dtype).eps / 2
    bound = 1.1 * u * (2 * (n_in + 2 * r + 4) * T + before.double().abs()) + torch.finfo(dtype).tiny
    assert ((model(x) - before).double().abs() <= bound).all()
    for p in lora.lora_parameters(model).values():
        p.data += 0.3 * torch.randn_like(p)
    update = layer.scaling * (layer.lora_B @ layer.lora_A - B @ A).detach()
    expected = before + x @ update.t().to(dtype)
    if dtype == torch.float64:  # 1e-10: some hundred roundings of 1e-16 of numbers up to 1e4
        torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-10)
        torch.testing.assert_close(lora.merge_lora(model)(x), expected, rtol=0, atol=1e-10)
    else:
        lora.merge_lora(model)
    with lora.lora_disabled(model):
        assert torch.equal(model(x), before)
    assert torch.equal(lora.remove_lora(lora.unmerge_lora(model))[0].weight, W)


def test_pissas_first_gradients_are_those_of_the_formula():
    """Both factors learn from the first step: dA = s Bᵀ dyᵀ x and dB = s dyᵀ x Aᵀ, and what is taken off does not."""
    torch.manual_seed(0)
    model, x, dy = one_layer("linear", 5, 4), an_input("linear", 5), torch.randn(5, 4, dtype=torch.float64)
    layer = lora.add_lora(model, r=2, init="pissa", alpha=6)[0]
    model(x).backward(dy)
    A, B = layer.lora_A, layer.lora_B
    torch.testing.assert_close(A.grad, 3 * B.t() @ dy.t() @ x)
    torch.testing.assert_close(B.grad, 3 * dy.t() @ (x @ A.t()))
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {"0.lora_A", "0.lora_B"}


def test_pissa_is_refused_where_it_cannot_start_or_be_saved():
    """A rank above the layer's sizes, α = 0 and sharded factors are errors of one line."""
    for wrong in (dict(r=4), dict(r=2, alpha=0)):
        model = one_layer("linear", 5, 3)
        with pytest.raises(lora.Error, match="alpha > 0, and a rank of at most 3 in 0"):
            lora.add_lora(model, init="pissa", **wrong)
        assert type(model[0]) is nn.Linear and all(p.requires_grad for p in model.parameters())
    model = lora.add_lora(one_layer("linear", 5, 3), r=2, init="pissa")
    for p in lora.lora_parameters(model).values():
        p.data = p.new_empty(0)  # as ZeRO-3 leaves them
    with pytest.raises(lora.Error, match="is sharded"):
        lora.lora_state_dict(model)


def test_lora_plus_gives_b_a_rate_of_its_own():
    """lora_plus_groups has each trained parameter once, B with 8 times the rate of A and of modules_to_save."""
    model = nn.Sequential(OrderedDict(body=nn.Linear(4, 3), norm=nn.BatchNorm1d(3), head=nn.Linear(3, 2)))
    lora.add_lora(model, ["body"], r=2, modules_to_save=["norm", "head"])
    groups = lora.lora_plus_groups(model, lr=0.5, ratio=8)
    rates = {id(p): group["lr"] for group in torch.optim.SGD(groups).param_groups for p in group["params"]}
    assert len(rates) == sum(len(group["params"]) for group in groups)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {name: rates.pop(id(p)) for name, p in trained.items()} == {
        "body.lora_A": 0.5, "body.lora_B": 4.0, "norm.weight": 0.5, "norm.bias": 0.5, "head.weight": 0.5,
        "head.bias": 0.5,
    }  # fmt: skip
    assert not rates


def test_two_zero_factors_never_learn():
    """With A = B = 0 both gradients are zero, so that one factor has to be drawn."""
    model = lora.add_lora(one_layer("linear", 6, 5), r=3)
    A, B = factors(model)[0]
    nn.init.zeros_(A)
    model(an_input("linear", 6)).sum().backward()
    assert A.grad.count_nonzero() == 0 and B.grad.count_nonzero() == 0


@pytest.mark.parametrize("r", [8, 300])  # below and above the layer's sizes
def test_initial_distributions(r):
    """kaiming: uniform within ±1/√in; gaussian, and B when reversed: normal of deviation 1/r; an embedding's B: 1."""
    torch.manual_seed(0)
    n_in, n_out = 200, 100
    drawn = {
        init: factors(lora.add_lora(one_layer("linear", n_in, n_out), r=r, init=init))[0]
        for init in ("kaiming", "gaussian", "reverse")
    }
    embedding_B = factors(lora.add_lora(one_layer("embedding", n_in, n_out), ("0",), r=r))[0][1]
    kaiming = drawn["kaiming"][0].detach()
    # the largest of n uniform draws misses the end by 1/n of the range on average; e⁻¹⁵ is the chance of 15/n
    assert (1 - 15 / kaiming.numel()) / math.sqrt(n_in) <= kaiming.abs().max() <= 1 / math.sqrt(n_in)
    for values, deviation in (
        (kaiming, 1 / math.sqrt(3 * n_in)),
        (drawn["gaussian"][0], 1 / r),
        (drawn["reverse"][1], 1 / r),
        (embedding_B, 1),
    ):
        n = values.numel()
        values = values.detach()
        assert values.mean().abs() <= 5 * deviation / math.sqrt(n)  # 5 standard errors of the mean
        assert values.std().item() == pytest.approx(
            deviation, rel=5 / math.sqrt(2 * n)
        )  # and of the deviation (normal)


@pytest.mark.parametrize(
    "init, rslora, powers",
    [("kaiming", False, (-0.5, 0, -1)), ("kaiming", True, (0, 0.5, 0)), ("gaussian", False, (-1.5, -1, -3))],
)
def test_the_first_step_depends_on_r_as_the_docstring_says(init, rslora, powers):
    """After one step: the powers of r in |ΔW| under Adam and in the first-order fall of the loss under Adam and SGD.

    With "gaussian" A's entries go as 1/r, so that they bring powers of their own.
    """
    torch.manual_seed(0)
    n_in, n_out, draws = 256, 192, 8  # at r = 1 a single draw of A is a few per cent off
    measured = {1: torch.zeros(3), 64: torch.zeros(3)}
    for r in list(measured) * draws:
        x, dy = torch.randn(512, n_in, dtype=torch.float64), torch.randn(512, n_out, dtype=torch.float64)
        found = {}
        for optimizer in (torch.optim.Adam, torch.optim.SGD):
            model = one_layer("no bias", n_in, n_out)
            lora.add_lora(model, r=r, alpha=16, rslora=rslora, init=init)
            model(x).backward(dy)
            optimizer(factors(model)[0], lr=1e-2).step()
            update = dense(model[0])[1]
            found[optimizer] = update.norm(), -(dy.t() @ x * update).sum()  # dL/dW = dyᵀ x
        measured[r] += torch.tensor([*found[torch.optim.Adam], found[torch.optim.SGD][1]])
    # 64^0.025 = 1.11: at r = 64 the rows of A, in 256 dimensions, are not quite orthogonal, and |ΔW| is 8 % larger
    found = (measured[64] / measured[1]).log() / math.log(64)
    torch.testing.assert_close(found, torch.tensor(powers), rtol=0, atol=0.025, check_dtype=False)


def test_the_first_step_moves_w_by_a_tenth_of_the_learning_rate():
    """At in = 4096, r = 8 and α = 32, an entry of W moves by lr/10 in Adam's first step; in full fine-tuning by lr."""
    torch.manual_seed(0)
    model = lora.add_lora(one_layer("no bias", 4096, 64, torch.float32), r=8, alpha=32)
    model(torch.randn(16, 4096)).backward(torch.randn(16, 64))
    torch.optim.Adam(factors(model)[0], lr=1e-4).step()
    moved = dense(model[0])[1].square().mean().sqrt().item()
    assert moved == pytest.approx(1e-5, rel=0.05)  # s √(r / (3 in)) = 4 · 0.0255 = 0.102


def test_the_worked_example():
    """4096 x 4096 at r = 8: counts, bytes and FLOPs of a training step are the docstring's."""
    d, r, n, flops = 4096, 8, 16, {}
    with torch.device("meta"):
        for method in ("full", "lora"):
            model = nn.Sequential(nn.Linear(d, d, bias=False))
            if method == "lora":
                lora.add_lora(model, r=r)
            with FlopCounterMode(display=False) as counter:
                model(torch.empty(n, d, requires_grad=True)).sum().backward()
            flops[method] = counter.get_total_flops()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert flops["lora"] / flops["full"] == pytest.approx(2 / 3 + 2 * r / d, rel=1e-9)
    for shown in (
        f"{d * d:,} numbers", f"= {trained:,}, one in {d * d // trained}", f"{16 * d * d / 1e6:.0f} MB",
        f"{(2 * d * d + 16 * trained) / 1e6:.1f} MB", f"{2 * trained / 1e3:.0f} kB", f"W {2 * d * d / 1e6:.1f} MB",
        f"{flops['lora'] / flops['full']:.1%}".replace("%", " %"),
    ):  # fmt: skip
        assert shown in lora.__doc__, shown


@pytest.mark.parametrize("targets, trained", [(("c_attn",), 294_912), ("all-linear", 1_179_648)])
def test_parameter_count_of_gpt2(targets, trained):
    """At r = 8, GPT-2's 124,439,808 parameters get r (in + out) on each layer: 294,912 on c_attn, 1,179,648 on all."""
    with torch.device("meta"):
        model = gpt.GPT(vocab_size=50257, n_positions=1024, n_embd=768, n_layer=12, n_head=12)
    total = sum(p.numel() for p in model.parameters())
    lora.add_lora(model, targets, r=8)
    assert total == 124_439_808
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == trained


# ------------------------------------------------------------------------------------------------------------- training


def train(model, steps=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    for _ in range(steps):
        ids = torch.randint(64, (2, 16), generator=generator)
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_moves_the_factors_and_nothing_else(dtype):
    """After a few steps all base tensors are the same bits and all A and B, which are fp32 like Adam's state, moved."""
    torch.manual_seed(0)
    model = tiny_gpt().to(dtype)
    base = bits(model)
    lora.add_lora(model, ("c_attn", "c_fc", "c_proj", "wte", "wpe"), r=2)
    start = [(A.clone(), B.clone()) for A, B in factors(model)]
    optimizer = train(model)
    now = {n.replace(".base_layer", ""): t for n, t in bits(model).items() if "lora_" not in n}
    assert_same_bits(base, now)
    for before, after in zip(start, factors(model), strict=True):
        for old, new in zip(before, after, strict=True):
            assert not torch.equal(old, new)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {id(p) for p in trained} == {id(p) for pair in factors(model) for p in pair}
    assert {p.dtype for p in trained} == {torch.float32}
    assert {t.dtype for s in optimizer.state.values() for t in s.values()} == {torch.float32}


def test_training_lowers_the_loss():
    """What trains is the model: the loss of a small batch falls by more than half under LoRA alone."""
    torch.manual_seed(0)
    model = lora.add_lora(tiny_gpt(), ("c_attn", "c_proj", "c_fc", "lm_head"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    ids = torch.tensor([[5, 9, 2, 40, 41]] * 2)
    losses = []
    for _ in range(60):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > math.log(64) - 0.5 and losses[-1] < losses[0] / 2


def test_dropout_is_on_the_input_of_the_branch_alone():
    """In training each element of A's input is dropped by itself, the rest grows by 1/(1-p); the base path is whole."""
    torch.manual_seed(0)
    n, rows, p = 32, 200, 0.25
    model = one_layer("linear", n, n)
    lora.add_lora(model, r=n, alpha=n, dropout=p)
    x = 1 + torch.rand(2, rows, n, dtype=torch.float64)
    assert torch.equal(model(x), model[0].base_layer(x))  # B = 0: whatever is dropped, the base path is whole
    for factor in factors(model)[0]:
        nn.init.eye_(factor)  # s = 1, A = B = 1: the branch now shows its own input
    branch = (model(x) - model[0].base_layer(x)).detach()
    kept = branch.abs() > 0.5
    # a difference of fp64 numbers below 64
    torch.testing.assert_close(branch, torch.where(kept, x / (1 - p), 0), rtol=0, atol=64 * 2**-52)
    assert kept.double().mean().item() == pytest.approx(1 - p, abs=5 * math.sqrt(p * (1 - p) / kept.numel()))
    # masks of any two rows, or columns, agree where chance has it: (1-p)² + p² of the time, and never everywhere
    flat, agree = kept.view(-1, n), (1 - p) ** 2 + p**2
    for one, other in ((flat[:-1], flat[1:]), (flat[:, :-1], flat[:, 1:])):
        same = (one == other).double().mean().item()
        assert same == pytest.approx(agree, abs=5 * math.sqrt(agree * (1 - agree) / one.numel()) * 2)
    model.eval()
    torch.testing.assert_close(model(x) - model[0].base_layer(x), x, rtol=0, atol=64 * 2**-52)


def test_added_to_a_model_in_eval_mode_it_drops_nothing():
    """LoRA takes over the mode of the layer that it wraps: an adapter opened for inference has no dropout."""
    torch.manual_seed(0)
    model = one_layer("linear", 6, 5).eval()
    randomize(lora.add_lora(model, dropout=0.5))
    x = an_input("linear", 6)
    assert_noticeable(model, x)
    assert torch.equal(model(x), model(x))
    assert not torch.equal(model.train()(x), model(x))


# ---------------------------------------------------------------------------------------------------------------- merge


@pytest.mark.parametrize("examples", [40, pytest.param(400, marks=pytest.mark.thorough)])
def test_merging_changes_nothing(examples):
    """Merged = unmerged, unmerging gives back the weight's bits, and each of the two done twice is done once."""

    @settings(deadline=None, max_examples=examples)
    @given(st.sampled_from(KINDS), shapes, alphas, st.sampled_from(DTYPES), st.booleans(), st.integers(0, 999))
    def check(kind, shape, alpha, dtype, rslora, seed):
        torch.manual_seed(seed)
        n_in, n_out, r = shape
        model = one_layer(kind, n_in, n_out, dtype)
        randomize(lora.add_lora(model, ("0",), r=r, alpha=alpha, rslora=rslora)).eval()
        layer = model[0]
        x = an_input(kind, n_in, dtype)
        before, (W, update) = bits(model), dense(layer)
        unmerged = model(x).double()
        # the update is at least a tenth of the output; if it never were, hypothesis would complain
        assume((unmerged - layer.base_layer(x).double()).abs().max() >= 0.1 * unmerged.abs().max())
        assert lora.merge_lora(model) is model
        once = bits(model)
        merged = model(x).double()
        lora.merge_lora(model)
        assert_same_bits(once, bits(model))

        # u: the unit roundoff of the weights; v: that of the sums (fp32 under 16 bits). `low` is for fp16's subnormals.
        u = torch.finfo(dtype).eps / 2
        v = min(u, torch.finfo(torch.float32).eps / 2)
        low = torch.finfo(dtype).smallest_normal * u
        A, B = [p.detach().double() for p in factors(model)[0]]
        size = abs(layer.scaling) * B.abs() @ A.abs()  # (out, in): no partial sum of the update is larger
        size = size.t() if kind == "embedding" else size
        # The merged weight: r + 2 roundings of the update and one of the sum at v, then a single one at u.
        stored = dense(layer)[0]
        error = (r + 3) * v * (W.abs() + size) + u * (W + update).abs() + low
        assert ((stored - (W + update)).abs() <= 1.01 * error).all()
        # The outputs, relative to the sum of all terms' absolute values: unmerged rounds A, B, x Aᵀ, s times it, the
        # update, the layer's output and the sum to u; merged rounds W and the output; each has up to in + r + 3
        # roundings at v. 1.1 pays for second order.
        if kind == "embedding":
            terms, absolute = (W.abs() + size)[x], low
        else:
            bias = 0 if layer.bias is None else layer.bias.detach().double().abs()
            terms = x.double().abs() @ (W.abs() + size).t() + bias
            absolute = low * (n_in + layer.scaling * (n_in + 2) * r + r + 5)
        bound = 1.1 * ((9 * u + 2 * (n_in + r + 3) * v) * terms + absolute)
        assert ((merged - unmerged).abs() <= bound).all()

        assert lora.unmerge_lora(model) is model
        assert_same_bits(before, bits(model))
        lora.unmerge_lora(model)
        assert_same_bits(before, bits(model))
        assert torch.equal(model(x).double(), unmerged)

    check()


def test_a_small_update_survives_a_merge_into_16_bits():
    """The sum is taken in 32 bits: of updates a hundredth of bf16's spacing, the right share gets rounded up."""
    torch.manual_seed(0)
    n = 256
    model = one_layer("no bias", n, n, torch.bfloat16)
    W = torch.rand(n, n) * 0.5 + 1  # bf16 keeps 1 to 2 in steps of 2⁻⁷
    with torch.no_grad():
        model[0].weight.copy_(W)
    lora.add_lora(model, r=1, alpha=1)
    A, B = factors(model)[0]
    nn.init.ones_(A)
    nn.init.constant_(B, 2**-8 * 1.02)  # just more than half a step: rounds up everywhere
    before = model[0].base_layer.weight.double()
    after = lora.merge_lora(model)[0].weight.double()
    assert torch.equal(after - before, torch.full_like(before, 2**-7))


def test_what_a_merge_into_bf16_loses():
    """The docstring's figures: of an update of RMS 1e-4, merged into bf16 weights of RMS 0.036, half is lost.

    Subtracting the update again does not bring all weights back either; unmerge_lora does.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1024, 1024, bias=False)).to(torch.bfloat16)
    W = model[0].weight.requires_grad_(False).normal_(std=0.036).clone()
    lora.add_lora(model, alpha=8)
    A, B = factors(model)[0]
    nn.init.normal_(A, std=0.01)
    nn.init.normal_(B, std=0.01 / math.sqrt(8))
    delta = dense(model[0])[1]
    assert delta.square().mean().sqrt().item() == pytest.approx(1e-4, rel=0.05)
    merged = lora.merge_lora(model)[0].weight.double()
    unchanged, error = (merged == W).double().mean(), (merged - W - delta).norm() / delta.norm()
    assert unchanged.item() == pytest.approx(0.52, abs=0.01) and error.item() == pytest.approx(0.5, abs=0.01)
    assert "52 % of the weights do not change and the error is 50 % of the update" in " ".join(lora.__doc__.split())
    assert ((merged - delta).to(torch.bfloat16) == W).double().mean() < 0.999
    assert torch.equal(lora.unmerge_lora(model)[0].base_layer.weight, W)


def test_training_goes_on_after_a_merge_was_taken_back():
    """merge then unmerge in the middle of training leaves no trace: the factors end as the same bits."""
    torch.manual_seed(0)
    plain = lora.add_lora(tiny_gpt().to(torch.bfloat16), r=2)
    merging = copy.deepcopy(plain)
    train(plain, seed=1)
    train(plain, seed=2)
    train(merging, seed=1)
    lora.unmerge_lora(lora.merge_lora(merging))
    train(merging, seed=2)
    assert any(B.abs().max() > 0 for _, B in factors(merging))
    assert_same_bits(bits(plain), bits(merging))


@pytest.mark.parametrize("merged", [False, True])
def test_disabled_gives_the_base_and_then_lora_again(merged):
    """Inside lora_disabled, nested or merged too, the output is the base's to the last bit; afterwards it is LoRA's."""
    torch.manual_seed(0)
    base = tiny_gpt()
    model = randomize(lora.add_lora(copy.deepcopy(base), ("c_attn", "c_proj"), r=2))
    ids = torch.randint(64, (2, 8))
    assert_noticeable(model, ids)
    if merged:
        lora.merge_lora(model)
    expected, before = model(ids).logits, bits(model)
    for outer in (lora.lora_disabled(model), pytest.raises(KeyError)):
        with outer, lora.lora_disabled(model) as same:
            assert same is model
            assert torch.equal(model(ids).logits, base(ids).logits)
            with lora.lora_disabled(model):
                assert torch.equal(model(ids).logits, base(ids).logits)
            assert torch.equal(model(ids).logits, base(ids).logits)
            if not isinstance(outer, type(lora.lora_disabled(model))):
                raise KeyError
        assert torch.equal(model(ids).logits, expected)
        assert_same_bits(before, bits(model))


def test_merging_while_disabled_is_refused():
    """merge_lora inside lora_disabled would make the base something else: it is refused, and the base stays."""
    torch.manual_seed(0)
    model = randomize(lora.add_lora(one_layer("linear", 6, 5)))
    x = an_input("linear", 6)
    with lora.lora_disabled(model):
        with pytest.raises(lora.Error, match="outside"):
            lora.merge_lora(model)
        assert torch.equal(model(x), model[0].base_layer(x))
    assert_noticeable(model, x)


def test_remove_leaves_a_plain_model():
    """Removed after a merge, LoRA leaves a plain model with what it learned, without one the base; and can be added."""
    torch.manual_seed(0)
    base = tiny_gpt()
    ids = torch.randint(64, (2, 8))
    before = base(ids).logits
    model = randomize(lora.add_lora(copy.deepcopy(base), ("c_attn", "c_fc"), r=2))
    other = copy.deepcopy(model)
    assert_noticeable(model, ids)
    merged = lora.merge_lora(model)(ids).logits
    for done, expected in ((model, merged), (other, before)):
        assert lora.remove_lora(lora.remove_lora(done)) is done
        assert [type(m) for m in done.modules()] == [type(m) for m in base.modules()]
        assert done.state_dict().keys() == base.state_dict().keys()
        assert torch.equal(done(ids).logits, expected)
        with pytest.raises(lora.Error, match="no LoRA"):
            lora.lora_config(done)
        lora.add_lora(done)
    assert not torch.equal(merged, before)


def test_a_weight_in_two_places_is_not_merged():
    """Merging a tied head or table, or a computed weight, is refused, and changes nothing."""
    torch.manual_seed(0)
    ids = torch.randint(64, (2, 8))
    computed = nn.Sequential(OrderedDict(layer=nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))))
    x = torch.randn(3, 6)
    for model, targets, data in (
        (tiny_gpt(), ("lm_head",), ids),
        (tiny_gpt(), ("wte",), ids),
        (tiny_gpt(), ("wte", "lm_head", "c_attn"), ids),
        (computed, ("layer",), x),
    ):
        randomize(lora.add_lora(model, targets, r=2))
        assert_noticeable(model, data)
        before = bits(model)
        with pytest.raises(lora.Error, match="shares its weight"):
            lora.merge_lora(model)
        assert_same_bits(before, bits(model))
        assert all(layer.unmerged_weight is None for layer in lora.lora_layers(model).values())


def test_blocks_in_two_places_and_untied_heads_are_merged():
    """A block that is used twice, LoRA and all, merges; so does the head of a model that does not share it."""
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(6, 6), nn.Tanh())
    twice = randomize(lora.add_lora(nn.Sequential(block, block), ("0.0",), r=2))
    untied = tiny_gpt()
    untied.lm_head = nn.Linear(16, 64, bias=False)
    randomize(lora.add_lora(untied, ("lm_head", "wte"), r=2))
    for model, data in ((twice, torch.randn(3, 6)), (untied, torch.randint(64, (2, 8)))):
        assert_noticeable(model, data)
        y = model(data)
        merged = lora.merge_lora(model)(data)
        y, merged = getattr(y, "logits", y), getattr(merged, "logits", merged)
        assert (y - merged).abs().max() <= 1e-5 * y.abs().max()  # a few layers of sums of 16 terms: 100 · 2⁻²⁴


# ------------------------------------------------------------------------------------------------------------ tied head


def test_lora_on_the_tied_head_trains_through_the_chunked_loss():
    """Loss and gradients of LoRA on lm_head, wte and a layer are those of the whole logits, in chunks of any size."""
    torch.manual_seed(0)
    model = tiny_gpt().double()
    randomize(lora.add_lora(model, ("lm_head", "wte", "c_attn"), r=3))
    ids = torch.randint(64, (2, 16))
    labels = ids.clone()
    labels[0, :5] = -100
    assert_noticeable(model, ids)
    trained = [p for p in model.parameters() if p.requires_grad]
    whole = F.cross_entropy(model(ids).logits[:, :-1].reshape(-1, 64), labels[:, 1:].reshape(-1), ignore_index=-100)
    expected = torch.autograd.grad(whole, trained)
    loss = model(ids, labels=labels).loss
    assert len(expected) == 2 * 4 and all(g.abs().max() > 1e-6 for g in expected)
    # fp64, some thousand operations one after another
    for found, right in zip((loss, *torch.autograd.grad(loss, trained)), (whole, *expected), strict=True):
        torch.testing.assert_close(found, right, rtol=1e-10, atol=1e-12)
    x = torch.randn(30, 16, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(64, (30,))
    inputs = [x, *factors(model)[-1]]
    expected = torch.autograd.grad(F.cross_entropy(model.lm_head(x), labels), inputs)
    chunked = torch.autograd.grad(gpt.chunked_loss(model.lm_head, x, labels, 7), inputs)
    for found, right in zip(chunked, expected, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-10, atol=1e-12)


# -------------------------------------------------------------------------------------------------------------- targets


def test_targets_and_ranks_pick_layers_by_name():
    """A list holds ends of names, a string is a regular expression for whole names; of ranks the first match counts."""
    everything = {
        f"transformer.h.{i}.{n}" for i in (0, 1) for n in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
    for targets, expected in (
        ("all-linear", everything),
        (("c_proj",), {n for n in everything if n.endswith("c_proj")}),
        (["mlp.c_proj", "transformer.h.0.mlp.c_fc"], {n for n in everything if "mlp.c_proj" in n or "0.mlp.c_fc" in n}),
        (r".*\.h\.1\..*c_(attn|fc)", {"transformer.h.1.attn.c_attn", "transformer.h.1.mlp.c_fc"}),
    ):
        assert lora.lora_layers(lora.add_lora(tiny_gpt(), targets)).keys() == expected
    model = lora.add_lora(
        tiny_gpt(), r=1, alpha=6, ranks={r"h\.0\..*": 2, "mlp.c_fc": 3, "c_fc": 4, r"h.\d.attn.c_attn": 5}
    )
    ranks = {n.removeprefix("transformer."): len(layer.lora_A) for n, layer in lora.lora_layers(model).items()}
    assert ranks == {
        **{f"h.0.{n}": 2 for n in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")},
        **{"h.1.attn.c_attn": 5, "h.1.attn.c_proj": 1, "h.1.mlp.c_fc": 3, "h.1.mlp.c_proj": 1},
    }
    assert [layer.scaling for layer in lora.lora_layers(model).values()] == [6 / r for r in ranks.values()]


def test_all_linear_names_the_parameters_that_it_passes_over():
    """Experts kept in one tensor of three dimensions are no linear layers: all-linear warns, with their names."""
    model = tiny_gpt()
    for block in model.transformer.h:
        block.mlp.experts = nn.Parameter(torch.randn(3, 4, 5))
    with pytest.warns(UserWarning, match=r"passes over .*: transformer\.h\.\*\.mlp\.experts$") as caught:
        lora.add_lora(model)
    assert len(caught) == 1 and caught[0].filename == __file__
    assert len(lora.lora_layers(model)) == 8


@pytest.mark.filterwarnings("error")
def test_all_linear_passes_over_a_head_that_is_trained_whole():
    """What is inside modules_to_save is trained, so it is not warned of, however deep its layers are."""
    model = nn.ModuleDict({"layer": nn.Linear(4, 4), "classifier": nn.ModuleDict({"dense": nn.Linear(4, 2)})})
    lora.add_lora(model)
    assert [*lora.lora_layers(model)] == ["layer"] and model.classifier.dense.weight.requires_grad


def test_numbers_of_the_base_in_a_file_must_be_this_base_s():
    """peft's file may hold a trained bias, or an embedding that was resized: dropped, they would be missed silently."""
    model = nn.ModuleDict({"a": nn.Linear(4, 4)})
    lora.add_lora(model, ["a"], r=2)
    state, bias = lora.lora_state_dict(model), model.a.base_layer.bias
    lora.load_lora_state_dict(model, state | {"base_model.model.a.base_layer.bias": bias.clone()})
    with pytest.raises(lora.Error, match="is not this base's"):
        lora.load_lora_state_dict(model, state | {"base_model.model.a.base_layer.bias": bias + 1})


class Quantized(nn.Linear):
    """A layer that keeps its weight in one byte and widens it in its forward."""

    def __init__(self, dtype):
        super().__init__(4, 4)
        self.weight = nn.Parameter((self.weight.data * 100).to(dtype), requires_grad=False)

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype) / 100, self.bias)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_a_quantized_layer_is_trained_but_not_merged(dtype):
    """LoRA goes over a layer with an 8-bit weight, in fp32, and refuses to round itself into that weight."""
    torch.manual_seed(0)
    model = randomize(lora.add_lora(nn.Sequential(Quantized(dtype), nn.Linear(4, 4)), r=2))
    x = torch.randn(3, 4)
    assert_noticeable(model, x)
    model(x).sum().backward()
    assert all(p.dtype == torch.float32 and p.grad.abs().max() > 0 for pair in factors(model) for p in pair)
    before = bits(model)
    with pytest.raises(lora.Error, match="0 has a quantized weight"):
        lora.merge_lora(model)
    assert_same_bits(before, bits(model))


def test_a_wrapper_shows_the_weight_that_it_computes_with():
    """A model finds W + ΔW in W's dtype as layer.weight, disabled W itself, and all else that the base layer has."""
    torch.manual_seed(0)
    model = nn.Sequential(OrderedDict(table=nn.Embedding(8, 4), up=nn.Linear(4, 3, dtype=torch.bfloat16)))
    randomize(lora.add_lora(model, ("table", "up"), r=2))
    for layer in model:
        W, update = dense(layer)
        W, update = (x.to(layer.base_layer.weight.dtype) for x in (W, update))
        torch.testing.assert_close(layer.weight, W + update)  # torch's tolerances for the dtype: it is rounded once
        with lora.lora_disabled(model):
            assert layer.weight is layer.base_layer.weight
    assert model.up.bias is model.up.base_layer.bias and model.up.in_features == 4 and model.table.num_embeddings == 8


# --------------------------------------------------------------------------------------------------------------- errors


def everything_about(model):
    """All that add_lora could change."""
    return (
        [(name, id(m), m.training, sorted(vars(m))) for name, m in model.named_modules()],
        [(name, id(p), p.requires_grad, p._version) for name, p in model.named_parameters()],
    )


class Everything(nn.Module):
    def __init__(self):
        super().__init__()
        self.h = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(4, 4), "ln": nn.LayerNorm(4)}) for _ in range(2))
        self.table = nn.Embedding(6, 4)
        self.attention = nn.MultiheadAttention(4, 2)
        self.eval()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"r": 0}, "rank must be a whole number of at least 1: r=0"),
        ({"r": True}, "rank must be .* r=True"),
        ({"r": 8.0}, "rank must be .* r=8.0"),
        ({"ranks": {"up": 0}}, "rank must be .* ranks={'up': 0}"),
        ({"ranks": {"up": "4"}}, "rank must be"),
        ({"ranks": {"down": 4}}, r"ranks: 'down' matches no target; there are h.\*.up"),
        ({"ranks": {"u": 4}}, "ranks: 'u' matches no target"),
        ({"ranks": {"(up": 4}}, r"\(up.* is not a regular expression"),
        ({"alpha": math.nan}, "alpha finite.*nan"),
        ({"alpha": math.inf}, "alpha finite"),
        ({"dropout": 1}, r"dropout must be in \[0, 1\)"),
        ({"dropout": -0.1}, "dropout must be"),
        ({"dropout": math.nan}, "dropout must be"),
        ({"init": "olora"}, "init kaiming, gaussian, reverse or pissa; .*'olora'"),
        ({"init": None}, "gaussian, reverse or pissa; .*None"),
        ({"targets": ("q_proj",)}, r"no layer fits .*q_proj.*; there are attention.out_proj, h.\*.up, table"),
        ({"targets": "up"}, "no layer fits .*a string is a regular expression for a whole name"),
        ({"targets": ()}, "no layer fits"),
        ({"targets": ("ln",)}, "h.0.ln is a LayerNorm; LoRA fits on"),
        ({"targets": (r"h.*",)}, "no layer fits"),
        ({"targets": r"h\.[01"}, "is not a regular expression"),
        ({"targets": "a{99999999999}"}, "is not a regular expression"),
        ({"targets": "(" * 5000}, "is not a regular expression"),
        ({"modules_to_save": "table"}, "modules_to_save='table' must be a list of ends of names"),
        ({"modules_to_save": ["tabel"]}, r"modules_to_save=\['tabel'\] must be a list"),
        ({"modules_to_save": ["up"]}, "no layer fits"),
    ],
)
def test_wrong_arguments_are_refused_and_change_nothing(arguments, message):
    """Each wrong argument of add_lora is refused in one line that says what is there, with the model as it was."""
    model = Everything()
    before = everything_about(model)
    with pytest.raises(lora.Error, match=message) as caught:
        lora.add_lora(model, **{"targets": ("up",), **arguments})
    assert "\n" not in str(caught.value)
    assert everything_about(model) == before


def test_models_without_a_place_for_lora_are_refused():
    """A bare layer has no name to be replaced under, and a model without linear layers has none: both are refused."""
    for model in (nn.Linear(4, 4), nn.Sequential(nn.Tanh())):
        before = everything_about(model)
        with pytest.raises(lora.Error, match="there are none in the model"):
            lora.add_lora(model)
        assert everything_about(model) == before


def test_a_layer_that_cannot_be_wrapped_leaves_the_others_alone():
    """If a wrapper cannot be built, here over a layer that hides its size, no other has been replaced or frozen."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    del model[1].in_features
    with pytest.raises(AttributeError, match="in_features"):
        lora.add_lora(model, ("0", "1"))
    assert type(model[0]) is nn.Linear and model[0].weight.requires_grad


def test_adding_twice_is_refused():
    """A second add_lora is refused and the first stays as it is, factors and configuration."""
    model = randomize(lora.add_lora(Everything(), ("up",), r=2))
    before, config = everything_about(model), lora.lora_config(model)
    with pytest.raises(lora.Error, match="LoRA already"):
        lora.add_lora(model, ("table",), r=3)
    assert everything_about(model) == before and lora.lora_config(model) == config


# ------------------------------------------------------------------------------------------- layers that do not fit


class Reads(nn.Module):
    """A model that reads the weights of its layers, and calls none of them."""

    def __init__(self):
        super().__init__()
        self.by_hand, self.as_function, self.table = nn.Linear(4, 4), nn.Linear(4, 4), nn.Embedding(4, 4)

    def forward(self, x):
        x = (self.by_hand.weight @ x.t()).t()
        x = F.linear(x, self.as_function.weight, self.as_function.bias)
        return x + F.embedding(torch.arange(len(x)), self.table.weight)


class Attends(nn.Module):
    """Two modules of torch that read weights: MultiheadAttention always, TransformerEncoderLayer in eval mode."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)

    def forward(self, x):
        return self.layer(self.attention(x[None], x[None], x[None])[0])[0]


@pytest.mark.parametrize("kind", [Reads, Attends])
def test_a_layer_whose_weight_is_only_read_is_trained_too(kind):
    """Where a model reads a weight and never calls the layer, the update counts and learns as in the merged model."""
    torch.manual_seed(0)
    x, base = torch.randn(4, 4).double(), kind().double()
    targets = ["by_hand", "as_function", "table"] if kind is Reads else ["out_proj", "linear1", "linear2"]
    model = randomize(lora.add_lora(copy.deepcopy(base), targets, r=2))
    with torch.no_grad():
        expected = copy.deepcopy(base)
        for name, layer in lora.lora_layers(model).items():
            W, update = dense(layer)
            expected.get_submodule(name).weight.copy_(W + update)
    for mode in (True, False):
        with torch.set_grad_enabled(mode):
            # fp64: a few layers of sums of 8 terms
            torch.testing.assert_close(model.train(mode)(x), expected.train(mode)(x), rtol=1e-12, atol=1e-12)
    model.train()(x).square().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in lora.lora_parameters(model).values())
    torch.testing.assert_close(lora.merge_lora(model)(x), expected.train()(x), rtol=1e-12, atol=1e-12)


class ScaledEmbedding(nn.Embedding):
    embed_scale = 3.0

    def forward(self, ids):
        return super().forward(ids) * self.embed_scale


class CountingEmbedding(nn.Embedding):
    def forward(self, mask, past=0):
        return super().forward(mask.cumsum(-1) - 1 + past)


def test_an_embedding_whose_forward_is_its_own_is_refused():
    """A table that computes its positions itself is refused; one that only scales what it looks up is not."""
    with pytest.raises(lora.Error, match="0 is a CountingEmbedding, whose forward is not nn.Embedding's"):
        lora.add_lora(nn.Sequential(CountingEmbedding(8, 4)), ("0",))
    torch.manual_seed(0)
    model = randomize(lora.add_lora(nn.Sequential(ScaledEmbedding(8, 4)).double(), ("0",), r=2))
    W, update = dense(model[0])
    ids = torch.randint(8, (3, 5))
    torch.testing.assert_close(model(ids), 3 * (W + update)[ids], rtol=1e-13, atol=1e-13)  # fp64, 3 terms


# ------------------------------------------------------------------------------------------------- modules_to_save


def with_a_head():
    """A table, two layers and a head of two layers, and an input."""
    torch.manual_seed(0)
    head = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8, affine=False), nn.Linear(8, 3))
    body = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8))
    return nn.Sequential(OrderedDict(body=body, head=head)).eval(), torch.randn(5, 6)


def test_modules_to_save_are_trained_in_full_and_saved():
    """The head's own parameters train beside A and B, all is saved and loaded, and nothing else has a gradient."""
    base, x = with_a_head()
    model = lora.add_lora(copy.deepcopy(base), ("0", "2"), r=2, modules_to_save=("head",)).train()
    assert list(lora.lora_layers(model)) == ["body.0", "body.2"]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    state = lora.lora_state_dict(model)
    heads = {f"base_model.model.head.{n}": t for n, t in base.head.state_dict().items()}
    assert {key for key in state if "lora_" not in key} == heads.keys() and len(state) == 4 + len(heads)
    assert all(not torch.equal(state[key], t) for key, t in heads.items())
    for name, p in model.named_parameters():
        assert p.requires_grad == ("lora_" in name or "head." in name) and (p.grad is None) != p.requires_grad
    other = lora.add_lora(copy.deepcopy(base), ("0", "2"), r=2, modules_to_save=["head"])
    lora.load_lora_state_dict(other, state)
    assert torch.equal(other(x), model.eval()(x)) and not torch.allclose(other(x), base(x))
    clone = copy.deepcopy(model)
    for p in model.parameters():
        nn.init.zeros_(p.data)
    assert torch.equal(clone(x), other(x)) and lora.lora_config(clone)["modules_to_save"] == ["head"]


def test_modules_to_save_stay_as_trained():
    """Disabled or removed, LoRA leaves the modules to save as they were trained, frozen in the end."""
    base, x = with_a_head()
    model = randomize(lora.add_lora(copy.deepcopy(base), ("0", "2"), r=2, modules_to_save=("head",)))
    for p in model.head.parameters():
        nn.init.normal_(p)
    base.head.load_state_dict(model.head.state_dict())
    assert (model(x) - base(x)).abs().max() > 0.1 * base(x).abs().max()
    with lora.lora_disabled(model):
        assert torch.equal(model(x), base(x))
    assert torch.equal(lora.remove_lora(model)(x), base(x))
    assert not any(p.requires_grad for p in model.parameters()) and not hasattr(model.head, "lora_name")


def test_what_cannot_be_saved_is_refused():
    """A text for a list, a name that no module has, and a module that shares its weight with another are refused."""
    for wrong in ("lm_head", ["nothing"], ["lm_head"]):
        with pytest.raises(lora.Error, match="modules_to_save=.* must be a list of ends of names of modules"):
            lora.add_lora(tiny_gpt(), ("c_attn",), modules_to_save=wrong)


# ---------------------------------------------------------------------------------------------------- sharded models


def test_a_sharded_model_is_neither_saved_nor_merged():
    """Where a rank has no elements of its parameters, as ZeRO's stage 3 leaves them, the error names whole()."""
    for wrong in ("lora_B", "lora_A"):
        model = randomize(lora.add_lora(one_layer("linear", 4, 3), r=2))
        state = lora.lora_state_dict(model)
        whole = {p: p.data for p in model.parameters()}
        for p in whole:
            p.data = p.data.new_empty(0)
        getattr(model[0], wrong).data = whole[getattr(model[0], wrong)]  # one is enough
        load = lambda model, state=state: lora.load_lora_state_dict(model, state)  # noqa: E731
        for call in (lora.lora_state_dict, lora.merge_lora, load):
            with pytest.raises(lora.Error, match=r"lora_..weight is sharded.*engine\.whole\(\)"):
                call(model)
        assert model[0].unmerged_weight is None
        for p, data in whole.items():
            p.data = data
        assert lora.merge_lora(model)[0].unmerged_weight is not None


def test_a_dtensor_is_not_saved(tmp_path):
    """Under FSDP2 a parameter is a DTensor, of which this rank holds a part: the error names full_tensor()."""
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = dist.init_device_mesh("cpu", (1,))
        model = randomize(lora.add_lora(one_layer("linear", 4, 3), r=2))
        fsdp.fully_shard(model, mesh=mesh)
        for call in (lora.lora_state_dict, lora.merge_lora):
            with pytest.raises(lora.Error, match=r"sharded.*full_tensor\(\)"):
                call(model)
    finally:
        dist.destroy_process_group()


# ---------------------------------------------------------------------------------------------------------------- files


def test_state_dict_holds_what_was_trained_and_loads_into_another_model():
    """Saved and loaded onto a fresh add_lora, an adapter gives the same output; a table added by peft is skipped."""
    torch.manual_seed(0)
    base = tiny_gpt()
    model = randomize(lora.add_lora(copy.deepcopy(base), ("c_attn", "wte"), r=2))
    state = lora.lora_state_dict(model)
    assert sum(t.numel() for t in state.values()) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert state.keys() == {
        *(f"base_model.model.transformer.h.{i}.attn.c_attn.lora_{f}.weight" for i in (0, 1) for f in "AB"),
        *(f"base_model.model.transformer.wte.lora_embedding_{f}" for f in "AB"),
    }
    ids = torch.randint(64, (2, 8))
    assert_noticeable(model, ids)
    other = lora.add_lora(copy.deepcopy(base), ("c_attn", "wte"), r=2)
    lora.load_lora_state_dict(
        other, {**state, "base_model.model.transformer.wte.base_layer.weight": base.lm_head.weight}
    )
    assert torch.equal(other(ids).logits, model(ids).logits)
    assert all(p.requires_grad for pair in factors(other) for p in pair)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda state: state.pop("base_model.model.0.lora_A.weight"),
            r"missing base_model.model.\*.lora_A.weight, left over nothing",
        ),
        (
            lambda state: state.update({"base_model.model.9.lora_A.weight": torch.ones(2, 4)}),
            r"missing nothing, left over base_model.model.\*.lora_A.weight",
        ),
        (
            lambda state: state.update({"base_model.model.2.lora_B.weight": torch.ones(4, 3)}),
            r"is torch.float32 \(4, 3\) in the adapter; .* \(4, 2\)",
        ),
    ],
)
def test_an_adapter_that_does_not_fit_is_not_loaded_by_half(change, message):
    """A tensor missing, left over or of another shape is named, and none of the others is loaded."""
    model = lora.add_lora(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)), r=2)
    state = {key: torch.ones_like(t) for key, t in lora.lora_state_dict(model).items()}
    change(state)
    before = bits(model)
    with pytest.raises(lora.Error, match=message):
        lora.load_lora_state_dict(model, state)
    assert_same_bits(before, bits(model))


def test_loading_while_merged_is_refused():
    """Another adapter loaded over a merge would never be computed: it is refused until the merge is taken back."""
    torch.manual_seed(0)
    model = randomize(lora.add_lora(one_layer("linear", 4, 4)))
    state = {key: torch.ones_like(t) for key, t in lora.lora_state_dict(model).items()}
    before = bits(lora.merge_lora(model))
    with pytest.raises(lora.Error, match="unmerge_lora"):
        lora.load_lora_state_dict(model, state)
    assert_same_bits(before, bits(model))
    lora.load_lora_state_dict(lora.unmerge_lora(model), state)
    assert all(torch.equal(t, state[key]) for key, t in lora.lora_state_dict(model).items())


# ----------------------------------------------------------------------------------------------- inside other machinery


class InItsInputsType(nn.Linear):
    """Answers in the type of its input whatever autocast says, as bitsandbytes' layers do."""

    def forward(self, x):
        return super().forward(x).to(x.dtype)


@pytest.mark.parametrize("kind, dtype", [(nn.Linear, torch.bfloat16), (InItsInputsType, torch.float32)])
def test_under_autocast(kind, dtype):
    """Under bf16 autocast over an fp32 base, outputs and fp32 gradients are those without it, to bf16's precision."""
    torch.manual_seed(0)
    model = randomize(lora.add_lora(nn.Sequential(kind(16, 16), kind(16, 16)), r=4, alpha=4))
    x = torch.rand(2, 5, 16)
    assert_noticeable(model, x)
    trained = [p for pair in factors(model) for p in pair]
    exact = model(x)
    expected = torch.autograd.grad(exact.square().mean(), trained)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    assert y.dtype == dtype
    # a chain of some 20 roundings of 2⁻⁸ each, which partly cancel: 5 of them, relative to the largest value
    assert (y - exact).abs().max() <= 5 * 2**-8 * exact.abs().max()
    for found, right in zip(torch.autograd.grad(y.float().square().mean(), trained), expected, strict=True):
        assert found.dtype == torch.float32
        assert (found - right).abs().max() <= 5 * 2**-8 * right.abs().max()


class SigmoidLinear(nn.Linear):
    def forward(self, x):
        return torch.sigmoid(super().forward(x))


def test_the_base_layers_output_is_left_alone_for_backward():
    """A subclass whose backward needs its own output, sigmoid(Wx + b), gets the gradient of sigmoid."""
    torch.manual_seed(0)
    model = randomize(lora.add_lora(nn.Sequential(SigmoidLinear(4, 3)).double(), r=2))
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    model(x).sum().backward()
    W, update = dense(model[0])
    p = torch.sigmoid(x.detach() @ W.t() + model[0].bias.detach())
    torch.testing.assert_close(x.grad, (p * (1 - p)) @ W + update.sum(0), rtol=1e-12, atol=1e-12)  # fp64, 4 terms


class CachingLinear(nn.Linear):
    """Computes once and returns the same tensor at each call."""

    cache = None

    def forward(self, x):
        if self.cache is None:
            self.cache = super().forward(x)
        return self.cache


def test_a_base_layer_may_keep_its_output():
    """A layer that caches its output gives the same at each call: the update is not added to what it keeps."""
    torch.manual_seed(0)
    model, x = nn.Sequential(CachingLinear(4, 3)), torch.randn(5, 4)
    plain = model(x).detach().clone()
    randomize(lora.add_lora(model, r=2))
    first, second = model(x), model(x)
    assert torch.equal(first, second) and not torch.allclose(first, plain)


def test_a_hook_may_keep_the_base_layers_output():
    """What a forward hook on the base layer keeps is x Wᵀ + b, without the update."""
    torch.manual_seed(0)
    model, x, kept = nn.Sequential(nn.Linear(4, 3)), torch.randn(5, 4), []
    plain = model(x)
    randomize(lora.add_lora(model, r=2))
    model[0].base_layer.register_forward_hook(lambda layer, args, y: kept.append(y))
    assert not torch.allclose(model(x), plain)
    assert torch.equal(kept[0], plain)


def test_an_input_that_is_not_contiguous():
    """A transposed input gives what its contiguous copy gives, and is left as it was."""
    torch.manual_seed(0)
    model = randomize(lora.add_lora(one_layer("linear", 4, 3), r=2))
    x = torch.randn(4, 5, 2, dtype=torch.float64).transpose(0, 2)
    before = x.clone()
    torch.testing.assert_close(model(x), model(x.contiguous()), rtol=0, atol=1e-13)
    assert torch.equal(x, before)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    """Recomputed under torch.utils.checkpoint, with dropout, the gradients are the same bits."""
    torch.manual_seed(0)
    model = randomize(lora.add_lora(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)), dropout=0.3))
    x = torch.randn(5, 8, requires_grad=True)
    assert_noticeable(model, x)
    inputs = [x, *(p for pair in factors(model) for p in pair)]
    found = []
    for run in (model, lambda x: checkpoint(model, x, use_reentrant=reentrant)):
        torch.manual_seed(1)
        for t in inputs:
            t.grad = None
        run(x).square().sum().backward()
        found.append([t.grad for t in inputs])
    for plain, recomputed in zip(*found, strict=True):
        assert torch.equal(plain, recomputed)


@pytest.mark.parametrize("merged", [False, True])
def test_deepcopy_and_whole_state_dict(merged):
    """A deep copy stands alone, and the whole state_dict, merged or not, makes another such model the same."""
    torch.manual_seed(0)
    base = tiny_gpt()
    model = randomize(lora.add_lora(copy.deepcopy(base), r=2))
    ids = torch.randint(64, (2, 8))
    assert_noticeable(model, ids)
    if merged:
        lora.merge_lora(model)
    expected = model(ids).logits
    clone = copy.deepcopy(model)
    other = lora.add_lora(tiny_gpt(), r=2)
    if merged:
        lora.merge_lora(other)
    assert other.load_state_dict(model.state_dict()) == ([], [])
    for p in model.parameters():
        nn.init.zeros_(p)
    for one in (clone, other):
        assert torch.equal(one(ids).logits, expected)
        with lora.lora_disabled(one):
            assert torch.equal(one(ids).logits, base(ids).logits)


def test_a_merged_state_dict_is_not_taken_for_an_unmerged_one():
    """A merged model's state is refused by an unmerged one, where the update would count twice, and the reverse."""
    merged = lora.merge_lora(randomize(lora.add_lora(one_layer("linear", 4, 3))))
    unmerged = lora.add_lora(one_layer("linear", 4, 3))
    for source, target in ((merged, unmerged), (unmerged, merged)):
        with pytest.raises(RuntimeError, match="unmerged_weight"):
            target.load_state_dict(source.state_dict())


def test_what_a_merged_model_costs():
    """Merged, a layer keeps W twice until remove_lora, and its output hands no gradient down to A and B."""
    model = randomize(lora.add_lora(one_layer("no bias", 16, 16), r=1))
    W, factors_bytes = 16 * 16 * 8, 2 * 16 * 8
    size = lambda: sum(t.numel() * t.element_size() for t in model.state_dict().values())  # noqa: E731
    assert size() == W + factors_bytes
    lora.merge_lora(model)
    assert size() == 2 * W + factors_bytes and "0.unmerged_weight" in model.state_dict()
    assert not model(an_input("no bias", 16)).requires_grad
    lora.remove_lora(model)
    assert size() == W


def test_converting_a_merged_model_converts_what_unmerging_brings_back():
    """Cast while it is merged, a model still unmerges to its base weight, in the new type."""
    torch.manual_seed(0)
    model = randomize(lora.add_lora(one_layer("linear", 4, 3)))
    W = model[0].base_layer.weight.detach().clone()
    lora.unmerge_lora(lora.merge_lora(model).to(torch.bfloat16))
    assert torch.equal(model[0].base_layer.weight, W.to(torch.bfloat16))


# ---------------------------------------------------------------------------------------------------------------- paste


def test_the_file_alone_runs_its_demonstration(tmp_path, monkeypatch, capsys):
    """Copied into an empty folder, without nanopeft, lora.py shows what it claims."""
    shutil.copy(lora.__file__, tmp_path / "lora.py")
    monkeypatch.setitem(sys.modules, "nanopeft", None)
    runpy.run_path(str(tmp_path / "lora.py"), run_name="__main__")
    shown = capsys.readouterr().out
    assert "nothing has changed yet: True" in shown and "bit for bit: True" in shown
    difference = float(shown.split("a largest difference of ")[1].split()[0])
    assert 0 < difference < 1e-5  # fp32, two layers of 64: some hundred roundings of 6e-8


def test_only_torch_and_the_standard_library_are_imported():
    """lora.py imports nothing but torch and the standard library, so that it can be pasted."""
    lines = Path(lora.__file__).read_text().splitlines()
    roots = {line.split()[1].split(".")[0] for line in lines if line.lstrip().startswith(("import ", "from "))}
    assert roots - {"torch"} <= sys.stdlib_module_names
