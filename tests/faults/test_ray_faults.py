"""Ray's own processes killed and stopped: the run goes on, or ends within a minute with a sentence and is finished."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from conftest import STREAMS
from killing import committed, descendants, finish, tokenize_process, wait_until_gone
from tally import tally
from wavemill.jobs.engine import InlineEngine
from wavemill.jobs.tokenize import TokenizeOptions, tokenize
from wavemill.storage.root import Root

LONGEST_S = 60.0  # from the fault to the end of a run that cannot go on
SLOW_SHARD = "shard-before-write=sleep:2"

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_alone")]


@pytest.mark.parametrize("victim", ["raylet", "gcs_server"])
def test_ray_that_dies_ends_the_run_with_a_sentence_and_the_same_command_finishes_it(
    victim: str, fitted_root: Path, finished_root: Path, copy_root: Callable[[Path], Path]
):
    root = copy_root(fitted_root)
    process = tokenize_process(root, failpoints=SLOW_SHARD)
    family = until_running(process, root)
    killed_s = kill_one(family, victim, signal.SIGKILL)
    status, _, said = finish(process, timeout=2 * LONGEST_S)
    took_s = time.monotonic() - killed_s
    tally("ray", runs=1, most_s=took_s)
    assert took_s < LONGEST_S
    assert status == 1, said
    assert f"its {victim} died" in said
    assert "Traceback" not in said
    assert committed(root)["semantic"], "what was done was not committed"
    assert wait_until_gone(without_agents(family), timeout=20) == set()
    tokenize(Root(root), STREAMS, InlineEngine, TokenizeOptions())
    assert committed(root) == committed(finished_root)


def test_a_worker_that_is_stopped_is_replaced_and_harms_nothing_when_it_goes_on(
    fitted_root: Path, finished_root: Path, copy_root: Callable[[Path], Path]
):
    root = copy_root(fitted_root)
    process = tokenize_process(root, failpoints=SLOW_SHARD)
    family = until_running(process, root)
    stopped_s = kill_one(family, "ray::RayWorker", signal.SIGSTOP)
    status, _, said = finish(process, timeout=3 * LONGEST_S)
    assert status == 0, said
    assert "gave no sign of life for 45 s and was killed" in said
    tally("ray", runs=1)
    assert time.monotonic() - stopped_s < 2 * LONGEST_S
    assert committed(root) == committed(finished_root)


@pytest.mark.parametrize("victim", ["node", "head"])
def test_a_node_of_two_that_dies(
    victim: str,
    fitted_root: Path,
    finished_root: Path,
    copy_root: Callable[[Path], Path],
    monkeypatch: pytest.MonkeyPatch,
):
    root = copy_root(fitted_root)
    # workers have the cluster's environment; without its head, Ray itself goes on for a while, and may well be done
    monkeypatch.setenv("WAVEMILL_FAILPOINTS", SLOW_SHARD if victim == "node" else "shard-before-write=sleep:8")
    with two_nodes() as cluster:
        process = tokenize_process(root, "--address", cluster.address)
        until_running(process, root)
        killed_s = time.monotonic()
        if victim == "node":
            cluster.remove_node(cluster.worker_nodes.copy().pop(), allow_graceful=False)
        else:
            cluster.head_node.kill_gcs_server(check_alive=False)
        status, _, said = finish(process, timeout=3 * LONGEST_S)
        if victim == "node":
            assert status == 0, said
            assert "a worker died on shard" in said
        else:
            assert status == 1, said
            assert "has not answered for" in said
            tally("ray", most_s=time.monotonic() - killed_s)
            assert time.monotonic() - killed_s < LONGEST_S
    tally("ray", runs=1)
    tokenize(Root(root), STREAMS, InlineEngine, TokenizeOptions())
    assert committed(root) == committed(finished_root)


def until_running(process: "subprocess.Popen[str]", root: Path) -> set[int]:
    """The run's processes, once workers have done a shard each and more."""
    deadline = time.monotonic() + 120
    while len(list((root / "streams").glob("semantic/shard-*"))) < 3:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "three shards were not written in two minutes"
        time.sleep(0.05)
    return descendants(process.pid)


def kill_one(family: set[int], name: str, number: signal.Signals) -> float:
    """Send a signal to one process of that name; when that was."""
    os.kill(next(pid for pid in sorted(family) if name in command_of(pid).split(" ")[0]), number)
    return time.monotonic()


def without_agents(family: set[int]) -> set[int]:
    """Ray's two agents only report; Ray lets them try to reach the dead cluster for a minute before they end."""
    return {pid for pid in family if "Agent" not in command_of(pid)}


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


@contextmanager
def two_nodes() -> Iterator[Any]:
    """A cluster of two nodes of one core each, on this machine."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        yield cluster
    finally:
        cluster.shutdown()
