# SPDX-License-Identifier: MIT
"""Figures of the page on recomputation."""

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from figures import new
from nanopeft import lora, recompute
from nanopeft.trainer import bases


class _Live(TorchDispatchMode):
    """After each operation: (FLOPs so far, bytes alive of what was made inside, weights' gradients aside)."""

    def __init__(self, parameters):
        super().__init__()
        self.parameters, self.alive, self.flops, self.points = list(parameters), {}, 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        if func._overloadpacket in flop_registry:
            self.flops += flop_registry[func._overloadpacket](*args, **kwargs or {}, out_val=out)
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for t in [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]:
            if (storage := t.untyped_storage())._cdata not in given:  # a view is no new memory
                self.alive[StorageWeakRef(storage)] = storage.nbytes()
        self.alive = {of: size for of, size in self.alive.items() if not of.expired()}
        grads = {p.grad.untyped_storage()._cdata for p in self.parameters if p.grad is not None}
        self.points.append((self.flops, sum(size for of, size in self.alive.items() if of.cdata not in grads)))
        return out


def _step(method, every, rows=4, length=128):
    """The points of a step of the bundled GPT."""
    torch.manual_seed(0)
    model = bases.load_base("nano", torch.float32)
    if method == "lora":
        lora.add_lora(model, r=8, alpha=16)
    recompute.recompute(model.transformer.h, every)
    ids = torch.randint(3072, (rows, length))
    with _Live(p for p in model.parameters() if p.requires_grad) as live:
        model(ids, labels=ids).loss.backward()
    return live.points


def recompute_live():
    """Live activations over a step, against the work done so far, with and without recomputation."""
    figure, axes = new(columns=2)
    for one, method in zip(axes, ("full", "lora")):
        for every, color in ((0, "#c46a4c"), (2, "#e3a23c"), (1, "#4c8dc4")):
            flops, sizes = zip(*_step(method, every))
            one.plot([n / 1e9 for n in flops], [n / 2**20 for n in sizes], color=color, lw=1.2, label=f"every={every}")
        one.set(xlabel="GFLOP", title=method, ylim=(0, 70), xlim=(0, None))
    axes[0].set_ylabel("MiB")
    axes[0].legend(frameon=False)
    return figure
