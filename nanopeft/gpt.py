# SPDX-License-Identifier: MIT
"""GPT-2 in plain PyTorch, under GPT-2's own names and Hugging Face's calling convention.

    x = wte[ids] + wpe[positions]                     token and position embedding
    x = x + attn(ln_1(x));  x = x + mlp(ln_2(x))      n_layer times: a pre-LN decoder block
    logits = ln_f(x) @ wte.T                          the head is the embedding again ("tied")

    loss = mean over labelled rows of  logsumexp(logits) - logits[label]

Dimensions: B batch, T new positions, S = past + T positions attended to, d = n_embd, H = n_head, V = vocab_size.
Linear weights are nn.Linear's (out, in); GPT-2's checkpoints hold them transposed ("Conv1D") and are turned on the way.
There is no dropout in the model: checkpoints are written with all three rates at 0.

Papers: GPT-2 (Radford et al. 2019); attention, arXiv 1706.03762, eq. 1; GELU by tanh, arXiv 1606.08415, section 2.
"""

import json
import math
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

HUB = {
    "gpt2": "openai-community/gpt2", "gpt2-medium": "openai-community/gpt2-medium",
    "gpt2-large": "openai-community/gpt2-large", "gpt2-xl": "openai-community/gpt2-xl",
    "distilgpt2": "distilbert/distilgpt2",
}  # fmt: skip


CHUNK = 1 << 17  # logits for each core: in 32 bits, twice, they stay in its L2 cache


class Error(ValueError):
    """A base or an input that cannot be used; the message says what would be right."""


class Output(NamedTuple):
    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: Any = None


# ---------------------------------------------------------------------------------------------------------------- loss


class ChunkedLoss(torch.autograd.Function):
    """Sum of the rows' cross-entropies under head(x), never holding more than `rows` rows of logits.

    The gradient of a row's cross-entropy in its logits z is softmax(z) - onehot(label): nothing from above is needed
    but a factor. So each chunk goes through the head and back at once, and d loss/dx and d loss/d(the head's
    parameters) are what is kept for backward. The head is called, not read: any module will do whose backward does not
    need its output, for dz is written over it (autograd refuses others, such as a tanh at the end).
    """

    @staticmethod
    def forward(ctx, head, rows, need_grad, labels, x, *weights):
        loss = torch.zeros((), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        # Summed in 32 bits: over many chunks bf16 would lose digits and fp16 overflow
        gradients = [torch.zeros_like(t, dtype=loss.dtype) for t in (x, *weights)] if need_grad else []
        for index in (labels != -100).nonzero()[:, 0].split(rows):
            with torch.set_grad_enabled(need_grad):
                chunk = x.detach()[index].requires_grad_(need_grad)  # (rows, d), cut off from what made x
                logits = head(chunk)  # (rows, V)
            # A few rows at a time, what follows finds them in the cache: on GPT-2's 50,257 tokens 0.7 times the time
            few = max(1, CHUNK * torch.get_num_threads() // logits.size(1)) if x.is_cpu else rows
            for z, target in zip(logits.detach().split(few), labels[index, None].split(few)):
                log_p = F.log_softmax(z, -1, dtype=loss.dtype)  # (few, V)
                loss -= log_p.gather(1, target).sum()
                if need_grad:
                    # dz = softmax(z) - onehot(label); the mean's 1/n waits for backward, where fp16 has room for it
                    z.copy_(log_p.exp_().scatter_add_(1, target, torch.full_like(target, -1, dtype=loss.dtype)))
            if need_grad:
                dx, *dw = torch.autograd.grad(logits, (chunk, *weights), logits.detach(), allow_unused=True)
                gradients[0][index] = dx.to(loss.dtype)
                for total, part in zip(gradients[1:], dw, strict=True):
                    if part is not None:
                        # In pieces: torch would first copy a part of another type, 86 ms instead of 14 on GPT-2's head
                        for t, p in zip(*(torch.atleast_1d(t).split(1024) for t in (total, part))):
                            t += p
            logits = z = dx = dw = part = p = None  # before the next chunk comes on top of them
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    def backward(ctx, scale):
        if torch.is_grad_enabled():  # create_graph: what was saved is a constant to autograd, and would count as one
            raise Error("the loss in chunks has no second derivative: take it from the logits, without labels")
        # autograd rounds each to its tensor's type
        return None, None, None, None, *(g * scale for g in ctx.saved_tensors)


@torch.compiler.disable
def chunked_loss(head, x, labels, rows):
    """Mean cross-entropy of head(x) (n, V) against labels (n,), over the rows whose label is not -100; 0 if none is."""
    weights = [p for p in head.parameters() if p.requires_grad]
    need_grad = torch.is_grad_enabled() and (x.requires_grad or len(weights) > 0)
    total = ChunkedLoss.apply(head, rows, need_grad, labels, x, *weights)
    return total / (labels != -100).sum().clamp(min=1)


# --------------------------------------------------------------------------------------------------------------- model


class Cache:
    """Keys and values (B, H, S, d/H) of each layer, with the two methods of transformers' DynamicCache used here."""

    def __init__(self):
        self.layers = []

    def get_seq_length(self):
        return self.layers[0][0].size(2) if self.layers else 0

    def update(self, key, value, layer):
        if layer == len(self.layers):
            self.layers.append((key, value))
        else:
            k, v = self.layers[layer]
            self.layers[layer] = torch.cat((k, key), 2), torch.cat((v, value), 2)
        return self.layers[layer]


class Linear(nn.Linear):
    """nn.Linear, (..., in) to (..., out). In bf16 on a CPU few rows go as W xᵀ: generation takes 0.77 of the time."""

    def forward(self, x):
        rows = x.reshape(-1, x.size(-1))  # (n, in)
        if x.dtype != torch.bfloat16 or not x.is_cpu or len(rows) > 16:
            return super().forward(x)
        W = self.weight
        y = torch.mv(W, rows[0])[None] if len(rows) == 1 else (W @ rows.t()).t().contiguous()  # (n, out)
        y = y if self.bias is None else y + self.bias
        return y.view(*x.shape[:-1], len(W))


class Attention(nn.Module):
    def __init__(self, n_embd, n_head, layer):
        super().__init__()
        self.n_head, self.layer = n_head, layer
        self.c_attn = Linear(n_embd, 3 * n_embd)
        self.c_proj = Linear(n_embd, n_embd)

    def forward(self, x, mask, cache):
        B, T, d = x.shape
        q, k, v = (
            t.view(B, T, self.n_head, -1).transpose(1, 2)  # (B, H, T, d/H)
            for t in self.c_attn(x).split(d, dim=-1)
        )
        if cache is not None:
            k, v = cache.update(k, v, self.layer)  # (B, H, S, d/H)
        # softmax(q k' / sqrt(d/H)) v, each position seeing itself and what is before it
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None and T > 1)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, d))


class MLP(nn.Module):
    def __init__(self, n_embd):
        super().__init__()
        self.c_fc = Linear(n_embd, 4 * n_embd)
        self.c_proj = Linear(4 * n_embd, n_embd)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, n_embd, n_head, epsilon, layer):
        super().__init__()
        self.ln_1 = nn.LayerNorm(n_embd, epsilon)
        self.attn = Attention(n_embd, n_head, layer)
        self.ln_2 = nn.LayerNorm(n_embd, epsilon)
        self.mlp = MLP(n_embd)

    def forward(self, x, mask=None, cache=None):
        x = x + self.attn(self.ln_1(x), mask, cache)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """GPT-2 with random weights, by default in the shape of the embedded base; see `from_pretrained`."""

    def __init__(
        self, *, vocab_size=3072, n_positions=512, n_embd=256, n_layer=6, n_head=4, layer_norm_epsilon=1e-5,
        bos_token_id=None, eos_token_id=None,
    ):  # fmt: skip
        super().__init__()
        if n_embd % n_head:
            raise Error(f"n_head must divide n_embd, and {n_head} does not divide {n_embd}")
        self.config = SimpleNamespace(  # under the names of Hugging Face's config.json
            model_type="gpt2", vocab_size=vocab_size, n_positions=n_positions, n_embd=n_embd, n_layer=n_layer,
            n_head=n_head, layer_norm_epsilon=layer_norm_epsilon,
            bos_token_id=vocab_size - 1 if bos_token_id is None else bos_token_id,
            eos_token_id=vocab_size - 1 if eos_token_id is None else eos_token_id,
        )  # fmt: skip
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(vocab_size, n_embd),
                "wpe": nn.Embedding(n_positions, n_embd),
                "h": nn.ModuleList(Block(n_embd, n_head, layer_norm_epsilon, i) for i in range(n_layer)),
                "ln_f": nn.LayerNorm(n_embd, layer_norm_epsilon),
            }
        )
        self.lm_head = Linear(n_embd, vocab_size, bias=False)
        self.tie_weights()
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif "ln_" not in name:
                # Each residual branch is scaled so that the sum of all 2 * n_layer keeps its size with depth.
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * n_layer) if "c_proj" in name else 0.02)

    def tie_weights(self):
        self.lm_head.weight = self.transformer.wte.weight

    def get_input_embeddings(self):
        return self.transformer.wte

    def get_output_embeddings(self):
        return self.lm_head

    @property
    def device(self):
        return self.transformer.wte.weight.device

    def forward(
        self, input_ids=None, *, attention_mask=None, position_ids=None, past_key_values=None, inputs_embeds=None,
        labels=None, use_cache=False, logits_to_keep=0,
    ):  # fmt: skip
        """Hugging Face's call.

        input_ids (B, T) int64, or inputs_embeds (B, T, d). attention_mask (B, S), 1 for a real position and 0 for
        padding on either side: positions then count the real tokens only, and a padded row gives what it gives alone.
        past_key_values: a `Cache` (or transformers' DynamicCache), extended in place. labels (B, T) int64, unshifted:
        position t is scored on labels[t + 1], and -100 is left out. With labels, loss is given and logits is None;
        without, logits (B, T, V), or those of the last `logits_to_keep` positions.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise Error("give either input_ids or inputs_embeds")
        x = self.transformer.wte(input_ids) if inputs_embeds is None else inputs_embeds  # (B, T, d)
        T = x.size(1)
        cache = Cache() if use_cache and past_key_values is None else past_key_values
        past = 0 if cache is None else cache.get_seq_length()
        if attention_mask is not None and attention_mask.size(1) != past + T:
            raise Error(f"attention_mask is {attention_mask.size(1)} wide, not {past + T}: it covers the past as well")
        if position_ids is None:
            if attention_mask is None:
                position_ids = torch.arange(past, past + T, device=x.device)  # (T,)
            else:
                position_ids = (attention_mask.long().cumsum(1) - 1).clamp(min=0)[:, -T:]  # (B, T)
            limit = self.config.n_positions
            if past + T > limit and position_ids.max() >= limit:  # in this order: max() makes the host wait for a GPU
                raise Error(f"{position_ids.max() + 1} tokens do not fit the model's {limit} positions")
        x = x + self.transformer.wpe(position_ids)

        mask = None  # plain causal attention, which SDPA does by itself unless there is a past
        if attention_mask is not None or (past and T > 1):
            mask = torch.ones(T, past + T, dtype=torch.bool, device=x.device).tril(past)  # (T, S)
            if attention_mask is not None:
                # A padding position sees at least itself: a softmax over nothing would be NaN.
                itself = torch.eye(T, past + T, dtype=torch.bool, device=x.device).roll(past, 1)
                mask = mask & attention_mask[:, None, None].bool() | itself  # (B, 1, T, S)

        for block in self.transformer.h:
            x = block(x, mask, cache)
        x = self.transformer.ln_f(x)
        if labels is None:
            return Output(logits=self.lm_head(x[:, -logits_to_keep:]), past_key_values=cache)
        hidden, labels = x[:, :-1].reshape(-1, x.size(-1)), labels[:, 1:].reshape(-1)
        # Chunks that fit a cache, but of enough rows to be worth fetching the head for
        rows = max(256, (1 << 21) // self.config.vocab_size)
        return Output(loss=chunked_loss(self.lm_head, hidden, labels, rows), past_key_values=cache)

    def generate(self, input_ids, max_new_tokens=64, **options):
        return generate(self, input_ids, max_new_tokens, **options)

    # ------------------------------------------------------------------------------------------------------- files

    @classmethod
    def from_pretrained(cls, name_or_dir="nano", dtype=torch.float32):
        """The embedded base ("nano"), a folder in Hugging Face's GPT-2 format, or one of HUB by name."""
        folder = find_checkpoint(name_or_dir)
        path = folder / "model.safetensors"
        if not os.path.isfile(path):  # a pipe would be waited for
            raise Error(f"{path}: no such file")
        with torch.device("meta"):  # shapes without memory, until the file's tensors are put in their place
            model = cls(**read_config(folder / "config.json"))
        state = {}
        try:
            with safe_open(path, "pt") as file:
                stored = {key.removeprefix("transformer."): key for key in file.keys()}
            for key, p in model.named_parameters():
                name = stored.pop(key.removeprefix("transformer."), None)
                if name is None:
                    raise Error(f"{path} has no tensor {key}")
                # Opened for each tensor: closing unmaps the file's pages, so that memory never holds the model twice
                with safe_open(path, "pt") as file:
                    tensor = file.get_tensor(name)
                    fits = tensor.is_floating_point() and tensor.element_size() > 1  # 8 bits would need a scale
                    if tensor.shape != (p.shape[::-1] if is_conv1d(key) else p.shape) or not fits:
                        found = f"{name} {list(tensor.shape)} of {tensor.dtype}"
                        raise Error(f"{path} has {found}, which does not fit config.json")
                    tensor = tensor.t() if is_conv1d(key) else tensor
                    state[key] = torch.empty(p.shape, dtype=dtype).copy_(tensor)
        except (SafetensorError, OSError) as error:
            raise Error(f"{path} cannot be read as safetensors: {error}") from None
        # Older checkpoints carry the causal mask, and some the tied head; anything else, say a layer more, is a mistake
        known = (".attn.bias", ".attn.masked_bias", "lm_head.weight")
        left = [name for name in stored.values() if not name.endswith(known)]
        if left:
            raise Error(f"{path} has tensors that config.json has no place for: {', '.join(left[:3])}")
        model.load_state_dict(state, assign=True, strict=False)
        model.tie_weights()
        return model

    def save_pretrained(self, folder):
        """Writes config.json and model.safetensors, as transformers' GPT2LMHeadModel reads them."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "architectures": ["GPT2LMHeadModel"], "activation_function": "gelu_new", "n_inner": None,
            "embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "tie_word_embeddings": True,
            "dtype": str(self.transformer.wte.weight.dtype).removeprefix("torch."), **vars(self.config),
        }  # fmt: skip
        state = self.state_dict()
        del state["lm_head.weight"]  # it is wte's
        state = {key: (t.t() if is_conv1d(key) else t).contiguous() for key, t in state.items()}
        # Each file is replaced whole: a run that dies here leaves the old one or the new one.
        save_file(state, folder / "model.safetensors.new", metadata={"format": "pt"})
        (folder / "config.json.new").write_text(json.dumps(config, indent=2) + "\n")
        for file in ("model.safetensors", "config.json"):
            os.replace(folder / f"{file}.new", folder / file)


def is_conv1d(key):
    """Whether GPT-2's checkpoints hold this weight as a Conv1D, that is (in, out)."""
    return key.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))


def find_checkpoint(name_or_dir):
    """The folder of a base: config.json, model.safetensors and, mostly, vocab.json and merges.txt."""
    if name_or_dir == "nano":
        return Path(__file__).parent / "base"
    if name_or_dir in HUB and not os.path.isdir(name_or_dir):
        files = ["config.json", "model.safetensors", "vocab.json", "merges.txt"]
        try:
            from huggingface_hub import snapshot_download
            from huggingface_hub.errors import HTTPError  # of its HTTP client, whichever that is

            return Path(snapshot_download(HUB[name_or_dir], allow_patterns=files))
        except ImportError:
            where = "is on the Hugging Face hub: pip install 'nanopeft[hub]'"
        except (OSError, ValueError, HTTPError) as error:
            where = f"cannot be fetched from the Hugging Face hub ({type(error).__name__}): go online"
        raise Error(f"{name_or_dir} {where}, or give a folder that holds {', '.join(files)}")
    folder = Path(name_or_dir)
    if not os.path.isfile(folder / "config.json"):  # Path.is_file raises if the name is too long
        known = ", ".join(HUB)
        raise Error(f"no base {str(folder)!r}: give nano, a folder with config.json and model.safetensors, or {known}")
    return folder


def read_config(path):
    """The arguments of GPT from a config.json; what this GPT does not do is refused."""
    try:
        config = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise Error(f"{path} is no JSON file: {error}") from None
    if not isinstance(config, dict) or config.get("model_type") != "gpt2":
        raise Error(f"{path}: this is a GPT-2; model_type must be 'gpt2'")

    sizes = {"vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12}
    for key, default in sizes.items():
        sizes[key] = config.get(key, default)
        most = 1000 if key == "n_layer" else 1 << 20  # layers are built before the file is read
        if type(sizes[key]) is not int or not 0 < sizes[key] <= most:
            raise Error(f"{path}: {key} must be an integer from 1 to {most}, not {sizes[key]!r}")
    required = {
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"), "n_inner": (None, 4 * sizes["n_embd"]),
        "scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,), "tie_word_embeddings": (True,),
    }  # fmt: skip
    for key, allowed in required.items():
        if config.get(key, allowed[0]) not in allowed:
            raise Error(f"{path}: {key} must be {' or '.join(map(repr, allowed))}, not {config[key]!r}")
    epsilon = config.get("layer_norm_epsilon", 1e-5)
    if type(epsilon) is not float or not 0 < epsilon < math.inf:
        raise Error(f"{path}: layer_norm_epsilon must be a positive float, not {epsilon!r}")
    tokens = {key: config.get(key, sizes["vocab_size"] - 1) for key in ("bos_token_id", "eos_token_id")}
    for key, token in tokens.items():
        if type(token) is not int or token < 0:
            raise Error(f"{path}: {key} must be the number of a token, not {token!r}")
    return {**sizes, "layer_norm_epsilon": epsilon, **tokens}


# ---------------------------------------------------------------------------------------------------------- generation


@torch.no_grad()
def generate(
    model, input_ids, max_new_tokens=64, *, attention_mask=None, temperature=0.0, top_k=None, eos_token_id=None,
    generator=None,
):  # fmt: skip
    """The prompt and up to `max_new_tokens` more tokens, (B, T + n) int64, from any model with this calling convention.

    temperature 0 takes the likeliest token; otherwise tokens are drawn from softmax(logits / temperature), from the
    top_k likeliest if top_k is given. A row that has produced eos_token_id is filled up with it, and generation stops
    when all rows have. Prompts of unequal length are padded on the left, with an attention_mask (B, T).
    """
    if not temperature >= 0 or (top_k is not None and top_k < 1):
        raise Error(f"temperature must be at least 0 and top_k at least 1, not {temperature} and {top_k}")
    step, cache = input_ids, None
    done = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
    for _ in range(max_new_tokens):
        out = model(step, attention_mask=attention_mask, past_key_values=cache, use_cache=True, logits_to_keep=1)
        logits, cache = out.logits[:, -1].float(), out.past_key_values  # (B, V)
        if temperature == 0:
            step = logits.argmax(-1, keepdim=True)  # (B, 1)
        else:
            if top_k is not None:
                logits[logits < logits.topk(min(top_k, logits.size(-1))).values[:, -1:]] = -math.inf
            if not logits.amax(-1).isfinite().all():  # an inf or a NaN at the top
                raise Error("the model's logits are inf or NaN: its weights are damaged, or the training diverged")
            step = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
        if eos_token_id is not None:
            step[done] = eos_token_id
            done |= step[:, 0] == eos_token_id
        input_ids = torch.cat((input_ids, step), 1)
        if attention_mask is not None:
            attention_mask = torch.cat((attention_mask, torch.ones_like(step)), 1)
        if done.all():
            break
    return input_ids
