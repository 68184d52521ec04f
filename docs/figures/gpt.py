# SPDX-License-Identifier: MIT
"""Figures of the page on GPT and its loss."""

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from figures import new
from nanopeft import gpt
from nanopeft.trainer import bases

BLOCK, HEADS = 2, (0, 2)
TEXT = "def add(a, b):\n    return a + b\n"


def gpt_attention():
    """Attention of two heads in one block of the embedded GPT over a few tokens: the causal mask is the empty half."""
    figure, axes = new(width=7.6, height=4.1, columns=2)
    encoding, model = bases.load_tokenizer("nano"), bases.load_base("nano", torch.float32)
    ids = torch.tensor([[encoding.eot_token, *encoding.encode_ordinary(TEXT)]])
    words = [encoding.decode([i]).replace("\n", "\\n").replace(" ", "·") for i in ids[0, 1:].tolist()]
    found = {}
    attention = model.transformer.h[BLOCK].attn
    attention.register_forward_pre_hook(lambda module, inputs: found.update(x=inputs[0]))
    with torch.no_grad():
        model(ids)
        q, k, _ = attention.c_attn(found["x"]).split(model.config.n_embd, -1)
    T, heads = ids.size(1), attention.n_head
    q, k = (t.view(T, heads, -1).transpose(0, 1)[None] for t in (q, k))
    mask = torch.full((T, T), -torch.inf).triu(1)
    p = gpt.plain_attention(q, k, torch.eye(T).expand(1, heads, T, T), mask)[0]  # v = 1: what comes out is the softmax
    for head, axis in zip(HEADS, axes):
        axis.imshow(p[head].masked_fill(mask < 0, torch.nan), cmap="Blues", vmin=-0.08, vmax=1)  # 0 is not quite white
        axis.set_title(f"p[{head}]", fontsize=10)
        axis.set_xticks(range(T), ["<eot>", *words], rotation=90)
        axis.set_yticks(range(T), ["<eot>", *words])
        axis.set(xlabel="s", ylabel="t")
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
    return figure


def gpt_cache():
    """FLOPs of the embedded GPT for one more token after S others: all again, or the new one alone with a KV cache."""
    figure, axes = new()
    model, lengths, again, one = gpt.GPT(), [1, 4, 16, 64, 256, 511], [], []
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):  # torch counts this one's products
        for S in lengths:
            ids, cache = torch.zeros(1, S + 1, dtype=torch.long), gpt.KVCache()
            with FlopCounterMode(display=False) as count:
                model(ids, logits_to_keep=1)
            again.append(count.get_total_flops())
            model(ids[:, :S], past_key_values=cache, logits_to_keep=1)
            with FlopCounterMode(display=False) as count:
                model(ids[:, S:], past_key_values=cache, logits_to_keep=1)
            one.append(count.get_total_flops())
    axes.plot(lengths, again, marker=".", label="model(input_ids)")
    axes.plot(lengths, one, marker=".", label="model(step, past_key_values=cache)")
    axes.set(xlabel="S", ylabel="FLOPs", yscale="log", ylim=(1e6, 2e10))
    axes.set_xscale("log", base=2)
    axes.legend(frameon=False)
    return figure
