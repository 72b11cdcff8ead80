"""Published weights in the layout of a package of their own: a config.json in its words, and a state dict beside it.

SpeechTokenizer and SNAC publish a pickled state dict and nothing else. It is opened as tensors only (`weights_only`),
as torchaudio's bundles are; a safetensors file with the same names comes before it.
"""

import pickle
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from .hub import Weights, config_sha256, files_sha256, find_folder, read_json, require_whole
from .spec import UserError
from .tokenizer import TokenizerConfig

_MOST = 1 << 20  # of anything that a configuration counts
_TORN = (
    *(SafetensorError, RuntimeError, OSError, EOFError, pickle.UnpicklingError),
    *(LookupError, ValueError, TypeError, AttributeError),  # what a damaged pickle may end in
)
_WEIGHT_NORM = (("weight_v", "weight_g"), ("parametrizations.weight.original1", "parametrizations.weight.original0"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """How a package publishes its weights."""

    model: str  # its name, for people
    weights: str  # a hub id
    inside: str = ""  # the folder in it; nothing if they lie at its top
    pickled: str  # the file with the state dict
    numbers: tuple[str, ...]  # of config.json, whole and from 1 on
    lists: tuple[str, ...]  # of such numbers
    published: dict[str, Any]  # what it must say exactly, or one of a tuple


def find_package(config: TokenizerConfig, package: Package) -> Weights:
    """The weights that `config` names, or the published ones: a folder or a hub id.

    Raises `UserError` for folders that are missing or hold no weights, and for another codec than `package`.
    """
    source = config.weights or package.weights
    patterns = ("config.json", "*.safetensors", package.pickled)
    nested = tuple(f"{package.inside}/{pattern}" for pattern in patterns) if package.inside else ()
    folder, revision = find_folder(
        source,
        revision=config.revision,
        local_files_only=config.local_files_only,
        patterns=(*patterns, *nested),
    )
    if not (folder / "config.json").exists() and package.inside:
        folder /= package.inside
    files = _files(folder, package)
    if not files or not (folder / "config.json").exists():
        raise UserError(
            f"{source} holds no weights of {package.model}: expected config.json and {package.pickled} (or a "
            f"safetensors file with the same names) as {package.weights} has them. Name the folder that holds them."
        )
    given = read_json(folder / "config.json", source)
    _require_codec(given, source, config.tokenizer, package)
    for file in files:
        if file.suffix == ".safetensors":
            require_whole(file, source)
    return Weights(
        name=source,
        folder=folder,
        revision=revision,
        sha256=files_sha256(files),
        config_sha256=config_sha256(given),
        config=given,
        preprocessor={},
    )


def load_state(weights: Weights, package: Package) -> dict[str, Tensor]:
    """The tensors of a state dict by their names, weight normalization multiplied out (Salimans and Kingma 2016).

    Raises `UserError` for files that are torn or hold anything but tensors.
    """
    state: dict[str, Tensor] = {}
    for file in _files(weights.folder, package):
        try:
            state |= load_file(file) if file.suffix == ".safetensors" else _unpickled(file)
        except _TORN as error:
            raise _unreadable(file, weights, package, error) from error
    for name in list(state):
        for direction, gain in _WEIGHT_NORM:
            stem = name.removesuffix(direction)
            if name.endswith(f".{direction}") and state.get(f"{stem}{gain}") is not None:
                weight_v, weight_g = state.pop(name).float(), state.pop(f"{stem}{gain}").float()
                per_row_O = weight_v.flatten(1).norm(dim=1) if weight_v.dim() > 1 else weight_v.abs()
                if weight_g.numel() == per_row_O.numel():
                    scale_O = weight_g.flatten() / per_row_O
                    state[f"{stem}weight"] = weight_v * scale_O.view(-1, *[1] * (weight_v.dim() - 1))
    return state


def fill(model: nn.Module, state: dict[str, Tensor], weights: Weights) -> None:
    """Give `model`, which may be without storage, its parameters, float32.

    Raises `UserError` if one is missing or has another shape.
    """
    wanted = model.state_dict()
    lacking = sorted(name for name in wanted if name not in state)
    other = sorted(name for name in wanted if name in state and state[name].shape != wanted[name].shape)
    if lacking or other:
        what = f"lack {lacking[0]!r}" if lacking else f"have another shape of {other[0]!r} than config.json says"
        raise UserError(
            f"The weights in {weights.name} {what}; {len(lacking) + len(other)} of {len(wanted)} parameters do not fit."
            " Fetch them again, or see that config.json belongs to them."
        )
    model.load_state_dict({name: state[name].float().contiguous() for name in wanted}, assign=True)
    model.eval().requires_grad_(False)


def _files(folder: Path, package: Package) -> list[Path]:
    pickled = folder / package.pickled
    return sorted(folder.glob("*.safetensors")) or ([pickled] if pickled.is_file() else [])


def _unpickled(file: Path) -> dict[str, Tensor]:
    state = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise TypeError("it holds more than tensors by their names")
    return {str(name): tensor for name, tensor in state.items()}


def _unreadable(file: Path, weights: Weights, package: Package, error: Exception) -> UserError:
    told = re.split(r"(?<=[.!])\s", " ".join(str(error).split()))[0][:200].rstrip(".")
    return UserError(
        f"{file.name} in {weights.name} cannot be read as a state dict of tensors ({told}). Fetch it again; where you "
        'trust it, convert it: python -c "import torch; from safetensors.torch import save_file as s; '
        f"p = torch.load('{package.pickled}', weights_only=False); "
        "s({k: v.clone() for k, v in p.items()}, 'model.safetensors')\""
    )


def _require_codec(given: dict[str, Any], source: str, tokenizer: str, package: Package) -> None:
    """Raise `UserError` for a configuration that is of something else, naming all that differs."""
    lacking = [key for key in (*package.numbers, *package.lists) if key not in given]
    if lacking:
        raise UserError(
            f"{source} holds another model than {package.model}: its config.json says nothing of {', '.join(lacking)}. "
            "Name other weights, or the tokenizer that takes these."
        )
    wrong = [f"{key} {given.get(key)!r}, no number" for key in package.numbers if not _counts([given.get(key)])]
    wrong += [f"{key} {given.get(key)!r}, no list of numbers" for key in package.lists if not _counts(given.get(key))]
    for key, value in package.published.items():
        allowed: Sequence[Any] = value if isinstance(value, tuple) else (value,)
        if given.get(key) not in allowed:
            wrong.append(f"{key} {given.get(key)!r}, not {' or '.join(map(repr, allowed))}")
    if wrong:
        raise UserError(
            f"{source} holds another codec than {tokenizer} (its config.json says so): {'; '.join(wrong)}. Name other "
            "weights, or the tokenizer that takes these."
        )


def _counts(values: Any) -> bool:
    """Whether these are a few whole numbers from 1 on."""
    return (
        isinstance(values, list)
        and 1 <= len(values) <= 16
        and all(type(value) is int and 1 <= value <= _MOST for value in values)
    )
