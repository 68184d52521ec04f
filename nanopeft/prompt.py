# SPDX-License-Identifier: MIT
"""Prompt tuning: train n vectors in front of the input embeddings, and freeze the whole model.

A prompt in words (a "hard prompt") steers a language model without changing it, but its wording is found by trial.
Prompt tuning learns the prompt instead (a "soft prompt"): n virtual tokens, which are vectors that belong to no word,
trained by backpropagation through the frozen model.

    logits = model([P ; E[ids]])        the loss is the model's own, on the labels of the input tokens

    B batch, T input tokens, d embedding size, V vocabulary, n virtual tokens
    P (n, d)  trained, the same for every row          E (V, d) and all other weights  frozen

    position    0      1     ...  n-1       n       n+1     ...  n+T-1
    input       P[0]   P[1]  ...  P[n-1]    E[x₀]   E[x₁]   ...  E[x_T-1]      every input token attends to all of P
    label       -100   -100  ...  -100      x₀      x₁      ...  x_T-1         no loss on P itself
    logits      (dropped)                   y₀      y₁      ...  y_T-1         y_t predicts x_t+1, as without P

Worked example: in GPT-2 (d = 768, 124,439,808 parameters) n = 20 virtual tokens are 15,360 numbers, 0.012 % of the
model and 61 KB in fp32. Their gradient and Adam's moments are 184 KB; the whole model's would be 1.5 GB. An input of
100 tokens takes 120 positions, and 1,004 of the 1,024 positions are left for text.

Cost of training: the gradient comes down through all layers to P, so every layer keeps its activations. Only the
gradients of the weights need not be computed, a third of the arithmetic.
Cost at inference: P cannot be merged into the weights, because it is input. Each row computes n more positions, keeps
their keys and values in the cache, and has a context n shorter. In return one frozen model serves many tasks, even in
one batch: with the prompts stacked as P (tasks, n, d), call base(inputs_embeds=cat((P[task], E[ids]), 1)), task (B,).

Why scale helps: P adds no ability. It calls up what the frozen model can do, and a larger model can do more. The paper
tuned T5 from 77M to 11B parameters: small models stay behind full fine-tuning, and at about 10B the two are equal.
When to use it: one very large frozen model serves many tasks, each with kilobytes of its own. When not: the context is
tight, the model is small, or the task is hard, such as tagging, where P-tuning v2 is better.

Why start from words: a model has learned to read the vectors of words, and a small one makes little of others. In the
paper class labels were the best start and random vectors the worst; at 11B all were equal.
Why learning rates are larger than LoRA's 1e-4: a step of Adam moves a number by about the rate, and no pretrained
weight is at risk. The paper takes 0.3 and ends far from all words: its released SST-2 prompt has a deviation of 52. So
far is not always needed. In a small GPT-2 (6 layers, d = 256, words of RMS 0.083) 60 steps bring a loss of 4.25 to 4.12
at 1e-4, to 3.87 at 1e-3, and to 3.78 to 3.82 at all rates from 3e-3 (P moves by 0.03) to 0.1 (P moves by 0.66).
Typical: n = 20 to 100 (more gains little; at 11B even one token works). The paper: n = 100, Adafactor, constant 0.3,
batch 32, 30,000 steps. Here: AdamW at 0.1, no weight decay: it would pull P to zero.

Pitfalls
* It is not prompt engineering, which searches for words, nor instruction tuning, which trains the weights on many tasks
  that are written as instructions. Here the weights are frozen, and P is learned for one task.
* P fits the base that it was trained on and no other. Its nearest words explain little.
* Left padding must stay in front, [pads ; P ; E[ids]]. Between P and the text, sliding windows, MPT and Mamba would
  count it, and a pad would predict the first token.

Compared with related methods: P-tuning (ptuning.py) makes its virtual tokens by an encoder and places them anywhere in
the input; prefix-tuning (prefix.py) and P-tuning v2 train keys and values in every layer; LoRA (lora.py), the usual
choice today, changes the weights: stronger in small models, free once merged. All in one table: nanopeft/__init__.py

Paper: The Power of Scale for Parameter-Efficient Prompt Tuning, arXiv 2104.08691, sections 2 (method), 3.2 (ablations).
"""

import copy
import functools
import inspect
import math

import torch
import torch.nn as nn
import torch.nn.functional as F


class Error(ValueError):
    """Wrong use of prompt tuning; the message says what would be right."""


class PromptTuning(nn.Module):
    """Freezes a causal language model and puts n trained vectors in front of its input; called like the model.

    n_tokens: n. init: "vocabulary" (embeddings of n random frequent tokens: ids below 5,000, as in the paper), "random"
        (normal, as large as these), or token ids, of a text or of the class labels, repeated or cut to n.
    The output is the model's own, with the logits of the input tokens alone. model.model is the base, unchanged.
    P[n-1] predicts input_ids[:, 0]: a label there is scored; set it to -100 to leave it out.
    Cast the model before wrapping it, not after: P stays fp32 beside 16 bits. Compile or parallelize after wrapping.
    """

    def __init__(self, model, n_tokens=20, *, init="vocabulary"):
        super().__init__()
        self.n_positions = check_model(model, n_tokens)
        self.n_tokens = self.n_in_front = n_tokens
        embedding, init = model.get_input_embeddings(), init.tolist() if torch.is_tensor(init) else init
        V, drawn = len(embedding.weight), init in ("vocabulary", "random")
        given = not isinstance(init, str) and init and all(type(i) is int and 0 <= i < V for i in init)
        if not drawn and not given:
            raise Error(f"init: vocabulary, random or a list of at least one token id, 0 to {V - 1}, not {init!r}")
        ids = torch.randint(min(V, 5000), (n_tokens,)) if drawn else torch.tensor(init * n_tokens)[:n_tokens]
        with torch.no_grad():
            P = embedding(ids.to(embedding.weight.device))  # not weight[ids]: Gemma's layer scales what it looks up
            P = P.to(torch.promote_types(P.dtype, torch.float32))  # (n, d)
            self.prompt_embeddings = nn.Parameter(torch.randn_like(P) * P.std() if init == "random" else P)
        self.model = model.requires_grad_(False)
        self.prompt_config = {
            "peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": n_tokens,
            "token_dim": P.size(1), "num_transformer_submodules": 1, "inference_mode": True,
            "prompt_tuning_init": "SAMPLE_VOCAB" if init == "vocabulary" else "RANDOM",
        }  # fmt: skip

    def virtual_tokens(self):
        return self.prompt_embeddings  # (n, d)

    def insert(self, ids, x, mask, positions, labels, past):
        """[P ; E[ids]], and mask, positions, labels for it. After the first step of generation P is in the cache."""
        n, x = self.n_tokens, self.model.get_input_embeddings()(ids) if x is None else x  # (B, T, d)
        positions = None if positions is None else positions.expand(len(x), -1) + n  # (B, T)
        if not past:
            P = self.virtual_tokens().expand(len(x), -1, -1).to(x.dtype)  # (B, n, d); cast last: dP is summed in fp32
            x = torch.cat((P, x), 1)  # (B, n + T, d)
            labels = None if labels is None else F.pad(labels, (n, 0), value=-100)  # no loss on P
            if positions is not None:
                positions = torch.cat((torch.arange(n, device=x.device).expand(len(x), -1), positions), 1)
        if mask is None:
            return x, mask, positions, labels
        # From [P ; pads ; text] to [pads ; P ; text]: the left padding of a row cannot come between the two
        mask = F.pad(mask, (n, 0), value=1)  # (B, n + S)
        is_left_pad = (mask == 0) & (mask.cumsum(1) == n)
        order = is_left_pad.int().argsort(dim=1, descending=True, stable=True)
        rows, found = torch.arange(len(x), device=x.device)[:, None], (x, mask, positions, labels)
        return [t[rows, order] if t is not None and t.size(1) == mask.size(1) else t for t in found]

    def forward(self, input_ids=None, *, attention_mask=None, position_ids=None, inputs_embeds=None,
                past_key_values=None, labels=None, **options):  # fmt: skip
        """The model's call. attention_mask, position_ids and labels are the input tokens', without places for P."""
        if (input_ids is None) == (inputs_embeds is None):
            raise Error("give either input_ids or inputs_embeds")
        if getattr(past_key_values, "is_compileable", False):
            raise Error("a static cache has no room for the virtual tokens: leave out cache_implementation")
        if position_ids is not None and attention_mask is None and (position_ids.diff() != 1).any():
            raise Error("of a packed row only the first example would see the virtual tokens: pad the rows instead")
        B, T = (input_ids if inputs_embeds is None else inputs_embeds).shape[:2]
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        n, limit, mask = self.n_in_front, self.n_positions, attention_mask
        S = T + max(0, past - n)  # input tokens, those in the cache too
        if mask is not None and mask.shape != (B, S):
            raise Error(f"attention_mask must be {(B, S)}, not {tuple(mask.shape)}: all input tokens, without P")
        if n + S > limit and mask is not None:
            S = int(mask.sum(1).max())  # pads take no position
        if n + S > limit:
            raise Error(f"the text and {self.n_tokens} virtual tokens need {n + S} positions; the model has {limit}")
        x, mask, positions, labels = self.insert(input_ids, inputs_embeds, mask, position_ids, labels, past)
        if positions is None and mask is not None:
            positions = (mask.long().cumsum(1) - 1).clamp(min=0)[:, -x.size(1) :]  # pads are not counted
        if torch.is_tensor(options.get("logits_to_keep")):  # places in the input
            options["logits_to_keep"] = options["logits_to_keep"] + x.size(1) - T
        if past_key_values is not None:  # transformers 5.24 renamed it
            options["cache" if "cache" in self.takes else "past_key_values"] = past_key_values
        out = self.model(inputs_embeds=x, attention_mask=mask, position_ids=positions, labels=labels, **options)
        logits = None if out.logits is None else out.logits[:, -T:]  # (B, T, V)
        if isinstance(out, tuple):
            return out._replace(logits=logits)
        out.logits = logits
        return out

    def generate(self, input_ids, max_new_tokens=None, **options):
        """The model's own generate, with its options and defaults; lengths count input_ids and new tokens, not P."""
        if max_new_tokens is not None:
            options["max_new_tokens"] = max_new_tokens
        cache, mask = options.get("past_key_values"), options.get("attention_mask")
        if cache is not None and cache.get_seq_length() and (mask is None or mask.shape == input_ids.shape):
            raise Error("a cache holds the text before: give the new ids alone, and the attention_mask of all text")
        if hasattr(self.model, "generation_config") and "past_key_values" not in self.takes:
            options["use_cache"] = False  # of a recurrent state it is not known whether it has read P
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
        names = "config", "device", "activation_checkpointing_enable", "gradient_checkpointing_enable"
        return getattr(self.model, name) if name in names else super().__getattr__(name)

    takes = property(lambda self: inspect.signature(self.model.forward).parameters)
    accepts_loss_kwargs = property(lambda self: getattr(self.model, "accepts_loss_kwargs", "kwargs" in self.takes))


@torch.no_grad()
def prompt_state_dict(model):
    """What was trained, under peft's name: the content of adapter_model.safetensors."""
    return {"prompt_embeddings": find_tuned(model).virtual_tokens().detach()}


@torch.no_grad()
def load_prompt_state_dict(model, state):
    """The reverse. Error, with nothing loaded, if the two do not fit."""
    find_tuned(model).prompt_embeddings.copy_(fitting_prompt(model, state))


def prompt_config(model):
    """The adapter_config.json that goes with prompt_state_dict."""
    return dict(find_tuned(model).prompt_config)


# ------------------------------------------------------------------------------------------------------------ plumbing


def find_tuned(model):
    """The PromptTuning inside torch.compile, DDP or what else wraps it. Error if there is none, or if it is sharded."""
    if any(p.requires_grad and p.shape == (0,) for p in model.parameters()):
        raise Error("the parameters are sharded, and here have no elements: do this inside `with engine.whole():`")
    found = [m for m in model.modules() if isinstance(m, PromptTuning)]
    if not found:
        raise Error("the model has no virtual tokens: wrap it first")
    return found[0]


def check_model(model, n_tokens, least=1):
    """How many positions the model has (math.inf if it sets no limit). Error if it can have no virtual tokens."""
    name, config = type(model).__name__, getattr(model, "config", None)
    wrappers = {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
    if hasattr(model, "n_tokens") or wrappers & model._modules.keys():
        raise Error(f"the model is a {name} already: wrap the plain model, then compile or parallelize the result")
    headless = hasattr(model, "get_output_embeddings") and model.get_output_embeddings() is None
    tables = [m for key, m in model.named_modules() if "position" in key and isinstance(m, nn.Embedding)]
    other = getattr(config, "is_encoder_decoder", False) or getattr(config, "hidden_size_per_layer_input", 0)
    if headless or other or any(table.padding_idx is not None for table in tables):
        wrong = "is an encoder-decoder, has no head, reads ids in every layer, or counts positions from padding_idx on"
        raise Error(f"{name} {wrong}: take a causal LM")
    limit = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or math.inf
    if type(n_tokens) is not int or not least <= n_tokens < limit:
        raise Error(f"n_tokens must be a whole number from 1 to below the model's {limit} positions, not {n_tokens!r}")
    return limit


def fitting_prompt(model, state):
    """The tensor of a state dict, if it can be the model's P."""
    shape = tuple(prompt_config(model)[key] for key in ("num_virtual_tokens", "token_dim"))
    P, found = state.get("prompt_embeddings"), {name: (tuple(t.shape), t.dtype) for name, t in state.items()}
    if len(state) != 1 or P is None or P.shape != shape or not P.is_floating_point() or P.element_size() < 2:
        raise Error(f"the state must be prompt_embeddings {shape} in 16 bits or more, not {found or 'nothing'}")
    return P


if __name__ == "__main__":
    from types import SimpleNamespace

    torch.manual_seed(0)
    base = nn.Module()  # a recurrent language model, called like one of Hugging Face's
    base.E, base.rnn = nn.Embedding(40, 32), nn.GRU(32, 32, batch_first=True)
    base.get_input_embeddings = lambda: base.E
    base.forward = lambda inputs_embeds, **_: SimpleNamespace(logits=base.rnn(inputs_embeds)[0] @ base.E.weight.T)
    model, ids = PromptTuning(base, 8), torch.tensor([[3, 1, 4, 1, 5]])
    P, before = model.prompt_embeddings, [p.clone() for p in base.parameters()]
    by_hand = base(torch.cat((P[None], base.E(ids)), 1)).logits[:, 8:]
    print(f"model(ids) against base([P ; E[ids]]): {(model(ids).logits - by_hand).abs().max():.1e}")
    optimizer, losses = torch.optim.Adam([P], lr=0.1), []
    for _ in range(60):
        losses.append(nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:]))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    same = all(map(torch.equal, before, base.parameters()))
    print(f"60 steps on P alone: loss {losses[0]:.2f} to {losses[-1]:.2f}; the base is the same, bit for bit: {same}")
