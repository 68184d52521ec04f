# SPDX-License-Identifier: MIT
"""Adam and AdamW: every weight gets a step size of its own. In fp32 and fp64 the same numbers as torch.optim's.

    g = ∂loss/∂θ                                   t = 1, 2, 3, ...
    m = β1 m + (1 - β1) g                          first moment: running mean of the gradient
    v = β2 v + (1 - β2) g²                         second moment: running mean of its square
    m̂ = m / (1 - β1^t),  v̂ = v / (1 - β2^t)        bias correction
    θ = θ - lr m̂ / (√v̂ + ε) - lr λ θ               AdamW: the last term is the weight decay

θ, g, m and v have one shape; all operations are element-wise. m and v start at zero.

Two steps by hand, θ = 1, lr = 0.1, λ = 0.1, default β:
    t   g     m       v            m̂       √v̂      m̂/√v̂    θ
    1   0.5   0.05    0.00025      0.5     0.5     1       1 - 0.01 - 0.1 = 0.89
    2   0.1   0.055   0.00025975   0.2895  0.3605  0.8030  0.89 - 0.0089 - 0.0803 = 0.8008

Why m? A mini-batch's gradient is noisy, and m averages the last 1 / (1 - β1) = 10 or so (momentum).
Why v? Gradients differ in size from weight to weight. Divided by their root mean square over some 1 / (1 - β2) = 1,000
steps, a gradient a thousand times larger gives the same step, so one lr suits all layers.

Why bias correction? m and v start at zero, so after t steps they hold only a share 1 - β^t of an average. √v lacks even
more than m at first: without the correction the first step would be (1 - β1) / √(1 - β2) = 3.16 times lr.

How far does a weight move in one step? By lr at the first step (if |g| ≫ ε) and while gradients stay the same, by less
when they change sign. By more when they grow suddenly, because m follows sooner than v. A large gradient after 500 tiny
ones moves θ by 1.99 lr; after many thousands by (1 - β1) / √(1 - β2) = 3.16 lr, the bound that the paper gives.
Growing ones in a row do more: by Cauchy-Schwarz (1 - β1) / √(1 - β2) / √(1 - β1²/β2) = 7.27 lr is the true bound, and
1.16 lr with β2 = 0.95: one reason why LLMs take 0.95. Then v forgets in 20 steps instead of 1,000.

Adam or AdamW? Weight decay pulls θ to zero. Adam with L2 adds λ θ to g, before the moments: √v divides the pull too,
so a weight with large gradients hardly decays, and one without any moves by a full lr. AdamW's decay is decoupled: all
weights shrink at the rate lr λ. With g = 0, θ = 1, lr = λ = 0.1 one step gives 0.9 in Adam with L2, 0.99 in AdamW.

Why warm-up? At the first steps v̂ averages few gradients, so all weights move by almost lr, mostly along noise (arXiv
1908.03265). So lr rises from 0 over some hundred to 2,000 steps, found by experience.

Gradient clipping: if the norm ‖g‖ over all weights exceeds a limit, usually 1, g is multiplied by limit / ‖g‖, so that
one bad batch spoils neither m nor, for 1,000 steps, v. Loss scaling: fp16 gradients below 3e-8 would be 0, so the loss
is multiplied by 2^16 or so. The training loop leaves out a step with inf or NaN, and halves the factor. bf16 has the
range of fp32 and needs none (quant.py). Both are factors of g, multiplied in fp32. ‖g‖ is without the loss scale:
    step(grad_scale=min(1, limit / ‖g‖) / loss_scale)

Bytes per weight: 16 in fp32 (θ, g, m, v = 4 + 4 + 4 + 4) and in mixed precision (θ, g in 16 bits, and in fp32 a master
copy, m, v = 2 + 2 + 4 + 4 + 4). Mixed precision saves time and activations, not model state.
Why a master copy? bf16 has 8 significant bits, fp16 11: an update below 2^-9 or 2^-12 of the weight is rounded away.
For 0.1 in bf16 that is 0.0002. So the fp32 copy is updated, and then rounded into θ.

Typical: β = (0.9, 0.95), λ = 0.1, clipping at 1, warm-up of 2,000 steps, cosine decay to a tenth, lr 3e-4 at 7B (LLaMA,
arXiv 2302.13971) and 6e-4 at 125M (GPT-3, 2005.14165). LoRA: lr 2e-4, λ = 0 (QLoRA, 2305.14314). Decay the matrices, in
one parameter group, and not the biases and norms, in another (nanoGPT): a norm's gain has no reason to be near 0.

Pitfalls: with a gradient of 0 θ still decays, and moves by what is left in m; with None it stays. ε matters where v is
tiny: torch adds it to √v̂, some add it to √v, and get other numbers. The AdamW paper's own λ is lr times this one.

Relatives: 8-bit Adam (2110.02861) keeps m and v in 8 bits, 2 bytes for 8. Adafactor (1804.04235) keeps of v its row and
column sums, and no m. Muon keeps m alone and makes it orthogonal, matrix by matrix (2502.16982). LoRA trains so few
weights that their optimizer state hardly counts. The whole family in one table: nanopeft/__init__.py

Papers: Adam, arXiv 1412.6980, algorithm 1 and section 2.1; AdamW, 1711.05101, algorithm 2; mixed precision, 1710.03740.
"""

import functools
import math

import torch


def adamw_step(theta, g, m, v, t, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01, decoupled=True):
    """The formula as it stands: θ, m and v after step t = 1, 2, ... decoupled: AdamW, else Adam with L2."""
    beta1, beta2 = betas
    if decoupled:
        theta = theta - lr * weight_decay * theta
    else:
        g = g + weight_decay * theta
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g**2
    m_hat = m / (1 - beta1**t)
    v_hat = v / (1 - beta2**t)
    theta = theta - lr * m_hat / (v_hat.sqrt() + eps)
    return theta, m, v


class AdamW(torch.optim.Optimizer):
    """lr, betas = (β1, β2), eps = ε, weight_decay = λ, and decoupled (AdamW, else Adam with L2), also per group.

    The master copy is made at the first step: from then on, what is written into a 16-bit parameter from outside is
    undone by the next step.
    compile: torch.compile makes one loop of a step, which needs a C++ compiler and some seconds at the first steps.
    """

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01, decoupled=True, compile=False):
        settings = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, decoupled=decoupled, compile=compile)
        super().__init__(params, settings)

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
            for p in group["params"]:
                if p.grad is not None:
                    self.step_parameter(p, group, grad_scale)
        return loss

    def step_parameter(self, p, group, grad_scale):
        """adamw_step on one parameter, by its faster form below. The state is made at the first step."""
        if p.grad.layout is not torch.strided or not p.grad.is_floating_point():
            raise Error(f"gradients must be dense and real, not {p.grad.layout} of {p.grad.dtype}")
        state = self.state[p]
        if not state:
            at_least_fp32 = torch.promote_types(p.dtype, torch.float32)
            state["step"] = 0
            state["m"] = torch.zeros(p.shape, dtype=at_least_fp32, device=p.device)
            state["v"] = torch.zeros(p.shape, dtype=at_least_fp32, device=p.device)
            if at_least_fp32 != p.dtype:  # 16 bits: the fp32 copy that all updates go to
                state["master"] = p.to(at_least_fp32).contiguous()
        state["step"] += 1

        (beta1, beta2), lr, decay = group["betas"], group["lr"], group["weight_decay"]
        # lr m̂ / (√v̂ + ε) = lr_t m / (√v + ε_t): the bias corrections go into two numbers instead of two tensors,
        # lr_t = lr √(1 - β2^t) / (1 - β1^t) and ε_t = ε √(1 - β2^t)
        bias1, root_bias2 = 1 - beta1 ** state["step"], math.sqrt(1 - beta2 ** state["step"])
        numbers = dict(beta1=beta1, beta2=beta2, lr_t=lr * root_bias2 / bias1, eps_t=group["eps"] * root_bias2)
        numbers["shrink"], numbers["l2"] = (1 - lr * decay, 0) if group["decoupled"] else (1, decay)

        whole = p.contiguous()  # p itself, or a copy of it if its strides are unusual
        tensors = state.get("master", whole), p.grad.contiguous(), state["m"], state["v"]
        flat = [x.view(-1) for x in tensors]
        flat.append(whole.view(-1) if "master" in state else flat[0])
        if group["compile"] and (p.is_cuda or p.numel() > CHUNK):  # on a GPU one kernel instead of ten
            compiled_step()(*flat, grad_scale=grad_scale, **numbers)
        else:
            for chunk in chunks(flat):
                step_in_place(*chunk, grad_scale=grad_scale, **numbers)
        if whole is not p:
            p.copy_(whole)

    def load_state_dict(self, state_dict):
        """As torch's, but m, v and master stay in fp32, where torch would round them to a 16-bit θ's type.

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
            if needed.items() - shapes.items():  # others may keep theirs there too, such as AdaLoRA's RankBudget
                raise Error(f"the state of parameter {i}, {p.dtype}, must have {needed}, not {shapes}")
            dtype = torch.promote_types(p.dtype, torch.float32)
            states[p] = {
                k: x.to(p.device, dtype if x.is_floating_point() else x.dtype, copy=True) if torch.is_tensor(x) else x
                for k, x in saved.items()
            }
        super().load_state_dict({**state_dict, "state": {}})
        self.state.update(states)

    def add_param_group(self, group):
        """As torch's, which calls it for the first groups too. Error if a setting is out of its range."""
        given = {**self.defaults, **group}
        for name, top in {"lr": math.inf, "eps": math.inf, "weight_decay": math.inf, "betas": 1}.items():
            for x in given[name] if name == "betas" else [given[name]]:
                if not 0 <= x < top:
                    raise Error(f"{name} must be at least 0 and below {top}, not {x}")
        super().add_param_group(group)


class Error(ValueError):
    """Wrong use of AdamW; the message says what would be right."""


# ------------------------------------------------------------------------------------------------ the same step, faster

# A step on 21 million fp32 weights, one core: adamw_step 186 ms, in place and in chunks 45 ms, compiled 20 ms, torch's
# fused kernel 16 ms. Full fine-tuning of GPT-2 has six times as many weights; LoRA too few for this to matter.

CHUNK = 1 << 16  # numbers for each core: θ, g, m, v and two temporaries of so many, 1.5 MiB, stay in its L2 cache


def step_in_place(theta, g, m, v, rounded, *, grad_scale, beta1, beta2, lr_t, eps_t, shrink, l2):
    """adamw_step on θ, m and v in place. rounded: θ itself, or the 16-bit parameter that gets θ rounded."""
    g = g.to(theta.dtype)
    if grad_scale != 1:
        g = g * grad_scale
    if shrink != 1:
        theta.mul_(shrink)  # AdamW: θ = (1 - lr λ) θ
    if l2:
        g = g.add(theta, alpha=l2)  # Adam with L2: g = g + λ θ
    m.lerp_(g, 1 - beta1)  # m = β1 m + (1 - β1) g
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)  # v = β2 v + (1 - β2) g²
    denominator = v.sqrt().add_(eps_t)
    if torch.compiler.is_compiling():  # it takes `value` for a constant, and would compile again at each step
        theta.sub_(m / denominator * lr_t)
    else:
        theta.addcdiv_(m, denominator, value=-lr_t)
    if rounded.dtype != theta.dtype:
        rounded.copy_(theta)


def chunks(tensors):
    """Contiguous tensors of one size, cut alike: all operations on a piece but the first find it in the cache."""
    n = CHUNK * (torch.get_num_threads() if tensors[0].is_cpu else 1024)  # on a GPU: just to keep temporaries small
    return zip(*(x.split(n) for x in tensors)) if tensors[0].numel() > n else [tensors]


@functools.cache
def compiled_step():
    """All of step_in_place in one loop: a number comes from memory once, and not once for each operation."""
    return torch.compile(step_in_place)


if __name__ == "__main__":

    def moved(start, gradients, dtype=torch.float64, **settings):
        """A parameter after one step for each of the gradients, and its optimizer."""
        p = torch.nn.Parameter(torch.tensor([start], dtype=dtype))
        optimizer = AdamW([p], **settings)
        for g in gradients:
            p.grad = torch.tensor([g], dtype=dtype)
            optimizer.step()
        return p, optimizer

    p, _ = moved(1.0, [0.5, 0.1], lr=0.1, weight_decay=0.1)
    print(f"theta = 1, g = 0.5 and 0.1, lr = lambda = 0.1: theta = {p.item():.4f} after two steps")
    for name, decoupled in (("Adam + L2", False), ("AdamW", True)):
        p, _ = moved(1.0, [0.0], lr=0.1, weight_decay=0.1, decoupled=decoupled)
        print(f"theta = 1, g = 0, lr = lambda = 0.1, one step of {name}: theta = {p.item():.3g}")

    growing = [(0.999 / 0.9) ** k for k in range(-3000, 1)]
    for name, gradients in (("10000", [1e4]), ("500 of 1e-9, then 1", [1e-9] * 500 + [1.0]), ("that grow", growing)):
        theta = m = v = torch.zeros((), dtype=torch.float64)
        for t, g in enumerate(gradients, 1):
            before = theta
            theta, m, v = adamw_step(theta, g, m, v, t, lr=1, eps=0, weight_decay=0)
        print(f"gradients {name}: the last step is {(before - theta).item():.2f} lr")

    bare = torch.tensor([0.1], dtype=torch.bfloat16)
    for _ in range(500):
        bare -= 1e-4  # what Adam does when all gradients are alike
    p, _ = moved(0.1, [1.0] * 500, torch.bfloat16, lr=1e-4, weight_decay=0)
    print(f"theta = 0.1 in bf16, 500 steps of -1e-4: without a master copy {bare.item():.4g}, with it {p.item():.4g}")

    for dtype in (torch.float32, torch.bfloat16):
        p, optimizer = moved(1.0, [1.0], dtype)
        held = {"theta": p, "g": p.grad, **optimizer.state[p]}
        held = {name: x.element_size() for name, x in held.items() if name != "step"}
        print(f"{dtype}: {sum(held.values())} bytes for each parameter, {held}")
