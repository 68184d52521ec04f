# SPDX-License-Identifier: MIT
"""Which s keeps the start of training the same for every r: α / r or α / √r?

    python experiments/first_steps.py       three minutes: LoRA's first 20 steps on one batch, by SGD and by Adam
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


def fall(r, rslora, make_optimizer, seed):
    """By how much 20 steps on one batch lower its loss."""
    torch.manual_seed(seed)
    model, encoding = bases.load_base("nano", torch.float32), bases.load_tokenizer("nano")
    ids, labels = files.load("reference", encoding, 128)[0].sample(8, 0, seed)
    lora.add_lora(model, r=r, alpha=16, rslora=rslora)
    optimizer, losses = make_optimizer(lora.lora_parameters(model).values()), []
    for _ in range(STEPS + 1):
        loss = model(ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses[0] - losses[-1]


def draw(found):
    figure = Figure(figsize=(9, 4), layout="constrained")
    for axes, name in zip(figure.subplots(1, 2), OPTIMIZERS):
        for s in ("α / r", "α / √r"):
            run.curve(axes, RANKS, [found[f"{name}, s = {s}, r = {r}"] for r in RANKS], "fall", label=f"s = {s}")
        axes.set(xscale="log", yscale="log", xticks=RANKS, xticklabels=RANKS, xlabel="rank", title=name)
    run.save(figure, "first_steps")


if __name__ == "__main__":
    found = {}
    for name, optimizer in OPTIMIZERS.items():
        for s in ("α / r", "α / √r"):
            for r in RANKS:
                found[f"{name}, s = {s}, r = {r}"] = {"fall": [fall(r, "√" in s, optimizer, seed) for seed in range(3)]}
    run.store("first_steps", found)
    draw(found)
