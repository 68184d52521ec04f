# SPDX-License-Identifier: MIT
"""Prompt tuning: a few trained vectors before the input embeddings steer a model that is frozen altogether.

    logits = model([P ; E[ids]])          the frozen model's own loss trains P, through the model's input

Dimensions: B rows, T tokens, d the embedding's size, n prompt tokens; P (n, d) trained; E (V, d) and all else frozen.

Trained and stored are the same n d numbers: with n = 20, GPT-2 (d = 768) has 15,360, one in 8,000 of its own. Their
gradient comes down through the whole model, though: a step costs the forward pass and the half of the backward pass
that is not for weights, on n more tokens.

Where P starts matters on a small model. Words are what the model can read: hence tokens drawn from the vocabulary, a
text, or the labels that a classification is to write. In the paper the start no longer matters at 11 billion
parameters, where prompt tuning is as good as full fine-tuning; in smaller models it is behind. Learning rates are
large, 0.03 to 0.3, and P does not stay near the words: prompts that were released lie far from all of them.

Pads on the left stay there: [pads ; P ; E[ids]], with positions counted from P on. A padded row gives what it gives
alone.

Beside its sisters: the input only, before the input, no encoder. P-tuning puts its vectors anywhere in the input and
makes them by an encoder; prefix-tuning gives each layer its own keys and values; adapters sit in each block; LoRA can
be merged. A prompt cannot be: inference has n more positions to compute, and a context that is n shorter.

Paper: prompt tuning, arXiv 2104.08691, section 2.
"""

import inspect
import math

import torch
import torch.nn as nn


class Error(ValueError):
    """Wrong use of prompt tuning; the message says what would be right."""


# ---------------------------------------------------------------------------------------------------------- mathematics


def join(front, t, pads):
    """[front ; t] for front (1, n, ...) and t (B, T, ...): in each row behind its left padding, pads (B, 1) or None."""
    n, B = front.size(1), len(t)
    # Cast after expanding, so that the rows' gradients are summed in 32 bits
    t = torch.cat((front.expand(B, *front.shape[1:]).to(t.dtype), t), 1)  # (B, n + T, ...)
    if pads is None:
        return t
    # Before the pads a sliding window, which counts them, would lose sight of the prompt too early
    place = torch.arange(t.size(1), device=t.device)
    source = torch.where(place < pads, place + n, torch.where(place < pads + n, place - pads, place))  # (B, n + T)
    return t[torch.arange(B, device=t.device)[:, None], source]


def initial_prompt(embedding, n, init):
    """P (n, d) in fp32 or wider: see PromptTuning's `init`."""
    V = embedding.weight.size(0)
    common = min(V, 5000)  # the paper's population; tokenizers mostly number their tokens by frequency
    if isinstance(init, str):
        if init not in ("vocabulary", "random"):
            raise Error(f"init must be vocabulary, random or a list of token ids, not {init!r}")
        ids = torch.randint(common, (n,))
    else:
        ids = init.tolist() if torch.is_tensor(init) else list(init)
        if not ids:
            raise Error("init has no token ids: the text or the labels to start from are empty")
        if any(type(i) is not int or not 0 <= i < V for i in ids):
            raise Error(f"init must hold token ids, from 0 to {V - 1}, not {ids}")
        ids = torch.tensor(ids)
        ids = ids.repeat(math.ceil(n / len(ids)))[:n]
    with torch.no_grad():
        # Called, not read: Gemma scales its embeddings inside the layer
        P = embedding(ids.to(embedding.weight.device))  # (n, d)
        P = P.to(torch.promote_types(P.dtype, torch.float32))
        if isinstance(init, str) and init == "random":
            P = torch.randn_like(P) * P.std()  # as large as words are
    return P


# --------------------------------------------------------------------------------------------------------------- module


class PromptTuning(nn.Module):
    """Freezes a causal language model and puts n trained vectors before its input; called like the model.

    n_tokens: n. init: "vocabulary" (n drawn tokens' embeddings), "random" (normal, as large as these), or token ids,
        of a text or of the class labels, repeated or cut to n.
    The output is the model's own, with the logits of the input's positions: logits[:, t] follows input_ids[:, t].
    As the last prompt token predicts input_ids[:, 0], a label there is scored: set it to -100 to leave it out.
    Cast the model before, not after: P is fp32 even beside a model of 16 bits.
    """

    def __init__(self, model, n_tokens=20, *, init="vocabulary"):
        super().__init__()
        if hasattr(model, "n_tokens"):
            raise Error(f"the model is a {type(model).__name__} already: wrap the model inside of it")
        if type(n_tokens) is not int or n_tokens < 1:
            raise Error(f"n_tokens must be a whole number of at least 1, not {n_tokens!r}")
        config = getattr(model, "config", None)
        limits = [getattr(config, name, None) for name in ("max_position_embeddings", "n_positions")]
        self.limit = limits[0] or limits[1] or math.inf
        if n_tokens >= self.limit:
            raise Error(f"{n_tokens} prompt tokens leave no room for a text in the model's {self.limit} positions")
        P = initial_prompt(model.get_input_embeddings(), n_tokens, init)
        self.n_tokens = n_tokens
        self.model = model.requires_grad_(False)
        self.prompt_embeddings = nn.Parameter(P)
        self.prompt_config = {
            "peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": n_tokens,
            "token_dim": P.size(1), "num_transformer_submodules": 1, "inference_mode": True,
            # peft's TEXT would want the name of a tokenizer; the vectors themselves are in the other file
            "prompt_tuning_init": "SAMPLE_VOCAB" if isinstance(init, str) and init == "vocabulary" else "RANDOM",
        }  # fmt: skip

    config = property(lambda self: self.model.config)
    device = property(lambda self: self.prompt_embeddings.device)

    def insert(self, x, mask, past=0):
        """The embeddings (B, T, d) with P, the mask for that, and each row's pads. In later steps P is in the cache."""
        pads = None if mask is None else (mask.cumsum(1) == 0).sum(1, keepdim=True)  # (B, 1)
        if mask is not None:
            shape = len(x), x.size(1) + (past - self.n_tokens if past else 0)  # (B, S)
            if mask.shape != shape:
                raise Error(f"attention_mask must be {shape}, not {tuple(mask.shape)}: all tokens, and not the prompt")
            mask = join(mask.new_ones(1, self.n_tokens), mask, pads)  # (B, n + S)
        if past == 0:
            x = join(self.prompt_embeddings[None], x, pads)  # (B, n + T, d)
        count = past + x.size(1)
        if count > self.limit and (mask is None or (count := mask.sum(1).max()) > self.limit):
            others = count - self.n_tokens
            raise Error(f"{self.n_tokens} prompt tokens and {others} others do not fit the {self.limit} positions")
        return x, mask, pads

    def forward(
        self, input_ids=None, *, inputs_embeds=None, attention_mask=None, position_ids=None, past_key_values=None,
        labels=None, **options,
    ):  # fmt: skip
        """The model's call. position_ids, labels and attention_mask are the input's own, and have no places for P."""
        if (input_ids is None) == (inputs_embeds is None):
            raise Error("give either input_ids or inputs_embeds")
        n, past = self.n_tokens, 0 if past_key_values is None else past_key_values.get_seq_length()
        x = self.model.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        T = x.size(1)
        x, mask, pads = self.insert(x, attention_mask, past)
        new = x.size(1)  # n + T, and T in later steps
        if position_ids is not None:
            position_ids = position_ids.expand(len(x), -1) + n
            if past == 0:
                position_ids = join(torch.arange(n, device=x.device)[None], position_ids, pads)
        elif mask is not None:
            position_ids = (mask.long().cumsum(1) - 1).clamp(min=0)[:, -new:]  # pads are not counted
        if labels is not None and past == 0:
            labels = join(labels.new_full((1, n), -100), labels, pads)
        if torch.is_tensor(options.get("logits_to_keep")):  # places in the input
            options["logits_to_keep"] = options["logits_to_keep"] + new - T
        if past_key_values is not None:  # transformers renamed it in 5.24
            renamed = "cache" in inspect.signature(self.model.forward).parameters
            options["cache" if renamed else "past_key_values"] = past_key_values
        out = self.model(inputs_embeds=x, attention_mask=mask, position_ids=position_ids, labels=labels, **options)
        if out.logits is None:
            return out
        logits = out.logits[:, -T:]
        if isinstance(out, tuple):
            return out._replace(logits=logits)
        out.logits = logits
        return out

    def generate(self, input_ids, max_new_tokens=64, *, attention_mask=None, **options):
        """input_ids and what follows, by the model's own generate and with its options.

        max_new_tokens is the argument's, whatever a generation_config says.
        """
        if not hasattr(self.model, "prepare_inputs_for_generation"):
            # Not transformers': a loop around the call, for which this module is as good as the model
            return type(self.model).generate(self, input_ids, max_new_tokens, attention_mask=attention_mask, **options)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        x, mask, _ = self.insert(self.model.get_input_embeddings()(input_ids), mask)
        end = int(mask.sum(1).max()) + max_new_tokens - 1  # the last token is not read
        if end > self.limit:
            tokens = f"the input, {self.n_tokens} prompt tokens and {max_new_tokens} new ones"
            raise Error(f"{tokens} need {end} positions; the model has {self.limit}")
        return self.model.generate(
            input_ids=input_ids, inputs_embeds=x, attention_mask=mask, max_new_tokens=max_new_tokens, **options
        )


# --------------------------------------------------------------------------------------------------------------- files


def prompt_state_dict(model):
    """What was trained, under peft's name: the content of adapter_model.safetensors."""
    return {"prompt_embeddings": model.prompt_embeddings.detach()}


@torch.no_grad()
def load_prompt_state_dict(model, state):
    """The reverse. Error, with nothing loaded, if the two do not fit."""
    if state.keys() != {"prompt_embeddings"}:
        raise Error(f"a prompt's file holds prompt_embeddings and nothing else, not {', '.join(state) or 'nothing'}")
    P = state["prompt_embeddings"]
    if P.shape != model.prompt_embeddings.shape:
        raise Error(f"the prompt is {tuple(P.shape)} in the file and {tuple(model.prompt_embeddings.shape)} here")
    if not P.is_floating_point() or P.element_size() < 2:
        raise Error(f"the prompt is {P.dtype} in the file, which holds no trained numbers")
    model.prompt_embeddings.copy_(P)


def prompt_config(model):
    """The adapter_config.json that goes with prompt_state_dict."""
    return dict(model.prompt_config)


def prompt_arguments(config):
    """PromptTuning's arguments, from an adapter_config.json of ours or peft's. Error for what this file does not do."""
    if not isinstance(config, dict) or config.get("peft_type") != "PROMPT_TUNING":
        raise Error("adapter_config.json is no prompt tuning's: its peft_type must be PROMPT_TUNING")
    for key, allowed in (
        ("task_type", ["CAUSAL_LM", None]), ("num_transformer_submodules", [1, None]), ("modules_to_save", [None, []]),
        ("prompt_tuning_init", ["RANDOM", "SAMPLE_VOCAB", "TEXT"]),
    ):  # fmt: skip
        if config.get(key, allowed[0]) not in allowed:
            raise Error(f"adapter_config.json: {key} must be one of {allowed}, not {config[key]!r}")
    n = config.get("num_virtual_tokens")
    if type(n) is not int or n < 1:
        raise Error(f"adapter_config.json: num_virtual_tokens cannot be {n!r}")
    # The other file's vectors replace whatever is drawn
    return {"n_tokens": n, "init": "vocabulary" if config.get("prompt_tuning_init") == "SAMPLE_VOCAB" else "random"}


if __name__ == "__main__":
    from types import SimpleNamespace

    class Tiny(nn.Module):
        """A language model that reads the mean of the tokens so far, called like one of Hugging Face's."""

        def __init__(self, V=40, d=32):
            super().__init__()
            self.wte, self.wpe = nn.Embedding(V, d), nn.Embedding(64, d)
            self.mlp = nn.Sequential(nn.Linear(d, 128), nn.GELU(), nn.Linear(128, V))

        def get_input_embeddings(self):
            return self.wte

        def forward(self, inputs_embeds, attention_mask=None, position_ids=None, **_):
            B, T, _ = inputs_embeds.shape
            mask = torch.ones(B, T) if attention_mask is None else attention_mask
            x = inputs_embeds + self.wpe(torch.arange(T) if position_ids is None else position_ids)
            mean = (x * mask[..., None]).cumsum(1) / mask.cumsum(1).clamp(min=1)[..., None]
            return SimpleNamespace(logits=self.mlp(mean))

    torch.manual_seed(0)
    model = PromptTuning(Tiny(), 8)
    base, P, ids = model.model, model.prompt_embeddings, torch.tensor([[3, 1, 4, 1, 5]])
    by_hand = base(torch.cat((P[None], base.wte(ids)), 1)).logits[:, 8:]
    print(f"model(ids) against base([P ; E[ids]]): {(model(ids).logits - by_hand).abs().max():.1e}")
    padded, mask = (nn.functional.pad(t, (3, 0)) for t in (ids, torch.ones_like(ids)))
    difference = model(padded, attention_mask=mask).logits[:, 3:] - by_hand
    print(f"with 3 pads on its left, against the row alone: {difference.abs().max():.1e}")
    before = [p.clone() for p in base.parameters()]
    optimizer, losses = torch.optim.Adam([P], lr=0.1), []
    for _ in range(60):
        optimizer.zero_grad()
        losses.append(nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:]))
        losses[-1].backward()
        optimizer.step()
    same = all(map(torch.equal, before, base.parameters()))
    print(f"60 steps on P alone: loss {losses[0]:.2f} to {losses[-1]:.2f}; the base is the same, bit for bit: {same}")
    print(f"GPT-2, 20 tokens: n d = {20 * 768:,} of 124,439,808 parameters, trained and stored")
