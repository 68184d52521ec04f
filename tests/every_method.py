# SPDX-License-Identifier: MIT
"""Our GPT in a small shape with each method of train.py on it, by the names of its flags."""

import argparse

import torch

from nanopeft import adapter, gpt
from nanopeft.trainer.methods import METHODS

SHAPE = dict(vocab_size=64, n_positions=64, n_embd=32, n_layer=12, n_head=4)  # more blocks than variants of one code
VARIANTS = [
    *METHODS, "qlora --quant int8", "adapter --placement houlsby", "prefix --hidden 16", "ptuning --encoder mlp",
]  # fmt: skip


def arguments_of(variant):
    """What train.py's flags would give for "qlora --quant int8"."""
    name, *flags = variant.split()
    shared = dict(method=name, init=None, ranks=None, start=None, fsdp=False, zero=None, tensor=None, pipeline=None,
                  steps=10, compile=False, weight_decay=0.0, lora_plus=None, lr=1e-3, tokens=4)  # fmt: skip
    values = {k.strip("-"): int(v) if v.isdigit() else v for k, v in zip(flags[::2], flags[1::2])}
    own = {"init": "vocabulary"} if name == "prompt" else {}
    return argparse.Namespace(**METHODS[name].defaults | shared | own | values)


def small_model(variant, shape=SHAPE, dtype=torch.float32):
    """(a GPT with random weights and the method on it, its arguments)."""
    args = arguments_of(variant)
    torch.manual_seed(0)
    model, settings = gpt.GPT(**shape).to(dtype), None
    if args.method == "fusion":
        parts = [adapter.add_adapter(gpt.GPT(**shape), placement="pfeiffer", reduction=8) for _ in range(2)]
        for p in [p for part in parts for p in part.parameters() if p.requires_grad]:
            p.data += 0.1 * torch.randn(p.shape)  # Up is 0 at the start, and nothing would come out of an adapter
        settings = {"adapters": [(adapter.adapter_config(part), adapter.adapter_state_dict(part)) for part in parts]}
    method = METHODS[args.method]
    return method.add(model, **settings or method.settings(args, None, None, model)), args
