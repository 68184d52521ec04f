# SPDX-License-Identifier: MIT
"""Which rank is enough, and should all layers have the same?

    python experiments/ranks.py         about an hour on two cores; the same command goes on after a stop
"""

import json

import run
from matplotlib.figure import Figure

from nanopeft.trainer import bases, tasks

RANKS, ROWS = (1, 4, 16, 64, 256), (100, 300, 873)  # rows of 128 tokens; 873 are all of the language reference
EQUAL = {"r = 8 everywhere": ""} | {  # 196,608 trained numbers each, at the end
    "MLP 11, attention 3": "--ranks mlp.*=11,attn.*=3",
    "MLP 5, attention 13": "--ranks mlp.*=5,attn.*=13",
    "upper half 12, lower 4": "--ranks h.[345].*=12,h.[012].*=4",
    "upper half 4, lower 12": "--ranks h.[345].*=4,h.[012].*=12",
} | {f"AdaLoRA, 12 to 8, lr {rate:g}": f"--method adalora --lr {rate:g}" for rate in (0.005, 0.015, 0.05)}


def save_texts(name, texts, n=1 << 60):
    """A file with the first n tokens of some texts."""
    encoding, path, lines = bases.load_tokenizer("nano"), run.OUT / name, []
    for ids in map(encoding.encode_ordinary, texts):
        lines += [json.dumps({"text": encoding.decode(ids[:n])})] * (n > 0)
        n -= len(ids) + 1  # and end-of-text
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines), "utf-8")
    return path.relative_to(run.ROOT)  # where train.py is called


def tables(found):
    rows = [[f"{n} rows", *(run.shown(found[f"r = {r}, {n} rows"]) for r in RANKS)] for n in ROWS]
    equal = run.settings_table({name: found[name] for name in EQUAL})
    return run.table(["loss", *(f"r = {r}" for r in RANKS)], rows) + "\n\n" + equal


def draw(found):
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for n in ROWS:
        run.curve(left, RANKS, [found[f"r = {r}, {n} rows"] for r in RANKS], label=f"{n} rows")
    left.set(xscale="log", xticks=RANKS, xticklabels=RANKS, xlabel="rank")
    run.dots(right, {name: found[name] for name in EQUAL})
    return figure


if __name__ == "__main__":
    train, valid = tasks.reference()
    settings, valid = dict(EQUAL), f"--valid {save_texts('valid.jsonl', valid)} --length 128"
    for n in ROWS:
        data = save_texts(f"{n}.jsonl", train, 128 * n)
        settings |= {f"r = {r}, {n} rows": f"--data {data} {valid} --rank {r}" for r in RANKS}
    found = run.run("ranks", settings, "--precision bf16 --steps 150")
    print(tables(found))
    run.save(draw(found), "ranks")
