# SPDX-License-Identifier: MIT
"""Prefix-tuning: a frozen model attends to n more keys and values in every layer, and these are what learns.

    y = softmax(q [P_K ; K]ᵀ / √h) [P_V ; V]      q, K, V as the frozen layer computes them from the T real tokens
    P = tanh(E W₁ᵀ + b₁) W₂ᵀ + b₂                 while training, with hidden=m; fold_prefix keeps P, drops the rest

Dimensions: B batch, T tokens, L layers, H heads of keys and values (fewer than the queries' where they are grouped),
h head dim, w = H h; P (n, 2 L w), per token: layer 0's key, layer 0's value, layer 1's key, ... E (n, w), W₁ (m, w),
W₂ (2 L w, m). Trained: P, or E, W₁, b₁, W₂, b₂; the whole model is frozen. Queries, and outputs, are the T tokens'.

Count: 2 n L w stored. GPT-2 at n = 20: 368,640 numbers, 0.30 % of it; trained through an MLP of m = 512: 9,864,704,
27 times what is kept. Without the MLP this is P-tuning v2's deep prompt, which is also peft's default.

Where it is handed over: as `past_key_values`, as if n tokens had been read before. So the real tokens' positions start
at n, and the context is n shorter. In layers with a sliding window (Mistral, Gemma) the prefix leaves the window like
any token, and padding between the two counts too: a query `window` places further on no longer sees it. It also counts
where attention falls off with the distance in the cache (MPT): a padded row then is not what it is alone.

Why it starts from real tokens: no prefix leaves the model as it was. A key of zero still takes exp(0) of the softmax,
and its value of zero pulls the output down; only scores of -∞ would be neutral, and those have no gradient. The least
disturbing start is what the model itself computes for n tokens: then this is a hard prompt of n words. With the MLP,
W₂ and b₂ are solved for that start; the paper's code fits them by some hundred steps of Adam (its low-data recipe).

Beside its sisters: LoRA can be merged and costs nothing later; adapters compute in sequence in every block; prompt
tuning trains n embeddings before the input, P-tuning embeddings anywhere in it, made by an encoder: both act on the
input alone, and reach the keys and values of higher layers only through the lower ones. A prefix acts on each layer
directly; at inference attention has n more keys and values in each, the context is n shorter, and no layer is added.

Papers: prefix-tuning, arXiv 2101.00190, eq. 3 and section 4.3 (MLP); P-tuning v2, arXiv 2110.07602, section 3.2.
"""

import inspect
import sys
from types import SimpleNamespace

import torch
import torch.nn as nn


class Error(ValueError):
    """Wrong use of prefix-tuning; the message says what would be right."""


# ---------------------------------------------------------------------------------------------------------- mathematics


@torch.no_grad()
def fit_last_layer(mlp, E, P):
    """Makes MLP(E) = P (n, 2 L w), by b₂ and the least change of W₂: exactly if n <= m + 1, else as near as can be."""
    A, R = mlp[:2](E), P - mlp(E)  # A = tanh(E W₁ᵀ + b₁)  (n, m), and what is missing
    # ΔW₂ᵀ = (A - Ā)⁺ (R - R̄),  Δb₂ = R̄ - Ā ΔW₂ᵀ  with the tokens' means Ā and R̄: least squares, W₂ and b₂ together.
    # What the tokens share goes to b₂: carried by W₂ it would be lost as soon as the tanh's move
    change = torch.linalg.pinv(A - A.mean(0)) @ (R - R.mean(0))  # (m, 2 L w)
    mlp[2].weight += change.t()
    mlp[2].bias += R.mean(0) - A.mean(0) @ change


# ---------------------------------------------------------------------------------------------------------------- cache


class Cache:
    """For models outside transformers: the part of its DynamicCache that such a model needs."""

    def __init__(self):
        self.layers = []

    def get_seq_length(self):
        return self.layers[0].keys.size(2) if self.layers else 0

    def update(self, key, value, layer):  # (B, H, S, h)
        if layer < len(self.layers):
            past = self.layers[layer]
            key, value = torch.cat((past.keys, key), 2), torch.cat((past.values, value), 2)
        self.layers[layer : layer + 1] = [SimpleNamespace(keys=key, values=value)]
        return key, value


def in_transformers(model):
    transformers = sys.modules.get("transformers")  # a model of it has imported it
    return transformers is not None and any(isinstance(m, transformers.PreTrainedModel) for m in model.modules())


def empty_cache(model):
    if in_transformers(model):
        from transformers import DynamicCache

        return DynamicCache()  # without a config it keeps what has left a sliding window, which the mask hides
    return Cache()


def cache_name(model):
    """What the model calls its cache: past_key_values, or cache, as transformers 5.24 has it; None if it takes none."""
    takes = inspect.signature(model.forward).parameters
    return next((name for name in ("past_key_values", "cache") if name in takes), None)


@torch.no_grad()
def keys_and_values(model, ids):
    """What the model computes for the tokens `ids` (n,) at positions 0 to n - 1: (2 L, H, n, h)."""
    cache, modes = empty_cache(model), [(m, m.training) for m in model.modules()]
    model.eval()  # without dropout
    try:
        model(input_ids=ids[None].to(embeddings(model).device), use_cache=True, **{cache_name(model): cache})
    except (AttributeError, IndexError, TypeError, ValueError) as error:  # say, a layer that keeps a state instead
        raise Error(f"{type(model).__name__} does not run on a cache of keys and values alone: {error!r}") from error
    finally:
        for module, mode in modes:
            module.training = mode
    found = [t for layer in cache.layers for t in (layer.keys, layer.values)]
    shapes = {None if t is None else tuple(t.shape) for t in found}  # None: a layer that keeps a state beside the cache
    if len(shapes) != 1 or None in shapes:
        raise Error(f"the layers must leave keys and values of one shape in the cache, not {sorted(shapes, key=str)}")
    return torch.cat(found)


def embeddings(model):
    return model.get_input_embeddings().weight


# --------------------------------------------------------------------------------------------------------------- module


class PrefixTuning(nn.Module):
    """Freezes a causal LM, ours or Hugging Face's, and is called like it. Cast the model before, not after.

    n_tokens: n. hidden: width m of the MLP that makes the prefix while training; None trains the prefix itself.
    init: "vocabulary", the model's own keys and values for n tokens drawn from its vocabulary; n token ids, for those
        of these tokens; "random", N(0, 1) as in peft, or with the MLP torch's own start, as in the paper's code.
    Raises Error, with the model untouched, if there is nothing that a prefix can be put into.
    """

    def __init__(self, model, n_tokens=20, *, hidden=None, init="vocabulary"):
        super().__init__()
        for name, size in (("n_tokens", n_tokens), ("hidden", 1 if hidden is None else hidden)):
            if type(size) is not int or size < 1:
                raise Error(f"{name} must be a whole number of at least 1, not {size!r}")
        if any(isinstance(m, PrefixTuning) for m in model.modules()):
            raise Error("the model has a prefix already: wrap the model inside it, or ask for more tokens")
        takes = inspect.signature(model.forward).parameters
        if cache_name(model) is None or getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            raise Error(f"{type(model).__name__} is no causal LM that takes past_key_values")
        self.model, self.n_tokens, self.takes_positions = model, n_tokens, "position_ids" in takes
        self.check_room(n_tokens + 1)
        if isinstance(init, str) and init not in ("vocabulary", "random"):
            raise Error(f"init must be vocabulary, random or {n_tokens} token ids, not {init!r}")
        weight = embeddings(model)
        ids = torch.randint(weight.size(0), (n_tokens,)) if isinstance(init, str) else torch.as_tensor(init)
        if ids.shape != (n_tokens,) or ids.is_floating_point() or not 0 <= ids.min() <= ids.max() < weight.size(0):
            raise Error(f"init must be {n_tokens} token ids below {weight.size(0)}, not {init}")
        start = keys_and_values(model, ids)
        self.n_layer, (self.n_head, _, self.head_dim) = len(start) // 2, start.shape[1:]
        width = self.n_head * self.head_dim
        wide = dict(dtype=torch.float64 if weight.dtype == torch.float64 else torch.float32, device=weight.device)
        start = start.permute(2, 0, 1, 3).reshape(n_tokens, -1).to(**wide)  # (n, 2 L w)
        self.E = self.mlp = self.prompt_embeddings = None
        if hidden is None:
            self.prompt_embeddings = nn.Parameter(torch.randn_like(start) if init == "random" else start)
        else:
            self.E = nn.Parameter(torch.randn(n_tokens, width, **wide))
            layers = nn.Linear(width, hidden, **wide), nn.Tanh(), nn.Linear(hidden, start.size(1), **wide)
            self.mlp = nn.Sequential(*layers)
            if init != "random":
                fit_last_layer(self.mlp, self.E, start)
        model.requires_grad_(False)

    config = property(lambda self: self.model.config)
    device = property(lambda self: embeddings(self.model).device)

    def prefix(self):
        """P (n, 2 L w)."""
        if self.mlp is None:
            return self.prompt_embeddings
        with torch.autocast(self.E.device.type, enabled=False):  # in full precision, as it is folded
            return self.mlp(self.E)

    def check_checkpointing(self):
        if self.model.training and getattr(self.model, "is_gradient_checkpointing", False):
            raise Error("gradient checkpointing drops past_key_values, and with it the prefix: turn it off")

    def check_room(self, end, position_ids=None):
        config, n = getattr(self.model, "config", None), self.n_tokens
        limit = getattr(config, "n_positions", None) or getattr(config, "max_position_embeddings", None)
        if limit is None or end <= limit:
            return
        end = end if position_ids is None else int(position_ids.max()) + 1  # padding takes no position
        if end > limit:
            raise Error(f"{end - n} tokens and a prefix of {n} do not fit the model's {limit} positions")

    def fill(self, cache, rows):
        """Puts the prefix into an empty cache, for each of the rows."""
        like = embeddings(self.model)
        kv = self.prefix().to(like.dtype).view(self.n_tokens, -1, self.n_head, self.head_dim)  # (n, 2 L, H, h)
        kv = kv.permute(1, 2, 0, 3).expand(rows, -1, -1, -1, -1)  # (B, 2 L, H, n, h): a cache copies, it never writes
        for layer in range(self.n_layer):
            cache.update(kv[:, 2 * layer], kv[:, 2 * layer + 1], layer)
        return cache

    def forward(
        self, input_ids=None, *, attention_mask=None, position_ids=None, inputs_embeds=None, past_key_values=None,
        **options,
    ):  # fmt: skip
        """The model's call and output. Masks and positions are those of the real tokens: the prefix is added here.

        Without past_key_values, or with an empty cache, the prefix comes first; a cache handed back holds it already.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise Error("give either input_ids or inputs_embeds")
        self.check_checkpointing()
        B, T = (input_ids if inputs_embeds is None else inputs_embeds).shape[:2]
        cache, n = empty_cache(self.model) if past_key_values is None else past_key_values, self.n_tokens
        if cache.get_seq_length() == 0:
            self.fill(cache, B)
        end = cache.get_seq_length() + T
        if position_ids is not None:
            position_ids = position_ids + n
        if attention_mask is not None:
            if attention_mask.shape != (B, end - n):
                shape = tuple(attention_mask.shape)
                raise Error(f"attention_mask must be {(B, end - n)}, not {shape}: all tokens, and not the prefix")
            if position_ids is None and self.takes_positions:  # the real tokens', without padding, from n on
                position_ids = n + (attention_mask.long().cumsum(1) - 1).clamp(min=0)[:, -T:]  # (B, T)
            attention_mask = torch.cat((attention_mask.new_ones(B, n), attention_mask), 1)  # (B, n + past + T)
        self.check_room(end, position_ids)
        if position_ids is not None:
            options["position_ids"] = position_ids
        return self.model(
            input_ids=input_ids, inputs_embeds=inputs_embeds, attention_mask=attention_mask,
            **{cache_name(self.model): cache}, **options,
        )  # fmt: skip

    @torch.no_grad()
    def generate(self, input_ids, max_new_tokens=64, *, attention_mask=None, **options):
        """The model's own generate, after the prefix. Prompts of unequal length: padded on the left, with a mask.

        max_new_tokens is the argument's, whatever a generation_config says; the cache, which holds the prefix, is used.
        """
        if not in_transformers(self.model):  # ours calls whatever model it is handed
            return type(self.model).generate(self, input_ids, max_new_tokens, attention_mask=attention_mask, **options)
        self.check_checkpointing()
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        self.check_room(self.n_tokens + int(mask.sum(1).max()) + max_new_tokens - 1)  # the last token is not read
        # Beams and samples multiply the rows of the prompt, but not those of a cache
        places = [SimpleNamespace(**options), options.get("generation_config"), self.model.generation_config]
        keys = ("num_beams", "num_return_sequences")
        times = [next((times for at in places if (times := getattr(at, key, None))), 1) for key in keys]
        cache = self.fill(empty_cache(self.model), len(input_ids) * max(times))
        options["use_cache"] = True
        mask = torch.cat((mask.new_ones(len(mask), self.n_tokens), mask), 1)
        return self.model.generate(
            input_ids, attention_mask=mask, max_new_tokens=max_new_tokens, **{cache_name(self.model): cache}, **options
        )


# --------------------------------------------------------------------------------------------------------------- verbs


@torch.no_grad()
def fold_prefix(model):
    """Evaluates the MLP once, keeps the prefix as a parameter, drops E and the MLP. A plain prefix stays as it is."""
    if model.mlp is not None:
        model.prompt_embeddings = nn.Parameter(model.prefix().clone())
        model.E = model.mlp = None
    return model


# --------------------------------------------------------------------------------------------------------------- files


@torch.no_grad()
def prefix_state_dict(model):
    """The prefix, folded or not, under peft's name: the content of adapter_model.safetensors.

    To go on training through an MLP later, keep the named_parameters() that require a gradient instead.
    """
    return {"prompt_embeddings": model.prefix().detach()}


@torch.no_grad()
def load_prefix_state_dict(model, state):
    """The reverse, onto a PrefixTuning without an MLP. Error, with nothing loaded, if the two do not fit."""
    if model.mlp is not None:
        raise Error("a file holds the prefix, from which no MLP can be found: fold_prefix(model) first")
    if state.keys() != {"prompt_embeddings"}:
        raise Error(f"a prefix is one tensor, prompt_embeddings; the file has {', '.join(sorted(state)) or 'none'}")
    own, found = model.prompt_embeddings, state["prompt_embeddings"]
    if own.shape != found.shape or not found.is_floating_point() or found.element_size() < 2:
        raise Error(f"the prefix is {tuple(found.shape)} of {found.dtype} in the file; here it is {tuple(own.shape)}")
    own.copy_(found)


def prefix_config(model):
    """The adapter_config.json that goes with prefix_state_dict, which is a plain prefix: no projection is left."""
    width = model.n_head * model.head_dim
    return {
        "peft_type": "PREFIX_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": model.n_tokens,
        "token_dim": width, "num_attention_heads": model.n_head, "num_layers": model.n_layer,
        "num_transformer_submodules": 1, "encoder_hidden_size": width, "prefix_projection": False,
        "inference_mode": True,
    }  # fmt: skip


def prefix_arguments(config):
    """PrefixTuning's arguments, from an adapter_config.json of ours or peft's. Error for what this file does not do.

    An MLP that the prefix was trained through (prefix_projection) is in neither's file, and so not in the arguments.
    """
    if not isinstance(config, dict) or config.get("peft_type") != "PREFIX_TUNING":
        raise Error("adapter_config.json is no prefix's: its peft_type must be PREFIX_TUNING")
    for key in ("num_virtual_tokens", "token_dim", "num_attention_heads", "num_layers"):
        if type(config.get(key)) is not int or config[key] < 1:
            raise Error(f"adapter_config.json: {key} cannot be {config.get(key)!r}")
    if config["token_dim"] % config["num_attention_heads"]:
        raise Error("adapter_config.json: num_attention_heads must divide token_dim")
    for key, allowed in (
        ("task_type", [None, "CAUSAL_LM"]), ("num_transformer_submodules", [1, None]), ("modules_to_save", [None, []]),
        ("prefix_projection", [False, True]), ("init_weights", [None, "zero"]),
    ):  # fmt: skip
        if config.get(key, allowed[0]) not in allowed:
            raise Error(f"adapter_config.json: {key} = {config[key]!r} is not supported, only {allowed}")
    return {"n_tokens": config["num_virtual_tokens"]}


if __name__ == "__main__":

    class Tiny(nn.Module):
        """The least causal LM with a cache: two layers of attention, tied embeddings, no positions."""

        def __init__(self):
            super().__init__()
            self.wte, self.qkv = nn.Embedding(64, 32), nn.ModuleList(nn.Linear(32, 96) for _ in range(2))

        def get_input_embeddings(self):
            return self.wte

        def forward(self, input_ids, *, past_key_values=None, **_):
            (B, T), cache = input_ids.shape, past_key_values or Cache()
            x, past = self.wte(input_ids), cache.get_seq_length()
            mask = torch.ones(T, past + T, dtype=torch.bool).tril(past)
            for i, layer in enumerate(self.qkv):
                q, k, v = layer(x).view(B, T, 4, 24).transpose(1, 2).chunk(3, -1)  # (B, H, T, h)
                y = nn.functional.scaled_dot_product_attention(q, *cache.update(k, v, i), mask)
                x = x + y.transpose(1, 2).reshape(B, T, 32)
            return SimpleNamespace(logits=x @ self.wte.weight.t(), past_key_values=cache)

    torch.manual_seed(0)
    base, words, ids = Tiny(), torch.randint(64, (5,)), torch.randint(64, (8, 12))
    weights = [p.clone() for p in base.parameters()]
    hard = base(torch.cat((words.expand(8, 5), ids), 1)).logits[:, 5:]
    model = PrefixTuning(base, 5, init=words)
    print(f"at the start it is a prompt of 5 words: largest difference {(model(ids).logits - hard).abs().max():.1e}")
    nn.init.zeros_(model.prompt_embeddings)
    print(f"keys and values of 0 change the logits by up to {(model(ids).logits - base(ids).logits).abs().max():.1f}")

    model = PrefixTuning(base, 5, hidden=16, init=words)
    print(f"through the MLP, its last layer solved for it, just the same: {(model(ids).logits - hard).abs().max():.1e}")
    trained = [p for p in model.parameters() if p.requires_grad]
    losses = []
    for _ in range(60):
        loss = nn.functional.cross_entropy(model(ids).logits[:, :-1].transpose(1, 2), ids[:, 1:])
        for p, gradient in zip(trained, torch.autograd.grad(loss, trained)):
            p.data -= 0.3 * gradient
        losses.append(loss.item())
    same = all(torch.equal(p, old) for p, old in zip(base.parameters(), weights))
    print(f"60 steps: loss {losses[0]:.2f} -> {losses[-1]:.2f}; the base is the same, bit for bit: {same}")
    before = model(ids).logits
    same = torch.equal(fold_prefix(model)(ids).logits, before)
    stored = model.prompt_embeddings.numel()
    print(f"folded, {sum(p.numel() for p in trained):,} -> {stored:,} numbers; the output, bit for bit: {same}")
    n, n_layer, width, hidden = 20, 12, 768, 512
    mlp = n * width + (width + 1) * hidden + (hidden + 1) * 2 * n_layer * width
    print(f"GPT-2 at n = {n}: 2 n L w = {2 * n * n_layer * width:,} stored, {mlp:,} trained with hidden={hidden}")
