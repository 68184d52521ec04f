# SPDX-License-Identifier: MIT
"""Batches for fine-tuning: of plain text, of (prompt, completion) pairs and of conversations, padded or packed.

Plain text is one stream of tokens, with <eot> (end-of-text) between documents. A row of a batch is a window of it:

    stream      <eot>  The    cat    sat    <eot>  A      dog    ran    <eot>
    input_ids   <eot>  The    cat    sat    <eot>                               length 5
    labels      -100   The    cat    sat    <eot>
    next window                             <eot>  A      dog    ran    <eot>   starts at the last token of this one

A pair is a row of its own. Only the completion and the <eot> after it are scored:

    input_ids   <eot>  2      +      2      =      4      <eot>  <eot>  <eot>
    labels      -100   -100   -100   -100   -100   4      <eot>  -100   -100
                |------------ prompt -----------|  completion    |-padding-|

A conversation is a row too. Each turn of the assistant is scored (^), with the <eot> after it:

    <eot>User: Hi
    Assistant: Hello<eot>User: 2 + 2 =
              ^^^^^^^^^^^
    Assistant: 4<eot>
              ^^^^^^^

Packing: examples share a row, one after the other, so that little of it is padding. Attention stays in each example:

    input_ids     <eot>  2      +      2      =      4      <eot>  <eot>  The    cat    sat    <eot>  <eot>
    labels        -100   -100   -100   -100   -100   4      <eot>  -100   -100   -100   sat    <eot>  -100
    position_ids  0      1      2      3      4      5      6      0      1      2      3      4      0
                  |-------------- an example ----------------|  |---------- another ----------|  padding

B rows, T tokens in a row: all are (B, T) int64. Labels are unshifted (the model shifts them), and a label of -100 is
not scored. A position that is not one more than the last begins an example: the model then masks what stands before it,
as gpt.py does, and transformers' models do (without attention_mask, and with use_cache=False). The first token of an
example is never scored, so no label is predicted from another example. Loss and gradients are those of padded rows.

Why is the prompt masked in the loss? The model is to learn p(completion | prompt). Prompts are given at inference, and
they are often longer than completions, so that their loss would outweigh that of the answers.
Why end-of-text? The first token is predicted from it. Between documents it says that what follows does not go on from
what came before. After a completion it is scored, so that the model learns to stop.
Epochs: row i of a run is number i % n of epoch i // n, a permutation of the n rows by seed and epoch. No row comes a
second time before all have come once. A run that goes on continues the order, and several processes divide it. In
plain text a row is a window from a random place.

Padding is on the right in training: no token sees the padding behind it (causal mask), and its labels are -100, so no
attention mask is needed. For generation it is on the left, because new tokens come after a row's last one.
Length buckets: a batch is as wide as its longest row, rounded up to a multiple of 16, for oneDNN keeps a compiled
product of each shape. Of the validation batches of `modules` (32 rows), 50 % is padding with rows in random order, and
7 % with rows of like length together: half the work. Random order is what training needs. Packed into rows of 256
tokens, 1 % is padding, and the order stays free.

Typical length: 128 to 1,024, at most the model's positions. Pitfalls: mask labels by position. To mask all tokens equal
to the padding would mask the <eot> to stop at as well. Prompt and completion are tokenized apart, as in generation, and
a space between them belongs to the completion (" 4"). Virtual tokens in front of a row (prefix and prompt tuning) are
seen by its first example alone or by all as one past: such methods need padded rows.
"""

import copy
from bisect import bisect_left, insort
from functools import lru_cache

import torch


class Error(ValueError):
    """Data that cannot be used; the message says what would be right."""


# ------------------------------------------------------------------------------------------------------------- batches

class TokenStream:
    """Texts as one stream of tokens, cut into windows of `length`.

    encoding is a tiktoken.Encoding, or an object with its methods, and with a bos_token to start with (None: without).
    """

    def __init__(self, texts, encoding, length):
        tokens = start_token(encoding)
        for ids in encoding.encode_ordinary_batch(texts):
            tokens += [*ids, encoding.eot_token]
        if len(tokens) < length:
            raise Error(f"{len(tokens)} tokens, fewer than --length {length}: give a longer text or a smaller --length")
        self.tokens, self.length, self.encoding = torch.tensor(tokens), length, encoding
        self.windows = self.tokens.unfold(0, length, length - 1)  # (n, T), each starts where the last one ended
        self.rest = self.tokens[len(self.windows) * (length - 1) :][None]  # (1, less than T)
        self.n_truncated = 0  # no text is lost

    def sample(self, size, first=None, seed=0):
        """For training: (input_ids, labels), both (size, length), windows at random places, whatever first and seed."""
        start = torch.randint(len(self.tokens) - self.length + 1, (size, 1))
        ids = self.tokens[start + torch.arange(self.length)]  # (B, T)
        return ids, self.labels(ids)

    def steps_per_epoch(self, rows):
        """How many steps of `rows` windows score as many tokens as the stream has."""
        return len(self.tokens) / (rows * (self.length - 1))

    def batches(self, size):
        """For validation: (input_ids, labels) in order, each token after the first scored once."""
        for ids in (*self.windows.split(size), self.rest):
            if ids.size(1) > 1:
                yield ids, self.labels(ids)

    def head(self, n_tokens):
        """The stream with evenly spread windows of about n_tokens tokens in `batches`; itself if it is not longer."""
        if len(self.windows) * (self.length - 1) + self.rest.numel() <= n_tokens:
            return self
        part, n = copy.copy(self), max(1, n_tokens // (self.length - 1))
        part.windows, part.rest = self.windows[torch.arange(n) * len(self.windows) // n], self.rest[:, :0]
        return part

    def labels(self, ids):
        """The ids, but -100 for a window's first: with a soft prompt in front it would be guessed from no text."""
        return torch.cat((torch.full_like(ids[:, :1], -100), ids[:, 1:]), 1)


class CompletionDataset:
    """Examples of at most `length` tokens: (prompt, completion) pairs, or conversations [{"role", "content"}, ...].

    items are (<eot> and the prompt's ids, the completion's ids and <eot>). Of a conversation the last answer is the
    completion, and all before it the prompt. If the prompt holds answers too, the item is (prompt, completion, labels
    of the prompt). encoding.chat(messages), if there is one, makes the turns [(ids, scored), ...] of a conversation,
    special tokens included; plain_chat does without. rows are lists of items that share a row: one, or with pack more.
    Too long an item loses the beginning of its prompt, for a question mostly ends it, and its completion keeps
    length - 1 tokens at most; n_truncated counts these.
    """

    def __init__(self, examples, encoding, length, pack=False):
        self.encoding, self.length, self.pack, self.pad = encoding, length, pack, encoding.eot_token
        self.n_truncated, items = 0, []
        for turns in tokenize(examples, encoding):
            while turns and not turns[-1][1]:  # what comes after the last answer is not needed
                turns.pop()
            if not turns:
                raise Error("a conversation has no answer that is scored: give it a message of the role assistant")
            *turns, (completion, _) = turns
            prompt = [i for ids, _ in turns for i in ids]
            labels = [i if scored else -100 for ids, scored in turns for i in ids]
            self.n_truncated += len(prompt) + len(completion) > length
            completion = completion[: length - 1]
            left = slice(max(0, len(prompt) + len(completion) - length), None)
            several = any(scored for _, scored in turns)
            items.append((prompt[left], completion, labels[left]) if several else (prompt[left], completion))
        self.items = items

    @property
    def items(self):
        return self._items

    @items.setter
    def items(self, items):  # whoever changes the items changes the rows
        self._items = items
        self.rows = pack_rows(items, self.length) if self.pack else [[item] for item in items]

    def collate(self, rows):
        """(input_ids, labels), both (len(rows), T), padded on the right, and position_ids (len(rows), T) with pack."""
        longest = max(count_tokens(*row) for row in rows)
        T = max(longest, min(-(-longest // 16) * 16, self.length))  # the next multiple of 16
        ids = torch.full((len(rows), T), self.pad)
        labels, positions = torch.full_like(ids, -100), torch.zeros_like(ids)
        for i, row in enumerate(rows):
            end = 0
            for prompt, completion, *prompt_labels in row:
                start, middle, end = end, end + len(prompt), end + len(prompt) + len(completion)
                ids[i, start:end] = torch.tensor(prompt + completion)
                positions[i, start:end] = torch.arange(end - start)
                labels[i, middle:end] = torch.tensor(completion)
                if prompt_labels:
                    labels[i, start:middle] = torch.tensor(prompt_labels[0])
                labels[i, start] = -100  # what stands before it is another example, or nothing
        return (ids, labels, positions) if self.pack else (ids, labels)

    def sample(self, size, first=None, seed=0):
        """For training: rows first to first + size - 1 of a run (see Epochs), or random ones. first counts from 0."""
        n = len(self.rows)
        if first is None:
            numbers = torch.randint(n, (size,)).tolist()
        else:
            numbers = [permutation(n, seed, i // n)[i % n] for i in range(first, first + size)]
        return self.collate([self.rows[i] for i in numbers])

    def steps_per_epoch(self, rows):
        """How many steps of `rows` rows take each row once."""
        return len(self.rows) / rows

    def batches(self, size):
        """For validation: every row once, in batches of like length."""
        rows = sorted(self.rows, key=lambda row: count_tokens(*row))
        yield from (self.collate(rows[i : i + size]) for i in range(0, len(rows), size))

    def length_buckets(self, size):
        """Lists of `size` items of like length, so that little is padded."""
        items = sorted(self.items, key=count_tokens)
        return [items[i : i + size] for i in range(0, len(items), size)]

    def head(self, n_tokens):
        """The dataset with evenly spread items alone, of about n_tokens tokens in all; itself if it has no more."""
        total = count_tokens(*self.items)
        if total <= n_tokens:
            return self
        part, n = copy.copy(self), max(1, len(self.items) * n_tokens // total)
        part.items = [self.items[i * len(self.items) // n] for i in range(n)]
        return part


def count_tokens(*items):
    return sum(len(prompt) + len(completion) for prompt, completion, *_ in items)


def pack_rows(items, length):
    """Lists of items that fill rows of `length` tokens: best fit, decreasing.

    The longest item first, each goes into the fullest row that it fits. 100,000 items take a second.
    """
    items = sorted(items, key=count_tokens, reverse=True)
    rows, space = [], []  # space: (free positions, number) of each row that is not full, sorted
    for item in items:
        at = bisect_left(space, (count_tokens(item), 0))
        free, number = space.pop(at) if at < len(space) else (length, len(rows))
        if number == len(rows):
            rows.append([])
        rows[number].append(item)
        free -= count_tokens(item)
        if free >= count_tokens(items[-1]):
            insort(space, (free, number))
    return rows


@lru_cache(maxsize=2)  # each step of an epoch needs it again
def permutation(n, seed, epoch):
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)).tolist()


# ---------------------------------------------------------------------------------------------------- tokens of a turn

def start_token(encoding):
    """[the token that a text starts with]: bos_token, which may be None; tiktoken's encodings have <eot> alone."""
    start = getattr(encoding, "bos_token", encoding.eot_token)
    return [] if start is None else [start]


def plain_chat(messages):
    """[(text, scored), ...] of a conversation up to its last answer, for a tokenizer without a template of its own.

    A line for each message, and end-of-text after each answer, as the docstring of this file shows. Generation goes on
    from "User: ...\\nAssistant:".
    """
    turns, text = [], ""
    for message in messages:
        if message["role"] == "assistant":
            turns += [(f"{text}Assistant:", False), (f" {message['content']}", True)]
            text = ""
        else:
            text += f"{message['role'].capitalize()}: {message['content']}\n"
    return turns


def tokenize(examples, encoding):
    """Yields the turns [(ids, scored), ...] of each example, with a start token, and <eot> after what is scored.

    SentencePiece puts a space in front of a text. encode_continuations, if the encoding has it, leaves it out.
    """
    chat, texts = getattr(encoding, "chat", None), []
    for example in examples:
        if isinstance(example, tuple):
            texts.append([(example[0], False), (example[1], True)])
        else:
            texts.append([] if chat else plain_chat(example))
    first = iter(encoding.encode_ordinary_batch([turns[0][0] for turns in texts if turns]))
    go_on = getattr(encoding, "encode_continuations", encoding.encode_ordinary_batch)
    rest = iter(go_on([text for turns in texts for text, _ in turns[1:]]))
    for example, turns in zip(examples, texts):
        if chat and not isinstance(example, tuple):
            yield [*chat(example)]  # ids already
        else:
            turns = [
                ([*next(rest if k else first), *[encoding.eot_token] * scored], scored)
                for k, (_, scored) in enumerate(turns)
            ]
            yield [(start_token(encoding), False), *turns]


if __name__ == "__main__":
    import tiktoken

    words = "The| cat| sat|A| dog| ran| 2| +| =| 4|User:| Hi|Assistant:| Hello".split("|")
    tokens = [*map(bytes, zip(range(256))), *(word.encode() for word in words)]
    ranks, special = {token: i for i, token in enumerate(tokens)}, {"<|endoftext|>": len(tokens)}
    toy = tiktoken.Encoding("toy", pat_str=r" ?\S+|\s", mergeable_ranks=ranks, special_tokens=special)
    pairs = [("2 + 2 =", " 4"), ("The cat", " sat")]
    chat = [("user", "Hi"), ("assistant", "Hello"), ("user", "2 + 2 ="), ("assistant", "4")]
    chat = [{"role": role, "content": content} for role, content in chat]
    for title, dataset in (
        ("windows of 5 tokens", TokenStream(["The cat sat", "A dog ran"], toy, 5)),
        ("prompt and completion", CompletionDataset(pairs, toy, 9)),
        ("a conversation", CompletionDataset([chat], toy, 99)),
        ("packed, with position_ids", CompletionDataset(pairs, toy, 13, pack=True)),
    ):
        print(f"{title}, first the ids, then the labels:")
        ids, labels, *positions = next(dataset.batches(2))
        for row in torch.cat((ids, labels)).tolist():
            words = ["-100" if i < 0 else toy.decode([i]).replace("<|endoftext|>", "<eot>").strip(" ") for i in row]
            print("   ", *(f"{word:6}" if word != "\n" else "\\n" for word in words))
        for row in positions:
            print("   ", *(f"{position:<6}" for position in row[0].tolist()))
