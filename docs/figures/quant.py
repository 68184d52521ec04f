# SPDX-License-Identifier: MIT
"""Figures of the page on quantization."""

import torch

from figures import new
from nanopeft import lora, quant
from nanopeft.trainer import bases


def nf4_codes():
    """Left: NF4's codes as quantiles under the normal density. Right: how often blocks of 64 use each of them."""
    figure, (left, right) = new(8.5, 3.4, columns=2)
    edge = torch.special.ndtri(torch.tensor(0.9677083)).item()
    density = torch.distributions.Normal(0, 1).log_prob
    codes = torch.tensor(quant.NF4) * edge
    z = torch.linspace(-3, 3, 601)
    left.plot(z, density(z).exp(), color="C0")
    for i, (low, high) in enumerate(zip(codes[:-1], codes[1:])):  # equal areas on either side of 0
        part = torch.linspace(low, high, 50)
        left.fill_between(part, density(part).exp(), alpha=(0.45, 0.2)[i % 2], color="C0", linewidth=0)
    left.vlines(codes, 0, density(codes).exp(), color="C1", linewidth=1)
    left.vlines(0, 0, density(torch.tensor(0.0)).exp(), color="C3", linewidth=2)
    for q, z in enumerate(codes.tolist()):
        left.text(z, -0.008 - 0.026 * (q % 2), str(q), ha="center", va="top", color="C3" if q == 7 else "C1")
    left.set(xlabel="x / σ", ylabel="φ(x / σ)", xlim=(-2.6, 2.6), ylim=(-0.065, 0.42))
    packed, _ = quant.quantize_nf4(torch.randn(1 << 20))
    share = torch.stack((packed >> 4, packed & 15)).flatten().bincount(minlength=16) / (1 << 20)
    right.bar(range(16), share, color=["C3" if q == 7 else "C1" for q in range(16)])
    right.axhline(1 / 16, color="C0", linestyle="--", label="1/16")
    right.set(xlabel="q", ylabel="#q / n", xticks=range(0, 16, 2))
    right.legend()
    return figure


def _errors(x, block_size):
    """{levels: RMS error relative to σ} of x cut into blocks."""
    even = torch.arange(-7, 8) / 7
    blocks = quant.to_groups(x, block_size)
    absmax = blocks.abs().amax(1, keepdim=True)
    packed, scale = quant.quantize_nf4(x, block_size)
    double = quant.dequantize_scales(*quant.quantize_scales(scale))
    back = {
        "−7 … 7": even[quant.nearest(blocks / absmax, even)] * absmax,
        "NF4": quant.dequantize_nf4(packed, scale, x.shape, block_size=block_size),
        "NF4, double": quant.dequantize_nf4(packed, double, x.shape, block_size=block_size),
        "int8": quant.dequantize_int8(*quant.quantize_int8(x, block_size), block_size),
    }
    return {name: (found.flatten() - x).square().mean().sqrt() / x.std() for name, found in back.items()}


def quant_error():
    """Left: error by block size, of normal numbers and of the bundled GPT's weights. Right: error by bits."""
    figure, (left, right) = new(8.5, 3.8, columns=2)
    base = bases.load_base("nano", torch.float32)
    weights = torch.cat([layer.weight.detach().flatten() for layer in lora.find_targets(base, "all-linear").values()])
    sizes = [2**i for i in range(2, 13)]
    numbers = {"N(0, 1)": torch.randn(1 << 19), "nano": weights[: 1 << 19]}
    found = {name: [_errors(x, size) for size in sizes] for name, x in numbers.items()}
    for color, levels in zip(("C0", "C1", "C2"), ("−7 … 7", "NF4", "int8")):
        for name, style in (("N(0, 1)", "-"), ("nano", "--")):
            errors = [error[levels] for error in found[name]]
            left.plot(sizes, errors, style, color=color, label=f"{levels}, {name}", marker=".")
    for color, levels, label, code, scale in (
        ("C1", "NF4", "NF4, absmax", 4, 32), ("C3", "NF4, double", "NF4, q, scale2, mean", 4, 8 + 32 / 256),
        ("C2", "int8", "int8, scale", 8, 32),
    ):  # fmt: skip
        bits = [code + scale / size for size in sizes]
        errors = [error[levels] for error in found["N(0, 1)"]]
        right.plot(bits, errors, color=color, marker=".", label=label)
        right.plot(bits[4], errors[4], "o", color=color, markersize=8)  # blocks of 64
    left.set(xlabel="block_size", ylabel="RMS(x̂ − x) / σ", xscale="log", yscale="log", xticks=sizes[::2])
    left.set_xticks(sizes[::2], [str(size) for size in sizes[::2]])
    left.minorticks_off()
    right.set(xlabel="8 · nbytes / n", yscale="log", xlim=(3.8, 10.2))
    for axes in (left, right):
        axes.set_yticks([0.005, 0.01, 0.02, 0.05, 0.1, 0.2], ["0.005", "0.01", "0.02", "0.05", "0.1", "0.2"])
        axes.legend()
    return figure
