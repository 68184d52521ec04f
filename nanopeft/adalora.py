# SPDX-License-Identifier: MIT
"""AdaLoRA: LoRA whose layers get different ranks, by what each part is worth while it trains.

    ΔW = s · P Λ Q          P (out, r), Λ (r,) a diagonal, Q (r, in);  s = α / r
    y = x Wᵀ + b + s · ((x Qᵀ) ∘ Λ) Pᵀ

P Λ Q looks like a singular value decomposition. Triplet i is column i of P, λᵢ and row i of Q. Every layer starts with
r triplets, and in training those that matter least, over all layers together, are pruned: λᵢ ← 0. In peft's file Q is
lora_A, P is lora_B and Λ is lora_E. P and Q start as N(0, 0.02²) and Λ as 0, so that nothing has changed.

Why not prune LoRA's B A? Its columns are not orthogonal, so taking one away changes what the others do. Here a penalty
keeps P's columns and Q's rows near orthonormal, and then λᵢ alone says how large triplet i is:
    loss + γ · mean over all P and Q of ‖Pᵀ P - 1‖ and ‖Q Qᵀ - 1‖        (Frobenius norms, γ = 0.1 to 0.5)
The paper squares the norms. Its code and peft do not.

What a number w is worth: |w · dw|, by how much the loss would change, to first order, if w were 0. One batch says
little, so it is averaged over steps (β = 0.85): I. So is how far it is from this average: U. A number that is worth
more than usual in some batches is kept too, so the two are multiplied:
    I ← β I + (1 - β) |w dw|       U ← β U + (1 - β) | |w dw| - I |       score(w) = I · U
    a triplet:  Sᵢ = score(λᵢ) + mean score(P's column i) + mean score(Q's row i)

The budget b(t), triplets of all layers that are kept, falls from r to target_r a layer along a cubic, fast at first:
    t ≤ start              all                                           warm up
    start < t < T - end    b = b_T + (b₀ - b_T) (1 - (t - start) / (T - end - start))³
    T - end ≤ t ≤ T        b_T, and always the same triplets             train what is left
Between two prunings a λ that was set to 0 has a gradient and moves again, so a triplet can come back. From T - end on
it cannot, for its λ is set to 0 after each step. (The paper's eq. 12 prints t - start - end in the numerator.)

Example: GPT-2, 48 linear layers, r = 12, target_r = 8: 576 triplets become 384. A triplet of c_attn has 3,073 numbers.
Cost: LoRA's, and two numbers more for each trained one, I and U. The rank at the start sets the memory. How to choose:
the paper starts at 1.5 times the target, its code for MNLI at 3 for a target of 1 (α 16, 5e-4, γ 0.1); start about a
tenth of all steps, end a third or more. When: a small budget over many layers. LoRA with more rank is simpler, and in
peft's comparison better (47.8 against 37.3, at settings with a small s: see below).

Pitfalls
* s = α / r keeps the first r, whatever is pruned. With peft's defaults (α = 8, r = 12) s is 0.67, and at LoRA's
  learning rate that is slow. Even with α = 16 three times LoRA's rate was better (experiments/ranks.py).
* The loss that trains has the penalty in it: up to about γ √r at the start. Do not compare it with LoRA's.
* A pruned λ keeps its moments in Adam, so the next step moves it off 0 again.

Compared with related methods: LoRA has one rank, or ranks that you choose (add_lora's `ranks`). The whole family in one
table: nanopeft/__init__.py.
Paper: AdaLoRA, arXiv 2303.10512, eq. 3, 4 and 7 to 12.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

try:
    from . import lora
except ImportError:  # the two files pasted side by side, or this one run
    import lora


class Error(ValueError):
    """Wrong use of AdaLoRA; the message says what would be right."""


class AdaLoRALinear(lora.LoRALinear):
    """A frozen linear layer and its update P Λ Q."""

    stored = {"lora_A": "lora_A", "lora_B": "lora_B", "lora_E": "lora_E"}
    own = lora.LoRALinear.own | {"lora_E"}

    def start(self, alpha):
        r = len(self.lora_A)
        self.scaling = alpha / (r + 1e-5)  # as peft has it
        self.lora_E = nn.Parameter(torch.zeros_like(self.lora_A[:, :1]))  # Λ, (r, 1)
        for p in (self.lora_A, self.lora_B):
            nn.init.normal_(p, std=0.02)

    def factors(self):
        return self.lora_E * self.lora_A, self.lora_B  # (r, in), (out, r)

    def parts(self):
        return self.lora_E, self.lora_A, self.lora_B

    def kept(self):
        return self.lora_E[:, 0] != 0  # (r,)


def orthogonality(model, gamma=0.1):
    """The penalty: add it to the loss."""
    layers = lora.lora_layers(model).values()
    products = [m.lora_A @ m.lora_A.t() for m in layers] + [m.lora_B.t() @ m.lora_B for m in layers]  # (r, r)
    norms = [(p - torch.eye(len(p), dtype=p.dtype, device=p.device)).norm() for p in products]
    return gamma * sum(norms) / len(norms)


def budget(t, total, start, end, first, last):
    """b(t): how many triplets of all layers are kept."""
    if t <= start:
        return first
    left = max(0.0, 1 - (t - start) / (total - end - start))
    return int(last + (first - last) * left**3)


class RankBudget:
    """Scores the triplets after each optimizer.step(), and prunes them to the budget.

    total: all steps. start, end: steps before the first pruning and after the last. every: steps between two prunings.
    What it remembers is in optimizer.state, so that it is saved with Adam's moments.
    """

    def __init__(self, model, optimizer, total, target_r=8, *, start=None, end=None, every=1, beta=0.85):
        self.layers, self.optimizer, self.beta = [*lora.lora_layers(model).values()], optimizer, beta
        self.start, self.end = total // 10 if start is None else start, total // 3 if end is None else end
        self.total, self.every = total, every
        if not self.layers or not all(isinstance(layer, AdaLoRALinear) for layer in self.layers):
            raise Error("the model has no AdaLoRA: add_adalora(model) first")
        if not 0 <= self.start < total - self.end or every < 1:
            where = f"start {self.start}, end {self.end}, every {every}"
            raise Error(f"{where}: pruning needs steps between start and end, of {total} in all")
        self.first, self.last = sum(len(layer.lora_E) for layer in self.layers), target_r * len(self.layers)
        if not 0 < self.last <= self.first:
            raise Error(f"target_r must be from 1 to the rank at the start, not {target_r}")
        optimizer.register_step_post_hook(lambda *_: self.update())

    @torch.no_grad()
    def update(self):
        """I and U of each number, and where the step is one that prunes, λ ← 0 of the least."""
        clock = self.optimizer.state[self.layers[0].lora_E]
        clock["t"] = t = clock.get("t", torch.zeros((), dtype=torch.long)) + 1
        final = self.total - self.end
        if t < final or t == 1:  # the last pruning may be at the first step
            for layer in self.layers:
                for p in layer.parts():
                    if p.grad is None:
                        raise Error(f"{layer.lora_name} took no part in the loss: leave it out of targets")
                    state, worth = self.optimizer.state[p], (p * p.grad).abs()  # |w dw|
                    if "importance" not in state:
                        state |= {"importance": torch.zeros_like(p), "uncertainty": torch.zeros_like(p)}
                    state["importance"].lerp_(worth, 1 - self.beta)
                    state["uncertainty"].lerp_((worth - state["importance"]).abs(), 1 - self.beta)
        prunes = t == final or self.start < t < final and t % self.every == 0
        if prunes:
            n = budget(int(t), self.total, self.start, self.end, self.first, self.last)
            scores = torch.cat([self.scores(layer) for layer in self.layers])  # (first,)
            kept = torch.zeros_like(scores, dtype=torch.bool).scatter_(0, scores.topk(n).indices, True)
            for layer, part in zip(self.layers, kept.split([len(layer.lora_E) for layer in self.layers])):
                self.optimizer.state[layer.lora_E]["kept"] = part[:, None]  # (r, 1)
        if prunes or t > final:
            for layer in self.layers:
                layer.lora_E.mul_(self.optimizer.state[layer.lora_E]["kept"])

    def scores(self, layer):
        """S of each triplet, (r,)."""
        states = [self.optimizer.state[p] for p in layer.parts()]
        E, A, B = (state["importance"] * state["uncertainty"] for state in states)  # (r, 1), (r, in), (out, r)
        return E[:, 0] + A.mean(1) + B.mean(0)


# ----------------------------------------------------------------------------------------------------------------- use


def add_adalora(model, targets="all-linear", *, r=12, alpha=16, dropout=0.0, modules_to_save=None):
    """Freezes the model, wraps its target layers in place and returns it. Wrong use: Error or lora.Error.

    r: the rank at the start, of all layers; the other arguments are add_lora's. A RankBudget then prunes, and
    orthogonality(model) is added to the loss. lora.py's merge_lora, unmerge_lora, remove_lora and lora_disabled serve
    AdaLoRA too.
    """
    found = lora.find_targets(model, targets, lora.find_saved(model, modules_to_save))
    if tables := [name for name, layer in found.items() if isinstance(layer, nn.Embedding)]:
        raise Error(f"{tables[0]} is an embedding, and AdaLoRA here is for linear layers: leave it out")
    lora.add_lora(model, targets, r=r, alpha=alpha, dropout=dropout, modules_to_save=modules_to_save)
    for layer in lora.lora_layers(model).values():
        layer.__class__ = AdaLoRALinear
        layer.start(alpha)
    model.lora_config |= {"peft_type": "ADALORA", "init_r": r, "target_r": r, "total_step": 1}  # peft wants them
    return model


def adalora_state_dict(model):
    """The content of peft's adapter_model.safetensors: of each layer the triplets whose λ is not 0."""
    state = lora.lora_state_dict(model)
    for name, layer in lora.lora_layers(model).items():
        kept, key = layer.kept(), f"base_model.model.{name}.lora_"
        state |= {f"{key}A": state[f"{key}A"][kept], f"{key}E": state[f"{key}E"][kept]}
        state[f"{key}B"] = state[f"{key}B"][:, kept].contiguous()
    return state


def adalora_config(model):
    """The adapter_config.json that goes with it."""
    pattern = {f"{name}.lora_E": layer.kept().tolist() for name, layer in lora.lora_layers(model).items()}
    return lora.lora_config(model) | {"rank_pattern": pattern}


@torch.no_grad()
def load_adalora_state_dict(model, state):
    """The reverse, onto a model that add_adalora has prepared with the same r. If the two do not fit: lora.Error."""
    state = dict(state)
    for name, layer in lora.lora_layers(model).items():
        A, B, E = keys = [f"base_model.model.{name}.lora_{part}" for part in "ABE"]
        if state.keys() >= {*keys}:
            pruned = max(0, len(layer.lora_E) - len(state[E]))  # left out of the file, zeros here
            state |= {key: F.pad(state[key], (0, 0, 0, pruned)) for key in (A, E)} | {B: F.pad(state[B], (0, pruned))}
    lora.load_lora_state_dict(model, state)


def ranks(model):
    """{layer: how many triplets it has}."""
    return {name: int(layer.kept().sum()) for name, layer in lora.lora_layers(model).items()}


if __name__ == "__main__":
    torch.manual_seed(0)
    x, model = torch.randn(64, 32), nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32))
    target = (model(x) + x @ torch.randn(32, 2) @ torch.randn(2, 32) / 8).detach()  # a change of rank 2, to be learned
    add_adalora(model, r=6)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, weight_decay=0)
    RankBudget(model, optimizer, total=300, target_r=2)  # acts after each optimizer.step()
    for step in range(300):
        loss = (model(x) - target).square().mean()
        (loss + orthogonality(model)).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 60 in (0, 59):
            print(f"step {step + 1:3}: loss {loss.item():.4f}, ranks {ranks(model)}")
