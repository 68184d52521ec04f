# SPDX-License-Identifier: MIT
"""Figures of the page on prefix-tuning."""

import torch

from figures import new, train
from nanopeft import prefix
from nanopeft.trainer import bases, files


def prefix_mass():
    """λ, the softmax mass on 20 virtual tokens, in each layer before (dashed) and after 20 steps: the mean over heads
    and queries, and each head (dots), from the model's own keys and values and from N(0, 1)."""
    figure, axes = new(width=8.5, height=3.2, columns=2)
    data = files.load("reference", bases.load_tokenizer("nano"), 128)[1]
    ids, _ = data.sample(4)
    for ax, init in zip(axes, ("vocabulary", "random"), strict=True):
        model = prefix.PrefixTuning(bases.load_base("nano", torch.float32), 20, init=init)
        for step, style in ((0, "--"), (20, "-")):
            if step:
                train(model, [model.prompt_embeddings], lr=0.1, rows=2, steps=step)
            mass = _mass(model, ids)  # (L, H)
            layers, color = torch.arange(len(mass)), f"C{step // 20}"
            ax.plot(layers, mass.mean(1), style, color=color, label=f"step = {step}")
            ax.plot(layers, mass, ".", color=color, alpha=0.5, markersize=4)
        ax.set(title=f'init="{init}"', xlabel="layer", ylim=(0, 1), xticks=layers)
    axes[0].set_ylabel("λ")
    axes[0].legend()
    return figure


@torch.no_grad()
def _mass(model, ids):
    """λ of each layer and head (L, H): the mean over rows and queries."""
    pairs, found = model.put_prefix_into(model.empty_cache(), len(ids)).layers, []

    def look(attn, inputs):
        x = inputs[0]
        q, K, V = (t.unflatten(-1, (attn.n_head, -1)).transpose(1, 2) for t in attn.c_attn(x).split(x.size(-1), -1))
        found.append(prefix.gated_attention(q, K, V, *pairs[attn.layer])[1].mean((0, 2, 3)))

    hooks = [block.attn.register_forward_pre_hook(look) for block in model.model.transformer.h]
    model(ids)
    for hook in hooks:
        hook.remove()
    return torch.stack(found)
