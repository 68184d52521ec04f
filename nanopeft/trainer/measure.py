# SPDX-License-Identifier: MIT
"""What nanopeft/memory.py predicts, counted from live tensors: states, activations, the peak, and messages sent."""

import os
import sys
import weakref
from collections import Counter
from contextlib import contextmanager

import torch
import torch.distributed as dist

# ------------------------------------------------------------------------------------------------------------- states


def storages(tensors):
    """{address: bytes} of the distinct storages behind tensors: a view or a tied weight counts once."""
    found = (t.untyped_storage() for t in tensors if torch.is_tensor(t))
    return {storage.data_ptr(): storage.nbytes() for storage in found if storage.nbytes()}


def optimizer_tensors(optimizer):
    return [t for state in optimizer.state.values() for t in state.values()]


def measured_states(model, optimizer):
    """Bytes of parameters (with buffers), gradients and optimizer states. Call it between backward and zero_grad."""
    return {
        "parameters": sum(storages([*model.parameters(), *model.buffers()]).values()),
        "gradients": sum(storages([p.grad for p in model.parameters()]).values()),
        "optimizer": sum(storages(optimizer_tensors(optimizer)).values()),
    }


def kept_by(engine):
    """The same for this rank of a zero.ZeRO, with padding and what is offloaded. Call it between backward and step."""
    model, flats = engine.model, engine.flat_params
    own = storages([*model.parameters(), *model.buffers(), *(flat.shard for flat in flats)])
    states = storages([*optimizer_tensors(engine.optimizer), *(flat.master for flat in engine.trained)])
    return {
        "parameters": sum(own.values()),
        "gradients": sum(storages([*(p.grad for p in model.parameters()), *(flat.grad for flat in flats)]).values()),
        "optimizer": sum(size for at, size in states.items() if at not in own),  # an fp32 parameter is its own master
    }


# --------------------------------------------------------------------------------------------------- activations, peak


@contextmanager
def saved_bytes(stored):
    """`with saved_bytes([*model.parameters(), *model.buffers()]) as count: loss = ...`, then count() before backward.

    Counts the tensors that autograd saved inside and still holds, without those in `stored`.
    """
    alive = weakref.WeakSet()  # a tensor leaves it when autograd lets go of it

    def pack(tensor):
        saved = tensor.detach()
        alive.add(saved)
        return saved

    def count():
        own = storages(stored)
        return sum(size for at, size in storages(alive).items() if at not in own)

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        yield count


@contextmanager
def quiet():
    """Sends file descriptor 2 to /dev/null: torch's profiler writes lines to it from C++."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "wb") as nothing:
        os.dup2(nothing.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


@contextmanager
def peak_bytes(stored, device):
    """`with peak_bytes(all tensors that exist before) as count: one step`, then count(): the most bytes in use."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield lambda: torch.cuda.max_memory_allocated(device)
        return
    now = peak = sum(storages(stored).values())
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
    with quiet():
        profiler.start()
    try:
        yield lambda: peak
    finally:
        with quiet():
            profiler.stop()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()  # negative where memory is freed
        peak = max(peak, now)


# ------------------------------------------------------------------------------------------------------------- messages


@contextmanager
def sent_elements():
    """`with sent_elements() as sent: one step`: {collective: elements that this rank sends}; single numbers aside."""
    sent, world = Counter(), dist.get_world_size()
    # (collective, elements sent for one of the last tensor argument). With gloo, zero.py makes a reduce-scatter
    # of an all-to-all, and an all-gather of messages to each other rank
    share = {
        "all_reduce": ("all_reduce", 2 * (world - 1) / world),
        "all_to_all_single": ("reduce_scatter", (world - 1) / world),
        "reduce_scatter_tensor": ("reduce_scatter", (world - 1) / world),
        "reduce_scatter_single": ("reduce_scatter", (world - 1) / world),
        "all_gather_into_tensor": ("all_gather", world - 1),  # its argument is one rank's shard
        "all_gather_single": ("all_gather", world - 1),
        "isend": ("all_gather", 1),
    }
    originals = {name: getattr(dist, name) for name in share if hasattr(dist, name)}  # torch 2.13 renamed some
    for function in originals:

        def counted(*arguments, function=function, **options):
            n = [x for x in arguments if torch.is_tensor(x)][-1].numel()
            name, part = share[function]
            sent[name] += n * part if n > 1 else 0
            return originals[function](*arguments, **options)

        setattr(dist, function, counted)
    try:
        yield sent
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)
