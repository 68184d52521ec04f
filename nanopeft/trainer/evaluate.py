# SPDX-License-Identifier: MIT
"""What a model is worth: its loss, and the share of right completions."""

import math

import torch
from tqdm import tqdm

from nanopeft import gpt
from nanopeft.trainer.methods import free_positions


def count_labels(labels):
    """How many tokens are scored: position t predicts labels[:, t + 1]."""
    return (labels[:, 1:] != -100).sum().item()


def to_device(tensors, device):
    """Copies to a GPU go on while the host does, for they come from pinned memory."""
    if device.type != "cuda":
        return [t.to(device) for t in tensors]
    return [t if t.is_cuda else t.pin_memory().to(device, non_blocking=True) for t in tensors]


def mean_loss(model, batch, device):
    """The mean over the scored tokens of a batch. Positions of packed rows say where an example begins."""
    ids, labels, *positions = to_device(batch, device)
    return model(ids, labels=labels, **({"position_ids": positions[0]} if positions else {})).loss


def batch_size(examples):
    """32 rows, or fewer long ones, of 16,384 tokens in all: more than training's might not fit the memory."""
    return max(1, min(32, (1 << 14) // examples.length))


@torch.no_grad()
def evaluate(model, examples, ranks):
    """(nats per token, bits per byte) over all of the validation data, of which each rank takes a share."""
    model.eval()
    nats, tokens = 0.0, 0
    batches = list(examples.batches(batch_size(examples)))[ranks.rank :: ranks.world]
    for batch in tqdm(batches, desc="validation", leave=False, delay=1, disable=ranks.rank > 0):
        n = count_labels(batch[1])
        nats += mean_loss(model, batch, ranks.device).item() * n
        tokens += n
    model.train()
    nats, tokens = ranks.sum(nats), ranks.sum(tokens)
    return nats / tokens, nats / math.log(2) / max(1, count_bytes(examples))


def count_bytes(examples):
    """Bytes of text that `batches` scores, end-of-text aside: what bits per byte are counted over.

    Nats per token depend on the tokenizer: longer tokens are harder to guess, but there are fewer. Bits per byte
    compare any two models on one text: 2.46 nats a token at 3.28 bytes each are 2.46 / ln 2 / 3.28 = 1.08.
    """
    encoding, scored = examples.encoding, torch.cat([labels[labels != -100] for _, labels, *_ in examples.batches(32)])
    return sum(map(len, encoding.decode_tokens_bytes(scored[scored != encoding.eot_token].tolist())))


def accuracy(model, examples, ranks):
    """Share of the examples whose completion, generated greedily after the prompt, is right to the letter."""
    model.eval()
    right = 0
    batches = []
    for items in examples.length_buckets(batch_size(examples)):
        prompts, completions, *_ = zip(*items)
        fits = max(map(len, prompts)) + max(map(len, completions)) <= free_positions(model)
        batches += [items] if fits else [[item] for item in items]  # alone each does
    for items in tqdm(batches[ranks.rank :: ranks.world], desc="accuracy", leave=False, disable=ranks.rank > 0):
        prompts, completions, *_ = zip(*items)
        prompts = [p or [examples.pad] for p in prompts]  # a model reads something before it writes
        longest, n = max(map(len, prompts)), max(map(len, completions))
        ids = torch.tensor([[examples.pad] * (longest - len(p)) + p for p in prompts], device=ranks.device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=ranks.device)
        texts = gpt.generate(model, ids, n, attention_mask=mask, eos_token_id=examples.pad)[:, longest:].tolist()
        right += sum(text[: len(c)] == c for text, (_, c, *_) in zip(texts, items))
    model.train()
    return ranks.sum(right) / len(examples.items)
