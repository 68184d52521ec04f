# SPDX-License-Identifier: MIT
"""Text from a model: a sample before and after training, and the answers of --generate."""

import os
import sys
from pathlib import Path

import torch

from nanopeft import data, gpt
from nanopeft.trainer import Error, checkpoint, files
from nanopeft.trainer.methods import apply_template, free_positions


def opening(args, encoding, valid):
    """The token ids that a run's samples go on from: of --prompt, or the start of the validation data."""
    if args.prompt is not None:
        return ask(args.prompt, valid.asked, encoding)
    if isinstance(valid, data.TokenStream):
        return valid.tokens[:17].tolist()
    return valid.items[0][0]


def ask(prompt, asked, encoding):
    """The ids of a prompt as the data put one (files.how_asked), up to where its answer begins."""
    if asked == "chat":
        message = {"role": "user", "content": prompt}
        if getattr(encoding, "chat", None) is not None:
            return encoding.chat_prompt([message])
        (prompt, _), _ = data.plain_chat([message, {"role": "assistant", "content": ""}])
    elif asked == "alpaca":
        prompt = files.alpaca(prompt, "")
    return data.start_token(encoding) + encoding.encode_ordinary(prompt)


def sample(model, encoding, ids, device, seed):
    """The prompt's text and what the model makes of it, up to 80 tokens drawn from the 20 likeliest at each place."""
    ids = apply_template(model, ids, encoding)
    torch.manual_seed(seed)
    return text(encoding, ids + go_on(model, encoding, ids, device, 80, 0.8, 20))


def go_on(model, encoding, ids, device, max_new_tokens, temperature, top_k, stream=None):
    """The ids that the model goes on with, without the token that ends them."""
    ids = ids or [encoding.eot_token]  # a model reads something before it writes
    left = room(model, ids)
    if left < max_new_tokens and stream is not None:
        print(f"the prompt takes {len(ids)} of {free_positions(model)} positions: {left} are left", file=sys.stderr)
    model.eval()
    ends, prompt = ends_of(encoding), torch.tensor([ids], device=device)
    how = {"temperature": temperature, "top_k": top_k, "eos_token_id": ends, "stream": stream}
    new = gpt.generate(model, prompt, min(max_new_tokens, left), **how)[0, len(ids) :].tolist()
    model.train()
    return [i for i in new if i not in ends]


def room(model, ids):
    """How many tokens can follow a prompt."""
    if (left := free_positions(model) - len(ids)) < 1:
        raise Error(f"a prompt has {len(ids)} tokens; {free_positions(model) - 1} are the most")
    return left


def ends_of(encoding):
    return [encoding.eot_token, *getattr(encoding, "end_of_turn", [])]


def text(encoding, ids):
    """Whole characters: one that was cut at the end, or the start, is left out. Virtual tokens are no text."""
    words = [i for i in ids if 0 <= i < encoding.n_vocab and i not in (encoding.eot_token, *data.start_token(encoding))]
    return encoding.decode(words).strip("\ufffd")


# ---------------------------------------------------------------------------------------------------------- --generate


def answer(model, encoding, args, device):
    """Prints a text for each prompt and sample, token by token."""
    asked = how_asked(args, encoding)
    prompts = [apply_template(model, ask(prompt, asked, encoding), encoding) for prompt in read_prompts(args)]
    for ids in prompts:  # before the first is answered
        room(model, ids)
    torch.manual_seed(args.seed)
    for number in range(len(prompts) * args.samples):
        ids = prompts[number // args.samples]
        if number:
            print("\n---")
        printer = Printer(encoding, ids if asked == "text" else [])
        go_on(model, encoding, ids, device, args.max_new_tokens, args.temperature, args.top_k, printer.take)
        printer.end()


def read_prompts(args):
    if args.prompts is not None:
        return [line for line in files.read(args.prompts).split("\n") if line.strip()]
    if args.prompt != "-":
        return [args.prompt or ""]
    try:
        return [sys.stdin.read().rstrip("\n")]
    except UnicodeDecodeError as error:
        raise Error(f"--prompt -: what comes in is no text: {error}") from None


def how_asked(args, encoding):
    """How a prompt is put: as in the run's data, or else as a user's turn if the tokenizer has a chat template."""
    result = Path(args.generate, "result.json")
    trained_on = checkpoint.read_json(result).get("asked") if os.path.isfile(result) else None
    has_template = getattr(encoding, "chat", None) is not None
    return "text" if args.raw else trained_on or ("chat" if has_template else "text")


class Printer:
    """Prints text while its tokens come, whole characters only."""

    def __init__(self, encoding, ids):
        self.encoding, self.ids, self.printed = encoding, list(ids), 0
        self.show()

    def take(self, step):  # (1, 1)
        self.ids.append(step.item())
        self.show()

    def show(self):
        whole = text(self.encoding, self.ids)
        print(whole[self.printed :], end="", flush=True)
        self.printed = len(whole)

    def end(self):
        print(flush=True)
