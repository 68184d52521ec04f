# SPDX-License-Identifier: MIT
"""Does LoRA suffer more from large batches? 1,600 rows in batches of 4, 16 and 64, each at its best learning rate.

    python experiments/batch_size.py        some 35 minutes on two cores; the same command goes on after a stop
"""

import run
from matplotlib.figure import Figure

BATCHES, ROWS = (4, 16, 64), 1600
RATES = {"full": (1e-4, 3e-4, 1e-3), "lora": (1e-3, 3e-3, 1e-2)}  # times √(batch / 4), as is usual for Adam
SETTINGS = {
    f"{method}, batch {batch}, lr {rate:g} x {(batch / 4) ** 0.5:g}":
        f"--method {method} --batch {batch} --steps {ROWS // batch} --eval-every {ROWS // batch // 5} "
        f"--lr {rate * (batch / 4) ** 0.5:g}"
    for method in RATES for batch in BATCHES for rate in RATES[method]
}  # fmt: skip


def best(found, method, batch):
    """(learning rate, values) of the setting whose mean loss is lowest."""
    fitting = [name for name in found if name.startswith(f"{method}, batch {batch},")]
    name = min(fitting, key=lambda name: run.mean(found[name]["loss_after"]))
    return name.rpartition("lr ")[2], found[name]


def tables(found):
    cells = {method: [best(found, method, batch) for batch in BATCHES] for method in RATES}
    rows = [[method, *(f"{run.shown(values)}, lr {rate}" for rate, values in row)] for method, row in cells.items()]
    return run.table(["best loss", *(f"batch {batch}" for batch in BATCHES)], rows)


def draw(found):
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for method in RATES:
        run.curve(axes, BATCHES, [best(found, method, batch)[1] for batch in BATCHES], label=method)
    axes.set(xscale="log", xticks=BATCHES, xticklabels=BATCHES, xlabel="batch size")
    return figure


if __name__ == "__main__":
    found = run.run("batch_size", SETTINGS, "--precision bf16")
    print(tables(found))
    run.save(draw(found), "batch_size")
