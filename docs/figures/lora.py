# SPDX-License-Identifier: MIT
"""Figures of the page on LoRA."""

import torch

from figures import new, train
from nanopeft import lora
from nanopeft.trainer import bases


def lora_singular_values():
    """Singular values of full fine-tuning's ΔW in one layer, relative to the largest, beside those of LoRA's."""
    figure, axes = new()
    name = "transformer.h.3.mlp.c_fc"
    base = bases.load_base("nano", torch.float32)
    before = base.get_submodule(name).weight.detach().clone()
    train(base, base.parameters(), lr=1e-3)
    S = torch.linalg.svdvals(base.get_submodule(name).weight.detach() - before)
    axes.plot(range(1, len(S) + 1), S / S[0], label="full")
    chance = torch.linalg.svdvals(torch.randn(before.shape, generator=torch.Generator().manual_seed(0)))
    figure.facts = {f"share of {k}": _share(S, k) for k in (8, 16, 64)} | {"chance of 16": _share(chance, 16)}
    for r in (4, 16):
        model = lora.add_lora(bases.load_base("nano", torch.float32), r=r, alpha=2 * r)
        train(model, lora.lora_parameters(model).values())
        S = torch.linalg.svdvals(lora.lora_layers(model)[name].delta().detach())[:r]
        axes.plot(range(1, r + 1), S / S[0], marker=".", label=f"LoRA, r = {r}")
    axes.set(xlabel="i", ylabel="σᵢ / σ₁", yscale="log", xscale="log", ylim=(1e-2, 1.2))
    axes.legend(frameon=False)
    return figure


def _share(S, k):
    """The first k singular values' share of the sum of all squares."""
    return (S[:k].square().sum() / S.square().sum()).item()
