# SPDX-License-Identifier: MIT
"""Small random models of transformers, and a batch for them, for the tests of LoRA's family."""

import torch
import transformers

IDS = torch.tensor([[5, 9, 2, 40, 41, 3, 63, 0], [1, 1, 62, 17, 9, 30, 2, 8]])


def hf_gpt2():
    sizes = dict(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=4, bos_token_id=63, eos_token_id=63)
    more = dict(attn_pdrop=0, embd_pdrop=0, resid_pdrop=0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **more)).eval()


def hf_llama():
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    more = dict(num_key_value_heads=2, max_position_embeddings=32, pad_token_id=3, tie_word_embeddings=False)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **more)).eval()
