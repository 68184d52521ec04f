# SPDX-License-Identifier: MIT
"""--method all: each method in a process of its own, and then one table and two pictures of what came out."""

import json
import signal
import subprocess
import sys
from pathlib import Path

from nanopeft.trainer import Failure, checkpoint, pictures
from nanopeft.trainer.methods import METHODS
from nanopeft.trainer.report import gigabytes


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

    results, failed = {}, []
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
            if code == 2 and not results:  # the flags are wrong
                sys.exit(code)
            if code not in (0, 2):  # memory ran out, say. 2: this base cannot have the method, as its line says
                failed.append(name)
            if code:
                continue
            results[name] = json.loads((out / name / "result.json").read_text("utf-8"))
    results.pop(f"adapter-{other}", None)

    if not results:
        raise Failure(f"none of {', '.join(failed)} came to its end")
    base = next(iter(results.values()))
    for r in results.values():  # counted from the untouched base: an untrained fusion, say, is another model already
        r["forgotten"] = None if r["known_loss_after"] is None else r["known_loss_after"] - base["known_loss_before"]
    quantity = "loss" if base["accuracy_after"] is None else "accuracy"
    checkpoint.write(out / "compare.json", json.dumps(results, indent=2).encode())
    drawn, task = {"compare.png": pictures.plot_comparison}, pictures.drawable(", ".join(args.data))
    if any(r["forgotten"] is not None for r in results.values()):
        drawn["forgetting.png"] = pictures.plot_forgetting
    for name, draw in drawn.items():
        checkpoint.write(out / name, lambda path: draw(path, results, quantity, task))  # noqa: B023 (called at once)
    print(f"\n{table(results, quantity)}\n\n{', '.join(f'{out}/{name}' for name in ('compare.json', *drawn))}")
    if failed:
        raise Failure(f"{', '.join(failed)} failed, and are missing: the same command with --resume tries them again")


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
    untouched = show.format(next(iter(results.values()))[f"{quantity}_before"])
    rows = [["method", "trained", "share", "stored", "on disk", f"{quantity} before", "after", "forgets",
             "tokens/s", "memory"]]  # fmt: skip
    rows.append(["untouched", "0", "0 %", "0", "0", untouched, untouched, "", "", ""])
    for name, r in results.items():
        counts = [f"{r['trained_parameters']:,}", f"{r['trained_parameters'] / r['total_parameters']:.2%}"]
        stored = [f"{r['stored_parameters']:,}", f"{r['stored_bytes'] / 1e6:.2f} MB"]
        quality = [show.format(r[f"{quantity}_{when}"]) for when in ("before", "after")]
        cost = [f"{r['tokens_per_second']:,.0f}", gigabytes(r["peak_memory_bytes"])]
        forgets = "" if r["forgotten"] is None else f"{r['forgotten']:.3f}"
        rows.append([name, *counts, *stored, *quality, forgets, *cost])
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows.insert(1, ["-" * w for w in widths])
    return "\n".join("| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths)) + " |" for row in rows)
