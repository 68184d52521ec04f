# SPDX-License-Identifier: MIT
"""Backward and optimizer step behind one interface: one process, ZeRO, FSDP, tensor parallelism, or a pipeline.

    engine.backward(loss)          once for each micro-batch; a pipeline: loss = engine.backward_batches(all of them)
    norm = engine.step(lr, clip)   clip the gradient, update, clear; fp16's loss scale is kept here
    with engine.whole() as model:  a model with all its parameters, to evaluate and to save
    engine.loss(rows)              of a batch, without a gradient; only a pipeline gathers the whole model for it
    engine.state_dict()            {parameter name: {"master", "m", "v"}}, of several ranks on rank 0: the same for
    engine.load_state_dict(...)    each kind of engine and number of ranks, so that a run goes on with another one
"""

import math
from contextlib import contextmanager, nullcontext

import torch
import torch.distributed as dist

from nanopeft import adamw, pipeline, tensor_parallel, zero
from nanopeft.trainer.evaluate import mean_loss, to_device


def in_groups(params, args):
    """Groups for an optimizer. Decay is for matrices: not for biases, norms and IA3's l. LoRA+ gives B another rate."""
    groups, ratio = {}, 1 if args.lora_plus is None else args.lora_plus
    for name, p in params.items():
        decay = args.weight_decay if p.dim() > 1 and not name.endswith("ia3_l") else 0.0
        groups.setdefault((decay, ratio if name.endswith("lora_B") else 1), []).append(p)
    return [{"params": some, "weight_decay": decay, "lr_ratio": ratio} for (decay, ratio), some in groups.items()]


def storage_dtype(args, dtype):
    """What the base's weights are kept in: FSDP keeps them in fp32, and in dtype while they are used."""
    return torch.float32 if args.fsdp else dtype


class Engine:
    """The kind of engine that the flags ask for, and the loss scale.

    fp16 has too few exponent bits for small gradients: they become zero. So the loss is multiplied by a scale, and the
    gradients are divided by it in fp32 before the update. If one overflows to inf, the step is skipped and the scale
    halved; after 1,000 clean steps twice the scale is tried. bf16 has fp32's exponent bits and needs no scale.

    rebuild: a function that makes the same model again, for FSDP and tensor parallelism, whose own is never whole.
    """

    def __init__(self, args, model, blocks, dtype, rebuild):
        params = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.model, self.shapes = model, {name: p.shape for name, p in params.items()}  # before they are sharded
        self.compiles = args.compile
        groups, settings = in_groups(params, args), {"lr": args.lr, "betas": (0.9, 0.95)}
        if args.fsdp:
            self.inner = FSDP(model, blocks, dtype, args, rebuild, **settings)
        elif args.zero is not None:
            settings |= {"compile": args.compile, "stage": args.zero, "offload": args.offload, "blocks": blocks}
            self.inner = zero.ZeRO(model, adamw.AdamW, groups, **settings)
        else:
            optimizer = adamw.AdamW(groups, compile=args.compile, **settings)
            if args.tensor:
                self.inner = TensorParallel(model, params, optimizer, rebuild)
            elif args.pipeline:
                self.inner = pipeline.Pipeline(model, optimizer, schedule=args.schedule or "1f1b")
            else:
                self.inner = OneProcess(model, params, optimizer)
        self.optimizer = self.inner.optimizer
        self.dynamic = dtype == torch.float16
        self.loss_scale, self.clean, self.skipped = 2.0**16 if self.dynamic else 1.0, 0, 0

    def backward(self, loss):
        self.inner.backward(loss * self.loss_scale if self.dynamic else loss)

    def backward_batches(self, batches):
        """A pipeline's forward and backward of all micro-batches of a step, and their loss: the same on every rank."""
        device = self.inner.table.device
        inputs = [dict(zip(("input_ids", "labels"), to_device(batch, device))) for batch in batches]
        return self.inner.backward(inputs, self.loss_scale)

    def loss(self, rows):
        staged = isinstance(self.inner, pipeline.Pipeline)  # no stage can compute it alone
        with torch.no_grad(), self.uncompiled(), self.inner.whole() if staged else nullcontext(self.model) as model:
            return mean_loss(model, rows, rows[0].device).item()

    def step(self, lr, clip):
        """The norm of the gradient over all ranks; 0 where a step is skipped, for it overflowed fp16."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_ratio"]
        norm = self.inner.step(clip, self.loss_scale)
        self.clean += 1
        if not math.isfinite(norm) and self.loss_scale > 1:
            self.loss_scale, self.clean, self.skipped = self.loss_scale / 2, 0, self.skipped + 1
            return 0.0
        if self.dynamic and self.clean == 1000:
            self.loss_scale, self.clean = self.loss_scale * 2, 0
        return norm

    @contextmanager
    def whole(self):
        with self.inner.whole() as model, self.uncompiled():
            yield model

    def uncompiled(self):
        """Validation and generation run uncompiled. torch.compile makes a few variants of a function and then gives up:
        their other shapes would leave none for training."""
        has_stance = self.compiles and hasattr(torch.compiler, "set_stance")  # from torch 2.6 on
        return torch.compiler.set_stance("force_eager") if has_stance else nullcontext()

    def state_dict(self):
        return self.inner.state_dict()

    def load_state_dict(self, states):
        self.inner.load_state_dict(states)


class OneProcess:
    """Plain PyTorch, with the AdamW of adamw.py."""

    def __init__(self, model, params, optimizer):
        self.model, self.params, self.optimizer = model, params, optimizer

    def backward(self, loss):
        loss.backward()

    def step(self, clip, loss_scale):
        norm = self.norm() / loss_scale
        if math.isfinite(norm):
            self.optimizer.step(grad_scale=min(1.0, clip / (norm + 1e-6)) / loss_scale)
        self.optimizer.zero_grad()
        return norm

    def norm(self):
        grads = [p.grad for p in self.params.values() if p.grad is not None]
        if grads and grads[0].device.type == "mps":  # Apple's GPUs have no fp64
            return torch.stack([grad.float().norm() for grad in grads]).norm().item()
        return zero.squared_norm(grads).sqrt().item()

    def whole(self):
        return nullcontext(self.model)

    def state_dict(self):  # a parameter in fp32 is its own master copy
        return {name: {"master": p.detach(), **self.optimizer.state[p]} for name, p in self.params.items()}

    def load_state_dict(self, states):
        for name, p in self.params.items():
            kept = dict(states[name])
            p.data.copy_(kept["master"])
            if p.dtype.itemsize >= 4 or len(kept) == 1:
                del kept["master"]
            for key, x in kept.items():  # a count stays on the CPU: reading it must not wait for a GPU
                self.optimizer.state[p][key] = x.to(p.device) if torch.is_tensor(x) and x.dim() else x


class TensorParallel(OneProcess):
    """Each rank holds its part of each large matrix, and of m and v. All read the same batch and have the same loss."""

    def __init__(self, model, params, optimizer, rebuild):
        super().__init__(tensor_parallel.shard(model), params, optimizer)
        self.rebuild = rebuild

    def norm(self):
        return tensor_parallel.clip_grad_norm(self.model)

    @contextmanager
    def whole(self):
        model = self.rebuild()
        for name, p in model.named_parameters():
            if name in self.params:
                p.data.copy_(tensor_parallel.gather(self.params[name]))
        yield model

    def state_dict(self):
        states = {}
        for name, kept in super().state_dict().items():
            for key, x in kept.items():
                x = tensor_parallel.gather(self.params[name], x).cpu() if torch.is_tensor(x) else x
                if dist.get_rank() == 0:
                    states.setdefault(name, {})[key] = x
        return states

    def load_state_dict(self, states):
        def parts(p, kept):
            return {key: tensor_parallel.part(p, x) if torch.is_tensor(x) else x for key, x in kept.items()}

        super().load_state_dict({name: parts(p, states[name]) for name, p in self.params.items()})


class FSDP:
    """PyTorch's own ZeRO stage 3, fully_shard. All is sharded in fp32, and in dtype while it is used."""

    def __init__(self, model, blocks, dtype, args, rebuild, **settings):
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard  # takes half a second

        for module in (*blocks, model):
            fully_shard(module, mp_policy=MixedPrecisionPolicy(param_dtype=dtype))
        self.params = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(in_groups(self.params, args), **settings)
        self.rebuild = rebuild

    def backward(self, loss):
        (loss * dist.get_world_size()).backward()  # it takes the mean over ranks, and these are parts of a sum

    def step(self, clip, loss_scale):
        shards = [p.grad.to_local() for p in self.params.values() if p.grad is not None]
        square = zero.squared_norm(shards)
        dist.all_reduce(square)
        norm = square.sqrt().item()
        if math.isfinite(norm):
            torch._foreach_mul_(shards, min(1.0, clip / (norm + 1e-6)))
            self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    @contextmanager
    def whole(self):
        model = self.rebuild()
        for name, p in model.named_parameters():
            if name in self.params:
                p.data.copy_(self.params[name].detach().full_tensor())
        yield model

    def state_dict(self):
        states, names = {}, {"master": "master", "exp_avg": "m", "exp_avg_sq": "v"}
        for name, p in self.params.items():
            for key, t in {"master": p.detach(), **self.optimizer.state[p]}.items():
                x = t.full_tensor() if key in names else None
                if x is not None and dist.get_rank() == 0:
                    states.setdefault(name, {})[names[key]] = x.cpu()
        return states

    @torch.no_grad()
    def load_state_dict(self, states):
        from torch.distributed.tensor import distribute_tensor

        for name, p in self.params.items():
            master, m, v = (
                distribute_tensor(states[name][key].to(p.device), p.device_mesh, p.placements)
                for key in ("master", "m", "v")
            )
            p.copy_(master)
            step = torch.tensor(float(states[name]["step"]))
            self.optimizer.state[p] = {"step": step, "exp_avg": m, "exp_avg_sq": v}
