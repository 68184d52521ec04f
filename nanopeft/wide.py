# SPDX-License-Identifier: MIT
"""Products of 16-bit matrices on CPUs that have no instructions for them: taken in 32 bits, then rounded.

    C = round16( sum over k of  A[i, k] · B[k, j] )          the products exact, the sum in fp32

That is what bf16 instructions compute. An x86 CPU without AVX-512, as in many laptops, has none, and there torch
multiplies one number after the other, on one thread: a step of `train.py --method lora --precision bf16` took 24.8
seconds. With its products in fp32, and a copy of each operand for as long as its product takes, it takes 0.87, and in
fp32 altogether 0.72 (two threads).

    if emulates(torch.bfloat16):
        with WideProducts():
            model(input_ids=ids, labels=ids).loss.backward()          forward and backward inside

The mode works below autograd, on each operation that torch carries out: no model has to be changed, what is kept for
backward stays in 16 bits, and so do weights, gradients and memory between the products.

Left as they are: a matrix times a vector, where the copy costs more than it wins, and what is rare (addr, sparse
matrices). Attention rounds less often than with 16-bit instructions, which take its probabilities in 16 bits. To infer,
take torch.no_grad: under torch.inference_mode the products hide in larger operations, as they do in the fused layers
of nn.TransformerEncoder in eval. torch.compile does nothing inside, nor later to a function first called inside.
"""

import math
import time

import torch
from torch.utils._python_dispatch import TorchDispatchMode


def emulates(dtype):
    """Whether this CPU multiplies matrices of this type more than ten times as slowly as those of fp32.

    Two products of 256 x 256, timed on one thread: beside other work two threads wait for each other, and fp32 would
    look slow. Seen without AVX-512: bf16 and fp16 53 to 70 times, fp64 at most 4. Ask outside of autocast and of
    WideProducts, where all types look alike.
    """
    best, threads = {}, torch.get_num_threads()
    torch.set_num_threads(1)
    for kind in (dtype, torch.float32):
        x = torch.ones(256, 256, dtype=kind, device="cpu")
        for _ in range(3):
            began = time.perf_counter()
            x @ x
            best[kind] = min(best.get(kind, math.inf), time.perf_counter() - began)
    torch.set_num_threads(threads)
    return best[dtype] > 10 * best[torch.float32]


ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
PRODUCTS = {
    getattr(torch.ops.aten, name)
    for name in (
        "mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_", "addbmm", "addbmm_", "_grouped_mm", "convolution",
        "convolution_backward", "_scaled_dot_product_flash_attention_for_cpu_backward",
    )
    if hasattr(torch.ops.aten, name)  # older versions of torch have no _grouped_mm
} | {ATTENTION}  # fmt: skip


def in_pieces(a, b, size=1024):
    """(m, k) · (k, n), cut along the longest of m, k and n: what is cut is in fp32 one piece at a time.

    From 32 MB on, a copy is in new memory each time, which takes the system longer than the copying. With GPT-2's head
    of 50,257 tokens and 256 rows, the product takes 136 ms instead of 277, and those of its gradients 131 instead of
    222 (dx) and 160 instead of 224 (dW).
    """
    m, k, n = *a.shape, b.size(1)
    if k >= max(m, n):
        c = a.new_zeros(m, n, dtype=torch.float32)
        for x, y in zip(a.split(size, 1), b.split(size)):
            c.addmm_(x.float(), y.float())
        return c.to(a.dtype)
    c = a.new_empty(m, n)
    if m >= n:
        y = b.float()
        for part, x in zip(c.split(size), a.split(size)):
            part.copy_(x.float().mm(y))
    else:
        x = a.float()
        for part, y in zip(c.split(size, 1), b.split(size, 1)):
            part.copy_(x.mm(y.float()))
    return c


class WideProducts(TorchDispatchMode):
    """Inside it, products of 16-bit matrices on a CPU are taken in 32 bits, and their results rounded to 16."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        op, kwargs = func.overloadpacket, kwargs or {}
        if op not in PRODUCTS or not args[0].is_cpu or args[0].dtype not in (torch.bfloat16, torch.float16):
            return func(*args, **kwargs)
        narrow, kwargs = args[0].dtype, dict(kwargs)
        tensors = [t for t in (*args, kwargs.get("out")) if torch.is_tensor(t)]
        # Operands of unequal types are an error, which torch shall report; but attention keeps something in fp32, and
        # _grouped_mm counts its rows in integers
        types = {t.dtype for t in tensors if t.is_floating_point() or "grouped" not in op.__name__}
        unequal = len(types) > 1 and "attention" not in op.__name__
        if unequal or any(t.layout != torch.strided for t in tensors):
            return func(*args, **kwargs)
        if func == torch.ops.aten.mm.default and args[0].dim() == args[1].dim() == 2:
            (m, k), (rows, n) = args[0].shape, args[1].shape
            if k == rows and max(m * k, k * n, m * n) >= 1 << 23:  # 32 MB in fp32
                return in_pieces(*args)
        into = args[0] if op.__name__.endswith("_") else kwargs.pop("out", None)
        widen = lambda t: t.float() if torch.is_tensor(t) and t.dtype == narrow else t  # noqa: E731
        out = op(*map(widen, args), **{name: widen(t) for name, t in kwargs.items()})
        if into is not None:
            return into.resize_(out.shape).copy_(out)
        if torch.is_tensor(out):
            return out.to(narrow)
        # The logarithms of attention's sums are in fp32 always; a convolution has None for what is not asked for
        kept = 1 if op is ATTENTION else None
        return tuple(t if t is None or i == kept else t.to(narrow) for i, t in enumerate(out))


if __name__ == "__main__":
    x, w = (torch.randn(512, 512).to(torch.bfloat16) for _ in range(2))

    def milliseconds():
        began = time.perf_counter()
        x @ w
        return 1e3 * (time.perf_counter() - began)

    print(f"{torch.backends.cpu.get_cpu_capability()}: torch emulates bf16 here: {emulates(torch.bfloat16)}")
    plain, exact = min(milliseconds() for _ in range(3)), x.double() @ w.double()
    with WideProducts():
        wide, y = min(milliseconds() for _ in range(3)), x @ w
    print(f"512 x 512 in bf16: {plain:.2f} ms, inside WideProducts {wide:.2f}")
    print(f"{(y == exact.to(x.dtype)).double().mean():.2%} of them are the exact product, rounded")
