"""The driver's side of a shard table: one writer at a time, nothing committed twice, whatever fails in between."""

import time
import uuid
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Protocol

from ..tokenizers.spec import RunFailed
from .failpoints import failpoint
from .root import Root
from .table import ATTEMPTS, COMMIT_ERRORS, PATIENCE_S, DeltaLog, Receipt, Snapshot, reason


class StreamTaken(RunFailed):
    """Another driver has fenced this table since we did: it goes on, we stop."""


class TableLog(Protocol):
    """A table's log as the driver's protocol needs it: seen at one version until it is refreshed, appends or not.

    Any call may raise `DeltaError` or `OSError`. From `append` that says nothing: the commit may have been made, or be
    made yet.
    """

    @property
    def version(self) -> int: ...

    @property
    def epoch(self) -> int:
        """The app transaction of the last commit that carried one; 0 if none did."""
        ...

    def refresh(self) -> None:
        """Go to the newest version."""
        ...

    def snapshot(self) -> Snapshot:
        """Raises `UserError` for a table that is not ours."""
        ...

    def drivers(self) -> list[str]:
        """Who made the table's last commits, the newest first."""
        ...

    def append(self, receipts: Sequence[Receipt], *, epoch: int, driver: str) -> None:
        """Make a commit of these files and this epoch, unless one that carries an epoch came behind our version."""
        ...

    def remove(self, shards: Sequence[int], *, epoch: int, driver: str) -> None:
        """Make such a commit in which these shards' files are no longer named. They are there still, and are whole."""
        ...

    def forget_missing(self, *, epoch: int, driver: str) -> None:
        """Make such a commit in which files that are not there are no longer named."""
        ...


class TableWriter:
    """The one driver that may commit to a table: fences others out when it starts, commits receipts in batches.

    A fence is an empty commit that raises the table's app transaction to the next epoch. Each later commit carries
    the same epoch and is made on a log in which that epoch was just seen, so another driver's fence makes it fail:
    `StreamTaken`. A commit whose answer was lost is looked up in the table before it is judged.
    """

    def __init__(
        self,
        root: Root,
        folder: str,
        *,
        open_log: Callable[[Root, str], TableLog] = DeltaLog,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Take the table over. Raises `StreamTaken` if another does so meanwhile, `UserError` if it is not ours."""
        self._root = root
        self._folder = folder
        self._place = root.join(folder)
        self._open_log = partial(open_log, root, folder)
        self._sleep = sleep
        self._driver = uuid.uuid4().hex
        self._log: TableLog | None = None
        self._try(self._begin)
        self._try(self._fence)
        self._try(self._look)

    def commit(self, receipts: Iterable[Receipt]) -> None:
        """Make these shards part of the table: all, once. Raises `StreamTaken`, and `RunFailed` if a file is gone."""
        by_shard = {receipt.shard: receipt for receipt in receipts}
        self._try(partial(self._append_missing, by_shard))

    def replace(self, receipts: Iterable[Receipt], *, damaged: Collection[int] = ()) -> None:
        """Put these files in the place of those that the table has for their shards. Raises what `commit` does.

        In two commits: who dies in between leaves shards that the stream lacks, for `tokenize` to make. Versions before
        this one keep the files that they name, unless `damaged` says that those of a shard cannot be read: these go.
        """
        by_shard = {receipt.shard: receipt for receipt in receipts}
        self._try(partial(self._remove_others, by_shard, damaged))
        failpoint("shards-removed")
        self.commit(by_shard.values())

    def _try(self, step: Callable[[], object]) -> None:
        """Take a step, which begins with a look at the newest version; and again if it fails or its answer is lost."""
        until = time.monotonic() + PATIENCE_S
        for attempt in range(ATTEMPTS):
            try:
                step()
                return
            except COMMIT_ERRORS as error:
                # once more in any case: the time may have gone by while this computer slept
                if attempt == ATTEMPTS - 1 or (attempt and time.monotonic() > until):
                    raise self._gave_up(error) from error
                self._log = None  # opened anew: credentials may have expired
                self._sleep(0.1 * 2**attempt)

    def _begin(self) -> None:
        log = self._newest()
        self.snapshot = log.snapshot()  # refuses what is not ours before it is touched
        self._epoch = log.epoch + 1

    def _fence(self) -> None:
        log = self._newest()
        if log.epoch >= self._epoch:
            # an answer of ours was lost, or another run was faster
            if self._driver not in log.drivers():
                raise StreamTaken(self._taken())
            return
        failpoint("before-fence")
        log.append([], epoch=self._epoch, driver=self._driver)
        failpoint("after-fence")

    def _look(self) -> TableLog:
        """The log at its newest version, in which the epoch is still ours, and its snapshot."""
        failpoint("before-look")
        log = self._newest()
        if log.epoch != self._epoch:
            raise StreamTaken(self._taken())
        if log.version != self.snapshot.version:
            # an answer of ours was lost, or another tool was here: see that it is still a shard table
            self.snapshot = log.snapshot()
        return log

    def _append_missing(self, receipts: dict[int, Receipt]) -> None:
        log = self._look()
        missing = {shard: receipts[shard] for shard in sorted(receipts) if shard not in self.snapshot.files}
        if not missing:
            return
        for receipt in missing.values():
            self._require_there(receipt)
        failpoint("before-commit")
        log.append(list(missing.values()), epoch=self._epoch, driver=self._driver)
        failpoint("after-commit")
        files = dict(sorted({**self.snapshot.files, **missing}.items()))
        self.snapshot = replace(self.snapshot, version=self.snapshot.version + 1, files=files)

    def _remove_others(self, receipts: dict[int, Receipt], damaged: Collection[int]) -> None:
        seen = self._look()
        named = self.snapshot.files
        other = [shard for shard in receipts if shard in named and named[shard].file_name != receipts[shard].file_name]
        for shard in other:
            if shard in damaged:
                with suppress(FileNotFoundError):
                    self._root.remove(f"{self._folder}/{named[shard].file_name}")
        if set(other) & set(damaged):
            seen.forget_missing(epoch=self._epoch, driver=self._driver)
            seen = self._look()
        sound = [shard for shard in other if shard in self.snapshot.files and shard not in damaged]
        if sound:
            seen.remove(sound, epoch=self._epoch, driver=self._driver)
            self._look()

    def _require_there(self, receipt: Receipt) -> None:
        """A vacuum may have removed the file of a run that stood still for hours, as on a computer that slept."""
        if not self._root.exists(f"{self._folder}/{receipt.file_name}"):
            raise RunFailed(
                f"{self._place}/{receipt.file_name} was written, but is gone: it was removed before it was committed, "
                "as a vacuum does if a run stands still for hours. Run the command again: what is missing is made anew."
            )

    def _newest(self) -> TableLog:
        if self._log is None:
            self._log = self._open_log()
        else:
            self._log.refresh()
        return self._log

    def _gave_up(self, error: Exception) -> RunFailed:
        return RunFailed(
            f"Cannot commit to {self._place} after several tries: {reason(error)}. "
            "What was committed stays. See that there is space and that it may be written to, then run again."
        )

    def _taken(self) -> str:
        return (
            f"{self._place} was taken over by another run that started after this one. "
            "That run goes on; this one stops. Nothing is lost: run the command again when the other has ended."
        )
