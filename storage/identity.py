"""What tells datasets apart whose states must not be mixed up."""

import functools
from fractions import Fraction
from typing import Any

from ..tokenizers.spec import UserError


def layout_name(layout: Any) -> list[Any]:
    """What tells layouts apart: a name, and what simple parameters an object or a `functools.partial` has."""
    if isinstance(layout, functools.partial):
        return [*layout_name(layout.func), _simple(layout.args), _simple(layout.keywords)]
    if hasattr(layout, "__qualname__"):
        return [layout.__module__, layout.__qualname__]
    fields = {name: getattr(layout, name) for name in getattr(layout, "__dataclass_fields__", ())}
    return [type(layout).__module__, type(layout).__qualname__, _simple(fields or getattr(layout, "__dict__", {}))]


def _simple(value: Any) -> Any:
    """Numbers, strings and what is made of them; of anything else that it is there."""
    if isinstance(value, dict):
        return {str(key): _simple(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_simple(inner) for inner in value]
    if hasattr(value, "__dataclass_fields__"):
        return layout_name(value)
    if isinstance(value, Fraction):
        return str(value)
    return value if isinstance(value, (str, int, float, bool, type(None))) else type(value).__qualname__


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
