# SPDX-License-Identifier: MIT
"""adapter_config.json, ours or peft's: what it asks for, as arguments of a technique file's function, or Error."""

import re

from nanopeft.trainer import Error


def require(config, allowed):
    """Raises Error for a key whose value is not among the allowed ones. The first of these is the default."""
    for key, values in allowed.items():
        if config.get(key, values[0]) not in values:
            raise Error(f"adapter_config.json: {key} = {config[key]!r} is not supported, only {values}")


def read_fields(config, fields):
    """{argument: value} by rows of (argument, key, types, default)."""
    found = {}
    for argument, key, types, default in fields:
        found[argument] = value = config.get(key, default)
        # isinstance would take True for a rank of 1; and torch has no sizes beyond 64 bits
        if type(value) not in types or (type(value) is int and abs(value) >= 2**31):
            raise Error(f"adapter_config.json: {key} cannot be {value!r}")
    return found


def check_targets(targets):
    """Names, or a regular expression, which with many repeats may take years to match."""
    if isinstance(targets, list) and not all(isinstance(target, str) for target in targets):
        raise Error(f"adapter_config.json: target_modules must be a list of names, not {targets!r}")
    pattern = targets if isinstance(targets, str) else ""
    repeats, choices = re.findall(r"[*+?{]", pattern), re.findall(r"[|(]", pattern)
    if len(repeats) > 4 or len(choices) > 12 or re.search(r"\)[*+{]", pattern):
        message = "has too many repeats or choices, or repeats a group: list the names"
        raise Error(f"adapter_config.json: {pattern!r} {message}")


# What peft's LoRA can do and lora.py does not: each must be absent or empty in a config.
UNSUPPORTED = (
    "alora_invocation_tokens", "alpha_pattern", "arrow_config", "exclude_modules", "kasa_config", "layer_replication",
    "layers_to_transform", "lora_bias", "monteclora_config", "target_parameters",
    "trainable_token_indices", "use_bdlora", "use_qalora",
)  # fmt: skip


def lora_arguments(config):
    """add_lora's arguments."""
    for key in UNSUPPORTED:
        if config.get(key):
            raise Error(f"adapter_config.json: {key} = {config[key]!r} is not supported")
    # The other ways to start (pissa, olora, corda, loftq, ...) change the base weights as well
    require(config, {"bias": ["none"], "init_lora_weights": [True, False, "gaussian", "orthogonal", "eva"]})
    fields = [
        ("targets", "target_modules", (str, list), None), ("r", "r", (int,), 8),
        ("alpha", "lora_alpha", (int, float), 8), ("dropout", "lora_dropout", (int, float), 0.0),
        ("ranks", "rank_pattern", (dict,), {}), ("rslora", "use_rslora", (bool,), False),
    ]  # fmt: skip
    arguments = read_fields(config, fields) | head_arguments(config)
    for targets in (arguments["targets"], *arguments["ranks"]):
        check_targets(targets)
    return arguments


def adalora_arguments(config):
    """add_adalora's arguments. Its file holds the triplets that are left of init_r."""
    require(config, {"bias": ["none"]})
    fields = [
        ("targets", "target_modules", (str, list), None), ("r", "init_r", (int,), 12),
        ("alpha", "lora_alpha", (int, float), 8), ("dropout", "lora_dropout", (int, float), 0.0),
    ]  # fmt: skip
    arguments = read_fields(config, fields) | head_arguments(config)
    check_targets(arguments["targets"])
    return arguments


def ia3_arguments(config):
    """add_ia3's arguments. peft names in target_modules those of feedforward_modules too."""
    fields = [("targets", "target_modules", (list,), None), ("feedforward", "feedforward_modules", (list,), None)]
    arguments = read_fields(config, fields)
    for targets in arguments.values():
        check_targets(targets)
    arguments |= head_arguments(config)
    arguments["targets"] = [name for name in arguments["targets"] if name not in arguments["feedforward"]]
    return arguments


def adapter_arguments(config):
    """add_adapter's arguments."""
    fields = [
        ("targets", "target_modules", (str, list), None), ("placement", "placement", (str,), None),
        ("reduction", "reduction", (int, type(None)), None), ("bottleneck", "bottleneck", (int, type(None)), None),
        ("activation", "activation", (str,), None),
    ]  # fmt: skip
    arguments = read_fields(config, fields) | head_arguments(config)
    check_targets(arguments["targets"])
    return arguments


def head_arguments(config):
    """Modules that were trained whole. A file that does not speak of them has none, whatever the model's are called."""
    names = config.get("modules_to_save") or []
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise Error(f"adapter_config.json: modules_to_save must be a list of names, not {names!r}")
    return {"modules_to_save": tuple(names)}


def fusion_arguments(config):
    """add_fusion's arguments. The adapters' numbers are in the fusion's own file."""
    adapters = config.get("adapters")
    if not isinstance(adapters, list) or not adapters or not all(isinstance(one, dict) for one in adapters):
        raise Error(f"adapter_config.json: adapters must be a list of configurations, not {adapters!r}")
    for one in adapters:
        adapter_arguments(one)
    return {"adapters": [(one, None) for one in adapters]} | head_arguments(config)


CAUSAL_LM = {"task_type": ["CAUSAL_LM", None], "num_transformer_submodules": [1, None], "modules_to_save": [None, []]}


def prefix_arguments(config):
    """PrefixTuning's arguments. An MLP that the prefix was trained through is in no file."""
    require(config, CAUSAL_LM | {"prefix_projection": [False, True], "init_weights": [None, "zero"]})
    return read_fields(config, [("n_tokens", "num_virtual_tokens", (int,), None)])


def prompt_arguments(config):
    """PromptTuning's arguments. The file's vectors replace whatever is drawn at the start."""
    require(config, CAUSAL_LM | {"prompt_tuning_init": ["RANDOM", "SAMPLE_VOCAB", "TEXT"]})
    return read_fields(config, [("n_tokens", "num_virtual_tokens", (int,), None)])


def ptuning_arguments(config):
    """PTuning's arguments, with the smallest encoder: the file holds the vectors that the encoder made."""
    require(config, CAUSAL_LM | {"encoder_reparameterization_type": ["MLP", "LSTM"]})
    fields = [("n_tokens", "num_virtual_tokens", (int,), None)]
    if config.get("peft_type") == "P_TUNING_TEMPLATE":
        fields += [("template", "template", (str, type(None)), None), ("pseudo_id", "pseudo_id", (int,), None)]
    return read_fields(config, fields) | {"encoder": "mlp", "hidden": 1}
