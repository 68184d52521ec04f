# SPDX-License-Identifier: MIT
"""Figures of the page on pipeline parallelism."""

from itertools import accumulate

from figures import new
from nanopeft import pipeline

COLORS = {"F": "#8fbbe0", "B": "#9bd19b"}


def pipeline_timelines():
    """Both schedules of 4 stages and 8 micro-batches, a backward twice as long as a forward."""
    p, m = 4, 8
    figure, axes = new(height=3.6)
    for row, schedule in ((0, "GPipe"), (p + 1.2, "1F1B")):
        for stage, events in enumerate(pipeline.simulate(m, schedule.lower(), [1] * p, [2] * p)):
            for what, i, start, end in events:
                axes.barh(row + stage, end - start, 0.9, start, color=COLORS[what], edgecolor="#555555", lw=0.4)
                axes.text((start + end) / 2, row + stage, f"{i}", ha="center", va="center")
        axes.text(0.3, row - 0.65, schedule, va="bottom")
    rows = [*range(p), *(p + 1.2 + s for s in range(p))]
    axes.set(yticks=rows, yticklabels=[*range(p)] * 2, ylabel="stage", xlim=(0, None), ylim=(2 * p + 0.8, -1.5))
    axes.set_xlabel("t")
    return figure


def pipeline_bubble():
    """The bubble against the number of micro-batches, by formula and simulated (dots); micro-batches alive by stage."""
    figure, (left, right) = new(height=3, columns=2)
    counts = range(1, 65)
    for p in (2, 4, 8):
        (line,) = left.plot(counts, [pipeline.bubble(p, m) for m in counts], label=f"p = {p}")
        found = [(m, pipeline.waiting(pipeline.simulate(m, "1f1b", [1] * p, [2] * p))) for m in (p, 2 * p, 4 * p)]
        left.plot(*zip(*found), "o", color=line.get_color())
    left.set(xlabel="m", ylabel="(p - 1) / (m + p - 1)", ylim=(0, 1))
    left.legend(frameon=False)
    p, m = 4, 8
    for schedule, marker in (("GPipe", "s"), ("1F1B", "o")):
        orders = [pipeline.actions(s, p, m, schedule.lower()) for s in range(p)]
        alive = [max(accumulate(1 if what == "F" else -1 for what, _ in order)) for order in orders]
        right.plot(range(p), alive, marker=marker, label=schedule)
    right.set(xlabel="stage", ylabel="max(F - B)", title=f"p = {p}, m = {m}", xticks=range(p), ylim=(0, m + 1))
    right.legend(frameon=False)
    return figure
