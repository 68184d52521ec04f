# SPDX-License-Identifier: MIT
"""nanopeft/ptuning.py against peft, on transformers' models: the same numbers and files with P in front."""

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

from nanopeft import gpt, ptuning
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
FOUR = ["gpt2", *(pytest.param(name, marks=pytest.mark.thorough) for name in ("llama", "gemma3", "bloom"))]
N = 5
DTYPES = [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.thorough)]
IDS = torch.tensor([[5, 9, 2, 40, 41, 3, 62, 8], [1, 1, 62, 17, 9, 30, 2, 8]])
# the second row is three tokens shorter, padded on the left
PADDED, MASK = IDS.clone(), torch.ones_like(IDS)
PADDED[1, :3], MASK[1, :3] = 0, 0


ENCODERS = {"lstm": dict(hidden=12, layers=2), "lstm of 1": dict(hidden=7, layers=1), "mlp": dict(hidden=24)}


def pair(base, kind):
    """(peft's model, ours) around one frozen base, with the same encoder, whose vectors are as large as words are."""
    encoder, sizes = kind.split()[0], ENCODERS[kind]
    config = peft.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=N, num_attention_heads=4,
        encoder_reparameterization_type=encoder.upper(),
        encoder_hidden_size=sizes["hidden"], encoder_num_layers=sizes.get("layers", 2),
    )  # fmt: skip
    ours = ptuning.PTuning(base, N, encoder=encoder, **sizes)
    theirs = peft.get_peft_model(base, config).eval()
    last = ours.encoder.mlp_head[-1]
    with torch.no_grad():
        last.weight *= 2 * base.get_input_embeddings()(torch.arange(20)).float().std() / ours.virtual_tokens().std()
    theirs.prompt_encoder["default"].load_state_dict(ours.encoder.state_dict())
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
@pytest.mark.parametrize("kind", ["lstm", "mlp", pytest.param("lstm of 1", marks=pytest.mark.thorough)])
@pytest.mark.parametrize("name", FOUR)
def test_it_computes_what_peft_does(name, kind, dtype):
    """With the virtual tokens in front, logits, loss, all gradients of the encoder and greedy generation are peft's."""
    torch.manual_seed(0)
    theirs, ours = pair(MODELS[name]().to(dtype), kind)
    assert_noticeable(ours, IDS)
    close = 1e-6  # the same operations, in 16 bits too: nothing but fp32 sums could be in another order
    own, other = (dict(m.named_parameters()) for m in (ours.encoder, theirs.prompt_encoder["default"]))
    assert own.keys() == other.keys()
    found, expected = (model(IDS, labels=IDS) for model in (ours, theirs))
    assert_close(found.logits, expected.logits[:, N:], close)
    assert_close(found.loss, expected.loss, close)
    found.loss.backward()
    expected.loss.backward()
    for n, p in own.items():
        assert p.grad.dtype == torch.float32 and p.grad.abs().max() > 0
        assert_close(p.grad, other[n].grad, close)
    expected = theirs.generate(input_ids=IDS, attention_mask=MASK | 1, max_new_tokens=8, do_sample=False)
    assert torch.equal(ours.generate(IDS, 8, do_sample=False), expected)
    assert torch.equal(gpt.generate(ours, IDS, 8), expected)


@pytest.mark.parametrize("name", FEW)
def test_a_template_with_all_in_front_is_the_way_without(name):
    """[P]... before the source gives logits, loss, gradients and text of vectors put in front, on each architecture."""
    torch.manual_seed(0)
    base = MODELS[name]()
    _, front = pair(base, "lstm")
    filled = ptuning.PTuning(copy.deepcopy(base), template="[P]" * N + "{source}", hidden=12)
    filled.encoder.load_state_dict(front.encoder.state_dict())
    ids = torch.tensor([filled.apply_template(row, None) for row in IDS.tolist()])
    assert (ids[:, :N] == 64).all() and torch.equal(ids[:, N:], IDS)
    one, other = filled(ids, labels=ids), front(IDS, labels=IDS)
    # the same embeddings, and then the same operations
    assert_close(one.logits[:, N:], other.logits, 1e-6)
    assert_close(one.loss, other.loss, 1e-6)
    one.loss.backward()
    other.loss.backward()
    for p, q in zip(filled.encoder.parameters(), front.encoder.parameters()):
        assert_close(p.grad, q.grad, 1e-5)  # a sum over two rows in another order
    expected = front.generate(IDS, 8, do_sample=False)
    assert torch.equal(filled.generate(ids, 8, do_sample=False)[:, N:], expected)
    assert torch.equal(gpt.generate(filled, ids, 8)[:, N:], expected)


TEMPLATE = "[P]The capital of {source}[P] is[P][P]"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", ["front", "template"])
@pytest.mark.parametrize("name", FEW)
def test_a_padded_row_gives_what_it_gives_alone(name, way, dtype):
    """Left padding changes no logit of an input token, and no generated text, wherever the virtual tokens are."""
    torch.manual_seed(0)
    base = MODELS[name]().to(dtype)
    ours = ptuning.PTuning(base, 4) if way == "front" else ptuning.PTuning(base, template=TEMPLATE)
    nn.init.normal_(ours.encoder.mlp_head[-1].weight, std=3)
    rows = [[5, 9, 2, 40, 41], [62, 17]]
    if way == "template":
        rows = [ours.apply_template(row, lambda text: [len(text), 7]) for row in rows]
    else:
        assert_noticeable(ours, torch.tensor(rows[:1]))
    ids = torch.tensor([rows[0], [0] * 3 + rows[1]])
    mask = torch.tensor([[1] * len(rows[0]), [0] * 3 + [1] * len(rows[1])])
    # masked softmaxes and matrix products of other sizes: a hundred roundings of 6e-8, or in bf16 a dozen of 4e-3
    close = 1e-5 if dtype == torch.float32 else 0.05
    with torch.no_grad():
        padded = ours(ids, attention_mask=mask).logits
        for i, row in enumerate(rows):
            assert_close(padded[i : i + 1, -len(row) :], ours(torch.tensor([row])).logits, close)
    by_theirs = ours.generate(ids, 8, attention_mask=mask, do_sample=False)
    by_ours = gpt.generate(ours, ids, 8, attention_mask=mask)
    assert by_theirs.shape == by_ours.shape == (2, ids.size(1) + 8)
    if dtype == torch.float32:  # in 16 bits two tokens may be equally likely
        assert torch.equal(by_theirs, by_ours)
        for i, row in enumerate(rows):
            assert torch.equal(gpt.generate(ours, torch.tensor([row]), 8)[0], by_ours[i, -len(row) - 8 :])


def test_what_is_to_be_generated_must_fit():
    """Prompt, text and new tokens up to the last position are generated; with one more, it is said before the first."""
    model = ptuning.PTuning(MODELS["gpt2"](), N)
    assert model.generate(IDS, 40 - N - 8 + 1, do_sample=False).shape == (2, 36)
    with pytest.raises(ptuning.Error, match="need 41 positions; the model has 40"):
        model.generate(IDS, 40 - N - 8 + 2)


@pytest.mark.thorough
@pytest.mark.parametrize("encoder", ["lstm", "mlp"])
@pytest.mark.parametrize("name", MODELS)
def test_training_moves_the_encoder_and_nothing_else(name, encoder):
    """After three steps all base tensors are the same bits, and every tensor of the encoder has moved."""
    torch.manual_seed(0)
    model = ptuning.PTuning(MODELS[name]().to(torch.bfloat16), template=TEMPLATE, encoder=encoder)
    ids = torch.tensor([model.apply_template(row, lambda text: [len(text), 7]) for row in IDS.tolist()])
    before = {n: t.clone() for n, t in model.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        model.train()(ids, labels=ids).loss.backward()
        optimizer.step()
    for n, t in model.state_dict().items():
        assert torch.equal(t, before[n]) == n.startswith("model."), n


# ---------------------------------------------------------------------------------------------------------------- files


def write(model, folder):
    """The two files of an adapter, as train.py writes them."""
    folder.mkdir()
    save_file(ptuning.ptuning_state_dict(model), folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(ptuning.ptuning_config(model)))


def read(base, folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    model = ptuning.PTuning(
        base, config["num_virtual_tokens"], encoder=config["encoder_reparameterization_type"].lower(),
        template=config.get("template"), pseudo_id=config.get("pseudo_id"),
    )  # fmt: skip
    ptuning.load_ptuning_state_dict(model, load_file(folder / "adapter_model.safetensors"))
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


@pytest.mark.parametrize("kind", ENCODERS)
def test_virtual_tokens_in_front_open_in_peft(kind, base, tmp_path):
    """In front of our GPT they open on GPT2LMHeadModel with peft: the same logits and text, and not one warning."""
    model, folder = base
    ours = ptuning.PTuning(model, N, encoder=kind.split()[0], **ENCODERS[kind])
    nn.init.normal_(ours.encoder.mlp_head[-1].weight)
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


@pytest.mark.parametrize("kind", ENCODERS)
def test_an_encoder_of_pefts_opens_here(kind, base, tmp_path):
    """What peft saved of its encoder on GPT2LMHeadModel opens here, on our GPT and on that model, folded."""
    model, folder = base
    theirs, _ = pair(transformers.GPT2LMHeadModel.from_pretrained(folder), kind)
    theirs.save_pretrained(tmp_path / "adapter")
    expected = theirs(IDS).logits[:, N:]
    for ours in (read(model, tmp_path / "adapter"), read(theirs.base_model, tmp_path / "adapter")):
        assert ours.encoder is None
        assert_noticeable(ours, IDS)
        assert_close(ours(IDS).logits, expected, 1e-5)  # as above


@pytest.mark.parametrize(
    "options", [dict(template=TEMPLATE), dict(n_tokens=3, pseudo_id=64), dict(template="{source}")]
)
def test_peft_refuses_what_it_would_put_in_front(options, base, tmp_path):
    """Virtual tokens elsewhere are stored under a type that peft does not open, and open here as they were."""
    model, folder = base
    ours = ptuning.PTuning(model, **options)
    write(ours, tmp_path / "adapter")
    with pytest.raises((ValueError, KeyError), match="P_TUNING_TEMPLATE"):
        peft.PeftModel.from_pretrained(transformers.GPT2LMHeadModel.from_pretrained(folder), tmp_path / "adapter")
    hf = read(transformers.GPT2LMHeadModel.from_pretrained(folder), tmp_path / "adapter")
    assert (hf.template, hf.pseudo_id, hf.n_tokens) == (ours.template, ours.pseudo_id, ours.n_tokens)
    ids = torch.tensor([[*[64] * ours.n_tokens, 5, 6]])
    if ours.template:
        ids = torch.tensor([ours.apply_template([5, 9], lambda text: [7, 8])])
    assert_close(ours(ids).logits, hf(ids).logits, 1e-5)  # as above


@pytest.mark.thorough
def test_the_file_alone_works_on_transformers_models(tmp_path):
    """Pasted with prompt.py into an empty folder, it trains and generates with transformers' models."""
    for file in ("prompt.py", "ptuning.py"):
        shutil.copy(Path(ptuning.__file__).parent / file, tmp_path)
    (tmp_path / "use.py").write_text(
        "import sys\n"
        "sys.modules['nanopeft'] = None\n"
        "sys.path.insert(0, '.')\n"
        "import torch, transformers\n"
        "torch.manual_seed(0)\n"
        "from ptuning import PTuning, fold_ptuning\n"
        "sizes = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, eos_token_id=None)\n"
        "sizes |= dict(intermediate_size=64, bos_token_id=1, initializer_range=0.2)\n"
        "for name in ('gpt2', 'llama'):\n"
        "    config = transformers.AutoConfig.for_model(name, **sizes)\n"
        "    model = PTuning(transformers.AutoModelForCausalLM.from_config(config), template='[P]{source}[P] is [P]')\n"
        "    ids = torch.tensor([model.apply_template([1, 2, 3], lambda text: [4] * len(text.split()))])\n"
        "    optimizer = torch.optim.Adam(model.encoder.parameters(), lr=0.01)\n"
        "    losses = []\n"
        "    for _ in range(20):\n"
        "        losses.append(model(ids, labels=ids).loss)\n"
        "        optimizer.zero_grad()\n"
        "        losses[-1].backward()\n"
        "        optimizer.step()\n"
        "    fold_ptuning(model)\n"
        "    print(losses[0].item(), losses[-1].item(), model.generate(ids, 5, do_sample=False).shape[1])\n"
    )
    done = subprocess.run([sys.executable, "-I", "use.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        first, last, length = map(float, line.split())
        assert last < first - 0.1 and length == 12
    assert len(done.stdout.splitlines()) == 2
