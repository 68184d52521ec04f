# SPDX-License-Identifier: MIT
"""Is LoRA's best learning rate ten times that of full fine-tuning, and does it depend on r?

    python experiments/learning_rate.py     50 minutes on two idle cores; the same command goes on after a stop
"""

import run
from matplotlib.figure import Figure

RATES = {"full": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2), "LoRA": (1e-3, 3e-3, 1e-2, 3e-2)}
CURVES = {  # s = α / r and s = α / √r, with the α that makes s = 2 at r = 8
    "full": "--method full",
    "LoRA r = 8": "--rank 8 --alpha 16",
    "LoRA r = 2, s = 8 by α / r": "--rank 2 --alpha 16",
    "LoRA r = 64, s = 0.25 by α / r": "--rank 64 --alpha 16",
    "LoRA r = 2, s = 4 by α / √r": "--rank 2 --alpha 8",
    "LoRA r = 64, s = 0.71 by α / √r": "--rank 64 --alpha 45.25",
}
SETTINGS = {
    f"{name}, lr {rate}": f"{flags} --lr {rate}" for name, flags in CURVES.items() for rate in RATES[name.split()[0]]
}


def tables(found):
    rates = sorted({rate for some in RATES.values() for rate in some})

    def of(key, title):
        settings = {name: [f"{name}, lr {rate}" for rate in rates] for name in CURVES}
        rows = [[name, *(run.shown(found[one], key) if one in found else "" for one in row)]
                for name, row in settings.items()]  # fmt: skip
        return run.table([title, *(f"lr {rate}" for rate in rates)], rows)

    return of("loss_after", "loss") + "\n\n" + of("forgotten", "forgotten")


def draw(found):
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    for name in CURVES:
        rates = RATES[name.split()[0]]
        run.curve(axes, rates, [found[f"{name}, lr {rate}"] for rate in rates], label=name)
    axes.set(xscale="log", xlabel="learning rate", ylim=(3.2, 3.9))  # what has diverged is far above
    return figure


if __name__ == "__main__":
    found = run.run("learning_rate", SETTINGS, "--precision bf16 --steps 100")
    print(tables(found))
    run.save(draw(found), "learning_rate")
