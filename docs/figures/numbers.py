# SPDX-License-Identifier: MIT
"""Figures of the page on number formats."""

import torch

from figures import new
from nanopeft import adamw, quant
from nanopeft.trainer import bases, files

NARROW = {
    "fp16": torch.float16, "bf16": torch.bfloat16, "fp8 e4m3fn": torch.float8_e4m3fn, "fp8 e5m2": torch.float8_e5m2,
}  # fmt: skip


def _numbers(dtype):
    """All positive finite numbers of a format, from their bit patterns."""
    x = quant.value(torch.arange(2 ** (8 * dtype.itemsize - 1)), dtype)
    return x[(x > 0) & x.isfinite()]


def _gradients():
    """|dθ| of the embedded GPT's weights and |dz| of its logits, of one batch, in fp32."""
    torch.manual_seed(0)  # windows are drawn at random
    data = files.load("reference", bases.load_tokenizer("nano"), 128)[0]
    model = bases.load_base("nano", torch.float32)
    ids, labels = data.sample(4, 0, 0)
    z = model(ids).logits[:, :-1].reshape(-1, model.config.vocab_size)
    z.retain_grad()
    torch.nn.functional.cross_entropy(z, labels[:, 1:].reshape(-1), ignore_index=-100).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()]).abs(), z.grad.flatten().abs()


def _lost(g):
    """The share of the numbers in g, zeros aside, that fp16 rounds to 0."""
    g = g[g > 0]
    return (quant.value(quant.round_to_bits(g, torch.float16), torch.float16) == 0).double().mean().item()


def numbers_near_one():
    """Every number of four formats between 7/8 and 5/4."""
    figure, axes = new(height=2.2)
    for i, dtype in enumerate(NARROW.values()):
        x = _numbers(dtype)
        x = x[(x >= 0.875) & (x <= 1.25)]
        axes.vlines(x, -i - 0.35, -i + 0.35, lw=min(2.0, 130 / len(x)), color=f"C{i}")
    axes.set(xlim=(0.87, 1.255), xticks=[0.875, 1, 1.125, 1.25], yticks=[0, -1, -2, -3], yticklabels=NARROW)
    axes.set_xticklabels(["7/8", "1", "9/8", "5/4"])
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    return figure


def numbers_range():
    """The powers of two that each format reaches, subnormal ones pale, above the gradients of the embedded GPT."""
    figure, axes = new(height=4.2)
    axes.remove()
    top, below = figure.subplots(2, 1, sharex=True, height_ratios=(1, 1.2))
    for i, dtype in enumerate(NARROW.values()):
        x, normal = _numbers(dtype).log2(), torch.tensor(torch.finfo(dtype).tiny).double().log2()
        top.plot([x[0], normal], [-i, -i], color=f"C{i}", lw=8, alpha=0.35, solid_capstyle="butt")
        top.plot([normal, x[-1]], [-i, -i], color=f"C{i}", lw=8, solid_capstyle="butt")
        if x[-1] > 20:  # it goes on at both sides
            top.plot(-45, -i, "<", color=f"C{i}", markersize=14, clip_on=False)
            top.plot(20, -i, ">", color=f"C{i}", markersize=14, clip_on=False)
    top.set(yticks=[0, -1, -2, -3], yticklabels=NARROW, ylim=(-3.6, 0.6))
    top.tick_params(axis="y", pad=12)
    bins = torch.linspace(-45, 20, 131)[:-1] + 0.25
    for name, g, color in zip(("dθ", "dz"), _gradients(), ("C4", "C5")):
        for scale, label, line in ((1, name, "-"), (2**16, f"2¹⁶ {name}", ":")):
            share = torch.histc((g * scale).clamp(min=2.0**-60).log2(), bins=130, min=-45, max=20) / len(g)
            below.plot(bins, 100 * share, line, color=color, drawstyle="steps-mid", label=label)
            if scale == 1:
                below.fill_between(bins, 100 * share, step="mid", color=color, alpha=0.3, lw=0)
    for axis in (top, below):
        axis.axvline(-25, color="C0", lw=1, ls="--")  # half of fp16's smallest number: below it all is 0
        axis.axvline(16, color="C0", lw=1, ls="--")
        axis.spines[["top", "right"]].set_visible(False)
        axis.patch.set_alpha(0)
    ticks = [-40, -25, -14, 0, 16]
    below.set(xlim=(-45, 20), xticks=ticks, xticklabels=[f"$2^{{{t}}}$" for t in ticks], ylabel="%", ylim=(0, 13))
    below.legend(frameon=False, loc="upper center", ncols=2)
    return figure


def numbers_master_copy():
    """θ = 0.1 after steps of 1e-4: bf16 alone, bf16 with AdamW's fp32 copy, and the copy."""
    figure, axes = new(height=3)
    bare, alone, kept, master = torch.tensor([0.1], dtype=torch.bfloat16), [], [], []
    p = torch.nn.Parameter(bare.clone())
    optimizer = adamw.AdamW([p], lr=1e-4, weight_decay=0)
    for _ in range(100):
        alone.append(bare.item()), kept.append(p.item())
        bare -= 1e-4
        p.grad = torch.ones_like(p)
        optimizer.step()
        master.append(optimizer.state[p]["master"].item())
    axes.plot(range(1, 101), master, color="#222222", lw=1.3, zorder=3, label="θ₃₂  fp32")
    axes.plot(kept, color="C0", lw=2, drawstyle="steps-post", label="θ ← θ₃₂  bf16")
    axes.plot(alone, color="C3", lw=2, label="θ  bf16")
    axes.set(xlabel="t", ylabel="θ")
    axes.legend(frameon=False)
    return figure
