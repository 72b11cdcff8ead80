"""Checkpoints of a training run: folders that are whole or not there, of safetensors and JSON.

RUN/checkpoints/step-00000500/model.safetensors      the objective's parameters and buffers
                             /optimizer.safetensors  the optimizer's state, PARAMETER/exp_avg and so on
                             /state.json             step, the loader's state, what else is told, hashes of both
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ...storage.failpoints import failpoint
from ...tokenizers.spec import UserError

LOCK = ".lock"
_KEPT = 2  # the newest, and the best beside them
_FILES = ("model.safetensors", "optimizer.safetensors")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A whole checkpoint; `told` is what state.json says."""

    folder: Path
    step: int
    told: dict[str, Any]

    def load_weights(self, module: nn.Module) -> None:
        """Raises `UserError` for weights of another model."""
        weights, there = load_file(self.folder / _FILES[0]), weights_of(module)
        if {name: each.shape for name, each in weights.items()} != {name: each.shape for name, each in there.items()}:
            raise UserError(f"The weights in {self.folder} are those of another model. Name another folder.")
        module.load_state_dict(weights, strict=False)  # what shares memory is there once

    def load_optimizer(self, optimizer: torch.optim.Optimizer, module: nn.Module) -> None:
        state: dict[str, dict[str, Tensor]] = {}
        for name, tensor in load_file(self.folder / _FILES[1]).items():
            parameter, _, kind = name.rpartition("/")
            state.setdefault(parameter, {})[kind] = tensor
        for name, parameter in module.named_parameters():
            if name in state:
                kinds = state[name].items()
                optimizer.state[parameter] = {
                    kind: tensor if kind == "step" else tensor.to(parameter.device) for kind, tensor in kinds
                }


def save_checkpoint(
    run: Path, step: int, module: nn.Module, optimizer: torch.optim.Optimizer, told: dict[str, Any], *, best: int | None
) -> None:
    """Write a checkpoint, then remove those before the last two, but for that of step `best`."""
    folder = _folder(run, step)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.parent / f".{folder.name}.{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    save_file({name: each.contiguous() for name, each in weights_of(module).items()}, temporary / _FILES[0])
    save_file(_optimizer_tensors(module, optimizer), temporary / _FILES[1])
    failpoint("checkpoint-half-written")
    hashes = {name: _hash(temporary / name) for name in _FILES}
    (temporary / "state.json").write_text(json.dumps({**told, "step": step, "hashes": hashes}))
    for path in (*temporary.iterdir(), temporary):
        _sync(path)
    shutil.rmtree(folder, ignore_errors=True)  # a torn one of this step
    temporary.rename(folder)
    _sync(folder.parent)
    there = [each for each in _steps(run) if each <= step]
    for old in there[:-_KEPT]:
        if old != best:
            shutil.rmtree(_folder(run, old))
    for torn in set(_steps(run)) - set(there):  # what was whole there would have been gone on from
        shutil.rmtree(_folder(run, torn))


def remove_half_written(run: Path) -> None:
    """Remove what processes that were killed have left of checkpoints. For one that holds the run's lock."""
    for left in (run / "checkpoints").glob(".step-*"):
        shutil.rmtree(left, ignore_errors=True)


@contextmanager
def locked(run: Path, name: str = LOCK) -> Iterator[None]:
    """Hold a run's folder against other starts of it. Raises `UserError` if another process does.

    The lock goes with the process that took it: those that it forks do not have it, and may outlive it.
    """
    with open(run / name, "ab") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise UserError(
                f"Another process is training in {run}. Wait for it, or end it; then the same command goes on."
            ) from error
        except OSError:
            pass  # a file system without locks
        yield


def write_whole(path: Path, text: str) -> None:
    """Put a text in place, all of it or what was there before, whenever the process or the machine dies."""
    temporary = path.parent / f".{path.name}"
    temporary.write_text(text)
    _sync(temporary)
    temporary.rename(path)
    _sync(path.parent)


def newest_checkpoint(run: Path) -> Checkpoint | None:
    """The newest whole checkpoint of a run, or None; torn ones are passed over."""
    return next((found for step in reversed(_steps(run)) if (found := _whole(run, step)) is not None), None)


def checkpoint_of(run: Path, step: int) -> Checkpoint | None:
    """The checkpoint of a step, or None if there is none that is whole."""
    return _whole(run, step)


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name; of those that share memory the first."""
    found: dict[str, Tensor] = {}
    seen: set[tuple[int, tuple[int, ...]]] = set()
    for name, tensor in module.state_dict().items():
        place = (tensor.data_ptr(), tuple(tensor.shape))
        if tensor.numel() and place in seen:
            continue
        seen.add(place)
        found[name] = tensor.detach()
    return found


def _optimizer_tensors(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{name}/{kind}": tensor.detach().contiguous()
        for name, parameter in module.named_parameters()
        for kind, tensor in optimizer.state.get(parameter, {}).items()
    }


def _whole(run: Path, step: int) -> Checkpoint | None:
    folder = _folder(run, step)
    try:
        told = json.loads((folder / "state.json").read_text())
        if told["step"] != step or any(_hash(folder / name) != told["hashes"][name] for name in _FILES):
            return None
        for name in _FILES:
            load_file(folder / name)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        return None
    return Checkpoint(folder, step, told)


def _folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def _steps(run: Path) -> list[int]:
    folders = (run / "checkpoints").glob("step-*") if (run / "checkpoints").is_dir() else ()
    return sorted(int(folder.name.removeprefix("step-")) for folder in folders if folder.name[5:].isdecimal())


def _hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
