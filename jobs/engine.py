"""Who runs the workers: in this process, or Ray (see ray_engine.py)."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, Protocol

from ..pipelines.tokenize import ShardTask
from ..storage.table import Snapshot
from ..tokenizers.spec import RunFailed
from ..tokenizers.tokenizer import Mode


class WorkersLost(RunFailed):
    """Workers are gone for good, and with them what they had in hand; what others reported is good."""


class Worker(Protocol):
    """Warm models that turn shards into files: pipelines/tokenize.py and pipelines/sample.py have one each."""

    def about(self) -> Any:
        """What it is, for the driver to compare with what it expects."""
        ...

    def run(self, tasks: Sequence[ShardTask]) -> list[Any]:
        """A report of each shard, in order."""
        ...

    def close(self) -> None: ...


class Work(Protocol):
    """What makes workers, wherever they run. Picklable."""

    @property
    def corpus(self) -> Snapshot: ...

    @property
    def device(self) -> str: ...

    @property
    def batch_seconds(self) -> Mapping[Mode, float] | None:
        """None where each segment is taken alone."""
        ...

    @property
    def together(self) -> int:
        """Segments that a worker should take together, so that batches fill."""
        ...

    def worker(self) -> Worker: ...


class Engine(Protocol):
    """Runs shard tasks on workers. `close` is called in every case."""

    def start(self, work: Work, num_tasks: int) -> Any:
        """Make workers ready for so many tasks; what they are."""
        ...

    def run(self, tasks: Sequence[ShardTask]) -> Iterator[Any]:
        """Reports in the order in which shards are done. Raises `WorkersLost` if shards were lost."""
        ...

    def close(self) -> None: ...


class InlineEngine:
    """One worker in this process: the same code without Ray."""

    def __init__(self) -> None:
        self._worker: Worker | None = None
        self._work: Work | None = None

    def start(self, work: Work, num_tasks: int) -> Any:
        self._work = work
        self._worker = work.worker()
        return self._worker.about()

    def run(self, tasks: Sequence[ShardTask]) -> Iterator[Any]:
        assert self._worker is not None, "start first"
        assert self._work is not None, "start first"
        for group in task_groups(tasks, self._work, num_workers=1):
            yield from self._worker.run(group)

    def close(self) -> None:
        if self._worker is not None:
            self._worker.close()
            self._worker = None


def task_groups(tasks: Sequence[ShardTask], work: Work, *, num_workers: int) -> list[tuple[ShardTask, ...]]:
    """Shards that a worker tokenizes together: one if segments are encoded alone, else so many that batches fill.

    Those of a group lack the same streams. Where there are fewer segments than would fill the batches of all workers,
    each worker gets a part of them.
    """
    if work.batch_seconds is None:
        return [(task,) for task in tasks]
    num_segments = {task.shard: work.corpus.files[task.shard].num_rows for task in tasks}
    enough = min(work.together, sum(num_segments.values()) / num_workers)
    groups: list[tuple[ShardTask, ...]] = []
    by_streams = sorted(tasks, key=lambda task: task.streams)
    for _, alike in groupby(by_streams, key=lambda task: task.streams):
        group: list[ShardTask] = []
        count = 0
        for task in alike:
            group.append(task)
            count += num_segments[task.shard]
            if count >= enough:
                groups.append(tuple(group))
                group, count = [], 0
        if group:
            groups.append(tuple(group))
    return groups
