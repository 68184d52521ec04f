# SPDX-License-Identifier: MIT
"""nanopeft/lora.py against peft, on transformers' models: the same numbers, layers, names and files."""

import copy
import json
import runpy
import shutil
import sys
import types
import warnings

import peft
import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FullyShardedDataParallel

from nanopeft import gpt, lora, qlora
from nanopeft.trainer import checkpoint, peft_config
from nanopeft.trainer.bases import save_gpt

# --------------------------------------------------------------------------------------------------------- small models


def hf_gpt2(tied=True):
    sizes = dict(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=4, bos_token_id=63, eos_token_id=63)
    more = dict(attn_pdrop=0, embd_pdrop=0, resid_pdrop=0, tie_word_embeddings=tied)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **more))


def hf_llama(tied=False):
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    more = dict(num_key_value_heads=2, max_position_embeddings=32, pad_token_id=3, tie_word_embeddings=tied)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **more))


def hf_gemma():
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    more = dict(num_key_value_heads=2, head_dim=8, max_position_embeddings=32, tie_word_embeddings=False)
    return transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**sizes, **more))


def tensors(model):
    """What peft trains, under the names of its file, as the tensors themselves."""
    return {n.replace(".default", ""): p for n, p in model.named_parameters() if ".lora_" in n}


def pair(base, targets, **options):
    """(peft's model, ours): two copies of a base with the same random adapter."""
    arguments = dict(r=4, alpha=8, dropout=0.0, ranks={}, rslora=False) | options
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", target_modules=targets if isinstance(targets, str) else list(targets), r=arguments["r"],
        lora_alpha=arguments["alpha"], lora_dropout=arguments["dropout"], rank_pattern=arguments["ranks"],
        use_rslora=arguments["rslora"], fan_in_fan_out=base.config.model_type == "gpt2",
    )  # fmt: skip
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    for p in tensors(theirs).values():
        nn.init.normal_(p, std=0.3)
    ours = lora.add_lora(copy.deepcopy(base).eval(), targets, **arguments)
    lora.load_lora_state_dict(ours, {n: p.detach() for n, p in tensors(theirs).items()})
    return theirs, ours


def assert_close(found, expected, relative):
    assert found.shape == expected.shape and found.dtype == expected.dtype
    assert (found - expected).abs().max() <= relative * expected.abs().max()


def assert_noticeable(model, ids):
    """The update is at least a tenth of the output, so that an output without it could not pass for one with it."""
    with torch.no_grad():
        y = model(ids).logits
        with lora.lora_disabled(model):
            base = model(ids).logits
    assert (y - base).abs().max() >= 0.1 * y.abs().max()


pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:fan_in_fan_out is set to False")
IDS = torch.tensor([[5, 9, 2, 40, 41, 3, 63, 0], [1, 1, 62, 17, 9, 30, 2, 8]])
RANKS = {r"h\.0\..*": 2, "mlp.c_fc": 7, "c_fc": 3}
CASES = {
    "gpt2 c_attn": (hf_gpt2, ("c_attn",), {}),
    "gpt2 ranks": (hf_gpt2, "all-linear", dict(ranks=RANKS)),
    "gpt2 rslora": (hf_gpt2, ("attn.c_proj", "mlp.c_fc"), dict(rslora=True, ranks={"c_fc": 9})),
    "gpt2 above the size": (hf_gpt2, ("c_attn", "c_proj"), dict(r=40)),
    "gpt2 embeddings": (lambda: hf_gpt2(tied=False), ("wte", "wpe", "c_attn"), dict(ranks={"wte": 5})),
    "gpt2 regex": (hf_gpt2, r".*\.1\..*(c_attn|c_fc)", {}),
    "llama q v": (hf_llama, ("q_proj", "v_proj"), {}),
    "llama all": (hf_llama, "all-linear", dict(rslora=True, ranks={r"layers\.1\..*_proj": 2})),
    "llama ends": (hf_llama, ("embed_tokens", "lm_head"), {}),
    "gemma embeddings": (hf_gemma, ("embed_tokens", "q_proj"), {}),
}


def mostly_thorough(names, default):
    """All the cases, but only these in the default run."""
    return [name if name in default else pytest.param(name, marks=pytest.mark.thorough) for name in names]


def their_layers(model):
    return {n.removeprefix("base_model.model."): m for n, m in model.named_modules() if hasattr(m, "base_layer")}


# -------------------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    "case", mostly_thorough(CASES, ("gpt2 ranks", "gpt2 embeddings", "llama all", "gemma embeddings"))
)
def test_whole_models_compute_what_pefts_do(case):
    """Logits, the gradients of A, B and the input, and the logits after a merge are peft's, in fp64 to 1e-12."""
    torch.manual_seed(0)
    base, targets, options = CASES[case]
    theirs, ours = pair(base().double(), targets, **options)
    assert_noticeable(ours, IDS)
    found, expected = lora.lora_parameters(ours), tensors(theirs)
    assert found.keys() == expected.keys()
    weights = torch.randn(2, 8, 64, dtype=torch.float64)  # of the logits in the sum, so that no gradient cancels
    results = []
    for model in (ours, theirs):
        embeds = model.get_input_embeddings()(IDS).detach().requires_grad_()
        by_ids, by_embeds = model(input_ids=IDS).logits, model(inputs_embeds=embeds).logits
        ((by_ids + by_embeds) * weights).sum().backward()
        results.append([by_ids, by_embeds, embeds.grad])
    gradients = [(p.grad, expected[n].grad) for n, p in found.items()]
    assert all(g.abs().max() > 0 for g, _ in gradients)
    # fp64 leaves some thousand roundings of 1.1e-16, which cancellation in the gradients may raise tenfold
    for one, other in (*zip(*results, strict=True), *gradients):
        assert_close(one, other, 1e-12)
    theirs.merge_adapter()
    merged = lora.merge_lora(ours)(IDS).logits
    assert_close(merged, theirs(IDS).logits, 1e-12)
    assert_close(merged, results[0][0], 1e-12)


@pytest.mark.parametrize("case", mostly_thorough(CASES, ("gpt2 rslora", "gpt2 above the size", "llama ends")))
def test_layers_compute_what_pefts_do_in_fp32(case):
    """Each layer's output, gradients (A, B, x) and merged weight equal peft's to 1e-6 of the largest value."""
    torch.manual_seed(0)
    base, targets, options = CASES[case]
    theirs, ours = pair(base(), targets, **options)
    layers = [list(lora.lora_layers(ours).items()), list(their_layers(theirs).items())]
    results = []
    for model, named in zip((ours, theirs), layers, strict=True):
        found = []
        for i, (_, layer) in enumerate(named):
            torch.manual_seed(i)
            n = getattr(layer.base_layer, "nx", None) or getattr(layer.base_layer, "in_features", 0)
            x = torch.randn(2, 5, n, requires_grad=True) if n else torch.randint(len(layer.weight), (2, 5))
            y = layer(x)
            assert n == 0 or (y - layer.base_layer(x)).abs().max() >= 0.1 * y.abs().max()
            inputs = [p for p in (x, *layer.parameters()) if p.requires_grad]
            found += [y, *torch.autograd.grad(y, inputs, torch.randn_like(y))]
        lora.merge_lora(model) if model is ours else model.merge_adapter()
        results.append(found + [layer.weight for _, layer in named])
    assert [name for name, _ in layers[0]] == [name for name, _ in layers[1]]
    # sums of at most 200 products in another order: some ten roundings of 6e-8 each
    for one, other in zip(*results, strict=True):
        assert_close(one, other, 1e-6)


@pytest.mark.parametrize("base, targets", [(hf_gpt2, ("c_attn", "c_proj")), (hf_llama, "all-linear")])
def test_dropout_is_pefts(base, targets):
    """From the same seed, dropout takes the same elements as peft's, and the outputs in training are the same."""
    torch.manual_seed(0)
    theirs, ours = pair(base().double(), targets, dropout=0.3)
    logits = {}
    for name, model in (("ours", ours), ("theirs", theirs)):
        model.train()
        torch.manual_seed(1)
        logits[name] = model(IDS).logits
    assert_close(logits["ours"], logits["theirs"], 1e-12)  # as above
    assert (logits["ours"] - ours.eval()(IDS).logits).abs().max() > 0.01 * logits["ours"].abs().max()


def test_initial_factors_have_pefts_distribution():
    """Both inits, and that of embeddings, have peft's deviation and range, also at a rank above the layer's size."""
    torch.manual_seed(0)
    for init, theirs_init in (("kaiming", True), ("gaussian", "gaussian")):
        for r in (8, 40):
            options = dict(r=r, target_modules=["c_attn", "wpe"], init_lora_weights=theirs_init, fan_in_fan_out=True)
            theirs = tensors(peft.get_peft_model(hf_gpt2(), peft.LoraConfig(**options)))
            ours = lora.lora_parameters(lora.add_lora(hf_gpt2(), ("c_attn", "wpe"), r=r, init=init))
            assert ours.keys() == theirs.keys()
            for name, p in ours.items():
                one, other = p.detach(), theirs[name].detach()
                if other.count_nonzero() == 0:
                    assert one.count_nonzero() == 0, name
                else:
                    # deviations of n draws differ by √2 standard errors of 1/√(2n); 5 of them
                    assert one.std().item() == pytest.approx(other.std().item(), rel=5 / one.numel() ** 0.5), name
                    assert one.abs().max().item() == pytest.approx(other.abs().max().item(), rel=0.5), name


# ---------------------------------------------------------------------------------------------------------------- names


def tiny(name, **more):
    """A small random model of one of transformers' architectures."""
    sizes = dict(vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    config = transformers.AutoConfig.for_model(name, **(sizes | more))
    return transformers.AutoModelForCausalLM.from_config(config)


ARCHITECTURES = {
    "gpt2": hf_gpt2, "llama": hf_llama, "llama tied": lambda: hf_llama(tied=True), "gpt_neox": lambda: tiny("gpt_neox"),
    "opt": lambda: tiny("opt", ffn_dim=24, word_embed_proj_dim=8, max_position_embeddings=32),
    "qwen2": lambda: tiny("qwen2", num_key_value_heads=1), "phi": lambda: tiny("phi"),
}  # fmt: skip


@pytest.mark.parametrize("name", mostly_thorough(ARCHITECTURES, ("gpt2", "llama tied", "opt")))
def test_all_linear_picks_pefts_layers(name):
    """all-linear wraps the same layers as peft's, in one architecture after another, and has nothing to warn of."""
    torch.manual_seed(0)
    model = ARCHITECTURES[name]()
    config = peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(copy.deepcopy(model), config)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = lora.add_lora(model)
    assert lora.lora_layers(ours).keys() == their_layers(theirs).keys()
    assert len(lora.lora_layers(ours)) >= 8


def test_all_linear_warns_of_the_experts_of_a_mixture():
    """Mixtral keeps its experts in tensors of three dimensions: all-linear wraps the attention and names the others."""
    torch.manual_seed(0)
    model = tiny("mixtral", num_key_value_heads=1, num_local_experts=2)
    with pytest.warns(UserWarning, match=r"passes over .*layers\.\*\.mlp\.experts\.down_proj, .*experts\.gate_up_proj"):
        lora.add_lora(model)
    assert {name.split(".")[-1] for name in lora.lora_layers(model)} == {"q_proj", "k_proj", "v_proj", "o_proj"}


@pytest.mark.parametrize(
    "targets",
    [
        *(["c_attn"], ["c_proj"], ["mlp.c_proj", "h.0.attn.c_attn"], ["transformer.h.1.mlp.c_fc"], ["attn"], ["fc"]),
        *("c_attn", r".*c_attn", r".*(c_attn|c_fc)", r"transformer\.h\.1\..*c_proj", r"h\.1\..*", r"^.*wpe$"),
    ],
)
def test_targets_mean_what_they_mean_to_peft(targets):
    """A list or a string of targets names the layers that it names as peft's target_modules, or is refused as there."""
    try:
        theirs = set(their_layers(peft.get_peft_model(hf_gpt2(), peft.LoraConfig(target_modules=targets))))
    except ValueError:
        theirs = None
    try:
        ours = set(lora.lora_layers(lora.add_lora(hf_gpt2(), targets)))
    except lora.Error:
        ours = None
    assert ours == theirs


@pytest.mark.parametrize(
    "ranks",
    [
        RANKS,
        {"c_attn": 3, r".*": 5},
        {r"transformer\.h\.0\.mlp\.c_fc": 3},
        {r"mlp.c_(fc|proj)": 6, "c_proj": 2},
        {r"h.1.*": 9},
    ],
)
def test_ranks_mean_what_they_mean_to_peft(ranks):
    """The ranks of single layers are those of peft's rank_pattern: the first key that matches counts."""
    theirs = peft.get_peft_model(hf_gpt2(), peft.LoraConfig(target_modules="all-linear", r=4, rank_pattern=ranks))
    ours = lora.add_lora(hf_gpt2(), r=4, ranks=ranks)
    assert {n: p.shape for n, p in lora.lora_parameters(ours).items()} == {
        n: p.shape for n, p in tensors(theirs).items()
    }
    assert {layer.scaling for layer in lora.lora_layers(ours).values()} != {4.0}


# ---------------------------------------------------------------------------------------------------------------- files


def write(model, folder):
    """The two files of an adapter."""
    folder.mkdir()
    save_file(lora.lora_state_dict(model), folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(lora.lora_config(model)))


def read(model, folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    lora.add_lora(
        model, config["target_modules"], r=config["r"], alpha=config["lora_alpha"], dropout=config["lora_dropout"],
        ranks=config["rank_pattern"], rslora=config["use_rslora"],
    )  # fmt: skip
    lora.load_lora_state_dict(model, load_file(folder / "adapter_model.safetensors"))
    return model


FILES = {
    "list": (("c_attn", "mlp.c_proj"), {}),
    "all-linear": ("all-linear", dict(rslora=True)),
    "regex": (r".*\.h\.\d\.mlp\.c_.*", dict(dropout=0.1)),
    "ranks": ("all-linear", dict(ranks={r"h\.0\..*": 2, "mlp.c_fc": 7})),
    "embeddings": (("wte", "wpe", "c_attn"), dict(ranks={"wte": 5}, rslora=True)),
    "tied head": (("lm_head", "wte", "c_attn"), {}),
}


@pytest.fixture
def base(tmp_path):
    """A GPT of ours, and its folder, in which GPT2LMHeadModel finds the same weights."""
    torch.manual_seed(0)
    model = gpt.GPT(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=4)
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)
    save_gpt(model, tmp_path / "base")
    return model, tmp_path / "base"


@pytest.mark.parametrize("case", mostly_thorough(FILES, ("regex", "ranks", "embeddings")))
def test_an_adapter_of_ours_opens_in_peft(case, base, tmp_path):
    """An adapter trained on our GPT opens on GPT2LMHeadModel with peft: the same logits, and not one warning."""
    model, folder = base
    targets, options = FILES[case]
    lora.add_lora(model, targets, r=4, **options).eval()
    for p in lora.lora_parameters(model).values():
        nn.init.normal_(p, std=0.3)
    assert_noticeable(model, IDS)
    write(model, tmp_path / "adapter")
    hf = transformers.GPT2LMHeadModel.from_pretrained(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", FutureWarning)  # between peft and transformers
        if case == "tied head":  # peft warns of any adapter on a tied layer, and of a linear layer beside a Conv1D
            warnings.filterwarnings("ignore", "(?s).*(tie|fan_in_fan_out is set to True)")
        opened = peft.PeftModel.from_pretrained(hf, tmp_path / "adapter")
    # two implementations of the model in fp32: a hundred roundings of 6e-8
    assert_close(model(IDS).logits, opened(IDS).logits, 1e-5)


@pytest.mark.parametrize("case", mostly_thorough(FILES, ("list", "ranks", "embeddings", "tied head")))
def test_an_adapter_of_pefts_opens_here(case, base, tmp_path):
    """An adapter that peft saved on GPT2LMHeadModel opens here, on our GPT and on that model, with the same logits."""
    model, folder = base
    targets, options = FILES[case]
    theirs, _ = pair(transformers.GPT2LMHeadModel.from_pretrained(folder), targets, **options)
    theirs.save_pretrained(tmp_path / "adapter")
    expected = theirs(IDS).logits
    hf = transformers.GPT2LMHeadModel.from_pretrained(folder)
    for ours in (read(model.eval(), tmp_path / "adapter"), read(hf, tmp_path / "adapter")):
        assert_noticeable(ours, IDS)
        assert_close(ours(IDS).logits, expected, 1e-5)  # as above


def test_pefts_copy_of_an_embedding_table_is_no_obstacle(tmp_path):
    """Beside LoRA on embed_tokens peft saves the frozen table itself; here it is passed over."""
    torch.manual_seed(0)
    model = hf_llama()
    theirs, _ = pair(model, ("embed_tokens", "q_proj"))
    theirs.save_pretrained(tmp_path / "adapter")
    assert any("base_layer" in key for key in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    ours = read(model.eval(), tmp_path / "adapter")
    assert_noticeable(ours, IDS)
    assert_close(ours(IDS).logits, theirs(IDS).logits, 1e-6)  # two layers in fp32, the same operations


def test_a_merged_gpt_is_a_gpt2_checkpoint(base, tmp_path):
    """Merged, removed and saved, our GPT is a GPT-2 checkpoint: GPT2LMHeadModel gives base and adapter's logits."""
    model, _ = base
    lora.add_lora(model)
    for p in lora.lora_parameters(model).values():
        nn.init.normal_(p, std=0.3)
    assert_noticeable(model, IDS)
    expected = model(IDS).logits
    save_gpt(lora.remove_lora(lora.merge_lora(model)), tmp_path / "merged")
    hf = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "merged")
    assert_close(hf(IDS).logits, expected, 1e-5)  # as above


# ------------------------------------------------------------------------------------------------------------- wrappers


def checkpoint_blocks(model):
    for i, block in enumerate(model.transformer.h):
        model.transformer.h[i] = checkpoint_wrapper(block)
    return model


def compile_blocks(model):
    for i, block in enumerate(model.transformer.h):
        model.transformer.h[i] = torch.compile(block, backend="eager")
    return model


WRAPS = {
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "compiled blocks": compile_blocks,
    "checkpointed blocks": checkpoint_blocks,
    "DataParallel": nn.DataParallel,
    "DDP": nn.parallel.DistributedDataParallel,
    "FSDP": lambda model: FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu")),
    "all of them": lambda model: torch.compile(
        nn.DataParallel(nn.parallel.DistributedDataParallel(compile_blocks(checkpoint_blocks(model)))), backend="eager"
    ),
}


@pytest.fixture
def one_rank(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def in_peft(base, folder):
    """What peft makes of a saved adapter on the bare model; a warning, as that of missing keys, is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", FutureWarning)  # between peft and transformers
        return peft.PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()


@pytest.mark.parametrize("wrap", mostly_thorough(WRAPS, ("compiled", "checkpointed blocks", "DDP")))
def test_a_wrapped_model_has_the_names_of_the_bare_one(wrap, one_rank, tmp_path):
    """Compiled, checkpointed or in data parallel, a model saves a file that peft opens, and loads one of peft's."""
    torch.manual_seed(0)
    base = hf_gpt2().eval()
    theirs, ours = pair(base, ("c_attn", "mlp.c_proj"), ranks={"h.0.mlp.c_proj": 2})
    wrapped = WRAPS[wrap](ours)
    write(wrapped, tmp_path / "ours")
    opened = in_peft(base, tmp_path / "ours")
    expected = theirs(IDS).logits
    assert torch.equal(opened(IDS).logits, expected)
    assert_close(wrapped(IDS).logits, expected, 1e-5)  # fp32, fused or not
    assert lora.lora_state_dict(wrapped).keys() == tensors(theirs).keys()
    assert lora.lora_layers(wrapped).keys() == their_layers(theirs).keys()
    for p in lora.lora_parameters(wrapped).values():
        nn.init.zeros_(p.data)
    lora.load_lora_state_dict(wrapped, {name: p.detach() for name, p in tensors(theirs).items()})
    assert_close(wrapped(IDS).logits, expected, 1e-5)


@pytest.mark.parametrize("wrap", mostly_thorough(["compiled", "compiled blocks", "checkpointed blocks"], ["compiled"]))
def test_lora_goes_onto_a_wrapped_model(wrap):
    """Targets and ranks mean the bare model's names where it is wrapped already; merged and removed, so it stays."""
    torch.manual_seed(0)
    base, regex = hf_gpt2().eval(), r"transformer\.h\.\d\.(attn\.c_attn|mlp\.c_proj)"
    theirs, _ = pair(base, regex, ranks={r"transformer\.h\.0\.mlp\.c_proj": 2})
    model = WRAPS[wrap](copy.deepcopy(base))
    before = model(IDS).logits
    lora.add_lora(model, regex, r=4, alpha=8, ranks={r"transformer\.h\.0\.mlp\.c_proj": 2})
    lora.load_lora_state_dict(model, {name: p.detach() for name, p in tensors(theirs).items()})
    expected = theirs(IDS).logits
    assert (expected - before).abs().max() > 0.1 * expected.abs().max()
    assert_close(model(IDS).logits, expected, 1e-5)
    assert lora.lora_config(model)["fan_in_fan_out"]
    with lora.lora_disabled(model):
        assert_close(model(IDS).logits, before, 1e-6)
    assert_close(lora.merge_lora(model)(IDS).logits, expected, 1e-5)
    lora.remove_lora(model)
    assert_close(model(IDS).logits, expected, 1e-5)
    assert not lora.lora_layers(model)


def test_data_parallelism_comes_after():
    """DDP and DataParallel know the parameters that they began with: LoRA on a model inside of them is refused."""
    with pytest.raises(lora.Error, match="add LoRA to the plain model, then wrap it"):
        lora.add_lora(nn.DataParallel(hf_gpt2()), ("c_attn",))


def test_a_module_that_is_named_module_is_no_wrapper(tmp_path):
    """A child that the user has named `module` keeps its name, in our file as in peft's."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))

        def forward(self, x):
            return self.module(x)

    torch.manual_seed(0)
    base, x = Net(), torch.randn(3, 8)
    for wrap in (lambda model: model, nn.DataParallel):
        ours = wrap(lora.add_lora(copy.deepcopy(base), ("module.2",), r=2))
        for p in lora.lora_parameters(ours).values():
            nn.init.normal_(p)
        assert list(lora.lora_layers(ours)) == ["module.2"]
        folder = tmp_path / type(ours).__name__
        write(ours, folder)
        assert_close(in_peft(base, folder)(x), ours(x), 1e-6)
        assert not torch.allclose(ours(x), base(x))


# ------------------------------------------------------------------------------------------- tasks and modules_to_save

SMALL = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0
)
T5 = dict(d_model=32, d_ff=48, num_layers=1, num_heads=2, d_kv=16, vocab_size=64, decoder_start_token_id=0)
BART = dict(
    vocab_size=64, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, pad_token_id=0,
    decoder_attention_heads=2, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=32, eos_token_id=2,
)  # fmt: skip
GPT2 = dict(vocab_size=64, n_positions=32, n_embd=32, n_layer=1, n_head=2, pad_token_id=0, num_labels=3)
VIT = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
VIT |= dict(image_size=16, patch_size=8)
WHISPER = dict(
    d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
    num_mel_bins=8, encoder_ffn_dim=48, decoder_ffn_dim=48, vocab_size=64, max_source_positions=8,
    max_target_positions=32,
    pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
)  # fmt: skip
WAV = dict(
    SMALL, conv_dim=(8, 8), conv_stride=(4, 4), conv_kernel=(8, 8), num_feat_extract_layers=2, classifier_proj_size=16,
    num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
)  # fmt: skip
TOKENS = {"input_ids": torch.tensor([[5, 9, 2, 40], [1, 17, 62, 2]])}
BOTH = TOKENS | {"decoder_input_ids": torch.tensor([[0, 3, 4], [0, 9, 2]])}
SOUND = {"input_features": torch.linspace(-1, 1, 2 * 8 * 16).reshape(2, 8, 16)} | {
    "decoder_input_ids": BOTH["decoder_input_ids"]
}
WAVE = {"input_values": torch.linspace(-1, 1, 2 * 400).reshape(2, 400).sin()}
IMAGE = {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 256).reshape(2, 3, 16, 16)}
# {class: (its sizes, targets, inputs, peft's task_type, its head)}
TASKS = {
    "GPT2LMHeadModel": (GPT2, ("c_attn",), TOKENS, "CAUSAL_LM", None),
    "LlamaForCausalLM": (SMALL, ("q_proj",), TOKENS, "CAUSAL_LM", None),
    "BartForCausalLM": (BART, ("q_proj",), TOKENS, "CAUSAL_LM", None),
    "T5ForConditionalGeneration": (T5, ("q", "wo"), BOTH, "SEQ_2_SEQ_LM", None),
    "WhisperForConditionalGeneration": (WHISPER, ("q_proj",), SOUND, None, None),
    "GPT2ForSequenceClassification": (GPT2, ("c_attn",), TOKENS, "SEQ_CLS", ["score"]),
    "LlamaForSequenceClassification": (SMALL, ("q_proj",), TOKENS, "SEQ_CLS", ["score"]),
    "BertForSequenceClassification": (SMALL, ("query",), TOKENS, "SEQ_CLS", ["classifier"]),
    "RobertaForSequenceClassification": (SMALL, ("query",), TOKENS, "SEQ_CLS", ["classifier"]),
    "DistilBertForSequenceClassification": (
        dict(vocab_size=64, dim=32, hidden_dim=48, n_layers=1, n_heads=2), ("q_lin",), TOKENS, "SEQ_CLS",
        ["pre_classifier", "classifier"],
    ),
    "BartForSequenceClassification": (BART, ("q_proj",), TOKENS, "SEQ_CLS", None),
    "BertForTokenClassification": (SMALL, "all-linear", TOKENS, "TOKEN_CLS", ["classifier"]),
    "BertForQuestionAnswering": (SMALL, "all-linear", TOKENS, "QUESTION_ANS", ["qa_outputs"]),
    "T5ForQuestionAnswering": (T5, ("q",), BOTH, "QUESTION_ANS", ["qa_outputs"]),
    "BertModel": (SMALL, ("query",), TOKENS, None, None),
    "BertForMaskedLM": (SMALL, ("query",), TOKENS, None, None),
    "ViTForImageClassification": (VIT, "all-linear", IMAGE, None, ["classifier"]),
    "ViTModel": (VIT, "all-linear", IMAGE, None, None),
    "Wav2Vec2ForSequenceClassification": (WAV, ("q_proj",), WAVE, None, ["classifier"]),
}  # fmt: skip


def a_model(name):
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    model = cls(cls.config_class(**TASKS[name][0])).eval()
    for p in model.parameters():
        if p.dim() > 1:  # wide enough that attention is far from even
            nn.init.normal_(p, std=0.2)
    return model


def outputs(model, inputs):
    """All floating-point tensors that a model returns, one after the other."""
    with torch.no_grad():
        found = model(**inputs)
    return torch.cat([t.flatten() for t in found.values() if torch.is_tensor(t) and t.is_floating_point()])


def randomize(model):
    for p in lora.lora_parameters(model).values():
        nn.init.normal_(p, std=0.3)
    return model


@pytest.mark.filterwarnings("ignore:all-linear passes over")
@pytest.mark.parametrize(
    "name",
    mostly_thorough(
        TASKS,
        ("GPT2ForSequenceClassification", "BertForTokenClassification", "T5ForQuestionAnswering", "BertModel",
         "T5ForConditionalGeneration", "ViTForImageClassification", "WhisperForConditionalGeneration"),
    ),
)  # fmt: skip
def test_each_kind_of_model_opens_in_peft(name, tmp_path):
    """A model of any task opens in peft with equal outputs, its new head trained and stored."""
    _, targets, inputs, _, head = TASKS[name]
    base = a_model(name)
    model = randomize(lora.add_lora(copy.deepcopy(base), targets, r=2))
    config = lora.lora_config(model)
    assert config["task_type"] is None and config["modules_to_save"] == head
    assert {p for p in model.parameters() if p.requires_grad} == set(lora.lora_parameters(model).values())
    expected = outputs(model, inputs)
    assert (expected - outputs(base, inputs)).abs().max() > 0.01 * expected.abs().max()
    write(model, tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()
    assert_close(outputs(theirs, inputs), expected, 1e-5)  # two layers in fp32, another order of additions
    for key, t in peft.get_peft_model_state_dict(theirs).items():
        assert torch.equal(t, lora.lora_state_dict(model)[key])


@pytest.mark.parametrize(
    "name",
    mostly_thorough(
        [n for n in TASKS if TASKS[n][3] in ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS") and n[:4] != "Bart"],
        ("GPT2ForSequenceClassification", "BertForQuestionAnswering"),
    ),
)
def test_a_classifier_of_pefts_opens_here(name, tmp_path):
    """peft's classifier, by its task alone, trains the same tensors; its folder opens here, and merges to the same."""
    _, targets, inputs, task, _ = TASKS[name]
    base = a_model(name)
    targets = ("query",) if targets == "all-linear" else targets  # in which peft takes the head of these two as well
    config = peft.LoraConfig(task_type=task, target_modules=list(targets), r=2)
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    trained = {n: p for n, p in theirs.named_parameters() if p.requires_grad}
    for p in trained.values():
        nn.init.normal_(p, std=0.3)
    theirs.save_pretrained(tmp_path)
    arguments = peft_config.lora_arguments(checkpoint.read_adapter(tmp_path)[0])
    ours = lora.add_lora(copy.deepcopy(base), **arguments)
    lora.load_lora_state_dict(ours, load_file(tmp_path / "adapter_model.safetensors"))
    assert len(lora.lora_parameters(ours)) == len(trained)
    expected = outputs(theirs, inputs)
    assert_close(outputs(ours, inputs), expected, 1e-5)  # as above
    by_default = lora.add_lora(copy.deepcopy(base), targets, r=2)
    assert lora.lora_parameters(by_default).keys() == lora.lora_parameters(ours).keys()
    merged = lora.remove_lora(lora.merge_lora(ours))
    assert merged.state_dict().keys() == base.state_dict().keys()
    assert_close(outputs(merged, inputs), outputs(theirs.merge_and_unload(), inputs), 1e-5)
    assert_close(outputs(merged, inputs), expected, 1e-5)


def test_a_head_learns_and_keeps_what_it_learned(tmp_path):
    """A classifier that was trained to separate its data separates them after reloading too."""
    torch.manual_seed(0)
    base = a_model("GPT2ForSequenceClassification").train()
    model = lora.add_lora(copy.deepcopy(base), ("c_attn",), r=4)
    ids = torch.randint(1, 64, (24, 6))
    labels = ids[:, -1] % 3
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    for _ in range(40):
        optimizer.zero_grad()
        model(ids, labels=labels).loss.backward()
        optimizer.step()
    accuracy = lambda m: (m.eval()(ids).logits.argmax(-1) == labels).float().mean()  # noqa: E731
    assert accuracy(model) > 0.9
    write(model, tmp_path / "ours")
    again = lora.add_lora(copy.deepcopy(base), ("c_attn",), r=4)
    lora.load_lora_state_dict(again, load_file(tmp_path / "ours" / "adapter_model.safetensors"))
    assert torch.equal(again.eval()(ids).logits, model(ids).logits)


def test_a_named_embedding_and_head_are_trained_in_full():
    """modules_to_save with an untied table and head: the logits of peft, merged too. Tied ones are refused."""
    torch.manual_seed(0)
    base, saved = hf_llama(False).eval(), ["embed_tokens", "lm_head"]
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], modules_to_save=saved, r=2)
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    for p in theirs.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.3)
    ours = lora.add_lora(copy.deepcopy(base), ("q_proj",), r=2, alpha=8, modules_to_save=saved)
    state = peft.get_peft_model_state_dict(theirs)
    lora.load_lora_state_dict(ours, state)
    assert lora.lora_state_dict(ours).keys() == state.keys() and len(state) == 2 * 2 + 2
    assert_close(ours(IDS).logits, theirs(IDS).logits, 1e-6)  # two layers in fp32, the same operations
    merged = lora.remove_lora(lora.merge_lora(ours))
    assert_close(merged(IDS).logits, theirs.merge_and_unload()(IDS).logits, 1e-5)  # fp32, W rounded once more
    with pytest.raises(lora.Error, match="modules with weights of their own"):
        lora.add_lora(hf_llama(True), ("q_proj",), modules_to_save=saved)


# --------------------------------------------------------------------------------------------- layers that do not fit


def mixers(name, **sizes):
    return tiny(name, num_hidden_layers=1, **sizes)


MAMBAS = {
    "mamba": dict(state_size=4, time_step_rank=2),
    "falcon_mamba": dict(state_size=4, time_step_rank=2),
    "jamba": dict(
        num_key_value_heads=1, attn_layer_offset=1, attn_layer_period=2, mamba_d_state=4, mamba_dt_rank=2,
        use_mamba_kernels=False, pad_token_id=0, num_experts=1, num_experts_per_tok=1,
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:all-linear passes over")
@pytest.mark.parametrize("add", [lora.add_lora, qlora.add_qlora])
@pytest.mark.parametrize("name", mostly_thorough(MAMBAS, ("mamba", "jamba")))
def test_layers_whose_weight_is_only_read(name, add):
    """dt_proj of the Mambas is read and never called: LoRA and QLoRA count and learn there as in the merged model."""
    torch.manual_seed(0)
    model = add(mixers(name, **MAMBAS[name]), ("dt_proj", "in_proj", "x_proj", "out_proj"), r=2)
    for p in lora.lora_parameters(model).values():
        nn.init.normal_(p, std=0.3)
    y = model(IDS, use_cache=False).logits
    with lora.lora_disabled(model):
        assert (model(IDS, use_cache=False).logits - y).abs().max() > 0.1 * y.abs().max()
    model(IDS, labels=IDS, use_cache=False).loss.backward()
    assert all(p.grad.abs().max() > 0 for p in lora.lora_parameters(model).values())
    merge = qlora.merge_qlora if add is qlora.add_qlora else lora.merge_lora
    assert_close(merge(model)(IDS, use_cache=False).logits, y, 1e-4)  # fp32, through a recurrence of 8 steps


def test_other_layers_that_are_only_read():
    """The decoder of MobileBERT, read by hand, and the projections of WavLM, read by torch, merge to the same."""
    torch.manual_seed(0)
    wavlm = transformers.WavLMModel(transformers.WavLMConfig(**WAV)).eval()
    mobile = transformers.MobileBertForMaskedLM(
        transformers.MobileBertConfig(vocab_size=64, hidden_size=32, intra_bottleneck_size=16, embedding_size=16,
                                      num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    ).eval()  # fmt: skip
    mobile.cls.predictions.decoder.weight = nn.Parameter(mobile.cls.predictions.decoder.weight.clone())  # untied
    for model, targets, inputs in (
        (wavlm, ("q_proj", "out_proj"), WAVE), (mobile, ("cls.predictions.decoder",), TOKENS),
    ):  # fmt: skip
        plain = outputs(model, inputs)
        randomize(lora.add_lora(model, targets, r=2))
        y = outputs(model, inputs)
        assert (y - plain).abs().max() > 0.01 * y.abs().max()
        assert_close(outputs(lora.merge_lora(model), inputs), y, 1e-5)  # fp32, a few layers


POSITIONS = {
    "opt": (lambda: tiny("opt", ffn_dim=24, word_embed_proj_dim=16, max_position_embeddings=32), "embed_positions"),
    "bart": (lambda: a_model("BartForSequenceClassification"), "embed_positions"),
    "whisper": (lambda: a_model("WhisperForConditionalGeneration"), "decoder.embed_positions"),
}


@pytest.mark.parametrize("name", POSITIONS)
def test_an_embedding_that_is_no_lookup_is_refused(name):
    """Position tables that count their inputs themselves are refused; they would be read at the wrong places."""
    make, target = POSITIONS[name]
    with pytest.raises(lora.Error, match=r"embed_positions is a \w+, whose forward is not nn.Embedding's"):
        lora.add_lora(make(), (target,))


# --------------------------------------------------------------------------------------------------------- other layers


def test_bitsandbytes_layers_are_trained_but_not_merged():
    """Over Linear4bit the output is that of W dequantized plus the update; it trains, and a merge is refused."""
    bnb = pytest.importorskip("bitsandbytes")
    for storage in (torch.uint8, torch.bfloat16):
        torch.manual_seed(0)
        layer = bnb.nn.Linear4bit(64, 128, quant_type="nf4", quant_storage=storage)
        weight = torch.randn(128, 64) * 0.1
        layer.weight = bnb.nn.Params4bit(weight, quant_type="nf4", quant_storage=storage, module=layer)
        model = lora.add_lora(nn.Sequential(layer).to("cpu"), r=4)
        for p in lora.lora_parameters(model).values():
            nn.init.normal_(p, std=0.3)
        x = torch.randn(2, 5, 64, requires_grad=True)
        W = bnb.functional.dequantize_4bit(layer.weight, layer.weight.quant_state).float()
        update = 4 * model[0].lora_B.detach() @ model[0].lora_A.detach()
        expected = F.linear(x, W + update, layer.bias).detach()
        y = model(x)
        assert (F.linear(x, update)).abs().max() >= 0.1 * y.abs().max()
        assert_close(y.detach(), expected, 1e-5)  # fp32 sums of 64 terms of mixed sign
        y.sum().backward()
        assert all(p.grad.abs().max() > 0 for p in (x, model[0].lora_A, model[0].lora_B))
        with pytest.raises(lora.Error, match="quantized weight"):
            lora.merge_lora(model)
        assert_close(model(x).detach(), expected, 1e-5)


def test_a_tied_head_is_not_merged_where_peft_goes_wrong():
    """On GPT-2's tied table a merge changes both ends, and peft's output with it; here the merge is refused."""
    torch.manual_seed(0)
    theirs, ours = pair(hf_gpt2(), ("wte",))
    before = theirs(IDS).logits
    theirs.merge_adapter()
    assert (theirs(IDS).logits - before).abs().max() > 0.1 * before.abs().max()
    with pytest.raises(lora.Error, match="transformer.wte shares its weight"):
        lora.merge_lora(ours)


def test_gradient_checkpointing_of_transformers():
    """With transformers' own gradient checkpointing the gradients are those without it."""
    torch.manual_seed(0)
    _, ours = pair(hf_llama(), "all-linear")
    inputs = list(lora.lora_parameters(ours).values())
    ours.train()
    plain = torch.autograd.grad(ours(IDS, labels=IDS).loss, inputs)
    ours.gradient_checkpointing_enable({"use_reentrant": False})
    assert ours.is_gradient_checkpointing
    for one, other in zip(torch.autograd.grad(ours(IDS, labels=IDS).loss, inputs), plain, strict=True):
        assert torch.equal(one, other)


def test_the_file_alone_works_on_transformers_models(tmp_path, monkeypatch):
    """Pasted into an empty folder, without nanopeft, lora.py wraps, trains and merges transformers' GPT-2."""
    shutil.copy(lora.__file__, tmp_path / "lora.py")
    monkeypatch.setitem(sys.modules, "nanopeft", None)
    pasted = types.SimpleNamespace(**runpy.run_path(str(tmp_path / "lora.py")))
    torch.manual_seed(0)
    model, ids = pasted.add_lora(hf_gpt2().eval(), ("c_attn",), r=2), torch.arange(8)[None]
    before = model(ids).logits
    optimizer = torch.optim.SGD(pasted.lora_parameters(model).values(), lr=10)
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    after = model(ids).logits
    assert (after - before).abs().max() > 0.1 * after.abs().max()
    assert_close(pasted.remove_lora(pasted.merge_lora(model))(ids).logits, after, 1e-5)  # as above
