"""Builds and grows a corpus: lists sources, probes what is new, commits shards."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa

from ..pipelines.corpus import CORPUS, BuildCounts, CorpusPolicy, Known, Row, new_rows, shards
from ..pipelines.sources import Source, open_source
from ..storage.root import Root
from ..storage.schema import CORPUS_SCHEMA
from ..storage.table import Receipt, TableWriter, create_table, read_snapshot, write_shard
from ..tokenizers.spec import UserError

_COMMIT_EVERY_SHARDS = 64


@dataclass(frozen=True, slots=True)
class BuildResult:
    counts: BuildCounts
    skipped: dict[str, int]  # files that are no audio, by suffix
    num_shards: int  # that were added


def build_corpus(
    root: Root,
    source_arguments: Sequence[str],
    policy: CorpusPolicy,
    *,
    shard_hours: float,
    on_shard: Callable[[pa.Table], None] = lambda table: None,
) -> BuildResult:
    """Add what is new in the sources to the corpus of `root`, creating it first if need be.

    Raises `UserError` before anything is written for sources that cannot be read or a corpus built otherwise.
    """
    sources = [open_source(argument, exclude=root.uri) for argument in source_arguments]
    _require_apart(sources)
    snapshot = read_snapshot(root, CORPUS)
    metadata = {"kind": "corpus", "policy": asdict(policy)}
    if snapshot is not None and snapshot.metadata["policy"] != metadata["policy"]:
        raise UserError(
            f"The corpus in {root} was built with {_words(snapshot.metadata['policy'])}, this build asks for "
            f"{_words(metadata['policy'])}. Build with the same options, or into another root."
        )
    known = Known.read(root, snapshot) if snapshot else Known()
    counts = BuildCounts()
    rows = new_rows(sources, known, policy, counts)
    first_row = next(rows, None)  # sources are proven readable, and to hold something, before a table is made
    if first_row is None:
        return BuildResult(counts, _skipped(sources), 0)
    root.require_writable()
    seen = set(snapshot.files) if snapshot else set()
    if snapshot is None:
        snapshot = create_table(root, CORPUS, schema=CORPUS_SCHEMA, metadata=metadata)
    writer = TableWriter(root, CORPUS)
    if set(writer.snapshot.files) != seen or writer.snapshot.metadata["policy"] != metadata["policy"]:
        raise UserError(f"The corpus in {root} grew while this build was starting. Run the command again.")
    pending: list[Receipt] = []
    num_shards = 0
    first = max(snapshot.files, default=-1) + 1
    for table in shards(_chain(first_row, rows), first=first, shard_hours=shard_hours):
        pending.append(write_shard(root, CORPUS, table["shard"][0].as_py(), table))
        num_shards += 1
        on_shard(table)
        if len(pending) >= _COMMIT_EVERY_SHARDS:
            writer.commit(pending)
            pending = []
    writer.commit(pending)
    return BuildResult(counts, _skipped(sources), num_shards)


def _require_apart(sources: list[Source]) -> None:
    names = [source.name for source in sources]
    for name in names:
        if names.count(name) > 1:
            roots = ", ".join(source.root for source in sources if source.name == name)
            raise UserError(f"Two sources are called {name!r} ({roots}). Name them apart: NAME=PATH.")


def _chain(first: Row, rest: Iterator[Row]) -> Iterator[Row]:
    yield first
    yield from rest


def _skipped(sources: list[Source]) -> dict[str, int]:
    total: dict[str, int] = {}
    for source in sources:
        for suffix, count in source.skipped.items():
            total[suffix] = total.get(suffix, 0) + count
    return dict(sorted(total.items(), key=lambda pair: (-pair[1], pair[0])))


def _words(policy: dict[str, Any]) -> str:
    window = policy["window_s"]
    return ("whole recordings" if window is None else f"{window:g} s windows") + f", channels {policy['channels']}"
