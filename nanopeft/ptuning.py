# SPDX-License-Identifier: MIT
"""P-tuning: prompt tuning whose virtual tokens come from a small encoder and may stand anywhere in the input.

    P = MLP(BiLSTM(e))        a reparametrization of prompt.py's P: the encoder is trained instead of P (or P = MLP(e))

    n virtual tokens, d embedding size, m LSTM units in each direction, E (V, d) the embedding table
    e (n, d) -> BiLSTM -> (n, 2m) -> Linear, ReLU -> (n, 2m) -> Linear -> P (n, d)
    trained: e, LSTM and MLP        frozen: the whole model        stored: P alone

A template says where the virtual tokens stand, as "[P][P]The capital of {source} is[P]" does for n = 3:

    template    [P]    [P]    The capital of     {source}           is       [P]
    input ids   V      V      a₀     ...  a_i    x₀     ...  x_k    a_i+1    V
    vectors     P[0]   P[1]   E[a₀]  ...         E[x₀]  ...         E[..]    P[2]
    label       -100   -100   -100   ...         -100   ...         -100     -100

No word has the id V. The words between are anchor tokens: they stay words and say what the task is about. The answer
follows the row, and the logits at the last [P] predict its first token. In labels the caller sets all but the answer to
-100, so that it alone is scored. Without a template all n virtual tokens are in front, as in peft.

What the paper wanted: a hand-written prompt's score can jump when one word changes. Trained vectors between fixed words
were steadier and better, on knowledge probing (LAMA) and SuperGLUE, for GPT and BERT.
Why an encoder: the paper argues that SGD changes numbers only near their start, so that vectors trained one by one end
in poor local minima, and that the vectors of a prompt should depend on one another. Whether it holds with Adam is a
question of measuring. In a small GPT-2 (6 layers, d = 256, words of RMS 0.083), n = 20, on English prose:

    60 steps of AdamW, 8 rows of 48 tokens   rate    validation loss    P moved by (RMS)
    prompt tuning, from words                0.1     4.26 -> 3.82       0.65
    prompt tuning, from words                3e-3    4.26 -> 3.79       0.03
    LSTM and MLP                             3e-3    4.30 -> 3.83       0.34
    MLP                                      3e-3    4.50 -> 3.89       2.0

Means of two seeds, whose last losses differ by at most 0.04. Here an encoder wins nothing, and the second row, which
stays nearest to its start, ends best. (The MLP also starts worst.) In longer runs the MLP passes the LSTM: 300 steps of
train.py end at 3.67 nats with it and at 3.70 with the LSTM. So it is train.py's default, as it is peft's. The LSTM's
virtual tokens start nearly equal: RMS 0.042, of which 0.010 is around their mean. Training spreads them to 0.2.
The encoder can be thrown away, because its one input, e, is the same for all examples. After training P is a constant,
which fold_ptuning computes once. Under no_grad the model infers the same, bit for bit; with gradients an LSTM rounds
otherwise.

Worked example: 20 virtual tokens in GPT-2 (d = 768; 124,439,808 parameters). The encoder of the paper's code (m = d/2,
two layers) trains 8,286,720 numbers, the MLP 1,787,136; stored are n d = 15,360. 8.29M trained is 6.7 % of GPT-2:
storage is saved, not training memory. Inference costs what prompt tuning's does, and nothing can be merged.

When to use it: a frozen model knows the answer and the wording of the question matters, as in knowledge probing and
few-shot classification. When not: the context is tight, a small model has a hard task such as tagging (P-tuning v2 is
better), or the model is so large that plain prompt tuning catches up. The usual choice today is LoRA.

Typical: 3 to 20 virtual tokens. The paper tunes frozen models (knowledge probing: rate 1e-5) and, with the prompt, the
models themselves (few-shot SuperGLUE: model 1e-5, prompt 1e-4). Here AdamW at 3e-3 on a frozen model, since runs are
short: Adam moves a number by about the rate in a step, and 300 steps at 1e-5 make 0.003. Place: near the answer. In
100 steps that learn to name a function's package 20 tokens behind its source came to 0.7 nats, in front to 2.8.

Pitfalls
* Cut a long source before apply_template, or virtual tokens are cut away. Spaces in the template are tokens too.
* Generated rows begin with the input's ids: drop pseudo_id, the V above, before decoding.
* The encoder is not stored. After fold_ptuning or loading, training goes on with P itself, as in prompt tuning.

Compared with related methods: prompt tuning (prompt.py) trains P directly and puts it in front; prefix-tuning
(prefix.py, for generation) and P-tuning v2 (for classification and tagging) train keys and values in every layer; LoRA
(lora.py) changes the weights. The whole family in one table: nanopeft/__init__.py

Papers: P-tuning (GPT Understands, Too), arXiv 2103.10385, section 3; P-tuning v2, arXiv 2110.07602.
"""

import re

import torch
import torch.nn as nn

try:
    from . import prompt
except ImportError:  # the two files pasted side by side, or this one run
    import prompt

Error = prompt.Error  # wrong use of P-tuning as well


def apply_template(template, source_ids, encode, pseudo_id):
    """Token ids: pseudo_id for each [P], source_ids for {source}, encode(text) for the anchors, with their spaces.

    encode adds no special tokens: lambda text: tokenizer.encode(text, add_special_tokens=False) in transformers.
    """
    if template.count("{source}") != 1:
        raise Error(f"a template has {{source}} exactly once, not as in {template!r}")
    ids = []
    for part in re.split(r"(\[P\]|\{source\})", template):
        if part:
            ids += [pseudo_id] if part == "[P]" else source_ids if part == "{source}" else encode(part)
    return ids


class PromptEncoder(nn.Module):
    """P (n, d) by an LSTM and an MLP, or the MLP alone; in peft's shapes, under peft's names."""

    def __init__(self, n, d, encoder, m, layers):
        super().__init__()
        self.embedding, self.lstm_head = nn.Embedding(n, d), None  # e
        if encoder == "lstm":
            self.lstm_head = nn.LSTM(d, m, layers, bidirectional=True)
            self.mlp_head = nn.Sequential(nn.Linear(2 * m, 2 * m), nn.ReLU(), nn.Linear(2 * m, d))
        else:
            hidden_layers = nn.Linear(d, m), nn.ReLU(), nn.Linear(m, m), nn.ReLU()
            self.mlp_head = nn.Sequential(*hidden_layers, nn.Linear(m, d))

    def forward(self):
        x = self.embedding.weight  # (n, d)
        if self.lstm_head is not None:
            x, _ = self.lstm_head.train()(x)  # (n, 2m); cuDNN has no backward in evaluation mode
        return self.mlp_head(x)  # (n, d)


class PTuning(prompt.PromptTuning):
    """Freezes a causal language model and puts n encoded vectors into its input; called like the model.

    template: where the virtual tokens stand; the method apply_template makes a row's ids. Without one: in front.
    pseudo_id: the id that holds their places, by default the first outside the vocabulary. If it is given without a
        template, the caller puts it into each row n times.
    n_tokens: n, by default the template's count of [P], or 20. encoder: "lstm" or "mlp".
    hidden: m, by default d/2 for the LSTM and d for the MLP. layers: the LSTM's.

    A call is PromptTuning.forward: it calls `insert` to build the input, and `insert` calls `virtual_tokens` for P.
    """

    def __init__(self, model, n_tokens=None, *, encoder="lstm", hidden=None, layers=2, template=None, pseudo_id=None):
        nn.Module.__init__(self)  # PromptTuning's own would draw a prompt
        n, least = 20 if n_tokens is None else n_tokens, 1
        if template is not None:  # n = 0 is allowed: it shows what the template's words reach alone
            n, least = len(apply_template(template, [], lambda text: [], None)), 0
            if n_tokens not in (None, n):
                raise Error(f"the template has {n} virtual tokens, and n_tokens is {n_tokens}: leave it out")
        self.n_positions = prompt.check_model(model, n, least)
        weight = model.get_input_embeddings().weight
        V, d = weight.shape
        pseudo_id = V if pseudo_id is None and template is not None else pseudo_id
        hidden = (max(1, d // 2) if encoder == "lstm" else d) if hidden is None else hidden
        if encoder not in ("lstm", "mlp") or (encoder == "mlp" and layers != 2):
            raise Error(f"encoder must be lstm, or mlp without layers, not {encoder!r} with layers={layers!r}")
        if any(type(size) is not int or size < 1 for size in (hidden, layers)):
            raise Error(f"hidden and layers must be whole numbers of at least 1, not {hidden!r} and {layers!r}")
        if pseudo_id is not None and not (type(pseudo_id) is int and abs(pseudo_id) < 1 << 31):
            raise Error(f"pseudo_id must be a token id, not {pseudo_id!r}")
        self.n_tokens, self.template, self.pseudo_id = n, template, pseudo_id
        self.n_in_front = n if pseudo_id is None else 0  # elsewhere input_ids has a place for each
        self.model = model.requires_grad_(False)
        factory_kwargs = dict(dtype=torch.promote_types(weight.dtype, torch.float32), device=weight.device)
        self.encoder = PromptEncoder(n, d, encoder, hidden, layers).to(**factory_kwargs) if n else None
        self.prompt_embeddings = None if n else nn.Parameter(torch.zeros(0, d, **factory_kwargs))  # P, once folded
        self.prompt_config = {
            "peft_type": "P_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": n, "token_dim": d,
            "num_transformer_submodules": 1, "encoder_reparameterization_type": encoder.upper(),
            "encoder_hidden_size": hidden, "encoder_num_layers": layers, "encoder_dropout": 0.0, "inference_mode": True,
        }  # fmt: skip
        if pseudo_id is not None:  # a type that peft does not open: it would put all in front
            self.prompt_config |= dict(peft_type="P_TUNING_TEMPLATE", template=template, pseudo_id=pseudo_id)

    def virtual_tokens(self):
        if self.encoder is None:
            return self.prompt_embeddings  # (n, d)
        # In full precision, as it is folded; on "meta" there are shapes alone, and no autocast
        with torch.autocast(self.encoder.embedding.weight.device.type.replace("meta", "cpu"), enabled=False):
            return self.encoder()  # (n, d)

    def generate(self, input_ids, max_new_tokens=None, **options):
        reads_ids = {"no_repeat_ngram_size", "prompt_lookup_num_tokens", "repetition_penalty"} & options.keys()
        if reads_ids and (self.pseudo_id or 0) >= len(self.model.get_input_embeddings().weight):
            raise Error(f"{min(reads_ids)} needs ids of the vocabulary: PTuning(model, pseudo_id=one that no text has)")
        return super().generate(input_ids, max_new_tokens, **options)

    def apply_template(self, source_ids, encode):
        """A row's token ids, by the template."""
        if self.template is None:
            raise Error("there is no template to apply: PTuning(model, template=...)")
        return apply_template(self.template, source_ids, encode, self.pseudo_id)

    def insert(self, ids, x, mask, positions, labels, past):
        """E[ids] with P in the places of pseudo_id: the k-th in a row becomes P[k]. Without such places, P in front."""
        if self.pseudo_id is None:
            return super().insert(ids, x, mask, positions, labels, past)
        if ids is None and not past:
            raise Error("virtual tokens are found by their ids: give input_ids, not inputs_embeds")
        if ids is not None:
            is_virtual = ids == self.pseudo_id  # (B, T)
            n = 0 if past else self.n_tokens  # later steps of generation find P in the cache
            if (is_virtual.sum(1) != n).any():
                found = f"{n} virtual tokens, not {is_virtual.sum(1).tolist()}"
                raise Error(f"each row must have {found}: in the first step all, and cut a long source beforehand")
            x = self.model.get_input_embeddings()(ids.masked_fill(is_virtual, 0))  # (B, T, d); V has no row in E
            if not past:
                P = self.virtual_tokens().expand(len(x), -1, -1).to(x.dtype)  # (B, n, d)
                x = x.masked_scatter(is_virtual[..., None], P)  # (B, T, d)
        if labels is not None:
            labels = labels.masked_fill(labels == self.pseudo_id, -100)
        return x, mask, positions, labels


@torch.no_grad()
def fold_ptuning(model):
    """Evaluates the encoder once and discards it: what the model infers (under no_grad) is the same, bit for bit."""
    if (tuned := prompt.find_tuned(model)).encoder is not None:
        tuned.prompt_embeddings, tuned.encoder = nn.Parameter(tuned.virtual_tokens()), None
    return model


ptuning_state_dict = prompt.prompt_state_dict  # {"prompt_embeddings": P}, with or without the encoder
ptuning_config = prompt.prompt_config  # the adapter_config.json that goes with it; with a template, peft refuses it


@torch.no_grad()
def load_ptuning_state_dict(model, state):
    """The reverse, which leaves the model folded. Error, with nothing loaded, if the two do not fit."""
    P = prompt.fitting_prompt(model, state)
    prompt.find_tuned(fold_ptuning(model)).prompt_embeddings.copy_(P)


if __name__ == "__main__":
    from types import SimpleNamespace

    torch.manual_seed(0)
    base = nn.Module()  # a recurrent language model, called like one of Hugging Face's
    base.E, base.rnn = nn.Embedding(40, 32), nn.GRU(32, 32, batch_first=True)
    base.get_input_embeddings = lambda: base.E
    base.forward = lambda inputs_embeds, **_: SimpleNamespace(logits=base.rnn(inputs_embeds)[0] @ base.E.weight.T)
    model = PTuning(base, template="[P][P]The capital of {source} is[P]")
    ids = torch.tensor([model.apply_template([21, 22], encode=lambda text: [len(word) for word in text.split()])])
    print(f"the template's ids, {model.pseudo_id} for each [P]: {ids[0].tolist()}")
    x = base.E(ids.clamp(max=39))
    x[0, [0, 1, 8]] = model.virtual_tokens()
    print(f"model(ids) against base(words and P): {(model(ids).logits - base(x).logits).abs().max():.1e}")
    with torch.no_grad():
        trained = sum(p.numel() for p in model.encoder.parameters())
        same = torch.equal(model(ids).logits, fold_ptuning(model)(ids).logits)
    print(f"folded, {trained:,} trained numbers are {model.prompt_embeddings.numel()}; the logits are the same: {same}")
