# SPDX-License-Identifier: MIT
"""The tables of nanopeft/memory.py for the memory calculator, as a script: a page opened from the disk cannot fetch."""

import json

from nanopeft import memory

TABLES = "MODELS", "KEYS", "LINEARS", "SETTINGS", "TRAINED", "OWN", "TRAINING", "PARTS", "BYTES", "LOSS_CHUNK"


def script():
    return f"const DATA = {json.dumps({name: getattr(memory, name) for name in TABLES}, ensure_ascii=False)};\n"
