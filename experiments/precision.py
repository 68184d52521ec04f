# SPDX-License-Identifier: MIT
"""QLoRA's numbers: what is lost when the base is kept in fewer bits, and when the update is merged into it?

    python experiments/precision.py     45 minutes on two cores beside other work; the same command goes on after a stop
"""

import json
import shutil

import run
from matplotlib.figure import Figure

SETTINGS = {"fp32": "--precision fp32", "bf16": "--precision bf16", "int8": "--method qlora --quant int8",
            "NF4": "--method qlora --quant nf4"}  # fmt: skip
PLACES = {"loss_fp32": "merged into fp32", "loss_bf16": "merged into bf16", "loss_int8": "... fp32, and that to int8",
          "loss_NF4": "... fp32, and that to NF4", "loss_original": "merged into the fp32 base"}  # fmt: skip


def evaluate(base, folder, flags=""):
    return run.call([*flags.split(), "--base", base, "--steps", 0, "--remember", "library"], folder)["loss_after"]


def merged(folder):
    """{"loss_" and where the update is: loss}, all computed in fp32."""
    (alone := folder / "adapter").mkdir(exist_ok=True)  # for other tools, which do not know of base_quantization
    shutil.copy(folder / "adapter_model.safetensors", alone)
    found, config = {}, json.loads((folder / "adapter_config.json").read_text("utf-8"))
    config.pop("base_quantization", None)
    (alone / "adapter_config.json").write_text(json.dumps(config))
    for place, adapter in {"fp32": folder, "bf16": folder, "original": alone}.items():
        run.call(["--merge", adapter, "--precision", place.replace("original", "fp32")], folder / place, "config.json")
        found[place] = evaluate(folder / place, folder / f"{place} evaluated")
    found |= {to: evaluate(folder / "fp32", folder / f"{to} evaluated", SETTINGS[to]) for to in ("int8", "NF4")}
    return {f"loss_{place}": loss for place, loss in found.items()}


def tables(found):
    def more(values, key, than):  # of each seed's run alone
        return "{:+.4f} ± {:.4f}".format(*run.mean([x - y for x, y in zip(values[key], than["loss_after"])]))

    rows = [["loss with the adapter beside its base", *map(run.shown, found.values())],
            ["more than over fp32", *(more(v, "loss_after", found["fp32"]) for v in found.values())]]  # fmt: skip
    rows += [[label, *(more(v, key, v) for v in found.values())] for key, label in PLACES.items()]
    return run.table(["", *(f"trained over {name}" for name in found)], rows)


def draw(found):
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for key, label in {"loss_after": "beside its base", **PLACES}.items():
        run.curve(axes, range(len(found)), found.values(), key, label=label, linestyle="none")
    axes.set(xticks=range(len(found)), xticklabels=found, xlabel="the base in training")
    return figure


if __name__ == "__main__":
    found = run.run("precision", SETTINGS, "--steps 150", after=merged)
    print(tables(found))
    run.save(draw(found), "precision")
