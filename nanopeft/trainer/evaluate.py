# SPDX-License-Identifier: MIT
"""What a model is worth: its loss, the share of right completions, and a text that one can read."""

import codecs
import math
import sys

import torch
from tqdm import tqdm

from nanopeft import data, gpt
from nanopeft.trainer import Error
from nanopeft.trainer.methods import apply_template, free_positions


def count_labels(labels):
    """How many tokens are scored: position t predicts labels[:, t + 1]."""
    return (labels[:, 1:] != -100).sum().item()


@torch.no_grad()
def evaluate(model, examples, ranks):
    """(nats per token, bits per byte) over all of the validation data, of which each rank takes a share."""
    model.eval()
    nats, tokens = 0.0, 0
    batches = list(examples.batches(32))[ranks.rank :: ranks.world]
    for ids, labels in tqdm(batches, desc="validation", leave=False, delay=1, disable=ranks.rank > 0):
        n = count_labels(labels)
        nats += model(ids.to(ranks.device), labels=labels.to(ranks.device)).loss.item() * n
        tokens += n
    model.train()
    nats, tokens = ranks.sum(nats), ranks.sum(tokens)
    return nats / tokens, nats / math.log(2) / max(1, count_bytes(examples))


def count_bytes(examples):
    """Bytes of text that `batches` scores, end-of-text aside: what bits per byte are counted over.

    Nats per token depend on the tokenizer: longer tokens are harder to guess, but there are fewer. Bits per byte
    compare any two models on one text: 2.46 nats a token at 3.28 bytes each are 2.46 / ln 2 / 3.28 = 1.08.
    """
    encoding, scored = examples.encoding, torch.cat([labels[labels != -100] for _, labels in examples.batches(32)])
    return sum(map(len, encoding.decode_tokens_bytes(scored[scored != encoding.eot_token].tolist())))


def accuracy(model, examples, ranks):
    """Share of the examples whose completion, generated greedily after the prompt, is right to the letter."""
    model.eval()
    right = 0
    batches = []
    for items in examples.length_buckets(32):
        prompts, completions = zip(*items)
        fits = max(map(len, prompts)) + max(map(len, completions)) <= free_positions(model)
        batches += [items] if fits else [[item] for item in items]  # alone each does
    for items in tqdm(batches[ranks.rank :: ranks.world], desc="accuracy", leave=False, disable=ranks.rank > 0):
        prompts, completions = zip(*items)
        longest, n = max(map(len, prompts)), max(map(len, completions))
        ids = torch.tensor([[examples.pad] * (longest - len(p)) + p for p in prompts], device=ranks.device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=ranks.device)
        texts = gpt.generate(model, ids, n, attention_mask=mask, eos_token_id=examples.pad)[:, longest:].tolist()
        right += sum(text[: len(c)] == c for text, (_, c) in zip(texts, items))
    model.train()
    return ranks.sum(right) / len(examples.items)


def first_words(examples):
    """The start of the data, as a prompt for a sample: the first words, or the first pair's prompt."""
    if isinstance(examples, data.TokenStream):
        return examples.encoding.decode(examples.tokens[1:17].tolist()).rstrip("\ufffd")  # the rest of a character
    prompt, _ = examples.items[0]
    return examples.encoding.decode(prompt[1:]).lstrip("\ufffd")


def sample(model, encoding, text, device, seed):
    """The text and what the model makes of it, up to 80 tokens drawn from the 20 likeliest at each place."""
    model.eval()
    ids = apply_template(model, [encoding.eot_token, *encoding.encode_ordinary(text)], encoding)
    left = free_positions(model) - len(ids)
    if left < 1:
        raise Error(f"--prompt has {len(ids)} tokens; {free_positions(model) - 1} are the most")
    if left < 80:
        print(f"the prompt takes {len(ids)} of {free_positions(model)} positions: {left} are left", file=sys.stderr)
    ids = torch.tensor([ids], device=device)
    torch.manual_seed(seed)
    ids = gpt.generate(model, ids, min(80, left), temperature=0.8, top_k=20, eos_token_id=encoding.eot_token)
    model.train()
    words = [i for i in ids[0].tolist() if 0 <= i < encoding.n_vocab and i != encoding.eot_token]  # no virtual tokens
    return codecs.getincrementaldecoder("utf-8")("replace").decode(encoding.decode_bytes(words))  # whole characters
