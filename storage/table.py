"""Shard tables on Delta Lake: one data file per shard, one writer at a time, nothing committed twice.

The only file that knows deltalake. A worker writes a shard's file and hands back a `Receipt`; the driver, through
`TableWriter`, is the only one who commits.
"""

import json
import re
import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import deltalake
import pyarrow as pa
from deltalake import CommitProperties, DeltaTable, PostCommitHookProperties, Transaction
from deltalake.exceptions import DeltaError, TableNotFoundError
from deltalake.transaction import AddAction

from ..tokenizers.spec import RunFailed, UserError
from .failpoints import failpoint
from .parquet import parquet_bytes, shard_file_name
from .root import Root
from .schema import FORMAT_VERSION
from .stores import redacted, table_options

_SHARD_FILE = re.compile(r"shard-(\d{6,})-[0-9a-f]{16}\.parquet")
_COMMIT_ATTEMPTS = 5
_COMMIT_ERRORS = (DeltaError, OSError)  # applied, refused or never sent: each means look, none means lost
# by default a log older than 30 days is deleted, by delta-rs itself and by any tool that is asked to clean up
_KEEP_HISTORY = {"delta.enableExpiredLogCleanup": "false", "delta.logRetentionDuration": "interval 36500 days"}
_HOOKS = PostCommitHookProperties(create_checkpoint=True, cleanup_expired_logs=False)
_ANSI = re.compile(r"\x1b\[[0-9;]*m")  # colours


class StreamTaken(RunFailed):
    """Another driver has fenced this table since we did: it goes on, we stop."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """A worker's word that a shard's file lies whole in its table's folder."""

    shard: int
    file_name: str
    size_bytes: int
    num_rows: int
    num_errors: int


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One version of a table, resolved to an immutable list of files: picklable, free of deltalake."""

    root_uri: str
    folder: str  # relative to the root
    version: int
    table_id: str  # the table's own: another table in its place has another
    metadata: dict[str, Any]
    files: dict[int, Receipt]  # by shard, ascending

    def path(self, shard: int) -> str:
        return f"{self.folder}/{self.files[shard].file_name}"

    @property
    def num_rows(self) -> int:
        return sum(file.num_rows for file in self.files.values())

    @property
    def num_errors(self) -> int:
        return sum(file.num_errors for file in self.files.values())


def is_shard_file(name: str) -> bool:
    """Whether a file in a table's folder is named as `write_shard` names them."""
    return _SHARD_FILE.fullmatch(name) is not None


def write_shard(root: Root, folder: str, shard: int, table: pa.Table, *, codebook_size: int = 0) -> Receipt:
    """Write one shard's file under its content-addressed name. Never commits, never deletes."""
    content = parquet_bytes(table, codebook_size=codebook_size)
    name = shard_file_name(shard, content)
    failpoint("shard-before-write")
    root.write_bytes(f"{folder}/{name}", content)
    failpoint("shard-written")
    return Receipt(
        shard=shard,
        file_name=name,
        size_bytes=len(content),
        num_rows=table.num_rows,
        num_errors=table.num_rows - table["error"].null_count,
    )


def read_snapshot(root: Root, folder: str, *, version: int | None = None) -> Snapshot | None:
    """A version of a table (the newest if none is given), or None if there is no such table.

    Raises `UserError` for a table or version this wavemill cannot read.
    """
    try:
        table = _open(root, folder)
        if version is not None:
            if version > (newest := table.version()):
                raise UserError(f"Cannot open {root.join(folder)} at version {version}: the newest is {newest}.")
            table.load_as_version(version)
    except TableNotFoundError as error:
        if version is None or not _is_table(root, folder):
            return None
        raise UserError(f"{root.join(folder)} has no version {version} any more, or never had.") from error
    except (DeltaError, OSError, OverflowError) as error:
        at = "" if version is None else f" at version {version}"
        raise UserError(f"Cannot open {root.join(folder)}{at}: {reason(error)}.{_advice(root)}") from error
    return _snapshot(root, folder, table)


def create_table(root: Root, folder: str, *, schema: pa.Schema, metadata: dict[str, Any]) -> Snapshot:
    """Create an empty table, or take the one that another process created first."""
    try:
        DeltaTable.create(
            root.join(folder),
            schema=deltalake.Schema.from_arrow(schema),
            mode="error",
            name=folder,
            description=json.dumps({"wavemill": FORMAT_VERSION, **metadata}, sort_keys=True),
            configuration=_KEEP_HISTORY,
            storage_options=table_options(root.uri),
            # tried again after a lost race, a creation would replace the winner's table with ours
            commit_properties=CommitProperties(max_commit_retries=0),
        )
    except DeltaError:
        if not _is_table(root, folder):
            raise
    snapshot = read_snapshot(root, folder)
    assert snapshot is not None
    return snapshot


class TableWriter:
    """The one driver that may commit to a table: fences others out when it starts, commits receipts in batches.

    A fence is an empty commit that raises the table's app transaction to the next epoch. Each later commit carries
    the same epoch and is made on a handle on which that epoch was just seen, so another driver's fence makes it fail:
    `StreamTaken`. A commit whose answer was lost is looked up in the table before it is judged.
    """

    def __init__(self, root: Root, folder: str) -> None:
        self._root = root
        self._folder = folder
        self._driver = uuid.uuid4().hex
        self._table = self._open()
        _snapshot(root, folder, self._table)  # refuses what is not ours before it is touched
        self._epoch = (self._table.transaction_version(self._folder) or 0) + 1
        self._fence()
        self._table = self._open()
        self.snapshot = _snapshot(root, folder, self._table)

    def commit(self, receipts: Iterable[Receipt]) -> None:
        """Make these shards part of the table: all of them, once. Raises `StreamTaken`."""
        missing = {receipt.shard: receipt for receipt in receipts if receipt.shard not in self.snapshot.files}
        for attempt in range(_COMMIT_ATTEMPTS):
            self._table.update_incremental()
            self._require_epoch()
            if self._table.version() != self.snapshot.version:
                # an answer of ours was lost, or another tool was here: look, and see that it is still a shard table
                self.snapshot = _snapshot(self._root, self._folder, self._table)
                missing = {shard: receipt for shard, receipt in missing.items() if shard not in self.snapshot.files}
            if not missing:
                return
            failpoint("before-commit")
            try:
                self._append([_add_action(receipt) for _, receipt in sorted(missing.items())])
            except _COMMIT_ERRORS as error:
                if attempt == _COMMIT_ATTEMPTS - 1:
                    raise self._gave_up(error) from error
                time.sleep(0.1 * 2**attempt)
                self._table = self._open()
                continue
            failpoint("after-commit")
            files = dict(sorted({**self.snapshot.files, **missing}.items()))
            self.snapshot = replace(self.snapshot, version=self.snapshot.version + 1, files=files)
            return

    def _fence(self) -> None:
        for attempt in range(_COMMIT_ATTEMPTS):
            failpoint("before-fence")
            try:
                self._append([])
            except _COMMIT_ERRORS as error:
                self._table = self._open()
                seen = self._table.transaction_version(self._folder) or 0
                if seen >= self._epoch:
                    if self._fenced_by_us():
                        return
                    raise StreamTaken(self._taken()) from error
                if attempt == _COMMIT_ATTEMPTS - 1:
                    raise self._gave_up(error) from error
                time.sleep(0.1 * 2**attempt)
                continue
            failpoint("after-fence")
            return

    def _append(self, actions: Sequence[AddAction]) -> None:
        self._table.create_write_transaction(
            list(actions),
            mode="append",
            schema=self._table.schema(),
            commit_properties=CommitProperties(
                custom_metadata={"driver": self._driver},
                app_transactions=[Transaction(self._folder, self._epoch)],
            ),
            post_commithook_properties=_HOOKS,
        )

    def _require_epoch(self) -> None:
        if self._table.transaction_version(self._folder) != self._epoch:
            raise StreamTaken(self._taken())

    def _fenced_by_us(self) -> bool:
        return any(commit.get("driver") == self._driver for commit in self._table.history(limit=20))

    def _gave_up(self, error: Exception) -> RunFailed:
        return RunFailed(
            f"Cannot commit to {self._root.join(self._folder)} after {_COMMIT_ATTEMPTS} tries: {reason(error)}. "
            "What was committed stays. See that there is space and that it may be written to, then run again."
        )

    def _taken(self) -> str:
        return (
            f"{self._root.join(self._folder)} was taken over by another run that started after this one. "
            "That run goes on; this one stops. Nothing is lost: run the command again when the other has ended."
        )

    def _open(self) -> DeltaTable:
        return _open(self._root, self._folder)


def _open(root: Root, folder: str) -> DeltaTable:
    return DeltaTable(root.join(folder), storage_options=table_options(root.uri))


def _is_table(root: Root, folder: str) -> bool:
    return DeltaTable.is_deltatable(root.join(folder), storage_options=table_options(root.uri))


def _snapshot(root: Root, folder: str, table: DeltaTable) -> Snapshot:
    metadata, files = _metadata(root, folder, table), _files(root, folder, table)
    return Snapshot(root.uri, folder, table.version(), str(table.metadata().id), metadata, files)


def _metadata(root: Root, folder: str, table: DeltaTable) -> dict[str, Any]:
    try:
        metadata = json.loads(table.metadata().description or "")
        written_by = metadata["wavemill"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{root.join(folder)} is a Delta table, but not one of wavemill's. Name another root."
        ) from error
    if written_by != FORMAT_VERSION:
        raise UserError(
            f"{root.join(folder)} was written in wavemill's table format {written_by}; this version reads format "
            f"{FORMAT_VERSION}. Use the wavemill that wrote it, or another root."
        )
    return metadata


def _files(root: Root, folder: str, table: DeltaTable) -> dict[int, Receipt]:
    actions = pa.table(table.get_add_actions(flatten=True)).to_pylist()
    files: dict[int, Receipt] = {}
    for action in sorted(actions, key=lambda action: action["path"]):
        match = _SHARD_FILE.fullmatch(action["path"])
        num_rows, num_good = action.get("num_records"), action.get("null_count.error")
        if match is None or int(match[1]) in files or num_rows is None or num_good is None:
            raise UserError(
                f"{root.join(folder)} holds the file {action['path']!r}, which wavemill did not put there: expected "
                "one file per shard. Was the table compacted by another tool? Restore an earlier version of it."
            )
        shard = int(match[1])
        files[shard] = Receipt(
            shard=shard,
            file_name=action["path"],
            size_bytes=action["size_bytes"],
            num_rows=num_rows,
            num_errors=num_rows - num_good,
        )
    return dict(sorted(files.items()))


def _add_action(receipt: Receipt) -> AddAction:
    stats = {"numRecords": receipt.num_rows, "nullCount": {"error": receipt.num_rows - receipt.num_errors}}
    return AddAction(
        receipt.file_name,
        receipt.size_bytes,
        {},
        int(time.time() * 1000),
        True,
        json.dumps(stats),
    )


def _advice(root: Root) -> str:
    """What to look at when an object store does not answer as it should."""
    if root.is_local:
        return ""
    return " See that the bucket is there and that its credentials and region are set, as in AWS_PROFILE or AWS_REGION."


def reason(error: Exception) -> str:
    """What went wrong, in one line: the system's words, or the last cause in the chain that delta-rs draws."""
    told = getattr(error, "strerror", None) or redacted(str(error)) or type(error).__name__
    lines = [_ANSI.sub("", line).strip(" .") for line in re.split(r"\n|\u21b3", told)]
    lines = [line for line in lines if line] or [type(error).__name__]
    return lines[-1] if "\u21b3" in told else lines[0]
