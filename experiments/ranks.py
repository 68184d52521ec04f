# SPDX-License-Identifier: MIT
"""Which rank is enough, and should all layers have the same?

    python experiments/ranks.py         some 50 minutes on two cores; the same command goes on after a stop
"""

import json

import run
from matplotlib.figure import Figure

from nanopeft.trainer import bases, tasks

RANKS, ROWS = (1, 4, 16, 64, 256), (100, 300, 873)  # rows of 128 tokens; 873 are all of the language reference
EQUAL = {  # 196,608 trained numbers each
    "r = 8 everywhere": "",
    "MLP 11, attention 3": "--ranks mlp.*=11,attn.*=3",
    "MLP 5, attention 13": "--ranks mlp.*=5,attn.*=13",
    "upper half 12, lower 4": "--ranks h.[345].*=12,h.[012].*=4",
    "upper half 4, lower 12": "--ranks h.[345].*=4,h.[012].*=12",
    "AdaLoRA, 12 to 8": "--method adalora",
}


def save_texts(name, texts, n=1 << 60):
    """A file with the first n tokens of some texts."""
    encoding, lines = bases.load_tokenizer("nano"), []
    for ids in map(encoding.encode_ordinary, texts):
        if n > 0:
            lines.append(json.dumps({"text": encoding.decode(ids[:n])}))
        n -= len(ids) + 1  # and end-of-text
    run.OUT.mkdir(parents=True, exist_ok=True)
    (run.OUT / name).write_text("\n".join(lines))
    return (run.OUT / name).relative_to(run.ROOT)  # as train.py is called there


def draw(found):
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for n in ROWS:
        run.curve(left, RANKS, [found[f"r = {r}, {n} rows"] for r in RANKS], label=f"{n} rows")
    left.set(xscale="log", xticks=RANKS, xticklabels=RANKS, xlabel="rank")
    run.dots(right, {name: found[name] for name in EQUAL})
    run.save(figure, "ranks")


if __name__ == "__main__":
    train, valid = tasks.reference()
    settings, valid = dict(EQUAL), save_texts("valid.jsonl", valid)
    for n in ROWS:
        data = f"--data {save_texts(f'{n}.jsonl', train, 128 * n)} --valid {valid} --length 128"
        settings |= {f"r = {r}, {n} rows": f"{data} --rank {r}" for r in RANKS}
    found = run.run("ranks", settings, "--precision bf16 --steps 150")
    print(run.table(found))
    draw(found)
