# SPDX-License-Identifier: MIT
"""All that a run reads from the disk and writes to it. Only here is a file distrusted: it may be damaged or hostile.

    a base          config.json, model.safetensors: a GPT-2 as Hugging Face stores it (tokenizer: tokenizer.py)
    an adapter      adapter_config.json, adapter_model.safetensors: in peft's format
    a run's state   state.safetensors: trained parameters, Adam's state and the progress, with a checksum
"""

import itertools
import json
import math
import os
import re
import shutil
import zlib
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from filelock import FileLock, Timeout  # torch brings it
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from nanopeft import gpt
from nanopeft.trainer import Error, Failure

HUB = {
    "gpt2": "openai-community/gpt2", "gpt2-medium": "openai-community/gpt2-medium",
    "gpt2-large": "openai-community/gpt2-large", "gpt2-xl": "openai-community/gpt2-xl",
    "distilgpt2": "distilbert/distilgpt2",
}  # fmt: skip


# --------------------------------------------------------------------------------------------------------------- bases


def load_gpt(name_or_dir="nano", dtype=torch.float32):
    """The embedded base ("nano"), a folder in Hugging Face's GPT-2 format, or one of HUB by name.

    Its attribute checksum is of the numbers as they are stored, whatever dtype they are loaded in.
    """
    folder = find_checkpoint(name_or_dir)
    config = read_config(folder / "config.json")
    with torch.device("meta"):  # shapes without memory, until the file's tensors are put in their place
        model = gpt.GPT(**config)
    state, total = {}, zlib.crc32(json.dumps(config).encode())
    try:
        stored = find_tensors(folder)
        for key, p in model.named_parameters():
            path, name = stored.pop(key.removeprefix("transformer."), (folder, None))
            if name is None:
                raise Error(f"{folder} has no tensor {key}")
            # Opened for each tensor: closing unmaps the file's pages, so that memory never holds the model twice
            with safe_open(path, "pt") as file:
                tensor = file.get_tensor(name)
                fits = tensor.is_floating_point() and tensor.element_size() > 1  # 8 bits would need a scale
                if tensor.shape != (p.shape[::-1] if is_conv1d(key) else p.shape) or not fits:
                    found = f"{name} {list(tensor.shape)} of {tensor.dtype}"
                    raise Error(f"{path} has {found}, which does not fit config.json")
                total = zlib.crc32(bits(tensor), total)
                tensor = tensor.t() if is_conv1d(key) else tensor
                state[key] = torch.empty(p.shape, dtype=dtype).copy_(tensor)
    except (SafetensorError, OSError) as error:
        raise Error(f"{folder}: model.safetensors, or a shard of it, cannot be read: {error}") from None
    # Older checkpoints carry the causal mask, and some the tied head; anything else, say a layer more, is a mistake
    known = (".attn.bias", ".attn.masked_bias", "lm_head.weight")
    left = [name for _, name in stored.values() if not name.endswith(known)]
    if left:
        raise Error(f"{folder} has tensors that config.json has no place for: {', '.join(left[:3])}")
    model.load_state_dict(state, assign=True, strict=False)
    model.tie_weights()
    model.checksum = f"{total:08x}"
    return model


def find_tensors(folder):
    """{name without "transformer.": (file, name there)} of model.safetensors, or else of shards."""
    paths, found = [folder / "model.safetensors"], {}
    if not os.path.isfile(paths[0]):  # shards' index is not read: each says itself which tensors it has
        paths = sorted(folder.glob("model-*-of-*.safetensors")) or paths
    for path in paths:
        if not os.path.isfile(path):  # a pipe would be waited for
            raise Error(f"{path}: no such file")
        with safe_open(path, "pt") as file:
            for name in file.keys():
                key = name.removeprefix("transformer.")
                if key in found:
                    raise Error(f"{path} has {name}, and {found[key][0].name} has it as well")
                found[key] = path, name
    return found


def save_gpt(model, folder):
    """Writes config.json and model.safetensors, as transformers' GPT2LMHeadModel reads them."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["GPT2LMHeadModel"], "activation_function": "gelu_new", "n_inner": None,
        "embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "tie_word_embeddings": True,
        "dtype": str(model.transformer.wte.weight.dtype).removeprefix("torch."), **vars(model.config),
    }  # fmt: skip
    state = model.state_dict()
    del state["lm_head.weight"]  # it is wte's
    state = {key: (t.t() if is_conv1d(key) else t).contiguous() for key, t in state.items()}
    write(folder / "model.safetensors", lambda path: save_file(state, path, metadata={"format": "pt"}))
    write(folder / "config.json", (json.dumps(config, indent=2) + "\n").encode())


def is_conv1d(key):
    """Whether GPT-2's checkpoints hold this weight as a Conv1D, that is (in, out)."""
    return key.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))


def find_checkpoint(name_or_dir):
    """The folder of a base: config.json, model.safetensors and, mostly, vocab.json and merges.txt."""
    if name_or_dir == "nano":
        return Path(gpt.__file__).parent / "base"
    if name_or_dir in HUB and not os.path.isdir(name_or_dir):
        files = ["config.json", "model.safetensors", "vocab.json", "merges.txt"]
        try:
            from huggingface_hub import snapshot_download
            from huggingface_hub.errors import HTTPError  # of its HTTP client, whichever that is

            return Path(snapshot_download(HUB[name_or_dir], allow_patterns=files))
        except ImportError:
            where = "is on the Hugging Face hub: pip install \"nanopeft[hub]\""
        except (OSError, ValueError, HTTPError) as error:
            where = f"cannot be fetched from the Hugging Face hub ({type(error).__name__}): go online"
        raise Error(f"{name_or_dir} {where}, or give a folder that holds {', '.join(files)}")
    folder = Path(name_or_dir)
    if not os.path.isfile(folder / "config.json"):  # Path.is_file raises if the name is too long
        if os.path.isfile(folder / "adapter_config.json"):
            base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
            makes = "merge_lora and save_gpt make a base of a LoRA"
            raise Error(f"{folder} is an adapter of the base {base!r} and no base itself: --base {base}, or {makes}")
        known = ", ".join(HUB)
        raise Error(f"no base {str(folder)!r}: give nano, a folder with config.json and model.safetensors, or {known}")
    read_config(folder / "config.json")  # before the tokenizer: a Llama's is another
    return folder


def read_json(path):
    """The object in a JSON file."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise Error(f"{path} is no JSON file: {error}") from None
    if not isinstance(found, dict):
        raise Error(f"{path} must hold an object, not {found!r}")
    return found


def read_config(path):
    """The arguments of GPT from a config.json; what this GPT does not do is refused."""
    config = read_json(path)
    if (kind := config.get("model_type")) != "gpt2":
        raise Error(f"{path} is of a model of type {kind!r}, and a base is a GPT-2: its model_type is 'gpt2'")

    sizes = {"vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12}
    for key, default in sizes.items():
        sizes[key] = config.get(key, default)
        most = 1000 if key == "n_layer" else 1 << 20  # the layers are built before the tensors are read
        if type(sizes[key]) is not int or not 0 < sizes[key] <= most:
            raise Error(f"{path}: {key} must be an integer from 1 to {most}, not {sizes[key]!r}")
    required = {
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"), "n_inner": (None, 4 * sizes["n_embd"]),
        "scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,), "tie_word_embeddings": (True,),
    }  # fmt: skip
    for key, allowed in required.items():
        if config.get(key, allowed[0]) not in allowed:
            raise Error(f"{path}: {key} must be {' or '.join(map(repr, allowed))}, not {config[key]!r}")
    epsilon = config.get("layer_norm_epsilon", 1e-5)
    if type(epsilon) is not float or not 0 < epsilon < math.inf:
        raise Error(f"{path}: layer_norm_epsilon must be a positive float, not {epsilon!r}")
    tokens = {key: config.get(key, sizes["vocab_size"] - 1) for key in ("bos_token_id", "eos_token_id")}
    for key, token in tokens.items():
        if type(token) is not int or token < 0:
            raise Error(f"{path}: {key} must be the number of a token, not {token!r}")
    return {**sizes, "layer_norm_epsilon": epsilon, **tokens}


# ------------------------------------------------------------------------------------------------------------ adapters


def write(path, content):
    """A file that is there whole or not at all. content: bytes, or a function that writes to the path it is given."""
    new = path.with_name(path.name + ".new")
    try:
        new.write_bytes(content) if isinstance(content, bytes) else content(new)
        os.replace(new, path)
    except (OSError, SafetensorError) as error:  # the disk is full, say
        new.unlink(missing_ok=True)
        raise Failure(f"{path} cannot be written, and stays as it was: {error}; --resume then goes on") from None


@contextmanager
def claim(folder, rank=0):
    """Makes a run's folder of results and keeps other runs out of it, until this one ends or is killed."""
    lock = FileLock(Path(folder, f".lock{rank}"))
    try:
        os.makedirs(folder, exist_ok=True)
        open(lock.lock_file, "ab").close()  # acquire would wait for a folder that can be written to
        lock.acquire(timeout=0)
    except Timeout:
        raise Error(f"another run is at work in {folder}: wait until it ends, or give another --out") from None
    except (OSError, NotImplementedError) as error:
        raise Error(f"--out {folder} cannot be written to: {error}") from None
    try:
        yield
    finally:
        with suppress(OSError):  # results are there; and Windows leaves the deletion of an open file to release
            os.unlink(lock.lock_file)
            os.rmdir(folder)
        lock.release()


def check_space(folder, shapes):
    """Error if the disk has no space for a run's state: master copy, m and v in fp32."""
    size = 12 * sum(math.prod(shape) for shape in shapes.values())
    if (free := shutil.disk_usage(folder).free) < size:
        raise Error(f"--out {folder} has {free / 1e6:,.1f} MB free, and a state takes {size / 1e6:,.1f} MB")


def save_adapter(folder, state, config, base_checksum):
    """base_checksum goes into the tensors' file: peft passes over its metadata, and warns of keys in a config."""
    state = {key: p.cpu().contiguous() for key, p in state.items()}
    metadata = {"base_checksum": base_checksum}  # one key: safetensors writes several in any order
    write(folder / "adapter_config.json", json.dumps(config, indent=2).encode())
    write(folder / "adapter_model.safetensors", lambda path: save_file(state, path, metadata=metadata))


def read_adapter(folder):
    """(config, state, checksum of the base it was trained on or None) of an adapter's folder."""
    folder = Path(folder)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not os.path.isfile(folder / name):  # a pipe would be waited for
            raise Error(f"{folder} holds no adapter: there is no file {name}")
    config = read_json(folder / "adapter_config.json")
    try:
        with safe_open(folder / "adapter_model.safetensors", "pt") as file:
            base_checksum = (file.metadata() or {}).get("base_checksum")
            state = {key: file.get_tensor(key).clone() for key in file.keys()}  # not mapped
    except (OSError, ValueError, SafetensorError) as error:
        raise Error(f"{folder} holds no adapter: {error}") from None
    for key, t in state.items():
        if not t.is_floating_point() or t.element_size() < 2:
            raise Error(f"{folder / 'adapter_model.safetensors'}: {key} is {t.dtype}, which holds no trained numbers")
    return config, state, base_checksum


# What follows reads one kind of adapter_config.json, ours or peft's, into arguments for the technique file's function.


def require(config, allowed):
    """Raises Error for a key whose value is not among the allowed ones. The first of these is the default."""
    for key, values in allowed.items():
        if config.get(key, values[0]) not in values:
            raise Error(f"adapter_config.json: {key} = {config[key]!r} is not supported, only {values}")


def read_fields(config, fields):
    """{argument: value} by rows of (argument, key, types, default)."""
    found = {}
    for argument, key, types, default in fields:
        found[argument] = config.get(key, default)
        if type(found[argument]) not in types:  # isinstance would take True for a rank of 1
            raise Error(f"adapter_config.json: {key} cannot be {found[argument]!r}")
    return found


def check_targets(targets):
    """Names, or a regular expression: that tries each way to share a name among its repeats, and may take years."""
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
    "trainable_token_indices", "use_bdlora", "use_dora", "use_qalora",
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
        ("modules_to_save", "modules_to_save", (list, type(None)), None),
    ]  # fmt: skip
    arguments = read_fields(config, fields)
    for targets in (arguments["targets"], *arguments["ranks"]):
        check_targets(targets)
    if not all(isinstance(name, str) and name for name in arguments["modules_to_save"] or []):
        raise Error(f"adapter_config.json: modules_to_save cannot be {arguments['modules_to_save']!r}")
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
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
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


# --------------------------------------------------------------------------------------------------------- run's state


@dataclass
class Progress:
    """How far a run has come: what JSON can hold of its state."""

    settings: dict
    checksums: dict = field(default_factory=dict)  # of what the settings only name, and others may change
    step: int = 0
    losses: list = field(default_factory=list)  # nats per token, one for each step
    tokens: int = 0
    seconds: float = 0.0  # of the whole run
    training_seconds: float = 0.0  # of the loop alone
    peak: int = 0  # bytes
    world: int = 1  # ranks
    loss_scale: float = 1.0
    clean: int = 0  # steps since the loss scale was changed
    skipped: int = 0  # steps on which fp16 overflowed
    before: dict = field(default_factory=dict)  # loss, bits per byte, accuracy and a sample of the untouched base

    def go_on_with(self, checksums, world):
        """Takes what the run goes on with in the place of what it had; yields a line on each difference."""
        if self.world != world:
            yield f"it is of {self.world} processes, and here are {world}: sums will round otherwise"
        if changed := [f"--{name}" for name, value in checksums.items() if self.checksums.get(name, value) != value]:
            yield f"{', '.join(changed)}: not what it was; the figures before training are of the old one"
        self.checksums, self.world = checksums, world


def bits(tensor):
    """The tensor's bytes, not copied if it is contiguous and on the CPU."""
    return tensor.cpu().reshape(-1).view(torch.uint8).numpy()


def checksum(tensors, text):
    """Of all that a state holds: names, types, shapes, bits, and the text."""
    total = zlib.crc32(text.encode())
    for key, t in sorted(tensors.items()):
        total = zlib.crc32(f"{key} {t.dtype} {tuple(t.shape)}".encode(), total)
        total = zlib.crc32(bits(t), total)
    return f"{total:08x}"


def save_state(path, progress, states):
    """states: {parameter name: {"master", "m", "v": tensor}}, as an engine's state_dict gives them."""
    tensors = {f"{key} {name}": t for name, kept in states.items() for key, t in kept.items() if torch.is_tensor(t)}
    tensors = {key: t.contiguous() for key, t in tensors.items()}
    text = json.dumps(asdict(progress))
    metadata = {"run": text, "checksum": checksum(tensors, text)}
    write(path, lambda new: save_file(tensors, new, metadata=metadata))


def set_aside(path, progress, ranks):
    """Gives the state of a run that has not ended another name, where a new run would replace it."""
    result = path.with_name("result.json")
    ended = result.exists() and path.exists() and result.stat().st_mtime >= path.stat().st_mtime
    if path.exists() and not ended and progress.step == 0 and ranks.rank == 0:
        names = (path.with_name(f"state-{n}.safetensors") for n in itertools.count(1))
        kept = next(name for name in names if not name.exists())
        os.replace(path, kept)
        ranks.say(f"the state of a run that did not end is kept as {kept}; as {path.name}, --resume goes on from it")


def load_state(path, settings, shapes, checksums, force):
    """(progress, states) that save_state wrote; Error if it was another run, by its settings and parameters' shapes.

    Error as well if what the settings name has other checksums than then, unless force is True.
    """
    try:
        with safe_open(path, "pt") as file:
            text, expected = file.metadata()["run"], file.metadata()["checksum"]
            # Copies: Windows does not replace a file that is mapped, as the next save would
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}
    except (OSError, SafetensorError, KeyError, TypeError) as error:
        raise Error(f"{path} is not the state of a run: {error!r}; without --resume the run starts again") from None
    if checksum(tensors, text) != expected:
        raise Error(f"{path} is damaged: its checksum does not fit; without --resume the run starts again")
    progress = Progress(**json.loads(text))
    for name, value in settings.items():
        if (old := progress.settings.get(name)) != value:
            raise Error(f"{path} is of a run with {name} = {old}, not {value}: give the same, or another --out")
    states = {}
    for key, t in tensors.items():
        kind, name = key.split(" ", 1)
        states.setdefault(name, {})[kind] = t
    found = {name: kept["master"].shape for name, kept in states.items()}
    if wrong := [name for name in {**shapes, **found} if shapes.get(name) != found.get(name)]:
        raise Error(f"{path} does not fit at {wrong[0]}: the base is not the one of its run")
    for name, value in checksums.items():
        if progress.checksums.get(name, value) != value and not force:
            what = f"--{name} {settings[name]} is not what it was when the run of {path} began"
            raise Error(f"{what}: put it back, start again without --resume, or go on all the same with --force")
    for kept in states.values():
        if len(kept) > 1:  # with fp16 there may have been nothing but overflows, and no m and v
            kept["step"] = progress.step - progress.skipped
    return progress, states
