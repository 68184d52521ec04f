# SPDX-License-Identifier: MIT
"""What nanopeft/wide.py claims: the oracles are fp64, fp32, and a mode below it that sees what torch carries out."""

import os
import shutil
import subprocess
import sys
from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from nanopeft import gpt, lora, wide
from nanopeft.wide import WideProducts, emulates

NARROW = [torch.bfloat16, torch.float16]


class CarriedOut(TorchDispatchMode):
    """Around WideProducts it sees what that has made of each product: the types of its operands."""

    def __init__(self):
        super().__init__()
        self.types = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(word in func.overloadpacket.__name__ for word in ("mm", "attention", "convolution")):
            self.types |= {t.dtype for t in args if torch.is_tensor(t) and t.is_floating_point()}
        return func(*args, **(kwargs or {}))


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_a_product_is_the_exact_one_rounded(data):
    """Each product of 16-bit matrices, also in place or into a given tensor, is fp64's, rounded once to 16 bits.

    A sum of k products in 32 bits adds k 2^-24 of their sizes; the rounding adds 2^-8 of the result in bf16 and 2^-11
    in fp16, half a unit in the last of 8 or 11 digits, or half of the smallest step of all, 2^-25 in fp16.
    """
    dtype, unit = data.draw(st.sampled_from([(torch.bfloat16, 2**-8), (torch.float16, 2**-11)]))
    B, n, k, m = (data.draw(st.integers(1, 9)) for _ in range(4))
    torch.manual_seed(data.draw(st.integers(0, 1 << 30)))
    a, b, c = (torch.randn(B, *shape, dtype=dtype) for shape in ((n, k), (k, m), (n, m)))
    alpha, beta = data.draw(st.floats(-2, 2)), data.draw(st.floats(-2, 2))
    scaled, out2, out3 = dict(alpha=alpha, beta=beta), torch.full_like(c[0], 7), torch.full_like(c, 7)
    A, B, C = a.double(), b.double(), c.double()

    with CarriedOut() as carried_out, WideProducts():
        plain = [a @ b, torch.bmm(a, b, out=out3.clone())]
        plain2 = [a[0] @ b[0], F.linear(a[0], b[0].t()), torch.mm(a[0], b[0], out=out2)]
        summed = [torch.baddbmm(c, a, b, **scaled), c.clone().baddbmm_(a, b, **scaled)]
        summed += [torch.baddbmm(c, a, b, **scaled, out=out3)]
        summed2 = [torch.addmm(c[0], a[0], b[0], **scaled), c[0].clone().addmm_(a[0], b[0], **scaled)]
        over_batch = [torch.addbmm(c[0], a, b, **scaled), c[0].clone().addbmm_(a, b, **scaled)]

    total, sizes = A @ B, A.abs() @ B.abs()
    for found, expected, size in (
        (plain, total, sizes),
        (plain2, total[0], sizes[0]),
        (summed, beta * C + alpha * total, abs(beta) * C.abs() + abs(alpha) * sizes),
        (summed2, beta * C[0] + alpha * total[0], abs(beta) * C[0].abs() + abs(alpha) * sizes[0]),
        (over_batch, beta * C[0] + alpha * total.sum(0), abs(beta) * C[0].abs() + abs(alpha) * sizes.sum(0)),
    ):
        bound = unit * expected.abs() + (k * len(A) + 3) * 2**-23 * size + 2**-25
        for y in found:
            assert y.dtype == dtype and ((y.double() - expected).abs() <= bound).all()
    assert torch.equal(out2, plain2[0]) and torch.equal(out3, summed[0])
    assert carried_out.types == {torch.float32}


@settings(deadline=None, max_examples=20)
@given(st.permutations([1 << 20, 8, 3]), st.integers(0, 2000), st.sampled_from(NARROW), st.tuples(*[st.booleans()] * 2))
def test_a_large_product_in_pieces_is_the_exact_one_rounded(sizes, more, dtype, turned):
    """However its sides lie to each other, a product with 32 MB or more is the exact one, rounded once.

    Of integers up to 3, the sums, at most 9 (2^20 + 2000), are exact in fp32's 24 digits.
    """
    m, k, n = (size + more * (size > 8) for size in sizes)
    torch.manual_seed(0)
    a, b = (torch.randint(-3, 4, shape).to(dtype) for shape in ((m, k), (k, n)))
    A, B = (t.t().contiguous().t() if turn else t for t, turn in zip((a, b), turned))
    with CarriedOut() as carried_out, WideProducts():
        y = A @ B
    assert y.dtype == dtype and y.is_contiguous() and torch.equal(y, (a.double() @ b.double()).to(dtype))
    assert carried_out.types == {torch.float32}


def test_a_large_product_of_sides_that_do_not_fit_is_refused():
    """In pieces too, k and k must be equal, and torch says it in its own words."""
    a, b = torch.ones(2, 1 << 22, dtype=torch.bfloat16), torch.ones((1 << 22) - 1, 2, dtype=torch.bfloat16)
    with WideProducts(), pytest.raises(RuntimeError, match="cannot be multiplied"):
        a @ b
    with WideProducts(), pytest.raises(RuntimeError, match="must be a matrix"):
        torch.mm(a[0], b)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("shape", [(2, 3, 9), (2, 3, 9, 5)])
def test_a_convolution_is_fp32s_rounded(dtype, shape):
    """A convolution and its gradients are those of fp32, rounded once; what is not asked for stays None."""
    torch.manual_seed(0)
    x, w = torch.randn(shape).to(dtype), torch.randn(4, 3, *[2] * (len(shape) - 2)).to(dtype)
    convolve = F.conv1d if len(shape) == 3 else F.conv2d
    results = []
    for context, to in ((WideProducts(), dtype), (nullcontext(), torch.float32)):
        with context:
            leaf, kernel = x.to(to).requires_grad_(), w.to(to)
            y = convolve(leaf, kernel)
            results.append([y, *torch.autograd.grad(y, leaf, y.detach().to(dtype).to(to))])
    for found, expected in zip(*results):
        assert found.dtype == dtype and torch.equal(found, expected.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wider_types_are_left_alone(dtype):
    """In 32 and 64 bits a step has the same bits inside as outside."""
    torch.manual_seed(0)
    model, ids = gpt.GPT(vocab_size=61, n_embd=16, n_layer=2, n_head=2).to(dtype), torch.arange(40).view(2, 20)
    steps = []
    for context in (nullcontext(), WideProducts()):
        with context:
            loss = model(ids, labels=ids).loss
            steps.append([loss, *torch.autograd.grad(loss, [*model.parameters()])])
    assert all(torch.equal(x, y) for x, y in zip(*steps))


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("padded", [False, True])
def test_a_step(dtype, padded):
    """No product of a LoRA step and of a full one is carried out in 16 bits; gradients are no further from fp64.

    By half more at most: the roundings inside and outside are the same but for attention's own. A padded batch takes
    attention's masked form.
    """
    torch.manual_seed(0)
    exact, ids = gpt.GPT(vocab_size=61, n_embd=16, n_layer=2, n_head=2).double(), torch.arange(60).view(3, 20)
    for p in exact.parameters():
        nn.init.normal_(p, std=0.3)
    exact.load_state_dict({key: t.to(dtype).double() for key, t in exact.state_dict().items()})
    mask = torch.ones_like(ids)
    mask[0, : 7 * padded] = 0

    def gradients(model, context):
        with context:
            loss = model(ids, attention_mask=mask if padded else None, labels=ids).loss
            found = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])
        return torch.cat([g.flatten().double() for g in found]), {g.dtype for g in found}

    expected, _ = gradients(exact, nullcontext())
    model, carried_out = exact.to(dtype), CarriedOut()
    outside, _ = gradients(model, nullcontext())
    with carried_out:
        inside, types = gradients(model, WideProducts())
        assert types == {dtype}
        gradients(lora.add_lora(model, r=2), WideProducts())
    assert carried_out.types == {torch.float32}
    assert 0 < (inside - expected).norm() <= 1.5 * (outside - expected).norm()


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize(
    "layer",
    [nn.LSTM(8, 8), nn.GRU(8, 8), nn.MultiheadAttention(8, 2), nn.Conv1d(8, 8, 3, padding=1)],
    ids=lambda layer: type(layer).__name__,
)
def test_layers(layer, dtype):
    """No product in torch's other layers is carried out in 16 bits, forward or backward, and what comes out has 16."""
    layer, x = layer.to(dtype), torch.randn(8, 8, 8).to(dtype)
    with CarriedOut() as carried_out, WideProducts():
        y = layer(x, x, x) if isinstance(layer, nn.MultiheadAttention) else layer(x)
        y = y[0] if isinstance(y, tuple) else y
        y.float().square().sum().backward()
    assert y.dtype == dtype and {p.grad.dtype for p in layer.parameters()} == {dtype}
    assert carried_out.types == {torch.float32}


def test_what_attention_keeps_stays_in_fp32():
    """The logarithms of attention's sums, which its gradient takes, are the same bits as in fp32."""
    q = torch.randn(2, 3, 9, 4).bfloat16()
    with WideProducts():
        y, kept = wide.ATTENTION(q, q, q)
    assert y.dtype == torch.bfloat16 and torch.equal(kept, wide.ATTENTION(*[q.float()] * 3)[1])


@pytest.mark.parametrize("other", [torch.float32, torch.float64, torch.float16, torch.complex64, torch.int64])
def test_unequal_types_are_refused_as_by_torch(other):
    """What is an error outside is one inside: a program does not come to rest on this machine's ways."""
    a, b = torch.ones(3, 3, dtype=torch.bfloat16), torch.ones(3, 3, dtype=other)
    calls = [(torch.matmul, a, b), (torch.addmm, b, a, a), (F.linear, a, b), (torch.Tensor.addmm_, a, a, b)]
    large = torch.ones(1 << 21, 3, dtype=torch.bfloat16)
    for product, *operands in [*calls, (torch.mm, large, b), (partial(torch.mm, out=b), a, a)]:
        with WideProducts(), pytest.raises(RuntimeError, match="type"):
            product(*operands)


def test_sparse_matrices_and_empty_results_are_as_outside():
    """A sparse matrix is left to torch, also a large one, and out= may be empty, to be given the result's shape."""
    a = torch.eye(2900).to(torch.bfloat16)
    with WideProducts():
        assert torch.equal(a.to_sparse() @ a, a)
        assert torch.equal(torch.mm(a[:3, :3], a[:3, :3], out=a.new_empty(0)), a[:3, :3])


def test_which_types_are_emulated():
    """bf16 is found to be emulated just where an x86 CPU has no AVX-512; 32 and 64 bits never are, nor after a call."""
    threads = torch.get_num_threads()
    assert not emulates(torch.float32) and not emulates(torch.float64)
    capability = torch.backends.cpu.get_cpu_capability()
    if capability in ("AVX2", "AVX512") and "ATEN_CPU_CAPABILITY" not in os.environ:
        assert emulates(torch.bfloat16) == (capability == "AVX2")
    assert torch.get_num_threads() == threads


def test_the_file_alone_runs_its_demonstration(tmp_path):
    """Copied into an empty folder, without nanopeft, wide.py shows what it claims."""
    shutil.copy(wide.__file__, tmp_path / "wide.py")
    program = "import sys, runpy; sys.modules['nanopeft'] = None; runpy.run_path('wide.py', run_name='__main__')"
    done = subprocess.run([sys.executable, "-I", "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # fp32's sum is off by 2^-24 of its terms' sizes, 2^16 less than half a unit of bf16: one in 1,000 is on the edge
    share = float(done.stdout.rpartition("\n")[0].rpartition("\n")[2].split("%")[0])
    assert 99 < share <= 100
