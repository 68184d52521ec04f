# SPDX-License-Identifier: MIT
"""Prefix-tuning: in every attention layer of a frozen model, n trained keys and values stand before the input's own.

They belong to n virtual tokens, the same for every input. Input tokens attend to them as if they were earlier text.

    y = softmax(q [P_K ; K]ᵀ / √h) [P_V ; V]                      concatenated: how it is computed
      = (1 - λ) attention(q, K, V) + λ attention(q, P_K, P_V)     gated: the same, and what it means
    λ = Σ exp(q P_Kᵀ / √h) / (Σ exp(q P_Kᵀ / √h) + Σ exp(q Kᵀ / √h))     softmax mass on the prefix, for each query

Shapes:  B batch, T input tokens, n virtual tokens, L layers, h head dimension, H heads of keys and values, w = H h
         q, K, V (T, h) and P_K, P_V (n, h) for each head of each layer
         P (n, 2 L w) holds them all; its columns are layer 0's key, layer 0's value, layer 1's key, and so on
Trained: P itself; or, with hidden=m, an MLP that computes it: P = tanh(E W₁ᵀ + b₁) W₂ᵀ + b₂
         E (n, w), W₁ (m, w), b₁ (m), W₂ (2 L w, m), b₂ (2 L w). The whole model is frozen.

Who attends to whom, for n = 3 and T = 4. The prefix takes positions 0 to n - 1, so x_1 is at position n:

           keys  P_1 P_2 P_3 | x_1 x_2 x_3 x_4
    query x_1     1   1   1  |  1   .   .   .      Every input token sees the whole prefix, even the first one.
    query x_2     1   1   1  |  1   1   .   .      Among themselves the input tokens stay causal.
    query x_3     1   1   1  |  1   1   1   .      The prefix has no queries and attends to nothing: it is neither
    query x_4     1   1   1  |  1   1   1   1      causal nor bidirectional.

Why keys and values, but no queries? A query yields the output at its own position. For a virtual token that output
would only serve to compute its key and value in the next layer, and those are trained directly.

Worked example: a query has scores 2, 1, 0 with three input tokens; exp gives 7.39 + 2.72 + 1 = 11.11. A virtual token
with a key of zeros adds exp(0) = 1, so λ = 1 / 12.11 = 0.083. If its value is zero too, the output shrinks by 8.3 %.
Twenty such tokens take 20 / 31.11 = 64 %: zero is no neutral prefix.
Why start from real tokens? A neutral prefix would need λ near 0 for every query. But a score is linear in q: a key that
scores low for q scores high for -q. And where λ is tiny, so is the gradient, which has λ as a factor. The model's own
keys and values for n tokens disturb least: the model then does what it does after a prompt of these tokens. Loss of a
small GPT-2 (6 layers, d = 256) on 2,048 tokens of pydoc_data.topics: 3.70 without a prefix; at the start of n = 20,
3.74 from vocabulary tokens, 4.40 from zeros, 4.9 from N(0, 1).

Why an MLP? The paper found direct training of P unstable and sensitive to learning rate and initialization. The MLP
shares W₁ and W₂ among all positions, and its m hidden numbers among all layers, so that they move together. Choose it
to train generation on few examples, or when runs vary much. Leave it out otherwise: P-tuning v2 found that it harms
some tasks. It is no compression, for it is usually larger than P. After training only P is stored.
When to use it: for many tasks on one served model, since each row of a batch can have its own task's P in its row of
the cache; or with few examples, where the paper finds it ahead of full fine-tuning. Not for the lowest loss, nor where
context is scarce. The same small GPT-2 on Python's language reference, nats per token after 300 steps: untouched 3.889,
prompt tuning 3.649, prefix-tuning 3.489 (both n = 20), LoRA 3.376.
Cost:    2 n L w numbers stored. GPT-2 (L = 12, w = 768) at n = 20: 368,640, or 0.30 % of the model. Trained through an
         MLP of m = 512: 9,864,704, 27 times as many. Backward still runs through every layer of the frozen model.
         Inference: in each layer the KV cache is n positions longer (here 0.74 MB per row in 16 bits), each query has
         n more keys, and the context is n shorter. No merging: λ depends on the query, a change of weights does not.
Limit:   for given q and K, a head's weights on the input are all multiplied by 1 - λ: which input tokens it prefers to
         which stays as it was (arXiv 2310.19698). LoRA on queries or keys changes that. From the second layer on q and
         K come from outputs that the prefix has changed, so a prefix changes it there too, indirectly.
Typical: n = 10 (table to text) to 200 (summaries), m = 512 to 800. Learning rate 5e-5 through the MLP (the paper and
         its code), where one weight moves all of P. Without it, Adam moves each number of P by about the rate a step,
         so fewer steps need a higher rate: 5e-3 over many epochs (P-tuning v2), 0.1 for the 300 steps above.
Pitfalls:
  - An attention mask needs n ones in front, positions count on from n, labels stay as they are: `forward` sees to it.
  - With RoPE, P_K is what the cache holds, keys after rotation, never rotated again: positions only shift the input.
  - A cache grows in place, so each call needs a fresh one. Gradient checkpointing drops it: refused here.
  - With grouped-query attention, H is the number of key and value heads, which is smaller than that of queries.
  - Training cannot go on through the MLP from the stored P. For that, keep E and the MLP.
  - A sliding window (Mistral, Gemma) slides past the prefix: in a longer text, later tokens no longer see it. Left
    padding counts in the window too, as in peft: pad on the right, or keep prefix, padding and text within it.
  - MPT measures distance in the cache, padding included: there a padded row differs from the row alone. Do not pad.
Relatives, all in one table in nanopeft/__init__.py:
  - Prompt tuning: n trained embeddings before the input. Every layer computes its keys and values from them.
  - P-tuning v1: such embeddings anywhere in the input, computed by an LSTM or MLP.
  - P-tuning v2: this, mostly without the MLP, and with a classifier on top, for language understanding.
  - Adapters: new layers in series. The gated form is an adapter in parallel: bottleneck n, softmax as nonlinearity.
  - LoRA: changes weights. Once merged it costs no time and no context.

Papers: arXiv 2101.00190, eq. 3, section 4.3 (MLP); gated form 2110.04366, eq. 7-9; P-tuning v2 2110.07602, section 3.2
"""

import copy
import functools
import inspect
import math

import torch
import torch.nn as nn


class Error(ValueError):
    """Wrong use of prefix-tuning; the message says what would be right."""


def scores(q, K):
    """q Kᵀ / √h, and -∞ after the query. The T queries q (..., T, h) stand at the last positions of K (..., S, h)."""
    T, S = q.size(-2), K.size(-2)
    seen = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)  # the diagram above, with S = n + T
    return (q @ K.mT / math.sqrt(q.size(-1))).masked_fill(~seen, -math.inf)  # (..., T, S)


def attention(q, K, V):
    """softmax(q Kᵀ / √h) V, causal."""
    return scores(q, K).softmax(-1) @ V  # (..., T, h)


def prefix_attention(q, K, V, P_K, P_V):
    """Attention to the prefix and the input: q, K, V (..., T, h); P_K, P_V (..., n, h)."""
    return attention(q, torch.cat((P_K, K), -2), torch.cat((P_V, V), -2))  # (..., T, h)


def gated_attention(q, K, V, P_K, P_V):
    """The same as prefix_attention, written as a gate between two attentions. Returns y and the gate λ (..., T, 1)."""
    on_prefix, on_input = scores(q, torch.cat((P_K, K), -2)).split((P_K.size(-2), K.size(-2)), -1)  # (..., T, n or T)
    # λ = a / (a + b) = sigmoid(log a - log b), where no exp can overflow
    gate = (on_prefix.logsumexp(-1, keepdim=True) - on_input.logsumexp(-1, keepdim=True)).sigmoid()
    return (1 - gate) * (on_input.softmax(-1) @ V) + gate * (on_prefix.softmax(-1) @ P_V), gate


class PrefixTuning(nn.Module):
    """Freezes a causal LM, ours or Hugging Face's, and is called like it. P is fp32: cast the LM before, compile after.
    The concatenation is the model's own: a layer that finds P_K and P_V in its KV cache puts K and V behind them.
    n_tokens: n. hidden: m, the width of the MLP that computes the prefix while training; None trains the prefix itself.
    init: "vocabulary" or n token ids, the model's own keys and values for n tokens, drawn from its vocabulary or given;
        "random", N(0, 1) as in peft, or with an MLP torch's own start as in the paper's code.
    """

    def __init__(self, model, n_tokens=20, *, hidden=None, init="vocabulary"):
        super().__init__()
        wrappers = {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
        if any(isinstance(m, PrefixTuning) for m in model.modules()) or wrappers & model._modules.keys():
            raise Error("the model is wrapped or has a prefix already: wrap the plain one, then compile or parallelize")
        headless = hasattr(model, "get_output_embeddings") and model.get_output_embeddings() is None
        tables = [m for key, m in model.named_modules() if "position" in key and isinstance(m, nn.Embedding)]
        if headless or any(table.padding_idx is not None for table in tables):
            raise Error(f"{type(model).__name__} has no language model's head, or counts positions from padding_idx on")
        for name, size in (("n_tokens", n_tokens), ("hidden", 1 if hidden is None else hidden)):
            if type(size) is not int or size < 1:
                raise Error(f"{name} must be a whole number of at least 1, not {size!r}")
        self.model, self.n_tokens, self.takes = model, n_tokens, set(inspect.signature(model.forward).parameters)
        self.cache_name = "past_key_values" if "past_key_values" in self.takes else "cache"  # from transformers 5.24 on
        check_call(self, n_tokens + 1)
        V, drawn = len(model.get_input_embeddings().weight), init in ("vocabulary", "random")
        ids = torch.randint(V, (n_tokens,)) if drawn else torch.as_tensor([] if isinstance(init, str) else init)
        if ids.shape != (n_tokens,) or ids.is_floating_point() or not 0 <= ids.min() <= ids.max() < V:
            raise Error(f"init must be {n_tokens} token ids below {V}, vocabulary or random, not {init!r}")
        start, self.empty_cache = keys_and_values(model, ids, self.cache_name)  # (2 L, H, n, h)
        self.n_layer, self.n_head, self.head_dim = len(start) // 2, start.size(1), start.size(3)
        start = start.permute(2, 0, 1, 3).flatten(1).to(torch.promote_types(start.dtype, torch.float32))  # (n, 2 L w)
        self.E = self.mlp = self.prompt_embeddings = None
        if hidden is None:
            self.prompt_embeddings = nn.Parameter(torch.randn_like(start) if init == "random" else start)  # P
        else:
            w, like = self.n_head * self.head_dim, dict(dtype=start.dtype, device=start.device)
            self.E = nn.Parameter(torch.randn(n_tokens, w, **like))
            W1, W2 = nn.Linear(w, hidden, **like), nn.Linear(hidden, start.size(1), **like)
            self.mlp = nn.Sequential(W1, nn.Tanh(), W2)
            if init != "random":
                fit_last_layer(self.mlp, self.E, start)
        model.requires_grad_(False)

    def prefix(self):  # P (n, 2 L w)
        if self.mlp is None:
            return self.prompt_embeddings
        with torch.autocast(self.E.device.type, enabled=False):  # in full precision, as it is stored
            return self.mlp(self.E)

    def put_prefix_into(self, cache, B):
        """Gives each layer its P_K and P_V (B, H, n, h), the same in all B rows, as if the model had read n tokens."""
        P = self.prefix().to(self.model.get_input_embeddings().weight.dtype)  # (n, 2 L w)
        P = P.view(self.n_tokens, -1, self.n_head, self.head_dim).permute(1, 2, 0, 3)  # (2 L, H, n, h)
        pairs = [p.expand(B, -1, -1, -1) for p in P.unbind()]  # not copied for each row: a cache only reads it
        for layer in range(self.n_layer):
            cache.update(pairs[2 * layer], pairs[2 * layer + 1], layer)
        return cache

    def forward(self, input_ids=None, *, attention_mask=None, position_ids=None, inputs_embeds=None,
                past_key_values=None, labels=None, **options):  # fmt: skip
        """The model's call and output. Masks, positions and labels are the input's: the prefix is added here. It comes
        first without past_key_values, or with an empty cache; a cache handed back holds it already."""
        if (input_ids is None) == (inputs_embeds is None):
            raise Error("give either input_ids or inputs_embeds")
        if position_ids is not None and attention_mask is None and (position_ids.diff() != 1).any():
            raise Error("beside a prefix the examples of a packed row would see one another: pad the rows instead")
        B, T = (input_ids if inputs_embeds is None else inputs_embeds).shape[:2]
        cache, n = self.empty_cache() if past_key_values is None else past_key_values, self.n_tokens
        if getattr(cache, "is_compileable", False):
            raise Error("a static cache has no room for the prefix: leave out cache_implementation")
        if cache.get_seq_length() == 0:
            self.put_prefix_into(cache, B)
        S = cache.get_seq_length() + T  # the prefix, what was read before, and the input
        if attention_mask is not None:
            if attention_mask.shape != (B, S - n):
                raise Error(f"attention_mask must be {(B, S - n)}, not {tuple(attention_mask.shape)}: without prefix")
            if position_ids is None and "position_ids" in self.takes:  # counted without padding
                position_ids = (attention_mask.long().cumsum(1) - 1).clamp(min=0)[:, -T:]  # (B, T)
            attention_mask = torch.cat((attention_mask.new_ones(B, n), attention_mask), 1)  # (B, S)
        if position_ids is not None:
            options["position_ids"] = position_ids = position_ids + n
        check_call(self, S, position_ids)
        options |= {self.cache_name: cache, "attention_mask": attention_mask, "labels": labels}
        return self.model(input_ids=input_ids, inputs_embeds=inputs_embeds, **options)

    def generate(self, input_ids, max_new_tokens=None, **options):
        """The model's own generate, with its options and defaults; lengths count input_ids and new tokens, not P."""
        if max_new_tokens is not None:
            options["max_new_tokens"] = max_new_tokens
        cache, mask = options.get("past_key_values"), options.get("attention_mask")
        if cache is not None and cache.get_seq_length() and (mask is None or mask.shape == input_ids.shape):
            raise Error("a cache holds the text before: give the new ids alone, and the attention_mask of all text")
        if hasattr(self.model, "generation_config"):
            options["use_cache"] = True  # which holds the prefix
        # By a shallow copy, which shares the weights, and calls `self` where it would call the model
        caller = copy.copy(self.model)
        caller.forward = functools.wraps(self.model.forward)(lambda *args, **inputs: self(*args, **inputs))
        caller._forward_pre_hooks = caller._forward_hooks = {}  # `self` runs the model's own
        return caller.generate(input_ids, **options)

    def state_dict(self, *, prefix="", **options):
        """A tied weight is stored twice: transformers' Trainer saves by safetensors, which refuses shared memory."""
        state = super().state_dict(prefix=prefix, **options)
        tied = dict(self.named_parameters(remove_duplicate=False)).keys() - dict(self.named_parameters()).keys()
        for key in {prefix + name for name in tied} & state.keys():
            state[key] = state[key].clone()
        return state

    def __getattr__(self, name):  # what Trainer asks for; save_pretrained would leave out P
        names = "config", "device", "loss_type", "activation_checkpointing_enable", "gradient_checkpointing_enable"
        return getattr(self.model, name) if name in names else super().__getattr__(name)

    accepts_loss_kwargs = property(lambda self: getattr(self.model, "accepts_loss_kwargs", "kwargs" in self.takes))


@torch.no_grad()
def fold_prefix(model):
    """Discards the reparametrization: P is computed once and kept, E and the MLP go. Without an MLP nothing changes."""
    if (tuned := find_tuned(model)).mlp is not None:
        tuned.prompt_embeddings = nn.Parameter(tuned.prefix().detach())
        tuned.E = tuned.mlp = None
    return model


def prefix_state_dict(model):
    """P, from an MLP or not, under peft's name: the content of adapter_model.safetensors."""
    return {"prompt_embeddings": find_tuned(model).prefix().detach()}


@torch.no_grad()
def load_prefix_state_dict(model, state):
    """Loads P into a PrefixTuning without an MLP. Error, with nothing loaded, if the two do not fit."""
    model = find_tuned(model)
    if model.mlp is not None:
        raise Error("a file holds the prefix, from which no MLP can be found: fold_prefix(model) first")
    own, found = model.prompt_embeddings, state.get("prompt_embeddings", torch.empty(0))
    if len(state) != 1 or own.shape != found.shape or not found.is_floating_point() or found.element_size() < 2:
        there = {name: (*t.shape, t.dtype) for name, t in state.items()}
        raise Error(f"a prefix is one tensor, here prompt_embeddings {tuple(own.shape)}; the file has {there}")
    own.copy_(found)


def prefix_config(model):
    """The adapter_config.json that goes with it. In peft's words, the MLP is a "projection", and none is left."""
    model = find_tuned(model)
    width = model.n_head * model.head_dim
    return dict(
        peft_type="PREFIX_TUNING", task_type="CAUSAL_LM", num_virtual_tokens=model.n_tokens, token_dim=width,
        num_attention_heads=model.n_head, num_layers=model.n_layer, num_transformer_submodules=1,
        encoder_hidden_size=width, prefix_projection=False, inference_mode=True,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ plumbing


def find_tuned(model):
    """The PrefixTuning inside torch.compile, DDP or what else wraps it. Error if there is none, or if it is sharded."""
    if any(p.requires_grad and p.shape == (0,) for p in model.parameters()):
        raise Error("the parameters are sharded, and here have no elements: do this inside `with engine.whole():`")
    found = [m for m in model.modules() if isinstance(m, PrefixTuning)]
    if not found:
        raise Error("the model has no virtual tokens: wrap it first")
    return found[0]


def check_call(tuned, end, position_ids=None):  # end: one after the last position
    model, n, config = tuned.model, tuned.n_tokens, getattr(tuned.model, "config", None)
    limit = getattr(config, "n_positions", None) or getattr(config, "max_position_embeddings", None) or math.inf
    if end > limit and position_ids is not None:
        end = int(position_ids.max()) + 1  # padding takes no position
    if end > limit:
        raise Error(f"{end - n} tokens and a prefix of {n} do not fit the model's {limit} positions")
    checkpoints = "gradient_checkpointing", "_checkpoint_wrapped_module"  # of transformers, of torch
    if model.training and any(getattr(m, name, False) for m in model.modules() for name in checkpoints):
        raise Error("gradient checkpointing drops past_key_values, and with it the prefix: turn it off")


@torch.no_grad()
def keys_and_values(model, ids, cache_name):
    """The keys and values of the tokens `ids` (n,) at positions 0 to n - 1, (2 L, H, n, h), and the cache's class."""
    training = [m for m in model.modules() if m.training]
    model.eval()  # without dropout
    ids = ids.to(model.get_input_embeddings().weight.device)
    try:
        kind = type(model(input_ids=ids[None, :1], use_cache=True).past_key_values)
        cache = kind()  # without a config it keeps all tokens; a mask hides those out of a window
        model(input_ids=ids[None], use_cache=True, **{cache_name: cache})
        pairs = [(layer.keys, layer.values) if hasattr(layer, "keys") else layer for layer in cache.layers]
        found = torch.cat([t for pair in pairs for t in pair])
        if found.shape[2:-1] != ids.shape:
            raise Error(f"{tuple(found.shape)} for {len(ids)} tokens")
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:  # say, a state space model
        raise Error(f"{type(model).__name__} is no causal LM that caches keys and values of one shape") from error
    finally:
        for module in training:
            module.training = True
    return found, kind


@torch.no_grad()
def fit_last_layer(mlp, E, P):
    """Solves for W₂ and b₂ so that MLP(E) = P, with the least change of W₂. Exact if n <= m + 1, else least squares."""
    A, R = mlp[:2](E), P - mlp(E)  # A = tanh(E W₁ᵀ + b₁) (n, m), and what is missing (n, 2 L w)
    # ΔW₂ᵀ = (A - Ā)⁺ (R - R̄),  Δb₂ = R̄ - Ā ΔW₂ᵀ  with means Ā, R̄ over the n tokens
    # The part of R that all n tokens share goes into b₂. In W₂ it would depend on A, and change as W₁ and E are trained
    change = torch.linalg.pinv(A - A.mean(0)) @ (R - R.mean(0))  # (m, 2 L w)
    mlp[2].weight += change.t()
    mlp[2].bias += R.mean(0) - A.mean(0) @ change


if __name__ == "__main__":
    torch.manual_seed(0)
    K = torch.tensor([[2.0], [1.0], [0.0]])  # with q = 1 and h = 1 these are the last query's scores
    for n in (1, 20):
        y, gate = gated_attention(torch.ones(3, 1), K, K, torch.zeros(n, 1), torch.zeros(n, 1))
        print(f"scores 2, 1, 0 and {n} keys of zeros: softmax mass on the prefix {gate[-1].item():.3f}")
    q, K, V = torch.randn(3, 6, 8)
    P = torch.randn(2, 4, 8)  # P_K and P_V
    apart = (gated_attention(q, K, V, *P)[0] - prefix_attention(q, K, V, *P)).abs().max()
    print(f"gated and concatenated are {apart:.0e} apart")
