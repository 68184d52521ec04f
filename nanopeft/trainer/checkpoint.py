# SPDX-License-Identifier: MIT
"""What a run writes and reads again. As in bases.py and tokenizer.py a file may be damaged or hostile.

    an adapter      adapter_config.json, adapter_model.safetensors: in peft's format (its config: peft_config.py)
    a run's state   state.safetensors: trained parameters, Adam's state and the progress, with a checksum
"""

import itertools
import json
import math
import os
import shutil
import zlib
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from filelock import FileLock, Timeout  # torch brings it
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from nanopeft.trainer import Error, Failure


def read_json(path):
    """The object in a JSON file."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise Error(f"{path} is no JSON file: {error}") from None
    if not isinstance(found, dict):
        raise Error(f"{path} must hold an object, not {found!r}")
    return found


def write(path, content):
    """A file that is there whole or not at all. content: bytes, or a function that writes to the path it is given."""
    new = path.with_name(path.name + ".new")
    try:
        new.write_bytes(content) if isinstance(content, bytes) else content(new)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(new, 0o666 & ~umask)  # safetensors lets the owner alone read
        os.replace(new, path)
    except (OSError, SafetensorError, Failure) as error:  # the disk is full, say
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
    """Error if the disk has no space for a run's state, master copy, m and v in fp32, and for the next beside it."""
    size = 12 * sum(math.prod(shape) for shape in shapes.values())
    size *= 1 if (folder / "state.safetensors").exists() else 2
    if (free := shutil.disk_usage(folder).free) < size:
        raise Error(f"--out {folder} has {free / 1e6:,.1f} MB free, and states take {size / 1e6:,.1f} MB")


def save_adapter(folder, state, config, base_checksum):
    """base_checksum goes into the tensors' file: peft passes over its metadata, and warns of keys in a config."""
    state = {key: p.cpu().contiguous() for key, p in state.items()}
    metadata = {"base_checksum": base_checksum}  # one key: safetensors writes several in any order
    path, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    config = json.dumps(config, indent=2).encode()

    def write_both(new):
        save_file(state, new, metadata=metadata)
        if not path.exists() or path.read_bytes() != config:
            weights.unlink(missing_ok=True)  # a kill must not leave an earlier run's beside this config
            write(path, config)

    write(weights, write_both)


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
    curve: list = field(default_factory=list)  # [step, nats per token] of each evaluation on the way
    best_step: int = 0  # of the lowest loss of these
    kept: str = ""  # checksum of the files that hold its numbers

    def note(self, loss):
        """Adds an evaluation to the curve. Whether its loss is the lowest of those after step 0."""
        lowest = min((past for step, past in self.curve if step and not math.isnan(past)), default=math.inf)
        self.curve.append([self.step, loss])
        if better := self.step > 0 and loss < lowest:
            self.best_step = self.step
        return better

    def is_stuck(self, patience):
        """Whether the last `patience` evaluations were no better than one before."""
        return patience is not None and sum(step > self.best_step for step, _ in self.curve) >= patience

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


def checksum_of(paths):
    """Of files, with their names."""
    total = 0
    for path in paths:
        total = zlib.crc32(path.name.encode(), total)
        with open(path, "rb") as file:
            while part := file.read(1 << 24):
                total = zlib.crc32(part, total)
    return f"{total:08x}"


def save_state(path, progress, states):
    """states: {parameter name: {"master", "m", "v": tensor}}, as an engine's state_dict gives them."""
    tensors = {f"{key} {name}": t for name, kept in states.items() for key, t in kept.items() if torch.is_tensor(t)}
    tensors = {key: t.contiguous() for key, t in tensors.items()}
    text = json.dumps(asdict(progress))
    metadata = {"run": text, "checksum": checksum(tensors, text)}
    write(path, lambda new: save_file(tensors, new, metadata=metadata))


def set_aside(path, ranks):
    """Makes place for a new run: the state of one that has not ended gets another name, that of a finished one goes."""
    if ranks.rank > 0:
        return
    result = path.with_name("result.json")
    finished = path.exists() and result.exists() and result.stat().st_mtime >= path.stat().st_mtime
    for name in ("result.json", "loss.png", "ranks.svg", "pipeline.svg"):  # must not stand beside new numbers
        path.with_name(name).unlink(missing_ok=True)
    if not path.exists():
        return
    if finished:
        path.unlink()
        return ranks.say(f"{path.parent} holds a finished run, which this one replaces")
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
            given = settings[name] if isinstance(settings[name], str) else " ".join(settings[name])
            what = f"--{name} {given} is not what it was when the run of {path} began"
            raise Error(f"{what}: put it back, start again without --resume, or go on all the same with --force")
    for kept in states.values():
        if len(kept) > 1:  # with fp16 there may have been nothing but overflows, and no m and v
            kept["step"] = progress.step - progress.skipped
    return progress, states
