"""Pins: snapshots that somebody trains on, by name, under `ROOT/pins`. Vacuum leaves alone what a pin names."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from ..tokenizers.spec import UserError, did_you_mean
from .codes import CORPUS, list_streams, open_corpus, open_stream
from .root import Root
from .schema import require_stream_name

PINS = "pins"


@dataclass(frozen=True, slots=True)
class Pinned:
    """A snapshot of a table: which version, and of which table, should another one stand in its place."""

    version: int
    table_id: str


def pin(root: Root, name: str, versions: Mapping[str, int] | None = None) -> dict[str, int]:
    """Give the newest snapshot of every stream and of the corpus, or those of `versions`, a name.

    Returns the versions. Raises `UserError` for a name that is taken and versions that are not there.
    """
    require_stream_name(name)
    if name in list_pins(root):
        raise UserError(f"There is a pin {name!r} in {root} already. Take another name, or `wavemill unpin` it first.")
    there = list_streams(root)
    stray = sorted(set(versions or {}) - {CORPUS, *there})
    if stray:
        raise UserError(f"There is no stream {stray[0]!r} in {root} to pin.{did_you_mean(stray[0], there)}")
    asked = dict(versions or {})
    snapshots = {CORPUS: open_corpus(root, version=asked.get(CORPUS))}
    snapshots |= {stream: open_stream(root, stream, version=asked.get(stream)) for stream in there}
    content = {
        "wavemill": "pin",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "tables": {key: {"version": snap.version, "table": snap.table_id} for key, snap in snapshots.items()},
    }
    root.write_bytes(_path(name), json.dumps(content, indent=1).encode())
    return {key: snapshot.version for key, snapshot in snapshots.items()}


def unpin(root: Root, name: str) -> None:
    """Take a pin's name away. Raises `UserError` if there is none."""
    _read(root, name)
    root.remove(_path(name))


def list_pins(root: Root) -> list[str]:
    return [file.removesuffix(".json") for file in root.list(PINS) if file.endswith(".json")]


def read_pin(root: Root, name: str) -> dict[str, Pinned]:
    """Snapshots by stream, and that of the corpus. Raises `UserError` if there is no such pin."""
    return {key: Pinned(table["version"], table["table"]) for key, table in _read(root, name)["tables"].items()}


def _read(root: Root, name: str) -> dict[str, Any]:
    try:
        content = json.loads(root.read_bytes(_path(name)))
        if content.get("wavemill") != "pin":
            raise ValueError("it is no pin")
    except FileNotFoundError as error:
        there = list_pins(root)
        raise UserError(
            f"There is no pin {name!r} in {root}; there are: {', '.join(there) or 'none'}.{did_you_mean(name, there)}"
        ) from error
    except (ValueError, AttributeError) as error:
        raise UserError(
            f"{root.join(_path(name))} cannot be read as a pin ({error}). Remove it and pin again."
        ) from error
    return content


def _path(name: str) -> str:
    return f"{PINS}/{name}.json"
