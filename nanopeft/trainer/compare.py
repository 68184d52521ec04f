# SPDX-License-Identifier: MIT
"""--method all: each method in a process of its own, and then one table and two pictures of what came out."""

import json
import signal
import subprocess
import sys
from pathlib import Path

from nanopeft.trainer import Failure, checkpoint
from nanopeft.trainer.methods import METHODS
from nanopeft.trainer.report import drawable, gigabytes, smooth


def compare(args, given):
    """Runs each method in a process of its own, so that its peak of memory is its own."""
    out = Path(args.out)
    shared = {name: getattr(args, name) for name in sorted(given - {"method", "out"})}
    runs = {name: {"method": name} for name in METHODS if name != "fusion"}
    if args.base == "nano":
        runs["scratch"] = {"method": "full", "base": "scratch"}
    # A fusion is of adapters of several tasks: this one, and one more
    other = "reference" if args.data == ["modules"] else "modules"
    runs[f"adapter-{other}"] = {"method": "adapter", "data": [other], "valid": None, "accuracy": False}
    runs["fusion"] = {"method": "fusion", "adapters": [f"{out}/adapter", f"{out}/adapter-{other}"]}

    results = {}
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # to pass it on
    with checkpoint.claim(out):
        for name, flags in runs.items():
            print(f"\n{name}", flush=True)
            command = [sys.executable, sys.argv[0], *as_flags(shared | flags | {"out": f"{out}/{name}"})]
            child = subprocess.Popen(command, stdout=subprocess.DEVNULL)  # its report is in its result.json
            try:
                code = child.wait()
            except KeyboardInterrupt:
                if sys.platform != "win32":  # there Ctrl-C has reached it as well, and this would not let it save
                    child.terminate()  # it saves its state and ends
                sys.exit(child.wait() or 1)  # 0: it was at its last step
            if code < 0:  # the system's, if memory ran out
                raise Failure(f"{name} was ended by signal {-code}; the same command with --resume goes on")
            if code == 2 and results:  # this base cannot have the method, as its line says
                continue
            if code:
                sys.exit(code)
            results[name] = json.loads((out / name / "result.json").read_text("utf-8"))
    results.pop(f"adapter-{other}", None)

    quantity = "loss" if results["full"]["accuracy_after"] is None else "accuracy"
    checkpoint.write(out / "compare.json", json.dumps(results, indent=2).encode())
    task = drawable(", ".join(args.data))
    pictures = {"compare.png": plot_comparison}
    if any(forgotten(r, results) is not None for r in results.values()):
        pictures["forgetting.png"] = plot_forgetting
    for name, draw in pictures.items():
        checkpoint.write(out / name, lambda path, draw=draw: draw(path, results, quantity, task))
    print(f"\n{table(results, quantity)}\n\n{', '.join(f'{out}/{name}' for name in ('compare.json', *pictures))}")


def as_flags(settings):
    """{name: value} as a command line has it."""
    for name, value in settings.items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, list):
            yield from (flag, *value)
        elif value is True:
            yield flag
        elif value is not None and value is not False:  # 0 == False
            yield f"{flag}={value}"


def table(results, quantity):
    show = "{:.3f}" if quantity == "loss" else "{:.1%}"
    untouched = show.format(results["full"][f"{quantity}_before"])
    rows = [["method", "trained", "share", "stored", "on disk", f"{quantity} before", "after", "forgets",
             "tokens/s", "memory"]]  # fmt: skip
    rows.append(["untouched", "0", "0 %", "0", "0", untouched, untouched, "", "", ""])
    for name, r in results.items():
        counts = [f"{r['trained_parameters']:,}", f"{r['trained_parameters'] / r['total_parameters']:.2%}"]
        stored = [f"{r['stored_parameters']:,}", f"{r['stored_bytes'] / 1e6:.2f} MB"]
        quality = [show.format(r[f"{quantity}_{when}"]) for when in ("before", "after")]
        cost = [f"{r['tokens_per_second']:,.0f}", gigabytes(r["peak_memory_bytes"])]
        forgets = "" if forgotten(r, results) is None else f"{forgotten(r, results):.3f}"
        rows.append([name, *counts, *stored, *quality, forgets, *cost])
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows.insert(1, ["-" * w for w in widths])
    return "\n".join("| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths)) + " |" for row in rows)


def forgotten(result, results):
    """By how many nats a token the loss on what the base knew is above that of the untouched base."""
    after = result["known_loss_after"]  # and not above its own loss before: a fusion starts with untrained layers
    return None if after is None else after - results["full"]["known_loss_before"]


def plot_comparison(path, results, quantity, task):
    """Left: what each method reaches, against how much it trains. Right: its training loss."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    mark(left, {name: (r["trained_parameters"], r[f"{quantity}_after"]) for name, r in results.items()})
    for i, (name, r) in enumerate(results.items()):
        right.plot(range(1, len(r["losses"]) + 1), smooth(r["losses"]), color=color(i), label=name)
    left.axhline(results["full"][f"{quantity}_before"], color="gray", linestyle="--", label="untouched base")
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
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 4.5), layout="constrained")
    axes = figure.subplots()
    before, sign = results["full"][f"{quantity}_before"], -1 if quantity == "loss" else 1
    points = {name: (sign * (r[f"{quantity}_after"] - before), forgotten(r, results)) for name, r in results.items()}
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
