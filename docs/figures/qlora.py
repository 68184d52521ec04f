# SPDX-License-Identifier: MIT
"""Figures of the page on QLoRA."""

import torch

from figures import new, train
from nanopeft import lora, qlora, quant
from nanopeft.trainer import bases


def qlora_merge():
    """What arrives of an update that is added to Ŵ and rounded again, by its size; the trained size is marked."""
    figure, (left, right) = new(8.5, 3.4, columns=2)
    name = "transformer.h.3.mlp.c_fc"
    model = qlora.add_qlora(bases.load_base("nano", torch.float32), r=8, alpha=16)
    train(model, lora.lora_parameters(model).values(), rows=2)
    layer = lora.lora_layers(model)[name]
    W, trained = layer.base_layer.dequantize(torch.float32), layer.delta().detach()
    rounded = {
        "NF4": lambda w: quant.dequantize_nf4(*quant.quantize_nf4(w), w.shape),
        "int8": lambda w: quant.dequantize_int8(*quant.quantize_int8(w)),
        "bf16": lambda w: w.bfloat16().float(),
    }
    ratios = torch.logspace(-4, 0, 17)
    for kind, to in rounded.items():
        base = to(W)
        errors, left_over = [], []
        for ratio in ratios:
            update = trained * ratio * base.norm() / trained.norm()
            change = to(base + update) - base
            errors.append((change - update).norm() / update.norm())
            left_over.append((change * update).sum() / update.square().sum())
        left.plot(ratios, errors, marker=".", label=kind)
        right.plot(ratios, left_over, marker=".", label=kind)
    for axes in (left, right):
        axes.axvline(trained.norm() / W.norm(), color="0.5", linestyle=":")
        axes.set(xlabel="‖ΔW‖ / ‖Ŵ‖", xscale="log")
        axes.legend()
    left.axhline(1, color="0.5", linewidth=0.8)
    left.set(ylabel="‖ΔŴ − ΔW‖ / ‖ΔW‖", yscale="log")
    right.set(ylabel="⟨ΔŴ, ΔW⟩ / ‖ΔW‖²", ylim=(-0.05, 1.2))
    return figure
