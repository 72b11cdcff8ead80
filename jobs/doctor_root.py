"""Whether a place can hold a dataset: tried out in a folder of its own below it, which is removed again."""

import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ..storage.root import Root
from ..storage.schema import CORPUS_SCHEMA
from ..storage.stores import redacted
from ..storage.table import DeltaError, create_table
from ..tokenizers.spec import RunFailed, UserError
from .checks import Check
from .doctor_store import check_store

_GB = 10**9
_RACERS = 8
_ROUNDS = 20
_MAX_SKEW_S = 5.0


def check_root(uri: str) -> list[Check]:
    """Checks of a dataset's place, which need not exist yet: writing, space, atomic steps, a table, its clock."""
    try:
        root = Root(uri)
    except UserError as error:
        return [Check("root", "fail", redacted(uri), str(error))]
    if not root.is_local:
        return check_store(root, check_table)
    place = Path(root.uri)
    above = next(folder for folder in (place, *place.parents) if os.path.lexists(folder))
    if not above.is_dir():
        return [Check("root", "fail", f"{above} is a file", "Name a folder, or one that is to be.")]
    try:
        with tempfile.TemporaryDirectory(dir=above, prefix=".wavemill-doctor-") as folder:
            trial = Path(folder)
            return [
                Check("root", "ok", f"{root} can be written{'' if place.exists() else ' (it is not there yet)'}"),
                check_space(above),
                check_replace(trial),
                check_exclusive(trial),
                check_table(Root(trial)),
                check_clock_skew(trial),
            ]
    except OSError as error:
        advice = "Name a folder that you may write to, or change its owner or mode."
        return [Check("root", "fail", f"{root} cannot be written: {error.strerror or error}", advice)]


def check_space(folder: Path) -> Check:
    free = shutil.disk_usage(folder).free
    told = f"{free / _GB:.1f} GB free"
    if free < _GB / 10:
        return Check("root's space", "fail", told, "Free some, or name a root on another disk.")
    if free < 10 * _GB:
        return Check(
            "root's space",
            "warn",
            told,
            "An hour of audio is about 2 MB in the two default streams: see that it is enough.",
        )
    return Check("root's space", "ok", told)


def check_replace(folder: Path) -> Check:
    """A file that is replaced is the old one or the new one to whoever reads it, never part of one and never gone."""
    root = Root(folder)
    contents = [bytes([value]) * (1 << 16) for value in (1, 2)]
    root.write_bytes("replaced", contents[0])
    writing = threading.Event()

    def write() -> None:
        try:
            for number in range(_ROUNDS):
                root.write_bytes("replaced", contents[number % 2])
        finally:
            writing.set()

    torn = gone = 0
    with ThreadPoolExecutor(1) as pool:
        writer = pool.submit(write)
        while not writing.is_set():
            try:
                torn += root.read_bytes("replaced") not in contents
            except FileNotFoundError:
                gone += 1
        writer.result()
    if torn or gone:
        told = f"readers saw {torn} torn and {gone} missing files while one was replaced"
        return Check("root's renames", "fail", told, "Put the root on a local or POSIX file system.")
    return Check("root's renames", "ok", "atomic")


def check_exclusive(folder: Path) -> Check:
    """Of several who create one file at once, exactly one wins: table commits (hard links) rest on this."""

    def create(racer: int, target: Path) -> None:
        os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY))

    def link(racer: int, target: Path) -> None:
        os.link(folder / f"racer-{racer}", target)

    for racer in range(_RACERS):
        (folder / f"racer-{racer}").write_bytes(bytes([racer]))
    advice = "Two runs could both commit: put the root on a local or POSIX file system, or on an object store."
    for name, attempt in (("exclusive creation", create), ("hard links", link)):
        try:
            wins = [_winners(attempt, folder / f"{attempt.__name__}-{number}") for number in range(_ROUNDS)]
        except OSError as error:
            return Check("root's commits", "fail", f"{name}: {error.strerror}", advice)
        if set(wins) != {1}:
            worst = max(wins, key=lambda won: abs(won - 1))
            return Check("root's commits", "fail", f"{name}: {worst} of {_RACERS} won where one may", advice)
    told = f"put-if-absent holds: one of {_RACERS} threads won each of {2 * _ROUNDS} races"
    return Check("root's commits", "ok", told)


def check_table(root: Root) -> Check:
    """Several who create one table at once all get the same table."""
    barrier = threading.Barrier(4)

    def create(_: int) -> str:
        barrier.wait()
        return create_table(root, "table", schema=CORPUS_SCHEMA, metadata={"kind": "corpus"}).table_id

    try:
        with ThreadPoolExecutor(4) as pool:
            ids = set(pool.map(create, range(4)))
    except (DeltaError, UserError, RunFailed, OSError) as error:
        told = str(error).splitlines()[0] if str(error) else type(error).__name__
        return Check("root's tables", "fail", f"a Delta table cannot be created: {told}", "Name another root.")
    if len(ids) != 1:
        advice = "Put the root on a local or POSIX file system, or on an object store."
        return Check("root's tables", "fail", f"4 who created one table got {len(ids)} tables", advice)
    return Check("root's tables", "ok", "4 who created one table at once got the same")


def check_clock_skew(folder: Path) -> Check:
    """Whether the file system's clock is this machine's."""
    path = folder / "clock"
    before = time.time()
    path.write_bytes(b"")
    skew_s = path.stat().st_mtime - before
    if abs(skew_s) > _MAX_SKEW_S:
        advice = "Set both clocks (NTP): the age of files decides what vacuum may remove."
        return Check("root's clock", "warn", f"{skew_s:+.0f} s from this machine's", advice)
    return Check("root's clock", "ok", "the same as this machine's")


def _winners(attempt: Callable[[int, Path], None], target: Path) -> int:
    """How many of the racers, started together, did not find the target there."""
    barrier = threading.Barrier(_RACERS)

    def race(racer: int) -> bool:
        barrier.wait()
        try:
            attempt(racer, target)
        except FileExistsError:
            return False
        return True

    with ThreadPoolExecutor(_RACERS) as pool:
        return sum(pool.map(race, range(_RACERS)))
