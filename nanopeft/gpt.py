# SPDX-License-Identifier: MIT
"""GPT-2 in plain PyTorch: the model that the other files of nanopeft fine-tune.

A decoder-only transformer reads T tokens. At each position it scores each of the V tokens that could come next:

    x = wte[ids] + wpe[positions]                     token embedding + position embedding               (B, T, d)
    x = x + attn(ln_1(x));  x = x + mlp(ln_2(x))      L blocks: mix positions, then work on each alone   (B, T, d)
    logits = ln_f(x) @ wte.T                          scores of the next token                           (B, T, V)

    attn(x) = W_proj concat over heads of softmax(q kᵀ / √h + mask) v        mask: 0 where s <= t, -inf where s > t
    mlp(x)  = W_proj gelu(W_fc x)                                            d -> 4d -> d
    loss    = mean over the labels of logsumexp(logits) - logits[label]      cross-entropy: -log p(label)

    B batch   T new tokens   S = past + T tokens attended to   d width   H heads, h = d/H   L layers   V vocabulary

One row, and what each of its positions is trained on:

    position t      0        1        2        3        4
    input_ids       <eot>    The      cat      sat      <pad>
    labels          <eot>    The      cat      sat      -100        a copy of the ids; -100: no loss and no gradient
    t is scored on  The      cat      sat      -        -           labels[t + 1]: the model shifts, the caller does not
    t attends to    0        0..1     0..2     0..3     0..4        causal mask
    other labels    -100     -100     -100     sat      -100        the prompt masked: trains p(answer | prompt) alone

Causal mask: position t must not see its answer, token t + 1. So one pass trains all positions at once.
Attention: q·k sums h products, so its variance grows with h. Without 1/√h the softmax saturates and its gradient
vanishes. PyTorch's SDPA computes `plain_attention` below in one call; its fused kernels never store the T × S scores.
KV cache: under the causal mask the keys and values of past tokens never change, so they are kept. A new token then
costs a forward of one position instead of S. It still reads all S keys and values, and `torch.cat` here copies them.
Gradient accumulation: the gradients of k micro-batches add up to one step. Weight each loss by its share of the labels:
1.0 over 10 labels and 3.0 over 30 have the mean 2.5. Their plain average is 2.0.

Pre-LN: each branch normalizes its own input, and x is only added to. Gradients pass along this sum unchanged. Post-LN,
x = ln(x + attn(x)), puts 2L norms in their way and needs a careful warm-up. The sum grows with depth, hence ln_f.
Tied head: the head is the embedding table. That saves V·d numbers, and a token's vector learns from both uses. Large
models often untie: the table is 5 % of GPT-2 xl, and reading a token and predicting it may want different vectors.
GELU by tanh, GPT-2's: x Φ(x), Φ ≈ ½ (1 + tanh(√(2/π) (x + 0.044715 x³))). The exact one is up to 0.00047 off.
First loss: ln V if all tokens are equally likely. Weights of deviation 0.02 give logits of deviation 0.02 √d = 0.55 in
GPT-2, and a loss of ln 50257 + 0.55² / 2 = 10.98. Much more means that the weights are too large.

GPT-2 small: wte 38,597,376 + wpe 786,432 + 12 blocks of 7,087,872 + ln_f 1,536 = 124,439,808 parameters, 31 % more with
an untied head. L/H/d of medium: 24/16/1024, large 36/20/1280, xl 48/25/1600. The KV cache, 2·L·d·S·B numbers, is 37.7
MB for 1,024 tokens in 16 bits. Logits, B·T·V·4 bytes in fp32, are 206 MB for 4 rows of 256 tokens: hence the chunks.
FLOPs per token, for N weights in matrix products: 2 N forward (multiply and add), 4 N backward (dx and dW; 2 N if
frozen). So training GPT-2 small takes 6 N = 0.74 G. Attention adds 4·L·d·S forward, a T² term; it exceeds the blocks'
24·L·d² above S = 6 d = 4,608. nanoGPT pretrains GPT-2 small with AdamW, lr 6e-4 after 2,000 steps of warm-up, then
cosine to 6e-5, betas (0.9, 0.95), weight decay 0.1, half a million tokens a step, no dropout.

Pitfalls: For generation, pad on the left: the next token is read off the last position. Pass an attention_mask, which
covers the cached tokens too. If end-of-text is the padding, mask labels by position, or the model never learns to stop.
GPT-2's files store linear weights transposed ("Conv1D", (in, out)).
Llama differs by RMSNorm, rotary positions, SwiGLU and no biases; Llama 2 70B and 3 also by grouped-query attention:
fewer heads of keys and values than of queries. The whole family in one table: nanopeft/__init__.py.
Papers: Radford et al. 2019 (GPT-2); arXiv 1706.03762, eq. 1; 1606.08415 (GELU); 1608.05859 (tied); 2002.04745 (pre-LN).
"""

import math
from collections import namedtuple
from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

LOGITS = {"cpu": 1 << 21, "cuda": 1 << 26}  # in a chunk, about; on a GPU each launches a dozen kernels
CHUNK = 1 << 17  # logits that go through the softmax at a time, per core: 0.5 MB in fp32 fit its L2 cache
Output = namedtuple("Output", "loss logits past_key_values", defaults=(None, None, None))


class Error(ValueError):
    """A wrong shape or call, or damaged weights; the message says what would be right."""


# --------------------------------------------------------------------------------------------------------------- model

def plain_attention(q, k, v, mask):
    """softmax(q kᵀ / √h + mask) v.  q (B, H, T, h), k and v (B, H, S, h), mask (T, S): 0, or -inf for unseen keys."""
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1)) + mask  # (B, H, T, S)
    return scores.softmax(-1) @ v  # (B, H, T, h)


def attention(q, k, v, mask=None):
    """The same by PyTorch's fused kernels, which keep no T x S scores for backward. mask: bools; None is causal, S = T.

    Short rows in bf16 on a CPU take the plain form: 13 ms instead of 24 for forward and backward of 12 heads on 4 rows
    of 256 tokens, two cores. The checkpoint makes backward compute the scores again, so that they are not kept either.
    """
    T = q.size(2)
    if mask is None and 1 < T <= plain_up_to(q.dtype, q.device):
        return checkpoint(causal_attention, q, k, v, use_reentrant=False, preserve_rng_state=False)
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None and T > 1)


def causal_attention(q, k, v):
    T = q.size(2)
    return plain_attention(q, k, v, q.new_full((T, T), -math.inf).triu(1))


def plain_up_to(dtype, device):
    """The number of tokens up to which plain attention is faster; 0 where it never is."""
    return 384 if dtype == torch.bfloat16 and device.type == "cpu" else 0


class Attention(nn.Module):
    def __init__(self, n_embd, n_head, layer):
        super().__init__()
        self.n_head, self.layer = n_head, layer
        self.c_attn = nn.Linear(n_embd, 3 * n_embd)  # q, k and v in one product
        self.c_proj = nn.Linear(n_embd, n_embd)

    def forward(self, x, mask, cache):
        B, T, _ = x.shape
        q, k, v = self.c_attn(x).chunk(3, dim=-1)  # (B, T, d) each
        q, k, v = (t.view(B, T, self.n_head, -1).transpose(1, 2) for t in (q, k, v))  # (B, H, T, h) each
        if cache is not None:
            k, v = cache.update(k, v, self.layer)  # (B, H, S, h)
        y = attention(q, k, v, mask)  # (B, H, T, h)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    def __init__(self, n_embd):
        super().__init__()
        self.c_fc = nn.Linear(n_embd, 4 * n_embd)
        self.c_proj = nn.Linear(4 * n_embd, n_embd)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, n_embd, n_head, epsilon, layer):
        super().__init__()
        self.ln_1 = nn.LayerNorm(n_embd, epsilon)
        self.attn = Attention(n_embd, n_head, layer)
        self.ln_2 = nn.LayerNorm(n_embd, epsilon)
        self.mlp = MLP(n_embd)

    def forward(self, x, mask=None, cache=None):
        x = x + self.attn(self.ln_1(x), mask, cache)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """GPT-2 with random weights, by default in the shape of the pretrained base in nanopeft/base."""

    def __init__(self, *, vocab_size=3072, n_positions=512, n_embd=256, n_layer=6, n_head=4, layer_norm_epsilon=1e-5,
                 bos_token_id=None, eos_token_id=None):  # fmt: skip
        super().__init__()
        if n_embd % n_head:
            raise Error(f"n_head must divide n_embd, and {n_head} does not divide {n_embd}")
        bos, eos = (vocab_size - 1 if token is None else token for token in (bos_token_id, eos_token_id))
        self.config = SimpleNamespace(  # the names of Hugging Face's config.json
            model_type="gpt2", vocab_size=vocab_size, n_positions=n_positions, n_embd=n_embd, n_layer=n_layer,
            n_head=n_head, layer_norm_epsilon=layer_norm_epsilon, bos_token_id=bos, eos_token_id=eos,
        )  # fmt: skip
        self.transformer = nn.ModuleDict({
            "wte": nn.Embedding(vocab_size, n_embd),
            "wpe": nn.Embedding(n_positions, n_embd),
            "h": nn.ModuleList(Block(n_embd, n_head, layer_norm_epsilon, i) for i in range(n_layer)),
            "ln_f": nn.LayerNorm(n_embd, layer_norm_epsilon),
        })  # fmt: skip
        self.lm_head = nn.Linear(n_embd, vocab_size, bias=False)
        self.tie_weights()
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif "ln_" not in name:
                # 2L branches are added to x: divided by √(2L), their sum has the same size at any depth
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * n_layer) if "c_proj" in name else 0.02)

    def forward(self, input_ids=None, *, attention_mask=None, position_ids=None, past_key_values=None,
                inputs_embeds=None, labels=None, use_cache=False, logits_to_keep=0):  # fmt: skip
        """Called like a Hugging Face causal LM. Returns the loss if there are labels, and the logits (B, T, V) if not.

        attention_mask (B, S): 1 for tokens, 0 for padding on either side; a padded row gives what it gives alone.
        position_ids (T,) or (B, T): in a packed row (data.py) an example begins where they do not go up by one. Packed
        rows have no attention_mask and no past.
        past_key_values: a KVCache or transformers' DynamicCache, extended in place. labels (B, T): unshifted.
        logits_to_keep: logits of so many last positions only; 0 means of all.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise Error("give either input_ids or inputs_embeds")
        x = self.transformer.wte(input_ids) if inputs_embeds is None else inputs_embeds  # (B, T, d)
        cache = KVCache() if use_cache and past_key_values is None else past_key_values
        past = 0 if cache is None else cache.get_seq_length()
        position_ids, mask = positions_and_mask(position_ids, attention_mask, past, x, self.config.n_positions)
        x = x + self.transformer.wpe(position_ids)
        for block in self.transformer.h:
            x = block(x, mask, cache)
        x = self.transformer.ln_f(x)  # (B, T, d)
        if labels is not None and labels.shape != x.shape[:2]:
            raise Error(f"labels are {tuple(labels.shape)}, and must be {tuple(x.shape[:2])}: one for each position")
        if labels is None:
            return Output(logits=self.lm_head(x[:, -logits_to_keep:]), past_key_values=cache)
        x, labels = x[:, :-1].reshape(-1, x.size(-1)), labels[:, 1:].reshape(-1)  # x[t] is scored on labels[t + 1]
        rows = rows_at_a_time(self.config.vocab_size, x.device)
        return Output(loss=chunked_loss(self.lm_head, x, labels, rows), past_key_values=cache)

    def generate(self, input_ids, max_new_tokens=64, **options):
        return generate(self, input_ids, max_new_tokens, **options)

    def tie_weights(self):
        self.lm_head.weight = self.transformer.wte.weight

    def get_input_embeddings(self):
        return self.transformer.wte

    def get_output_embeddings(self):
        return self.lm_head

    device = property(lambda self: self.transformer.wte.weight.device)


# ---------------------------------------------------------------------------------------------------------- generation

class KVCache:
    """Keys and values (B, H, S, h) of each layer, with the two methods of transformers' DynamicCache that GPT calls."""

    def __init__(self):
        self.layers = []

    def get_seq_length(self):
        return self.layers[0][0].size(2) if self.layers else 0

    def update(self, k, v, layer):  # takes the new tokens' (B, H, T, h), returns those of all S tokens
        if layer < len(self.layers):
            past_k, past_v = self.layers[layer]
            k, v = torch.cat((past_k, k), 2), torch.cat((past_v, v), 2)
        self.layers[layer : layer + 1] = [(k, v)]  # replaced, or appended
        return k, v


@torch.no_grad()
def generate(model, input_ids, max_new_tokens=64, *, attention_mask=None, temperature=0.0, top_k=None,
             eos_token_id=None, generator=None, stream=None):  # fmt: skip
    """The prompt and up to `max_new_tokens` more tokens (B, T + n), from any model with this calling convention.

    temperature 0: the likeliest token. Otherwise it is drawn from softmax(logits / temperature), of the top_k likeliest
    if given. A row that has ended is filled with eos_token_id (of several, with the first). stream: called with each
    step's tokens (B, 1).
    """
    if not temperature >= 0 or (top_k is not None and top_k < 1):
        raise Error(f"temperature must be at least 0 and top_k at least 1, not {temperature} and {top_k}")
    step, cache = input_ids, None  # the first step reads the whole prompt, each later one a single token
    done = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
    ends = None if eos_token_id is None else torch.tensor(eos_token_id, device=input_ids.device).flatten()
    for _ in range(max_new_tokens):
        out = model(step, attention_mask=attention_mask, past_key_values=cache, use_cache=True, logits_to_keep=1)
        logits, cache = out.logits[:, -1].float(), out.past_key_values  # (B, V)
        if not logits.amax(-1).isfinite().all():
            raise Error("the model's logits are inf or NaN: its weights are damaged, or the training diverged")
        if temperature < 1e-5:  # as 0: the division could overflow
            step = logits.argmax(-1, keepdim=True)  # (B, 1)
        else:
            logits = logits / temperature
            if top_k is not None:
                logits[logits < logits.topk(min(top_k, logits.size(-1))).values[:, -1:]] = -math.inf
            step = torch.multinomial(logits.softmax(-1), 1, generator=generator)
        if ends is not None:
            step[done] = ends[0]
            done |= torch.isin(step[:, 0], ends)
        if stream is not None:
            stream(step)
        input_ids = torch.cat((input_ids, step), 1)
        if attention_mask is not None:
            attention_mask = torch.cat((attention_mask, torch.ones_like(step)), 1)
        if done.all():
            break
    return input_ids


# ---------------------------------------------------------------------------------------------------------------- loss

def plain_loss(head, x, labels):
    """Mean cross-entropy of head(x) (n, V) against labels (n,), -100 left out. GPT-2's 206 MB of logits peak at 622."""
    logits = head(x).float()  # (n, V); in bf16 a loss of 10.97 would be rounded to 11
    return F.cross_entropy(logits, labels, ignore_index=-100)


def rows_at_a_time(V, device):
    """Rows of logits that are held at a time. Fewer than 256 would not be worth reading the head's weights for."""
    return max(256, LOGITS.get(device.type, LOGITS["cpu"]) // V)


def skips_unlabelled(device):
    """Whether rows without a label are left out. To learn their number, the host would have to wait for a GPU."""
    return device.type != "cuda"


def chunked_loss(head, x, labels, rows):
    """plain_loss with `rows` rows of logits at a time: 65 MB with a frozen head, 373 with a trained one, whose dW in
    fp32 is 154, and a chunk's dW as much again. Without any label it is 0, not NaN."""
    weights = [p for p in head.parameters() if p.requires_grad]
    need_grad = torch.is_grad_enabled() and (x.requires_grad or len(weights) > 0)
    # The weights again, beside head: autograd gives gradients only to tensors that are arguments themselves
    return ChunkedLoss.apply(head, rows, need_grad, labels, x, *weights) / (labels != -100).sum().clamp(min=1)


class ChunkedLoss(torch.autograd.Function):
    """Sum of the rows' cross-entropies. A row's gradient needs no other row, so forward makes it too, chunk by chunk:

        z = x Wᵀ                          logits, (rows, V)
        g = softmax(z) - onehot(label)    d loss/dz, (rows, V)
        dx = g W;  dW += gᵀ x             kept, while z and g are dropped

    Backward only scales dx and dW. Below, autograd makes dx and dW from g, so that the head may be any module. g is
    written over z, so the head's backward must not need its output (autograd checks this). `rows` bounds the memory.
    `few` of them at a time take the softmax in L2 cache: 23 ms for 256 rows of GPT-2 instead of 46, on one CPU core.
    """

    @staticmethod
    def forward(ctx, head, rows, need_grad, labels, x, *weights):
        sum_dtype = torch.promote_types(x.dtype, torch.float32)  # bf16 would lose digits, fp16 overflow
        loss = torch.zeros((), dtype=sum_dtype, device=x.device)
        grads = [torch.zeros_like(t, dtype=sum_dtype) for t in (x, *weights)] if need_grad else []
        skips = skips_unlabelled(x.device)
        scored = (labels != -100).nonzero()[:, 0] if skips else torch.arange(len(labels), device=x.device)
        for index in scored.split(rows):
            with torch.set_grad_enabled(need_grad):
                chunk = x.detach()[index].requires_grad_(need_grad)  # (rows, d), cut off from the graph behind x
                logits = head(chunk)  # (rows, V)
            few = max(1, CHUNK * torch.get_num_threads() // logits.size(1)) if x.is_cpu else rows
            for z, label in zip(logits.detach().split(few), labels[index, None].split(few)):
                log_p = F.log_softmax(z, -1, dtype=sum_dtype)  # (few, V)
                unlabelled = label == -100  # (few, 1)
                label = label.masked_fill(unlabelled, 0)
                loss -= log_p.gather(1, label).masked_fill_(unlabelled, 0).sum()
                if need_grad:  # in place: z becomes g; the mean's 1/n waits, or fp16 would underflow
                    z.copy_(log_p.exp_().scatter_add_(1, label, torch.full_like(label, -1, dtype=sum_dtype)))
                    if not skips:
                        z.masked_fill_(unlabelled, 0)
                del log_p
            if need_grad:
                g = logits.detach()  # whose views z were
                dx, *dw = torch.autograd.grad(logits, (chunk, *weights), g, materialize_grads=True)  # zeros if unused
                grads[0][index] = dx.to(sum_dtype)
                for total, part in zip(grads[1:], dw, strict=True):
                    # 1,024 rows at a time: no fp32 copy of a whole bf16 part, and 14 ms instead of 90 on a CPU core
                    for t, p in zip(*(torch.atleast_1d(t).split(1024) for t in (total, part))):
                        t += p
            logits = z = g = dx = dw = part = p = None  # freed before the next chunk is made
        ctx.save_for_backward(*grads)
        return loss

    @staticmethod
    def backward(ctx, scale):
        if torch.is_grad_enabled():  # create_graph=True, to which the saved gradients would be constants
            raise Error("the loss in chunks has no second derivative: take it from the logits, without labels")
        return None, None, None, None, *(g * scale for g in ctx.saved_tensors)


# ------------------------------------------------------------------------------------------------------------ plumbing

def positions_and_mask(position_ids, attention_mask, past, x, limit):
    """Positions of the new tokens, (T,) or (B, T), padding not counted, and whom each sees, (T, S) or (B, 1, T, S)."""
    T, S = x.size(1), past + x.size(1)
    s, t = torch.arange(S, device=x.device), torch.arange(past, S, device=x.device)
    if attention_mask is not None and attention_mask.size(1) != S:
        raise Error(f"attention_mask is {attention_mask.size(1)} wide, not {S}: it covers the past as well")
    packed = False
    if position_ids is None:
        position_ids = t if attention_mask is None else (attention_mask.long().cumsum(1) - 1).clamp(min=0)[:, past:]
    elif attention_mask is None and past == 0 and position_ids.dim() == 2:
        example = F.pad(position_ids.diff() != 1, (1, 0)).cumsum(1)  # (B, T), the number of the example in its row
        packed = x.is_cuda or example[:, -1].any()  # to ask a GPU, the host would have to wait for it
    if S > limit and position_ids.max() >= limit:  # in this order: max() makes the host wait for a GPU
        raise Error(f"{position_ids.max() + 1} tokens do not fit the model's {limit} positions")
    if attention_mask is None and (past == 0 or T == 1) and not packed:
        return position_ids, None  # causal: query t sees keys 0..t. After a past it sees 0..past + t; if T = 1, all
    mask = s <= t[:, None]  # (T, S)
    if attention_mask is not None:  # padding sees itself: softmax over nothing is NaN
        mask = (mask & attention_mask[:, None, None].bool()) | (s == t[:, None])  # (B, 1, T, S)
    if packed:  # each example sees itself alone
        mask = mask & (example[:, None, :, None] == example[:, None, None])  # (B, 1, T, T)
    return position_ids, mask


if __name__ == "__main__":
    with torch.device("meta"):
        gpt2 = GPT(vocab_size=50257, n_positions=1024, n_embd=768, n_layer=12, n_head=12)
    print(f"GPT-2 small: {sum(p.numel() for p in gpt2.parameters()):,} parameters")
    model, x, ids = GPT(), torch.randn(1000, 256), torch.randint(3072, (1000,))
    print(f"loss {plain_loss(model.lm_head, x, ids):.6f}, in chunks {chunked_loss(model.lm_head, x, ids, 256):.6f}")
