# SPDX-License-Identifier: MIT
"""Could LoRA go on any layer? Where it is put, at about as many trained numbers each time.

    python experiments/layers.py        some 45 minutes on two cores; the same command goes on after a stop
"""

import run
from matplotlib.figure import Figure

BUDGET, BLOCKS = 196_608, range(6)  # r = 8 on all linear layers of the embedded base
# in + out
SIZES = {"attn.c_attn": 256 + 768, "attn.c_proj": 256 + 256, "mlp.c_fc": 256 + 1024, "mlp.c_proj": 1024 + 256}
ATTENTION, MLP, ALL = [*SIZES][:2], [*SIZES][2:], [*SIZES]


def lora(kinds, blocks=BLOCKS, embedding=False):
    """Flags that put LoRA on these layers of these blocks, with the rank that makes up the budget."""
    targets = [f"h.{block}.{kind}" for block in blocks for kind in kinds] + ["wte"] * embedding
    rank = round(BUDGET / (sum(SIZES[kind] for kind in kinds) * len(blocks) + (3072 + 256) * embedding))
    return f"--rank {rank} --alpha {2 * rank} --targets {','.join(targets)}"


SETTINGS = {"all linear": lora(ALL), "all, embedding too": lora(ALL, embedding=True), "attention": lora(ATTENTION),
            "c_attn (q, k, v)": lora(["attn.c_attn"]), "MLP": lora(MLP), "lower half": lora(ALL, range(3)),
            "upper half": lora(ALL, range(3, 6))}  # fmt: skip
SETTINGS |= {f"block {block} alone": lora(ALL, [block]) for block in BLOCKS}


def tables(found):
    return run.settings_table(found)


def draw(found):
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    run.dots(figure.subplots(), found)
    return figure


if __name__ == "__main__":
    found = run.run("layers", SETTINGS, "--method lora --precision bf16 --steps 200")
    print(tables(found))
    run.save(draw(found), "layers")
