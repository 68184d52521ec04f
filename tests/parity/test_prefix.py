# SPDX-License-Identifier: MIT
"""nanopeft/prefix.py against peft, on transformers' models: the same numbers, text, names and files."""

import copy
import json
import runpy
import shutil
import sys
import warnings
from pathlib import Path

import peft
import pytest
import torch
import torch.nn as nn
import transformers
from safetensors.torch import load_file, save_file

from nanopeft import gpt, prefix
from nanopeft.trainer.bases import save_gpt

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*cuda:UserWarning")
IDS = torch.tensor([[5, 9, 2, 40, 41, 3, 63, 4], [1, 1, 62, 17, 9, 30, 2, 8]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1, 1, 1]])
N = 5

# --------------------------------------------------------------------------------------------------------- small models

# {name: (model_type, its own sizes)}; windows of 12 places hold a prefix of 5 and 7 tokens, and then begin to lose it
WINDOW = dict(num_key_value_heads=2, sliding_window=12)
MODELS = {
    "gpt2": ("gpt2", {}),
    "llama": ("llama", dict(num_key_value_heads=2)),
    "llama head_dim": ("llama", dict(num_key_value_heads=1, head_dim=16)),
    "mistral": ("mistral", WINDOW),
    "qwen2": ("qwen2", dict(num_key_value_heads=1)),
    "qwen3": ("qwen3", dict(num_key_value_heads=2, head_dim=16)),
    "gemma2": ("gemma2", dict(**WINDOW, head_dim=16)),
    "gemma3": ("gemma3_text", dict(**WINDOW, head_dim=16, layer_types=["sliding_attention", "full_attention"])),
    "phi": ("phi", {}),
    "gpt_neox": ("gpt_neox", {}),
    "opt": ("opt", dict(ffn_dim=24, word_embed_proj_dim=32)),
    "bloom": ("bloom", {}),
    "falcon": ("falcon", {}),  # one head of keys and values
    "falcon alibi": ("falcon", dict(alibi=True)),
    "falcon multi-head": ("falcon", dict(multi_query=False)),
    "falcon new": ("falcon", dict(new_decoder_architecture=True, num_kv_heads=2)),
    "mixtral": ("mixtral", dict(num_key_value_heads=2, num_local_experts=3)),
    "qwen2_moe": ("qwen2_moe", dict(
        num_key_value_heads=2, num_experts=3, num_experts_per_tok=2, moe_intermediate_size=8,
        shared_expert_intermediate_size=8,
    )),
}  # fmt: skip
SLIDING = ("mistral", "gemma2", "gemma3")
thorough = pytest.mark.thorough
ARCHITECTURES = [name if name in ("gpt2", "llama") else pytest.param(name, marks=thorough) for name in MODELS]


def tiny(name, dtype=torch.float32):
    """A random model, with weights wide enough that attention is far from even."""
    kind, more = MODELS[name]
    sizes = dict(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=48, pad_token_id=0, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    config = transformers.AutoConfig.for_model(kind, **(sizes | more))
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for p in model.parameters():
        if p.dim() > 1:
            nn.init.normal_(p, std=0.2)
    model.generation_config = transformers.GenerationConfig(pad_token_id=0, do_sample=False)
    return model.to(dtype)


def wrapped(base, n=N, **options):
    model = prefix.PrefixTuning(base, n, **options).eval()
    for p in model.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=2)
    return model


def in_peft(base, ours, **options):
    """peft's model around a copy of the base, with the prefix of ours."""
    config = peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=ours.n_tokens, num_layers=ours.n_layer,
        token_dim=ours.n_head * ours.head_dim, num_attention_heads=ours.n_head, **options,
    )  # fmt: skip
    theirs = peft.get_peft_model(copy.deepcopy(base).requires_grad_(True), config).eval()
    encoder = theirs.prompt_encoder["default"]
    with torch.no_grad():
        if ours.mlp is None:
            encoder.embedding.weight.copy_(ours.prompt_embeddings)
        else:
            encoder.embedding.weight.copy_(ours.E)
            encoder.transform.load_state_dict(ours.mlp.state_dict())
    return theirs


def assert_close(found, expected, relative):
    assert found.shape == expected.shape and found.dtype == expected.dtype
    assert (found - expected).abs().max() <= relative * expected.abs().max()


def assert_noticeable(model, ids=IDS):
    """The prefix changes the logits by at least a tenth: those without it could not pass for those with it."""
    with torch.no_grad():
        y, base = model(ids).logits, model.model(ids).logits
    assert (y - base).abs().max() >= 0.1 * y.abs().max()


def recomputed(model, ids, n, mask=None):
    """Greedy text by a loop without a cache."""
    with torch.no_grad():
        for _ in range(n):
            ids = torch.cat((ids, model(ids, attention_mask=mask).logits[:, -1:].argmax(-1)), 1)
            mask = None if mask is None else torch.cat((mask, mask.new_ones(len(mask), 1)), 1)
    return ids


# -------------------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_numbers_are_pefts(name):
    """In fp32, logits, loss and the prefix's gradient are peft's to 1e-6 of the largest, padded on the left or not."""
    base = tiny(name)
    ours = wrapped(base)
    theirs = in_peft(base, ours)
    assert_noticeable(ours)
    labels = IDS.masked_fill(MASK == 0, -100)
    positions = (MASK.cumsum(1) - 1).clamp(min=0)
    takes = {} if MODELS[name][0] == "bloom" else dict(position_ids=positions)  # it counts by the mask itself
    results = []
    for model, padded in ((ours, {}), (theirs, takes)):
        plain = model(IDS, labels=IDS)
        masked = model(input_ids=IDS, attention_mask=MASK, labels=labels, **padded)
        embeds = model(inputs_embeds=base.get_input_embeddings()(IDS)).logits
        own = next(p for p in model.parameters() if p.requires_grad)
        gradients = [torch.autograd.grad(out.loss, own)[0] for out in (plain, masked)]
        assert all(g.abs().max() > 0 for g in gradients)
        results.append((plain.logits, masked.logits[MASK.bool()], embeds, plain.loss, masked.loss, *gradients))
    for found, expected in zip(*results, strict=True):
        assert_close(found, expected, 1e-6)  # the same operations; sums may be split among threads


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_greedy_text_is_pefts(name):
    """generate gives peft's tokens, padded on the left or not, and those of a loop that recomputes everything."""
    base = tiny(name)
    ours = wrapped(base)
    theirs = in_peft(base, ours)
    for mask in (None, MASK):
        found = ours.generate(IDS, max_new_tokens=6, attention_mask=mask)
        seen = torch.ones_like(IDS) if mask is None else mask
        assert torch.equal(found, theirs.generate(input_ids=IDS, attention_mask=seen, max_new_tokens=6))
        assert torch.equal(found, recomputed(ours, IDS, 6, mask))
        assert torch.equal(found, gpt.generate(ours, IDS, 6, attention_mask=mask))
    assert not torch.equal(found, base.generate(IDS, attention_mask=MASK, max_new_tokens=6))


@pytest.mark.parametrize("name", [pytest.param("gpt2", marks=thorough), "llama"])
def test_the_mlp_is_pefts(name):
    """Through an MLP, logits and the gradients of E and the MLP are peft's; folded, so are the logits.

    peft's MLP has B N rows, where ours has N: a CPU may sum them in another order (off by 1.7e-6 without AVX-512).
    """
    base = tiny(name)
    ours = wrapped(base, hidden=12)
    theirs = in_peft(base, ours, prefix_projection=True, encoder_hidden_size=12)
    assert_noticeable(ours)
    results = []
    for model in (ours, theirs):
        out = model(IDS, labels=IDS)
        own = [p for p in model.parameters() if p.requires_grad]
        results.append([out.logits, out.loss, *torch.autograd.grad(out.loss, own)])
    for found, expected in zip(*results, strict=True):
        assert_close(found, expected, 1e-5)
    assert_close(prefix.fold_prefix(ours)(IDS).logits, results[1][0], 1e-5)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=thorough)], ids=["fp32", "bf16"])
def test_it_works_on_every_architecture(name, dtype):
    """A prefix trains and generates; it starts as a hard prompt; a padded row gives what it gives alone."""
    base = tiny(name, dtype)
    before = {key: t.clone() for key, t in base.state_dict().items()}
    words = torch.tensor([7, 8, 9, 10, 3])
    # fp32 with its sums in another order; bf16 keeps 8 bits, and a layer rounds some ten times
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    with torch.no_grad():
        hard = base(torch.cat((words.expand(2, -1), IDS), 1)).logits[:, N:]
        model = prefix.PrefixTuning(base, N, init=words).eval()
        assert_close(model(IDS).logits, hard, tolerance)

    start = model.prompt_embeddings.detach().clone()
    optimizer = torch.optim.SGD([model.prompt_embeddings], lr=1.0)
    loss = model(IDS, attention_mask=MASK, labels=IDS.masked_fill(MASK == 0, -100)).loss
    loss.backward()
    optimizer.step()
    assert model.prompt_embeddings.grad.dtype == start.dtype == torch.float32 and loss.isfinite()
    moved = (model.prompt_embeddings != start).view(N, 2 * model.n_layer, -1)
    assert moved.any(-1).all()  # in each layer the key and the value of each token
    assert all(torch.equal(t, before[key]) for key, t in base.state_dict().items())

    nn.init.normal_(model.prompt_embeddings)
    assert_noticeable(model)
    with torch.no_grad():
        together, alone = model(IDS, attention_mask=MASK).logits[1:, 3:], model(IDS[1:, 3:]).logits
        if name not in SLIDING:  # padding counts in a window: see test_a_prefix_leaves_a_sliding_window
            assert_close(together, alone, tolerance)
        assert torch.equal(model(IDS, use_cache=False).logits, model(IDS, use_cache=True).logits)
        text = model.generate(IDS, 6, attention_mask=MASK)
        assert torch.equal(text, gpt.generate(model, IDS, 6, attention_mask=MASK))
        if name not in SLIDING and dtype == torch.float32:  # in bf16 two tokens may be equally likely
            assert torch.equal(text[1:, 3:], model.generate(IDS[1:, 3:], 6))


@pytest.mark.parametrize("name", ["mistral", pytest.param("gemma2", marks=thorough)])
def test_a_prefix_leaves_a_sliding_window(name):
    """A layer of window 12 sees the last slot for 11 places, a second carries it 11 further, then it is gone."""
    base = tiny(name)
    base.config.layer_types = ["sliding_attention"] * 2
    base = type(base)(base.config).eval()
    model = wrapped(base)
    longer = torch.arange(2, 42)[None]
    with torch.no_grad():
        one = model(longer).logits[0]
        model.prompt_embeddings[-1] += 3
        changed = (model(longer).logits[0] - one).abs().amax(-1) > 0
    assert changed[:11].all() and not changed[22:].any()
    if name == "mistral":  # padding within what the window holds: a padded row is as it is alone
        short, mask = torch.tensor([[0, 0, 9, 30, 2]]), torch.tensor([[0, 0, 1, 1, 1]])
        assert_close(model(short, attention_mask=mask).logits[:, 2:], model(short[:, 2:]).logits, 1e-5)


@thorough
def test_mpts_alibi_counts_padding():
    """Distances are counted in the cache, padding included: a padded row of MPT differs from the row alone."""
    config = transformers.MptConfig(vocab_size=64, d_model=32, n_heads=4, n_layers=2, max_seq_len=48)
    torch.manual_seed(0)
    model = wrapped(transformers.MptForCausalLM(config).eval())
    with torch.no_grad():
        together, alone = model(IDS, attention_mask=MASK).logits[1, 3:], model(IDS[1:, 3:]).logits[0]
    assert (together - alone).abs().max() > 1e-3 * alone.abs().max()


def test_transformers_trainer_finds_the_labels(tmp_path):
    """transformers' Trainer asks forward's signature for `labels`: it trains the prefix, and nothing else."""
    base = tiny("gpt2")
    before = {key: t.clone() for key, t in base.state_dict().items()}
    model = prefix.PrefixTuning(base, N)
    start = model.prompt_embeddings.detach().clone()
    rows = [{"input_ids": ids, "labels": ids} for ids in IDS] * 2
    options = dict(output_dir=tmp_path, max_steps=2, learning_rate=0.1, use_cpu=True, disable_tqdm=True)
    trainer = transformers.Trainer(
        model, transformers.TrainingArguments(save_strategy="no", report_to=[], **options), train_dataset=rows
    )
    assert trainer.train().training_loss > 0 and not torch.equal(model.prompt_embeddings, start)
    assert trainer.evaluate(rows)["eval_loss"] > 0
    assert all(torch.equal(t, before[key]) for key, t in base.state_dict().items())


@pytest.mark.parametrize("name", [pytest.param("gpt2", marks=thorough), "llama", pytest.param("bloom", marks=thorough)])
def test_beams_and_samples(name):
    """Beam search gives peft's tokens; several samples of a prompt are each drawn after the prefix."""
    base = tiny(name)
    ours = wrapped(base)
    theirs = in_peft(base, ours)
    options = dict(attention_mask=MASK, max_new_tokens=5)
    found = ours.generate(IDS, num_beams=3, num_return_sequences=2, **options)
    assert torch.equal(found, theirs.generate(input_ids=IDS, num_beams=3, num_return_sequences=2, **options))
    base.generation_config.num_beams = 3
    assert torch.equal(ours.generate(IDS, num_return_sequences=2, **options), found)
    base.generation_config.num_beams = 1
    given = transformers.GenerationConfig(do_sample=False)  # what it leaves open is the model's own
    base.generation_config.num_beams, base.generation_config.num_return_sequences = 3, 2
    assert torch.equal(ours.generate(IDS, generation_config=given, **options), found)
    base.generation_config.num_beams, base.generation_config.num_return_sequences = 1, 1
    likeliest = ours.generate(IDS, do_sample=True, top_k=1, num_return_sequences=3, **options)
    assert torch.equal(likeliest, ours.generate(IDS, **options).repeat_interleave(3, 0))


def test_a_prefix_is_read_once_without_a_cache_too():
    """use_cache=False, an option or the model's own, would leave the prefix out or read it twice: the cache is used."""
    base = tiny("llama")
    model = wrapped(base)
    expected = recomputed(model, IDS, 6)
    assert torch.equal(model.generate(IDS, 6, use_cache=False), expected)
    base.generation_config.use_cache = False
    assert torch.equal(model.generate(IDS, 6), expected)


def test_a_cache_of_the_callers():
    """An empty DynamicCache, with sliding layers or without, is given the prefix, as no cache is."""
    for name in ("gpt2", "gemma2"):
        base = tiny(name)
        model = wrapped(base)
        for cache in (transformers.DynamicCache(), transformers.DynamicCache(config=base.config)):
            out = model(IDS, past_key_values=cache, use_cache=True)
            assert out.past_key_values is cache and cache.get_seq_length() == N + 8
            assert_close(out.logits, model(IDS).logits, 1e-6)
            more = model(IDS[:, :3], past_key_values=cache).logits
            assert_close(more, model(torch.cat((IDS, IDS[:, :3]), 1)).logits[:, -3:], 1e-5)


def test_a_conversation_goes_on_with_its_cache():
    """generate() takes the cache of earlier turns with new ids and the mask of all. All ids again are an Error, as the
    model would drop some of the new ones; and so are packed rows, whose examples would see one another."""
    model, cache = wrapped(tiny("llama")), transformers.DynamicCache()
    first = model.generate(IDS, 3, past_key_values=cache)
    new = torch.cat((first[:, -1:], IDS[:, :5]), 1)  # the last one is not in the cache yet
    mask = torch.ones(len(IDS), first.size(1) + 5, dtype=torch.long)
    right = model.generate(torch.cat((first, IDS[:, :5]), 1), 4)[:, -4:]
    with pytest.raises(prefix.Error, match="a cache holds the text before"):
        model.generate(torch.cat((first, IDS[:, :5]), 1), 4, past_key_values=cache)
    assert torch.equal(model.generate(new, 4, past_key_values=cache, attention_mask=mask)[:, -4:], right)
    with pytest.raises(prefix.Error, match="packed row"):
        model(IDS, position_ids=torch.arange(4).repeat(2).expand(len(IDS), -1))


# ---------------------------------------------------------------------------------------------------------------- files

FILES = [("llama", 12)] + [pytest.param(name, hidden, marks=thorough) for name in MODELS for hidden in (None, 12)]


def write(model, folder):
    """The two files of an adapter, as train.py writes them."""
    folder.mkdir()
    save_file(prefix.prefix_state_dict(model), folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(prefix.prefix_config(model)))


def read(base, folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    model = prefix.PrefixTuning(base, config["num_virtual_tokens"]).eval()
    prefix.load_prefix_state_dict(model, load_file(folder / "adapter_model.safetensors"))
    return model


@pytest.mark.parametrize("name, hidden", FILES)
def test_a_prefix_of_ours_opens_in_peft(name, hidden, tmp_path):
    """A prefix saved here opens with PeftModel.from_pretrained, with the same logits and not one warning."""
    base = tiny(name)
    ours = wrapped(base, hidden=hidden)
    assert_noticeable(ours)
    write(ours, tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", FutureWarning)  # between peft and transformers
        opened = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter")
    assert_close(ours(IDS).logits, opened(IDS).logits, 1e-6)


@pytest.mark.parametrize("name, hidden", FILES)
def test_a_prefix_of_pefts_opens_here(name, hidden, tmp_path):
    """A prefix that peft saved, trained through an MLP or not, opens here with the same logits."""
    base = tiny(name)
    more = {} if hidden is None else dict(prefix_projection=True, encoder_hidden_size=hidden)
    theirs = in_peft(base, wrapped(base, hidden=hidden), **more)
    theirs.save_pretrained(tmp_path / "adapter")
    ours = read(base, tmp_path / "adapter")
    assert_noticeable(ours)
    assert_close(ours(IDS).logits, theirs(IDS).logits, 1e-6 if hidden is None else 1e-5)  # its MLP has B N rows


def test_a_prefix_on_our_gpt_opens_in_peft(tmp_path):
    """A prefix of our GPT opens in peft on GPT2LMHeadModel, with the same logits and text, and comes back."""
    torch.manual_seed(0)
    base = gpt.GPT(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=4).eval()
    for p in base.parameters():
        nn.init.normal_(p, std=0.2)
    save_gpt(base, tmp_path / "base")
    ours = wrapped(base)
    assert_noticeable(ours)
    write(ours, tmp_path / "adapter")
    hf = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "base")
    opened = peft.PeftModel.from_pretrained(copy.deepcopy(hf), tmp_path / "adapter")
    for back in (read(base, tmp_path / "adapter"), read(hf, tmp_path / "adapter")):
        # two implementations of the model in fp32: a hundred roundings of 6e-8
        assert_close(back(IDS).logits, opened(IDS).logits, 1e-5)
    for mask in (torch.ones_like(IDS), MASK):
        theirs = opened.generate(
            input_ids=IDS, attention_mask=mask, max_new_tokens=6, pad_token_id=0, eos_token_id=None, do_sample=False
        )
        assert torch.equal(ours.generate(IDS, 6, attention_mask=mask), theirs)


# --------------------------------------------------------------------------------------------------------------- errors


def test_models_without_keys_and_values_in_every_layer_are_refused():
    """Encoder-decoders and state space models, pure and mixed, are refused in one line, still trainable."""
    sizes = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
    t5 = transformers.T5Config(vocab_size=64, d_model=32, d_ff=32, d_kv=8, num_layers=1, num_heads=4)
    bart = transformers.BartConfig(
        vocab_size=64, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32,
    )  # fmt: skip
    mamba = transformers.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1)
    recurrent = transformers.RecurrentGemmaConfig(**sizes, lru_width=32, num_key_value_heads=2)
    jamba = transformers.JambaConfig(**sizes, num_key_value_heads=2, attn_layer_period=2, attn_layer_offset=1)
    for model in (
        transformers.T5ForConditionalGeneration(t5),
        transformers.BartForConditionalGeneration(bart),  # makes its decoder's input from input_ids
        transformers.MambaForCausalLM(mamba),
        transformers.JambaForCausalLM(jamba),
        transformers.RecurrentGemmaForCausalLM(recurrent),
    ):
        message = f"{type(model).__name__} is no causal LM that caches keys and values of one shape"
        with pytest.raises(prefix.Error, match=message) as caught:
            prefix.PrefixTuning(model, N)
        assert "\n" not in str(caught.value) and all(p.requires_grad for p in model.parameters())


def test_gradient_checkpointing_is_refused():
    """transformers drops the cache under gradient checkpointing: refused in training, and no matter in evaluation.

    The mode is that of the model inside, which a wrapper just made does not share.
    """
    base = tiny("llama")
    model = wrapped(base)
    with torch.no_grad():
        expected = model(IDS).logits
    base.gradient_checkpointing_enable()
    model.training = True
    assert torch.equal(model(IDS).logits, expected)
    model.eval().model.train()
    for call in (lambda: model(IDS), lambda: model.generate(IDS, 4), lambda: prefix.PrefixTuning(base, N)):
        with pytest.raises(prefix.Error, match="gradient checkpointing drops past_key_values"):
            call()


def test_a_prompt_longer_than_the_context():
    """On GPT-2 with 48 positions and a prefix of 5, 43 tokens run, and 44, also generated, are refused in one line."""
    model = wrapped(tiny("gpt2"))
    ids = torch.randint(1, 64, (1, 44))
    assert model(ids[:, :43]).logits.shape == (1, 43, 64)
    assert model.generate(ids[:, :40], 4).shape == (1, 44)
    message = "44 tokens and a prefix of 5 do not fit the model's 48 positions"
    for call in (lambda: model(ids), lambda: model.generate(ids[:, :40], 5)):
        with pytest.raises(prefix.Error, match=message):
            call()


# ------------------------------------------------------------------------------------------------------- the file alone


@pytest.mark.parametrize("name", ["gpt2", pytest.param("llama", marks=thorough)])
def test_the_file_alone_works_on_transformers_models(name, tmp_path, monkeypatch):
    """Pasted into an empty folder, without nanopeft, prefix.py trains, folds and generates on GPT-2 and Llama."""
    shutil.copy(Path(prefix.__file__), tmp_path / "prefix.py")
    for module in [module for module in sys.modules if module.partition(".")[0] == "nanopeft"]:
        monkeypatch.setitem(sys.modules, module, None)  # importing it fails
    monkeypatch.chdir(tmp_path)
    alone = runpy.run_path("prefix.py")
    base = tiny(name)
    model = alone["PrefixTuning"](base, N, hidden=8)
    before = model(IDS).logits
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()
    after = model(IDS).logits
    assert (after - before).abs().max() > 0.1 * after.abs().max()
    assert torch.equal(alone["fold_prefix"](model)(IDS).logits, after)
    assert torch.equal(model.generate(IDS, 4), recomputed(model, IDS, 4))
