# SPDX-License-Identifier: MIT
"""nanopeft/prompt.py against peft, on transformers' models: the same numbers and files, and padding done right."""

import copy
import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import peft
import pytest
import torch
import torch.nn as nn
import transformers
from safetensors.torch import load_file, save_file

from nanopeft import gpt, prompt
from nanopeft.trainer.bases import save_gpt

# --------------------------------------------------------------------------------------------------------- small models


def tiny(name, **more):
    """A small random model of one of transformers' architectures, with weights large enough to make a difference."""
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    places = dict(max_position_embeddings=40, bos_token_id=63, eos_token_id=None, pad_token_id=0)
    config = transformers.AutoConfig.for_model(name, **(sizes | places | more))
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for p in model.parameters():
        if p.dim() > 1:
            nn.init.normal_(p, std=0.3)
    return model


GROUPED = dict(num_key_value_heads=2)
MODELS = {
    "gpt2": lambda: tiny("gpt2", attn_pdrop=0, embd_pdrop=0, resid_pdrop=0),
    "llama": lambda: tiny("llama", **GROUPED),
    "mistral": lambda: tiny("mistral", sliding_window=6, **GROUPED),
    "qwen2": lambda: tiny("qwen2", **GROUPED),
    "gemma2": lambda: tiny("gemma2", head_dim=8, **GROUPED),
    "gemma3": lambda: tiny("gemma3_text", head_dim=8, **GROUPED),
    "phi": lambda: tiny("phi"),
    "gpt_neo": lambda: tiny("gpt_neo", attention_types=[[["global", "local"], 1]], window_size=6),
    "mpt": lambda: tiny("mpt", d_model=32, n_heads=4, n_layers=2, max_seq_len=40),
    "gpt_neox": lambda: tiny("gpt_neox"),
    "opt": lambda: tiny("opt", ffn_dim=48, word_embed_proj_dim=32),
    "bloom": lambda: tiny("bloom"),
    "falcon": lambda: tiny("falcon"),
    "falcon alibi": lambda: tiny("falcon", alibi=True),
}
# GPT-2's positions, rotary ones in a sliding window, scaled embeddings, and ALiBi; the others only with -m thorough
TELLING = ("gpt2", "mistral", "bloom")
FEW = [name if name in TELLING else pytest.param(name, marks=pytest.mark.thorough) for name in MODELS]
N = 5
DTYPES = [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.thorough)]
IDS = torch.tensor([[5, 9, 2, 40, 41, 3, 62, 8], [1, 1, 62, 17, 9, 30, 2, 8]])
# the second row is three tokens shorter, padded on the left
PADDED, MASK = IDS.clone(), torch.ones_like(IDS)
PADDED[1, :3], MASK[1, :3] = 0, 0


def pair(base):
    """(peft's model, ours) around one frozen base, with the same prompt, as large as the embeddings that it joins."""
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=N, num_attention_heads=4)
    ours = prompt.PromptTuning(base, N)
    theirs = peft.get_peft_model(base, config).eval()
    P = 2 * base.get_input_embeddings()(torch.arange(20)).float().std() * torch.randn(N, 32)
    theirs.prompt_encoder["default"].embedding.weight.data.copy_(P)
    prompt.load_prompt_state_dict(ours, {"prompt_embeddings": P})
    return theirs, ours


def assert_close(found, expected, relative):
    assert found.shape == expected.shape and found.dtype == expected.dtype
    assert (found - expected).abs().max() <= relative * expected.abs().max()


def assert_noticeable(model, ids):
    """The prompt changes the logits by at least a tenth, so that logits without it could not pass for those with it."""
    with torch.no_grad():
        y, base = model(ids).logits, model.model(ids).logits
    assert (y - base).abs().max() >= 0.1 * y.abs().max()


pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:Position ids are not supported")

# -------------------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FEW)
def test_it_computes_what_peft_does(name, dtype):
    """Logits, loss, the gradient of P and greedy generation are peft's on each architecture; P is fp32 in both."""
    torch.manual_seed(0)
    theirs, ours = pair(MODELS[name]().to(dtype))
    assert_noticeable(ours, IDS)
    close = 1e-6  # the same operations, in 16 bits too: nothing but fp32 sums could be in another order
    P, Q = ours.prompt_embeddings, theirs.prompt_encoder["default"].embedding.weight
    labels = IDS.clone()
    labels[0, :3] = -100
    for inputs in ({"input_ids": IDS}, {"inputs_embeds": ours.model.get_input_embeddings()(IDS)}):
        found, expected = (model(**inputs, labels=labels) for model in (ours, theirs))
        assert found.logits.shape == (2, 8, 64)
        assert_close(found.logits, expected.logits[:, N:], close)
        assert_close(found.loss, expected.loss, close)
        for out, p in ((found, P), (expected, Q)):
            p.grad = None
            out.loss.backward()
        assert P.grad.dtype == torch.float32 and P.grad.abs().max() > 0
        assert_close(P.grad, Q.grad, close)
    expected = theirs.generate(input_ids=IDS, attention_mask=MASK | 1, max_new_tokens=8, do_sample=False)
    assert torch.equal(ours.generate(IDS, 8, do_sample=False), expected)
    assert torch.equal(gpt.generate(ours, IDS, 8), expected)


@pytest.mark.parametrize("name", FEW)
def test_a_padded_row_gives_what_it_gives_alone(name):
    """Left padding changes no logit of a real token and nothing that is generated, by either way of generating."""
    torch.manual_seed(0)
    _, ours = pair(MODELS[name]())
    assert_noticeable(ours, IDS)
    with torch.no_grad():
        padded = ours(PADDED, attention_mask=MASK).logits
        for row, start in ((0, 0), (1, 3)):
            # masked softmaxes and matrix products of other sizes in fp32: a hundred roundings of 6e-8
            assert_close(padded[row : row + 1, start:], ours(PADDED[row : row + 1, start:]).logits, 1e-5)
    by_theirs = ours.generate(PADDED, 8, attention_mask=MASK, do_sample=False)
    by_ours = gpt.generate(ours, PADDED, 8, attention_mask=MASK)
    assert torch.equal(by_theirs, by_ours)
    for row, start in ((0, 0), (1, 3)):
        assert torch.equal(gpt.generate(ours, PADDED[row : row + 1, start:], 8), by_ours[row : row + 1, start:])


def test_left_padding_is_where_peft_goes_wrong():
    """On GPT-2 peft counts the pads as positions: its logits for the padded row are off by more than a tenth."""
    torch.manual_seed(0)
    theirs, ours = pair(MODELS["gpt2"]())
    row = ours(PADDED[1:, 3:]).logits
    assert_close(ours(PADDED, attention_mask=MASK).logits[1:, 3:], row, 1e-5)  # as above
    assert (theirs(PADDED, attention_mask=MASK).logits[1:, N + 3 :] - row).abs().max() > 0.1 * row.abs().max()


@pytest.mark.parametrize("name", ["gpt2", "llama", "opt"])
def test_positions_given_by_the_caller_are_the_inputs(name):
    """position_ids count the input's own tokens: 0, 1, 2, ... is what is used without them, in later steps too."""
    torch.manual_seed(0)
    _, ours = pair(MODELS[name]())
    positions = torch.arange(8)[None]
    first = ours(IDS[:, :6], position_ids=positions[:, :6], use_cache=True)
    then = ours(IDS[:, 6:], position_ids=positions[:, 6:], past_key_values=first.past_key_values)
    expected = ours(IDS).logits
    assert torch.equal(ours(IDS, position_ids=positions).logits, expected)
    assert_close(torch.cat((first.logits, then.logits), 1), expected, 1e-5)  # as above
    assert (ours(IDS, position_ids=positions + 4).logits - expected).abs().max() > 0.01 * expected.abs().max()
    with pytest.raises(prompt.Error, match="packed row"):
        ours(IDS, position_ids=torch.arange(4).repeat(2)[None])


@pytest.mark.parametrize("keep", [1, 3, 8, 11, torch.tensor([0, 6])])
def test_logits_to_keep_counts_the_inputs_positions(keep):
    """logits_to_keep, as a number or as places, picks among the logits of the input, never those of the prompt."""
    torch.manual_seed(0)
    _, ours = pair(MODELS["llama"]())
    expected = ours(IDS).logits
    expected = expected[:, keep] if torch.is_tensor(keep) else expected[:, -keep:]
    assert_close(ours(IDS, logits_to_keep=keep).logits, expected, 1e-6)  # a matrix product of fewer rows


def test_beams_and_samples():
    """The options of transformers' generate arrive there: two beams, and three samples of each row."""
    torch.manual_seed(0)
    theirs, ours = pair(MODELS["llama"]())
    inputs = dict(attention_mask=MASK | 1, max_new_tokens=6)
    expected = theirs.generate(input_ids=IDS, num_beams=2, do_sample=False, **inputs)
    assert torch.equal(ours.generate(IDS, num_beams=2, do_sample=False, **inputs), expected)
    drawn = ours.generate(IDS, 6, do_sample=True, num_return_sequences=3, return_dict_in_generate=True).sequences
    assert drawn.shape == (6, 14) and torch.equal(drawn[:, :8], IDS.repeat_interleave(3, 0))


def test_what_is_to_be_generated_must_fit():
    """Prompt, text and new tokens up to the last position are generated; with one more, it is said before the first."""
    model = prompt.PromptTuning(MODELS["gpt2"](), N)
    assert model.generate(IDS, 40 - N - 8 + 1, do_sample=False).shape == (2, 36)
    with pytest.raises(prompt.Error, match="need 41 positions; the model has 40"):
        model.generate(IDS, 40 - N - 8 + 2)


@pytest.mark.parametrize("name", FEW)
def test_training_moves_the_prompt_and_nothing_else(name):
    """After three steps all base tensors are the same bits, and every number of P has moved."""
    torch.manual_seed(0)
    model = prompt.PromptTuning(MODELS[name]().to(torch.bfloat16), N)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model.train()(IDS, attention_mask=MASK, labels=IDS).loss.backward()
        optimizer.step()
    for n, t in model.state_dict().items():
        assert torch.equal(t, before[n]) == (n != "prompt_embeddings"), n
    assert (model.prompt_embeddings != before["prompt_embeddings"]).all()


# ---------------------------------------------------------------------------------------------------------------- start


@pytest.mark.parametrize("n", [3, 20])
@pytest.mark.parametrize("name", ["gpt2", "gemma3_text"])
def test_starting_from_a_text_is_pefts(name, n):
    """The ids of a text, cut or repeated to n, give the vectors that peft makes of the text, scaled as Gemma's are."""
    torch.manual_seed(0)
    folder, text = str(Path(gpt.__file__).parent / "base"), "which package is this?"
    base = tiny(name, **({} if name == "gpt2" else dict(head_dim=8, **GROUPED)), vocab_size=3072)
    config = peft.PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=n, prompt_tuning_init="TEXT", prompt_tuning_init_text=text,
        tokenizer_name_or_path=folder,
    )  # fmt: skip
    theirs = peft.get_peft_model(copy.deepcopy(base), config).prompt_encoder["default"].embedding.weight
    ids = transformers.AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
    assert 3 < len(ids) < 20
    for init in (ids, torch.tensor(ids)):
        assert torch.equal(prompt.PromptTuning(copy.deepcopy(base), n, init=init).prompt_embeddings, theirs)


# ---------------------------------------------------------------------------------------------------------------- files


def write(model, folder):
    """The two files of an adapter, as train.py writes them."""
    folder.mkdir()
    save_file(prompt.prompt_state_dict(model), folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(prompt.prompt_config(model)))


def read(base, folder):
    model = prompt.PromptTuning(base, json.loads((folder / "adapter_config.json").read_text())["num_virtual_tokens"])
    prompt.load_prompt_state_dict(model, load_file(folder / "adapter_model.safetensors"))
    return model


@pytest.fixture
def base(tmp_path):
    """A GPT of ours, and its folder, in which GPT2LMHeadModel finds the same weights."""
    torch.manual_seed(0)
    model = gpt.GPT(vocab_size=64, n_positions=40, n_embd=32, n_layer=2, n_head=4)
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    save_gpt(model, tmp_path / "base")
    return model, tmp_path / "base"


@pytest.mark.parametrize("init", ["vocabulary", "random", [5, 6]])
def test_a_prompt_of_ours_opens_in_peft(init, base, tmp_path):
    """A prompt on our GPT opens on GPT2LMHeadModel with peft: the same logits and text, and not one warning."""
    model, folder = base
    ours = prompt.PromptTuning(model, N, init=init)
    nn.init.normal_(ours.prompt_embeddings)
    assert_noticeable(ours, IDS)
    write(ours, tmp_path / "adapter")
    hf = transformers.GPT2LMHeadModel.from_pretrained(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", FutureWarning)  # between peft and transformers
        opened = peft.PeftModel.from_pretrained(hf, tmp_path / "adapter")
    # two implementations of the model in fp32: a hundred roundings of 6e-8
    assert_close(ours(IDS).logits, opened(IDS).logits[:, N:], 1e-5)
    settings = dict(attention_mask=MASK | 1, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(ours.generate(IDS, 8), opened.generate(input_ids=IDS, **settings))


@pytest.mark.parametrize("init", ["RANDOM", "SAMPLE_VOCAB"])
def test_a_prompt_of_pefts_opens_here(init, base, tmp_path):
    """A prompt that peft saved on GPT2LMHeadModel opens here, on our GPT and on that model, with the same logits."""
    model, folder = base
    hf = transformers.GPT2LMHeadModel.from_pretrained(folder)
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=N, prompt_tuning_init=init)
    theirs = peft.get_peft_model(hf, config).eval()
    nn.init.normal_(theirs.prompt_encoder["default"].embedding.weight)
    theirs.save_pretrained(tmp_path / "adapter")
    expected = theirs(IDS).logits[:, N:]
    for ours in (read(model, tmp_path / "adapter"), read(hf, tmp_path / "adapter")):
        assert_noticeable(ours, IDS)
        assert_close(ours(IDS).logits, expected, 1e-5)  # as above


@pytest.mark.parametrize(
    "name, sizes",
    [
        ("T5ForConditionalGeneration", dict(d_model=32, num_layers=1)),
        ("GPT2ForSequenceClassification", dict(n_embd=24, n_layer=1, bos_token_id=1, eos_token_id=2)),
        ("Gemma3nForCausalLM", dict(num_hidden_layers=1, num_kv_shared_layers=0, activation_sparsity_pattern=None)),
    ],
)
def test_what_would_be_silently_wrong_is_refused(name, sizes):
    """An encoder-decoder, a classifier, and a model that looks ids up in every layer get one clear line."""
    kind = getattr(transformers, name)
    with torch.device("meta"):
        model = kind(kind.config_class(vocab_size=64, **sizes))
    with pytest.raises(prompt.Error, match=f"{name} is .*take a causal LM"):
        prompt.PromptTuning(model)


@pytest.mark.thorough
def test_the_file_alone_works_on_transformers_models(tmp_path):
    """Pasted into an empty folder, without nanopeft, prompt.py trains and generates with transformers' models."""
    shutil.copy(Path(prompt.__file__), tmp_path / "prompt.py")
    (tmp_path / "use.py").write_text(
        "import sys\n"
        "sys.modules['nanopeft'] = None\n"
        "sys.path.insert(0, '.')\n"
        "import torch, transformers\n"
        "torch.manual_seed(0)\n"
        "from prompt import PromptTuning\n"
        "sizes = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, eos_token_id=None)\n"
        "sizes |= dict(intermediate_size=64, bos_token_id=1, initializer_range=0.2)\n"
        "for name in ('gpt2', 'llama'):\n"
        "    config = transformers.AutoConfig.for_model(name, **sizes)\n"
        "    model = PromptTuning(transformers.AutoModelForCausalLM.from_config(config), 4)\n"
        "    ids = torch.arange(8)[None]\n"
        "    optimizer = torch.optim.Adam([model.prompt_embeddings], lr=0.1)\n"
        "    losses = []\n"
        "    for _ in range(20):\n"
        "        losses.append(model(ids, labels=ids).loss)\n"
        "        optimizer.zero_grad()\n"
        "        losses[-1].backward()\n"
        "        optimizer.step()\n"
        "    print(losses[0].item(), losses[-1].item(), model.generate(ids, 5, do_sample=False).shape[1])\n"
    )
    done = subprocess.run([sys.executable, "-I", "use.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        first, last, length = map(float, line.split())
        assert last < first - 0.1 and length == 13
    assert len(done.stdout.splitlines()) == 2
