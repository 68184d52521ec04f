# SPDX-License-Identifier: MIT
"""How many bytes a model takes, for inference and for training: by formula, and counted from live tensors.

    python -m nanopeft.memory 6B                   weights in fp32, 16 bits, int8, NF4
    python -m nanopeft.memory 7B --gpus 8          states of training: fp32, mixed precision, LoRA, QLoRA, ZeRO 0 to 3
    python -m nanopeft.memory gpt2 --method lora --rank 8 --batch 4 --length 256        one step, item by item

Inference. Ψ parameters, b bytes each; a GB is 1e9 bytes. 6B: 24 GB in fp32, 12 in 16 bits, 6 in int8, 3.1 in NF4 (4.127
bits with the scales). A 16-bit float has no "integer" bits: fp16 is 1 sign, 5 exponent and 10 mantissa bits, bf16 1, 8
and 7; the exponent is a power of two and sets the range, the mantissa the precision.

Training with Adam keeps parameter, gradient, m and v. That full training of 6B takes "6B · 4" has three readings:
    four equal copies in fp32       4 + 4 + 4 + 4         16 Ψ = 96 GB    four times the fp32 model's 24
    four equal copies in 16 bits    2 + 2 + 2 + 2          8 Ψ = 48 GB    four times 12, but small updates round to zero
    mixed precision                 2 + 2 + (4 + 4 + 4)   16 Ψ = 96 GB    master copy, m, v in fp32: eight times 12
So mixed precision saves time and activations, not states.

LoRA freezes 2 Ψ and trains little. 6B in 16 bits is 12 GB, and with a "little extra" about 14. What that is, for 28
layers of width 4096 (gpt-6b below, 11.71 GB), r = 8 on all linear layers, one row of 512 tokens:
    A, B, m and v                       12 bytes · 14.7 million        0.18 GB
    activations                         about 28 layers · 512 · 16 d · 2 bytes    1.92 GB
    a chunk of logits, and other things of the moment                  0.04 GB    together 13.8 GB
It is the activations, and they grow with the batch: with 4 rows the sum is 19.6 GB. The gradients of A and B, 0.06 GB,
come when the logits have gone; whole, those would be 0.05 GB in 16 bits, and several times that with their log-softmax
and gradient in fp32.

ZeRO on N devices divides the optimizer's states (stage 1), the gradients too (2), the parameters too (3): 7B on 8 takes
112, 38.5, 26.25, 14 GB. Stage 2 is 2Ψ + (2 + 12)Ψ/N; 2Ψ + 2Ψ + 12Ψ/N is stage 1. Memory falls with the stage; so does
speed, in stage 3 and with offload. Offloaded states are on the host, out of the sum; paged ones (QLoRA) move there only
while another tensor needs the room: they ride out a peak and change no sum. The formulas are zero.py's.

Activations are what forward keeps for backward. A linear layer x Wᵀ keeps x for dW, and for dx only W: frozen it keeps
nothing, but LoRA beside it keeps x for dA. Below the first trained parameter nothing is kept. For our GPT on a CPU this
is exact, and the peak to 3 in a hundred (one thread; the fp32 copies of wide.py come on top). A GPU has norms'
statistics in fp32, a few bytes of random state, and a higher peak, for it takes the loss and AdamW in larger pieces. A
Llama is counted as if written like our GPT. torch.compile keeps what it likes.

Letters: B rows, T tokens, n = B T; L layers, d width, w that of all heads' keys, f the MLP's, H heads, V vocabulary, P
positions; e bytes of the run's type; r rank, m bottleneck, N adapters (or devices), p vectors of a prompt or prefix, h
the width of what makes them; R rows in the first chunk of the loss, R2 in the second, F of which are softmaxed at once.

Papers: ZeRO, arXiv 1910.02054, section 3.1; activations, arXiv 2205.05198, section 4; QLoRA, arXiv 2305.14314.
"""

import argparse
import json
import os
import re
import sys
import weakref
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist

from nanopeft import adamw, gpt
from nanopeft.zero import zero_bytes

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
SETTINGS = {  # what a technique is asked for in its own file, and what it takes by default; as letters in formulas
    "full": {}, "lora": {"rank": 8, "targets": "all-linear"}, "prompt": {"tokens": 20},
    "qlora": {"rank": 8, "targets": "all-linear", "quant": "nf4"}, "prefix": {"tokens": 20, "hidden": None},
    "adapter": {"bottleneck": None, "placement": "houlsby"}, "fusion": {"bottleneck": None, "adapters": 2},
    "ptuning": {"tokens": 20, "encoder": "lstm", "hidden": None, "layers": 2, "template": False},
}  # fmt: skip
LETTERS = {"rank": "r", "bottleneck": "m", "adapters": "N", "tokens": "p", "hidden": "h"}


class Error(ValueError):
    """What cannot be counted; the message says what would be right."""


# --------------------------------------------------------------------------------------------------------------- models


def gpt2(L, d, H, V=50257, P=1024):
    return dict(model_type="gpt2", n_layer=L, n_embd=d, n_head=H, vocab_size=V, n_positions=P)


def llama(L, d, H, kv, f):
    sizes = dict(num_hidden_layers=L, hidden_size=d, num_attention_heads=H, num_key_value_heads=kv, intermediate_size=f)
    return sizes | {"model_type": "llama"}


MODELS = {
    "nano": gpt2(6, 256, 4, 3072, 512), "distilgpt2": gpt2(6, 768, 12), "gpt2": gpt2(12, 768, 12),
    "gpt2-medium": gpt2(24, 1024, 16), "gpt2-large": gpt2(36, 1280, 20), "gpt2-xl": gpt2(48, 1600, 25),
    "gpt-6b": gpt2(28, 4096, 16, 50400, 2048),  # a GPT-2 in the sizes of GPT-J
    "llama-7b": llama(32, 4096, 32, 32, 11008), "llama-13b": llama(40, 5120, 40, 40, 13824),
    "llama-70b": llama(80, 8192, 64, 8, 28672),
}  # fmt: skip


def sizes_of(config):
    """The letters of the formulas and the layers, from what config.json holds: of our GPT, vars(model.config)."""

    def size(key, default):
        n = config.get(key, default)
        if type(n) is not int or not 0 < n <= 1 << 24:
            raise Error(f"{key} must be a whole number from 1 to {1 << 24}, not {n!r}")
        return n

    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind == "gpt2" and config.get("tie_word_embeddings", True):
        L, d, H, P = size("n_layer", 12), size("n_embd", 768), size("n_head", 12), size("n_positions", 1024)
        V, w, f = size("vocab_size", 50257), d, 4 * d if config.get("n_inner") is None else size("n_inner", 0)
        groups = [{"attn.c_attn": ("d", "3*d")}, {"attn.c_proj": ("d", "d")}]
        groups += [{"mlp.c_fc": ("d", "f")}, {"mlp.c_proj": ("f", "d")}]
        rest = {"token embedding, head": "V*d", "position embedding": "P*d", "norms": "(2*L + 1)*2*d"}
        rest |= {"biases": "L*(5*d + f)"}
    elif kind == "llama" and not config.get("attention_bias") and not config.get("mlp_bias"):
        L, d, H = size("num_hidden_layers", 32), size("hidden_size", 4096), size("num_attention_heads", 32)
        V, P, f = size("vocab_size", 32000), size("max_position_embeddings", 2048), size("intermediate_size", 11008)
        w = d // H * size("num_key_value_heads", H)
        if config.get("head_dim") not in (None, d // H):
            raise Error(f"head_dim must be hidden_size / num_attention_heads = {d // H}, not {config['head_dim']!r}")
        groups = [{"q_proj": ("d", "d"), "k_proj": ("d", "w"), "v_proj": ("d", "w")}, {"o_proj": ("d", "d")}]
        groups += [{"gate_proj": ("d", "f"), "up_proj": ("d", "f")}, {"down_proj": ("f", "d")}]
        rest = {"token embedding": "V*d", "norms": "(2*L + 1)*d"}
        rest |= {} if config.get("tie_word_embeddings") else {"head": "V*d"}
    else:
        raise Error("model_type must be gpt2 with a tied head, or llama without biases")
    if d % H:
        raise Error(f"the heads must divide the width, and {H} do not divide {d}")
    linears = {name: sizes for group in groups for name, sizes in group.items()}  # {name: (in, out)}
    s = SimpleNamespace(kind=kind, L=L, d=d, H=H, V=V, P=P, w=w, f=f, groups=groups, linears=linears, rest=rest)
    s.Ψ = total(items(parameters(s), s))
    return s


def find_sizes(name):
    """Of one of MODELS, a number such as 6B (which has Ψ and no layers), a config.json, or a folder that has one."""
    if name in MODELS:
        return sizes_of(MODELS[name])
    path = Path(name) / "config.json" if os.path.isdir(name) else Path(name)
    try:
        if os.path.isfile(path):  # Path.is_file raises if the name is too long
            return sizes_of(json.loads(path.read_text("utf-8")))
    except (OSError, ValueError, RecursionError) as error:  # ValueError: bad UTF-8, bad JSON, Error
        raise Error(f"{path} is no config.json that can be counted: {error}") from None
    match = re.fullmatch(r"(\d+\.?\d*)([KMBT])", name.upper())
    n = round(float(match[1]) * 1000 ** ("KMBT".index(match[2]) + 1)) if match else 0
    if not 1 <= n <= 1e15:
        raise Error(f"{name!r} is no size (124M, 6B; 1000T at most), no config.json, and none of {', '.join(MODELS)}")
    return SimpleNamespace(Ψ=n, linears={})


def run_of(s, method, precision="fp32", batch=16, length=128, accumulate=1, **settings):
    """The sizes with those of a run: B, T, n, e, the method, and its settings, r, m, N, p, h among them."""
    has, given = SETTINGS[method], settings.keys()
    if given - has.keys():
        raise Error(f"{method} takes no {min(given - has.keys())}; it has {', '.join(has) or 'nothing to set'}")
    for name, n in {"batch": batch, "length": length, **settings}.items():
        if type(n) is int and n < 1:
            raise Error(f"{name} must be at least 1, not {n}")
    has = {LETTERS.get(name, name): n for name, n in (has | settings).items()}
    s = SimpleNamespace(**vars(s) | has, B=batch, T=length, e=BYTES[precision], method=method, accumulate=accumulate)
    s.text, s.full = length, method == "full"
    if method in ("prompt", "ptuning") and not getattr(s, "template", False):
        s.T += s.p  # vectors in the input
    s.n = s.B * s.T
    if s.T + (s.p if method == "prefix" else 0) > s.P:
        raise Error(f"{length} tokens, and the method's own, do not fit the model's {s.P} positions")
    if method in ("adapter", "fusion"):
        s.m = s.m or max(1, s.d // 16)
    if method == "ptuning":
        s.h = s.h or max(1, s.d // 2 if s.encoder == "lstm" else s.d)
    ends, s.targets = getattr(s, "targets", []), []
    for end in s.linears if ends == "all-linear" else ends:
        found = [name for name in s.linears if f".{name}".endswith(f".{end}")]
        if not found:
            raise Error(f"targets are ends of {', '.join(s.linears)}, not {ends}")
        s.targets += [name for name in found if name not in s.targets]
    return s


# ------------------------------------------------------------------------------------------------------------- formulas


def nf4(n):
    """Two weights in a byte, a byte for each block of 64, 4 for each 256 of these, and 4 for their mean."""
    blocks = -(-n // 64)
    return -(-n // 2) + blocks + 4 * -(-blocks // 256) + 4


def int8(n_in, n_out):
    """A byte each, and 4 for the scale of each row."""
    return n_in * n_out + 4 * n_out


def items(formulas, s):
    """[(what, formula, its value)]: the text that is shown is what is computed."""
    formulas = formulas.items() if isinstance(formulas, dict) else formulas
    return [(what, of, eval(of, {"nf4": nf4, "int8": int8}, vars(s))) for what, of in formulas]


def total(found):
    return sum(size for _, _, size in found)


def parameters(s):
    return {name: f"L*{n_in}*{n_out}" for name, (n_in, n_out) in s.linears.items()} | s.rest


def trained(s):
    """The numbers that the method trains."""
    if s.full:
        return parameters(s)
    if s.method in ("lora", "qlora"):
        return {f"A, B of {name}": "L*r*({} + {})".format(*s.linears[name]) for name in s.targets}
    if s.method == "adapter":
        return {"Down and Up": ("2*" if s.placement == "houlsby" else "") + "L*(2*d*m + m + d)"}
    if s.method == "fusion":
        return {"Q, K, V": "L*(3*d*d + 2*d)"}
    if s.method == "prompt":
        return {"prompt": "p*d"}
    if s.method == "prefix":
        return {"E": "p*w", "MLP": "h*(w + 1) + 2*L*w*(h + 1)"} if s.h else {"prefix": "p*2*L*w"}
    if s.encoder == "mlp":
        return {"E": "p*d", "MLP": "h*(d + 1) + h*(h + 1) + d*(h + 1)"}
    lstm = "2*4*h*(d + h + 2) + (layers - 1)*2*4*h*(2*h + h + 2)"  # two directions, four gates
    return {"E": "p*d", "LSTM": lstm, "MLP": "2*h*(2*h + 1) + d*(2*h + 1)"}


def states(s):
    """Bytes of parameters, gradients and the optimizer's states."""
    found = {} if s.full else {f"{what}, frozen": f"e*{of}" for what, of in parameters(s).items()}
    for name in s.targets if s.method == "qlora" else []:
        n_in, n_out = s.linears[name]
        found[f"{name}, frozen"] = f"L*nf4({n_in}*{n_out})" if s.quant == "nf4" else f"L*int8({n_in}, {n_out})"
    if s.method == "fusion":
        found["adapters, frozen"] = "4*N*L*(2*d*m + m + d)"
    own = "e" if s.full else "4"  # what is put into a frozen model is in fp32
    found |= {what: f"{own}*({of})" for what, of in trained(s).items()}
    t = total(items(trained(s), s))
    master = {"master copy": f"4*{t}"} if s.full and s.e == 2 else {}
    # The gradient of a prompt in one fp32 row is a slice of the input's, all of which lives on with it
    gradients = "4*n*d" if s.method == "prompt" and s.B == 1 and s.e == 4 else f"{own}*{t}"
    return {
        "parameters": items(found, s), "gradients": items({"gradients": gradients}, s),
        "optimizer": items(master | {"m": f"4*{t}", "v": f"4*{t}"}, s),
    }  # fmt: skip


def activations(s):
    """Bytes of the distinct tensors, parameters aside, that forward leaves for backward."""
    kept = Counter()
    flows = s.full or s.method in ("prompt", "ptuning")  # whether a gradient goes on from here, down to the input
    half = s.e == 2  # what is trained is in fp32: to compute with, it is copied into 16 bits, and the copy is kept

    def keep(what, formula, when=True):
        if when:
            kept[what, formula] += 1

    def read(layers, what, formula, anyway=False):
        """Linear layers with one input. A frozen one does not keep it: dx = dy W takes the weight alone."""
        nonlocal flows
        adapted = [name for name in layers if name in s.targets]
        keep(what, formula, s.full or adapted or anyway)
        for name in adapted:
            n_in, n_out = layers[name]
            keep("x Aᵀ", "n*r*e")
            keep(f"16 bits of {name}'s A, B", f"r*({n_in} + {n_out})*e" if flows else f"r*{n_out}*e", half)
        flows = flows or bool(adapted)

    def adapter(after_attention=False):
        nonlocal flows
        if s.method == "adapter" and (s.placement == "houlsby" or not after_attention):
            # SiLU keeps its input, and Up SiLU's output; ReLU and Up keep the same
            keep("in adapters", "n*(d + 2*m)*e" if s.placement == "houlsby" else "n*(d + m)*e")
            keep("16 bits of Down, Up", "2*d*m*e" if flows else "d*m*e", half)
            flows = True

    norm = ("inputs of norms, and statistics", "n*(d + 2)*e" if s.kind == "gpt2" else "n*(d + 1)*e")
    qkv, out, up, down = s.groups
    for _ in range(s.L):
        keep(*norm, flows)
        read(qkv, "outputs of norms", "n*d*e")
        if s.method == "prefix":
            keep("k, v with the prefix, masks", "(2*B*w + T)*(p + T)*e")
            flows = True
        attends = flows
        keep("q, k, v, and log-sums of attention", "n*(d + 2*w)*e + 4*n*H", attends)
        read(out, "outputs of attention", "n*d*e", anyway=attends)  # attention itself keeps them
        adapter(after_attention=True)
        keep(*norm, flows)
        read(up, "outputs of norms", "n*d*e")
        keep("inputs of GELU", "n*f*e", flows and s.kind == "gpt2")
        keep("gate, SiLU(gate) and up", "3*n*f*e", flows and s.kind == "llama")
        read(down, "inputs of the MLP's last layer", "n*f*e")
        adapter()
        if s.method == "fusion":
            keep("x + m, Q (x + m), Σ p z, z and p", "n*(3*d + N*d + N)*e")
            keep("q K, and in adapters", "n*(d + N*m)*e", flows)
            keep("16 bits of Q, K, V, Down, Up", "(3*d + 1 + 2*N*m)*d*e" if flows else "(2*d + 1)*d*e", half)
            keep("I - V of the penalty", "4*d*d")
            flows = True
    keep(*norm, flows)
    keep("token ids and positions", "8*(n + T)", s.full)
    if s.method == "prefix" and s.h:
        keep("tanh of the prefix's MLP", "4*p*h")
    if s.method == "ptuning":
        keep("encoder's MLP", "2*4*p*2*h" if s.encoder == "lstm" else "2*4*p*h")
        if s.encoder == "lstm":
            keep("encoder's LSTM, as counted", str(lstm_bytes(s.p, s.d, s.h, s.layers)))
        keep("where the slots are", "n", s.template)
    keep("loss: gradient of its input", "4*B*(T - 1)*d")
    keep("loss: gradient of the head", "4*V*d", s.full)
    keep("loss: number of labels", "8")
    return items([(what, f"{times}*({of})" if times > 1 else of) for (what, of), times in kept.items()], s)


def lstm_bytes(p, d, h, layers):
    """What an LSTM keeps is its library's affair (oneDNN has a workspace): one is run, alone."""
    lstm = torch.nn.LSTM(d, h, layers, bidirectional=True, device="meta").to_empty(device="cpu")
    x = torch.zeros(p, d, requires_grad=True)
    with torch.enable_grad(), saved_bytes([x, *lstm.parameters()]) as saved:
        y, _ = lstm(x)
        return saved()


def peak(s, found):
    """The fullest moment of a step, in bytes, given what stands and is kept; what is small is left out."""
    s.saved, s.gradients = total(found["activations"]), total(found["gradients"])
    s.stays = total(found["parameters"] + found["optimizer"])
    # A chunk's logits, which their gradient takes the place of, and for a few rows at a time the log-softmax in fp32,
    # made from 16 bits by way of an fp32 copy. A trained head's gradient comes on top, in the type of the weights.
    s.R = min(max(256, (1 << 21) // s.V), s.B * (s.text - 1))
    s.R2 = min(s.R, s.B * (s.text - 1) - s.R)
    s.F = min(s.R, max(1, gpt.CHUNK * torch.get_num_threads() // s.V))
    copy, head = ("4" if s.e == 2 else "0"), ("V*d" if s.full else "0")
    chunks = [f"R*V*e + F*V*(4 + {copy})", f"R*V*e + {head}*e"]
    early = {"what stays": "stays", "activations": "saved"}
    early |= {"gradients of earlier micro-batches": "gradients"} if s.accumulate > 1 else {}
    late = {"what stays": "stays", "gradients": "gradients"}
    moments = {
        "in the loss": {
            **early,
            "logits of a chunk": f"max({', '.join(chunks)})",
            "output": f"({2 + (s.T > s.text)}*n + 3*R2)*d*e",
        },
        "in backward": {**early, "both sides of GELU": "2*n*f*e", "residual stream": "n*d*e"},
        "after backward": {**late, "embedding's, by head and by input": f"{head}*e", "input's": "n*d*e"},
        "in the optimizer": {**late, "AdamW's chunks": f"2*4*{adamw.CHUNK * torch.get_num_threads()}"},
    }
    each = [items({f"{when}: {what}": of for what, of in parts.items()}, s) for when, parts in moments.items()]
    return max(each, key=total)


# ----------------------------------------------------------------------------------------------------------- measuring


def storages(tensors):
    """{address: bytes} of the distinct pieces of memory behind tensors: a view or a tied weight counts once."""
    found = (t.untyped_storage() for t in tensors if torch.is_tensor(t))
    return {storage.data_ptr(): storage.nbytes() for storage in found if storage.nbytes()}


def measured_states(model, optimizer):
    """Bytes of the live tensors, buffers among them; between backward and zero_grad, after at least one step."""
    return {
        "parameters": sum(storages([*model.parameters(), *model.buffers()]).values()),
        "gradients": sum(storages([p.grad for p in model.parameters()]).values()),
        "optimizer": sum(storages([t for state in optimizer.state.values() for t in state.values()]).values()),
    }


def kept_by(engine):
    """Bytes that this rank of a zero.ZeRO keeps, padding and what is offloaded included; between backward and step."""
    model, flats = engine.model, engine.flats
    own = storages([*model.parameters(), *model.buffers(), *(flat.shard for flat in flats)])
    states = [t for state in engine.optimizer.state.values() for t in state.values()]
    states = storages([*states, *(flat.master for flat in engine.trained)])
    return {
        "parameters": sum(own.values()),
        "gradients": sum(storages([*(p.grad for p in model.parameters()), *(flat.grad for flat in flats)]).values()),
        "optimizer": sum(size for at, size in states.items() if at not in own),  # an fp32 parameter is its own master
    }


@contextmanager
def sent_elements():
    """`with sent_elements() as sent: one step`: {collective: elements that this rank sends}; single numbers aside."""
    sent, world = Counter(), dist.get_world_size()
    # Of a tensor of n elements all but this rank's own share goes out; on gloo all-gather is messages to the others
    share = {
        "all_reduce": ("all_reduce", 2 * (world - 1) / world),
        "all_to_all_single": ("reduce_scatter", (world - 1) / world),
        "reduce_scatter_tensor": ("reduce_scatter", (world - 1) / world),
        "reduce_scatter_single": ("reduce_scatter", (world - 1) / world),
        "all_gather_into_tensor": ("all_gather", world - 1),  # it is given the share itself
        "all_gather_single": ("all_gather", world - 1),
        "isend": ("all_gather", 1),
    }
    originals = {name: getattr(dist, name) for name in share if hasattr(dist, name)}  # torch 2.13 renamed some
    for function in originals:

        def counted(*arguments, function=function, **options):
            n = [x for x in arguments if torch.is_tensor(x)][-1].numel()
            name, part = share[function]
            sent[name] += n * part if n > 1 else 0
            return originals[function](*arguments, **options)

        setattr(dist, function, counted)
    try:
        yield sent
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


@contextmanager
def saved_bytes(stored):
    """`with saved_bytes([*model.parameters(), *model.buffers()]) as count: loss = ...`; count() before backward."""
    alive = weakref.WeakSet()  # a tensor is in it for as long as autograd keeps it

    def pack(tensor):
        saved = tensor.detach()
        alive.add(saved)
        return saved

    def count():
        own = storages(stored)
        return sum(size for at, size in storages(alive).items() if at not in own)

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        yield count


@contextmanager
def quiet():
    """The profiler writes a line at its start and end to the process's stderr, whatever Python says."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


@contextmanager
def peak_bytes(stored, device):
    """`with peak_bytes(tensors that are there before) as count: one step`, then count(): the most bytes in use."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield lambda: torch.cuda.max_memory_allocated(device)
        return
    now = peak = sum(storages(stored).values())
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
    with quiet():
        profiler.start()
    try:
        yield lambda: peak
    finally:
        with quiet():
            profiler.stop()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)


# -------------------------------------------------------------------------------------------------------------- answers


def step(s):
    """A step of training: {"parameters", "gradients", "optimizer", "activations", "peak": [(what, formula, bytes)]}."""
    found = states(s) | {"activations": activations(s)}
    return found | {"peak": peak(s, found)}


def predict(config, *run, **settings):
    """The same, from a config.json and run_of's other arguments."""
    return step(run_of(sizes_of(config), *run, **settings))


def inference(s):
    """Weights in each format. Quantized are the linear layers; all, if a number of parameters is all there is."""
    small = [f"{n_in}*{n_out}" for n_in, n_out in s.linears.values()]
    rest = f" + 2*(Ψ - L*({' + '.join(small)}))" if small else ""
    in_4 = "L*(" + " + ".join(f"nf4({of})" for of in small) + ")" if small else "nf4(Ψ)"
    in_8 = "L*(" + " + ".join(f"int8({i}, {o})" for i, o in s.linears.values()) + ")" if small else "1*Ψ"
    return items({"fp32": "4*Ψ", "fp16, bf16": "2*Ψ", "int8": in_8 + rest, "NF4": in_4 + rest}, s)


def training(s, gpus=1, stages=range(4), rank=8):
    """{how: [(part of the states, formula, bytes on each device)]}, Adam's states, activations aside."""
    if s.linears:
        run = run_of(s, "lora", length=1, rank=rank)
        t = total(items(trained(run), run))
    else:  # as if of 12 L d² weights with d = 128 L, which most models are near; LoRA has 16 r d in each layer
        d = (128 * s.Ψ / 12) ** (1 / 3)
        t = round(d / 128 * 16 * rank * d)
    nf4_model = inference(s)[3][2]
    found = {
        "all in fp32": ("4*Ψ", "4*Ψ", "(4 + 4)*Ψ"), "all in 16 bits": ("2*Ψ", "2*Ψ", "(2 + 2)*Ψ"),
        "mixed precision": ("2*Ψ", "2*Ψ", "(4 + 4 + 4)*Ψ"),
        f"LoRA, r = {rank}": (f"2*Ψ + 4*{t}", f"4*{t}", f"(4 + 4)*{t}"),
        f"QLoRA, r = {rank}": (f"{nf4_model} + 4*{t}", f"4*{t}", f"(4 + 4)*{t}"),
    }  # fmt: skip
    names = ("parameters", "gradients", "optimizer")
    found = {how: items(zip(names, formulas), s) for how, formulas in found.items()}
    for stage, offload in ((stage, offload) for stage in stages for offload in (None, "cpu")):
        size = zero_bytes(s.Ψ, gpus, stage, offload=offload)
        of = dict(zip(names, ("2*Ψ" + "/N" * (stage > 2), "2*Ψ" + "/N" * (stage > 1), "12*Ψ" + "/N" * (stage > 0))))
        of |= {"optimizer": "0", "offloaded": of["optimizer"]} if offload else {}
        found[f"ZeRO {stage}" + " + offload" * bool(offload)] = [(name, of[name], size[name]) for name in of]
    return found


# --------------------------------------------------------------------------------------------------------- command line


def positive(text):
    n = int(text)
    if not 1 <= n <= 1 << 20:
        raise argparse.ArgumentTypeError(f"must be from 1 to {1 << 20}, not {n}")
    return n


def refuse(message):
    raise Error(f"{message}; first comes a size (6B), a name (gpt2) or a config.json, and --help shows the rest")


def arguments():
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m nanopeft.memory", description=__doc__, formatter_class=formatter)
    parser.error = refuse  # one line instead of the whole usage
    add = parser.add_argument
    add("model", help=f"a number of parameters (6B, 124M), a config.json, or one of {', '.join(MODELS)}")
    add("--gpus", type=positive, help="states of training on each of so many devices")
    add("--stage", type=int, choices=range(4), help="with --gpus: this stage of ZeRO alone")
    add("--method", choices=[*SETTINGS], help="a step of training, item by item")
    add("--precision", choices=[*BYTES], help="of the model and the arithmetic (bf16)")
    add("--batch", type=positive, help="rows in a batch (1)")
    add("--length", type=positive, help="tokens in a row (512, or half of the model's positions)")
    add("--rank", type=positive, help="lora, qlora (8)")
    add("--quant", choices=["nf4", "int8"], help="qlora (nf4)")
    add("--bottleneck", type=positive, help="adapter, fusion (a sixteenth of the width)")
    add("--tokens", type=positive, help="prefix, prompt, ptuning (20)")
    add("--json", action="store_true", help="bytes, as JSON")
    args = parser.parse_args()
    # A flag works or is refused
    given = {name for name, value in vars(args).items() if value is not None} - {"model", "json"}
    args.sizes = find_sizes(args.model)
    if args.method and not args.sizes.linears:
        raise Error(f"{args.model} has no layers for --method: give a config.json, or one of {', '.join(MODELS)}")
    if args.gpus:
        mode, wrong = "--gpus", given - {"gpus", "stage", "rank"}
    elif args.method:
        mode, wrong = "--method", given & {"stage"}
    else:
        mode, wrong = "a model alone", given - ({"precision", "batch", "length"} if args.sizes.linears else set())
    if wrong:
        raise Error(f"--{min(wrong)} does not go with {mode}")
    args.settings = {name: getattr(args, name) for name in given & {"rank", "quant", "bottleneck", "tokens"}}
    return args


def main():
    args = arguments()
    s, letters = args.sizes, ["Ψ"]
    if args.gpus:
        parts = training(s, args.gpus, range(4) if args.stage is None else [args.stage], args.rank or 8)
    elif not s.linears:
        parts = {"weights": inference(s)}
    else:
        length = args.length or min(512, max(1, s.P // 2))
        s = run_of(s, args.method or "full", args.precision or "bf16", args.batch or 1, length, **args.settings)
        parts = step(s) if args.method else {"weights": inference(s)}
        letters = [x for x in (*"ΨLdwfHVPBTnermNph", "R", "R2", "F") if getattr(s, x, None)]
        parts["beside it"] = items({"keys and values, to generate": "2*L*n*w*e", "logits, if held whole": "n*V*e"}, s)
    if args.json:
        parts = {
            part: [dict(zip(("what", "formula", "bytes"), item)) for item in found] for part, found in parts.items()
        }
        print(json.dumps(parts, indent=2, ensure_ascii=False))
        return
    print(f"{args.model}: {', '.join(f'{x} = {getattr(s, x):,}' for x in letters)}; the letters are in --help")
    if args.gpus:
        print(f"training with Adam, activations aside: GB on each of N = {args.gpus} devices")
        print(f"{'':20}{'parameters':>12}{'gradients':>12}{'optimizer':>12}{'together':>12}{'offloaded':>12}")
        for how, found in parts.items():
            kept = [size for _, _, size in found[:3]]
            row = "".join(f"{size / 1e9:12,.2f}" for size in (*kept, sum(kept), total(found[3:])))
            print(f"{how:20}{row}   {' + '.join(of for _, of, _ in found[:3])}")
        return
    for part, found in parts.items():
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
