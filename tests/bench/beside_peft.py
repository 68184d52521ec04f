# SPDX-License-Identifier: MIT
"""A real model trained with our files and with peft: the same batches from the same start, step by step.

    python tests/bench/beside_peft.py FOLDER chat.jsonl [--steps 20] [--only lora qlora prefix prompt train.py]

FOLDER is a causal LM of transformers with a chat template. The files are used as they are pasted, with torch's AdamW,
in fp32. "train.py" runs it on an adapter that peft has made, and then has peft do the same. Shown are the loss at both
ends and the largest difference of a step's two losses; of the saved adapter, opened in peft, that of its logits.
"""

import argparse
import json
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "10000")

from types import SimpleNamespace

import bitsandbytes
import peft
import torch
import torch.nn as nn
import transformers
from safetensors.torch import save_file

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from nanopeft import lora, prefix, prompt, qlora
from nanopeft.trainer import bases, files

TASK = {"task_type": "CAUSAL_LM"}
LORA = peft.LoraConfig(**TASK, r=8, lora_alpha=16, target_modules="all-linear")
TECHNIQUES = {  # how we add it, its state dict and config, and peft's config
    "lora": (lora.add_lora, lora.lora_state_dict, lora.lora_config, LORA),
    "qlora": (qlora.add_qlora, lora.lora_state_dict, lora.lora_config, LORA),
    "prefix": (
        lambda model: prefix.PrefixTuning(model, 20), prefix.prefix_state_dict, prefix.prefix_config,
        peft.PrefixTuningConfig(**TASK, num_virtual_tokens=20),
    ),
    "prompt": (
        lambda model: prompt.PromptTuning(model, 20), prompt.prompt_state_dict, prompt.prompt_config,
        peft.PromptTuningConfig(**TASK, num_virtual_tokens=20),
    ),
}  # fmt: skip


def to_4bit(model):
    """bitsandbytes' layers in the place of all linear ones but the head."""
    head = model.get_output_embeddings()
    for name, layer in [*model.named_modules()]:
        if isinstance(layer, nn.Linear) and layer is not head:
            options = dict(compress_statistics=True, quant_type="nf4")
            new = bitsandbytes.nn.Linear4bit(
                layer.in_features, layer.out_features, layer.bias is not None, compute_dtype=torch.float32, **options
            )
            new.weight = bitsandbytes.nn.Params4bit(layer.weight.data, requires_grad=False, module=new, **options)
            new.bias = layer.bias
            model.set_submodule(name, new.to("cpu"))
    return model


def train(model, batches, rates, **settings):
    """The loss of each step."""
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.AdamW(params, weight_decay=0.0, **settings), []
    for (ids, labels), lr in zip(batches, rates):
        optimizer.param_groups[0]["lr"] = lr
        loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def compare(name, ours, theirs):
    worst = max(abs(a - b) / b for a, b in zip(ours, theirs))
    print(f"{name:9} loss {ours[0]:.4f} to {ours[-1]:.4f}, peft's {theirs[-1]:.4f}; apart by {worst:.1e} at most")


def pasted(name, folder, batches):
    add, state_dict, config, their_config = TECHNIQUES[name]
    new_model = lambda: transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)  # noqa: E731
    torch.manual_seed(0)
    ours, rate = add(new_model()), 0.03 if name in ("prefix", "prompt") else 1e-3
    theirs = peft.get_peft_model((to_4bit if name == "qlora" else lambda model: model)(new_model()), their_config)
    assert state_dict(ours).keys() == peft.get_peft_model_state_dict(theirs).keys()
    peft.set_peft_model_state_dict(theirs, state_dict(ours))
    losses = [train(model.train(), batches, [rate] * len(batches)) for model in (ours, theirs)]
    compare(name, *losses)
    with tempfile.TemporaryDirectory() as out:
        save_file(state_dict(ours), f"{out}/adapter_model.safetensors")
        Path(out, "adapter_config.json").write_text(json.dumps(config(ours) | TASK))
        base = new_model()
        opened = peft.PeftModel.from_pretrained(to_4bit(base) if name == "qlora" else base, out)
        with torch.no_grad():
            a, b = (model.train()(input_ids=batches[0][0], use_cache=False).logits for model in (ours, opened))
    off = (a - b[:, -a.size(1) :]).norm() / a.norm()  # peft's have those of a soft prompt too
    print(f"{'':9} opened in peft, logits are apart by {off.item():.1e} of their norm")


def by_train_py(folder, data, batches, steps):
    with tempfile.TemporaryDirectory() as out:
        base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        theirs = peft.get_peft_model(base, LORA)
        theirs.save_pretrained(f"{out}/start")
        command = f"--from {out}/start --data {data} --steps {steps} --batch 4 --length 96 --lr 1e-3 --out {out}/o"
        subprocess.run([sys.executable, ROOT / "train.py", *command.split()], check=True, stdout=subprocess.DEVNULL)
        ours = json.loads(Path(out, "o", "result.json").read_text())["losses"]
    schedule = runpy.run_path(str(ROOT / "train.py"))["learning_rate"]
    rates = [schedule(step, SimpleNamespace(lr=1e-3, steps=steps)) for step in range(steps)]
    compare("train.py", ours, train(theirs.train(), batches, rates, betas=(0.9, 0.95)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("data")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--only", nargs="+", choices=[*TECHNIQUES, "train.py"], default=[*TECHNIQUES, "train.py"])
    args = parser.parse_args()
    dataset, _ = files.load(args.data, bases.load_tokenizer(args.folder), 96)
    batches = [dataset.sample(4, 4 * step, 0) for step in range(args.steps)]
    for name in args.only:
        if name in TECHNIQUES:
            pasted(name, args.folder, batches)
        else:
            by_train_py(args.folder, args.data, batches, args.steps)
