# SPDX-License-Identifier: MIT
"""Figures of the page on LoRA's family."""

import re

import torch

from figures import new, train
from nanopeft import adalora, dora, lora
from nanopeft.trainer import bases, files

STEPS, START, TARGET = 60, 8, 4  # of AdaLoRA's run


def _turned(W, changed):
    """Of each row: by what part its length changed, and by how many degrees it turned."""
    length, direction = W.norm(dim=1), torch.cosine_similarity(W.double(), changed.double())
    return (changed.norm(dim=1) / length - 1).abs(), direction.clamp(max=1).arccos().rad2deg()


def dora_lengths_and_directions():
    """How much each row of one layer changed in length, against how much in direction."""
    figure, panels = new(7, 2.6, columns=3)
    figure.facts = {}
    name = "transformer.h.3.mlp.c_fc"
    base = bases.load_base("nano", torch.float32)
    W = base.get_submodule(name).weight.detach().clone()
    train(base, base.parameters(), lr=1e-3, rows=2)
    found = {"full": base.get_submodule(name).weight.detach()}
    for method, add in (("LoRA", lora.add_lora), ("DoRA", dora.add_dora)):
        model = add(bases.load_base("nano", torch.float32), r=4, alpha=8)
        train(model, lora.lora_parameters(model).values(), rows=2)
        found[method] = W + lora.lora_layers(model)[name].delta().detach()
    for axes, (method, changed) in zip(panels, found.items()):
        length, turned = _turned(W, changed)
        figure.facts[method] = torch.corrcoef(torch.stack((length, turned)))[0, 1].item()
        axes.plot(turned, 100 * length, ".", markersize=2)
        axes.set(title=method, xlabel="°", ylabel="%")
    return figure


def adalora_ranks():
    """The ranks that a budget leaves to each layer, after a short run."""
    model = adalora.add_adalora(bases.load_base("nano", torch.float32), r=START, alpha=4 * START)
    optimizer = torch.optim.AdamW(lora.lora_parameters(model).values(), lr=5e-3, weight_decay=0)
    adalora.RankBudget(model, optimizer, STEPS, target_r=TARGET)
    data = files.load("reference", bases.load_tokenizer("nano"), 128)[0]
    for step in range(STEPS):
        ids, labels = data.sample(2, 2 * step, 0)
        (model(ids, labels=labels).loss + adalora.orthogonality(model)).backward()
        optimizer.step()
        optimizer.zero_grad()
    ranks = adalora.ranks(model)
    kinds = list(dict.fromkeys(re.sub(r".*h\.\d+\.", "", name) for name in ranks))
    table = torch.tensor(list(ranks.values())).view(-1, len(kinds)).t()
    figure, axes = new(6, 2.6)
    figure.facts = {"least": min(ranks.values()), "most": max(ranks.values())}
    axes.imshow(table, cmap="Blues", vmin=0, vmax=1.5 * START, aspect="auto")
    for i, row in enumerate(table.tolist()):
        for j, n in enumerate(row):
            axes.text(j, i, n, ha="center", va="center")
    axes.set(xticks=range(table.shape[1]), yticks=range(len(kinds)), yticklabels=kinds)
    return figure
