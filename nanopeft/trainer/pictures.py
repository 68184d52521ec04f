# SPDX-License-Identifier: MIT
"""All pictures that a run leaves: its losses, AdaLoRA's ranks, a pipeline's timeline, and those of --method all."""

import re
from itertools import accumulate


def new_figure(width, height):
    from matplotlib.figure import Figure  # takes a second, so not before there is something to draw

    return Figure(figsize=(width, height), layout="constrained")


def smooth(losses):
    """Of each step the mean of its loss and those just before it."""
    window, sums = max(1, len(losses) // 30), [0, *accumulate(losses)]
    starts = [max(0, i - window) for i in range(len(losses))]
    return [(sums[i + 1] - sums[start]) / (i + 1 - start) for i, start in enumerate(starts)]


def drawable(name):
    """A name as matplotlib can show it on one line, by a font that is there, or escaped. $ would begin a formula."""
    from matplotlib import rcParams
    from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font

    name = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name)
    known, usual = get_font(findfont(FontProperties())).get_charmap(), rcParams["font.family"][:1]
    if missing := {ord(c) for c in name} - {*known}:
        for font in fontManager.ttflist:
            if missing <= {*get_font(font.fname).get_charmap()}:
                rcParams["font.family"], missing = [*usual, font.name], set()
                break
    return "".join(ascii(c)[1:-1] if ord(c) in missing else c for c in name).replace("$", r"\$")


def plot_losses(path, progress, rates, title):
    """The loss of each step and of each evaluation, and the learning rate."""
    figure = new_figure(7, 4)
    axes = figure.subplots()
    steps = range(1, progress.step + 1)
    axes.plot(steps, progress.losses, color="tab:blue", alpha=0.25, linewidth=0.8)
    axes.plot(steps, smooth(progress.losses), color="tab:blue", label="training")
    label = f"validation: {progress.curve[0][1]:.2f} → {min(loss for _, loss in progress.curve):.2f}"
    axes.plot(*zip(*progress.curve), "o-", color="tab:orange", markersize=3, label=label)
    axes.axvline(progress.best_step, color="tab:orange", linestyle=":", label=f"best: step {progress.best_step}")
    axes.set(xlabel="step", ylabel="loss, nats per token", title=title)
    axes.grid(alpha=0.3)
    right = axes.twinx()
    right.plot(steps, rates, color="gray", linewidth=0.8, linestyle="--", label="learning rate")
    right.set(ylabel="learning rate", ylim=(0, None))
    axes.legend(*(a + b for a, b in zip(axes.get_legend_handles_labels(), right.get_legend_handles_labels())))
    figure.savefig(path, dpi=120, format="png")


def plot_ranks(path, ranks):
    """AdaLoRA's ranks, {layer: rank}: a row for each kind of layer, a column for each block."""
    number = re.compile(r"\.?\b(\d+)\b")  # the first in a name is its block's
    places = {name: (number.sub("", name, count=1), int((number.findall(name) or [0])[0])) for name in ranks}
    kinds = [*dict.fromkeys(kind for kind, _ in places.values())]
    columns = 1 + max(block for _, block in places.values())
    grid = [[float("nan")] * columns for _ in kinds]
    figure = new_figure(3 + 0.4 * columns, 0.6 + 0.4 * len(kinds))
    axes = figure.subplots()
    for name, (kind, block) in places.items():
        y = kinds.index(kind)
        grid[y][block] = ranks[name]
        axes.text(block, y, ranks[name], ha="center", va="center")
    axes.imshow(grid, cmap="Blues", vmin=0, vmax=1.5 * max(*ranks.values(), 1))
    axes.set(xticks=range(columns), yticks=range(len(kinds)), yticklabels=kinds, xlabel="block")
    figure.savefig(path, format="svg")


def plot_timeline(path, timeline):
    """What each stage of a pipeline did when: forward blue, backward green, each with the number of its micro-batch."""
    figure = new_figure(12, 0.8 + 0.4 * len(timeline))
    axes = figure.subplots()
    began = min(start for stage in timeline for _, _, start, _ in stage)
    for s, stage in enumerate(timeline):
        for what, i, start, end in stage:
            shade = "#9ecae1" if what == "F" else "#a1d99b"
            axes.barh(s, end - start, left=start - began, color=shade, edgecolor="white")
            axes.text((start + end) / 2 - began, s, i, ha="center", va="center", fontsize="small")
    axes.set(xlabel="seconds", yticks=range(len(timeline)), yticklabels=[f"stage {s}" for s in range(len(timeline))])
    axes.invert_yaxis()
    figure.savefig(path, format="svg")


def plot_comparison(path, results, quantity, task):
    """Left: what each method reaches, against how much it trains. Right: its training loss."""
    figure = new_figure(12, 4.5)
    left, right = figure.subplots(1, 2)
    mark(left, {name: (r["trained_parameters"], r[f"{quantity}_after"]) for name, r in results.items()})
    for i, (name, r) in enumerate(results.items()):
        right.plot(range(1, len(r["losses"]) + 1), smooth(r["losses"]), color=color(i), label=name)
    untouched = next(iter(results.values()))[f"{quantity}_before"]
    left.axhline(untouched, color="gray", linestyle="--", label="untouched base")
    unit = "nats per token of validation data" if quantity == "loss" else "share of validation examples"
    left.set(xscale="log", xlabel="trained parameters", ylabel=f"{quantity}, {unit}", title=f"{task}: quality and size")
    left.margins(0.12)
    right.set(xlabel="step", ylabel="training loss, nats per token", title=f"{task}: training")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small", ncols=1 if axes is left else 2)
    figure.savefig(path, dpi=120, format="png")


def plot_forgetting(path, results, quantity, task):
    """What each method has learned, against what it has forgotten."""
    figure = new_figure(6.5, 4.5)
    axes = figure.subplots()
    before = next(iter(results.values()))[f"{quantity}_before"]
    sign = -1 if quantity == "loss" else 1
    points = {name: (sign * (r[f"{quantity}_after"] - before), r["forgotten"]) for name, r in results.items()}
    mark(axes, {name: point for name, point in points.items() if None not in point})
    unit = "nats per token less, of validation data" if quantity == "loss" else "more of the validation examples right"
    axes.set(xlabel=f"learned: {unit}", ylabel="forgotten: nats per token more, of what it knew", title=task)
    axes.margins(0.12)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120, format="png")


def color(i):
    """One of twenty: matplotlib's usual ten are too few."""
    from matplotlib import colormaps

    return colormaps["tab20"](2 * i % 20 + i // 10)  # the strong ones first, then their light forms


def mark(axes, points):
    """A dot for each {name: (x, y)}. The names stand at four heights in turn, since neighbours would overlap."""
    from_the_left = sorted(points, key=points.get)
    for i, (name, xy) in enumerate(points.items()):
        axes.scatter(*xy, color=color(i), zorder=3)
        beside = (0, (7, -15, 19, -27)[from_the_left.index(name) % 4])
        axes.annotate(name, xy, textcoords="offset points", xytext=beside, ha="center", color=color(i))
