# SPDX-License-Identifier: MIT
"""Figures of the page on adapters and fusion."""

import torch

from figures import new
from nanopeft import adapter
from nanopeft.trainer import bases, files


def _data(task):
    return files.load(task, bases.load_tokenizer("nano"), 128)[0]


def _train(model, data, lr, steps=15, rows=2):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0)
    fused = adapter.adapter_config(model)["peft_type"] == "ADAPTER_FUSION"
    for step in range(steps):
        ids, labels = data.sample(rows, step * rows, 0)
        (model(ids, labels=labels).loss + (adapter.fusion_penalty(model) if fused else 0)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def _weights(model, data):
    """p of the first adapter in each block, the mean over tokens without padding."""
    means, ids = [], data.sample(2, 0, 0)[0]
    is_text = ids != ids[0, 0]  # rows begin with <eot>, and are padded with it

    def keep(fusion, arguments, _):
        (u,) = arguments
        z = torch.stack([one(u) for one in fusion.adapters], -2)
        p = torch.einsum("...d, ...nd -> ...n", fusion.query(u), fusion.key(z)).softmax(-1)
        means.append(p[is_text][:, 0].mean().item())

    hooks = [layer.adapter.register_forward_hook(keep) for layer in adapter.adapter_layers(model).values()]
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    return means


def adapter_start():
    """The loss before the first step, by the deviation of Up's start; dashed, the base's."""
    figure, axes = new(6, 3)
    ids, labels = _data("reference").sample(2, 0, 0)
    model, sigmas = bases.load_base("nano", torch.float32), [10 ** (k / 3) for k in range(-9, 1)]
    with torch.no_grad():
        axes.axhline(model(ids, labels=labels).loss.item(), color="gray", linestyle="--")
        for placement in ("houlsby", "pfeiffer"):
            losses = []
            for sigma in sigmas:
                for layer in adapter.adapter_layers(adapter.add_adapter(model, placement=placement)).values():
                    torch.nn.init.normal_(layer.adapter.up.weight, std=sigma)
                losses.append(model(ids, labels=labels).loss.item())
                adapter.remove_adapter(model)
            axes.plot(sigmas, losses, marker=".", label=placement)
    axes.set(xscale="log", xlabel="σ", ylabel="loss")
    axes.legend()
    return figure


def fusion_weights():
    """p of reference's adapter beside modules' in each block: at the start, and with a fusion trained on either."""
    figure, axes = new(7, 3)
    figure.facts = {}
    data = {task: _data(task) for task in ("reference", "modules")}
    adapters = []
    for task in data:
        model = adapter.add_adapter(bases.load_base("nano", torch.float32), placement="pfeiffer")
        _train(model, data[task], lr=5e-3)
        adapters.append((adapter.adapter_config(model), adapter.adapter_state_dict(model)))
    for i, task in enumerate(data):
        model = adapter.add_fusion(bases.load_base("nano", torch.float32), adapters)
        if i == 0:
            axes.plot(_weights(model, data[task]), ".k", zorder=3, label="t = 0")
        found = _weights(_train(model, data[task], lr=3e-4), data[task])
        figure.facts[task] = sum((p if i == 0 else 1 - p) > 0.9 for p in found)  # blocks that chose its own adapter
        axes.bar([n + 0.32 * i - 0.16 for n in range(len(found))], found, width=0.3, label=task)
    axes.set(ylabel="p₁", ylim=(0, 1.02))
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure
