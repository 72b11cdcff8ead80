"""What tells datasets apart whose states must not be mixed up."""

import functools
import hashlib
import json
from fractions import Fraction
from types import FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..tokenizers.spec import UserError


def layout_name(layout: Any) -> list[Any]:
    """What tells layouts apart: a name, and what parameters an object or a `functools.partial` has.

    Of layouts of this package, which may move within it, the module is left out.
    """
    if isinstance(layout, functools.partial):
        return [*layout_name(layout.func), _simple(layout.args), _simple(layout.keywords)]
    if isinstance(layout, MethodType):
        return [*_name(layout.__func__), layout_name(layout.__self__)]
    if hasattr(layout, "__qualname__"):
        return _name(layout)
    return [*_name(type(layout)), _simple(_parameters(layout))]


def _name(named: Any) -> list[Any]:
    """Of a function or a class."""
    package = __name__.partition(".")[0]
    is_ours = named.__module__.partition(".")[0] == package
    return [package if is_ours else named.__module__, named.__qualname__]


def _parameters(layout: Any) -> dict[str, Any]:
    slots = [slot for kind in type(layout).__mro__ for slot in _as_tuple(getattr(kind, "__slots__", ()))]
    names = [*getattr(layout, "__dataclass_fields__", ()), *slots] or [*getattr(layout, "__dict__", ())]
    hidden = ("__dict__", "__weakref__")
    return {name: getattr(layout, name) for name in names if name not in hidden and hasattr(layout, name)}


def _as_tuple(slots: Any) -> tuple[str, ...]:
    return (slots,) if isinstance(slots, str) else tuple(slots)


def _simple(value: Any) -> Any:
    """Numbers, strings and what is made of them, arrays by their content; of anything else that it is there."""
    if isinstance(value, np.generic):
        return _simple(value.item())
    if value is None or isinstance(value, (str, int, float)):
        return value
    if isinstance(value, dict):
        return {json.dumps(_simple(key), sort_keys=True): _simple(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_simple(inner) for inner in value]
    if isinstance(value, (set, frozenset)):
        return ["set", *sorted(json.dumps(_simple(inner), sort_keys=True) for inner in value)]
    if isinstance(value, (bytes, bytearray)):
        return ["bytes", value.hex()]
    if isinstance(value, Tensor):
        content = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        return [str(value.dtype), list(value.shape), _digest(content.tobytes())]
    if isinstance(value, np.ndarray):
        if value.dtype.hasobject:
            return ["object", list(value.shape), _simple(value.reshape(-1).tolist())]
        return [value.dtype.str, list(value.shape), _digest(value.tobytes())]
    if isinstance(value, Fraction):
        return str(value)
    if isinstance(value, (FunctionType, MethodType, functools.partial)) or _parameters_are_fixed(value):
        return layout_name(value)
    return type(value).__qualname__


def _parameters_are_fixed(value: Any) -> bool:
    """Whether an object has all its parameters by name, with no place for what it computes on its way."""
    has_slots_only = not hasattr(value, "__dict__") and bool(_parameters(value))
    return hasattr(value, "__dataclass_fields__") or has_slots_only


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def require_same(ours: dict[str, Any], theirs: dict[str, Any], part: int) -> None:
    """Raise `UserError` if two identities differ: the state of one is no state of the other."""
    which = f"Dataset {part} of the mixture" if part else "The dataset"
    if theirs.get("versions") != ours["versions"]:
        raise UserError(
            f"{which} has versions {ours['versions']}, the state was saved with {theirs.get('versions')}: rows would "
            "be repeated or left out. Build it with versions=state['datasets'][...]['versions'], or with the pin."
        )
    if theirs.get("seed") != ours["seed"]:
        raise UserError(f"{which} has seed {ours['seed']}, the state was saved with seed {theirs.get('seed')}.")
    if theirs.get("order") != ours["order"]:
        raise UserError(
            f"{which} reads other tables or codebooks, or shuffles, filters or packs otherwise than the one that the "
            "state was saved with. Build it as it was."
        )
