"""Vacuum: shard files that no snapshot needs, such as those of killed runs, are removed."""

import re
import time
from contextlib import suppress
from dataclasses import dataclass

from ..tokenizers.spec import UserError
from .codes import CORPUS, list_streams, stream_folder
from .pins import list_pins, read_pin
from .root import Root
from .table import is_shard_file, read_snapshot

_TORN = re.compile(r"\.shard-.*\.tmp")  # what a write that was killed leaves on a disk
SAMPLES = "tmp/fit-"  # and a key: what a fit of codebooks has sampled, until it has ended
_SAMPLED = re.compile(rf"{SAMPLES}[0-9a-f]{{16}}")
LEAST_HOURS = 2.0  # a shard may take its worker so long, and its file is named by no snapshot until then


@dataclass(frozen=True, slots=True)
class Leftover:
    """A file that neither the newest snapshot of its table nor a pinned one names."""

    path: str  # relative to the root
    size_bytes: int


def vacuum(root: Root, *, older_than_h: float, dry_run: bool) -> list[Leftover]:
    """Remove leftovers that were written more than `older_than_h` hours ago; with `dry_run` only list them.

    So are samples that a fit of codebooks left behind when it was killed. Snapshots that are neither newest nor pinned
    may need one of the leftovers. Files of other kinds stay. Raises `UserError` for less than `LEAST_HOURS`, for a pin
    whose snapshot is gone, and if there is no dataset.
    """
    if older_than_h < LEAST_HOURS:
        raise UserError(
            f"Files of the last {LEAST_HOURS:g} hours may belong to a run that is going on; {older_than_h:g} was asked "
            "for."
        )
    tables = [(CORPUS, CORPUS), *((name, stream_folder(name)) for name in list_streams(root))]
    pins = [read_pin(root, name) for name in list_pins(root)]
    limit = time.time() - older_than_h * 3600
    found = []
    for name, folder in tables:
        files = root.list_files(folder)  # before the snapshot is read: what a run commits meanwhile is needed
        needed = _needed(root, name, folder, {pin[name].version for pin in pins if name in pin})
        for file, size_bytes, written in files:
            if (is_shard_file(file) or _TORN.fullmatch(file)) and file not in needed and written < limit:
                found.append(Leftover(f"{folder}/{file}", size_bytes))
    for folder in (f"tmp/{name}" for name in root.list("tmp")):
        if _SAMPLED.fullmatch(folder):
            files = root.list_files(folder)
            # all or none: a fit that is going on has written some of them lately
            if all(written < limit for _, _, written in files):
                found += [Leftover(f"{folder}/{file}", size_bytes) for file, size_bytes, _ in files]
    for leftover in () if dry_run else found:
        with suppress(FileNotFoundError):  # another vacuum was faster
            if root.modified(leftover.path) < limit:  # not written again since it was listed
                root.remove(leftover.path)
    return found


def _needed(root: Root, name: str, folder: str, pinned: set[int]) -> set[str]:
    """Files of the newest and of the pinned versions of a table."""
    newest = read_snapshot(root, folder)
    if newest is None:
        raise UserError(f"There is no {name} in {root}: name the root of a dataset.")
    snapshots = [newest, *(read_snapshot(root, folder, version=version) for version in sorted(pinned))]
    return {file.file_name for snapshot in snapshots if snapshot is not None for file in snapshot.files.values()}
