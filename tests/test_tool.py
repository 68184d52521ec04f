# SPDX-License-Identifier: MIT
"""The way on from a run, as a user goes it: validation, the best step, more training, merging, text."""

import io
import json
import os
import runpy
import shlex
import signal
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from nanopeft import adamw, data, gpt
from nanopeft.trainer import arguments, evaluate, methods, pictures, process
from nanopeft.trainer.bases import load_base, load_tokenizer
from nanopeft.trainer.files import load_known

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "train.py"
MAKE_FILES = runpy.run_path(str(ROOT / "tests" / "bench" / "kill.py"))["make_files"]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def every_type_counts_as_fast(monkeypatch):
    monkeypatch.setattr(process, "slower_than_fp32", lambda dtype: False)
    monkeypatch.setattr(process, "outlive_reader", lambda stream: None)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A small base, a text, examples, and two adapters."""
    return MAKE_FILES(tmp_path_factory.mktemp("files"))


def call(monkeypatch, flags):
    """Runs train.py in this process: its exit code."""
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *shlex.split(flags)])
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = [(number, signal.getsignal(number)) for number in numbers]
    try:
        runpy.run_path(str(SCRIPT), run_name="__main__")
        return 0
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
            return 1
        return end.code
    finally:
        for number, handler in handlers:
            signal.signal(number, handler)


def train(monkeypatch, files, out, flags="", steps="--steps 6"):
    """A quick run: result.json, or None if it did not end."""
    quick = f"--base {files}/base --data {files}/a.txt {steps} --batch 2 --length 32 --lr 0.01 --out {out}"
    code = call(monkeypatch, f"{quick} {flags.format(files=files)}")
    return json.loads((out / "result.json").read_text()) if code == 0 else None


def dictate(monkeypatch, losses):
    """Evaluations give these losses, one after the other: before, then on the way; the last one again after it."""
    losses = iter(losses)
    last = []

    def told(*_):
        last[:] = [next(losses, last[0] if last else None)]
        return last[0], last[0]

    monkeypatch.setattr(evaluate, "evaluate", told)


# ---------------------------------------------------------------------------------------------------------- validation


@pytest.mark.parametrize("method", ["full", "lora", "prefix --hidden 8", "ptuning"])
@pytest.mark.parametrize("keep, step", [("best", 2), ("last", 6)])
def test_the_best_step_is_what_is_left(monkeypatch, files, tmp_path, method, keep, step):
    """The folder holds the numbers of the evaluation with the lowest loss, with --keep last those of the last step."""
    saved, save = {}, methods.save
    numbers = []

    def spy(model, *rest):
        found = save(model, *rest)
        saved[len(numbers)] = load_file(next(tmp_path.glob("*model.safetensors")))
        return found

    monkeypatch.setattr(methods, "save", spy)
    dictate(monkeypatch, [5, 4, 3, 3.5, 3.6, 3.7, 3.8, 3.2])
    step_of = methods.checkpoint.Progress.note
    monkeypatch.setattr(methods.checkpoint.Progress, "note", lambda self, x: numbers.append(x) or step_of(self, x))
    result = train(monkeypatch, files, tmp_path, f"--method {method} --keep {keep}")
    assert result["best_step"] == 2 and result["keep"] == keep
    assert [at for at, _ in result["validation"]] == [0, 1, 2, 3, 4, 5, 6]
    left = load_file(next(tmp_path.glob("*model.safetensors")))
    if keep == "best":
        assert saved.keys() == {2, 3, 7}  # numbers counts step 0 as well
        assert all(torch.equal(left[key], saved[3][key]) for key in saved[3])
    else:
        assert saved.keys() == {7}


def test_patience(monkeypatch, files, tmp_path):
    """--patience N ends the run after N evaluations without a lower loss; so does the same command with --resume."""
    dictate(monkeypatch, [5, 4, 4.5, 4.4, 4.3, 4.2, 4.1])
    result = train(monkeypatch, files, tmp_path, "--patience 3")
    assert result["steps"] == 4 and result["best_step"] == 1
    dictate(monkeypatch, [4])
    assert train(monkeypatch, files, tmp_path, "--patience 3 --resume")["steps"] == 4


def test_evaluations_come_ten_times_a_run(monkeypatch, files, tmp_path):
    """Without --eval-every there are ten evaluations, with it one after every N steps and one after the last."""
    for name, flags, at in (("a", "", range(0, 31, 3)), ("b", "--eval-every 12", (0, 12, 24, 30))):
        result = train(monkeypatch, files, tmp_path / name, flags, steps="--steps 30")
        assert [step for step, _ in result["validation"]] == [*at]


def test_no_steps_evaluate_only(monkeypatch, files, tmp_path):
    """--steps 0 gives the figures of the base, and with --from those of an adapter, and writes no adapter."""
    trained = train(monkeypatch, files, tmp_path / "a")
    base = train(monkeypatch, files, tmp_path / "b", steps="--steps 0")
    again = train(monkeypatch, files, tmp_path / "c", f"--from {tmp_path}/a", steps="--steps 0")
    assert base["loss_before"] == base["loss_after"] == trained["loss_before"]
    assert again["loss_after"] == pytest.approx(trained["loss_after"], rel=1e-6)
    assert not [*(tmp_path / "b").glob("*model.safetensors"), *(tmp_path / "c").glob("*model.safetensors")]


def test_a_folder_that_another_run_wrote_to(monkeypatch, files, tmp_path, capsys):
    """A run that goes on, and whose best numbers were replaced meanwhile, keeps the last ones and says so."""
    dictate(monkeypatch, [5, 4, 3, 3.5, 3.6, 3.7, 3.8])
    assert train(monkeypatch, files, tmp_path)["keep"] == "best"
    os.replace(files / "one" / "adapter_model.safetensors", tmp_path / "other")
    (tmp_path / "adapter_model.safetensors").write_bytes((tmp_path / "other").read_bytes())
    os.replace(tmp_path / "other", files / "one" / "adapter_model.safetensors")
    capsys.readouterr()
    assert train(monkeypatch, files, tmp_path, "--resume")["keep"] == "last"
    assert "no longer holds the numbers of step 2" in capsys.readouterr().out


def test_a_closed_terminal_saves(monkeypatch, files, tmp_path, capsys):
    """SIGHUP ends the run as Ctrl-C does: after the step under way, with a state to go on from."""
    sample = data.TokenStream.sample

    def hang_up(self, *rest):
        signal.raise_signal(signal.SIGHUP)
        return sample(self, *rest)

    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored
    with monkeypatch.context() as patch:
        patch.setattr(data.TokenStream, "sample", hang_up)
        assert train(patch, files, tmp_path) is None
    signal.signal(signal.SIGHUP, before)
    assert "stopped after step 1" in capsys.readouterr().err
    assert train(monkeypatch, files, tmp_path, "--resume")["steps"] == 6


@pytest.mark.parametrize("flags, n", [("--epochs 2", 2), ("--epochs 2 --accumulate 2", 2)])
def test_an_epoch_has_every_example_once(monkeypatch, files, tmp_path, flags, n):
    """In --epochs N each training example is drawn N times, but for those that fill the last step."""
    drawn, datasets, collate = Counter(), [], data.CompletionDataset.collate
    monkeypatch.setattr(methods, "remarks", lambda train, *_: datasets.append(train) or [])

    def spy(self, rows):
        if datasets and self is datasets[0]:
            drawn.update(str(row) for row in rows)
        return collate(self, rows)

    monkeypatch.setattr(data.CompletionDataset, "collate", spy)
    result = train(monkeypatch, files, tmp_path, f"--data {{files}}/a.jsonl --length 48 {flags}", steps="")
    rows = len(datasets[0].rows)
    per_step = 2 * (2 if "accumulate" in flags else 1)
    assert result["steps"] == -(-n * rows // per_step)
    assert set(drawn.values()) <= {n, n + 1} and len(drawn) == rows
    assert sum(drawn.values()) == result["steps"] * per_step


# ----------------------------------------------------------------------------------------------------------- the way on


KINDS = ["lora --ranks mlp.*=3,attn.*=5", "qlora", "adapter --reduction 4", "prefix --hidden 8", "prompt", "ptuning"]
KINDS += ["lora --init pissa", "dora", "adalora", "ia3", "bitfit", "fusion --adapters TRAINED"]


@pytest.mark.parametrize("method", KINDS)
def test_more_training_of_what_was_trained(monkeypatch, files, tmp_path, method):
    """--from starts where an earlier run ended, with its method and settings, on other data, and learns on."""
    if "TRAINED" in method:
        train(monkeypatch, files, tmp_path / "one", "--method adapter")
        method = method.replace("TRAINED", str(tmp_path / "one"))
    first = train(monkeypatch, files, tmp_path / "a", f"--method {method}")
    same = train(monkeypatch, files, tmp_path / "b", f"--from {tmp_path}/a", steps="--steps 0")
    assert same["loss_before"] == pytest.approx(first["loss_after"], rel=1e-5)
    flags = f"--from {tmp_path}/a --data {{files}}/a.jsonl"
    more = train(monkeypatch, files, tmp_path / "c", flags, steps="--steps 30")
    assert more["method"] == method.split()[0] and more["loss_after"] < more["loss_before"]
    old, new = (json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in "ac")
    passing = {"encoder_hidden_size", "encoder_reparameterization_type"}  # the encoder is in no file
    passing.add("rank_pattern")  # AdaLoRA goes on pruning
    assert {old[key] == new[key] for key in old.keys() - passing} == {True}


def test_pissa_goes_on_at_its_own_rate(monkeypatch, files, tmp_path):
    """Its factors are large, so that --from takes PiSSA's default rate too, and LoRA+'s ratio may be chosen anew."""
    train(monkeypatch, files, tmp_path / "a", "--method lora --init pissa")
    quick = f"--base {files}/base --data {files}/a.txt --steps 1 --batch 2 --length 32 --lora-plus 4"
    assert call(monkeypatch, f"{quick} --from {tmp_path}/a --out {tmp_path}/b") == 0
    settings = json.loads((tmp_path / "b" / "result.json").read_text())["settings"]
    assert (settings["init"], settings["lr"], settings["lora_plus"]) == ("pissa", 0.001, 4)


def test_nothing_of_an_earlier_run_is_left(monkeypatch, files, tmp_path):
    """A new run in a folder takes the old results away at its start; all may read what it writes, as umask says."""
    train(monkeypatch, files, tmp_path, "--method adalora")
    assert {"result.json", "loss.png", "ranks.svg"} <= {*os.listdir(tmp_path)}
    modes = {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert len(modes) == 1
    monkeypatch.setattr(adamw.AdamW, "step", lambda *_, **__: signal.raise_signal(signal.SIGINT))
    train(monkeypatch, files, tmp_path)
    assert not {"result.json", "loss.png", "ranks.svg"} & {*os.listdir(tmp_path)}


@pytest.mark.parametrize("flags", ["--ranks mlp.*=3", "--init pissa"])
def test_what_memory_does_not_know_is_not_predicted(monkeypatch, files, tmp_path, flags):
    """memory.py counts LoRA of one rank: for another kind the run shows what it measured alone."""
    known = train(monkeypatch, files, tmp_path / "known", "--method lora")
    assert known["predicted_bytes"]["gradients"] == known["measured_bytes"]["gradients"] > 0
    other = train(monkeypatch, files, tmp_path / "other", f"--method lora {flags}")
    assert other["predicted_bytes"] == {} and other["measured_bytes"]["gradients"] > 0


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("method", ["lora", "lora --init pissa", "qlora", "dora", "adalora", "ia3", "bitfit"])
def test_a_merged_model_opens_in_transformers(monkeypatch, files, tmp_path, method, precision):
    """--merge writes a model that transformers opens, with the logits of the base and its adapter."""
    train(monkeypatch, files, tmp_path / "a", f"--method {method}")
    assert call(monkeypatch, f"--merge {tmp_path}/a --out {tmp_path}/m --precision {precision}") == 0
    merged = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "m").float().eval()
    model, encoding = methods.load(str(tmp_path / "a"), torch.float32, CPU)
    ids = torch.tensor([encoding.encode_ordinary("The number 7 comes before 8.")])
    with torch.no_grad():
        found, right = merged(ids).logits, model(ids).logits
    # fp32 adds up in another order; a bf16 weight is off by 2^-9 of itself
    assert (found - right).norm() / right.norm() < (1e-5 if precision == "fp32" else 2e-2)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "m")("7 comes").input_ids == encoding.encode("7 comes")
    names = {"config.json", "model.safetensors", "vocab.json", "merges.txt", "result.json"}
    assert {p.name for p in (tmp_path / "m").iterdir()} == names


REFUSED = [
    ("--merge {files}/one --out {tmp}/m", "adapter cannot be merged: its layers are not linear"),
    ("--merge {files}/base --out {tmp}/m", "no file adapter_config.json"),
    ("--merge {files}/one", "--merge needs --out"),
    ("--merge {files}/one --out {tmp}/m --steps 3", "--merge does not train: leave out --steps"),
    ("--from {files}/base", "to go on from a whole model give it as --base"),
    ("--from {files}/one --rank 3", "belongs to --method lora"),
    ("--from {files}/one --reduction 3", "brings the adapter's own settings: leave out --reduction"),
    ("--from {files}/one --method full", "had adapter"),
    ("--from {files}/one --method lora", "had adapter"),
    ("--from {files}/one --out {files}/one", "give another --out"),
    ("--merge {files}/one --out {files}/one", "give another --out"),
    ("--merge {files}/one --out {files}/base", "its base {files}/base is where this run would write"),
    ("--out nano", "also the name of a base"),
    ("--method full --base scratch --out ./scratch", "also the name of a base"),
    ("--method fusion --adapters {files}/one --zero 3", "use --zero 2"),
    ("--prompt -", "belongs to --generate"),
    ("--clip 0", "would leave nothing of the gradients"),
    ("--steps 3 --epochs 1", "give one of them"),
    ("--steps 3 --out=", "--out is empty"),
    ("--top-k 3", "--top-k belongs to --generate"),
    ("--patience 0", "--patience must be at least 1"),
    ("--method prompt --pack --data {files}/a.jsonl", "--pack joins examples"),
    ("--pack", "--pack is for examples"),
    ("--accuracy --data {files}/a.txt", "--accuracy is of answers"),
    ("--base {files}/one --out {tmp}/m", "is an adapter of the base"),
    ("--generate {files}/one --prompt a --prompts b.txt", "give one of them"),
    ("--generate {files}/one --prompts {files}/none.txt", "no such file"),
]


@pytest.mark.parametrize("flags, says", REFUSED)
def test_wrong_use_is_one_line(monkeypatch, files, tmp_path, capsys, flags, says):
    """What cannot be done is refused in one line with exit code 2, and writes nothing."""
    flags = flags.format(files=files, tmp=tmp_path)
    assert call(monkeypatch, flags) == 2
    error = capsys.readouterr().err.strip()
    assert says.format(files=files) in error.splitlines()[-1] and "Traceback" not in error
    assert not [*tmp_path.iterdir()]


RATES = [
    (60e6, "", 0.001), (40e6, "", 0.005), (60e6, "--lr 0", 0), (40e6, "--init pissa", 0.001),
    (5e6, "--base scratch --method full", 0.001),
]  # fmt: skip


@pytest.mark.parametrize("size, flags, rate", RATES)
def test_large_models_take_smaller_rates(monkeypatch, files, tmp_path, capsys, size, flags, rate):
    """Without --lr a base of over 50 million parameters is trained with a fifth of the method's rate, and so is PiSSA.
    Random weights are trained with 1e-3."""
    default = methods.default_rate
    monkeypatch.setattr(methods, "default_rate", lambda args, _: default(args, size))
    quick = f"--base {files}/base --data {files}/a.txt --steps 1 --batch 2 --length 32 --out {tmp_path} {flags}"
    assert call(monkeypatch, quick) == 0
    assert f"with a learning rate of {rate:g} at its peak" in capsys.readouterr().out
    assert json.loads((tmp_path / "result.json").read_text())["settings"]["lr"] == rate


# ---------------------------------------------------------------------------------------------------------- generation


def test_text_is_what_generate_gives(monkeypatch, files, tmp_path, capsys):
    """--temperature 0 prints the likeliest tokens, --samples several texts, drawn by the seed, each character once."""
    train(monkeypatch, files, tmp_path)
    capsys.readouterr()
    call(monkeypatch, f'--generate {tmp_path} --prompt "The number" --temperature 0 --max-new-tokens 12')
    model, encoding = methods.load(str(tmp_path), torch.float32, CPU)
    ids = torch.tensor([[encoding.eot_token, *encoding.encode("The number")]])
    right = gpt.generate(model, ids, 12, eos_token_id=encoding.eot_token)[0, 1:]
    right = encoding.decode([i for i in right.tolist() if i != encoding.eot_token])
    assert capsys.readouterr().out == right + "\n"
    call(monkeypatch, f'--generate {tmp_path} --prompt "The" --samples 3 --top-k 50 --seed 4')
    texts = capsys.readouterr().out.split("\n---\n")
    assert len(texts) == 3 and len({*texts}) > 1 and all(text.startswith("The") for text in texts)


def test_prompts_from_elsewhere(monkeypatch, files, tmp_path, capsys):
    """--prompt - reads standard input, whole, and --prompts a file, line by line."""
    train(monkeypatch, files, tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO("The\nnumber\n"))
    (tmp_path / "p.txt").write_text("One\n\nTwo\n")
    capsys.readouterr()
    call(monkeypatch, f"--generate {tmp_path} --prompt - --max-new-tokens 3")
    assert capsys.readouterr().out.startswith("The\nnumber")
    call(monkeypatch, f"--generate {tmp_path} --prompts {tmp_path}/p.txt --max-new-tokens 3")
    assert [text[:3] for text in capsys.readouterr().out.split("\n---\n")] == ["One", "Two"]


@pytest.mark.parametrize(
    "asked, line",
    [
        ("chat", '{"messages": [{"role": "user", "content": "%d?"}, {"role": "assistant", "content": "yes"}]}'),
        ("alpaca", '{"instruction": "%d?", "input": "", "output": " yes"}'),
    ],
)
def test_a_question_is_asked_as_in_training(monkeypatch, files, tmp_path, capsys, asked, line):
    """--generate, and a run's samples, put the prompt into the template of the data. --raw does not."""
    (tmp_path / "x.jsonl").write_text("\n".join(line % i for i in range(40)))
    flags = f"--base nano --data {tmp_path}/x.jsonl --length 96 --remember {files}/a.txt --prompt 7?"
    result = train(monkeypatch, files, tmp_path / "o", flags, "--steps 30")
    assert result["asked"] == asked and result["loss_after"] < 1
    sample = capsys.readouterr().out.split("sample after")[1].split("\nparameters")[0]
    assert "7?" in sample and {"chat": "Assistant: yes", "alpaca": "### Response: yes"}[asked] in sample
    call(monkeypatch, f"--generate {tmp_path}/o --prompt 7? --temperature 0")
    assert capsys.readouterr().out == " yes\n"
    call(monkeypatch, f"--generate {tmp_path}/o --prompt 7? --temperature 0 --raw")
    assert capsys.readouterr().out.startswith("7?")
    call(monkeypatch, f"--merge {tmp_path}/o --out {tmp_path}/m")
    capsys.readouterr()
    call(monkeypatch, f"--generate {tmp_path}/m --prompt 7? --temperature 0")
    assert capsys.readouterr().out == " yes\n"


@pytest.mark.parametrize("name, shown", [("a.txt", "a.txt"), ("中.txt", None), ("$x$.txt", r"\$x\$.txt")])
def test_names_in_pictures(name, shown):
    """A name is drawn by a font that has its characters, or escaped where none has; a dollar begins no formula."""
    from matplotlib import rcParams
    from matplotlib.font_manager import fontManager, get_font

    found = pictures.drawable(name)
    has_font = any(ord("中") in get_font(font.fname).get_charmap() for font in fontManager.ttflist)
    assert found == (shown or ("中.txt" if has_font else r"\u4e2d.txt"))
    rcParams["font.family"] = rcParams["font.family"][:1]


# ---------------------------------------------------------------------------------------------------------- forgetting


def test_forgetting(monkeypatch, files, tmp_path, capsys):
    """--remember reports the loss on a text before and after, as evaluated apart; after other training it is higher."""
    old = tmp_path / "old.txt"
    old.write_text("".join(f"Monday {i} is followed by Tuesday.\n\n" for i in range(60)))
    flags = f"--method full --remember {old}"
    first = train(monkeypatch, files, tmp_path / "a", f"{flags} --data {old}", steps="--steps 60")
    capsys.readouterr()
    second = train(monkeypatch, files, tmp_path / "b", f"{flags} --base {tmp_path}/a", steps="--steps 60")
    assert first["known_loss_after"] < first["known_loss_before"]
    assert second["known_loss_before"] == pytest.approx(first["known_loss_after"], rel=1e-6)
    assert second["known_loss_after"] > second["known_loss_before"] + 0.1
    shown = f"{second['known_loss_before']:.3f} before, {second['known_loss_after']:.3f} after"
    assert f"forgetting   {shown}" in capsys.readouterr().out


def test_a_template_forgets_nothing(monkeypatch, files, tmp_path, capsys):
    """P-tuning's template is around prompts: on other text nothing changes, so no loss on it is reported."""
    flags = "--method ptuning --data {files}/a.jsonl --template [P]{{source}}[P] --remember "
    found = train(monkeypatch, files, tmp_path / "a", f"{flags} library", steps="--steps 1")
    assert found["losses"] and found.get("known_loss_after") is None
    capsys.readouterr()
    assert train(monkeypatch, files, tmp_path / "b", f"{flags} {{files}}/a.txt", steps="--steps 1") is None
    assert "--remember: " in capsys.readouterr().err


def test_what_the_embedded_base_knew(monkeypatch, tmp_path):
    """On nano a run reports the loss on source of the library unasked; other bases know what --remember says."""
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--out", str(tmp_path)])
    assert arguments.parse("")[0].remember == ["library"]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--base", "scratch", "--method", "full"])
    assert arguments.parse("")[0].remember is None
    known = load_known(["library"], load_tokenizer("nano"), 128)
    tokens, model = sum(ids.numel() for ids, _ in known.batches(8)), load_base("nano")
    assert 15_000 < tokens < 18_000
    loss, bits = evaluate.evaluate(model, known, process.Ranks(0, 1, CPU))
    assert 0.9 < bits < 1.3  # on all of the library that it has not seen, 1.08 (tests/test_base.py)
