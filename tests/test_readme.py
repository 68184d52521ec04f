# SPDX-License-Identifier: MIT
"""The README's "Paste it": every block of code runs as it stands, beside the files that it names and nothing else."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
SECTION = re.search(r"^## Paste it\n(.*?)^## ", (ROOT / "README.md").read_text("utf-8"), re.M | re.S)[1]
SCRIPT, *BLOCKS = re.findall(r"^```python\n(.*?)^```", SECTION, re.M | re.S)
FILES = ("lora", "qlora", "multi_lora", "dora", "adalora", "ia3", "adapter", "prefix", "prompt", "ptuning", "adamw")

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def pasted(block):
    """The files that a block names in its first line."""
    return block.splitlines()[0].removeprefix("# ").split()


@pytest.fixture
def base(tmp_path):
    """A folder with a small random Llama, and the text that is to be learned."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    config = transformers.LlamaConfig(**sizes, num_key_value_heads=2, max_position_embeddings=64, eos_token_id=None)
    model = transformers.LlamaForCausalLM(config)
    for p in model.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.2)
    model.save_pretrained(tmp_path / "base")
    return tmp_path / "base", torch.randint(4, (4, 16))  # of four words: that much a prompt can say


def test_every_technique_has_its_block():
    """Each technique file stands first in one block, in the order of the reading list."""
    assert [pasted(block)[0] for block in BLOCKS] == [f"{name}.py" for name in FILES]


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: pasted(block)[0])
def test_a_block_runs_beside_the_files_that_it_names(block, base, tmp_path, monkeypatch):
    """In a folder with these files alone, and nanopeft out of reach, the block runs, and the model learns its text."""
    folder, ids = base
    project = tmp_path / "project"
    project.mkdir()
    for file in pasted(block):
        shutil.copy(ROOT / "nanopeft" / file, project / file)
    for module in [name for name in sys.modules if name.partition(".")[0] == "nanopeft"] + ["nanopeft"]:
        monkeypatch.setitem(sys.modules, module, None)  # importing it fails
    for name in FILES + ("quant",):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(project)
    monkeypatch.chdir(project)
    script = re.sub(r'from_pretrained\(".*?"', f"from_pretrained({str(folder)!r}", SCRIPT)
    assert str(folder) in script
    names = {"batches": [ids] * 30}
    try:
        exec(script, names)
        before = names["model"](input_ids=ids, labels=ids).loss.item()
        exec(block, names)
        for file in pasted(block):
            assert Path(sys.modules[file.removesuffix(".py")].__file__) == project / file
    finally:
        for name in FILES + ("quant",):
            sys.modules.pop(name, None)
    model = names.get("tuned", names["model"])
    with torch.no_grad():
        # bf16 logits of at most 4 are off by at most 0.02
        assert model(input_ids=ids, labels=ids).loss.item() < before - 0.1
    if "save_file" in block:
        saved = load_file(project / "adapter_model.safetensors")
        assert sum(t.numel() for t in saved.values()) > 0 and all(t.isfinite().all() for t in saved.values())


def test_every_promise_has_its_test():
    """Each row of the README's table of promises names tests that are there, and each file that it names is there."""
    text = (ROOT / "README.md").read_text("utf-8")
    rows = re.findall(r"^\| .* \| (`test.*) \|$", text[text.index("## What is promised") :], re.M)
    assert len(rows) >= 13
    for row in rows:
        source = ""
        for name in re.findall(r"`([^`]+)`", row):
            path, _, test = name.rpartition("::") if "::" in name else ("", "", name)
            if path or test.endswith(".py"):
                source = (ROOT / ("" if "/" in (path or test) else "tests") / (path or test)).read_text("utf-8")
            assert test.endswith(".py") or f"def {test}(" in source, name


def test_the_files_import_torch_and_the_standard_library_alone():
    """Importing a technique file brings in, beside torch and what torch itself imports, only the standard library."""
    files = (*FILES, "quant", "zero", "recompute", "tensor_parallel", "pipeline")
    code = f"""
import sys, torch
before = set(sys.modules)
for name in {files}:
    __import__("nanopeft." + name)
print(*{{name.partition(".")[0] for name in set(sys.modules) - before}})
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    found = set(done.stdout.split())
    assert "nanopeft" in found and found <= {"nanopeft", "torch", *sys.stdlib_module_names}


def test_the_chinese_readme_says_the_same():
    """Code, but for its comments, and links are those of README.md; each links to the other."""
    texts = [(ROOT / name).read_text("utf-8") for name in ("README.md", "README.zh.md")]
    code, links = [], []
    for text in texts:
        blocks = re.findall(r"^```(\w*)\n(.*?)^```", text, re.M | re.S)
        code.append([(kind, re.sub(r"#.*", "", block).split()) for kind, block in blocks])
        links.append(sorted(re.findall(r"\]\((.*?)\)", re.sub(r"README(.zh)?.md", "README", text))))
    assert code[0] == code[1] and len(code[0]) > 10
    assert links[0] == links[1]
