"""Builds and grows a corpus: lists sources, probes what is new, commits shards."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from ..pipelines.audio import Limits
from ..pipelines.corpus import BuildCounts, Known, new_rows, shards
from ..pipelines.decoder import DecoderSettings
from ..pipelines.entries import Source
from ..pipelines.policy import CorpusPolicy
from ..pipelines.reading import SEPARATORS
from ..pipelines.segments import Row
from ..pipelines.sources import open_source
from ..pipelines.vad import require_vad_model, vad_model
from ..storage.codes import CORPUS
from ..storage.drivers import SoleDriver
from ..storage.root import Root
from ..storage.schema import CORPUS_SCHEMA
from ..storage.table import Receipt, Snapshot, create_table, read_snapshot, write_shard
from ..storage.writer import TableWriter
from ..tokenizers.separate import Separator
from ..tokenizers.spec import UserError
from .interrupts import Interrupted

_COMMIT_EVERY_SHARDS = 64
_COMMIT_EVERY_S = 60.0  # a file that waits for long may look like a leftover to a vacuum
_MAX_THREADS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceArgument:
    """A source as a person names it: `[NAME=]PATH`, and what cannot be seen from what is there."""

    argument: str
    kind: str = "auto"
    text_column: str | None = None
    audio_column: str | None = None


@dataclass(frozen=True, slots=True)
class BuildResult:
    counts: BuildCounts
    skipped: dict[str, int]  # files that are no audio, by suffix
    num_shards: int  # that were added


def build_corpus(
    root: Root,
    source_arguments: Sequence[str | SourceArgument],
    policy: CorpusPolicy,
    *,
    shard_hours: float,
    limits: Limits | None = None,
    separate: str | None = None,
    decoder: DecoderSettings | None = None,
    on_shard: Callable[[pa.Table], None] = lambda table: None,
    on_warning: Callable[[str], None] = lambda warning: None,
) -> BuildResult:
    """Add what is new in the sources to the corpus of `root`, creating it first if need be.

    `separate` names a file of Conv-TasNet weights; a copy is kept in the root. Raises `UserError` before anything is
    written for sources that cannot be read or a corpus built otherwise.
    """
    separator = Separator.from_file(separate) if separate else None
    if separator is not None:
        policy = replace(policy, separate=separator.sha256)
    sources = [_open(argument, exclude=root.uri) for argument in source_arguments]
    _require_apart(sources)
    snapshot = read_snapshot(root, CORPUS)
    policy = _settled(root, policy, snapshot)
    known = Known.read(root, snapshot) if snapshot else Known()
    counts = BuildCounts()
    rows = new_rows(
        sources,
        known,
        policy,
        counts,
        limits=limits,
        num_separated=separator.num_sources if separator else 0,
        settings=decoder,
        num_threads=min(_MAX_THREADS, os.cpu_count() or 1),
    )
    first_row = next(rows, None)  # sources are proven readable, and to hold something, before a table is made
    if first_row is None:
        return BuildResult(counts, _skipped(sources), 0)
    root.require_writable()
    if separator is not None:
        root.write_bytes(f"{SEPARATORS}/{separator.sha256}.safetensors", separator.to_bytes())
    num_shards = 0
    with SoleDriver(root, [CORPUS], on_warning=on_warning):
        writer = _writer(root, policy, snapshot)
        pending: list[Receipt] = []
        first = max(writer.snapshot.files, default=-1) + 1
        last_commit = time.monotonic()
        try:
            for table in shards(_chain(first_row, rows), first=first, shard_hours=shard_hours):
                pending.append(write_shard(root, CORPUS, table["shard"][0].as_py(), table))
                num_shards += 1
                on_shard(table)
                counts.apart += _num_apart(table, known)
                if len(pending) >= _COMMIT_EVERY_SHARDS or time.monotonic() - last_commit >= _COMMIT_EVERY_S:
                    writer.commit(pending)
                    pending, last_commit = [], time.monotonic()
        except Interrupted:
            writer.commit(pending)
            raise
        writer.commit(pending)
    if counts.apart:
        on_warning(
            f"{counts.apart:,} segment(s) lie in other shards than the first of their pairs, which trainers then leave "
            "out. List the rows of a pair one after the other, and build into another root."
        )
    return BuildResult(counts, _skipped(sources), num_shards)


def _num_apart(table: pa.Table, known: Known) -> int:
    rows = table.select(["source", "pair"]).filter(table["pair"].is_valid()).to_pylist()
    return sum(known.place_pair(row, table["shard"][0].as_py()) for row in rows)


def _open(argument: str | SourceArgument, *, exclude: str) -> Source:
    if isinstance(argument, str):
        argument = SourceArgument(argument=argument)
    return open_source(
        argument.argument,
        exclude=exclude,
        kind=argument.kind,
        text_column=argument.text_column,
        audio_column=argument.audio_column,
    )


def _settled(root: Root, policy: CorpusPolicy, snapshot: Snapshot | None) -> CorpusPolicy:
    """The policy with what the corpus's first build settles. Raises `UserError` if the corpus has another one."""
    if policy.vad is not None:
        policy = replace(policy, vad=replace(policy.vad, model=vad_model()))
    if snapshot is None:
        return policy
    built = CorpusPolicy.from_json(snapshot.metadata["policy"])
    if built.vad is not None:
        require_vad_model(built.vad)
    if built != policy:
        raise UserError(
            f"The corpus in {root} was built with {built.words()}, this build asks for {policy.words()}. "
            "Build with the same options, or into another root."
        )
    return built


def _writer(root: Root, policy: CorpusPolicy, snapshot: Snapshot | None) -> TableWriter:
    metadata: dict[str, Any] = {"kind": "corpus", "policy": policy.to_json()}
    seen = set(snapshot.files) if snapshot else set()
    if snapshot is None:
        create_table(root, CORPUS, schema=CORPUS_SCHEMA, metadata=metadata)
    writer = TableWriter(root, CORPUS)
    if set(writer.snapshot.files) != seen or CorpusPolicy.from_json(writer.snapshot.metadata["policy"]) != policy:
        raise UserError(f"The corpus in {root} grew while this build was starting. Run the command again.")
    return writer


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
