# SPDX-License-Identifier: MIT
"""Adam and AdamW by hand: the same numbers as torch.optim's, and a master copy for parameters in 16 bits.

    m = β1 m + (1 - β1) g                              mean of the gradient
    v = β2 v + (1 - β2) g²                             mean of its square
    θ = θ - lr · (m / (1 - β1^t)) / (√(v / (1 - β2^t)) + ε)

m and v start at zero, so after t steps they hold only a share 1 - β^t of an average; dividing by it corrects the bias.
Gradients a thousand times larger give the same quotient: it is ±1 at the first step (if |g| ≫ ε) and seldom beyond
that later, so lr is about the most that a weight moves in one step.

Weight decay pulls θ towards zero, and there are two ways to write it:
    Adam + L2   g = g + λ θ      before the moments. The pull is divided by √v like the rest of g: a weight with large
                                 gradients hardly decays, and one whose gradient is zero moves by a full lr.
    AdamW       θ = (1 - lr λ) θ past the moments ("decoupled"). All weights decay at the same rate.
With g = 0, θ = 1, lr = 0.1, λ = 0.1 the first step gives 0.9 with Adam + L2 and 0.99 with AdamW.
The AdamW paper's own λ is lr times this one.

Bytes per parameter: fp32 holds θ, g, m, v = 4 + 4 + 4 + 4. A 16-bit θ has 8 (bf16) or 11 (fp16) significant bits: it
loses every update below 2^-9 or 2^-12 of itself, which for a weight of 0.1 in bf16 is 0.0002. So its state has an fp32
master copy, which is what is updated and then rounded into θ: θ, g, master, m, v = 2 + 2 + 4 + 4 + 4. Both are 16:
"mixed precision" saves time and activations, not model state.

Papers: Adam, arXiv 1412.6980, algorithm 1; AdamW, arXiv 1711.05101, algorithm 2.
"""

import functools
import math

import torch

CHUNK = 1 << 16  # elements for each core: θ, g, m, v and two temporaries of so many, 1.5 MiB, stay in its L2 cache


class Error(ValueError):
    """Wrong use of AdamW; the message says what would be right."""


def update(theta, g, m, v, rounded, grad_scale, lr, b1, b2, c1, c2, eps, weight_decay, decoupled):
    """One step of Adam(W), in place on θ, m and v, which have one type. rounded: θ, or its copy in the type of g.

    c1, c2: 1 - β1^t and √(1 - β2^t).
    """
    g = g.to(theta.dtype)
    if grad_scale != 1:
        g = g * grad_scale
    if weight_decay and decoupled:
        theta.mul_(1 - lr * weight_decay)  # AdamW: θ = (1 - lr λ) θ
    elif weight_decay:
        g = g.add(theta, alpha=weight_decay)  # Adam + L2: g = g + λ θ
    m.lerp_(g, 1 - b1)  # m = β1 m + (1 - β1) g
    v.mul_(b2).addcmul_(g, g, value=1 - b2)  # v = β2 v + (1 - β2) g²
    # θ = θ - lr · (m / c1) / (√v / c2 + ε) = θ - lr c2 / c1 · m / (√v + c2 ε): c1 and c2 go into numbers, not tensors
    denominator, size = v.sqrt().add_(eps * c2), lr * c2 / c1
    if torch.compiler.is_compiling():  # it takes `value` for a constant, and would compile again at each step
        theta.sub_(m / denominator * size)
    else:
        theta.addcdiv_(m, denominator, value=-size)
    if rounded.dtype != theta.dtype:
        rounded.copy_(theta)


@functools.cache
def compiled_update():
    """All of `update` in one loop: an element comes from memory once, and not once for each operation."""
    return torch.compile(update)


def chunks(*tensors):
    """Contiguous tensors of one size, cut alike: all operations on a piece but the first find it in the cache.

    On GPT-2's 124M parameters a step takes 2.4 times as long as torch's fused kernel, and compiled 1.15 times.
    """
    size = CHUNK * (torch.get_num_threads() if tensors[0].is_cpu else 1024)  # a GPU: just to keep temporaries small
    return zip(*(x.split(size) for x in tensors)) if tensors[0].numel() > size else [tensors]


class AdamW(torch.optim.Optimizer):
    """lr: step size. betas: (β1, β2). eps: ε, added after the root. weight_decay: λ. decoupled: AdamW, else Adam + L2.

    All of them can be set for each parameter group. The master copy is made at the first step: from then on, what is
    written into a 16-bit parameter from outside is undone by the next step.
    compile: torch.compile makes one loop of `update`, which needs a C++ compiler and some seconds at the first steps.
    """

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01, decoupled=True, compile=False):
        settings = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, decoupled=decoupled, compile=compile)
        super().__init__(params, settings)

    def add_param_group(self, group):
        """As torch's, which calls it for the first groups too."""
        given = {**self.defaults, **group}
        for name, top in {"lr": math.inf, "eps": math.inf, "weight_decay": math.inf, "betas": 1}.items():
            for x in given[name] if name == "betas" else [given[name]]:
                if not 0 <= x < top:
                    raise Error(f"{name} must be at least 0 and below {top}, not {x}")
        super().add_param_group(group)

    @torch.no_grad()
    def step(self, closure=None, *, grad_scale=1.0):
        """One update; the loss if there is a closure, which is called first, with gradients enabled, to give it.

        grad_scale: factor of the gradients (to unscale, to clip), put in on their way, in fp32 if they have 16 bits.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            (b1, b2), settings = group["betas"], [group[name] for name in ("eps", "weight_decay", "decoupled")]
            for p in group["params"]:
                if p.grad is None:
                    continue
                if p.grad.layout is not torch.strided or not p.grad.is_floating_point():
                    raise Error(f"gradients must be dense and real, not {p.grad.layout} of {p.grad.dtype}")
                state = self.state[p]
                if not state:
                    wide = torch.promote_types(p.dtype, torch.float32)
                    state["step"] = 0
                    state["m"] = torch.zeros(p.shape, dtype=wide, device=p.device)
                    state["v"] = torch.zeros(p.shape, dtype=wide, device=p.device)
                    if wide != p.dtype:
                        state["master"] = p.to(wide).contiguous()
                state["step"] += 1
                whole = p.contiguous()  # p itself, or a copy of it if its strides are unusual
                master = state.get("master", whole)
                theta, *rest = (x.view(-1) for x in (master, p.grad.contiguous(), state["m"], state["v"]))
                tensors = theta, *rest, theta if master is whole else whole.view(-1)
                c1, c2 = 1 - b1 ** state["step"], math.sqrt(1 - b2 ** state["step"])
                numbers = grad_scale, group["lr"], b1, b2, c1, c2, *settings
                if group["compile"] and p.numel() > CHUNK:
                    compiled_update()(*tensors, *numbers)
                else:
                    for pieces in chunks(*tensors):
                        update(*pieces, *numbers)
                if whole is not p:
                    p.copy_(whole)
        return loss

    def load_state_dict(self, state_dict):
        """As torch's, but keeps m, v and master wide, where torch would round them to a 16-bit θ's type.

        Error, with nothing loaded, if a state does not fit its parameter.
        """
        order = [i for group in state_dict["param_groups"] for i in group["params"]]
        states = {}
        for i, p in zip(order, [p for group in self.param_groups for p in group["params"]]):
            saved = state_dict["state"].get(i)
            if saved is None:
                continue
            needed = {"step": (), "m": p.shape, "v": p.shape} | ({"master": p.shape} if p.dtype.itemsize < 4 else {})
            shapes = {k: getattr(x, "shape", ()) for k, x in saved.items()}
            if shapes != needed:
                raise Error(f"the state of parameter {i}, {p.dtype}, must have {needed}, not {shapes}")
            wide = torch.promote_types(p.dtype, torch.float32)
            states[p] = {k: x.to(p.device, wide, copy=True) if torch.is_tensor(x) else x for k, x in saved.items()}
        super().load_state_dict({**state_dict, "state": {}})
        self.state.update(states)


if __name__ == "__main__":

    def moved(start, gradients, dtype=torch.float64, **settings):
        """A parameter after one step for each of the gradients."""
        p = torch.nn.Parameter(torch.tensor([start], dtype=dtype))
        optimizer = AdamW([p], **settings)
        for g in gradients:
            p.grad = torch.tensor([g], dtype=dtype)
            optimizer.step()
        return p, optimizer

    for name, decoupled in (("Adam + L2", False), ("AdamW", True)):
        p, _ = moved(1.0, [0.0], lr=0.1, weight_decay=0.1, decoupled=decoupled)
        print(f"theta = 1, g = 0, lr = 0.1, lambda = 0.1, one step of {name}: theta = {p.item():.3g}")
    for g in (1e-4, 1.0, -1e4):
        p, _ = moved(0.0, [g], lr=0.01, weight_decay=0)
        print(f"theta = 0, g = {g:g}, lr = 0.01, one step: theta = {p.item():.4g}")

    bare = torch.tensor([0.1], dtype=torch.bfloat16)
    for _ in range(1000):
        bare -= 1e-4  # what Adam does when all gradients are alike
    p, _ = moved(0.1, [1.0] * 1000, torch.bfloat16, lr=1e-4, weight_decay=0)
    print(f"theta = 0.1 in bf16, 1000 steps of -1e-4: without a master copy {bare.item():.4g}, with it {p.item():.4g}")

    for dtype in (torch.float32, torch.bfloat16):
        p, optimizer = moved(1.0, [1.0], dtype)
        held = {"theta": p, "g": p.grad, **optimizer.state[p]}
        held = {name: x.element_size() for name, x in held.items() if name != "step"}
        print(f"{dtype}: {sum(held.values())} bytes for each parameter, {held}")
