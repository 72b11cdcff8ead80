"""A deterministic simulation of runs on one dataset: the real job, writer and vacuum over a simulated store.

Drivers, vacuums and other tools are greenlets. Each gives way before every request to the store, and one seed decides
who goes on and what becomes of the request: made, refused, made but the answer lost, made but the asker killed, made
later. Nothing else is random, so a seed is a history. A history is judged as it happens, by `Violation`.

The store is strongly consistent and creates atomically, as those are that `wavemill doctor` passes. One thing is taken
for granted, and counted: a run that stood still for so long that vacuum does not spare its files any more does not go
on and commit them in the very moment in which a vacuum, having looked for them in the newest snapshot, removes them.

    python tests/faults/simulation.py SEED            prints the history of a seed
    python tests/faults/simulation.py FIRST LAST      runs seeds and prints what was in them
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from deltalake.exceptions import CommitFailedError

sys.path.insert(0, str(Path(__file__).parent))
from simulated_world import HOUR, ROWS, Clock, Result, Violation, World, made
from wavemill.jobs import tokenize as job
from wavemill.pipelines.tokenize import ShardReport, ShardTask, Work, WorkerAbout
from wavemill.storage import vacuum
from wavemill.storage.stores import StoreTrouble
from wavemill.storage.table import Receipt, Snapshot
from wavemill.storage.writer import TableWriter
from wavemill.tokenizers.spec import UserError

OPTIONS = job.TokenizeOptions(max_error_share=1.0)
DELTA_ATTEMPTS = 16  # delta-rs's own, each at the next version


class SimLog:
    """A table's log on the simulated store, with the rules of delta-rs."""

    def __init__(self, root: "SimRoot", folder: str) -> None:
        self._root = root
        self._world = root.world
        self._folder = folder
        self._log = root.world.logs[folder]
        self.version = self._world.read(f"opens {folder}", self._newest)
        assert self._world.running is not None
        self._world.running.opened.setdefault(folder, self.version)

    @property
    def epoch(self) -> int:
        return self._log[self.version].epoch

    def refresh(self) -> None:
        self.version = self._world.read(f"looks at {self._folder}", self._newest)

    def snapshot(self) -> Snapshot:
        metadata = {"numerics": {}}
        return Snapshot("sim://", self._folder, self.version, self._folder, metadata, self._log[self.version].files)

    def drivers(self) -> list[str]:
        who = f"asks who committed to {self._folder}"
        return self._world.read(who, lambda: [commit.driver for commit in self._log[-20:]][::-1])

    def append(self, receipts: Sequence[Receipt], *, epoch: int | None, driver: str) -> None:
        process = self._world.running
        assert process is not None
        try:
            self._append(receipts, epoch, driver)
        finally:
            process.looked_for.clear()

    def _append(self, receipts: Sequence[Receipt], epoch: int | None, driver: str) -> None:
        at = self.version
        told = f"shards {[receipt.shard for receipt in receipts]}" if receipts else "a fence" if epoch else "nothing"
        names = [f"{self._folder}/{receipt.file_name}" for receipt in receipts]
        for _ in range(DELTA_ATTEMPTS):
            newest = self._world.read(f"lists the log of {self._folder}", self._newest)
            if epoch is not None and any(commit.has_epoch for commit in self._log[at + 1 : newest + 1]):
                raise CommitFailedError("Transaction failed: Concurrent transaction failed")
            at = newest
            put = partial(self._world.put_commit, self._folder, at + 1, self._root.name, driver, receipts, epoch)
            if self._world.write(f"puts {self._folder} version {at + 1}, epoch {epoch}: {told}", put, names):
                return
        raise CommitFailedError("Failed to commit transaction: too many attempts")

    def _newest(self) -> int:
        return len(self._log) - 1


@dataclass(frozen=True, slots=True)
class SimRoot:
    """The root as one process sees it."""

    world: World
    name: str  # of the process
    uri: str = "sim://"
    is_local: bool = True  # a store that creates atomically

    def join(self, relative: str) -> str:
        return f"sim://{relative}"

    def require_writable(self) -> None:
        pass

    def list_files(self, relative: str) -> list[tuple[str, int, float]]:
        def listed() -> list[tuple[str, int, float]]:
            files = self.world.files.items()
            return sorted((path.rpartition("/")[2], 1, at) for path, at in files if path.startswith(f"{relative}/"))

        return self._read(f"lists {relative}", listed)

    def list(self, relative: str) -> list[str]:
        """Nothing lies beside the tables."""
        return []

    def exists(self, relative: str) -> bool:
        found = self._read(f"looks for {relative}", lambda: relative in self.world.files)
        assert self.world.running is not None
        self.world.running.looked_for.append(relative)
        return found

    def modified(self, relative: str) -> float:
        def at() -> float:
            if relative not in self.world.files:
                raise FileNotFoundError(relative)
            return self.world.files[relative]

        return self._read(f"looks at {relative}", at)

    def remove(self, relative: str) -> None:
        self.world.remove_file(relative)

    def _read(self, what: str, look: Callable[[], Result]) -> Result:
        try:
            return self.world.read(what, look)
        except FileNotFoundError:
            raise
        except (OSError, CommitFailedError) as error:
            raise StoreTrouble(str(error)) from error


class SimEngine:
    """Workers: they write the files of some shards at a time, and hand in receipts in any order."""

    def __init__(self, world: World, life: int) -> None:
        self._world = world
        self._life = life

    def start(self, work: Work, num_tasks: int) -> WorkerAbout:
        return WorkerAbout(specs={}, fingerprints={}, numerics={})

    def run(self, tasks: Sequence[ShardTask]) -> Iterator[ShardReport]:
        world = self._world
        todo = list(tasks)
        world.rng.shuffle(todo)
        handed_in: list[ShardTask] = []
        while todo:
            some, todo = todo[: (count := 1 + int(world.random() * 3))], todo[count:]
            reports = [self._tokenize(task, self._life) for task in some]
            handed_in += some
            if world.random() < 0.1:  # an attempt that was given up ends after the next one's shard is committed
                reports.append(self._tokenize(handed_in[0], self._life + 1))
            if world.random() < 0.5:
                reports.reverse()
            yield from reports

    def close(self) -> None:
        pass

    def _tokenize(self, task: ShardTask, content: int) -> ShardReport:
        world = self._world
        receipt = made(task.shard, content if world.several_contents else 0)
        for stream in world.streams:
            if stream.name in task.streams:
                self._write(f"{stream.folder}/{receipt.file_name}")
        return ShardReport(
            shard=task.shard,
            receipts=dict.fromkeys(task.streams, receipt),
            num_segments=ROWS,
            num_errors=0,
            duration_s=1.0,
            decode_s=0.0,
            encode_s=0.0,
            write_s=0.0,
            fingerprints={},
            numerics={},
            errors_by_class={},
            example_error="",
        )

    def _write(self, path: str) -> None:
        world = self._world
        for _ in range(4):
            try:
                world.write(f"writes {path}", partial(world.put_file, path))
                return
            except (OSError, CommitFailedError):
                continue
        raise StoreTrouble(f"{path} cannot be written")


def read_snapshot(root: SimRoot, folder: str, *, version: int | None = None) -> Snapshot:
    assert version is None
    try:
        return SimLog(root, folder).snapshot()
    except (OSError, CommitFailedError) as error:
        raise UserError(str(error)) from error


@contextmanager
def installed(
    *, writer: type[TableWriter] = TableWriter, remove_leftovers: Callable[..., Any] = vacuum.vacuum, **in_job: Any
) -> Iterator[Callable[[int], World]]:
    """Puts the simulated store under the job; gives a function that runs a seed to its end, or raises `Violation`.

    Other code than the real one may take the place of the writer, of vacuum and, by name, of what is in the job.
    """

    class Watched(writer):
        def __init__(self, root: SimRoot, folder: str) -> None:
            self._watched = root.world, folder
            super().__init__(root, folder, open_log=SimLog, sleep=lambda seconds: None)  # pyright: ignore

        def commit(self, receipts: Sequence[Receipt]) -> None:  # pyright: ignore
            super().commit(receipts)
            world, folder = self._watched
            world.require_committed(folder, receipts, self.snapshot)

    described = mock.Mock(fingerprint={})
    with (
        mock.patch.multiple(
            job,
            TableWriter=Watched,
            read_snapshot=read_snapshot,
            open_corpus=lambda root: root.world.corpus,
            describe_stream=lambda root, stream, beside: described,
            full_fingerprint=lambda fingerprint, corpus: fingerprint,
            require_named=lambda *arguments, **options: None,
            require_same_corpus=lambda *arguments: None,
            require_same_fingerprint=lambda *arguments: None,
            time=Clock(),
            **in_job,
        ),
        mock.patch.multiple(
            vacuum,
            read_snapshot=read_snapshot,
            list_streams=lambda root: [stream.name for stream in root.world.streams],
            list_pins=lambda root: [],
            time=Clock(),
        ),
    ):
        yield partial(_simulate, remove_leftovers=remove_leftovers)


def _simulate(seed: int, *, remove_leftovers: Callable[..., Any]) -> World:
    world = World(seed, partial(_vacuum, remove_leftovers))
    try:
        _run(world)
    except Violation as violation:
        raise Violation(
            f"{violation}\n{world.told()}\nseed {seed}: repeat it by python {__file__} {seed}"
        ) from violation.__cause__
    return world


def _run(world: World) -> None:
    job.time = vacuum.time = world.clock  # pyright: ignore
    lives: Counter[str] = Counter()

    def begin(driver: str, wake: int) -> None:
        lives[driver] += 1
        name = f"{driver}{lives[driver]}"
        root: Any = SimRoot(world, name)
        engine: Any = partial(SimEngine, world, 2 * lives.total())
        world.start(name, partial(_tokenize, world, root, engine), wake=wake)

    def restart(name: str) -> None:
        driver = name.rstrip("0123456789")
        if lives.total() >= 8 or driver not in lives or world.random() < 0.2:
            return
        vacuums = 0.2
        if world.random() < 0.5 and not any(process.name[0] in "ABC" for process in world.processes):
            world.end_late()
            world.clock.now += 30 * HOUR * world.random()  # the next day
            vacuums = 0.8
        if world.random() < vacuums:
            world.start_vacuum(60)
        begin(driver, world.step + int(world.random() * 40))

    for driver in "ABC"[: world.rng.choice((1, 2, 2, 2, 3))]:
        begin(driver, int(world.random() * 80))
    if world.random() < 0.3:
        tool, folder = SimRoot(world, "tool"), world.streams[0].folder
        world.start("tool", partial(_commit_nothing, tool, folder), wake=int(world.random() * 80))
    world.run(restart)
    sleepers = list(world.processes)
    world.counts["slept to the end"] += len(sleepers)
    world.end_faults()
    begin("Z", 0)
    world.run(_never)
    world.require_undisturbed()
    for process in sleepers:
        process.wake = 0
    world.run(lambda name: None)
    world.require_undisturbed()
    world.counts["seeds"] = 1
    world.counts["requests"] = len(world.history)


def _tokenize(world: World, root: Any, engine: Any) -> None:
    job.tokenize(root, world.streams, engine, OPTIONS)
    world.require_complete()


def _commit_nothing(root: SimRoot, folder: str) -> None:
    """What another tool may do to a table: empty commits, of no driver."""
    for _ in range(10):
        with suppress(OSError, CommitFailedError):
            SimLog(root, folder).append((), epoch=None, driver="")


def _vacuum(remove_leftovers: Callable[..., Any], world: World) -> None:
    remove_leftovers(SimRoot(world, "vacuum"), older_than_h=vacuum.LEAST_HOURS, dry_run=False)


def _never(name: str) -> None:
    raise Violation(f"{name} did not finish, though nothing was in its way")


def run_seeds(first: int, last: int, **installed_with: Any) -> Counter[str]:
    """Run seeds `[first, last)`, raise the first `Violation`, and count what was in them."""
    counts: Counter[str] = Counter()
    with installed(**installed_with) as simulate:
        for seed in range(first, last):
            counts += simulate(seed).counts
    return counts


if __name__ == "__main__":
    if len(sys.argv) == 2:
        with installed() as simulate:
            print(simulate(int(sys.argv[1])).told())
    else:
        print(dict(run_seeds(int(sys.argv[1]), int(sys.argv[2]))))
