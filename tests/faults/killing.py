"""Tools for tests that kill: a dataset as content, and the command line as a process that may die."""

import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
from deltalake import DeltaTable
from wavemill.pipelines.verify import verify
from wavemill.storage.codes import CORPUS, list_streams, open_corpus, read_codes, stream_folder
from wavemill.storage.parquet import read_parquet
from wavemill.storage.root import Root
from wavemill.storage.schema import CORPUS_SCHEMA
from wavemill.storage.stores import table_options
from wavemill.storage.table import read_snapshot

Content = dict[str, dict[str, bytes]]  # by stream and file


def committed(root: Path | str) -> Content:
    """Every file that the streams' newest snapshots name, with its content; file names hold shard and hash."""
    place = Root(root)
    names = place.list("streams")
    return {name: table_content(place, stream_folder(name)) for name in names}


def table_content(root: Root, folder: str) -> dict[str, bytes]:
    """Every file that a table's newest snapshot names, once per shard, with its content."""
    names = table_files(root, folder)
    assert len(names) == len(set(names)), f"{folder} names a file twice"
    shards = [name.split("-")[1] for name in names]
    assert len(shards) == len(set(shards)), f"{folder} has a shard twice"
    return {name: root.read_bytes(f"{folder}/{name}") for name in sorted(names)}


def table_files(root: Root, folder: str) -> list[str]:
    """The names that a table's newest snapshot holds, as deltalake alone gives them."""
    table = DeltaTable(root.join(folder), storage_options=table_options(root.uri))
    return pa.table(table.get_add_actions(flatten=True))["path"].to_pylist()


def differences(root: Root, expected: Content) -> dict[str, int]:
    """How many shards the streams lack, how many they have twice, and how many files have other bytes."""
    found = {"lost": 0, "doubled": 0, "different": 0}
    for name, files in expected.items():
        folder = stream_folder(name)
        names = table_files(root, folder)
        shards = Counter(file.split("-")[1] for file in names)
        found["lost"] += sum(file.split("-")[1] not in shards for file in files)
        found["doubled"] += sum(count - 1 for count in shards.values())
        found["different"] += sum(root.read_bytes(f"{folder}/{file}") != files.get(file) for file in names)
    return found


def require_whole_at_every_version(root: Root) -> int:
    """Raise unless each file that any version of any table names is there and whole; how many versions there are."""
    streams = root.list("streams")
    seen: set[str] = set()
    versions = 0
    for folder in [CORPUS, *map(stream_folder, streams)]:
        newest = read_snapshot(root, folder)
        for version in range(newest.version + 1) if newest else ():
            snapshot = read_snapshot(root, folder, version=version)
            assert snapshot is not None, f"{folder} has no version {version}"
            versions += 1
            for shard in snapshot.files:
                if snapshot.path(shard) in seen:
                    continue
                seen.add(snapshot.path(shard))
                if folder == CORPUS:
                    read_parquet(root, snapshot.path(shard), schema=CORPUS_SCHEMA)
                else:
                    read_codes(root, snapshot, shard)
    return versions


def require_whole(root: Root) -> None:
    """Raise unless each stream has one row for each segment, as `wavemill verify` finds it."""
    verdict = verify(root, open_corpus(root), sample=0, seed=0, source_roots={})
    assert verdict.problems == []
    assert verdict.stream_rows == len(list_streams(root)) * verdict.segments


class Process(Protocol):
    """A command line that runs: `subprocess.Popen`, or a forked one."""

    returncode: Any

    @property
    def pid(self) -> int: ...

    def communicate(self, *, timeout: float | None = None) -> tuple[str, str]: ...


def tokenize_process(
    root: Path,
    *options: str,
    failpoints: str = "",
    once: Path | None = None,
) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "wavemill.jobs.cli", "tokenize", str(root), "--json", *options]
    env = {**os.environ, **failpoints_env(failpoints, once)}
    return subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def failpoints_env(failpoints: str, once: Path | None = None) -> dict[str, str]:
    """The environment in which these failpoints fire; each only once in all processes, if there is a folder for it."""
    env = {"WAVEMILL_FAILPOINTS": failpoints}
    if once is not None:
        once.mkdir(exist_ok=True)
        env["WAVEMILL_FAILPOINTS_ONCE"] = str(once)
    return env


def finish(process: Process, timeout: float = 120) -> tuple[int, dict[str, float], str]:
    """Exit status, the JSON that was printed, and what was said on stderr."""
    out, err = process.communicate(timeout=timeout)
    return process.returncode, json.loads(out) if out.strip() else {}, err


def descendants(pid: int) -> set[int]:
    """Processes that a process started, and theirs."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        children.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found, queue = set(), [pid]
    while queue:
        for child in children.get(queue.pop(), ()):
            found.add(child)
            queue.append(child)
    return found


def state_of(pid: int) -> str:
    """A process's state as /proc has it: R, S, D, T (stopped), Z ...; empty if there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def alive(pids: set[int]) -> set[int]:
    """Those that still run; a zombie does not."""
    return {pid for pid in pids if state_of(pid) not in ("", "Z", "X")}


def wait_until_gone(pids: set[int], *, timeout: float) -> set[int]:
    """What is left of `pids` when all have ended or the time is over."""
    deadline = time.monotonic() + timeout
    while alive(pids) and time.monotonic() < deadline:
        time.sleep(0.1)
    return alive(pids)
