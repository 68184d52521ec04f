# SPDX-License-Identifier: MIT
"""P-tuning: trained vectors anywhere in the input, between its words, made by a small encoder.

    input   = E[x₁] h₁ h₂ E[x₂] … E["# module:"] h₃          to the frozen model, whose own loss trains the encoder
    h₁ … hₙ = MLP([→s ; ←s]),   →s, ←s = BiLSTM(e₁ … eₙ)

Dimensions: B rows, T tokens, d the embedding's size, n slots, H (n, d) their vectors; the encoder's embedding e (n, d)
and hidden size h per direction. e, LSTM and MLP are trained; E (V, d) and all else is frozen.

A template says where the slots are: "[P][P]{source}[P] # module: [P]". Text between them stays words, as anchors that
tell the model what it is about. The k-th slot of a row gets the k-th vector, wherever it stands. Without a template
the slots are in front, as in peft.

Why an encoder: the paper found single vectors to stay in a neighbourhood of their start, and to know nothing of one
another. Here the same weights make them all, and the LSTM makes each from its neighbours. The encoder has no input but
e: after training it is evaluated once and thrown away (fold_ptuning).

Trained are n d and the encoder, stored are n d: for 20 slots in GPT-2 (d = 768, 124,439,808 parameters) 8,286,720 with
the encoder of the paper's code (h = d/2, two layers), 1,787,136 with the MLP alone, and 15,360 stored.

Beside its sisters: the input only, anywhere in it, by an encoder. Prompt tuning puts its vectors before the input and
trains them as they are; prefix-tuning (and P-tuning v2) gives each layer its own keys and values; adapters sit in each
block; LoRA can be merged. A prompt cannot be: inference has n more positions, and a context that is n shorter.

Paper: P-tuning, arXiv 2103.10385, section 3.
"""

import inspect
import math
import re

import torch
import torch.nn as nn


class Error(ValueError):
    """Wrong use of P-tuning; the message says what would be right."""


# ---------------------------------------------------------------------------------------------------------- mathematics


def fill_template(template, source_ids, encode, pseudo_id):
    """Token ids of a template: pseudo_id for each [P], source_ids for {source}, encode(text) for the text between.

    encode adds no special tokens: lambda text: tokenizer.encode(text, add_special_tokens=False) in transformers.
    The text is taken as it stands, spaces too: "[P] {source}" has a space for an anchor.
    """
    if template.count("{source}") != 1:
        raise Error(f"a template has {{source}} exactly once, not as in {template!r}")
    ids = []
    for part in re.split(r"(\[P\]|\{source\})", template):
        if part == "[P]":
            ids.append(pseudo_id)
        elif part == "{source}":
            ids.extend(source_ids)
        elif part:
            ids.extend(encode(part))
    return ids


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


# -------------------------------------------------------------------------------------------------------------- modules


class PromptEncoder(nn.Module):
    """Makes H (n, d): embedding → BiLSTM → MLP, or embedding → MLP; in peft's shapes, under peft's names."""

    def __init__(self, n, d, encoder, hidden, layers):
        super().__init__()
        self.embedding = nn.Embedding(n, d)
        if encoder == "lstm":
            self.lstm_head = nn.LSTM(d, hidden, layers, bidirectional=True)
            self.mlp_head = nn.Sequential(nn.Linear(2 * hidden, 2 * hidden), nn.ReLU(), nn.Linear(2 * hidden, d))
        else:
            self.lstm_head = None
            self.mlp_head = nn.Sequential(
                nn.Linear(d, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, d)
            )

    def forward(self):
        x = self.embedding.weight  # (n, d)
        if self.lstm_head is not None:
            x, _ = self.lstm_head(x)  # (n, 2h)
        return self.mlp_head(x)  # (n, d)


class PTuning(nn.Module):
    """Freezes a causal language model and puts n encoded vectors into its input; called like the model.

    Where the vectors go: in front of the input; or, with `template` (make each row's ids with `fill`) or `pseudo_id`
        (put it yourself), where the input has that id, in every row n times.
    n_tokens: n, by default the template's slots, or 20. pseudo_id: by default the first id outside the vocabulary.
    encoder: "lstm" or "mlp". hidden: h, by default d/2 for the LSTM, as in the paper's code, and d for the MLP.
    layers: of the LSTM.
    The output is the model's own, with the logits of the input's positions: logits[:, t] follows input_ids[:, t].
    With the vectors in front the last of them predicts input_ids[:, 0]: a label there is scored, unless it is -100.
    Cast the model before, not after: the encoder is fp32 even beside a model of 16 bits.
    """

    def __init__(
        self, model, n_tokens=None, *, encoder="lstm", hidden=None, layers=2, template=None, pseudo_id=None
    ):  # fmt: skip
        super().__init__()
        if hasattr(model, "n_tokens"):
            raise Error(f"the model is a {type(model).__name__} already: wrap the model inside of it")
        weight = model.get_input_embeddings().weight
        V, d = weight.shape
        if template is not None:
            fill_template(template, [], lambda text: [], 0)
            slots = template.count("[P]")
            if n_tokens not in (None, slots):
                raise Error(f"the template has {slots} slots, and n_tokens is {n_tokens}: leave it out")
            n_tokens, pseudo_id = slots, V if pseudo_id is None else pseudo_id
        n_tokens = 20 if n_tokens is None else n_tokens
        if type(n_tokens) is not int or n_tokens < (1 if template is None else 0):
            raise Error(f"n_tokens must be a whole number of at least 1, not {n_tokens!r}")
        if encoder not in ("lstm", "mlp"):
            raise Error(f"encoder must be lstm or mlp, not {encoder!r}")
        if hidden is None:
            hidden = max(1, d // 2) if encoder == "lstm" else d
        if any(type(size) is not int or size < 1 for size in (hidden, layers)):
            raise Error(f"hidden and layers must be whole numbers of at least 1, not {hidden!r} and {layers!r}")
        if encoder == "mlp" and layers != 2:
            raise Error("layers are the LSTM's: leave it out with the mlp")
        if pseudo_id is not None and not (type(pseudo_id) is int and abs(pseudo_id) < 1 << 31):
            raise Error(f"pseudo_id must be a token id, not {pseudo_id!r}")
        config = getattr(model, "config", None)
        limits = [getattr(config, name, None) for name in ("max_position_embeddings", "n_positions")]
        self.limit = limits[0] or limits[1] or math.inf
        if n_tokens >= self.limit:
            raise Error(f"{n_tokens} prompt tokens leave no room for a text in the model's {self.limit} positions")
        self.n_tokens, self.template, self.pseudo_id = n_tokens, template, pseudo_id
        self.model = model.requires_grad_(False)
        wide = dict(dtype=torch.promote_types(weight.dtype, torch.float32), device=weight.device)
        self.encoder = PromptEncoder(n_tokens, d, encoder, hidden, layers).to(**wide) if n_tokens else None
        # What the encoder is folded into; a template without slots has no encoder
        self.prompt_embeddings = None if n_tokens else nn.Parameter(torch.zeros(0, d, **wide))
        self.ptuning_config = {
            "peft_type": "P_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": n_tokens, "token_dim": d,
            "num_transformer_submodules": 1, "encoder_reparameterization_type": encoder.upper(),
            "encoder_hidden_size": hidden, "encoder_num_layers": layers, "encoder_dropout": 0.0, "inference_mode": True,
        }  # fmt: skip
        if pseudo_id is not None:  # as P_TUNING, peft would open it and put the vectors in front
            self.ptuning_config |= dict(peft_type="P_TUNING_TEMPLATE", template=template, pseudo_id=pseudo_id)

    config = property(lambda self: self.model.config)
    device = property(lambda self: self.model.get_input_embeddings().weight.device)

    def prompt(self):
        """H, the vectors of the slots, (n, d)."""
        if self.encoder is None:
            return self.prompt_embeddings
        kind = self.device.type if self.device.type != "meta" else "cpu"  # shapes alone have no autocast
        with torch.autocast(kind, enabled=False):  # in full precision, as it is folded
            return self.encoder()

    def fill(self, source_ids, encode):
        """A row's token ids, by the template."""
        if self.template is None:
            raise Error("there is no template to fill: PTuning(model, template=...)")
        return fill_template(self.template, source_ids, encode, self.pseudo_id)

    def insert(self, ids, x, mask, past=0):
        """The embeddings of ids (or x) with H, the mask for that, and the pads that H stands behind, (B, 1) or None."""
        # With a past, H is in the cache
        embed, H, pads = self.model.get_input_embeddings(), None if past else self.prompt(), None
        if mask is not None:
            B, T = (ids if x is None else x).shape[:2]
            shape = B, T + past - (self.n_tokens if past and self.pseudo_id is None else 0)  # (B, S)
            if mask.shape != shape:
                found = tuple(mask.shape)
                raise Error(f"attention_mask must be {shape}, not {found}: all tokens, and no vectors put in front")
        if self.pseudo_id is None:
            x = embed(ids) if x is None else x  # (B, T, d)
            if mask is not None:
                pads = (mask.cumsum(1) == 0).sum(1, keepdim=True)  # (B, 1)
                mask = join(mask.new_ones(1, self.n_tokens), mask, pads)  # (B, n + S)
            if past == 0:
                x = join(H[None], x, pads)  # (B, n + T, d)
        elif ids is not None:
            slots, expected = ids == self.pseudo_id, 0 if past else self.n_tokens  # (B, T)
            if (slots.sum(1) != expected).any():
                if past:
                    raise Error(f"slots stand in the first step: {self.pseudo_id}, the pseudo_id, cannot come later")
                found = slots.sum(1).tolist()
                raise Error(
                    f"each row must have {expected} slots, not {found}: cut a long source before it is filled in"
                )
            x = embed(ids.masked_fill(slots, 0))  # a pseudo-token has no row in the table
            if past == 0:
                # The k-th slot of each row gets H[k]
                x = x.masked_scatter(slots[..., None], H.expand(len(x), -1, -1).to(x.dtype))
        elif past == 0:
            raise Error("slots are found by their ids: give input_ids, not inputs_embeds")
        count = past + x.size(1)
        if count > self.limit and (mask is None or (count := mask.sum(1).max()) > self.limit):
            others = count - self.n_tokens
            raise Error(f"{self.n_tokens} prompt tokens and {others} others do not fit the {self.limit} positions")
        return x, mask, pads

    def forward(
        self, input_ids=None, *, inputs_embeds=None, attention_mask=None, position_ids=None, past_key_values=None,
        labels=None, **options,
    ):  # fmt: skip
        """The model's call. position_ids, labels and attention_mask are the input's own."""
        if (input_ids is None) == (inputs_embeds is None):
            raise Error("give either input_ids or inputs_embeds")
        n, past = self.n_tokens, 0 if past_key_values is None else past_key_values.get_seq_length()
        T = (input_ids if inputs_embeds is None else inputs_embeds).size(1)
        x, mask, pads = self.insert(input_ids, inputs_embeds, attention_mask, past)
        new = x.size(1)  # T; or n + T where H was put in front
        if position_ids is not None and self.pseudo_id is None:
            position_ids = position_ids.expand(len(x), -1) + n
            if past == 0:
                position_ids = join(torch.arange(n, device=x.device)[None], position_ids, pads)
        elif position_ids is None and mask is not None:
            position_ids = (mask.long().cumsum(1) - 1).clamp(min=0)[:, -new:]  # pads are not counted
        if labels is not None and self.pseudo_id is not None:
            labels = labels.masked_fill(labels == self.pseudo_id, -100)
        elif labels is not None and past == 0:
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
        x, mask, _ = self.insert(input_ids, None, mask)
        end = int(mask.sum(1).max()) + max_new_tokens - 1  # the last token is not read
        if end > self.limit:
            tokens = f"the input, {self.n_tokens} prompt tokens and {max_new_tokens} new ones"
            raise Error(f"{tokens} need {end} positions; the model has {self.limit}")
        return self.model.generate(
            input_ids=input_ids, inputs_embeds=x, attention_mask=mask, max_new_tokens=max_new_tokens, **options
        )


# ----------------------------------------------------------------------------------------------------- verbs and files


@torch.no_grad()
def fold_ptuning(model):
    """Evaluates the encoder once and throws it away: what the model infers (under no_grad) is the same, bit for bit."""
    if model.encoder is not None:
        model.prompt_embeddings, model.encoder = nn.Parameter(model.prompt().clone()), None
    return model


@torch.no_grad()
def ptuning_state_dict(model):
    """What the training came to, under peft's name: the content of adapter_model.safetensors."""
    return {"prompt_embeddings": model.prompt().detach()}


@torch.no_grad()
def load_ptuning_state_dict(model, state):
    """The reverse, which leaves the model folded. Error, with nothing loaded, if the two do not fit."""
    if state.keys() != {"prompt_embeddings"}:
        raise Error(f"a prompt's file holds prompt_embeddings and nothing else, not {', '.join(state) or 'nothing'}")
    H, shape = state["prompt_embeddings"], (model.n_tokens, model.ptuning_config["token_dim"])
    if H.shape != shape:
        raise Error(f"the prompt is {tuple(H.shape)} in the file and {shape} here")
    if not H.is_floating_point() or H.element_size() < 2:
        raise Error(f"the prompt is {H.dtype} in the file, which holds no trained numbers")
    fold_ptuning(model).prompt_embeddings.copy_(H)


def ptuning_config(model):
    """The adapter_config.json that goes with ptuning_state_dict. With slots anywhere, peft refuses it."""
    return dict(model.ptuning_config)


def ptuning_arguments(config):
    """PTuning's arguments, from an adapter_config.json of ours or peft's. Error for what this file does not do."""
    if not isinstance(config, dict) or config.get("peft_type") not in ("P_TUNING", "P_TUNING_TEMPLATE"):
        raise Error("adapter_config.json is no P-tuning's: its peft_type must be P_TUNING or P_TUNING_TEMPLATE")
    for key, allowed in (
        ("task_type", ["CAUSAL_LM", None]), ("num_transformer_submodules", [1, None]), ("modules_to_save", [None, []]),
        ("encoder_reparameterization_type", ["MLP", "LSTM"]),
    ):  # fmt: skip
        if config.get(key, allowed[0]) not in allowed:
            raise Error(f"adapter_config.json: {key} must be one of {allowed}, not {config[key]!r}")
    arguments = {"encoder": config.get("encoder_reparameterization_type", "MLP").lower()}
    fields = [("n_tokens", "num_virtual_tokens", (int,)), ("hidden", "encoder_hidden_size", (int, type(None)))]
    if arguments["encoder"] == "lstm":
        fields.append(("layers", "encoder_num_layers", (int,)))
    if config["peft_type"] == "P_TUNING_TEMPLATE":
        fields += [("template", "template", (str, type(None))), ("pseudo_id", "pseudo_id", (int,))]
    for argument, key, kind in fields:
        value = arguments[argument] = config.get(key, 2 if key == "encoder_num_layers" else None)
        if type(value) not in kind or (argument in ("hidden", "layers") and value is not None and value < 1):
            raise Error(f"adapter_config.json: {key} cannot be {value!r}")
    return arguments


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
    base = Tiny()
    model = PTuning(base, template="[P][P]{source}[P] # module: [P]")
    ids = torch.tensor([model.fill([3, 1, 4, 1, 5], encode=lambda text: [30 + len(text) % 10])])
    print(f"the filled template, [P] as {model.pseudo_id}, its anchor as 31: {ids[0].tolist()}")
    x = base.wte(ids.clamp(max=39))
    x[0, [0, 1, 7, 9]] = model.prompt()
    by_hand = base(x).logits
    print(f"model(ids) against base(words and H): {(model(ids).logits - by_hand).abs().max():.1e}")
    words = ids[:, 2:7]
    same = torch.equal(PTuning(base, template="{source}")(words).logits, base(base.wte(words)).logits)
    print(f"a template without slots is the base: {same}")
    before = [p.clone() for p in base.parameters()]
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.Adam(trained, lr=0.01), []
    for _ in range(60):
        optimizer.zero_grad()
        losses.append(nn.functional.cross_entropy(model(ids).logits[0, 1:6], words[0]))
        losses[-1].backward()
        optimizer.step()
    same = all(map(torch.equal, before, base.parameters()))
    print(f"60 steps on the encoder: loss {losses[0]:.2f} to {losses[-1]:.2f}; the base is unchanged: {same}")
    with torch.no_grad():
        encoded = model(ids).logits
    same = torch.equal(fold_ptuning(model)(ids).logits, encoded)
    numbers = sum(p.numel() for p in trained)
    print(f"folded, {numbers:,} trained numbers are {model.prompt().numel()}; the logits are the same: {same}")
    with torch.device("meta"):  # shapes without memory
        numbers = sum(p.numel() for p in PromptEncoder(20, 768, "lstm", 384, 2).parameters())
    print(f"GPT-2, 20 slots: {numbers:,} trained, {20 * 768:,} stored, of 124,439,808 parameters")
