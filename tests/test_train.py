# SPDX-License-Identifier: MIT
"""train.py as a user runs it, on a base of one small layer that is made here."""

import functools
import io
import json
import math
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from matplotlib import font_manager
from safetensors.torch import load_file, save_file

from nanopeft import adamw, data, gpt, pipeline, ptuning, zero
from nanopeft.trainer import bases, compare, evaluate, methods, pictures, process, tokenizer
from nanopeft.trainer import files as files_of
from nanopeft.trainer.bases import load_gpt, save_gpt

SCRIPT = Path(__file__).parent.parent / "train.py"
RESULT_KEYS = {
    "method", "precision", "base", "data", "steps", "trained_parameters", "stored_parameters", "total_parameters",
    "loss_before", "loss_after", "bits_per_byte_after", "accuracy_before", "accuracy_after", "tokens_per_second",
    "peak_memory_bytes", "seconds", "python", "torch",
}  # fmt: skip

METHODS = {
    "full": "--method full",
    "lora": "--method lora",
    "pissa": "--method lora --init pissa",
    "lora+": "--method lora --lora-plus 4",
    "dora": "--method dora",
    "adalora": "--method adalora",
    "ia3": "--method ia3",
    "bitfit": "--method bitfit",
    "qlora": "--method qlora",
    "qlora in int8": "--method qlora --quant int8",
    "adapter": "--method adapter",
    "houlsby": "--method adapter --placement houlsby --reduction 4",
    "fusion": "--method fusion --adapters {files}/one {files}/two",
    "prefix": "--method prefix",
    "prefix by MLP": "--method prefix --tokens 5 --hidden 8",
    "prompt": "--method prompt",
    "ptuning": "--method ptuning",
    "ptuning by MLP": "--method ptuning --tokens 3 --encoder mlp",
    "template": "--method ptuning --data {files}/a.jsonl --template [P]So[P]{{source}}[P]",
}


UNPREDICTED = ("pissa", "dora", "adalora", "ia3", "bitfit")  # memory.py has no formulas of them


ONE = process.Ranks(0, 1, torch.device("cpu"))


def telling(cases, chosen):
    """The chosen cases run by default; the others are thorough."""
    cases = [case if isinstance(case, tuple) else (case,) for case in cases]
    chosen = [case if isinstance(case, tuple) else (case,) for case in chosen]
    assert set(chosen) <= set(cases)
    return [pytest.param(*case, marks=[] if case in chosen else pytest.mark.thorough) for case in cases]


@pytest.fixture(autouse=True)
def every_type_counts_as_fast(monkeypatch):
    """So that a CPU of any kind computes in the type that is asked for: the models here are small."""
    monkeypatch.setattr(process, "slower_than_fp32", lambda dtype: False)
    monkeypatch.setattr(process, "outlive_reader", lambda stream: None)  # the runs of this process share its streams


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with a small base, a text, a file of examples, and adapters for a fusion."""
    folder = tmp_path_factory.mktemp("files")
    encoding = tokenizer.load_tokenizer(bases.find_checkpoint("nano"))
    torch.manual_seed(0)
    save_gpt(gpt.GPT(vocab_size=encoding.n_vocab, n_positions=64, n_embd=32, n_layer=2, n_head=2), folder / "base")
    tokenizer.save_tokenizer(encoding, folder / "base")
    (folder / "a.txt").write_text("".join(f"The number {i} comes before {i + 1}.\n\n" for i in range(300)))
    examples = [(f"{i} is " + "really " * (i % 5), "odd" if i % 2 else "even, and two divides it") for i in range(60)]
    (folder / "a.jsonl").write_text("\n".join(json.dumps({"prompt": p, "completion": c}) for p, c in examples))
    for name, seed in (("one", 1), ("two", 2)):
        with pytest.MonkeyPatch.context() as patch:
            train(patch, folder, folder / name, f"--method adapter --reduction 4 --seed {seed}")
    return folder


def train(monkeypatch, files, out, flags=""):
    """Runs train.py in this process with quick settings and further flags in one string; returns result.json."""
    flags = flags.format(files=files)
    command = f"--base {files}/base --data {files}/a.txt --steps 6 --batch 4 --length 32 --out {out} {flags}"
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *shlex.split(command)])
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    finally:
        for number, handler in zip((signal.SIGINT, signal.SIGTERM), handlers):
            signal.signal(number, handler)
    return json.loads((out / "result.json").read_text())


PRECISIONS = ["fp32", "bf16", "fp16"]
EACH_ONCE = [(name, PRECISIONS[i % 3]) for i, name in enumerate(METHODS)]


@pytest.mark.parametrize("method, precision", telling([(m, p) for p in PRECISIONS for m in METHODS], EACH_ONCE))
def test_a_run_learns_and_leaves_its_files(monkeypatch, files, tmp_path, method, precision):
    """Each method in each precision lowers the loss and leaves what was trained, the figures and the picture.

    The bytes that memory.py predicts for a step, where it knows the method, are those that were measured; its peak has
    a test of its own.
    """
    flags = f"{METHODS[method]} --precision {precision} --steps 30 --lr 0.02"
    result = train(monkeypatch, files, tmp_path, flags)
    assert RESULT_KEYS <= result.keys()
    assert result["loss_after"] < result["loss_before"]
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    file = tmp_path / ("model.safetensors" if method == "full" else "adapter_model.safetensors")
    stored = load_file(file)
    assert result["stored_parameters"] == sum(t.numel() for t in stored.values())
    assert file.stat().st_size < result["stored_bytes"] < file.stat().st_size + 200_000
    narrow = process.DTYPES[result["computed_in"]]
    assert {t.dtype for t in stored.values()} == {narrow if method in ("full", "bitfit") else torch.float32}
    assert not list(tmp_path.glob("*.new")) and (tmp_path / "ranks.svg").exists() == (method == "adalora")
    predicted, measured = result["predicted_bytes"], result["measured_bytes"]
    assert measured.keys() == {"parameters", "gradients", "optimizer", "activations", "peak"}
    assert predicted.keys() == (set() if method in UNPREDICTED else measured.keys())
    for what in predicted.keys() - {"peak"}:
        assert predicted[what] == measured[what], what


@pytest.mark.parametrize("method", telling(METHODS, ["lora", "prefix"]))
def test_recomputation_changes_no_bit(monkeypatch, files, tmp_path, method):
    """With --recompute a run of each method leaves the same numbers, and its predicted peak is lower."""
    flags = f"{METHODS[method]} --precision fp32"
    plain, less = (train(monkeypatch, files, tmp_path / f"{k}", f"{flags} {k}") for k in ("", "--recompute"))
    assert plain["losses"] == less["losses"] and plain["loss_after"] == less["loss_after"]
    name = "model.safetensors" if method == "full" else "adapter_model.safetensors"
    assert load_file(tmp_path / name).keys() == load_file(tmp_path / "--recompute" / name).keys()
    for key, t in load_file(tmp_path / name).items():
        assert torch.equal(t, load_file(tmp_path / "--recompute" / name)[key]), key
    if method not in UNPREDICTED:
        assert less["predicted_bytes"]["activations"] < plain["predicted_bytes"]["activations"]
    assert "activations" not in less["measured_bytes"]


FROZEN = [(name, precision) for precision in ("fp32", "bf16") for name in METHODS if name not in ("full", "bitfit")]
FROZEN_FEW = [("lora", "bf16"), ("qlora", "fp32"), ("fusion", "fp32"), ("template", "bf16")]


@pytest.mark.parametrize("method, precision", telling(FROZEN, FROZEN_FEW))
def test_training_moves_what_is_trained_and_nothing_else(monkeypatch, files, tmp_path, method, precision):
    """After a run every base tensor has its bits, and every trained one has moved from where its seed put it.

    But for the bias of a fusion's key: it adds the same to all scores, softmax does not see that, and what gradient it
    has is rounding.
    """
    base, trained = [], []
    load, init = bases.load_gpt, adamw.AdamW.__init__

    def spy_load(*args):
        model = load(*args)
        base.extend((name, p, p.detach().clone()) for name, p in model.named_parameters())
        return model

    def spy_init(self, groups, **options):
        trained.extend((p, p.detach().clone()) for group in groups for p in group["params"])
        init(self, groups, **options)

    monkeypatch.setattr(bases, "load_gpt", spy_load)
    monkeypatch.setattr(adamw.AdamW, "__init__", spy_init)
    train(monkeypatch, files, tmp_path, f"{METHODS[method]} --precision {precision}")
    assert len(base) == 28 and trained
    for name, p, before in base:
        assert torch.equal(p, before), name
    still = [p for p, before in trained if torch.equal(p, before)]
    assert len(still) <= (2 if method == "fusion" else 0)  # one in each layer


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_slow_types_are_computed_in_fp32(monkeypatch, files, tmp_path, capsys, precision):
    """Where a CPU multiplies a 16-bit type more slowly than fp32, training and --generate compute in fp32 to the bit.

    One line and result.json say so; where the type is fast, nothing is said and the run computes in it.
    """
    whole = train(monkeypatch, files, tmp_path / "fp32", "--method lora")
    for slow in (True, False):
        monkeypatch.setattr(process, "slower_than_fp32", lambda dtype: slow)  # noqa: B023
        result = train(monkeypatch, files, tmp_path / f"{slow}", f"--method lora --precision {precision}")
        said = f"this CPU multiplies {precision} more slowly than fp32: computing in fp32" in capsys.readouterr().err
        assert said == slow and result["precision"] == precision
        assert result["computed_in"] == ("fp32" if slow else precision)
        assert (result["losses"] == whole["losses"]) == slow
    texts = []
    monkeypatch.setattr(process, "slower_than_fp32", lambda dtype: True)
    for flags in (f"--precision {precision}", ""):
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--generate", str(tmp_path / "fp32"), *flags.split()])
        runpy.run_path(str(SCRIPT), run_name="__main__")
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]


def test_full_training_moves_everything(monkeypatch, files, tmp_path):
    """After a full run every tensor has moved."""
    train(monkeypatch, files, tmp_path, "--method full")
    before, after = (load_gpt(folder).state_dict() for folder in (files / "base", tmp_path))
    for name, value in after.items():
        assert not torch.equal(value, before[name]), name


RESUMED = [*((name, "bf16") for name in METHODS), ("lora", "fp32"), ("full", "fp16")]
RESUMED_FEW = [("lora", "fp32"), ("full", "fp16"), ("prefix by MLP", "bf16"), ("template", "bf16")]


@pytest.mark.parametrize("method, precision", telling(RESUMED, RESUMED_FEW))
def test_resuming_changes_no_bit(monkeypatch, files, tmp_path, method, precision):
    """A run stopped by Ctrl-C after any step and resumed ends with the files of a run that was never stopped."""
    flags = f"{METHODS[method]} --precision {precision}"
    whole = train(monkeypatch, files, tmp_path / "whole", flags)

    kind = data.CompletionDataset if method == "template" else data.TokenStream
    sample, calls = kind.sample, []

    def stop_at_third(self, *which):
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return sample(self, *which)

    with monkeypatch.context() as patch:
        patch.setattr(kind, "sample", stop_at_third)
        with pytest.raises(SystemExit, match="--resume"):
            train(patch, files, tmp_path / "parts", flags)
    assert len(calls) == 3 and not (tmp_path / "parts" / "result.json").exists()
    parts = train(monkeypatch, files, tmp_path / "parts", flags + " --resume")
    for key in ("loss_before", "loss_after", "bits_per_byte_after", "trained_parameters"):
        assert parts[key] == whole[key]
    name = "model.safetensors" if method == "full" else "adapter_model.safetensors"
    assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_resuming_another_run_is_refused(monkeypatch, files, tmp_path, capsys):
    """--resume with other settings than the state's names the first that differs, and leaves the state alone."""
    train(monkeypatch, files, tmp_path)
    state = (tmp_path / "state.safetensors").read_bytes()
    with pytest.raises(SystemExit) as end:
        train(monkeypatch, files, tmp_path, "--resume --lr 0.5")
    assert end.value.code == 2 and "lr = 0.005, not 0.5" in capsys.readouterr().err
    assert (tmp_path / "state.safetensors").read_bytes() == state


def test_resuming_without_a_state_starts(monkeypatch, files, tmp_path):
    """--resume where nothing was saved yet is an ordinary start."""
    assert train(monkeypatch, files, tmp_path, "--resume")["steps"] == 6


def test_accumulation_weighs_tokens(monkeypatch, files, tmp_path):
    """Four examples at once, or one by one with their unequal numbers of labelled tokens, give the same gradient.

    Compared is Adam's m after one step, a tenth of the gradient: only the order of sums in fp32 differs, by some ten
    roundings of 2⁻²³ of the largest, 2e-6. The step itself would not do: its quotient makes noise of a zero gradient.
    """
    kept = []
    for batch, accumulate in ((4, 1), (1, 4)):
        out = tmp_path / str(batch)
        flags = f"--data {files}/a.jsonl --batch {batch} --accumulate {accumulate} --steps 1"
        train(monkeypatch, files, out, flags)
        kept.append({key: t for key, t in load_file(out / "state.safetensors").items() if key.startswith("m ")})
    assert len(kept[0]) == 16 and any(t.any() for t in kept[0].values())
    for name, value in kept[0].items():
        assert (value - kept[1][name]).abs().max() <= 2e-6 * value.abs().max(), name


def test_same_seed_same_bits(monkeypatch, files, tmp_path):
    """Two runs with one seed agree to the bit, and another seed gives another adapter."""
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(monkeypatch, files, tmp_path / name, f"--seed {seed}")
    a, b, c = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in "abc")
    assert a == b != c


@pytest.mark.parametrize("method", telling(METHODS, ["full", "qlora", "fusion", "template"]))
def test_what_was_trained_opens_again(monkeypatch, files, tmp_path, capsys, method):
    """The saved files on a fresh base have the loss that the run ended with, and --generate goes on from a prompt."""
    result = train(monkeypatch, files, tmp_path, METHODS[method] + " --lr 0.05")
    model, encoding = methods.load(tmp_path, torch.float32, ONE.device)
    _, valid = files_of.load(result["data"], encoding, 32)
    if method == "template":
        valid.items = [(methods.apply_template(model, p, encoding), c) for p, c in valid.items]
    assert evaluate.evaluate(model, valid, ONE)[0] == pytest.approx(result["loss_after"], abs=1e-6)

    capsys.readouterr()
    texts = []
    for _ in range(2):
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--generate", str(tmp_path), "--prompt", "The number 7"])
        runpy.run_path(str(SCRIPT), run_name="__main__")
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] and "The number 7" in texts[0] and len(texts[0]) > 20


@pytest.mark.parametrize("init", ["random", "vocabulary", "labels", "odd"])
def test_prompt_starts_where_it_is_told(monkeypatch, files, tmp_path, init):
    """--init starts a prompt from words, from the labels or at random, and each start is another one."""
    flags = f"--method prompt --data {files}/a.jsonl --steps 1 --lr 0 --tokens 4 --init {init}"
    train(monkeypatch, files, tmp_path, flags)
    prompt = load_file(tmp_path / "adapter_model.safetensors")["prompt_embeddings"]
    base = load_gpt(files / "base")
    encoding = tokenizer.load_tokenizer(files / "base")
    table = base.get_input_embeddings().weight.detach()
    words = encoding.encode_ordinary({"labels": "even, and two divides itodd", "odd": "odd" * 4}.get(init, ""))[:4]
    if words:
        assert torch.equal(prompt, table[words])
    else:
        known = [any(torch.equal(row, word) for word in table) for row in prompt]
        assert known == [init == "vocabulary"] * 4


@pytest.mark.thorough
def test_all_methods_beside_each_other(monkeypatch, files, tmp_path, capsys):
    """--method all runs every method with the same flags, and leaves one table and two figures."""
    texts = f"--base {files}/base --data {files}/a.txt --remember {files}/a.txt"
    command = f"--method all {texts} --steps 2 --batch 2 --length 32 --out {tmp_path}"
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *command.split()])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    results = json.loads((tmp_path / "compare.json").read_text())
    assert results.keys() == {"full", "lora", "qlora", "adapter", "prefix", "prompt", "ptuning", "fusion",
                              "dora", "adalora", "ia3", "bitfit"}  # fmt: skip
    assert all(r["data"] == [f"{files}/a.txt"] and r["steps"] == 2 and len(r["losses"]) == 2 for r in results.values())
    for name in ("compare.png", "forgetting.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert all(r["known_loss_after"] is not None for r in results.values())
    # What is forgotten counts from the untouched base, and not from a fusion that has not been trained
    risen = [r["known_loss_after"] - results["full"]["known_loss_before"] for r in results.values()]
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(table) == 3 + len(results) and len({len(line) for line in table}) == 1
    assert [line.split("|")[8].strip() for line in table[3:]] == [f"{x:.3f}" for x in risen]


def test_each_method_gets_every_flag():
    """--method all hands on what was given: zeros too, which Python takes for False."""
    settings = {"seed": 0, "weight_decay": 0.0, "data": ["a", "b"], "accuracy": True, "valid": None, "resume": False}
    assert [*compare.as_flags(settings)] == ["--seed=0", "--weight-decay=0.0", "--data", "a", "b", "--accuracy"]


@pytest.mark.parametrize("quantity, after", [("loss", 3.5), ("accuracy", 0.1)])
def test_what_got_worse_was_not_learned(monkeypatch, tmp_path, quantity, after):
    """In forgetting.png a method whose loss has risen, or whose accuracy has fallen, is left of zero."""
    found = {f"{quantity}_before": {"loss": 3.0, "accuracy": 0.2}[quantity], f"{quantity}_after": after}
    learned = []
    monkeypatch.setattr(pictures, "mark", lambda axes, points: learned.extend(x for x, _ in points.values()))
    pictures.plot_forgetting(tmp_path / "forgetting.png", {"full": found | {"forgotten": 1.0}}, quantity, "task")
    assert len(learned) == 1 and learned[0] < 0


def drawn(monkeypatch, plot, *args):
    """The axes of a picture that was saved as an SVG."""
    figures, make = [], pictures.new_figure
    monkeypatch.setattr(pictures, "new_figure", lambda *size: figures.append(make(*size)) or figures[-1])
    plot(file := io.BytesIO(), *args)
    assert file.getvalue().startswith(b"<?xml")
    return figures[0].axes[0]


def test_picture_of_ranks(monkeypatch):
    """AdaLoRA's ranks stand in a row for each kind of layer and a column for each block, none on top of another."""
    ranks = {"h.0.attn.c_proj": 0, "h.0.mlp.c_fc": 1, "h.1.attn.c_proj": 3, "h.1.mlp.c_fc": 4}
    axes = drawn(monkeypatch, pictures.plot_ranks, ranks)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["h.attn.c_proj", "h.mlp.c_fc"]
    assert {text.get_position(): text.get_text() for text in axes.texts} == {
        (0, 0): "0", (0, 1): "1", (1, 0): "3", (1, 1): "4"
    }  # fmt: skip
    experts = {f"h.{i}.experts.{j}": 1 for i in range(2) for j in range(3)}
    assert len({text.get_position() for text in drawn(monkeypatch, pictures.plot_ranks, experts).texts}) == 6


def test_picture_of_a_timeline(monkeypatch):
    """A pipeline's timeline has a bar and a number for each forward and backward, where and as long as it was."""
    timeline = pipeline.simulate(2, "1f1b", [1, 1], [2, 2])
    axes = drawn(monkeypatch, pictures.plot_timeline, timeline)
    events = [event for stage in timeline for event in stage]
    assert [text.get_text() for text in axes.texts] == [str(i) for _, i, *_ in events]
    assert [bar.get_x() for bar in axes.patches] == pytest.approx([start for *_, start, _ in events])
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([end - start for *_, start, end in events])


@pytest.mark.parametrize(
    "name, shown", [("中文 été\n.txt", r"lora on \u4e2d\u6587 été\n.txt"), ("$x$ \\x.txt", r"lora on \$x\$ \x.txt")]
)
def test_title_of_the_picture(monkeypatch, files, tmp_path, name, shown):
    """loss.png shows what no font has as escapes, without a warning, and dollars as dollars."""
    monkeypatch.setattr(font_manager.fontManager, "ttflist", [])
    titles, plot = [], pictures.plot_losses

    def spy(*args):
        titles.append(args[-1].replace(f"{tmp_path}/", ""))
        plot(*args)

    monkeypatch.setattr(pictures, "plot_losses", spy)
    shutil.copy(files / "a.txt", tmp_path / name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(monkeypatch, files, tmp_path / "o", f"--steps 1 --data {shlex.quote(str(tmp_path / name))}")
    assert titles == [shown]


def test_scratch_is_called_scratch(monkeypatch, files, tmp_path):
    """The picture of a model trained from nothing says so, and not "full"."""
    titles = []
    monkeypatch.setattr(pictures, "plot_losses", lambda *args: titles.append(args[-1]) or Path(args[0]).touch())
    sizes = dict(n_positions=64, n_embd=8, n_layer=1, n_head=1)
    small = functools.partialmethod(gpt.GPT.__init__, **sizes)
    monkeypatch.setattr(gpt, "GPT", type("GPT", (gpt.GPT,), {"__init__": small}))
    train(monkeypatch, files, tmp_path / "o", "--method full --base scratch --steps 1")
    assert titles == [f"scratch on {files}/a.txt"]


def test_full_training_after_an_adapter_in_one_folder(monkeypatch, files, tmp_path):
    """--generate opens what the last run left, though an earlier one left an adapter in the same folder."""
    for method in ("lora", "full"):
        train(monkeypatch, files, tmp_path, f"--method {method} --steps 1")
    model, _ = methods.load(tmp_path, torch.float32, ONE.device)
    trained = load_file(tmp_path / "model.safetensors")["transformer.wte.weight"]
    assert torch.equal(model.transformer.wte.weight, trained)


@pytest.mark.parametrize("template", [None, "[P][P]{source}[P][P]"])
def test_accuracy_where_the_longest_do_not_fit_one_another(files, template):
    """Rows that fit the positions alone, but not with the batch's longest completion, are each scored whole.

    A model that gives one token always is right where all of the completion is that token.
    """
    encoding = tokenizer.load_tokenizer(files / "base")
    base = gpt.GPT(vocab_size=encoding.n_vocab, n_positions=16, n_embd=8, n_layer=1, n_head=1)
    torch.nn.init.ones_(base.lm_head.weight)
    base.transformer.ln_f.weight.data.zero_()
    base.transformer.ln_f.bias.data.fill_(1.0)
    base.lm_head.weight.data[9] += 1  # the likeliest, whatever was read
    model = ptuning.PTuning(base, template=template) if template else base
    examples = data.CompletionDataset([("a", "b")] * 2, encoding, 12)
    pairs = [([encoding.eot_token, *[5] * 9], [9, 9]), ([encoding.eot_token], [9] * 9), ([encoding.eot_token], [9, 8])]
    examples.items = [(methods.apply_template(model, prompt, encoding), rest) for prompt, rest in pairs]
    assert evaluate.accuracy(model, examples, ONE) == pytest.approx(2 / 3)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_bits_per_byte_is_about_text(files, name):
    """A model that knows nothing costs ln V nats a scored token, end-of-text included, spread over the scored bytes.

    The head's weights are zero, so that all V logits are. A few hundred sums in fp32 are good to 1e-5.
    """
    encoding = tokenizer.load_tokenizer(files / "base")
    model = gpt.GPT(vocab_size=encoding.n_vocab, n_positions=64, n_embd=8, n_layer=1, n_head=1)
    torch.nn.init.zeros_(model.lm_head.weight)
    valid = files_of.load(str(files / name), encoding, 32)[1]
    scored = torch.cat([labels[:, 1:].flatten() for _, labels in valid.batches(8)])
    ids = [i for i in scored.tolist() if i != -100]
    text = encoding.decode([i for i in ids if i != encoding.eot_token])
    nats, bits = evaluate.evaluate(model, valid, ONE)
    assert nats == pytest.approx(math.log(encoding.n_vocab), rel=1e-5)
    assert bits == pytest.approx(len(ids) * math.log2(encoding.n_vocab) / len(text.encode()), rel=1e-5)


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--base", "nowhere"], "no base 'nowhere'"),
        (["--base", "{files}"], "config.json"),
        (["--base", "scratch"], "--method full"),
        (["--data", "nowhere.txt"], "no such file"),
        (["--data", "tales"], "no data 'tales'"),
        (["--data", "{empty}"], "empty"),
        (["--data", "{latin}"], "UTF-8"),
        (["--data", "{keys}"], "line 2"),
        (["--data", "{short}"], "fewer than --length 32"),
        (["--rank", "0"], "rank"),
        (["--ranks", "mlp.*=3,x"], "invalid ranks value"),
        (["--ranks", "wte=3"], "matches no target"),
        (["--ranks", "mlp.*=999"], "above the model's width"),
        (["--method", "adalora", "--ranks", "mlp.*=3"], "--ranks belongs"),
        (["--targets", "nothing"], "attn.c_attn"),
        (["--targets", "ln_1"], "LayerNorm"),
        (["--precision", "fp8"], "fp32"),
        (["--device", "cuda"], "--device cuda"),
        (["--device", "abacus"], "--device abacus"),
        (["--method", "magic"], "lora"),
        (["--method", "full", "--rank", "4"], "--rank belongs"),
        (["--method", "all", "--rank", "4"], "leave it out with --method all"),
        (["--method", "prompt", "--tokens", "0"], "n_tokens must be"),
        (["--method", "prompt", "--init", ""], "at least one"),
        (["--method", "prompt", "--tokens", "60"], "4 are left for the text"),
        (["--method", "prefix", "--hidden", "0"], "hidden must be"),
        (["--method", "adapter", "--reduction", "0"], "reduction"),
        (["--method", "fusion"], "--adapters"),
        (["--method", "fusion", "--adapters", "nowhere"], "nowhere holds no adapter"),
        (["--method", "ptuning", "--template", "[P]{{source}}"], "--template goes around a prompt"),
        (["--method", "ptuning", "--template", "[P]"], "exactly once"),
        (["--method", "ptuning", "--data", "{files}/a.jsonl", "--template", "{{source}}"], "has no [P]"),
        (["--zero", "2"], "torchrun"),
        (["--offload", "cpu"], "belongs to --zero"),
        (["--method", "prompt", "--init", "labels"], "needs completions"),
        (["--seed", "-1"], "--seed must be"),
        (["--steps", "-1"], "--steps must be at least 0"),
        (["--steps", "ten"], "--steps"),
        (["--lr", "nan"], "--lr"),
        (["--length", "65"], "64 positions"),
        (["--generate", "{files}"], "holds nothing trained"),
        (["--generate", "{files}/base", "--steps", "3"], "leave out"),
        (["--prompt", "word " * 80], "tokens"),
        (["--wrong"], "--wrong"),
        (["--deb"], "--deb"),
        (["--generate", ""], "holds nothing trained"),
        (["--generate", "{kind}"], "'VERA'"),
    ],
)  # fmt: skip
def test_bad_input_gives_one_line_and_code_2(monkeypatch, files, tmp_path, capsys, flags, says):
    """Bad input of each kind ends with one line on stderr that says what is wrong, exit code 2, and nothing written."""
    if torch.cuda.is_available() and flags == ["--device", "cuda"]:
        pytest.skip("there is a GPU")
    contents = {
        "empty": ("e.txt", b""), "latin": ("l.txt", "é".encode("latin-1") * 500), "short": ("s.txt", b"a b c"),
        "keys": ("k.jsonl", b'{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n'),
    }  # fmt: skip
    paths = {"files": files}
    for key, (name, content) in contents.items():
        paths[key] = tmp_path / name
        paths[key].write_bytes(content)
    paths["kind"] = tmp_path / "kind"
    paths["kind"].mkdir()
    (paths["kind"] / "adapter_config.json").write_text('{"peft_type": "VERA"}')
    save_file({}, paths["kind"] / "adapter_model.safetensors")
    monkeypatch.chdir(tmp_path)
    command = [flag.format(**paths) for flag in flags]
    quick = {"--base": f"{files}/base", "--data": f"{files}/a.txt", "--steps": "6", "--length": "32", "--out": "out"}
    if "--generate" not in flags:
        command += [word for flag, value in quick.items() if flag not in flags for word in (flag, value)]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *command])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    error = capsys.readouterr().err.strip().split("\r")[-1]
    assert end.value.code == 2
    assert says in error and "\n" not in error, error
    assert not list((tmp_path / "out").glob("*")), "something was written"


def torchrun(files, out, flags, script=SCRIPT):
    """train.py as two real processes, which get a minute and a half."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", script]
    quick = f"--base {files}/base --data {files}/a.txt --steps 6 --batch 4 --length 32 --out {out} {flags}"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parent)}
    return subprocess.run([*command, *quick.split()], capture_output=True, text=True, timeout=90, env=environment)


FOLDED = ["ptuning --zero 0", "prefix --hidden 4 --zero 3", "ptuning --encoder lstm --fsdp"]


@pytest.mark.parametrize("flags", telling(FOLDED, FOLDED[:1]))
def test_ranks_fold_what_they_have_trained(monkeypatch, files, tmp_path, flags):
    """An encoder that is folded away at the end is so on several ranks too, with one process's numbers."""
    done = torchrun(files, tmp_path / "two", f"--method {flags}")
    assert done.returncode == 0, done.stderr
    train(monkeypatch, files, tmp_path / "one", "--method " + re.sub(" --(zero .|fsdp)", "", flags))
    one, two = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("one", "two"))
    torch.testing.assert_close(two, one, rtol=0, atol=2e-5)  # as above


STOP_AT_THIRD = f"""
import runpy, signal, sys
from nanopeft import data
sample, calls = data.TokenStream.sample, []
def stop_at_third(self, *which):
    calls.append(1)
    if len(calls) == 3:
        signal.raise_signal(signal.SIGINT)
    return sample(self, *which)
data.TokenStream.sample = stop_at_third
runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
"""


def test_compile_without_a_compiler(monkeypatch, capsys):
    """--compile where there is no C++ compiler is refused in one line, before anything is loaded."""
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--compile", "--device", "cpu"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    error = capsys.readouterr().err.strip()
    assert end.value.code == 2 and "needs a C++ compiler" in error and "\n" not in error


SHARED = [("full", "--zero 3"), ("lora", "--zero 2"), ("full", "--fsdp")]


@pytest.mark.parametrize("method, share", telling(SHARED, [("lora", "--zero 2")]))
def test_ranks_train_what_one_process_trains(monkeypatch, files, tmp_path, method, share):
    """Two ranks with ZeRO or FSDP, stopped and resumed, save the bits of two that were not, and one process's numbers.

    In fp32 sums of other order differ by some 2⁻²³ of their terms; Adam's quotient makes up to ten times that of it.
    """
    flags = f"--method {method} {share}"
    one = train(monkeypatch, files, tmp_path / "one", f"--method {method}")
    done = torchrun(files, tmp_path / "two", flags)
    assert done.returncode == 0, done.stderr
    name = "model.safetensors" if method == "full" else "adapter_model.safetensors"
    first, second = (load_file(tmp_path / folder / name) for folder in ("one", "two"))
    for key, value in first.items():
        assert (value - second[key]).abs().max() <= 2e-5, key
    result = json.loads((tmp_path / "two" / "result.json").read_text())
    assert result["ranks"] == 2 and result["loss_after"] == pytest.approx(one["loss_after"], abs=1e-5)
    if "zero" in share:  # an odd parameter is padded
        n, stage = result["trained_parameters"], int(share[-1])
        assert sum(result["sent_elements"].values()) == pytest.approx(
            sum(zero.zero_traffic(n, 2, stage).values()), rel=0.01
        )
        kept, held = result["measured_bytes"], zero.zero_bytes(n, 2, stage, param_bytes=4, grad_bytes=4, k=8)
        assert kept["optimizer"] == pytest.approx(held["optimizer"], rel=0.01)
        assert kept["gradients"] == pytest.approx(held["gradients"], rel=0.01)

    script, parts = tmp_path / "stop.py", tmp_path / "parts"
    script.write_text(STOP_AT_THIRD)
    assert torchrun(files, parts, flags, script).returncode and not (parts / "result.json").exists()
    done = torchrun(files, parts, f"{flags} --resume" + " --offload cpu" * ("zero" in share))
    assert done.returncode == 0 and "going on from step 3" in done.stdout, done.stderr
    assert (parts / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    # And one process goes on from where two have stopped
    again = train(monkeypatch, files, parts, f"--method {method} --resume")
    assert again["loss_after"] == pytest.approx(one["loss_after"], abs=1e-5)


@pytest.mark.parametrize(
    "flags, says",
    [
        ("", "share the work"), ("--zero 4", "give a stage"), ("--zero 2 --batch 3", "cannot be shared"),
        ("--zero 1 --method all", "one method"), ("--zero 1 --fsdp", "give a stage"),
        ("--zero 1 --device mps", "no messages between Apple's GPUs"),
        ("--fsdp --precision fp16", "--fsdp is"),
    ],
)  # fmt: skip
def test_wrong_use_of_ranks_is_refused(monkeypatch, files, tmp_path, capsys, flags, says):
    """Under torchrun, a batch that does not divide, an unknown stage or no stage give one clear line and code 2."""
    for name, value in {"WORLD_SIZE": 2, "RANK": 0, "LOCAL_RANK": 0}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(SystemExit) as end:
        train(monkeypatch, files, tmp_path, flags)
    assert end.value.code == 2 and says in capsys.readouterr().err


def test_the_command_line_itself(files, tmp_path):
    """As a process of its own: a good run exits with 0, a bad one with 2 and a single line, without a traceback."""
    command = [sys.executable, SCRIPT, "--base", files / "base", "--data", files / "a.txt", "--length", "32"]
    good = ["--steps", "3", "--batch", "2", "--out", tmp_path]
    done = subprocess.run([*command, *good], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "loss" in done.stdout and "sample after" in done.stdout
    bad = subprocess.run([*command, "--steps", "-3"], capture_output=True, text=True)
    assert bad.returncode == 2 and bad.stderr.count("\n") == 1 and "Traceback" not in bad.stderr
