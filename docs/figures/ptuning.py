# SPDX-License-Identifier: MIT
"""Figures of the page on P-tuning."""

import torch

from figures import new
from nanopeft import prompt, ptuning
from nanopeft.trainer import bases


def ptuning_ties():
    """How far the virtual token P[i] moves when the trained vector of place j does: ‖ΔP[i]‖ / max ‖ΔP‖, at the start
    of prompt tuning and of P-tuning with either encoder."""
    figure, axes = new(width=8.5, height=3.2, columns=3)
    base, n = bases.load_base("nano", torch.float32), 12
    found = {"prompt": prompt.PromptTuning(base, n)}
    for encoder in ("mlp", "lstm"):
        found[f'encoder="{encoder}"'] = ptuning.PTuning(base, n, encoder=encoder)
    for ax, (name, model) in zip(axes, found.items(), strict=True):
        trained = model.prompt_embeddings if name == "prompt" else model.encoder.embedding.weight  # (n, d)
        moved = _moved(model, trained)
        places = range(1, n + 1)
        shown = ax.pcolormesh(places, places, moved.clamp(min=1e-3).log10(), vmin=-3, vmax=0, shading="nearest",
                              edgecolor="face")  # fmt: skip
        ax.set(title=name, xlabel="j", aspect="equal", xticks=places[::3], yticks=places[::3])
        ax.invert_yaxis()
    axes[0].set_ylabel("i")
    figure.colorbar(shown, ax=axes, label="log₁₀", ticks=[-3, -2, -1, 0])
    return figure


@torch.no_grad()
def _moved(model, trained):
    before, columns = model.virtual_tokens().clone(), []
    for j in range(len(trained)):
        step = torch.zeros_like(trained)
        step[j] = 0.1 * trained.std() * torch.randn(trained.size(1))
        trained += step
        columns.append((model.virtual_tokens() - before).norm(dim=1))  # (n,)
        trained -= step
    moved = torch.stack(columns, 1)  # (n, n): i down, j across
    return moved / moved.max()
