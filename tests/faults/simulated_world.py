"""The store of the simulation, the processes that use it, and what is promised of the two; see simulation.py."""

import random
import signal
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from deltalake.exceptions import CommitFailedError
from greenlet import getcurrent, greenlet
from wavemill.jobs.interrupts import Interrupted
from wavemill.pipelines.streams import StreamConfig
from wavemill.storage.table import Receipt, Snapshot
from wavemill.storage.vacuum import LEAST_HOURS
from wavemill.storage.writer import StreamTaken
from wavemill.tokenizers.spec import RunFailed, UserError
from wavemill.tokenizers.tokenizer import TokenizerConfig

Result = TypeVar("Result")

STREAMS = tuple(StreamConfig(name=name, tokenizer=TokenizerConfig(tokenizer="mel-rvq")) for name in ("one", "two"))
ROWS = 3  # of a shard
NEVER = 10**9  # a step
MOST_STEPS = 20_000  # far more than any seed takes: then it does not end
HOUR = 3600.0


class Violation(AssertionError):
    """The table, or what a process says of it, is not as promised."""


class Killed(BaseException):
    """kill -9: not to be caught."""


@dataclass(frozen=True, slots=True)
class Commit:
    """A version of a table: what was added, by whom, and what the table holds with it."""

    process: str = ""
    driver: str = ""
    added: tuple[Receipt, ...] = ()
    fence: bool = False
    owner: str = ""  # the driver that fenced last
    epoch: int = 0
    has_epoch: bool = False  # this commit carries an epoch
    files: dict[int, Receipt] = field(default_factory=dict)


def _names(commit: Commit) -> set[str]:
    return {receipt.file_name for receipt in commit.files.values()}


@dataclass(slots=True, eq=False)
class Process:
    name: str
    act: Callable[[], None]
    wake: int = 0  # the step before which it sleeps
    faults: int = 0  # of the store, met by it
    looked_for: list[str] = field(default_factory=list)  # files that it is about to commit
    opened: dict[str, int] = field(default_factory=dict)  # the version at which it first saw a table
    outcome: str = ""
    thread: Any = None


@dataclass(slots=True)
class Clock:
    """Stands for the module `time` in the simulated code."""

    now: float = 1e9

    def time(self) -> float:
        return self.now

    monotonic = time


class World:
    """A store, the processes that use it and what befalls them: all of it from one seed."""

    def __init__(self, seed: int, vacuum: Callable[["World"], None]) -> None:
        self.clock = Clock()
        self.rng = random.Random(seed)
        self.random = self.rng.random
        self.history: list[tuple[int, str, str, str]] = []
        self.counts: Counter[str] = Counter()
        self.streams = STREAMS[: 1 + (self.random() < 0.3)]
        num_shards = 2 + int(self.random() * 6)
        rows = {
            shard: Receipt(shard=shard, file_name="", size_bytes=1, num_rows=ROWS, num_errors=0)
            for shard in range(num_shards)
        }
        self.corpus = Snapshot("sim://", "corpus", 0, "corpus", {}, rows)
        self.files: dict[str, float] = {}  # path to the time of writing
        self.logs = {folder: [Commit()] for folder in ("corpus", *(stream.folder for stream in self.streams))}
        self.several_contents = self.random() < 0.15  # a shard made twice may differ, as in another numerics class
        self.processes: list[Process] = []
        self.running: Process | None = None
        self.step = 0
        self._vacuum = vacuum
        self._hub = getcurrent()
        self._late: list[tuple[Callable[[], None], Sequence[str]]] = []  # requests under way, and files they name
        self._down_until = 0
        self._night = int(self.random() * 150) if self.random() < 0.3 else NEVER
        self._set_weather()

    # -- weather

    def _set_weather(self) -> None:
        pick = self.rng.choice
        self.refused = pick((0.0, 0.02, 0.1, 0.25))
        self.late = self.refused + pick((0.0, 0.05, 0.15))
        self.lost = self.late + pick((0.0, 0.05, 0.2))
        self.dies = self.lost + pick((0.0, 0.0, 0.02))
        self.twice = self.dies + pick((0.0, 0.05))
        self.killed = pick((0.0, 0.005, 0.02))
        self.sleeps = pick((0.0, 0.02, 0.06))
        self.outage = pick((0.0, 0.0, 0.005))
        self.burst = pick((0.0, 0.5, 0.9, 0.97))  # how likely the one that ran goes on

    def end_faults(self) -> None:
        """From now on everything goes well."""
        self.refused = self.late = self.lost = self.dies = self.twice = self.killed = self.sleeps = self.outage = 0.0
        self._down_until = 0
        self._night = NEVER
        self.end_late()

    def end_late(self) -> None:
        """What is under way arrives now or never."""
        for arrive, _ in self._late:
            if self.random() < 0.5:
                arrive()
        self._late = []

    # -- requests, made by processes

    def read(self, what: str, look: Callable[[], Result]) -> Result:
        self._give_way()
        if self.random() < self.refused or self.step < self._down_until:
            raise self._fault(what, "refused")
        result = look()
        self._note(what, str(result) if isinstance(result, int | float) else "")
        return result

    def write(self, what: str, make: Callable[[], Result], names: Sequence[str] = ()) -> Result:
        """Send a request that changes the store, with the files that it names, if it is a commit."""
        self._give_way()
        fate = self.random()
        if fate < self.refused or self.step < self._down_until:
            raise self._fault(what, "refused")
        if fate < self.late:
            self._late.append((partial(self._arrive, f"{what}, asked by {self._name()}", make), names))
            raise self._fault(what, "no answer, under way")
        if fate < self.lost:
            raise self._fault(what, f"answer lost: {make()}")
        if fate < self.dies:
            self._note(what, f"killed as it was made: {make()}")
            raise Killed
        result = make()
        if fate < self.twice:
            self.counts["sent twice"] += 1
            self._note(what, f"sent twice, at first {result}")
            result = make()
        self._note(what, str(result))
        return result

    def _arrive(self, what: str, make: Callable[[], object]) -> None:
        self.counts["came late"] += 1
        self.history.append((self.step, "network", what, f"came late: {make()}"))

    def _fault(self, what: str, how: str) -> Exception:
        assert self.running is not None
        self.running.faults += 1
        self.counts[how.partition(":")[0]] += 1
        self._note(what, how)
        return OSError(how) if self.random() < 0.5 else CommitFailedError(how)

    def _note(self, what: str, how: str) -> None:
        self.history.append((self.step, self._name(), what, how))

    def _name(self) -> str:
        return self.running.name if self.running else ""

    def _give_way(self) -> None:
        self._hub.switch()

    # -- time and turns

    def start(self, name: str, act: Callable[[], None], *, wake: int) -> Process:
        """Begin a process, which sleeps up to a step."""
        process = Process(name, act, wake)
        process.thread = greenlet(partial(self._live, process))
        self.processes.append(process)
        return process

    def start_vacuum(self, within: int) -> Process:
        return self.start("vacuum", partial(self._vacuum, self), wake=self.step + int(self.random() * within))

    def _live(self, process: Process) -> None:
        try:
            process.act()
            process.outcome = "done"
        except Killed:
            process.outcome = "killed"
        except Interrupted:
            process.outcome = "terminated"
        except StreamTaken as error:
            self._require_taken(process, str(error))
            process.outcome = "taken over"
        except (RunFailed, UserError) as error:
            if not process.faults:
                raise Violation(f"{process.name} met no fault, yet stopped: {error}") from error
            process.outcome = "stopped"
        except Violation:
            raise
        except Exception as error:
            raise Violation(f"{process.name} crashed: {error!r}") from error
        self.counts[process.outcome] += 1
        self.history.append((self.step, process.name, "ends", process.outcome))

    def turn(self, process: Process) -> None:
        """Let a process go on up to its next request, or kill it before."""
        self.step += 1
        self.clock.now += 4 * self.random()
        if self.step > MOST_STEPS:
            raise Violation("it does not end")
        self.running = process
        if process.thread and self.random() < self.killed:
            process.thread.throw(Killed if self.random() < 0.6 else Interrupted(signal.SIGTERM))
        else:
            process.thread.switch()
        if process.thread.dead:
            self.processes.remove(process)

    def run(self, restart: Callable[[str], None]) -> None:
        """Let the processes run, in any order, until all but the sleepers have ended; start those again that fail."""
        process: Process | None = None
        while True:
            awake = [one for one in self.processes if one.wake <= self.step]
            if not awake:
                next_step = min((one.wake for one in self.processes), default=NEVER)
                if next_step == NEVER:
                    return
                self.step = next_step
                continue
            if self._late and self.random() < 0.08:
                self._late.pop(int(self.random() * len(self._late)))[0]()
            if self.random() < self.outage:
                self._down_until = self.step + int(self.random() * 60)
            if process not in awake or self.random() >= self.burst:
                process = awake[int(self.random() * len(awake))]
            if self.random() < self.sleeps:
                self.counts["slept"] += 1
                process.wake = NEVER if self.random() < 0.1 else self.step + int(self.random() * 150)
                continue
            if self.step >= self._night:
                self._sleep_over()
            self.turn(process)
            if process.outcome in ("killed", "terminated", "stopped", "taken over"):
                restart(process.name)

    def _sleep_over(self) -> None:
        """Everybody sleeps for hours, as on computers that were closed, but for a vacuum, which begins and ends."""
        self.counts["nights"] += 1
        self._night = NEVER
        self.end_late()
        self.clock.now += 3 * HOUR
        awake = self.start_vacuum(0)
        while not awake.outcome:
            self.turn(awake)

    def told(self) -> str:
        """The history, a line for each request."""
        return "\n".join(f"{step:6} {name:8} {what}: {how}" for step, name, what, how in self.history)

    # -- the store, and what must hold in it

    def put_commit(
        self, folder: str, version: int, name: str, driver: str, added: Sequence[Receipt], epoch: int | None
    ) -> bool:
        """Put-if-absent: whether the version was free."""
        log = self.logs[folder]
        if version < len(log):
            return False
        before = log[-1]
        if added:
            self.judge(folder, name, driver, added)
        fence = epoch is not None and not added
        log.append(
            Commit(
                process=name,
                driver=driver,
                added=tuple(added),
                fence=fence,
                owner=driver if fence else before.owner,
                epoch=before.epoch if epoch is None else epoch,
                has_epoch=epoch is not None,
                files={**before.files, **{receipt.shard: receipt for receipt in added}} if added else before.files,
            )
        )
        self.counts["fences" if fence else "commits"] += 1
        return True

    def judge(self, folder: str, name: str, driver: str, added: Sequence[Receipt]) -> None:
        """Whether these files may be made part of a table now."""
        before = self.logs[folder][-1]
        if before.owner != driver:
            raise Violation(f"{name} commits to {folder}, though another driver fenced it since")
        for receipt in added:
            if receipt.shard in before.files:
                raise Violation(f"{name} commits shard {receipt.shard} to {folder}, which has it")
            if f"{folder}/{receipt.file_name}" not in self.files:
                raise Violation(f"{name} commits {receipt.file_name} to {folder}, which is not there")

    def put_file(self, path: str) -> None:
        self.files[path] = self.clock.now

    def remove_file(self, path: str) -> None:
        assert self.running is not None
        folder, _, name = path.rpartition("/")
        log = self.logs[folder]
        if name in _names(log[self.running.opened[folder]]):
            raise Violation(f"{path} is removed, and the table names it")
        if self.clock.now - self.files[path] < LEAST_HOURS * HOUR:
            raise Violation(f"{path} is removed, and was written of late")
        looked_for = [*(process.looked_for for process in self.processes), *(names for _, names in self._late)]
        if name in _names(log[-1]) or any(path in paths for paths in looked_for):
            self.counts["left to chance"] += 1
            return
        del self.files[path]
        for process in self.processes:
            process.faults += 1  # it may have been about to commit this
        self.counts["leftovers removed"] += 1
        self._note(f"removes {path}", "")

    def require_committed(self, folder: str, receipts: Sequence[Receipt], snapshot: Snapshot) -> None:
        """What a writer says when it returns from a commit: these shards are in, and this is the table."""
        files = self.logs[folder][-1].files
        for receipt in receipts:
            if receipt.shard not in files:
                raise Violation(f"{self._name()} says that it committed shard {receipt.shard} to {folder}")
        for shard, receipt in snapshot.files.items():
            if files.get(shard) != receipt:
                raise Violation(f"{self._name()} takes {receipt.file_name} for committed to {folder}")

    def _require_taken(self, process: Process, said: str) -> None:
        for folder, opened in process.opened.items():
            if f"sim://{folder} " not in said:
                continue
            log = self.logs[folder]
            mine = max((at for at, one in enumerate(log) if one.fence and one.process == process.name), default=opened)
            if not any(one.fence and one.process != process.name for one in log[mine + 1 :]):
                raise Violation(f"{process.name} says that {folder} was taken over, but nobody else fenced it")

    def require_complete(self) -> None:
        """Every shard, in every stream."""
        for stream in self.streams:
            files = self.logs[stream.folder][-1].files
            if sorted(files) != list(self.corpus.files):
                raise Violation(f"{stream.folder} ends with shards {sorted(files)} of {len(self.corpus.files)}")

    def require_undisturbed(self) -> None:
        """The table of a run that nothing befell, and no file was ever given to it but those it names."""
        self.require_complete()
        for stream in self.streams:
            log = self.logs[stream.folder]
            added = [receipt for commit in log for receipt in commit.added]
            if sorted(receipt.shard for receipt in added) != list(self.corpus.files):
                raise Violation(f"{stream.folder} was given other files than it names")
            for shard, receipt in log[-1].files.items():
                if not self.several_contents and receipt != made(shard, 0):
                    raise Violation(f"{stream.folder} ends with other content in shard {shard}")


def made(shard: int, content: int) -> Receipt:
    """What a worker makes of a shard."""
    name = f"shard-{shard:06d}-{content:016x}.parquet"
    return Receipt(shard=shard, file_name=name, size_bytes=1, num_rows=ROWS, num_errors=0)
