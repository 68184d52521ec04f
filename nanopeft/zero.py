# SPDX-License-Identifier: MIT
"""ZeRO: N ranks train one model on N shares of the batch, and each keeps a part of what plain copies keep N times.

    bytes on each of N ranks, for Ψ trained parameters in 16 bits, K = 12:                    7B on 8      N → ∞
    stage 0   2Ψ  +  2Ψ  +  KΨ       nothing is sharded: data parallelism                     112   GB      16Ψ
    stage 1   2Ψ  +  2Ψ  +  KΨ/N     the optimizer's state                                     38.5  GB      4Ψ
    stage 2   2Ψ  + (2Ψ  +  KΨ)/N    and the gradients                                         26.25 GB      2Ψ
    stage 3  (2Ψ  +  2Ψ  +  KΨ)/N    and the parameters                                        14    GB       0

Where 16 bytes come from: parameter 2 + gradient 2 + fp32 master copy, m and v of Adam 4 + 4 + 4. In an fp32 run the
parameter is its own master copy: 4 + 4 + (4 + 4). Activations come on top, and are not what ZeRO divides.

What a rank sends in a step, in elements, each times (N - 1)/N; with M micro-batches stage 2 (M + 1)Ψ, stage 3 3MΨ:
    stage 0   2Ψ   all-reduce of the gradients, which is a reduce-scatter (Ψ) and an all-gather (Ψ)
    stage 1   2Ψ   reduce-scatter: each rank gets the sum of its shard; Adam there; all-gather of the new parameters
    stage 2   2Ψ   the same, but the gradients leave bucket by bucket while backward goes on
    stage 3   3Ψ   each block's parameters all-gathered before its forward and again before its backward; reduce-scatter

Memory falls with the stage, and speed with offload and in stage 3. The usual orders are, fastest first: stage 0, 1, 2,
2 + offload, 3, 3 + offload; least memory on the device first: 3 + offload, 3, 2 + offload, 2, 1, 0. They are no laws:
stages 0 to 2 send the same, 1 and 2 update less on each rank, and stage 2 + offload keeps 2Ψ + 2Ψ/N, less than stage 3
on fewer than 7 ranks.
Offload keeps K on the host ("cpu"), where the update is done too, or in a mapped file ("disk", as in ZeRO-Infinity).

Dimensions: Ψ parameters, N ranks. A flat holds parameters of one unit (a block; or the root: all that is in no block)
end to end, with zeros up to a multiple of N; rank r owns its r-th part (shard), whatever parameter that cuts through.
Stages 1, 2 and 3 have one layout and, with one micro-batch in a step, one order of sums: they give the same bits.
Sharding is blind to where a parameter ends, so the optimizer must be element-wise: Adam and SGD are, Muon is not.

Beside it: tensor parallelism divides the products themselves, and pipelines the layers; ZeRO divides only what is kept,
and each rank still computes the whole model on its share of the data.

Papers: ZeRO, arXiv 1910.02054; ZeRO-Offload, arXiv 2101.06840; ZeRO-Infinity, arXiv 2104.07857.
"""

import math
import tempfile
import weakref
from contextlib import contextmanager

import torch
import torch.distributed as dist
import torch.nn as nn

BUCKET = 1 << 20  # elements in a flat, unless one parameter has more; gradients leave flat by flat


class Error(ValueError):
    """Wrong use of ZeRO; the message says what would be right."""


# ------------------------------------------------------------------------------------------------------------ formulas


def check(stage, offload):
    if stage not in (0, 1, 2, 3):
        raise Error(f"stage must be 0, 1, 2 or 3, not {stage!r}")
    if offload not in (None, "cpu", "disk"):
        raise Error(f"offload must be None, 'cpu' or 'disk', not {offload!r}")


def shard_size(n, world):
    """Elements of n on each rank, the last one's padding included."""
    return -(-n // world)


def zero_bytes(n_params, world, stage, *, param_bytes=2, grad_bytes=2, k=12, offload=None):
    """Bytes that a rank keeps at the end of backward; `offloaded` is not on the device.

    k: bytes of optimizer state; with Adam 12, or 8 if parameters in fp32 are updated in place. Frozen parameters have
    grad_bytes=0, k=0. Exact for a flat, and for a sum of flats if n_params has their padding in it, which the whole
    gradients of stages 0 and 1 have not.
    """
    check(stage, offload)
    shard = shard_size(n_params, world)
    state = k * (shard if stage >= 1 else n_params)
    return {
        "parameters": param_bytes * (shard if stage >= 3 else n_params),
        "gradients": grad_bytes * (shard if stage >= 2 else n_params),
        "optimizer": 0 if offload else state,
        "offloaded": state if offload else 0,
    }


def zero_traffic(n_params, world, stage, *, micro_batches=1, frozen=0):
    """Elements that a rank sends in a step, by collective. Padding as above."""
    check(stage, None)
    # (N - 1)/N · Ψ: all but its own shard
    trained, idle = (shard_size(n, world) * (world - 1) for n in (n_params, frozen))
    if stage == 0:
        return {"all_reduce": 2 * trained}
    times = micro_batches if stage >= 2 else 1
    return {"reduce_scatter": times * trained, "all_gather": 2 * times * (trained + idle) if stage == 3 else trained}


# --------------------------------------------------------------------------------------------------------- collectives


def all_sum(number, device="cpu"):
    """The sum of a number over all ranks: of labelled tokens, say."""
    total = torch.tensor(number, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.item()


def send_bucket(bucket, size):
    """Starts the reduce-scatter of a bucket (N · shard,); gives what to wait for, and what sum_received takes.

    NCCL has it. Gloo's own sends as much as an all-reduce, 2 (N - 1)/N instead of (N - 1)/N, and the order of its sums
    depends on where the bucket is cut. All-to-all sends each rank its shard of the bucket and nothing else; the sum is
    then made here, in the order of ranks: the same bits however gradients are cut into buckets.
    """
    if bucket.is_cuda:
        received = bucket.new_empty(size)  # (shard,)
        reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor  # before torch 2.13
        return reduce_scatter(received, bucket, async_op=True), received
    received = torch.empty_like(bucket)  # (N · shard,): the same shard as each rank has it
    return dist.all_to_all_single(received, bucket, async_op=True), received


def sum_received(received, size):
    """The shard's sum, from what is one sum already or one part from each rank."""
    first, *others = received.view(-1, size)  # (1, shard) or (N, shard)
    total = first.to(torch.promote_types(received.dtype, torch.float32), copy=True)
    for part in others:
        total += part  # in 32 bits or more, rounded once
    return total.to(received.dtype)  # (shard,)


def all_gather(whole, shard):
    """Starts to collect whole (N · shard,) from the shards of all ranks; gives what to wait for, in a list.

    Gloo's own takes two to five times as long as a message from each to each.
    """
    if whole.is_cuda:
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # before torch 2.13
        return [gather(whole, shard, async_op=True)]
    rank, parts = dist.get_rank(), whole.split(shard.numel())
    if parts[rank].data_ptr() != shard.data_ptr():
        parts[rank].copy_(shard)
    others = [(peer, part) for peer, part in enumerate(parts) if peer != rank]
    return [dist.isend(shard, peer) for peer, _ in others] + [dist.irecv(part, peer) for peer, part in others]


def broadcast(tensor):
    """Makes a tensor of any type what it is on rank 0."""
    sent = tensor.contiguous()
    dist.broadcast(sent.view(-1).view(torch.uint8), 0)
    tensor.copy_(sent)


def mapped(tensor):
    """The tensor in a file of its own, mapped into memory: the system writes pages out and takes their room.

    The file lies where temporary files do (TMPDIR) and has no name any more, so it goes when the process does.
    """
    with tempfile.NamedTemporaryFile() as file:
        return torch.from_file(file.name, shared=True, size=tensor.numel(), dtype=tensor.dtype).copy_(tensor)


# --------------------------------------------------------------------------------------------------------------- flats


class Flat:
    """Parameters of one unit, one type and one group in one tensor; this rank's shard of it and of its gradient.

    whole (N · shard,): all parameters, which are views of it; in stage 3 its memory is there only while they are used.
    shard: this rank's part of whole; in stage 3 a tensor of its own. grad: of the shard, summed over ranks.
    master: what the optimizer updates, in 32 bits or more: the shard itself if it is that and stays where it is.
    """

    def __init__(self, unit, group, named, params, stage, offload):
        self.unit, self.group, self.params, self.stage = unit, group, params, stage
        self.names, self.shapes = [named[p] for p in params], [p.shape for p in params]
        self.world, self.rank = (1, 0) if stage == 0 else (dist.get_world_size(), dist.get_rank())
        self.size = shard_size(sum(p.numel() for p in params), self.world)
        self.whole = self.join([p.detach() for p in params])
        self.views = self.split(self.whole)
        broadcast(self.whole)
        for p, view in zip(params, self.views):
            p.data = view
        self.shard = self.mine(self.whole)
        self.grad, self.works, self.waiting, self.held, self.mapped = None, [], set(), True, False
        if stage == 3:
            self.shard = self.shard.clone()
            self.free()
        if group >= 0:
            kind = torch.promote_types(self.shard.dtype, torch.float32)
            wide = self.shard.to("cpu", kind, copy=True) if offload else self.shard.to(kind)
            self.master = nn.Parameter(mapped(wide) if offload == "disk" else wide)

    def join(self, parts):
        """A tensor laid out like this flat, zeros where nothing is."""
        whole = parts[0].new_zeros(self.world * self.size)
        for view, part in zip(self.split(whole), parts):
            view.copy_(part)
        return whole

    def split(self, whole):
        """The reverse, as views."""
        sizes = [shape.numel() for shape in self.shapes]
        return [part.view(shape) for part, shape in zip(whole[: sum(sizes)].split(sizes), self.shapes)]

    def mine(self, whole):
        return whole[self.rank * self.size : (self.rank + 1) * self.size]

    def collect(self):
        """The bucket: gradients end to end, which are freed one by one; zeros where there is none."""
        bucket = self.shard.new_empty(self.world * self.size)
        bucket[sum(shape.numel() for shape in self.shapes) :].zero_()
        for p, view in zip(self.params, self.split(bucket)):
            view.zero_() if p.grad is None else view.copy_(p.grad)
            p.grad = None
        return bucket

    def wait(self):
        for work in self.works:
            work.wait()
        self.works = []

    def fetch(self):
        """Stage 3: gives whole its memory and starts to fill it."""
        if not self.held:
            self.held = True
            # Only the storage comes and goes, so what autograd saved of these views is filled again as well
            self.whole.untyped_storage().resize_(self.whole.nbytes)
            self.works = all_gather(self.whole, self.shard)
            for p, view in zip(self.params, self.views):
                p.data = view

    def free(self):
        """Stage 3: takes it back. A parameter without memory has no element, so that using it fails."""
        if self.held and self.stage == 3:
            self.wait()
            self.held = False
            for p in self.params:
                p.data = self.whole.new_empty(0)
            self.whole.untyped_storage().resize_(0)


# -------------------------------------------------------------------------------------------------------------- engine


class ZeRO:
    """Holds the model's parameters and the optimizer; the model is called as ever.

        engine = ZeRO(model, torch.optim.AdamW, blocks=model.transformer.h, stage=2, lr=1e-3)
        engine.backward(model(ids, labels=labels).loss * tokens / all_sum(tokens))
        engine.step(clip=1.0)

    model: the same on every rank; rank 0's numbers are taken. optimizer: an element-wise torch optimizer's class.
    params: a list of parameters or of groups with lists; all that require a gradient, if not given. settings: its own.
    blocks: the model's modules that run one after the other, once each in forward. Stage 3 holds the one at work and
    gathers the next; between passes no parameter has any element.
    """

    def __init__(self, model, optimizer, params=None, *, blocks, stage, offload=None, **settings):
        check(stage, offload)
        if not (dist.is_available() and dist.is_initialized()):
            raise Error("no process group: start with torchrun --nproc_per_node N, and call init_process_group first")
        self.model, self.blocks, self.stage, self.offload = model, list(blocks), stage, offload
        groups = list(params) if params is not None else [p for p in model.parameters() if p.requires_grad]
        groups = groups if groups and isinstance(groups[0], dict) else [{"params": groups}]
        self.flats = self.lay_out(groups)
        self.trained = [flat for flat in self.flats if flat.group >= 0]
        masters = [[flat.master for flat in self.trained if flat.group == i] for i in range(len(groups))]
        self.optimizer = optimizer([{**group, "params": m} for group, m in zip(groups, masters)], **settings)
        # fp16: small gradients vanish unless the loss has a factor, and large ones overflow if it does
        self.dynamic = any(p.dtype == torch.float16 for p in model.parameters())
        self.loss_scale, self.clean, self.gone, self.under_way = 2.0**16 if self.dynamic else 1.0, 0, 0, None
        # Buckets leave in one order on all ranks, or collectives would meet the wrong ones: backward's, in which a flat
        # is complete when its first parameter is
        order = {p: i for i, p in enumerate(model.parameters())}
        self.queue = sorted(self.trained, key=lambda flat: (flat.unit, order[flat.params[0]]), reverse=True)
        self.room = 2 * max(flat.world * flat.size for flat in self.trained)
        self.longest = max(shape.numel() for flat in self.trained for shape in flat.shapes)
        me = weakref.proxy(self)  # hooks must not keep alive what owns their parameters
        for i, flat in enumerate(self.trained if stage >= 2 else ()):
            for p in flat.params:
                p.register_post_accumulate_grad_hook(lambda p, i=i: me.ready(p, i))
        self.forward, self.at, self.resting, self.root_stays = True, 0, False, False
        if stage == 3:
            self.hook_units(me)

    def lay_out(self, groups):
        """The flats, in order of units: of what is trained, and in stage 3 of everything."""
        group_of = {p: i for i, group in enumerate(groups) for p in group["params"]}
        named = {p: name for name, p in self.model.named_parameters()}  # one that is tied comes once
        if not group_of or group_of.keys() != {p for p in named if p.requires_grad}:
            raise Error("params must be all parameters of the model that require a gradient, no others, and not none")
        # A parameter belongs to the block that alone uses it, and otherwise to the root, unit 0
        owner = self.owner = {module: i for i, block in enumerate(self.blocks, 1) for module in block.modules()}
        unit_of = {}
        for module in self.model.modules():
            for p in module._parameters.values():
                if unit_of.setdefault(p, owner.get(module, 0)) != owner.get(module, 0):
                    unit_of[p] = 0
        kinds = {}
        for p in [p for p in named if p.requires_grad or self.stage == 3]:
            pieces = kinds.setdefault((unit_of[p], group_of.get(p, -1), str(p.dtype)), [[]])
            if pieces[-1] and sum(q.numel() for q in pieces[-1]) + p.numel() > BUCKET:
                pieces.append([])
            pieces[-1].append(p)
        for x in [*self.model.buffers(), *(p.data for p in named if not p.requires_grad and self.stage < 3)]:
            broadcast(x)
        kinds = [(unit, group, piece) for (unit, group, _), pieces in sorted(kinds.items()) for piece in pieces]
        return [Flat(unit, group, named, piece, self.stage, self.offload) for unit, group, piece in kinds]

    # ------------------------------------------------------------------------------------------------ gradients

    def backward(self, loss):
        """Backward of this rank's part of the loss. The parts are summed over ranks and over the calls before a step:
        divide by the number of tokens in the whole step."""
        for flat in self.trained:
            flat.waiting = set(flat.params)
        self.gone, self.forward = 0, False
        self.enter(0)
        (loss * self.loss_scale).backward()
        if self.stage >= 2:
            self.send(len(self.queue))  # those, too, that wait for a gradient that does not come
            self.arrive()
        self.forward = True
        self.free_all()

    def ready(self, p, i):
        """The hook of a parameter whose gradient is there."""
        self.trained[i].waiting.discard(p)
        while self.gone < len(self.queue) and not self.queue[self.gone].waiting:
            self.send(self.gone + 1)
        # The bucket under way is there twice, as sent and as received; with it, the gradients that are there and the
        # next one must not need more than the room of two buckets
        if self.under_way:
            here = sum(q.grad.numel() for f in self.queue[self.gone :] for q in f.params if q.grad is not None)
            if 2 * self.under_way[0].whole.numel() + here + self.longest > self.room:
                self.arrive()

    def send(self, end):
        """Lets the buckets of the queue leave up to number `end`, one at a time."""
        for flat in self.queue[self.gone : end]:
            self.arrive()
            bucket = flat.collect()
            if self.stage == 0:
                self.under_way = flat, dist.all_reduce(bucket, async_op=True), bucket
            else:
                self.under_way = flat, *send_bucket(bucket, flat.size)
        self.gone = end

    def arrive(self):
        """Waits for the bucket under way, and adds it to the gradient of its shard."""
        if self.under_way:
            (flat, work, received), self.under_way = self.under_way, None
            work.wait()
            del work  # it holds the bucket
            total = sum_received(received, flat.size)
            flat.grad = total if flat.grad is None else flat.grad.add_(total)

    # ----------------------------------------------------------------------------------------------------- step

    @torch.no_grad()
    def step(self, clip=None):
        """One update; the norm of the gradient over all ranks. clip: the largest norm. If the norm is not finite,
        nothing is updated, on any rank, and a loss scale is halved; after 1,000 clean steps it is doubled."""
        if self.stage < 2:  # once for all micro-batches
            self.send(len(self.queue))
            self.arrive()
        # norm² = sum of the shards' squares, over all ranks: inf or NaN on one rank is so on all of them
        norms = [torch.linalg.vector_norm(flat.grad, dtype=flat.master.dtype).double() for flat in self.trained]
        squares = torch.stack(norms).square().sum()
        if self.stage > 0:
            dist.all_reduce(squares)
        norm = squares.sqrt().item() / self.loss_scale
        if math.isfinite(norm):
            for flat in self.trained:
                self.update(flat, (1.0 if clip is None else min(1.0, clip / (norm + 1e-6))) / self.loss_scale)
            self.clean += 1
            if self.dynamic and self.clean == 1000:
                self.loss_scale, self.clean = self.loss_scale * 2, 0
        else:
            self.loss_scale, self.clean = max(1.0, self.loss_scale / 2), 0
        for flat in self.trained:
            flat.wait()
            flat.grad = None
        return norm

    def update(self, flat, factor):
        flat.master.grad, flat.grad = flat.grad.to(flat.master.device, flat.master.dtype), None
        if factor != 1:
            flat.master.grad.mul_(factor)
        # The other masters have no gradient, and an optimizer passes over these: wide gradients are there for one flat
        self.optimizer.step()
        flat.master.grad = None
        if self.offload == "disk" and not flat.mapped:  # the optimizer makes its state at the first step
            state = self.optimizer.state[flat.master]
            state.update({key: mapped(x) for key, x in state.items() if torch.is_tensor(x) and x.dim()})
            flat.mapped = True
        self.publish(flat)

    def publish(self, flat):
        """The updated shard, rounded to the parameters' type, and in stages 1 and 2 sent to all ranks."""
        if flat.master.data_ptr() != flat.shard.data_ptr():
            flat.shard.copy_(flat.master)
        if self.stage in (1, 2):
            flat.works = all_gather(flat.whole, flat.shard)

    # ------------------------------------------------------------------------------------- stage 3: parameters

    def hook_units(self, me):
        """A unit's parameters are sent for when the one before it starts, forward or backward, and freed after its own.

        The root is freed while the blocks run forward, and stays from the head on until the end of backward: its
        modules are the first and the last. If one of them contains the blocks or is inside one, it stays throughout.
        """
        root = {p for flat in self.flats if flat.unit == 0 for p in flat.params}
        self.model.register_forward_pre_hook(lambda *_: me.enter(0, first=True))
        for module in self.model.modules():
            if any(p in root for p in module._parameters.values()):
                if module in self.owner or any(block in module.modules() for block in self.blocks):
                    self.root_stays = True
                else:
                    module.register_forward_pre_hook(lambda *_: me.enter(0))
        for i, block in enumerate(self.blocks, 1):
            block.register_forward_pre_hook(lambda *_, i=i: me.enter(i))
            block.register_forward_hook(lambda module, args, output, i=i: me.hook_output(output, i))
        self.model.register_forward_hook(lambda *_: None if torch.is_grad_enabled() or me.resting else me.free_all())

    def hook_output(self, output, i):
        """Backward of a block starts when the gradient of its output is there."""
        for x in output if isinstance(output, (tuple, list)) else [output]:
            if isinstance(x, torch.Tensor) and x.requires_grad:
                x.register_hook(lambda gradient: self.enter(i))

    def enter(self, unit, first=False):
        """Frees what has been used, sends for what comes next, and waits for the unit itself."""
        if self.resting:
            return
        self.at = 0 if first else unit or self.at  # the last block so far
        following = (self.at + 1 if self.forward else unit - 1) % (len(self.blocks) + 1)  # root, 1, 2, ..., root
        stay = {unit, following, 0 if self.root_stays or not self.forward else unit}
        for flat in [flat for flat in self.flats if flat.unit not in stay]:
            flat.free()
        for flat in [flat for flat in self.flats if flat.unit in (unit, following)]:
            flat.fetch()
        for flat in [flat for flat in self.flats if flat.unit == unit]:
            flat.wait()

    def free_all(self):
        for flat in self.flats:
            flat.free()

    @contextmanager
    def whole(self):
        """Inside the `with`, which all ranks enter, each has all parameters, and may use the model without the others:
        to generate, or to save it in its own format."""
        for flat in self.flats:
            flat.fetch()
            flat.wait()
        self.resting = True
        try:
            yield self.model
        finally:
            self.resting = False
            self.free_all()

    # -------------------------------------------------------------------------------------------------- checkpoint

    @torch.no_grad()
    def state_dict(self):
        """What a run needs to go on, by parameter: {name: {"master": its tensor, and what the optimizer keeps of it}}.

        It knows nothing of ranks, stage or padding, so it loads on any number of ranks, for the same optimizer. All
        ranks call this; rank 0 gets it, in host memory, and the others get {}. lr, and for fp16 loss_scale and clean,
        are the caller's to keep.
        """
        found = {}
        for flat in self.trained:
            for key, x in {"master": flat.master, **self.optimizer.state.get(flat.master, {})}.items():
                if torch.is_tensor(x) and x.dim():
                    whole = shard = x.to(flat.whole.device)
                    if self.stage > 0:
                        whole = shard.new_empty(flat.world * flat.size)
                        for work in all_gather(whole, shard):
                            work.wait()
                    parts = [part.to("cpu", copy=True) for part in flat.split(whole)]
                else:
                    parts = [x.item() if torch.is_tensor(x) else x] * len(flat.names)
                for name, part in zip(flat.names, parts) if dist.get_rank() == 0 else ():
                    found.setdefault(name, {})[key] = part
        return found

    @torch.no_grad()
    def load_state_dict(self, found):
        """The reverse, with the same on every rank. Error, with nothing loaded, if it is of another model."""
        shapes = {name: shape for flat in self.trained for name, shape in zip(flat.names, flat.shapes)}
        saved = {name: state["master"].shape for name, state in found.items()}
        if wrong := [name for name in {**shapes, **saved} if shapes.get(name) != saved.get(name)]:
            raise Error(f"the checkpoint is of another model, or trains other parameters: {wrong[0]} does not fit")
        states = {}
        for i, flat in enumerate(sorted(self.trained, key=lambda flat: flat.group)):  # the optimizer's order
            mine = states[i] = dict(found[flat.names[0]])
            for key, x in mine.items():
                if torch.is_tensor(x):
                    mine[key] = flat.mine(flat.join([found[name][key] for name in flat.names])).clone()
                elif isinstance(x, float):  # torch's count of steps
                    mine[key] = torch.tensor(x)
            flat.master.copy_(mine.pop("master"))
            flat.mapped = False
            self.publish(flat)
        # The optimizer's own loading puts each where it wants it
        settings = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": {i: x for i, x in states.items() if x}, "param_groups": settings})
        for flat in self.trained:
            flat.wait()


def demonstrate(rank, world, path):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(path, world), rank=rank, world_size=world)
    weights = {}
    for stage in (0, 1, 2, 3):
        torch.manual_seed(0)
        model, x = nn.Sequential(*(nn.Linear(63, 63) for _ in range(6))), torch.randn(8, 63)
        engine = ZeRO(model, torch.optim.AdamW, blocks=model, stage=stage)
        for _ in range(5):
            engine.backward(model(x[rank::world]).square().sum() / len(x))
            engine.step()
        with engine.whole():
            weights[stage] = torch.cat([p.detach().flatten() for p in model.parameters()])
        away = (weights[stage] - weights[0]).abs().max()
        state = sum(2 * flat.master.numel() for flat in engine.flats)
        if rank == 0:
            print(f"    stage {stage}: {state} elements of m and v on each, {away:.0e} from stage 0 after 5 steps")
    dist.destroy_process_group()


if __name__ == "__main__":
    print("7B parameters in 16 bits on 8 ranks, GB on each:")
    for stage in (0, 1, 2, 3):
        kept = {name: n / 1e9 for name, n in zero_bytes(7 * 10**9, 8, stage).items() if n}
        sent = sum(zero_traffic(7 * 10**9, 8, stage).values()) / (7 * 10**9)
        print(f"    stage {stage}: {sum(kept.values()):5g} = {kept}; sends {sent:.3g} Ψ in a step")
    if "fork" in torch.multiprocessing.get_all_start_methods():
        print("Two processes train 24,192 parameters:", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.start_processes(demonstrate, (2, f"{folder}/store"), nprocs=2, start_method="fork")
