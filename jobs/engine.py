"""Who runs the workers: in this process, or Ray (see ray_engine.py)."""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Protocol

from ..pipelines.tokenize import ShardReport, ShardTask, Work, Worker, WorkerAbout
from ..tokenizers.spec import RunFailed

_TOGETHER = 10_000  # segments of the shards that a GPU's worker takes together: so that batches fill


class WorkersLost(RunFailed):
    """Workers are gone for good, and with them what they had in hand; what others reported is good."""


class Engine(Protocol):
    """Runs shard tasks on workers. `close` is called in every case."""

    def start(self, work: Work, num_tasks: int) -> WorkerAbout:
        """Make workers ready for so many tasks; what they are."""
        ...

    def run(self, tasks: Sequence[ShardTask]) -> Iterator[ShardReport]:
        """Reports in the order in which shards are done. Raises `WorkersLost` if shards were lost."""
        ...

    def close(self) -> None: ...


class InlineEngine:
    """One worker in this process: the same code without Ray."""

    def __init__(self) -> None:
        self._worker: Worker | None = None
        self._work: Work | None = None

    def start(self, work: Work, num_tasks: int) -> WorkerAbout:
        self._work = work
        self._worker = Worker(work)
        return self._worker.about()

    def run(self, tasks: Sequence[ShardTask]) -> Iterator[ShardReport]:
        assert self._worker is not None, "start first"
        assert self._work is not None, "start first"
        for group in task_groups(tasks, self._work, num_workers=1):
            yield from self._worker.tokenize(group)

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
    enough = min(_TOGETHER, sum(num_segments.values()) / num_workers)
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
