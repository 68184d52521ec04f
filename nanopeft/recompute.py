# SPDX-License-Identifier: MIT
"""Activation recomputation (gradient checkpointing): forward keeps only each block's input, backward runs it again.

Backward needs the numbers that forward has computed on the way, the activations. They grow with depth, batch and
length, and soon take more memory than the model. Recomputation forgets them. It keeps the input of each block, and when
backward arrives at a block, it runs the block's forward once more from there.

    forward     x0 ── block 1 ── x1 ── block 2 ── x2 ── block 3 ── x3 ── loss        kept: x0, x1, x2
    backward    x2 ── block 3 again, its activations ── dx2, and they are freed      one block's activations at a time
                x1 ── block 2 again, its activations ── dx1, and they are freed
                x0 ── block 1 again, its activations ── dx0, and they are freed

Memory. Let `a` be the bytes of one block's activations, and `c` those of its input. L blocks keep L · a; recomputed
    L · c + a                       every block: all inputs, and the activations of the block where backward is
    L/k · c + (L - L/k) · a         every k-th block (every=k > 1): the others keep their activations, and when one is
                                    computed again, those of the block after it have been freed
A block of GPT-2 has c = n·d·e and a = 16c (n tokens, width d, e bytes a number; counted in nanopeft/memory.py). 12
blocks of d = 256, fp32, 4 x 256 tokens: c is 1 MiB, a 16 MiB. 192 MiB become 28. The peaks below are higher: in
backward there are also gradients around the block, and in full training up to 36 MiB of the weights' gradients.

Why one block at a time, and not the √L segments of the paper? A segment is several blocks that are recomputed together.
With g segments the memory is g · c + (L/g) · a, least for g = √(L · a / c). The paper has layers with a = c, so g = √L.
A block has a = 16c, so g = √(16 L) = 13.9 for L = 12: more segments than blocks, so each block is one. For L = 48, two
blocks a segment would take 24c + 32c = 56c, and one block a segment takes 48c + 16c = 64c: little more, and simpler.

Time. Let forward take 1. In full training backward takes 2 (dx and dW); with forward a second time 3 become 4, + 1/3.
Over frozen weights backward takes 1 (dx alone); 2 become 3, + 1/2. The usual "one third" is only the first case. The
second forward may stop when it has the last tensor that backward needs. That is the input of the block's last linear
layer, or over frozen weights that of its GELU. So this layer, 4 of the 12 d² weights, is not repeated: + 2/9 in full
training, + 1/3 over frozen weights. It is repeated if backward needs more than that input: the mask of a dropout after
it, or the A x of a LoRA on it. So LoRA on all linear layers costs + 1/2 again.

    12 blocks, d = 256, fp32, 4 x 256 tokens     full             LoRA, all linear     LoRA, c_attn
                                                 FLOPs    peak    FLOPs    peak        FLOPs    peak     (over weights)
    no recomputation                             1        204     1        202         1        141 MiB
    every=2                                      1.11     114     1.25     112         1.17      82 MiB
    every=1                                      1.22      56     1.49      36         1.34      31 MiB

What must be the same in the second forward:
  * Random numbers. With another dropout mask the gradient would be wrong, without any error. So the random generator is
    set back for the second forward, and put afterwards to where it was.
  * Autocast. Backward runs outside of `with torch.autocast`, but the second forward has to be in 16 bits again.
  * A cache of keys and values, which forward extends. The second forward gets it as it was before the first.
Whatever else forward changes, a counter or the running mean of BatchNorm, is changed twice.

The trap with a frozen base. torch's checkpoint with use_reentrant=True makes each block one node in autograd's graph,
with the block's input as its only input. In LoRA the embeddings are frozen, so the first block's input requires no
gradient, its output requires none, and its adapters do not learn. If something outside of the blocks is trained, torch
only warns. The usual cure is model.enable_input_require_grads(): then the embeddings' output requires a gradient. Here
there is no trap. `Recompute` takes the trained parameters as inputs too. `run` leaves the graph as it is; so does
use_reentrant=False, which torch recommends and whose mechanism this is.

With other techniques. LoRA or adapters on all layers save hardly any activations (202 MiB above, and full 204).
Prefix-tuning hands its prefix over in a cache, see above; transformers' own gradient checkpointing drops it. ZeRO stage
3 gathers a block's weights once in backward, before the second forward, and keeps them for the gradients. The loss in
chunks of gpt.py is the same idea for logits. Offloading activations to the CPU is the alternative where the link is
fast.

When to use it: activations fill the memory (nanopeft/memory.py tells). Try smaller micro-batches first; they do not
help if one long row is too much. If the weights fill the memory, quantize or shard those.
Papers: Chen et al., arXiv 1604.06174, section 4. Korthikanti et al., arXiv 2205.05198, recompute attention alone, which
fused attention does as well. The whole family in one table: nanopeft/__init__.py.
"""

import copy
import functools
from contextlib import ExitStack, contextmanager

import torch
import torch.nn as nn


class Error(ValueError):
    """Wrong use of recomputation; the message says what would be right."""


class Recompute(torch.autograd.Function):
    """The idea on a whiteboard: y = f(x) without f's activations, as Recompute.apply(f, x, *trained parameters).

    Autograd gives gradients only to direct arguments. On a GPU or under autocast take `run`, which restores those too.
    """

    @staticmethod
    def forward(ctx, f, x, *params):
        ctx.f, ctx.random_state = f, torch.get_rng_state()
        ctx.save_for_backward(x, *params)
        return f(x)  # autograd makes no graph inside of a Function, so the activations are freed here

    @staticmethod
    def backward(ctx, dy):
        x, *params = ctx.saved_tensors
        inputs = [x.detach().requires_grad_(), *params]  # cut off from the graph that led to x
        with torch.random.fork_rng(), torch.enable_grad():
            torch.set_rng_state(ctx.random_state)
            y = ctx.f(inputs[0])  # the same forward, with a graph
        return None, *torch.autograd.grad(y, inputs, dy, allow_unused=True)


class Stop(Exception):
    """Ends the second forward as soon as all that backward needs is there."""


def run(forward, *args, **kwargs):
    """The same for any arguments and outputs, and without the last product.

    The graph is made as always, but a number takes the place of each tensor that autograd saves in it: 0, 1, 2, ...
    When backward asks for a number's tensor, forward runs again, and autograd saves the same tensors in the same order.
    """
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    given = [as_given(x) for x in args], {name: as_given(x) for name, x in kwargs.items()}
    tensors = [x for x in (*args, *kwargs.values()) if torch.is_tensor(x)]
    device, versions = tensors[0].device if tensors else torch.device("cpu"), [x._version for x in tensors]
    surroundings = [settings(kind) for kind in {"cpu", device.type}]
    shapes, saved = [], {}

    def save_number(tensor):
        shapes.append(tensor.shape)
        return len(shapes) - 1

    def save_tensor(tensor):  # the second graph itself is thrown away
        saved[len(saved)] = tensor.detach()
        if len(saved) == len(shapes):
            raise Stop

    def load(number):
        if number not in saved:  # backward has arrived at this block, or comes a second time
            if [x._version for x in tensors] != versions:
                raise Error("an input of the block was changed in place after it: forward cannot run again from it")
            saved.clear()
            with as_before(surroundings), torch.autograd.graph.saved_tensors_hooks(save_tensor, lambda _: None):
                try:
                    forward(*given[0], **given[1])
                except Stop:
                    pass
            if [t.shape for t in saved.values()] != shapes:
                raise Error("forward computed something else the second time: recompute no block that has a state")
        return saved.pop(number)  # freed as soon as backward has used it

    with torch.autograd.graph.saved_tensors_hooks(save_number, load):
        return forward(*args, **kwargs)


# ----------------------------------------------------------------------------------------------------------------- use


def recompute(blocks, every=1):
    """Every k-th block, the first one included, recomputes its activations in backward from now on; every=0: none does.

    blocks: model.transformer.h, model.model.layers, or any list of modules, with any arguments and outputs.
    Results and gradients stay the same to the bit, and so do the names in state_dict().
    """
    if type(every) is not int or every < 0:
        raise Error(f"every must be a whole number of at least 0, not {every!r}")
    for i, block in enumerate(blocks):
        block.__dict__.pop("forward", None)  # the class's own forward shows again
        if every and i % every == 0:
            block.forward = functools.partial(run, block.forward)  # hooks (ZeRO's, say) stay outside: they run once


# ------------------------------------------------------------------------------------------------------------ plumbing


def as_given(x):
    """An argument as it is before forward. A cache, GPT's or transformers', is extended by it, so a copy is kept."""
    if not hasattr(x, "get_seq_length"):
        return x
    cache = copy.copy(x)
    cache.layers = [copy.copy(layer) for layer in x.layers]  # keys and values themselves are not copied
    return cache


def settings(kind):
    """(kind of device, state of its random generator, autocast's dtype, whether it is on)."""
    return kind, generator(kind).get_rng_state(), torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)


def generator(kind):
    return torch if kind == "cpu" else torch.get_device_module(kind)


@contextmanager
def as_before(surroundings):
    """With a graph, and with random generators and autocast as settings() found them. Afterwards all is as now."""
    with torch.enable_grad(), ExitStack() as stack:
        for kind, state, dtype, on in surroundings:
            stack.callback(generator(kind).set_rng_state, generator(kind).get_rng_state())
            generator(kind).set_rng_state(state)
            stack.enter_context(torch.autocast(kind, dtype, on))
        yield


if __name__ == "__main__":
    from torch.utils.flop_counter import FlopCounterMode

    def block():
        return nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Dropout(0.1), nn.Linear(256, 64))

    torch.manual_seed(0)
    model, x, found = nn.Sequential(*(block() for _ in range(6))), torch.randn(32, 64), {}
    for every in (0, 1, 2):
        recompute(model, every)
        torch.manual_seed(1)  # the same dropout masks in each run
        model.zero_grad()
        with FlopCounterMode(display=False) as count:
            model(x).square().sum().backward()
        found[every] = count.get_total_flops(), [p.grad for p in model.parameters()]
        flops, same = found[every][0] / found[0][0], all(map(torch.equal, found[every][1], found[0][1]))
        print(f"every={every}: {flops:.2f} times the FLOPs; the gradients are the same bits: {same}")
