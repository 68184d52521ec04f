# SPDX-License-Identifier: MIT
"""Figures of the page on Adam and AdamW."""

import torch

from figures import new
from nanopeft.adamw import adamw_step

CURVATURES, NOISE, DECAY = torch.tensor([10.0, 0.1]), 3.0, 0.2


def _path(decay, decoupled, steps=7000, runs=32, lr=2e-3):
    """The mean of many runs on the loss Σ c (θ - 1)² / 2, whose gradients are noisy, and one of them."""
    generator = torch.Generator().manual_seed(0)
    theta, m, v = torch.full((runs, 2), 1.8), torch.zeros(runs, 2), torch.zeros(runs, 2)
    means, one = [theta.mean(0)], [theta[0]]
    for t in range(1, steps + 1):
        g = CURVATURES * (theta - 1 + NOISE * torch.randn(runs, 2, generator=generator))
        theta, m, v = adamw_step(theta, g, m, v, t, lr=lr, weight_decay=decay, decoupled=decoupled)
        if t % 20 == 0:
            means.append(theta.mean(0))
            one.append(theta[0])
    return torch.stack(means), torch.stack(one)


def adamw_paths():
    """AdamW, Adam + L2 and Adam without decay on a bowl that is a hundred times as steep in one direction."""
    figure, axes = new(height=4)
    x, y = torch.meshgrid(torch.linspace(0, 2, 80), torch.linspace(0, 2, 80), indexing="xy")
    loss = (CURVATURES[0] * (x - 1) ** 2 + CURVATURES[1] * (y - 1) ** 2) / 2
    levels = [0.005, 0.02, 0.05, 0.2, 0.8, 2]
    axes.contour(x, y, loss, levels=levels, colors="0.6", linewidths=0.6)
    c = CURVATURES
    kinds = {
        "Adam, λ = 0": (0.0, True, torch.ones(2)),
        f"Adam + L2, λ = {DECAY}": (DECAY, False, c / (c + DECAY)),
        f"AdamW, λ = {DECAY}": (DECAY, True, torch.full((2,), 1 / (1 + DECAY * NOISE))),
    }
    for color, (name, (decay, decoupled, end)) in zip(("C0", "C1", "C2"), kinds.items()):
        means, one = _path(decay, decoupled)
        axes.plot(*one.T, color=color, linewidth=0.4, alpha=0.6)
        on_top = {"zorder": 3, "linestyle": (0, (2, 1.5))} if decay == 0 else {}  # most of its path is AdamW's too
        axes.plot(*means.T, color=color, label=name, linewidth=2, **on_top)
        axes.plot(*end, color=color, marker="x", markersize=10, markeredgewidth=2)
    axes.plot(0, 0, color="0.4", marker="o", markersize=4, clip_on=False)
    axes.set(xlabel=f"θ₁   (c₁ = {c[0]:g})", ylabel=f"θ₂   (c₂ = {c[1]:g})", xlim=(0, 2), ylim=(0, 2))
    axes.set(xticks=[0, 0.5, 1, 1.5, 2], yticks=[0, 0.5, 1, 1.5, 2])
    axes.set_aspect("equal")
    axes.legend(loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False)
    return figure


def adamw_bias_correction(steps=3000):
    """How far a weight moves in step t, in units of lr, when its gradient is always the same."""
    figure, axes = new(height=3)
    for color, beta2 in (("C0", 0.999), ("C1", 0.95)):
        m = v = torch.zeros((), dtype=torch.float64)
        theta, g, corrected, bare = torch.zeros_like(m), torch.ones_like(m), [], []
        for t in range(1, steps + 1):
            before = theta
            theta, m, v = adamw_step(theta, g, m, v, t, lr=1, betas=(0.9, beta2), eps=0, weight_decay=0)
            corrected.append((before - theta).item())
            bare.append((m / v.sqrt()).item())
        axes.plot(range(1, steps + 1), bare, color=color, label=f"m / √v,  β₂ = {beta2}")
    axes.plot(range(1, steps + 1), corrected, color="C2", label="m̂ / √v̂")
    axes.set(xlabel="t", ylabel="|Δθ| / lr", xscale="log", ylim=(0, None))
    axes.legend(frameon=False)
    return figure
