"""Who runs the workers: in this process, or Ray (see ray_engine.py)."""

from collections.abc import Iterable, Iterator
from typing import Protocol

from ..pipelines.tokenize import ShardReport, ShardTask, Work, Worker, WorkerAbout


class Engine(Protocol):
    """Runs shard tasks on workers. `close` is called in every case."""

    def start(self, work: Work, num_tasks: int) -> WorkerAbout:
        """Make workers ready for so many tasks; what they are."""
        ...

    def run(self, tasks: Iterable[ShardTask]) -> Iterator[ShardReport]:
        """Reports in the order in which shards are done. Raises `RunFailed` if shards were lost."""
        ...

    def close(self) -> None: ...


class InlineEngine:
    """One worker in this process: the same code without Ray."""

    def __init__(self) -> None:
        self._worker: Worker | None = None

    def start(self, work: Work, num_tasks: int) -> WorkerAbout:
        self._worker = Worker(work)
        return self._worker.about()

    def run(self, tasks: Iterable[ShardTask]) -> Iterator[ShardReport]:
        assert self._worker is not None, "start first"
        for task in tasks:
            yield self._worker.tokenize(task)

    def close(self) -> None:
        if self._worker is not None:
            self._worker.close()
            self._worker = None
