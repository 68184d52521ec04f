# SPDX-License-Identifier: MIT
"""The memory calculator of docs/ computes what nanopeft/memory.py does."""

import json
import math
import random
import runpy
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from nanopeft import memory

DOCS = Path(__file__).parents[1] / "docs"
FILES = [DOCS / "static" / name for name in ("calculator-words.js", "calculator.js")]
EACH = """
const used = new Set();
console.log(JSON.stringify(RUNS.map(([config, run]) => {
  try {
    const found = stepBytes(config, run)[0];
    Object.values(found).flat().forEach(([what]) => used.add(what));
    return found;
  } catch (error) {
    if (!(error instanceof Wrong)) throw error;
    return error.message;
  }
}).concat([[...used], Object.keys(WORDS.zh)])));
"""


def calculate(runs):
    """[{part: items} or what is wrong] of each (config, run), the items' names, and those with Chinese."""
    if not shutil.which("node"):
        pytest.skip("needs node")
    data = runpy.run_path(str(DOCS / "calculator.py"))["script"]()
    script = "".join([data, f"const RUNS = {json.dumps(runs)};", *(path.read_text("utf-8") for path in FILES), EACH])
    done = subprocess.run(["node", "-"], input=script, capture_output=True, text=True, encoding="utf-8", check=True)
    return json.loads(done.stdout)


def draw(rng, method):
    """A config.json and a run: of memory.MODELS, or of a random shape; a few of them cannot be."""
    kind, H = rng.choice(["gpt2", "llama"]), rng.randint(1, 8)
    sizes = {"L": rng.randint(1, 9), "d": H * rng.randint(1, 20), "H": H, "V": rng.randint(2, 70000)}
    sizes |= {"P": rng.randint(8, 4000), "f": rng.choice([None, rng.randint(1, 999)]), "kv": rng.randint(1, H)}
    config = {"model_type": kind} | {key: sizes[letter] for letter, key in memory.KEYS[kind].items()}
    config |= rng.choice([{}, {}, {}, {"tie_word_embeddings": True}, {"n_head": 7, "attention_bias": True}])
    config = rng.choice([config, rng.choice([*memory.MODELS.values()])])
    ends = [name.rpartition(".")[2] for group in memory.LINEARS[kind] for name in group]
    some = {
        "targets": lambda: rng.choice(["all-linear", rng.sample(ends, rng.randint(1, 4))]),
        "quant": lambda: rng.choice(["nf4", "int8"]), "placement": lambda: rng.choice(["houlsby", "pfeiffer"]),
        "encoder": lambda: rng.choice(["lstm", "mlp"]), "template": lambda: rng.random() < 0.5,
    }  # fmt: skip
    settings = {
        name: some[name]() if name in some else rng.randint(1, 40)
        for name in memory.SETTINGS[method]
        if rng.random() < 0.7
    }
    return config, {
        "method": method, "precision": rng.choice([*memory.BYTES]), "batch": rng.randint(1, 99), "length":
        rng.randint(1, 600), "accumulate": rng.randint(1, 2), "recompute": rng.choice([0, 0, 1, 2, 5]),
        "settings": settings,
    }  # fmt: skip


def python(config, run):
    """The letters, and what memory.py predicts, or None for what it refuses."""
    run = dict(run)
    settings = run.pop("settings")
    try:
        s = memory.run_of(memory.sizes_of(config), **run, **settings)
    except memory.Error:
        return None, None
    return s, memory.step_bytes(s)


def moments(counted):
    return {what for step in counted if step for what, _, _ in step["peak"]}


def as_lists(found):
    return {part: [list(item) for item in items] for part, items in found.items()}


def test_the_calculator_computes_what_memory_does(monkeypatch):
    """Over 1,000 random models and runs every item has the same name, formula and bytes, and a name in Chinese."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(memory, "lstm_bytes", lambda s: 0)  # the page leaves it out, and says so
    rng, methods = random.Random(0), [*memory.SETTINGS]
    runs = [draw(rng, methods[i % len(methods)]) for i in range(1000)]
    *found, used, chinese = calculate(runs)
    counted = [step for _, step in (python(*run) for run in runs)]
    assert 300 < sum(step is not None for step in counted) < 1000
    for run, step, ours in zip(runs, counted, found):
        assert isinstance(ours, str) if step is None else ours == as_lists(step), run
    names = {part for what in used for part in (what.split(": ", 1) if what in moments(counted) else [what])}
    assert names - {*chinese} == {"logits", "x", "x Aᵀ", "m", "v"}  # the same in Chinese


def test_the_calculator_divides_what_zero_does(monkeypatch):
    """ZeRO divides the items of the parts that memory.TRAINING divides, and offload moves the optimizer's."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    how = [(method, N, offload) for method in ("full", "lora", "qlora") for N in range(4) for offload in (False, True)]
    run = {"precision": "bf16", "batch": 2, "length": 64, "devices": 7}
    runs = [(memory.MODELS["gpt2"], run | dict(zip(("method", "stage", "offload"), one))) for one in how]
    for (method, stage, offload), found in zip(how, calculate(runs)):
        s = memory.run_of(memory.find_sizes("gpt2"), method, "bf16", 2, 64)
        alone, name = memory.step_bytes(s), f"ZeRO {stage}{' + offload' * offload}"
        peak = memory.peak(s, {part: found[part] for part in (*memory.PARTS, "activations")})
        assert [found["peak"], found["activations"]] == [*as_lists({"": peak, "a": alone["activations"]}).values()]
        for part, formula in zip(memory.PARTS, memory.TRAINING[f"ZeRO {stage}"]):
            moved = "offloaded" if offload and part == "optimizer" else part
            expected = [math.ceil(size / 7) if "/N" in formula else size for _, _, size in alone[part]]
            assert [size for _, _, size in found[moved]] == expected
        if method == "full":
            for part, _, size in memory.training(memory.find_sizes("gpt2"), 7)[name]:
                assert 0 <= memory.total(found[part]) - size <= 3
