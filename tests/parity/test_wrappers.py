# SPDX-License-Identifier: MIT
"""PromptTuning, PTuning and PrefixTuning in place of transformers' models: generate, Trainer, and what wraps them."""

import copy
import json

import peft
import pytest
import torch
import torch.nn as nn
import transformers
from safetensors.torch import load_file, save_file
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from nanopeft import gpt, prefix, prompt, ptuning

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*model-agnostic default", "ignore:.*cuda")
IDS = torch.tensor([[5, 9, 2, 40, 41, 3, 62, 8], [1, 1, 62, 17, 9, 30, 2, 8]])
PADDED = torch.tensor([[5, 9, 2, 40, 41, 3, 62, 8], [0, 0, 0, 17, 9, 30, 2, 8]])
N, WORDS = 3, [7, 8, 9]
thorough = pytest.mark.thorough


def tiny(name="gpt2", **more):
    """A random model, with weights wide enough that its tokens differ."""
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    places = dict(max_position_embeddings=48, bos_token_id=63, eos_token_id=None, pad_token_id=0)
    if name == "gpt2":
        places |= dict(attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(name, **(sizes | places | more))
    )
    for p in model.parameters():
        if p.dim() > 1:
            nn.init.normal_(p, std=0.3)
    return model.eval()


def p_tuning(model, n=N, init=None):
    model = ptuning.PTuning(model, n, encoder="mlp")
    if init is not None:
        P = model.model.get_input_embeddings().weight[init].detach()
        ptuning.load_ptuning_state_dict(model, {"prompt_embeddings": P})
    return model


WRAPPERS = {"prompt": prompt.PromptTuning, "ptuning": p_tuning, "prefix": prefix.PrefixTuning}
STATES = {
    "prompt": (prompt.prompt_state_dict, prompt.load_prompt_state_dict, prompt.prompt_config),
    "ptuning": (ptuning.ptuning_state_dict, ptuning.load_ptuning_state_dict, ptuning.ptuning_config),
    "prefix": (prefix.prefix_state_dict, prefix.load_prefix_state_dict, prefix.prefix_config),
}
each = pytest.mark.parametrize("kind", WRAPPERS)


def hard(kind, base):
    """The wrapper that starts as the prompt WORDS, so that transformers itself says what is right."""
    return WRAPPERS[kind](base, N, init=WORDS).eval()


# ------------------------------------------------------------------------------------------------------------- generate

LENGTHS = [
    dict(max_length=20), dict(max_new_tokens=3), {}, dict(max_length=20, min_length=15), dict(min_new_tokens=4),
    dict(max_new_tokens=12, min_length=14), dict(max_length=10, max_new_tokens=4),
]  # fmt: skip


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("where", ["argument", "config", "model"])
@each
def test_lengths_are_those_of_the_model(kind, where, lengths):
    """However lengths are given, the text is transformers' own after the same prompt in words, as long as of the model.

    A third of the vocabulary ends a text, so that the least length matters.
    """
    base = tiny()
    ends = dict(eos_token_id=list(range(40, 64)), pad_token_id=0, do_sample=False)
    base.generation_config = transformers.GenerationConfig(**ends, **lengths if where == "model" else {})
    options = lengths if where == "argument" else {}
    if where == "config":
        options = dict(generation_config=transformers.GenerationConfig(**ends, **lengths))
    model, words = hard(kind, base), torch.tensor([WORDS] * 2)
    longest = base.generate(IDS, **options | dict(eos_token_id=-1)).size(1)
    found = model.generate(IDS, **options | dict(eos_token_id=-1))
    assert found.size(1) == longest and torch.equal(found[:, :8], IDS)
    more = {key: length + N for key, length in lengths.items() if key in ("max_length", "min_length")}
    base.generation_config = transformers.GenerationConfig(**ends)
    expected = base.generate(torch.cat((words, IDS), 1), **lengths | more)[:, N:]
    base.generation_config = transformers.GenerationConfig(**ends, **lengths if where == "model" else {})
    assert torch.equal(model.generate(IDS, **options), expected)


@pytest.mark.parametrize(
    "options",
    [
        dict(num_beams=3, num_return_sequences=2, early_stopping=True), dict(use_cache=False),
        dict(prefill_chunk_size=3), dict(prompt_lookup_num_tokens=2), dict(eos_token_id=[40, 41, 42]),
        dict(assistant_model=True),
    ],
    ids=str,
)  # fmt: skip
@each
def test_ways_of_generating_are_those_of_the_model(kind, options):
    """Beams, no cache, chunks of the prompt and guesses by prompt lookup or an assistant change no token."""
    base = tiny("llama", num_key_value_heads=2)
    guesses = "prompt_lookup_num_tokens" in options or "assistant_model" in options
    ids = IDS[:1] if guesses else IDS
    options = options | dict(max_length=20, do_sample=False)
    if "assistant_model" in options:
        options["assistant_model"] = tiny("llama", num_key_value_heads=2, num_hidden_layers=1)
    words = torch.tensor([WORDS] * len(ids))
    expected = base.generate(torch.cat((words, ids), 1), **options | dict(max_length=20 + N))[:, N:]
    assert torch.equal(hard(kind, base).generate(ids, **options), expected)


@pytest.mark.parametrize("mask", [True, False])
@each
def test_padding_is_found_as_by_the_model(kind, mask):
    """Without a mask transformers knows pads by their id, and the text is the same as with it."""
    base, words = tiny(), torch.tensor([WORDS])
    options = dict(max_length=14, do_sample=False)
    given = dict(attention_mask=(PADDED != 0).long()) if mask else {}
    found = hard(kind, base).generate(PADDED, **options, **given)
    for row, start in ((0, 0), (1, 3)):
        alone = torch.cat((words, PADDED[row : row + 1, start:]), 1)
        assert torch.equal(found[row, start:], base.generate(alone, max_length=14 + N - start, do_sample=False)[0, N:])


class Streamer(list):
    def put(self, tokens):
        self.extend(tokens.flatten().tolist())

    def end(self):
        self.append("end")


@each
def test_what_goes_with_generating(kind):
    """A streamer, stopping criteria and a dictionary of outputs see the input's tokens and the new ones alone."""
    model, streamer, seen = hard(kind, tiny()), Streamer(), []

    def stop(ids, scores, **_):
        seen.append(ids.shape[1])
        return torch.full((len(ids),), ids.size(1) == 12)

    criteria = transformers.StoppingCriteriaList([stop])
    options = dict(max_length=20, do_sample=False, return_dict_in_generate=True, output_scores=True)
    out = model.generate(IDS[:1], streamer=streamer, stopping_criteria=criteria, **options)
    assert seen == [9, 10, 11, 12] and len(out.scores) == 4 and streamer == out.sequences[0].tolist() + ["end"]
    drawn = model.generate(IDS, do_sample=True, num_return_sequences=3, max_length=12)
    assert drawn.shape == (6, 12) and torch.equal(drawn[:, :8], IDS.repeat_interleave(3, 0))


@each
def test_penalties_are_pefts(kind):
    """A penalty on repetition counts the input's own tokens, as in peft."""
    base = tiny()
    ours = hard(kind, base)
    if kind == "prefix":
        config = peft.PrefixTuningConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=N, num_layers=2, token_dim=32, num_attention_heads=4
        )
    else:
        config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=N, num_attention_heads=4)
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    P = STATES[kind][0](ours)["prompt_embeddings"]
    theirs.prompt_encoder["default"].embedding.weight.data.copy_(P)
    for options in (dict(max_length=20), dict(max_new_tokens=6, min_new_tokens=2)):
        options |= dict(repetition_penalty=1.5, no_repeat_ngram_size=2, do_sample=False)
        expected = theirs.generate(input_ids=IDS, **options)
        assert torch.equal(ours.generate(IDS, **options), expected)


@each
def test_hooks_of_the_model_run_once_a_step(kind):
    """Hooks that the user put on the model run once for each call of it, and the model is left as it was."""
    base, calls = tiny(), []
    model = hard(kind, base)
    base.register_forward_hook(lambda *_: calls.append(1))
    before = dict(vars(base))
    model.generate(IDS, max_new_tokens=3, do_sample=False)
    assert len(calls) == 3 and vars(base) == before


@each
def test_a_static_cache_is_refused(kind):
    """A static cache is made for the input's tokens alone: one line says so."""
    with pytest.raises((prompt.Error, prefix.Error), match="a static cache has no room.*cache_implementation"):
        hard(kind, tiny()).generate(IDS, max_new_tokens=3, cache_implementation="static")


def test_a_template_s_virtual_tokens_are_not_copied():
    """What reads the input's ids would take virtual tokens for words: refused, or right where they have an own id."""
    base = tiny("llama")
    model = ptuning.PTuning(base, template="[P]{source}[P]").eval()
    ids = torch.tensor([model.apply_template([5, 9], list)])
    assert model.generate(ids, max_length=20).shape == (1, 20)
    for options in (dict(prompt_lookup_num_tokens=3), dict(repetition_penalty=1.5), dict(no_repeat_ngram_size=2)):
        with pytest.raises(prompt.Error, match=f"{[*options][0]} needs ids of the vocabulary.*pseudo_id="):
            model.generate(ids, max_length=20, **options)
    model = ptuning.PTuning(base, template="[P]{source}[P]", pseudo_id=63).eval()
    ids = torch.tensor([model.apply_template([5, 9], list)])
    assert model.generate(ids, max_length=20, repetition_penalty=1.5).shape == (1, 20)
    with pytest.raises(prompt.Error, match="each row must have 2 virtual tokens, not"):  # the last [P] is in front
        model.generate(ids, max_length=20, prompt_lookup_num_tokens=3)


@pytest.mark.parametrize("name, more", [("mamba", {}), ("rwkv", dict(attention_hidden_size=32)), ("falcon_mamba", {})])
def test_models_with_a_recurrent_state(name, more):
    """Where no cache of keys tells whether the prompt was read, each step reads the whole, with the model's tokens."""
    base, words = tiny(name, **more), torch.tensor([WORDS] * 2)
    options = dict(do_sample=False, use_cache=False)
    expected = base.generate(torch.cat((words, IDS), 1), max_length=14 + N, **options)[:, N:]
    for kind in ("prompt", "ptuning"):
        assert torch.equal(hard(kind, base).generate(IDS, max_length=14, do_sample=False), expected)


# -------------------------------------------------------------------------------------------------------------- Trainer


def arguments(folder, **more):
    options = dict(max_steps=4, save_steps=2, learning_rate=0.1, per_device_train_batch_size=2, logging_steps=1)
    options |= dict(use_cpu=True, disable_tqdm=True, report_to=[], output_dir=folder, lr_scheduler_type="constant")
    return transformers.TrainingArguments(**(options | more))


ROWS = [{"input_ids": ids, "labels": ids} for ids in torch.randint(64, (8, 6), generator=torch.manual_seed(1))]


def test_state_dicts_are_whole_and_hold_no_shared_memory():
    """Each tensor of the state dict has memory of its own, and the state makes another model the same, strictly."""
    for kind in WRAPPERS:
        model, other = hard(kind, tiny()), WRAPPERS[kind](tiny(vocab_size=64), N)
        for p in other.parameters():
            nn.init.normal_(p)
        if kind == "ptuning":
            ptuning.fold_ptuning(other)
        state = model.state_dict()
        assert len({t.untyped_storage().data_ptr() for t in state.values()}) == len(state) > 20
        outer = nn.Sequential(model).state_dict(keep_vars=True)
        assert outer.keys() == {f"0.{key}" for key in state} and len({id(t) for t in outer.values()}) == len(state)
        assert other.load_state_dict(state) and torch.equal(other.eval()(IDS).logits, model(IDS).logits)
        clone = copy.deepcopy(model)
        assert torch.equal(clone(IDS).logits, model(IDS).logits)
        assert clone.model.lm_head.weight is clone.model.transformer.wte.weight


@pytest.mark.parametrize("name", ["gpt2", pytest.param("llama", marks=thorough)])
@each
def test_trainer_trains_saves_and_goes_on(kind, name, tmp_path):
    """Trainer trains, evaluates, saves, resumes to the same bits, loads the best and predicts, tied weights or not."""
    runs = {}
    for how in ("whole", "resumed"):
        base = tiny(name)
        torch.manual_seed(2)
        model = WRAPPERS[kind](base, N)
        more = dict(eval_strategy="steps", eval_steps=2)
        trainer = transformers.Trainer(
            model, arguments(tmp_path / how, **more), train_dataset=ROWS, eval_dataset=ROWS[:2]
        )
        if how == "resumed":
            trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
        else:
            trainer.train()
            trainer.save_model(str(tmp_path / "end"))
            assert trainer.predict(ROWS[:2]).predictions.shape == (2, 6, 64)
        runs[how] = model, trainer
    (one, trainer), (two, _) = runs["whole"], runs["resumed"]
    assert [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry][1] > 0
    for (key, p), q in zip(one.named_parameters(), two.parameters(), strict=True):
        assert torch.equal(p, q), key
    saved = load_file(tmp_path / "end" / "model.safetensors")
    state = one.state_dict()
    assert saved.keys() == state.keys() and all(torch.equal(t, saved[key]) for key, t in state.items())
    assert all(torch.equal(p, q) for p, q in zip(tiny(name).parameters(), one.model.parameters(), strict=True))


@each
def test_trainer_loads_the_best(kind, tmp_path):
    """With load_best_model_at_end the model is that of the best checkpoint: here, of the one with the highest loss."""
    model = WRAPPERS[kind](tiny(), N)
    more = dict(eval_strategy="steps", eval_steps=1, save_steps=1, load_best_model_at_end=True)
    more |= dict(metric_for_best_model="eval_loss", greater_is_better=True)
    trainer = transformers.Trainer(model, arguments(tmp_path, **more), train_dataset=ROWS, eval_dataset=ROWS[:2])
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert max(losses) > losses[-1]
    assert trainer.evaluate()["eval_loss"] == max(losses)


@each
def test_trainer_accumulates_as_one_batch(kind, tmp_path):
    """Labels are counted as they are scored: two rows at a time, or one by one and accumulated, train the same."""
    found = []
    ids = IDS[:, :6]
    labels = torch.stack((ids[0], ids[1].masked_fill(torch.arange(6) < 3, -100)))
    rows = [{"input_ids": ids[i], "labels": labels[i]} for i in (0, 1)]
    for size in (2, 1):
        model = hard(kind, tiny("llama"))  # whose loss_type transformers knows; of GPT-2 it counts one label too many
        more = dict(per_device_train_batch_size=size, gradient_accumulation_steps=2 // size, max_steps=1, optim="sgd")
        trainer = transformers.Trainer(model, arguments(tmp_path, save_strategy="no", **more), train_dataset=rows)
        trainer.train()
        found.append((STATES[kind][0](model)["prompt_embeddings"], trainer.state.log_history[0]["loss"]))
    expected = hard(kind, tiny("llama"))(ids, labels=labels).loss.item()  # the mean over the labels of both rows
    for _, loss in found:
        assert loss == pytest.approx(expected, rel=1e-5)
    # fp32 sums in another order
    assert (found[0][0] - found[1][0]).abs().max() <= 1e-5 * found[0][0].abs().max()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", ["prompt", "ptuning"])
def test_trainer_checkpoints_activations(kind, reentrant, tmp_path):
    """With gradient checkpointing of either kind Trainer trains to the same bits as without."""
    found = []
    for more in ({}, dict(gradient_checkpointing=True, gradient_checkpointing_kwargs=dict(use_reentrant=reentrant))):
        base = tiny()
        torch.manual_seed(2)
        model = WRAPPERS[kind](base, N)
        trainer = transformers.Trainer(model, arguments(tmp_path, save_strategy="no", **more), train_dataset=ROWS)
        trainer.train()
        assert getattr(base.transformer.h[0], "gradient_checkpointing", False) == bool(more)
        found.append(STATES[kind][0](model)["prompt_embeddings"])
    assert torch.equal(*found)


def test_a_prefix_refuses_checkpointed_activations(tmp_path):
    """Recomputed layers lose the prefix, or read their own keys twice: Trainer's and torch's kinds are refused."""
    trainer = transformers.Trainer(
        prefix.PrefixTuning(tiny(), N), arguments(tmp_path, gradient_checkpointing=True), train_dataset=ROWS
    )
    with pytest.raises(prefix.Error, match="gradient checkpointing drops past_key_values"):
        trainer.train()
    base = tiny()
    model = prefix.PrefixTuning(base, N)
    base.transformer.h[0] = checkpoint_wrapper(base.transformer.h[0])
    with pytest.raises(prefix.Error, match="gradient checkpointing drops past_key_values"):
        model.train()(IDS, labels=IDS)


def test_a_gpt_of_ours_in_trainer(tmp_path):
    """Trainer trains the wrappers on our GPT too, whose call takes no count of labels."""
    for kind in WRAPPERS:
        base = gpt.GPT(vocab_size=64, n_positions=32, n_embd=32, n_layer=1, n_head=4)
        model = WRAPPERS[kind](base, N)
        trainer = transformers.Trainer(model, arguments(tmp_path / kind), train_dataset=ROWS)
        assert trainer.train().training_loss > 0 and trainer.evaluate(ROWS)["eval_loss"] > 0


# ------------------------------------------------------------------------------------------------------ what wraps them


@pytest.fixture(scope="module")
def process_group(tmp_path_factory):
    """A group of this process alone, which DDP needs."""
    store = tmp_path_factory.mktemp("store") / "file"
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def compiled(module):
    return torch.compile(module, backend="eager")


WRAPS = {
    "DDP": nn.parallel.DistributedDataParallel,
    "DataParallel": nn.DataParallel,
    "compile": compiled,
    "checkpoint": checkpoint_wrapper,
    "compile of DDP of checkpoint": lambda model: compiled(
        nn.parallel.DistributedDataParallel(checkpoint_wrapper(model))
    ),
}


some = pytest.mark.parametrize("wrap", [pytest.param(wrap, marks=[thorough] * ("comp" in wrap)) for wrap in WRAPS])


@some
@each
def test_files_of_wrapped_models(kind, wrap, process_group, tmp_path):
    """Whatever wraps the tuned model, peft opens what is saved, with the same logits, and it loads back."""
    state_dict, load, config = STATES[kind]
    base = tiny()
    outer = WRAPS[wrap](WRAPPERS[kind](copy.deepcopy(base), N)).eval()
    if kind == "ptuning":
        ptuning.fold_ptuning(outer)
    width = state_dict(outer)["prompt_embeddings"].size(1)
    load(outer, {"prompt_embeddings": torch.randn(N, width, generator=torch.manual_seed(5))})
    save_file(state_dict(outer), tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    (tmp_path / "adapter_config.json").write_text(json.dumps(config(outer)))
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    logits = theirs(IDS).logits[:, 0 if kind == "prefix" else N :]
    found = outer(IDS).logits
    assert (found - logits).abs().max() <= 1e-6 * logits.abs().max()  # sums may be split among threads
    assert (found - base(IDS).logits).abs().max() >= 0.1 * logits.abs().max()


@some
@each
def test_a_wrapped_base_is_refused(kind, wrap, process_group):
    """A base that something wraps already is refused in one line, and is as it was; so is one in FSDP."""
    base = tiny()
    message = "already: wrap the plain .*, then compile or parallelize"
    with pytest.raises((prompt.Error, prefix.Error), match=message) as caught:
        WRAPPERS[kind](WRAPS[wrap](base), N)
    assert "\n" not in str(caught.value) and all(p.requires_grad for p in base.parameters())
    outer = tiny()
    outer._fsdp_wrapped_module = base  # the name that FSDP gives to what it wraps
    with pytest.raises((prompt.Error, prefix.Error), match=message):
        WRAPPERS[kind](outer, N)


@each
def test_sharded_parameters_are_not_stored_empty(kind):
    """Parameters without elements, as ZeRO leaves them between steps, are neither stored nor loaded: see whole()."""
    state_dict, load, _ = STATES[kind]
    model = WRAPPERS[kind](tiny(), N)
    state = {"prompt_embeddings": torch.zeros(N, 128 if kind == "prefix" else 32)}
    for p in model.parameters():
        p.data = p.data.new_empty(0)
    for call in (lambda: state_dict(model), lambda: load(model, state)):
        with pytest.raises((prompt.Error, prefix.Error), match="sharded.*engine.whole"):
            call()


# ---------------------------------------------------------------------------------------------- models that are refused


@pytest.mark.parametrize(
    "name", ["RobertaForCausalLM", "CamembertForCausalLM", "Data2VecTextForCausalLM", "XLMRobertaForCausalLM"]
)
@each
def test_positions_that_start_after_the_pads_id_are_refused(kind, name):
    """RoBERTa and its kin count positions from padding_idx + 1 on, unless they are given: refused in one line."""
    cls = getattr(transformers, name)
    sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48, vocab_size=64)
    base = cls(cls.config_class(is_decoder=True, pad_token_id=1, bos_token_id=0, eos_token_id=2, **sizes))
    with pytest.raises((prompt.Error, prefix.Error), match=f"{name} .*counts positions from"):
        WRAPPERS[kind](base, N)
    assert all(p.requires_grad for p in base.parameters())


@pytest.mark.parametrize("task", ["SequenceClassification", "TokenClassification"])
@pytest.mark.parametrize("name", ["GPT2", "Bert"])
@each
def test_classifiers_are_refused(kind, name, task):
    """A classifier has no language model's head, and its own would neither be trained nor stored: refused in a line."""
    cls = getattr(transformers, f"{name}For{task}")
    sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, vocab_size=64, pad_token_id=0)
    base = cls(cls.config_class(bos_token_id=1, eos_token_id=2, **sizes))
    with pytest.raises((prompt.Error, prefix.Error), match=f"{cls.__name__} .*no .*head") as caught:
        WRAPPERS[kind](base, N)
    assert "\n" not in str(caught.value) and all(p.requires_grad for p in base.parameters())
