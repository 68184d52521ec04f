# SPDX-License-Identifier: MIT
"""Figures of the page on tensor parallelism."""

from figures import new
from nanopeft import memory, zero


def tensor_traffic():
    """What a rank sends in a step of llama-7b on 8 ranks in 16 bits, against the tokens of the step."""
    figure, axes = new()
    s, ranks = memory.sizes_of(memory.MODELS["llama-7b"]), 8
    tokens = [2**i for i in range(10, 21)]
    numbers = {
        "tensor_parallel": [(4 * s.L + 2) * n * s.d * 2 * (ranks - 1) / ranks for n in tokens],
        "zero, stage=3": [sum(zero.zero_traffic(s.Ψ, ranks, 3).values()) for _ in tokens],
        "zero, stage=2": [sum(zero.zero_traffic(s.Ψ, ranks, 2).values()) for _ in tokens],
        "pipeline": [2 * n * s.d for n in tokens],
    }
    for name, sent in numbers.items():
        axes.plot(tokens, [2 * n / 1e9 for n in sent], label=name)
    axes.set(xlabel="n", ylabel="GB", yscale="log")
    axes.set_xscale("log", base=2)
    axes.legend(frameon=False)
    return figure
