# SPDX-License-Identifier: MIT
"""Figures of the page on prompt tuning."""

import torch

from figures import new, train
from nanopeft import prompt
from nanopeft.trainer import bases


def prompt_paths():
    """Left: words (grey) and the ways of 20 virtual tokens in the plane of the table's first two principal components.
    Right: their mean distance from the nearest word, and that of a word from its nearest (dashed)."""
    figure, (left, right) = new(width=8.5, columns=2)
    base = bases.load_base("nano", torch.float32)
    E = base.get_input_embeddings().weight.detach()  # (V, d)
    plane = torch.linalg.svd(E - E.mean(0), full_matrices=False).Vh[:2].T  # (d, 2)
    left.plot(*((E - E.mean(0)) @ plane).T, ".", color="0.75", markersize=2, zorder=0)
    for rate, color in ((0.003, "C0"), (0.1, "C1")):
        torch.manual_seed(0)
        model, path = prompt.PromptTuning(base, 20), []
        train(_watched(model, path), [model.prompt_embeddings], lr=rate, rows=2)
        path = torch.stack(path)  # (steps, n, d)
        where = (path - E.mean(0)) @ plane  # (steps, n, 2)
        for i in range(where.size(1)):
            left.plot(*where[:, i].T, color=color, linewidth=0.8)
        left.plot(*where[-1].T, "o", color=color, markersize=3, label=f"lr = {rate}")
        right.plot(range(1, len(path)), torch.cdist(path[1:], E).amin(2).mean(1), color=color)
    between = torch.cdist(E, E).fill_diagonal_(torch.inf).amin(1).mean()
    right.axhline(between, color="0.5", linestyle="--")
    left.set(xlabel="PC 1", ylabel="PC 2")
    right.set(xlabel="step", ylabel="min ‖P − E‖", yscale="log", xticks=range(1, len(path), 3))
    left.legend()
    return figure


def _watched(model, path):
    def call(ids, labels):
        path.append(model.prompt_embeddings.detach().clone())
        return model(ids, labels=labels)

    return call
