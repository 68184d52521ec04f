# SPDX-License-Identifier: MIT
"""Figures of the page on memory."""

from figures import new
from nanopeft import memory

MODEL = memory.MODELS["gpt-6b"]


def memory_parts():
    """Bytes by part of full training, LoRA and QLoRA of a 6B model, one row of 512 tokens in bf16."""
    figure, (left, right) = new(height=3, columns=2)
    names = {"θ": ["parameters"], "g": ["gradients"], "m": ["m"], "v": ["v"], "θ₃₂": ["master copy"],
             "x": ["activations"]}  # fmt: skip
    methods = ("full", "lora", "qlora")
    bars = []
    for method in methods:
        found = memory.predict(MODEL, method, "bf16", 1, 512)
        sizes = {part: memory.total(items) for part, items in found.items()}
        sizes |= {what: size for what, _, size in found["optimizer"]}
        bars.append([sum(sizes.get(part, 0) for part in parts) / 1e9 for parts in names.values()])
    for axes, shown in ((left, range(3)), (right, range(1, 3))):
        for at in shown:
            start = 0.0
            for k, (name, size) in enumerate(zip(names, bars[at])):
                axes.barh(methods[at], size, left=start, color=f"C{k}", label=name if at == shown[0] else None)
                start += size
            axes.annotate(f"{start:.1f}", (start, at - shown[0]), (5, 0), textcoords="offset points", va="center")
        axes.invert_yaxis()
        axes.set(xlabel="GB")
        axes.margins(x=0.2)
    left.legend(loc="lower right", ncols=2, frameon=False)
    return figure


def memory_batch():
    """The fullest moment of a step against the number of rows of 512 tokens."""
    figure, axes = new()
    rows = [1, 2, 4, 8, 16]
    for color, (method, recompute) in enumerate((m, k) for m in ("lora", "qlora") for k in (0, 1)):
        peaks = [memory.total(memory.predict(MODEL, method, "bf16", B, 512, 1, recompute)["peak"]) / 1e9 for B in rows]
        label = method + f", recompute={recompute}" * bool(recompute)
        axes.plot(rows, peaks, color=f"C{color // 2}", marker=".", linestyle=["-", "--"][recompute], label=label)
    axes.set(xlabel="B", ylabel="GB", ylim=(0, None), xticks=rows)
    axes.legend(frameon=False)
    return figure
