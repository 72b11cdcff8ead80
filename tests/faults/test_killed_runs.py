"""Drivers and workers killed, interrupted and overtaken: nothing lost, nothing twice, the same bytes."""

import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from conftest import STREAMS
from killing import committed, descendants, finish, tokenize_process, wait_until_gone
from tally import tally
from wavemill.jobs.corpus import build_corpus
from wavemill.jobs.engine import InlineEngine
from wavemill.jobs.tokenize import TokenizeOptions, tokenize
from wavemill.pipelines.policy import CorpusPolicy
from wavemill.storage.root import Root

WORKER_FAILPOINTS = ["shard-before-write", "shard-written", "receipt-sent"]


def kill_at(failpoint: str) -> str:
    name, _, hit = failpoint.partition("@")
    return f"{name}=kill" + (f"@{hit}" if hit else "")


def test_a_run_killed_after_some_commits_does_only_the_rest(
    fitted_root: Path, finished_root: Path, copy_root: Callable[[Path], Path], monkeypatch: pytest.MonkeyPatch
):
    root = copy_root(fitted_root)
    monkeypatch.setattr("wavemill.jobs.tokenize._COMMIT_EVERY_SHARDS", 2)
    reports = []

    class StopAfterFive(Exception):
        pass

    def stop(report: object) -> None:
        reports.append(report)
        if len(reports) == 5:
            raise StopAfterFive

    with pytest.raises(StopAfterFive):
        tokenize(Root(root), STREAMS, InlineEngine, TokenizeOptions(), on_report=stop)
    rest = tokenize(Root(root), STREAMS, InlineEngine, TokenizeOptions())
    shards = len(committed(finished_root)["semantic"])
    assert rest.shards == shards - 4  # two commits of two shards; the fifth was done and not committed
    assert committed(root) == committed(finished_root)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_alone")
def test_workers_killed_on_ray_are_replaced_within_the_run(
    fitted_root: Path, finished_root: Path, copy_root: Callable[[Path], Path], tmp_path: Path
):
    root = copy_root(fitted_root)
    failpoints = ",".join(kill_at(name) for name in WORKER_FAILPOINTS)
    status, summary, said = finish(tokenize_process(root, failpoints=failpoints, once=tmp_path / "once"))
    assert status == 0, said
    assert sorted(flag.name for flag in (tmp_path / "once").iterdir()) == sorted(WORKER_FAILPOINTS)
    assert summary["shards"] == len(committed(finished_root)["semantic"])
    assert committed(root) == committed(finished_root)
    tally("ray", runs=1)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_alone")
def test_a_driver_killed_on_ray_leaves_no_worker_and_is_finished_by_the_same_command(
    fitted_root: Path, finished_root: Path, copy_root: Callable[[Path], Path]
):
    root = copy_root(fitted_root)
    process = tokenize_process(root, failpoints="receipt-received=sleep:60@3")
    deadline = time.monotonic() + 60
    while not list((root / "streams").glob("semantic/shard-*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    family = descendants(process.pid)
    # Ray's two agents only report; Ray itself lets them try to reach the dead cluster for a minute before they end
    agents = {pid for pid in family if b"Agent" in Path(f"/proc/{pid}/cmdline").read_bytes()}
    assert len(family) >= 4, "Ray is not running yet"
    os.kill(process.pid, signal.SIGKILL)
    killed_s = time.monotonic()
    process.communicate()
    assert wait_until_gone(family - agents, timeout=20) == set()
    tally("ray", runs=1, most_s=time.monotonic() - killed_s)
    tokenize(Root(root), STREAMS, InlineEngine, TokenizeOptions())
    assert committed(root) == committed(finished_root)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_alone")
def test_a_shard_whose_workers_keep_dying_is_named_and_a_later_run_does_it(
    fitted_root: Path, samples: Path, tmp_path: Path
):
    root = Root(tmp_path / "small")
    build_corpus(root, [str(samples / "speech" / "en_anna_0*")], CorpusPolicy(), shard_hours=1)
    shutil.copytree(fitted_root / "codebooks", tmp_path / "small" / "codebooks")
    status, _, said = finish(tokenize_process(tmp_path / "small", "--workers", "1", failpoints="shard-written=kill"))
    assert status == 1
    tally("ray", runs=1)
    assert "Workers died 3 times on shard(s) 0;" in said
    assert "Traceback" not in said
    assert tokenize(root, STREAMS, InlineEngine, TokenizeOptions()).shards == 1


@pytest.mark.slow
def test_of_two_drivers_one_stops_with_a_sentence_and_the_other_finishes(
    fitted_root: Path, finished_root: Path, copy_root: Callable[[Path], Path]
):
    root = copy_root(fitted_root)
    first = tokenize_process(root, "--engine", "inline", failpoints="receipt-received=sleep:8@1")
    deadline = time.monotonic() + 60
    while len(list((root / "streams").glob("*/_delta_log/*1.json"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)  # until the first driver has fenced both streams
    second = tokenize_process(root, "--engine", "inline")
    status, _, said = finish(second)
    assert status == 0, said
    status, _, said = finish(first)
    assert status == 1, said
    assert "was taken over by another run" in said
    assert "Traceback" not in said
    assert committed(root) == committed(finished_root)


@pytest.mark.parametrize(
    ("engine", "number", "words"),
    [
        ("inline", signal.SIGINT, "Stopped."),
        ("inline", signal.SIGTERM, "Preempted (SIGTERM)."),
        pytest.param("ray", signal.SIGTERM, "Preempted (SIGTERM).", marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_run_commits_what_is_done_and_the_same_command_goes_on(
    engine: str,
    number: signal.Signals,
    words: str,
    fitted_root: Path,
    finished_root: Path,
    copy_root: Callable[[Path], Path],
    request: pytest.FixtureRequest,
):
    if engine == "ray":
        request.getfixturevalue("ray_alone")
    root = copy_root(fitted_root)
    process = tokenize_process(root, "--engine", engine, failpoints="receipt-received=sleep:30@2")
    deadline = time.monotonic() + 60
    while len(list((root / "streams").glob("semantic/shard-*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, number)
    sent_s = time.monotonic()
    status, _, said = finish(process)
    if engine == "ray":
        tally("ray", runs=1, most_s=time.monotonic() - sent_s)
    assert status == 128 + number
    assert words in said
    assert "Traceback" not in said
    assert len(committed(root)["semantic"]) >= 1, "what was done was not committed"
    tokenize(Root(root), STREAMS, InlineEngine, TokenizeOptions())
    assert committed(root) == committed(finished_root)
