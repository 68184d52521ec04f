# SPDX-License-Identifier: MIT
"""Virtual tokens: how many, from which start, where, at which rate? Which package does a function come from?

    python experiments/prompts.py       some 50 minutes on two cores; the same command goes on after a stop
"""

import run
from matplotlib.figure import Figure

SETTINGS = {f"prompt, {n} tokens": f"--method prompt --tokens {n}" for n in (5, 20, 50)}
SETTINGS |= {f"prompt, from {init}": f"--method prompt --init {init}" for init in ("random", "labels")}
SETTINGS |= {f"prompt, lr {rate:g}": f"--method prompt --lr {rate:g}" for rate in (0.01, 0.03, 0.3)}
SETTINGS |= {f"P-tuning, {encoder}": f"--method ptuning --encoder {encoder}" for encoder in ("lstm", "mlp")}
SETTINGS |= {f"P-tuning, lr {rate:g}": f"--method ptuning --encoder lstm --lr {rate:g}" for rate in (1e-3, 1e-2)}
SETTINGS |= {f"P-tuning, mlp, lr {rate:g}": f"--method ptuning --encoder mlp --lr {rate:g}" for rate in (1e-2, 3e-2)}
P = "[P]" * 20
PLACES = {"behind": "{source}" + P, "around": f"{P[:30]}{{source}}{P[:30]}"}
SETTINGS |= {f"P-tuning, {place}": f"--method ptuning --encoder lstm --template {t}" for place, t in PLACES.items()}
SETTINGS |= {f"prefix, {n} tokens": f"--method prefix --tokens {n}" for n in (5, 20, 50)}


def tables(found):
    return run.settings_table(found)


def draw(found):
    figure = Figure(figsize=(7, 6), layout="constrained")
    run.dots(figure.subplots(), found)
    return figure


if __name__ == "__main__":
    common = "--data modules --precision bf16 --batch 8 --steps 100 --eval-every 50 --valid-tokens 65536"
    found = run.run("prompts", SETTINGS, common)
    # Untrained virtual tokens change the base already: what is forgotten counts from the base without them
    base = run.call(f"{common} --method lora --steps 0".split(), run.OUT / "prompts" / "untouched")
    for values in found.values():
        values["known_loss_before"] = [base["known_loss_before"]] * 3
    run.store("prompts", found)
    print(tables(found))
    run.save(draw(found), "prompts")
