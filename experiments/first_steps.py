# SPDX-License-Identifier: MIT
"""Which s keeps the start of training the same for every r: α / r or α / √r?

    python experiments/first_steps.py       eight minutes: LoRA's first 20 steps on one batch, by SGD and by Adam
"""

import run
import torch
from matplotlib.figure import Figure

from nanopeft import lora
from nanopeft.trainer import bases, files

RANKS, STEPS = (1, 4, 16, 64), 20
OPTIMIZERS = {  # rates so small that the loss falls in proportion to them
    "SGD": lambda params: torch.optim.SGD(params, lr=1e-3),
    "Adam": lambda params: torch.optim.AdamW(params, lr=1e-5, weight_decay=0.0),
}
KINDS = [f"{name}, s = {s}" for name in OPTIMIZERS for s in ("α / r", "α / √r")]


def fall(key, r, seed):
    """By how much 20 steps on one batch lower its loss."""
    torch.manual_seed(seed)
    model, encoding = bases.load_base("nano", torch.float32), bases.load_tokenizer("nano")
    ids, labels = files.load("reference", encoding, 128)[0].sample(8, 0, seed)
    lora.add_lora(model, r=r, alpha=16, rslora="√" in key)
    optimizer, losses = OPTIMIZERS[key.split(",")[0]](lora.lora_parameters(model).values()), []
    for _ in range(STEPS + 1):
        loss = model(ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses[0] - losses[-1]


def tables(found):
    """As multiples of what it is at r = 1."""
    falls = {key: [run.mean(found[f"{key}, r = {r}"]["fall"])[0] for r in RANKS] for key in KINDS}
    rows = [[key, *(f"{fall / of[0]:.2f}" for fall in of)] for key, of in falls.items()]
    return run.table(["fall of the loss", *(f"r = {r}" for r in RANKS)], rows)


def draw(found):
    figure = Figure(figsize=(9, 4), layout="constrained")
    for axes, name in zip(figure.subplots(1, 2), OPTIMIZERS):
        for key in [key for key in KINDS if name in key]:
            run.curve(axes, RANKS, [found[f"{key}, r = {r}"] for r in RANKS], "fall", label=key)
        axes.set(xscale="log", yscale="log", xticks=RANKS, xticklabels=RANKS, xlabel="rank")
    return figure


if __name__ == "__main__":
    found = {f"{key}, r = {r}": {"fall": [fall(key, r, seed) for seed in range(3)]} for key in KINDS for r in RANKS}
    run.store("first_steps", found)
    print(tables(found))
    run.save(draw(found), "first_steps")
