"""Tools for tests that kill: a dataset as content, and the command line as a process that may die."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from deltalake import DeltaTable


def committed(root: Path) -> dict[str, dict[str, bytes]]:
    """Every file that the streams' newest snapshots name, with its content; file names hold shard and hash."""
    content = {}
    for folder in sorted((root / "streams").iterdir()):
        table = DeltaTable(folder)
        names = table.get_add_actions(flatten=True)["path"].to_pylist()
        assert len(names) == len(set(names)), f"{folder} names a file twice"
        shards = [name.split("-")[1] for name in names]
        assert len(shards) == len(set(shards)), f"{folder} has a shard twice"
        content[folder.name] = {name: (folder / name).read_bytes() for name in sorted(names)}
    return content


def tokenize_process(
    root: Path,
    *options: str,
    failpoints: str = "",
    once: Path | None = None,
) -> "subprocess.Popen[str]":
    env = {**os.environ, "WAVEMILL_FAILPOINTS": failpoints}
    if once is not None:
        once.mkdir(exist_ok=True)
        env["WAVEMILL_FAILPOINTS_ONCE"] = str(once)
    command = [sys.executable, "-m", "wavemill.jobs.cli", "tokenize", str(root), "--json", *options]
    return subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def finish(process: "subprocess.Popen[str]", timeout: float = 120) -> tuple[int, dict[str, float], str]:
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


def alive(pids: set[int]) -> set[int]:
    """Those that still run; a zombie does not."""
    running = set()
    for pid in pids:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if state not in "ZX":
            running.add(pid)
    return running


def wait_until_gone(pids: set[int], *, timeout: float) -> set[int]:
    """What is left of `pids` when all have ended or the time is over."""
    deadline = time.monotonic() + timeout
    while alive(pids) and time.monotonic() < deadline:
        time.sleep(0.1)
    return alive(pids)


def kill(process: "subprocess.Popen[str]") -> None:
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
