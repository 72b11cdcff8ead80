"""Shard tables on Delta Lake: one data file per shard.

The only file that knows deltalake. A worker writes a shard's file and hands back a `Receipt`; the driver, through
`writer.TableWriter`, is the only one who commits.
"""

import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
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
from .stores import StoreTrouble, redacted, table_options

_SHARD_FILE = re.compile(r"shard-(\d{6,})-[0-9a-f]{16}\.parquet")
ATTEMPTS = 5
PATIENCE_S = 25.0  # after so long nothing is tried again
COMMIT_ERRORS = (DeltaError, OSError)  # applied, refused or never sent: each means look, none means lost
# by default a log older than 30 days is deleted, by delta-rs itself and by any tool that is asked to clean up
_KEEP_HISTORY = {"delta.enableExpiredLogCleanup": "false", "delta.logRetentionDuration": "interval 36500 days"}
_HOOKS = PostCommitHookProperties(create_checkpoint=True, cleanup_expired_logs=False)
_ANSI = re.compile(r"\x1b\[[0-9;]*m")  # colours
_REFUSAL = re.compile(r"(?s)(?:<\?xml[^>]*>\s*)?<Error>.*?(?:</Error>|\Z)")  # S3's, which may repeat keys and tokens


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

    Raises `UserError` for a table or version this wavemill cannot read, `StoreTrouble` where a store does not answer.
    """
    try:
        table = _open_patiently(root, folder)
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
        kind = UserError if root.is_local else StoreTrouble  # what was committed may be sound
        raise kind(f"Cannot open {root.join(folder)}{at}: {reason(error)}.{_advice(root)}") from error
    return _snapshot(root, folder, table)


def create_table(root: Root, folder: str, *, schema: pa.Schema, metadata: dict[str, Any]) -> Snapshot:
    """Create an empty table, or take the one that another process created first. Raises `RunFailed`, `UserError`."""
    failure: Exception | None = None
    for _ in range(ATTEMPTS):
        failpoint("before-create")
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
        except COMMIT_ERRORS as error:
            failure = error
        failpoint("after-create")
        snapshot = read_snapshot(root, folder)
        if snapshot is not None:
            return snapshot
    told = reason(failure) if failure else "it is gone again"
    raise RunFailed(
        f"Cannot create the table {root.join(folder)}: {told}. See that there is space and that it may be written "
        "to, then run again."
    ) from failure


class DeltaLog:
    """A table's log through delta-rs, opened at its newest version."""

    def __init__(self, root: Root, folder: str) -> None:
        self._root = root
        self._folder = folder  # also the name of the app transaction
        self._table = _open(root, folder)

    @property
    def version(self) -> int:
        return self._table.version()

    @property
    def epoch(self) -> int:
        return self._table.transaction_version(self._folder) or 0

    def refresh(self) -> None:
        self._table.update_incremental()

    def snapshot(self) -> Snapshot:
        return _snapshot(self._root, self._folder, self._table)

    def drivers(self) -> list[str]:
        return [commit.get("driver", "") for commit in self._table.history(limit=20)]

    def append(self, receipts: Sequence[Receipt], *, epoch: int, driver: str) -> None:
        self._table.create_write_transaction(
            [_add_action(receipt) for receipt in receipts],
            mode="append",
            schema=self._table.schema(),
            commit_properties=self._properties(epoch, driver),
            post_commithook_properties=_HOOKS,
        )

    def remove(self, shards: Sequence[int], *, epoch: int, driver: str) -> None:
        self._table.delete(
            f"shard IN ({', '.join(map(str, shards))})",  # whole files, which statistics find
            commit_properties=self._properties(epoch, driver),
            post_commithook_properties=_HOOKS,
        )

    def forget_missing(self, *, epoch: int, driver: str) -> None:
        self._table.repair(
            commit_properties=self._properties(epoch, driver),
            post_commithook_properties=_HOOKS,
        )

    def _properties(self, epoch: int, driver: str) -> CommitProperties:
        return CommitProperties(custom_metadata={"driver": driver}, app_transactions=[Transaction(self._folder, epoch)])


def _open(root: Root, folder: str) -> DeltaTable:
    return DeltaTable(root.join(folder), storage_options=table_options(root.uri))


def _open_patiently(root: Root, folder: str) -> DeltaTable:
    """`_open`, again where a store's answer breaks off: deltalake asks again only for answers that did not begin."""
    until = time.monotonic() + PATIENCE_S
    for attempt in range(ATTEMPTS):
        try:
            return _open(root, folder)
        except TableNotFoundError:
            raise
        except COMMIT_ERRORS:
            if root.is_local or attempt == ATTEMPTS - 1 or time.monotonic() > until:
                raise
    raise AssertionError("unreachable")


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
    stats = {
        "numRecords": receipt.num_rows,
        "nullCount": {"error": receipt.num_rows - receipt.num_errors, "shard": 0},
        "minValues": {"shard": receipt.shard},
        "maxValues": {"shard": receipt.shard},
    }
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
    said = _REFUSAL.sub(lambda answer: ": ".join(re.findall(r"<(?:Code|Message)>([^<]+)", answer[0])), str(error))
    told = getattr(error, "strerror", None) or redacted(said) or type(error).__name__
    lines = [_ANSI.sub("", line).strip(" .") for line in re.split(r"\n|\u21b3", told)]
    lines = [line for line in lines if line] or [type(error).__name__]
    return lines[-1] if "\u21b3" in told else lines[0]
