# SPDX-License-Identifier: MIT
"""ZeRO: data parallelism that shards what each rank would otherwise hold in full.

In data parallelism (DDP) each of N ranks has its share of the batch, and all parameters, gradients and optimizer state.
Gradients are summed over ranks and every rank makes the same update, so N - 1 of the N copies are redundant. ZeRO (Zero
Redundancy Optimizer) lets rank r keep only the r-th part, its shard; collectives bring the rest when it is needed.

Ψ is the number of parameters. Each takes 16 bytes: parameter 2 + gradient 2 + K = 12, the optimizer state: fp32 master
copy 4 + Adam's m 4 and v 4. (In an fp32 run: parameter 4, which is its own master, + gradient 4 + m 4 + v 4.)

    stage  shards             bytes on each rank   7B on 8   N → ∞   elements sent in a step, times (N - 1)/N
    0      nothing            2Ψ +  2Ψ + KΨ       112   GB    16Ψ    2Ψ  all-reduce gradients
    1      optimizer state    2Ψ +  2Ψ + KΨ/N      38.5  GB    4Ψ    2Ψ  reduce-scatter gradients, all-gather parameters
    2      and gradients      2Ψ + (2Ψ + KΨ)/N     26.25 GB    2Ψ    2Ψ  the same, the first in backward, in buckets
    3      and parameters    (2Ψ +  2Ψ + KΨ)/N     14    GB     0    3Ψ  all-gather parameters twice, reduce-scatter

The peak is higher by the activations, which stages 1 to 3 do not shard (ZeRO-R, in the same paper, can). In stages 2
and 3 up to three buckets come on top: the parameters' gradients, their flat copy, and the received part. In stage 3 it
is also three gathered units: the root, the block that computes, and the next.

Stages 1 and 2 send no more than data parallelism. An all-reduce is a reduce-scatter (each rank gets the sum of its
shard: Ψ) and an all-gather (Ψ). ZeRO updates in between, and gathers parameters, not gradients. Stage 3 frees them
after forward, so it gathers twice. 7B on 8 in 16 bits: a rank sends 24.5 GB in a step (1.0 s at 25 GB/s), in stage 3
36.75 GB (1.5 s). While one block computes, the next one is gathered. To compute takes 2 FLOPs per parameter and token,
to gather 2 bytes per parameter. So gathering costs no time above (FLOP/s) / (byte/s) tokens: 400e12 / 25e9 = 16,000.

A unit is one block. Unit 0, the root, is what is in no block: embeddings, last norm, head. A unit's parameters, end to
end, make flat parameters of at most BUCKET elements (or one larger parameter). Each is cut into N shards, wherever the
cuts fall. A bucket of 1M elements takes 0.08 ms at 25 GB/s, longer than a message takes to start, and little memory.

    [ ln.weight | attn.weight           | mlp.weight              | 0 ]    full (N · shard,), padded with zeros
    [     rank 0     |     rank 1      |     rank 2     |    rank 3   ]    each rank: shard, grad, master, m, v (shard,)

Timeline of blocks 1 to 3 and the root, which computes first (embedding) and last (head). F forward, B backward, U
update, AG all-gather of a unit's parameters, one block ahead, RS reduce-scatter of gradients, full: units not sharded:

    stage 2   compute  F0    F1    F2    F3    F0    B0    B3    B2    B1    B0          U
              network                                            RS3   RS2   RS1   RS0      AG0 AG1 AG2 AG3
    stage 3   compute        F0    F1    F2    F3    F0          B0    B3    B2    B1    B0          U
              network  AG0   AG1   AG2   AG3               AG0   AG3   AG2   AG1
              network                                                        RS3   RS2   RS1   RS0
              full     01    01    012   023   03    0     03    03    023   012   01    01

Relatives. DDP is stage 0. FSDP is stage 3, module by module; its SHARD_GRAD_OP is near stage 2, but shards parameters
too between steps. Tensor parallelism splits matrix products and sends activations in each layer, so it needs the fast
links inside a node. Pipeline parallelism splits the layers, sends little, and waits. It goes with stage 1: it needs
many micro-batches, and stages 2 and 3 send in each.

Gradient accumulation over M micro-batches: stages 0 and 1 send gradients once. Stage 2 cannot keep whole gradients: it
sends (M + 1)Ψ; stage 3 sends 3MΨ. The optimizer must be element-wise (Adam, SGD), since a shard can begin or end inside
a matrix; Muon, LAMB and Adafactor need whole ones. Frozen parameters take 2Ψ, which only stage 3 shards.
Offload keeps K in host memory ("cpu"), where the update then runs, or in a mapped file ("disk"; ZeRO-Infinity also
moves parameters there). Stage 2 + offload keeps 2Ψ + 2Ψ/N on the device: less than stage 3 on fewer than 7 ranks.

What to take: the lowest stage that fits. With 64 of 80 GB on each of 8 GPUs for these states: 4.0B parameters in stage
0, 11.6B in 1, 17.1B in 2, 32B in 3. Usual order of speed: 0, 1, 2, 2 + offload, 3, 3 + offload. ZeRO helps little if
activations fill the memory (recompute them), if the model is small, or, in stage 3, if links are slow.

Pitfalls
* Make the engine after adapters are added and parameters frozen. Load, save, merge and generate inside whole(): in
  stage 3 parameters have no elements outside forward and backward, and fp32 masters follow only what is written there.
* Stages 1, 2 and 3 give the same bits (with one micro-batch in a step); another N, or stage 0, sums in another order.

Papers: ZeRO, arXiv 1910.02054, sections 5 and 7; ZeRO-Offload, 2101.06840; ZeRO-Infinity, 2104.07857; FSDP, 2304.11277.
The whole family in one table: nanopeft/__init__.py
"""

import math
import tempfile
import weakref
from bisect import bisect
from contextlib import contextmanager

import torch
import torch.distributed as dist

BUCKET = 1 << 20  # elements in a flat parameter, unless one parameter alone has more


class Error(ValueError):
    """Wrong use of ZeRO; the message says what would be right."""


# ---------------------------------------------------------------------------------- what each stage keeps and sends


def zero_bytes(n_params, world, stage, *, param_bytes=2, grad_bytes=2, k=12, offload=None):
    """Bytes that each rank keeps between backward and step; those under "offloaded" are not on the device.
    k: bytes of optimizer state for a parameter, 12 with Adam, or 8 in fp32. Frozen parameters: grad_bytes=0, k=0."""
    check(stage, offload)
    shard = -(-n_params // world)  # rounded up: the last rank's is padded
    parameters, gradients, state = (shard if stage >= first else n_params for first in (3, 2, 1))
    kept = {"parameters": param_bytes * parameters, "gradients": grad_bytes * gradients}
    return kept | {"optimizer": 0 if offload else k * state, "offloaded": k * state if offload else 0}


def zero_traffic(n_params, world, stage, *, micro_batches=1, frozen=0):
    """Elements that each rank sends in a step, by collective."""
    check(stage, None)
    sent, sent_frozen = (-(-n // world) * (world - 1) for n in (n_params, frozen))  # (N - 1)/N · Ψ
    if stage == 0:
        return {"all_reduce": 2 * sent}
    times = micro_batches if stage >= 2 else 1
    return {"reduce_scatter": times * sent, "all_gather": 2 * times * (sent + sent_frozen) if stage == 3 else sent}


# --------------------------------------------------------------------------------------------------- flat parameter


class FlatParameter:
    """Parameters of one unit end to end in one tensor, and this rank's shard of it.

    Gradients: p.grad of each parameter → flatten_grads → bucket (N · shard,) → reduce_scatter → grad (shard,) → step
    In stage 3: sharded (full has no memory) → unshard() → in flight → wait() → unsharded → reshard() → sharded
    """

    def __init__(self, unit, group, names, stage, offload):
        self.unit, self.group, self.stage = unit, group, stage
        self.params, self.names, self.shapes = [*names], [*names.values()], [p.shape for p in names]
        self.world, self.rank = (1, 0) if stage == 0 else (dist.get_world_size(), dist.get_rank())
        self.size = -(-sum(p.numel() for p in self.params) // self.world)  # rounded up
        self.full = self.params[0].detach().new_zeros(self.world * self.size)  # (N · shard,); p.data are its views
        part = self.full.split(self.size)[self.rank]
        self.master = self.shard = part.clone() if stage == 3 else part  # (shard,)
        self.grad, self.is_unsharded, self.n_whole = None, False, 0  # n_whole: in how many whole() we are
        if group is not None:  # the optimizer updates master, which is the shard itself if in fp32 and not offloaded
            device, dtype = "cpu" if offload else self.full.device, torch.promote_types(self.full.dtype, torch.float32)
            master = self.shard.to(device, dtype, copy=bool(offload))
            self.master = torch.nn.Parameter(mapped(master) if offload == "disk" else master)
        self.take_written()
        self.reshard()

    def flatten(self, tensors):
        """Tensors of the parameters' shapes end to end, and zeros up to N · shard."""
        padding = tensors[0].new_zeros(self.world * self.size - sum(x.numel() for x in tensors))
        return torch.cat([*(x.flatten() for x in tensors), padding])  # (N · shard,)

    def unflatten(self, full):
        """The reverse, as views of full."""
        sizes = [shape.numel() for shape in self.shapes]
        return [part.view(shape) for part, shape in zip(full[: sum(sizes)].split(sizes), self.shapes)]

    def flatten_grads(self):
        """The bucket: the parameters' gradients end to end, zeros for those that have none. They are freed."""
        grads = [self.full.new_zeros(shape) if p.grad is None else p.grad for p, shape in zip(self.params, self.shapes)]
        for p in self.params:
            p.grad = None
        return self.flatten(grads)

    def unshard(self):
        """Starts the all-gather of the parameters."""
        if not self.is_unsharded and self.in_flight is None:
            # Only the memory behind full comes and goes, so what autograd saved in forward is filled again as well
            self.full.untyped_storage().resize_(self.full.nbytes)
            self.in_flight = all_gather(self.full, self.shard)

    def wait(self):
        """Waits for the all-gather in flight. Until then the parameters are empty: nobody can read them too early."""
        if self.in_flight is not None:
            for work in self.in_flight:
                work.wait()
            self.in_flight, self.is_unsharded = None, True
            for p, view in zip(self.params, self.unflatten(self.full)):
                p.data = view

    def reshard(self):
        """Stage 3: frees all but the shard. A parameter without elements fails where it is used."""
        self.wait()
        if self.stage == 3 and self.is_unsharded and not self.n_whole:
            self.is_unsharded = False
            for p in self.params:
                p.data = self.full.new_empty(0)
            self.full.untyped_storage().resize_(0)

    def all_gather_params(self):
        """After the update: shard = master, rounded to 16 bits. Where full is in memory, starts to send it to all."""
        self.shard.copy_(self.master)  # in fp32 they are one, unless offloaded
        if self.is_unsharded:
            self.in_flight = all_gather(self.full, self.shard)

    @torch.no_grad()
    def take_written(self):
        """What rank 0 has in the parameters is what training goes on from; what is not written keeps its master."""
        self.full.copy_(self.flatten([p.data for p in self.params]))  # they are views of it, unless p.data = x
        broadcast(self.full)
        self.shard.copy_(self.full.split(self.size)[self.rank])
        shard = self.shard.to(self.master.device)
        self.master.copy_(torch.where(self.master.to(shard.dtype) == shard, self.master, shard))
        self.in_flight = []  # no messages to wait for: wait() only makes the parameters views of full
        self.wait()


# ----------------------------------------------------------------------------------------------------------- engine


class ZeRO:
    """Shards a model's training over all ranks: make the same calls on each, or one waits for the others forever.

        engine = ZeRO(model, torch.optim.AdamW, blocks=model.transformer.h, stage=2, lr=1e-3)
        total = all_sum(tokens, device)  # labelled, of all ranks: so each token counts alike, on whatever rank it is
        for ids, labels, n in micro_batches:  # n of them labelled; loss is their mean
            engine.backward(model(ids, labels=labels).loss * n / total)
        engine.step(clip=1.0)  # by the norm over all ranks: clip_grad_norm_ would see one rank's part
    optimizer: a class; settings are its arguments. params: as an optimizer takes them; by default all that are trained.
    blocks: modules of the model that run one after the other, once each in a forward. Rank 0's parameters are taken.
    """

    def __init__(self, model, optimizer, params=None, *, blocks, stage, offload=None, **settings):
        check(stage, offload)
        if not (dist.is_available() and dist.is_initialized()):
            raise Error("no process group: start with torchrun --nproc_per_node N, and call init_process_group first")
        self.model, self.stage, self.offload, blocks = model, stage, offload, list(blocks)
        groups = list(params) if params is not None else [p for p in model.parameters() if p.requires_grad]
        groups = groups if groups and isinstance(groups[0], dict) else [{"params": groups}]
        self.flat_params = [FlatParameter(*part, stage, offload) for part in partition(model, blocks, groups, stage)]
        self.frozen = [p for p in model.parameters() if not p.requires_grad and stage < 3]
        for x in [*model.buffers(), *self.frozen]:
            broadcast(x)
        self.units = [[flat for flat in self.flat_params if flat.unit == i] for i in range(len(blocks) + 1)]
        self.trained = [flat for flat in reversed(self.flat_params) if flat.group is not None]  # in order of backward
        masters = [[flat.master for flat in self.trained if flat.group == i] for i in range(len(groups))]
        self.optimizer = optimizer([{**group, "params": m} for group, m in zip(groups, masters)], **settings)
        self.queue, self.in_flight, self.in_backward = [], None, False
        self.unit_from = {0: 0}  # {number of a node in autograd's graph: the unit that forward is in from there on}
        me = weakref.proxy(self)  # hooks must not keep the engine alive
        for p in [p for flat in self.trained for p in flat.params] if stage >= 2 else []:
            p.register_post_accumulate_grad_hook(lambda p: me.grad_ready())
        for i, module in enumerate([model, *blocks] if stage == 3 else []):
            module.register_forward_pre_hook(lambda *_, i=i: me.before_unit(i))
            module.register_forward_hook(lambda module, args, output, i=i: me.after_forward(i, output))
        for module in model.modules() if stage == 3 else ():
            for register in (module.register_state_dict_pre_hook, module._register_load_state_dict_pre_hook):
                register(lambda *_: me.check_unsharded("save and load inside engine.whole(), on all ranks"))

    def backward(self, loss):
        """Backward of this rank's part of the loss. Parts are summed over ranks and over the calls before a step."""
        self.queue, self.in_backward = list(self.trained), True
        if self.stage == 3:
            self.before_unit(0)
            self.hook_graph(loss)
        try:
            loss.backward()
        finally:
            self.in_backward = False
        if self.stage >= 2:
            for flat in self.trained:  # a parameter was not used, or got a second gradient after its bucket had left
                if flat in self.queue or any(p.grad is not None for p in flat.params):
                    self.reduce_scatter(flat)
            self.wait_and_accumulate()
            self.queue = []
        for flat in self.flat_params:
            flat.reshard()

    def grad_ready(self):
        """Stages 2 and 3: autograd calls this after each parameter's gradient. Full buckets leave during backward."""
        while self.queue and all(p.grad is not None for p in self.queue[0].params):
            self.reduce_scatter(self.queue.pop(0))

    def reduce_scatter(self, flat):
        """Sends a bucket, after the one before has arrived. All ranks send them in one order, that of the queue."""
        self.wait_and_accumulate()
        self.in_flight = flat, *reduce_scatter(flat.flatten_grads(), flat.size)

    def wait_and_accumulate(self):
        """Waits for the bucket in flight and adds this rank's part of it to the gradient of the shard."""
        if self.in_flight:
            flat, work, received = self.in_flight
            work.wait()
            work = self.in_flight = None  # they hold the bucket
            first, *others = received.view(-1, flat.size)  # (N, shard), or (1, shard) if it is the sum already
            grad = sum(others, first.to(flat.master.dtype)).to(first.dtype)  # on gloo: in fp32, rounded once
            flat.grad = grad if flat.grad is None else flat.grad.add_(grad)  # micro-batches: in the gradient's dtype

    @torch.no_grad()
    def step(self, clip=None, loss_scale=1.0):
        """One update; returns the norm of the gradient over all ranks. If that is not finite, no rank updates anything.
        clip: the largest norm. loss_scale: what the loss was multiplied by before backward, as fp16 needs it."""
        if not self.queue and self.trained[0].grad is None:
            raise Error("step() without gradients: call engine.backward(loss), not loss.backward(), before each step")
        while self.queue:  # stages 0 and 1: once for all micro-batches
            self.reduce_scatter(self.queue.pop(0))
        self.wait_and_accumulate()
        square = squared_norm([flat.grad for flat in self.trained])
        if self.stage > 0:  # ‖g‖² = Σ over ranks of ‖shard of g‖²: an inf or NaN on one rank is one on all ranks
            dist.all_reduce(square)
        norm = square.sqrt().item() / loss_scale
        factor = (1.0 if clip is None else min(1.0, clip / (norm + 1e-6))) / loss_scale
        updated = self.trained if math.isfinite(norm) else []
        for flat in updated:
            flat.master.grad, flat.grad = flat.grad.to(flat.master.device, flat.master.dtype).mul_(factor), None
            self.optimizer.step()  # it passes over the other masters, which have no gradient
            flat.master.grad = None  # fp32 gradients are there for one flat parameter at a time
            if self.offload == "disk":
                state = self.optimizer.state[flat.master]  # made by the optimizer's first step
                state.update({key: mapped(x) for key, x in state.items() if torch.is_tensor(x) and x.dim()})
            flat.all_gather_params()
        for flat in self.trained:
            flat.wait()
            flat.grad = None
        self.unit_from = {0: 0}
        return norm

    def before_unit(self, i):
        """Stage 3: unit i is about to compute, in forward or backward. Unshard it, prefetch the next, wait for it."""
        if self.in_backward:
            for flat in [flat for flat in self.flat_params if flat.unit > i > 0]:  # these are done
                flat.reshard()
        else:
            self.unit_from[torch.autograd._get_sequence_nr()] = i
        following = (i - 1 if self.in_backward else i + 1) % len(self.units)  # 0, 1, …, L; backward 0 (head), L, …, 1
        for flat in self.units[i] + self.units[following]:  # unit i itself has mostly been prefetched
            flat.unshard()
        for flat in self.units[i]:
            flat.wait()

    def after_forward(self, i, output):
        """Frees unit i, unless this forward recomputes activations in backward: then backward of the unit follows."""
        if not self.in_backward:
            self.unit_from[torch.autograd._get_sequence_nr()] = 0
            for flat in self.units[i] if i > 0 else self.flat_params:
                flat.reshard()
        if isinstance(output, torch.Tensor) and output.requires_grad:
            output.register_hook(lambda grad: self.check_unsharded("call engine.backward(loss), not loss.backward()"))

    def hook_graph(self, loss):
        """Stage 3: has a unit unsharded when backward enters the part of autograd's graph that the unit's forward made.
        The nodes' numbers tell which part that is, so it does not matter what a block returns, nor who changes it."""
        numbers, seen, edges = [*self.unit_from], set(), [(loss.grad_fn, 0)] if loss.grad_fn else []
        for node, above in edges:  # above: the unit from which backward comes
            i = self.unit_from[numbers[bisect(numbers, node._sequence_nr()) - 1]]
            if i not in (0, above):
                node.register_prehook(lambda _, i=i: self.before_unit(i))
            if node not in seen:
                seen.add(node)
                edges += [(following, i) for following, _ in node.next_functions if following]

    def check_unsharded(self, advice):
        if not (self.in_backward or all(flat.is_unsharded for flat in self.flat_params)):
            raise Error(f"the parameters are sharded: {advice}")

    @contextmanager
    def whole(self):
        """Inside this `with`, which all ranks enter, each can use the model alone: to generate, or to save it. Training
        goes on from what rank 0 leaves in the parameters (Ψ elements are sent), with m and v as they were."""
        for flat in self.flat_params:
            flat.unshard()
            flat.wait()
            flat.n_whole += 1
        before = {name: (p, p.shape) for name, p in self.model.named_parameters(remove_duplicate=False)}
        try:
            yield self.model
        finally:
            after = self.model.named_parameters(remove_duplicate=False)  # an encoder may have been folded away
            kept = [(name, p) for name, p in after if name in before]
            wrong = [name for name, p in kept if before[name][0] is not p or before[name][1] != p.shape]
            for flat in self.flat_params:
                if not wrong:
                    flat.take_written()
                flat.n_whole -= 1
                flat.reshard()
            for p in self.frozen:
                broadcast(p.data)
        if wrong:  # out of the finally: an exception from inside comes first
            raise Error(f"inside whole() write into parameters, do not replace them (assign=True): {wrong[0]}")

    @torch.no_grad()
    def state_dict(self):
        """{parameter's name: {"master": fp32 values, and what the optimizer keeps}}: to resume with any N and stage.
        All ranks call this; rank 0 gets it in host memory, the others {}. It has no learning rate and no loss scale."""
        found = {}
        for flat in self.trained:
            for key, x in {"master": flat.master, **self.optimizer.state.get(flat.master, {})}.items():
                parts = [x.item() if torch.is_tensor(x) and x.dim() == 0 else x] * len(flat.names)
                if torch.is_tensor(x) and x.dim() > 0:
                    full = x.new_empty(flat.full.shape, device=flat.full.device)
                    for work in all_gather(full, x.to(full.device)):
                        work.wait()
                    parts = [part.to("cpu", copy=True) for part in flat.unflatten(full)]
                for name, part in zip(flat.names, parts) if dist.get_rank() == 0 else ():
                    found.setdefault(name, {})[key] = part
        return found

    @torch.no_grad()
    def load_state_dict(self, found):
        """The reverse, with the same on every rank. Error, with nothing loaded, if it is of another model."""
        shapes = {name: shape for flat in self.trained for name, shape in zip(flat.names, flat.shapes)}
        if wrong := [x for x in {**shapes, **found} if x not in found or found[x]["master"].shape != shapes.get(x)]:
            raise Error(f"the checkpoint is of another model, or trains other parameters: {wrong[0]} does not fit")
        self.optimizer.state.clear()
        for flat in self.trained:
            state = {}
            for key, x in found[flat.names[0]].items():
                if torch.is_tensor(x):
                    x = flat.flatten([found[name][key] for name in flat.names]).split(flat.size)[flat.rank].clone()
                state[key] = torch.tensor(x) if isinstance(x, float) else x  # torch's count of steps
            flat.master.copy_(state.pop("master"))
            flat.all_gather_params()
            if state:  # there was a step before
                self.optimizer.state[flat.master] = state
        self.optimizer.load_state_dict(self.optimizer.state_dict())  # puts each tensor where it belongs
        for flat in self.trained:
            flat.wait()


# --------------------------------------------------------------------------------------------------------- plumbing


def check(stage, offload):
    if stage not in (0, 1, 2, 3):
        raise Error(f"stage must be 0, 1, 2 or 3, not {stage!r}")
    if offload not in (None, "cpu", "disk"):
        raise Error(f"offload must be None, 'cpu' or 'disk', not {offload!r}")


def partition(model, blocks, groups, stage):
    """(unit, group, {parameter: name}) of each flat parameter, in the order of forward. Frozen ones: group None."""
    group_of = {p: i for i, group in enumerate(groups) for p in group["params"]}
    names = {p: name for name, p in model.named_parameters()}  # a tied parameter comes once
    if not group_of or group_of.keys() != {p for p in names if p.requires_grad}:
        raise Error("params must be all parameters of the model that require a gradient, no others, and not none")
    block_of = {module: i for i, block in enumerate(blocks, 1) for module in block.modules()}
    unit_of, parts, last = {}, [], {}
    for module, p in [(m, p) for m in model.modules() for p in m.parameters(recurse=False)]:
        unit = block_of.get(module, 0)
        unit_of[p] = unit if unit_of.get(p, unit) == unit else 0  # what two blocks share belongs to the root
    for p in [p for p in names if p.requires_grad or stage == 3]:
        key = unit_of[p], group_of.get(p), p.dtype
        if key not in last or sum(q.numel() for q in last[key]) + p.numel() > BUCKET:
            last[key] = {}
            parts.append((*key[:2], last[key]))
        last[key][p] = names[p]
    return sorted(parts, key=lambda part: part[0])


def reduce_scatter(bucket, size):
    """Starts the reduce-scatter of a bucket (N · shard,). Returns what to wait for, and the sum or its N parts."""
    if size == bucket.numel():  # stage 0
        return dist.all_reduce(bucket, async_op=True), bucket
    if bucket.is_cuda:
        received = bucket.new_empty(size)  # (shard,)
        nccl = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor  # before torch 2.13
        return nccl(received, bucket, async_op=True), received
    # Gloo's own sends as much as an all-reduce, and its order of sums depends on where the bucket is cut
    received = torch.empty_like(bucket)  # (N · shard,): this rank's shard as each rank has it
    return dist.all_to_all_single(received, bucket, async_op=True), received


def all_gather(full, shard):
    """Starts to fill full (N · shard,) from all ranks' shards; returns what to wait for, in a list."""
    parts = full.split(shard.numel())
    if full.is_cuda and len(parts) > 1:
        nccl = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # before torch 2.13
        return [nccl(full, shard, async_op=True)]
    rank = dist.get_rank() % len(parts)  # stage 0 has one part
    parts[rank].copy_(shard)  # gloo's own all-gather takes two to five times as long as what follows
    others = [(peer, part) for peer, part in enumerate(parts) if peer != rank]
    return [dist.isend(shard, peer) for peer, _ in others] + [dist.irecv(part, peer) for peer, part in others]


def squared_norm(gradients):
    """Σ g² of all of them, in fp64: torch's fp32 norm on a CPU is 2.7e-3 too low at 38.6M elements."""
    pieces = [piece for grad in gradients for piece in grad.flatten().split(1 << 18)]  # no fp64 copy of the whole
    return torch.stack([torch.linalg.vector_norm(piece, dtype=torch.float64) for piece in pieces]).square().sum()


def all_sum(number, device="cpu"):
    """The sum of a number over all ranks: of labelled tokens, say."""
    total = torch.tensor(number, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.item()


def broadcast(tensor):
    sent = tensor.contiguous()
    dist.broadcast(sent.view(-1).view(torch.uint8), 0)  # as bytes: of any dtype
    tensor.copy_(sent)


def mapped(tensor):
    """The tensor in a mapped temporary file without a name: the system can write it out when memory is short."""
    if tensor.untyped_storage().filename:  # it is in one already
        return tensor
    with tempfile.NamedTemporaryFile() as file:
        return torch.from_file(file.name, shared=True, size=tensor.numel(), dtype=tensor.dtype).copy_(tensor)


if __name__ == "__main__":
    print("7B parameters in 16 bits on 8 ranks, GB on each; and how many parameters 64 GB hold:")
    for stage in (0, 1, 2, 3):
        kept, sent = sum(zero_bytes(7 * 10**9, 8, stage).values()), sum(zero_traffic(7 * 10**9, 8, stage).values())
        print(f"stage {stage}: {kept / 1e9:5g}; sends {2 * sent / 1e9:g} GB in a step; {7 * 64e9 / kept:.1f}B in 64 GB")
