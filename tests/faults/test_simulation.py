"""Drivers, vacuums and other tools on one simulated store, in every order that the seeds reach.

What the seeds show of the code is worth what they show of code that is wrong: some twenty mistakes, each a few words of
the writer, of vacuum or of the job, and each must be found.
"""

import inspect
import itertools
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError

pytest.importorskip("greenlet")
sys.path.insert(0, str(Path(__file__).parent))
import simulation
from simulated_world import STREAMS, Process, Violation, World, made
from simulation import SimLog, SimRoot, installed, run_seeds
from wavemill.jobs import tokenize as job
from wavemill.storage import vacuum, writer
from wavemill.storage.root import Root
from wavemill.storage.schema import CORPUS_SCHEMA
from wavemill.storage.table import DeltaLog, Receipt, create_table
from wavemill.storage.writer import TableLog

SEEDS = 1_500
MANY_SEEDS = 50_000
SEEDS_FOR_A_MISTAKE = 6_000  # most are found in the first ten
FOLDER = STREAMS[0].folder

TRUE, FALSE = "if True:", "if False:"
FENCES = "log.append([], epoch=self._epoch, driver=self._driver)"
COMMITS = "log.append(list(missing.values()), epoch=self._epoch, driver=self._driver)"
LOOKS = "if log.epoch != self._epoch:"
WHOSE = "if self._driver not in log.drivers():"
IGNORES_ERRORS = "with __import__('contextlib').suppress(*COMMIT_ERRORS): "
OPENS = "self._open_log()."

TAKEN, FENCED, TWICE = "nobody else fenced it", "though another driver fenced it", "which has it"
CLAIMED, GONE, CRASHED = "says that it committed|for committed", "which is not there", "crashed"
OF_LATE = "was written of late"

# what is wrong, what is said of the history in which it is found, and the change of the source
WRITER = [
    ("no fence", TAKEN, "self._try(self._fence)", "pass"),
    ("the epoch is not raised", f"{TAKEN}|{FENCED}", "log.epoch + 1", "max(log.epoch, 1)"),
    ("a fence of the same epoch is taken for ours", FENCED, WHOSE, FALSE),
    ("a fence of the same epoch is overlooked", FENCED, "log.epoch >= self._epoch", "log.epoch > self._epoch"),
    ("a lost fence is taken for another's", TAKEN, WHOSE, TRUE),
    ("a lost fence is looked for in the last commit alone", TAKEN, "in log.drivers()", "in log.drivers()[:1]"),
    ("a fence without an answer is taken for made", f"{TAKEN}|{FENCED}", FENCES, IGNORES_ERRORS + FENCES),
    ("no look at the epoch", FENCED, LOOKS, FALSE),
    ("a look at the epoch of a stale log", f"{FENCED}|{TWICE}", "log = self._look()",
     "log = self._look()\n        log.refresh()"),
    ("a higher epoch is let pass", FENCED, LOOKS, "if log.epoch < self._epoch:"),
    ("no look at what a new version holds", TWICE, "if log.version != self.snapshot.version:", FALSE),
    ("what is committed is committed again", TWICE, " if shard not in self.snapshot.files}", "}"),
    ("a commit without an answer is taken for made", CLAIMED, COMMITS, IGNORES_ERRORS + COMMITS),
    ("a commit without an answer is made again blindly", f"{TWICE}|{FENCED}", COMMITS,
     f"try: {COMMITS}\n        except COMMIT_ERRORS: {COMMITS.replace('log.', OPENS)}"),
    ("any new version is taken for a commit of ours", CLAIMED, COMMITS,
     f"try: {COMMITS}\n        except COMMIT_ERRORS:\n            if {OPENS}version == log.version: raise"),
    ("files are not looked for before they are committed", GONE, "self._require_there(receipt)", "pass"),
    ("what the store refuses is not tried again", CRASHED, "except COMMIT_ERRORS as", "except ValueError as"),
]  # fmt: skip
VACUUM = [
    ("new files are removed", OF_LATE, "time.time() - older_than_h * 3600", "time.time()"),
    ("what is written again meanwhile is removed", OF_LATE, "if root.modified(leftover.path) < limit:", TRUE),
    ("what the newest snapshot names is removed", "the table names it", " and file not in needed", ""),
]
TASKS = [
    (
        "a resumed run looks at one stream for all",
        "met no fault, yet stopped",
        "done[stream.name]",
        "done[streams[0].name]",
    )
]


def mistakes(*kinds: tuple[str, Any, str, list[tuple[str, str, str, str]]]) -> list[Any]:
    return [
        pytest.param(place, module, name, *rest, id=what) for place, module, name, some in kinds for what, *rest in some
    ]


def changed(module: Any, name: str, old: str, new: str) -> Any:
    """A function or class of a module with one place of its source changed."""
    source = inspect.getsource(getattr(module, name))
    assert source.count(old) == 1, f"{old!r} stands {source.count(old)} times in {name}: say this mistake anew"
    made_of_it: dict[str, Any] = {}
    exec(compile(source.replace(old, new), f"<{name}, changed>", "exec"), vars(module), made_of_it)
    return made_of_it[name]


@pytest.mark.parametrize(
    ("place", "module", "name", "said", "old", "new"),
    mistakes(
        ("writer", writer, "TableWriter", WRITER),
        ("remove_leftovers", vacuum, "vacuum", VACUUM),
        ("_tasks", job, "_tasks", TASKS),
    ),
)
def test_a_mistake_in_the_code_is_found(place: str, module: Any, name: str, said: str, old: str, new: str):
    with pytest.raises(Violation, match=said):
        run_seeds(0, SEEDS_FOR_A_MISTAKE, **{place: changed(module, name, old, new)})


def test_no_seed_loses_or_doubles_a_shard():
    counts = run_seeds(0, SEEDS)
    for befell in ("killed", "terminated", "stopped", "taken over", "answer lost", "came late", "sent twice", "nights"):
        assert counts[befell] > 100, f"these seeds say little of what is {befell}"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_no_seed_of_very_many_loses_or_doubles_a_shard():
    started = time.process_time()
    counts = run_seeds(0, MANY_SEEDS)
    print("\n" + ", ".join(f"{count:,} {name}" for name, count in counts.most_common()))
    print(f"{counts['seeds']:,} seeds in {time.process_time() - started:.0f} s of one core")
    assert counts["seeds"] == MANY_SEEDS


@pytest.mark.slow
def test_a_seed_is_one_history_in_every_process():
    with installed() as simulate:
        told = [simulate(seed).told() for seed in (7, 8)]
        assert told[0] == simulate(7).told() != told[1]
    command = [sys.executable, simulation.__file__, "7"]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONHASHSEED": "1"}, capture_output=True, text=True, check=True, timeout=200
    )
    assert done.stdout.rstrip("\n") == told[0]


def test_a_history_that_breaks_a_promise_is_told_with_the_way_to_repeat_it():
    with pytest.raises(Violation) as found:
        run_seeds(3, 100, writer=changed(writer, "TableWriter", LOOKS, FALSE))
    said = str(found.value).splitlines()
    assert FENCED in said[0]
    assert any("puts" in line for line in said[1:-1])
    assert said[-1].startswith("seed ")
    assert "simulation.py" in said[-1]


# What the simulated log does is what delta-rs does

Step = tuple[str, str, int, int]  # what, on whose log, epoch, shard


def script(seed: int) -> list[Step]:
    rng, shards = random.Random(seed), itertools.count()
    steps = []
    for _ in range(14):
        what = rng.choices(["open", "refresh", "fence", "commit", "tool"], [15, 20, 25, 30, 10])[0]
        steps.append((what, rng.choice("abc"), rng.randint(1, 3), next(shards)))
    return [*(("open", who, 0, 0) for who in "abc"), *steps]


def played(steps: list[Step], open_log: Callable[[], TableLog], commit_nothing: Callable[[], None]) -> list[Any]:
    """What each step led to: an error's kind, and what the log then shows."""
    logs: dict[str, TableLog] = {}
    told = []
    for step in steps:
        what, who, epoch, shard = step
        error = ""
        try:
            if what == "tool":
                commit_nothing()
            elif what == "open":
                logs[who] = open_log()
            elif what == "refresh":
                logs[who].refresh()
            else:
                logs[who].append([made(shard, 0)] if what == "commit" else [], epoch=epoch, driver=who)
        except DeltaError as raised:
            error = type(raised).__name__
        log = logs[who]
        told.append((step, error, log.version, log.epoch, list(log.snapshot().files), log.drivers()))
    return told


def empty_table(path: Path) -> Root:
    root = Root(path)
    create_table(root, FOLDER, schema=CORPUS_SCHEMA, metadata={})
    return root


def commit_nothing(root: Root) -> None:
    delta = DeltaTable(root.join(FOLDER))
    delta.create_write_transaction([], mode="append", schema=delta.schema())


@pytest.mark.parametrize("seed", [pytest.param(seed, marks=[pytest.mark.slow] * (seed >= 12)) for seed in range(100)])
def test_the_simulated_log_does_what_that_of_delta_does(seed: int, tmp_path: Path):
    class Unjudged(World):
        def judge(self, folder: str, name: str, driver: str, added: Sequence[Receipt]) -> None:
            """The scripts are not of drivers."""

    world = Unjudged(seed, lambda world: None)
    world.end_faults()
    world.running = Process("script", lambda: None)
    sim_root: Any = SimRoot(world, "script")
    steps = script(seed)
    simulated = played(
        steps, lambda: SimLog(sim_root, FOLDER), lambda: SimLog(sim_root, FOLDER).append((), epoch=None, driver="")
    )
    root = empty_table(tmp_path)
    real = played(steps, lambda: DeltaLog(root, FOLDER), lambda: commit_nothing(root))
    assert simulated == real
    if seed == 0:
        assert any(error for _, error, *_ in real), "no step of this script is refused"


def test_of_writers_that_commit_to_delta_at_once_one_with_an_epoch_wins_and_those_without_all_do(tmp_path: Path):
    root = empty_table(tmp_path)
    for _ in range(5):
        logs = [DeltaLog(root, FOLDER) for _ in range(4)]
        together = threading.Barrier(len(logs) + 2)

        def fence(number: int) -> bool:
            together.wait()  # noqa: B023
            try:
                logs[number].append([], epoch=1, driver=str(number))  # noqa: B023
            except DeltaError:
                return False
            return True

        def other_tool(_: int) -> None:
            together.wait()  # noqa: B023
            commit_nothing(root)

        version = logs[0].version
        with ThreadPoolExecutor(6) as pool:
            others = pool.map(other_tool, range(2))
            won = list(pool.map(fence, range(4)))
            list(others)
        assert won.count(True) == 1
        log = DeltaLog(root, FOLDER)
        assert log.version == version + 3
        assert str(won.index(True)) in log.drivers()[:3]
