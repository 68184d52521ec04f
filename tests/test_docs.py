# SPDX-License-Identifier: MIT
"""The memory calculator of docs/ computes what nanopeft/memory.py does, and the pages show what the source says."""

import json
import math
import random
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nanopeft import memory

ROOT = Path(__file__).parents[1]
DOCS, SITE = ROOT / "docs", ROOT / "site"
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


# ---------------------------------------------------------------------------------------- pages of changed sources


def page_text(tree, page):
    """One page as plain text, made of a copy of the sources; None if it cannot be built."""
    made = tree / "docs" / "made"
    pages = tree / "docs" / "one"
    pages.mkdir(exist_ok=True)
    text = (DOCS / "pages" / f"{page}.md").read_text("utf-8")
    without_figures = [line for line in text.splitlines(True) if not line.startswith("![")]
    (pages / "index.md").write_text("".join(without_figures), "utf-8")
    quiet = ["-q", "-E", "-d", made / "doctrees", "-D", "suppress_warnings=myst.xref_missing", "-b", "text"]
    command = [sys.executable, "-m", "sphinx", *quiet, "-c", tree / "docs", pages, made / "text"]
    done = subprocess.run([*map(str, command)], capture_output=True, cwd=tree)
    return (made / "text" / "index.txt").read_text("utf-8") if done.returncode == 0 else None


CONSTANTS = [  # page, file, what stands there, what is put there instead, and what the page says then
    ("zero", "zero.py", "BUCKET = 1 << 20", "BUCKET = 1 << 21", "2,097,152 numbers here"),
    ("quant", "quant.py", "block_size=64", "block_size=32", "NF4, blocks of 32"),
    ("memory", "memory.py", '"mixed precision": ("2*Ψ", "2*Ψ", "(4 + 4 + 4)*Ψ")',
     '"mixed precision": ("2*Ψ", "2*Ψ", "(4 + 4 + 8)*Ψ")', "(4 + 4 + 8)*Ψ"),
]  # fmt: skip


@pytest.mark.thorough
@pytest.mark.parametrize("page, file, before, after, shown", CONSTANTS)
def test_a_changed_constant_changes_the_page(tmp_path, page, file, before, after, shown):
    """With another constant in the source the page shows the new one, or its build fails."""
    pytest.importorskip("sphinx")
    pytest.importorskip("myst_parser")
    for folder in ("nanopeft", "docs", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("made", "site", "__pycache__"))
    as_it_is = page_text(tmp_path, page)
    assert as_it_is and shown not in as_it_is
    source = tmp_path / "nanopeft" / file
    source.write_text(source.read_text("utf-8").replace(before, after), "utf-8")
    changed = page_text(tmp_path, page)
    assert changed is None or shown in changed


# ------------------------------------------------------------------------------------------------- in a browser

in_chromium = pytest.mark.skipif(
    not (shutil.which("chromium") and (SITE / "index.html").exists()),
    reason="needs chromium, and what python docs/build.py makes",
)


def in_browser(url):
    """(the page after its scripts have run, what they complained of)."""
    quiet = ["--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files", "--enable-logging=stderr"]
    command = ["chromium", *quiet, "--virtual-time-budget=20000", "--dump-dom", url]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=300)
    return done.stdout, [line for line in done.stderr.splitlines() if ":CONSOLE" in line]


@pytest.mark.thorough
@in_chromium
@pytest.mark.parametrize(
    "page, shown",
    [
        ("index.html", "nanopeft"), ("zh/index.html", "nanopeft"), ("lora.html", "<math"),
        ("calculator.html", "GB"), ("zh/calculator.html", "峰值"),
        ("search.html?q=singular", "lora.html"), ("zh/search.html?q=流水线+气泡", "pipeline.html"),
    ],
)  # fmt: skip
def test_pages_work_from_the_disk(page, shown):
    """A page opens in a browser from file://; its scripts run without a complaint and show what they should."""
    path, _, query = page.partition("?")
    found, complaints = in_browser((SITE / path).as_uri() + f"?{query}" * bool(query))
    assert shown in found[found.index("<article") :] and not complaints, complaints


WIDTHS = """<script>
const pages = PAGES, wide = [];
async function look() {
  for (const page of pages) {
    const frame = document.createElement("iframe");
    frame.style.width = "390px";
    frame.src = page;
    document.body.append(frame);
    await new Promise(done => frame.onload = done);
    const width = frame.contentDocument.documentElement.scrollWidth;
    if (width > 390) wide.push(`${page}: ${width}`);
    frame.remove();
  }
  document.body.innerHTML = `<p id="done">${wide.join(", ")}</p>`;
}
</script><body onload="look()">"""


@pytest.mark.thorough
@in_chromium
def test_no_page_is_wider_than_a_phone(tmp_path):
    """On a screen of 390 pixels no page has to be moved sideways: wide code and tables scroll in themselves."""
    pages = [path.as_uri() for path in SITE.rglob("*.html")]
    (tmp_path / "look.html").write_text(WIDTHS.replace("PAGES", json.dumps(pages)), "utf-8")
    found, _ = in_browser((tmp_path / "look.html").as_uri())
    assert len(pages) > 40 and '<p id="done"></p>' in found, found[-2000:]
