# SPDX-License-Identifier: MIT
"""How many bytes a model takes, for inference and for training: the formulas, and a program that evaluates them.

    python -m nanopeft.memory 6B                   weights in fp32, 16 bits, int8, NF4
    python -m nanopeft.memory 7B --gpus 8          states of training: fp32, mixed precision, LoRA, QLoRA, ZeRO 0 to 3
    python -m nanopeft.memory gpt2 --method lora --rank 8 --batch 4 --length 256        one step, item by item
Defaults: --precision bf16 --batch 1 --length 512 --rank 8 --quant nf4 --bottleneck d/16 --tokens 20 (virtual ones).

Letters: Ψ parameters, Ψ_t of them trained; B rows of T tokens, n = B·T; d width, L blocks, H heads, V vocabulary;
e bytes of a number (fp32 4, bf16 and fp16 2). 1 GB is 1e9 bytes, 1 GiB is 2^30: 12 GB are 11.18 GiB.

ACTIVATIONS are the numbers of forward that backward needs. One block of GPT-2 keeps these, in units of n·d numbers:

    x ─┬─ ln_1 ─ c_attn ─ attention ─ c_proj ─(+)─┬─ ln_2 ─ c_fc ─ GELU ─ mlp.c_proj ─(+)─
       └───────────────────────────────────────┘  └────────────────────────────────────┘
    kept for backward      by                                       full   LoRA   prompt
    input of ln_1          the norm                                   1      1      1
    output of ln_1         c_attn, for dW = dyᵀ x; LoRA, for dA       1      1      0
    q, k, v                attention                                  3      3      3
    output of attention    attention; c_proj                          1      1      1
    input of ln_2          the norm                                   1      1      1
    output of ln_2         c_fc                                       1      1      0
    output of c_fc         GELU                                       4      4      4
    output of GELU         mlp.c_proj                                 4      4      0
    sum                                                              16     16     10

So L blocks keep 16·L·n·d·e bytes. GPT-2 on 4 rows of 256 tokens in bf16: 12·16·1024·768·2 = 0.302 GB, more than the
0.249 GB of its weights. With --method full the program prints 0.462. Of that 0.154 is the head's gradient, 4·V·d bytes:
gpt.py makes it already in the loss, and it is kept for backward like activations. 0.005 is statistics of norms and
attention, the last norm's input and the gradient of the loss's input.
A Llama block with fused norms keeps 6 + 2·w/d + 4·f/d, full or with LoRA on all linear layers (w: width of the keys,
f: of the gated MLP). For llama-7b this is 18.75. Frozen it keeps 4 + 2·w/d + 3·f/d, 14.06.

Does PEFT cut activations? LoRA hardly, prompt tuning by 6 of 16. The gradient runs through frozen layers too, down to
the lowest trained number. Below it nothing is kept, so the first block keeps a little less. A frozen linear layer does
not need x, since dx = dy W: the last column. But LoRA on it needs the same x for dA. Gradients and optimizer states are
what all of PEFT cuts.

T² term: fused attention (FlashAttention, torch's scaled_dot_product_attention) keeps no scores; backward computes them
again. Unfused attention keeps T scores for each head and token: with dropout a block keeps n·d·(34 + 5·H·T/d) bytes in
16 bits (arXiv 2205.05198). 34 is 2·16 and two dropout masks of 1 byte; 5 is the softmax 2, its mask 1, the product of
both 2. For GPT-2 at T = 1024 the term 5·H·T/d is 80, more than twice the 34. Where gpt.py takes plain attention (short
rows in bf16 on a CPU), backward computes the scores again as well. Logits: n·V numbers, 0.206 GB in fp32 for the batch
above, three times with log-softmax and gradient. gpt.py takes them in chunks and never holds them all.

STATES with Adam, in bytes for each parameter, on each of N devices. Activations come on top.
                       parameters + gradients + optimizer           6B       7B, N = 8
    all in fp32        4 + 4 + (4 + 4)             16 Ψ       96.00 GB       112.00 GB
    all in 16 bits     2 + 2 + (2 + 2)              8 Ψ       48.00 GB        56.00 GB    rounds small updates away
    mixed precision    2 + 2 + (4 + 4 + 4)         16 Ψ       96.00 GB       112.00 GB    fp32 master copy, m, v
    LoRA, r = 8        2 Ψ + 16 Ψ_t                           12.26 GB        14.28 GB    adapters in fp32
    QLoRA, r = 8       0.516 Ψ + 16 Ψ_t                        3.35 GB         3.89 GB    NF4 has 4.127 bits
    ZeRO 1             2 + 2 + 12 / N                                             38.50 GB    of mixed precision:
    ZeRO 2             2 + (2 + 12) / N                                           26.25 GB    zero.py
    ZeRO 3             (2 + 2 + 12) / N                                           14.00 GB
Ψ_t is the sum of r·(in + out) over the adapted layers, 16·L·d·r for all four of a GPT-2 block. A bare 6B is taken as
12·L·d² with d = 128·L: L = 31.25, Ψ_t = 16.0 million. 0.516 Ψ is a lower bound, since embeddings stay in 16 bits.
"Full training takes about 4 times the model": the four are parameter, gradient, m and v. For 6B this is 4 times the
24 GB of an fp32 model; or 4 times 12 GB, all in 16 bits; or 8 times 12 GB in mixed precision, which is usual. Mixed
precision saves time and activations, not states. Other optimizers keep, without the master copy: SGD 0, with momentum
4, Adam 8, 8-bit Adam 2.03 bytes. 8-bit Adam with the master copy makes 2 + 2 + (4 + 2) = 10 Ψ, without it 6 Ψ.

"LoRA on 6B takes 12 GB and a little extra, about 14." What is the extra? gpt-6b, r = 8 on all linear layers, one row of
512 tokens, bf16, one thread, at the fullest moment of a step, in the loss:
    the frozen model                                  2 bytes · 5.85 billion        11.707 GB
    A, B, m, v; gradients, 0.059 GB, come later       12 bytes · 14.7 million        0.176 GB
    activations                                       16·L·n·d·e                     1.879 GB
    their statistics, x Aᵀ, 16-bit copies of A and B, a chunk of logits              0.081 GB
    sum                                                                             13.843 GB
It is activations, and grows with the batch: 4 rows make 19.621 GB. Then the fullest moment is in backward, because the
gradients around GELU grow with the tokens and a chunk of logits does not.

PEAK. Forward fills the activations; backward frees them and fills the gradients. The fullest moment is one of four:
    in the loss           all activations, a chunk of logits and its softmax    few tokens, large vocabulary
    as backward starts    all activations, the head's gradient scaled           full training
    in backward           all activations, gradients around the last GELU       many tokens
    after backward        all gradients, no activations                         full training on very few tokens

OUT OF MEMORY? Try in this order:                       what changes              costs
    1. k smaller micro-batches, gradients accumulated   activations → 1/k         k passes, each less efficient
    2. recomputation (recompute.py), --recompute 1      a block → n·d·e           2/9 of a step's FLOPs; LoRA 1/2
    3. LoRA                                             14 Ψ → 16 Ψ_t             capacity to learn much that is new
    4. QLoRA; in full training 8-bit Adam               2 → 0.516 Ψ; 16 → 10 Ψ    time to dequantize; rounding
    5. ZeRO over N devices, then offload                states → 1/N              traffic (zero.py); a slow update
Recomputation (gradient checkpointing) runs each block again in backward, so 16·n·d·e live for one block at a time.

INFERENCE takes 2 Ψ: each weight once, in 16 bits, and one layer's activations at a time. On top comes the KV cache,
keys and values of all earlier tokens: 2·L·d·T·B·e bytes, for llama-7b and one row of 2048 tokens 1.074 GB beside 13.477
GB of weights. Grouped-query attention caches fewer heads: llama-70b 8 instead of 64, an eighth.
PITFALLS. A GPU needs more than the sum: CUDA context, cuBLAS workspace, fragmentation. Validation without no_grad keeps
activations. On a CPU this program is exact for our GPT, the peak within 3 %. Llama is an estimate.
Relatives: lora.py cuts gradients and states, qlora.py (quant.py) weights too, zero.py divides states over devices.
The whole family in one table: nanopeft/__init__.py. Papers: ZeRO, arXiv 1910.02054; activations, 2205.05198, section
4; checkpointing, 1604.06174; FlashAttention, 2205.14135; QLoRA, 2305.14314; 8-bit Adam, 2110.02861.
"""

import argparse
import json
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import torch


class Error(ValueError):
    """What cannot be counted; the message says what would be right."""


# Further letters: P positions, Ψ_q weights of linear layers, r rank, m bottleneck, p virtual tokens
NF4 = "(1/2 + 1/64 + 1/4096)"  # bytes: 4 bits, a 1-byte scale for 64 weights, a 4-byte scale for 256 of these
INFERENCE = {"fp32": "4*Ψ", "fp16, bf16": "2*Ψ", "int8": "1*Ψ_q + 2*(Ψ - Ψ_q)", "NF4": f"{NF4}*Ψ_q + 2*(Ψ - Ψ_q)"}
ON_TOP = {"keys and values, to generate": "2*L*n*w*e", "logits, if held whole": "n*V*e"}
PARTS = ("parameters", "gradients", "optimizer")
TRAINING = {
    "all in fp32": ("4*Ψ", "4*Ψ", "(4 + 4)*Ψ"), "all in 16 bits": ("2*Ψ", "2*Ψ", "(2 + 2)*Ψ"),
    "mixed precision": ("2*Ψ", "2*Ψ", "(4 + 4 + 4)*Ψ"), "LoRA": ("2*Ψ + 4*Ψ_t", "4*Ψ_t", "(4 + 4)*Ψ_t"),
    "QLoRA": (f"{NF4}*Ψ_q + 2*(Ψ - Ψ_q) + 4*Ψ_t", "4*Ψ_t", "(4 + 4)*Ψ_t"),
    "ZeRO 0": ("2*Ψ", "2*Ψ", "12*Ψ"), "ZeRO 1": ("2*Ψ", "2*Ψ", "12*Ψ/N"),
    "ZeRO 2": ("2*Ψ", "2*Ψ/N", "12*Ψ/N"), "ZeRO 3": ("2*Ψ/N", "2*Ψ/N", "12*Ψ/N"),
}  # fmt: skip


def evaluate(formulas, s):
    """[(what, formula, bytes)] of {what: formula}: texts that Python and JavaScript read alike; s has the letters."""
    return [(what, of, math.ceil(eval(of, {"ceil": math.ceil}, vars(s)))) for what, of in formulas.items()]


def total(parts):
    return sum(size for _, _, size in parts)


def training(s, gpus=1, rank=8):
    """{how: [(part of the states, formula, bytes on each device)]}."""
    d = (128 * s.Ψ / 12) ** (1 / 3)  # if Ψ = 12 L d² and d = 128 L, as in most models nearly; LoRA then has 16 L d r
    Ψ_t = run_of(s, "lora", length=1, rank=rank).Ψ_t if s.linears else round(16 * d / 128 * d * rank)
    s, found = SimpleNamespace(**vars(s), N=gpus, Ψ_t=Ψ_t), {}
    for how, formulas in TRAINING.items():
        parts = dict(zip(PARTS, formulas))
        found[f"{how}, r = {rank}" if "LoRA" in how else how] = evaluate(parts, s)
        if "ZeRO" in how:
            found[f"{how} + offload"] = evaluate(parts | {"optimizer": "0", "offloaded": parts["optimizer"]}, s)
    return found


def states(s):
    """{part: [(what, formula, bytes)]}. What a method adds to a frozen model is in fp32."""
    full, sizes = s.method == "full", [s.linears[name] for name in s.targets]
    model = {"linear layers": "e*Ψ_q", "all other": "e*(Ψ - Ψ_q)"}
    if s.method == "qlora":
        nf4 = "ceil({0}*{1}/2) + ceil({0}*{1}/64) + 4*ceil({0}*{1}/16384) + 4"
        quantized, rest = (" + ".join(of.format(*size) for size in sizes)
                           for of in (nf4 if s.quant == "nf4" else "({0} + 4)*{1}", "{0}*{1}"))  # fmt: skip
        model = {f"{s.quant} layers": f"L*({quantized})", "all other": f"e*(Ψ - L*({rest}))"}
    model |= {"frozen adapters": "4*adapters*L*(2*d*m + m + d)"} if s.method == "fusion" else {}
    model |= {} if full else {"trained": f"4*({s.trained})"}
    adam = {"m": "4*Ψ_t", "v": "4*Ψ_t"} | ({"master copy": "4*Ψ"} if full and s.e == 2 else {})
    return {part: evaluate(x, s) for part, x in zip(PARTS, (model, {"gradients": "e*Ψ_t" if full else "4*Ψ_t"}, adam))}


def activations(s):
    """[(what, formula, bytes)] that forward keeps for backward: the docstring's table times L, and what is small."""
    full, gpt2, own = s.method == "full", s.kind == "gpt2", s.placement if s.method == "adapter" else s.method
    # Where a block keeps or trains something, in the order of forward
    places = ["norm", "qkv", "attention", "out", "adapter", "norm 2", "up", "GELU", "down", "adapter 2"]
    groups = zip(("qkv", "out", "up", "down"), s.groups)
    lora = [(place, *group[name]) for place, group in groups for name in group if name in s.targets]  # (place, in, out)
    kept = {"qkv", "out", "up", "down"} if full else {place for place, _, _ in lora}  # whose x is kept
    # Up to the place of the lowest trained number the first block keeps nothing, so that there only L - 1 blocks do
    lowest = {"prefix": "qkv", "houlsby": "adapter", "pfeiffer": "adapter 2", "fusion": "adapter 2"}.get(own)
    lowest = min((place for place, _, _ in lora), key=places.index, default=lowest)
    L = {place: "(L - 1)" if lowest and places.index(place) <= places.index(lowest) else "L" for place in places}
    formulas = {
        "inputs of norms, and statistics": f"({L['norm']} + {L['norm 2']} + 1)*n*(d + {2 if gpt2 else 1})*e",
        "outputs of norms": f"{len(kept & {'qkv', 'up'})}*L*n*d*e",
        "q, k, v, and attention's statistics": f"{L['attention']}*(n*(d + 2*w)*e{'' if s.plain else ' + 4*n*H'})",
        "outputs of attention": f"{'L' if 'out' in kept else 0 if s.plain else L['attention']}*n*d*e",
        "inputs of GELU" if gpt2 else "gate, SiLU(gate) and up": f"{L['GELU']}*{'' if gpt2 else '3*'}n*f*e",
        "inputs of the MLP's last layer": "L*n*f*e" if "down" in kept else "0",
        "loss: gradient of its input": "4*B*(T - 1)*d",  # the loss in chunks runs its own backward and keeps no logits
        "head's gradient, made in the loss": "4*V*d" if full else "0",
        "token ids and positions, number of labels": "8*(n + T) + 8" if full else "8",
    }
    formulas |= OWN.get(own, {})
    if lora:
        formulas["x Aᵀ"] = f"{len(lora)}*L*n*r*e"
        unused = "".join(f" - r*{i}" for place, i, _ in lora if place == lowest)  # no dx there, so no A
        formulas["copies in 16 bits"] = f"({s.trained}{unused})*e"  # of fp32 numbers, to compute: A for dx, B for dA
    if s.method == "ptuning" and s.encoder == "lstm":
        formulas["encoder's LSTM, as counted"] = f"{lstm_bytes(s)}"
    if s.R:  # blocks keep their input alone, the first among them
        formulas = {what: re.sub(r"\bL( - 1)?\b", "(L - R)", of) for what, of in formulas.items()}
        formulas["inputs of recomputed blocks"] = "R*n*d*e"
        if own == "prefix":  # the cache that a block gets has the keys and values of the blocks before it
            formulas["k, v of recomputed blocks, in caches"] = "(R - 1)*2*B*w*(p + T)*e"
    return [item for item in evaluate(formulas, s) if item[2] and (s.e == 2 or item[0] != "copies in 16 bits")]


def peak(s, found):
    """[(what, formula, bytes)] of the fullest moment (PEAK above), without small tensors; found: all other parts."""
    full, sums = s.method == "full", {part: f"{total(items)}" for part, items in found.items()}
    before = sums if s.accumulate > 1 else {part: of for part, of in sums.items() if part != "gradients"}
    s.rows = min(max(256, LOGITS[s.device] // s.V), s.B * (s.text - 1))  # gpt.py's loss makes so many rows of logits
    s.chunk = s.rows * s.V  # at a time, and takes so many logits through the softmax
    if s.device == "cpu":
        s.chunk = min(s.chunk, LOSS_CHUNK * torch.get_num_threads())
    x = "(3*n + 3*rows)*d*e" if s.T > s.text else "(2*n + 3*rows)*d*e"  # one copy more to cut off virtual tokens
    one, two = (total(activations(SimpleNamespace(**vars(s) | {"L": L, "R": 0}))) for L in (1, 2))
    again = {"a block again": f"{two - one}", "freed: the block's input, last norm, loss": "-3*n*d*e"}
    again = again if s.R and (s.L - 1) % s.every == 0 else {}  # whether it is the block where backward begins
    freed = {"freed: inputs of an adapter, last norm": "-2*n*d*e"} if s.method in ("adapter", "fusion") else {}
    head, softmax = {"gradient of the head": "V*d*e"}, {"log-softmax in fp32": "chunk*(4 + 4*(e == 2))"}
    moments = {
        "in the loss": before | {"logits": "rows*V*e", "x": x} | (head if full else softmax),
        "as backward starts": before | ({"gradient of the head": "V*d*(4 + e*(e == 2))"} if full else {}),
        "in backward": before | again | {"both sides of GELU": "2*n*f*e", "residual stream": "n*d*e"} | freed,
        "after backward": {part: sums[part] for part in PARTS} | (head if full else {}) | {"input": "n*d*e"},
    }
    each = [evaluate({f"{when}: {what}": of for what, of in parts.items()}, s) for when, parts in moments.items()]
    return max(each, key=total)


def step_bytes(s):
    """{part: [(what, formula, bytes)]} of a step of training: PARTS, "activations" and "peak"."""
    found = states(s) | {"activations": activations(s)}
    return found | {"peak": peak(s, found)}


def predict(config, *run, **settings):
    """The same from config.json's dict and (method, precision, batch, length, accumulate, **settings)."""
    return step_bytes(run_of(sizes_of(config), *run, **settings))


# ------------------------------------------------------------------------------------------------------------ plumbing
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
LOSS_CHUNK = 1 << 17  # gpt.py's CHUNK
LOGITS = {"cpu": 1 << 21, "cuda": 1 << 26}  # and its LOGITS
SETTINGS = {  # the arguments of each method's own file, with the defaults there
    "full": {}, "lora": {"rank": 8, "targets": "all-linear"}, "prompt": {"tokens": 20},
    "qlora": {"rank": 8, "targets": "all-linear", "quant": "nf4"}, "prefix": {"tokens": 20, "hidden": None},
    "adapter": {"bottleneck": None, "placement": "houlsby"}, "fusion": {"bottleneck": None, "adapters": 2},
    "ptuning": {"tokens": 20, "encoder": "lstm", "hidden": None, "layers": 2, "template": False},
}  # fmt: skip
TRAINED = {  # Ψ_t of a method; of LoRA it is L*r*(in + out) for each linear layer of a block
    "full": "Ψ", "prompt": "p*d", "prefix": "p*2*L*w", "prefix, MLP": "p*w + hidden*(w + 1) + 2*L*w*(hidden + 1)",
    "adapter": "sites*L*(2*d*m + m + d)", "fusion": "L*(3*d*d + 2*d)",
    "ptuning, mlp": "p*d + hidden*(d + 1) + hidden*(hidden + 1) + d*(hidden + 1)",
    "ptuning, lstm": "p*d + 8*hidden*(d + hidden + 2 + (layers - 1)*(3*hidden + 2)) + (2*hidden + 1)*(2*hidden + d)",
}  # fmt: skip
OWN = {  # activations of a method's layers; the lowest Down needs no dx, hence no copy of its weights
    # Houlsby: two a block, where Down keeps x (d), SiLU and Up their inputs (m each). Pfeiffer: one, ReLU and Up share.
    "houlsby": {"in adapters": "2*L*n*(d + 2*m)*e", "copies in 16 bits": "(4*L - 1)*d*m*e"},
    "pfeiffer": {"in adapters": "L*n*(d + m)*e", "copies in 16 bits": "(2*L - 1)*d*m*e"},
    "fusion": {"x, Q x, Σ p z; z, K z and p": "L*n*(3*d + adapters*(2*d + 1))*e",
               "I - V, squared in the penalty": "L*4*d*d", "in adapters": "(L - 1)*n*adapters*m*e",
               "copies in 16 bits": "(L*d + (L - 1)*(2*d + 2*adapters*m))*d*e"},
    "prefix": {"k, v with the prefix, masks": "L*(2*B*w + T)*(p + T)*e", "MLP's tanh": "4*p*hidden"},
    "ptuning": {"encoder's MLP": "(1 + (encoder == 'lstm'))*8*p*hidden", "template's places": "n*template"},
}  # fmt: skip
KEYS = {  # the letters in config.json
    "gpt2": dict(L="n_layer", d="n_embd", H="n_head", V="vocab_size", P="n_positions", f="n_inner"),
    "llama": dict(L="num_hidden_layers", d="hidden_size", H="num_attention_heads", V="vocab_size",
                  P="max_position_embeddings", f="intermediate_size", kv="num_key_value_heads"),
}  # fmt: skip
LINEARS = {  # {name: (in, out)} of those that share an input
    "gpt2": [{"attn.c_attn": ("d", "3*d")}, {"attn.c_proj": ("d", "d")},
             {"mlp.c_fc": ("d", "f")}, {"mlp.c_proj": ("f", "d")}],
    "llama": [{"q_proj": ("d", "d"), "k_proj": ("d", "w"), "v_proj": ("d", "w")}, {"o_proj": ("d", "d")},
              {"gate_proj": ("d", "f"), "up_proj": ("d", "f")}, {"down_proj": ("f", "d")}],
}  # fmt: skip
MODELS = {
    name: {"model_type": kind} | dict(zip(KEYS[kind].values(), map(int, sizes)))
    for name, kind, *sizes in map(str.split, (
        "nano gpt2 6 256 4 3072 512", "distilgpt2 gpt2 6 768 12 50257 1024", "gpt2 gpt2 12 768 12 50257 1024",
        "gpt2-medium gpt2 24 1024 16 50257 1024", "gpt2-large gpt2 36 1280 20 50257 1024",
        "gpt2-xl gpt2 48 1600 25 50257 1024", "gpt-6b gpt2 28 4096 16 50400 2048",  # a GPT-2 of GPT-J's size
        "llama-7b llama 32 4096 32 32000 2048 11008 32", "llama-13b llama 40 5120 40 32000 2048 13824 40",
        "llama-70b llama 80 8192 64 32000 4096 28672 8",  # Llama 2; the smaller two are the first Llama
    ))
}  # fmt: skip


def sizes_of(config):
    """The letters of the formulas and the linear layers, from a config.json; of our GPT, from vars(model.config)."""
    kind = config.get("model_type") if isinstance(config, dict) else None
    tied = kind in KEYS and config.get("tie_word_embeddings", kind == "gpt2")
    if kind not in KEYS or (kind == "gpt2" and not tied) or config.get("attention_bias") or config.get("mlp_bias"):
        raise Error("model_type must be gpt2 with a tied head, or llama without biases")
    s = SimpleNamespace(kind=kind, d=0, H=0, groups=LINEARS[kind])
    for letter, key in KEYS[kind].items():
        n = {"f": 4 * s.d, "kv": s.H}.get(letter) if config.get(key) is None else config[key]
        if type(n) is not int or not 0 < n <= 1 << 24:
            raise Error(f"{key} must be a whole number from 1 to {1 << 24}, not {n!r}")
        setattr(s, letter, n)
    if (config.get("head_dim") or s.d // s.H) * s.H != s.d:
        raise Error(f"the heads, {s.H} of {config.get('head_dim') or s.d // s.H}, must make the width, {s.d}")
    s.w = s.d if kind == "gpt2" else s.d // s.H * s.kv
    s.linears = {name: sizes for group in s.groups for name, sizes in group.items()}
    biases = " + P*d + (2*L + 1)*d + L*(5*d + f)" if kind == "gpt2" else ""  # and positions
    s.Ψ_q = total(evaluate({name: f"L*{i}*{o}" for name, (i, o) in s.linears.items()}, s))
    s.Ψ = s.Ψ_q + total(evaluate({"embeddings, norms": f"{1 if tied else 2}*V*d + (2*L + 1)*d{biases}"}, s))
    return s


def find_sizes(name):
    """Sizes of one of MODELS, of a config.json or its folder, or of a number such as 6B, which has Ψ and no layers."""
    try:
        path = Path(name, "config.json" if Path(name).is_dir() else "")
        if name in MODELS or path.is_file():
            return sizes_of(MODELS[name] if name in MODELS else json.loads(path.read_text("utf-8")))
    except (OSError, ValueError, RecursionError) as error:  # ValueError: bad UTF-8, bad JSON, Error
        raise Error(f"{name} is no config.json that can be counted: {error}") from None
    match = re.fullmatch(r"(\d+\.?\d*)([KMBT])", name.upper())
    n = round(float(match[1]) * 1000 ** ("KMBT".index(match[2]) + 1)) if match else 0
    if not 1 <= n <= 1e15:
        raise Error(f"{name!r} is no size (124M, 6B; 1000T at most), no config.json, and none of {', '.join(MODELS)}")
    return SimpleNamespace(Ψ=n, Ψ_q=n, linears={})


def run_of(s, method, precision="fp32", batch=16, length=128, accumulate=1, recompute=0, device="cpu", short=0,
           **settings):  # fmt: skip
    """The sizes s together with those of a run. recompute: every so many blocks; 0: none. device: cpu or cuda.
    short: tokens of a row up to which attention is plain, as gpt.py says; by default it is fused."""
    if settings.keys() - SETTINGS[method].keys():
        raise Error(f"{method} takes {', '.join(SETTINGS[method]) or 'no settings'}, not {', '.join(settings)}")
    settings, letters = SETTINGS[method] | settings, {"rank": "r", "bottleneck": "m", "tokens": "p"}
    s = SimpleNamespace(**vars(s) | {letters.get(name, name): value for name, value in settings.items()})
    s.method, s.accumulate, s.B, s.text, s.e = method, accumulate, batch, length, BYTES[precision]
    s.T = length + (s.p if method in ("prompt", "ptuning") and not settings.get("template") else 0)
    s.device = device if device in LOGITS else "cpu"
    s.plain = s.T <= short and method != "prefix"  # whose prefix needs a mask
    s.every, s.R = recompute, -(-s.L // recompute) if recompute else 0  # R recomputed blocks
    s.n, s.m = s.B * s.T, settings.get("bottleneck") or max(1, s.d // 16)
    s.sites = 2 if settings.get("placement") == "houlsby" else 1
    if s.T + (s.p if method == "prefix" else 0) > s.P:
        raise Error(f"{length} tokens, and the method's own, do not fit the model's {s.P} positions")
    if "hidden" in settings and not s.hidden:  # a prefix without MLP, or P-tuning's default
        s.hidden = 0 if method == "prefix" else max(1, s.d // 2) if s.encoder == "lstm" else s.d
    ends = s.linears if settings.get("targets") == "all-linear" else settings.get("targets", [])
    found = {end: [name for name in s.linears if f".{name}".endswith(f".{end}")] for end in ends}
    if not all(found.values()):
        raise Error(f"targets are ends of {', '.join(s.linears)}, not {ends}")
    s.targets = [name for name in s.linears if any(name in names for names in found.values())]
    key = f"ptuning, {s.encoder}" if method == "ptuning" else "prefix, MLP" if settings.get("hidden") else method
    s.trained = " + ".join("L*r*({} + {})".format(*s.linears[name]) for name in s.targets) or TRAINED[key]
    s.Ψ_t = total(evaluate({"": s.trained}, s))
    return s


def lstm_bytes(s):
    """What P-tuning's LSTM keeps depends on torch's library for it, so one is run and counted."""
    lstm = torch.nn.LSTM(s.d, s.hidden, s.layers, bidirectional=True, device="meta").to_empty(device="cpu")
    x, kept = torch.zeros(s.p, s.d, requires_grad=True), []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.untyped_storage()) or t, lambda t: t)
    with torch.enable_grad(), hooks:
        lstm(x)
    stored = {t.untyped_storage().data_ptr() for t in (x, *lstm.parameters())}
    return sum({of.data_ptr(): of.nbytes() for of in kept if of.data_ptr() not in stored}.values())

# -------------------------------------------------------------------------------------------------------- command line

def main():
    def refuse(message):
        raise Error(f"{message}; first comes a size (6B), a name (gpt2) or a config.json, and --help shows the rest")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error, add = refuse, parser.add_argument  # one line instead of the whole usage
    add("model", help=f"a number of parameters (6B, 124M), a config.json, or one of {', '.join(MODELS)}")
    for flag in ("gpus", "stage", "batch", "length", "rank", "bottleneck", "tokens", "recompute"):
        add(f"--{flag}", type=int, choices=range(4) if flag == "stage" else None)
    for flag, choices in {"method": SETTINGS, "precision": BYTES, "quant": ("nf4", "int8")}.items():
        add(f"--{flag}", choices=choices)
    add("--json", action="store_true")
    args = parser.parse_args()
    s, gpus = find_sizes(args.model), args.gpus is not None
    given = {name: value for name, value in vars(args).items() if value is not None and name not in ("model", "json")}
    fits = {"gpus", "stage", "rank"} if gpus else {"precision", "batch", "length"} if s.linears else set()
    fits = given.keys() - {"stage"} if args.method and s.linears and not gpus else fits
    for name, value in given.items():  # a flag works or is refused
        if name not in fits:
            raise Error(f"--{name} does not go with {args.model} and the other flags")
        if type(value) is int and name != "stage" and not 1 <= value <= 1 << 20:
            raise Error(f"--{name} must be from 1 to {1 << 20}, not {value}")
    parts = {"weights": evaluate(INFERENCE, s)}
    if gpus:
        only, parts = "ZeRO" if args.stage is None else f"ZeRO {args.stage}", training(s, args.gpus, args.rank or 8)
        parts = {how: found for how, found in parts.items() if "ZeRO" not in how or only in how}
    elif s.linears:
        own = ("rank", "quant", "bottleneck", "tokens", "recompute")
        settings = {name: given[name] for name in own if name in given}
        length = args.length or min(512, max(1, s.P // 2))
        s = run_of(s, args.method or "full", args.precision or "bf16", args.batch or 1, length, **settings)
        parts = (step_bytes(s) if args.method else parts) | {"beside it": evaluate(ON_TOP, s)}
    if args.json:
        named = {part: [dict(zip(("what", "formula", "bytes"), item)) for item in of] for part, of in parts.items()}
        return print(json.dumps(named, indent=2, ensure_ascii=False))
    text = " ".join(of for found in parts.values() for _, of, _ in found)
    letters = [f"{x} = {n:,}" for x, n in vars(s).items() if type(n) is int and re.search(rf"\b{x}\b", text)]
    print(f"{args.model}: {', '.join(letters)}; the letters are in --help")
    if gpus:
        print(f"training with Adam, activations aside: GB on each of N = {args.gpus} devices")
        print(f"{'':20}{'parameters':>12}{'gradients':>12}{'optimizer':>12}{'together':>12}{'offloaded':>12}")
    for part, found in parts.items():
        if gpus:
            sizes = [size for _, _, size in found[:3]]
            row = "".join(f"{size / 1e9:12,.2f}" for size in (*sizes, sum(sizes), total(found[3:])))
            print(f"{part:20}{row}   {' + '.join(of for _, of, _ in found[:3])}")
            continue
        print(part)
        summed = [("together", "", total(found))] if len(found) > 1 and part not in ("weights", "beside it") else []
        for what, of, size in found + summed:
            print(f"  {what:36}{size:20,}{size / 1e9:12,.3f} GB   {of}")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # not every terminal has a Ψ
    try:
        main()
    except Error as error:
        print(f"memory.py: {error}", file=sys.stderr)
        sys.exit(2)
