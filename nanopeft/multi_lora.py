# SPDX-License-Identifier: MIT
"""Several LoRA adapters on one base: each row of a batch may use its own, as in a server with many customers.

    y_i = x_i Wᵀ + b + s_i x_i A_iᵀ B_iᵀ          row i of the batch, with the adapter that row i asks for
    ΔW = Σ_k λ_k s_k B_k A_k                      adapters scaled and added: task arithmetic

    x (N, T, in) ──┬────────────── W (out, in), b ───────────────(+)── y (N, T, out)     one product for all rows
                   └── A[rows] (N, r, in) ── s B[rows] (N, out, r) ──┘                   N small ones, batched

    N rows   T tokens   rows (N,): the adapter of each row   K adapters, stacked as A (K, r, in) and B (K, out, r)

Why not merge: W + ΔW_k is another weight for each adapter. Rows would not share a product, and K copies of W would be
in memory. Unmerged, all rows share W, and switching to another adapter changes no weight.
What it costs: r (1/in + 1/out) of W's FLOPs, and each row reads its own A and B. In generation (T = 1) the time goes
into reading weights. Example: W is 4096 x 4096 in 16 bits, 33.6 MB. An adapter with r = 8 is 1/256 of it, 131 kB. 32
rows with 32 adapters read 33.6 + 32 · 0.131 = 37.7 MB, with 32 merged weights 1,074 MB. Here A[rows] copies factors,
padded with zeros to the largest rank. Punica's and S-LoRA's kernels read them where they lie.
Adding: [λ₁s₁B₁ λ₂s₂B₂] [A₁; A₂] is the sum exactly, one adapter of rank r₁ + r₂. λ < 0 is meant to unlearn. Do not
average A's and B's apart: ½ (B₁ + B₂) · ½ (A₁ + A₂) has cross terms, B₁A₂ and B₂A₁, that nobody trained. In peft's
add_weighted_adapter "cat" is the sum; "linear" adds √|λs| A and √|λs| B apart, with the cross terms.
Pitfalls: Beam search repeats each row, so repeat its name as often, side by side. Layers must get x as (N, ..., in) or
(N · T, in); experts in linear layers do not, and take one adapter for all rows.
Papers: Punica, arXiv 2310.18547; S-LoRA, arXiv 2311.03285; task arithmetic, arXiv 2212.04089.
"""

import torch
import torch.nn as nn
from torch.nn.utils.rnn import pad_sequence

try:
    from . import lora
except ImportError:  # the two files pasted side by side, or this one run
    import lora


class Error(ValueError):
    """Wrong use of several adapters; the message says what would be right."""


class MultiLoRALinear(lora.LoRALinear):
    """A frozen linear layer and K updates. LoRALinear's forward is y = base_layer(x) + update(x)."""

    def __init__(self, names, updates):  # {name: LoRALinear}; a name without one, and None (the base), have rank 0
        nn.Module.__init__(self)  # LoRALinear's own would make one A and one B
        one = next(iter(updates.values()))
        self.base_layer, self.lora_name, self.unmerged_weight, self.names = one.base_layer, one.lora_name, None, names
        A = [updates[n].lora_A if n in updates else one.lora_A[:0] for n in names]  # (r_k, in)
        B = [updates[n].scaling * updates[n].lora_B.t() if n in updates else one.lora_B.t()[:0] for n in names]
        self.register_buffer("A", pad_sequence(A, batch_first=True))  # (K, r, in)
        self.register_buffer("B", pad_sequence(B, batch_first=True).mT)  # (K, out, r), with s

    def update(self, x):
        # s x_i A_iᵀ B_iᵀ for each row i.  Where rows is (), one adapter for all, the shapes have no N
        rows = self.rows
        if rows.dim() and len(x) != len(rows) and (x.dim() != 2 or len(x) % len(rows)):
            raise Error(f"{self.lora_name} got {tuple(x.shape)} for {len(rows)} names: give one for each row")
        A, B = self.A[rows].to(x.dtype), self.B[rows].to(x.dtype)  # (N, r, in), (N, out, r)
        h = x.reshape(*rows.shape, -1, x.size(-1)) @ A.mT  # (N, T, in) @ (N, in, r) = (N, T, r)
        return (h @ B.mT).view(*x.shape[:-1], B.size(-2))  # (N, T, r) @ (N, r, out) = (N, T, out)

    @property
    def weight(self):  # W + ΔW for a model that reads it. Rows have none in common: T5 asks for this one's dtype alone
        return self.base_layer.weight.new_empty(0) if self.rows.dim() else super().weight

    def delta(self):
        delta = self.B[self.rows] @ self.A[self.rows]
        return delta if isinstance(self.base_layer, nn.Linear) else delta.t()

    def __getattr__(self, name):
        if name in ("lora_A", "lora_B"):  # merge_lora and others ask for them
            raise Error("the model has several adapters, this needs one: lora.remove_lora(model), then lora.add_lora")
        return nn.Module.__getattr__(self, name) if name in ("A", "B") else super().__getattr__(name)


# ----------------------------------------------------------------------------------------------------------------- use


@torch.no_grad()
def add_loras(model, adapters):
    """Freezes the model and puts the adapters {name: (config, state)} beside its layers, none in use. lora.remove_lora
    takes them off. config and state are lora_config's and lora_state_dict's, or what peft's two files hold."""
    options = {name: arguments(config) for name, (config, _) in adapters.items()}
    found = {}  # {layer: {adapter: its update}}
    for name, (_, state) in adapters.items():
        lora.add_lora(model, **options[name], modules_to_save=())
        try:
            lora.load_lora_state_dict(model, state)
            for layer, update in lora.lora_layers(model).items():
                if isinstance(update, lora.LoRAEmbedding):
                    raise Error(f"{layer} is an embedding: several adapters go beside linear layers only")
                found.setdefault(layer, {})[name] = update
        finally:
            lora.remove_lora(model)
    for updates in found.values():
        one = next(iter(updates.values()))
        lora.replace(model, {one.base_layer: MultiLoRALinear([*adapters, None], updates)})
    return use_loras(model, None)


def use_loras(model, names):
    """From now on all rows use the adapter of this name; with None the base; with a list row i uses names[i]."""
    layers = lora.lora_layers(model).values()
    known = next((getattr(layer, "names", []) for layer in layers), [])
    wanted = names if isinstance(names, list) else [names]
    if not wanted or not set(wanted) <= set(known):
        raise Error(f"{names!r} must be one of {known}, or a list of these; add_loras gives them to the model")
    rows = [known.index(name) for name in wanted]
    for layer in layers:
        layer.rows = torch.tensor(rows if isinstance(names, list) else rows[0], device=layer.A.device)
        layer.enabled = names is not None
    return model


def combine_loras(adapters, weights):
    """(config, state) of Σ λ_k ΔW_k, one adapter of rank Σ r_k, from [(config, state), ...] and [λ, ...]."""
    factors = {}  # {keys of A and B: [(A_k, λ s B_k), ...]}
    for (config, state), weight in zip(adapters, weights, strict=True):
        options = arguments(config)
        for key in [key for key in state if key.endswith(("lora_A.weight", "lora_embedding_A"))]:
            keys = key, "B".join(key.rsplit("A", 1))
            A, B = (state[k].to(torch.promote_types(state[k].dtype, torch.float32)) for k in keys)
            s = options["alpha"] / (len(A) ** 0.5 if options["rslora"] else len(A))
            factors.setdefault(keys, []).append((A, weight * s * B))
    r, combined = max(sum(len(A) for A, _ in pairs) for pairs in factors.values()), {}
    for keys, pairs in factors.items():
        A, B = (torch.cat(tensors, dim) for dim, tensors in enumerate(zip(*pairs)))  # (Σ r_k, in), (out, Σ r_k)
        n = r - len(A)  # zeros more, so that s = α / r = 1 in every layer
        combined |= zip(keys, (nn.functional.pad(A, (0, 0, 0, n)), nn.functional.pad(B, (0, n))))
    targets = [key.removeprefix("base_model.model.").rpartition(".lora_")[0] for key, _ in factors]
    one = {"r": r, "lora_alpha": r, "rank_pattern": {}, "use_rslora": False, "target_modules": targets}
    return adapters[0][0] | one, combined


OTHERS = (
    "alpha_pattern", "alora_invocation_tokens", "bias", "exclude_modules", "kasa_config", "layers_to_transform",
    "lora_bias", "modules_to_save", "target_parameters", "trainable_token_indices", "use_dora",
)  # fmt: skip


def arguments(config):
    """add_lora's, from adapter_config.json."""
    for key in OTHERS:
        if config.get(key) not in (None, False, "none", {}, []):
            raise Error(f"an adapter has {key} = {config[key]!r}: here it must be plain LoRA, A and B alone")
    if (init := config.get("init_lora_weights", True)) not in (True, False, None, "gaussian", "orthogonal", "eva"):
        raise Error(f"an adapter has init_lora_weights = {init!r}, which changes the base: here all have one base")
    return {"targets": config["target_modules"], "r": config["r"], "alpha": config["lora_alpha"],
            "ranks": config.get("rank_pattern"), "rslora": config.get("use_rslora", False)}  # fmt: skip


if __name__ == "__main__":
    torch.manual_seed(0)
    model, x, adapters = nn.Sequential(nn.Linear(1024, 1024)), torch.randn(32, 1024), {}
    for k in range(32):
        nn.init.normal_(lora.add_lora(model, r=1 + k % 8)[0].lora_B)
        adapters[k] = lora.lora_config(model), lora.lora_state_dict(model)
        lora.remove_lora(model)
    add_loras(model, adapters)
    apart = torch.cat([use_loras(model, k)(x[k : k + 1]) for k in adapters])
    mixed = use_loras(model, [*adapters])(x)
    print(f"32 rows in one batch, each with its own adapter, against row by row: {(mixed - apart).abs().max():.0e}")
    W, AB = 1024 * 1024, sum(t.numel() for _, state in adapters.values() for t in state.values())
    print(f"numbers to read: {W + AB:,} in W and 32 adapters, {32 * W:,} in 32 merged weights")
