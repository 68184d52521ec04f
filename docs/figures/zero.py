# SPDX-License-Identifier: MIT
"""Figures of the page on data parallelism and ZeRO."""

from figures import new
from nanopeft import zero

COLORS = {"parameters": "#4c8dc4", "gradients": "#e3a23c", "optimizer": "#5aa469"}


def zero_bytes():
    """What a device keeps: the parts of 7B parameters on 8 devices by stage, and bytes a parameter by devices."""
    figure, (bars, lines) = new(columns=2)
    n = 7 * 10**9
    for stage in range(4):
        kept, bottom = zero.zero_bytes(n, 8, stage), 0
        for part, color in COLORS.items():
            bars.bar(stage, kept[part] / 1e9, bottom=bottom, color=color, label=part if stage == 0 else None)
            bottom += kept[part] / 1e9
        bars.text(stage, bottom + 1, f"{bottom:g}", ha="center")
    bars.set(xlabel="stage", ylabel="GB", xticks=range(4), title="Ψ = 7·10⁹, N = 8")
    bars.legend(frameon=False)
    devices = [2**i for i in range(11)]
    for stage, offload in ((0, None), (1, None), (2, None), (3, None), (2, "cpu")):
        found = [zero.zero_bytes(2**20, world, stage, offload=offload) for world in devices]
        kept = [(sum(each.values()) - each["offloaded"]) / 2**20 for each in found]
        lines.plot(devices, kept, "--" if offload else "-", label=f"{stage}, {offload}" if offload else f"{stage}")
    lines.set(xlabel="N", ylabel="bytes / Ψ", xscale="log", ylim=(0, 17), yticks=range(0, 17, 2))
    lines.set_xscale("log", base=2)
    lines.set_xticks([1, 4, 16, 64, 256, 1024], labels=["1", "4", "16", "64", "256", "1024"])
    lines.legend(title="stage", frameon=False, loc="upper right", bbox_to_anchor=(1, 0.92))
    return figure
