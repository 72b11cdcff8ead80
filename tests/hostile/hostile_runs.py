"""The command line in a process of its own, in a world that is watched: what it said, how large it became."""

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hostile_tools import World
from wavemill.storage.codes import list_streams, open_corpus, open_stream, read_codes
from wavemill.storage.parquet import read_parquet
from wavemill.storage.root import Root
from wavemill.storage.schema import CORPUS_SCHEMA

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Run:
    """A finished command."""

    status: int
    out: str
    err: str
    peak_bytes: int  # the most that it or any process it started had in memory
    wall_s: float


def run(
    world: World,
    *arguments: str | Path,
    timeout: float = 240,
    env: dict[str, str] | None = None,
    under: Sequence[str] = (),
) -> Run:
    """Run the command line in the world's desk, `under` another command, and watch its memory from outside.

    `-P` is what the script `wavemill` does, too: the folder one is in is no place to import from.
    """
    started = time.monotonic()
    process = subprocess.Popen(
        [*under, sys.executable, "-P", "-m", "wavemill.jobs.cli", *map(str, arguments)],
        cwd=world.folder / "desk",
        env={**world.env, **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    peaks = [0]
    watch = threading.Thread(target=_watch, args=[process, peaks])
    watch.start()
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
        watch.join()
    return Run(process.returncode, out.decode(), err.decode(), max(peaks), time.monotonic() - started)


def _watch(process: "subprocess.Popen[bytes]", peaks: list[int]) -> None:
    """VmHWM, unlike rusage, does not count what this process had when it forked."""
    while process.poll() is None:
        for pid in list(family(process.pid)):
            with contextlib.suppress(OSError, IndexError):
                peaks.append(int(Path(f"/proc/{pid}/status").read_text().split("VmHWM:")[1].split()[0]) << 10)
        time.sleep(0.05)


def family(pid: int) -> Iterator[int]:
    """A process and all that it started."""
    yield pid
    with contextlib.suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            for child in Path(f"/proc/{pid}/task/{task}/children").read_text().split():
                yield from family(int(child))


def rows_of(root: Path) -> list[Row]:
    """The rows of a corpus, each with the error of any stream and the codes `[K, T]` of all streams."""
    place = Root(root)
    corpus = open_corpus(place)
    streams = {name: open_stream(place, name) for name in list_streams(place)}
    rows = []
    for shard in corpus.files:
        parts = {name: read_codes(place, snapshot, shard) for name, snapshot in streams.items()}
        for number, row in enumerate(read_parquet(place, corpus.path(shard), schema=CORPUS_SCHEMA).to_pylist()):
            errors = {part.errors[number] for part in parts.values()} | {row["error"]} - {None}
            assert len(errors) <= 1 or row["error"] is None, row
            codes = {name: part.codes(number) for name, part in parts.items()}
            error = next(iter(sorted(error for error in errors if error)), None)
            rows.append(row | {"final": error, "codes": codes})
    return rows
