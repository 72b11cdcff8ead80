"""Repair: shards whose files are damaged are made again, byte for byte; those with errors, if asked for, once more."""

from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field

from ..pipelines.derived import read_sources
from ..pipelines.named import require_named
from ..pipelines.streams import (
    full_fingerprint,
    require_same_corpus,
    require_same_fingerprint,
    sources_first,
    stream_config,
)
from ..pipelines.tokenize import ShardReport, ShardTask
from ..storage.codes import list_streams, open_corpus, open_stream, read_codes, stream_folder
from ..storage.drivers import SoleDriver
from ..storage.parquet import CorruptFile, read_parquet
from ..storage.root import Root
from ..storage.schema import CORPUS_SCHEMA
from ..storage.table import Receipt, Snapshot
from ..storage.writer import TableWriter
from ..tokenizers.spec import UserError
from .engine import Engine
from .tokenize import TokenizeOptions, require_fingerprints

ANY_ERROR = "all"


@dataclass(slots=True)
class Damage:
    """What was found in a dataset. A file is that of one shard of one stream."""

    corpus: Snapshot
    streams: dict[str, Snapshot]
    files: int = 0  # looked at
    damaged: set[tuple[int, str]] = field(default_factory=set)  # shard, stream
    erroneous: set[tuple[int, str]] = field(default_factory=set)  # with errors that are to be tried again
    problems: list[str] = field(default_factory=list)  # that a repair cannot mend

    def tasks(self, *, derived: bool = False) -> list[ShardTask]:
        """What is to be made again; with `derived`, also what is made of that."""
        wanted = self.damaged | self.erroneous
        for stream in sources_first([stream_config(*each) for each in self.streams.items()]) if derived else ():
            wanted |= {(shard, stream.name) for shard, name in wanted if name == stream.of}
        by_shard: dict[int, list[str]] = {}
        for shard, name in sorted(wanted):
            by_shard.setdefault(shard, []).append(name)
        return [ShardTask(shard=shard, streams=tuple(names)) for shard, names in by_shard.items()]


@dataclass(slots=True)
class Repaired:
    """What a repair did."""

    files: int  # looked at
    damaged: int
    restored: int = 0  # made again with the very bytes that they had
    replaced: int = 0  # made again with others: shards with errors, or what was accepted
    problems: list[str] = field(default_factory=list)  # what is still not as it should be


def look(
    root: Root,
    errors: frozenset[str] = frozenset(),
    *,
    on_shard: Callable[[int, float], None] = lambda segments, s: None,
) -> Damage:
    """Read every file of every stream. With `errors`, classes of errors or `ANY_ERROR`, also find the shards in which a
    segment has such an error that the corpus does not know of.

    `on_shard` is told of segments and seconds of audio. Raises `UserError` if there is nothing to look at.
    """
    corpus = open_corpus(root)
    found = Damage(corpus, {name: open_stream(root, name) for name in list_streams(root)})
    if not found.streams:
        raise UserError(f"There is no stream in {root} yet; make some with `wavemill tokenize {root}`.")
    for name, snapshot in found.streams.items():
        require_same_corpus(root, name, snapshot, corpus)
    for shard in corpus.files:
        try:
            rows = read_parquet(root, corpus.path(shard), schema=CORPUS_SCHEMA, columns=["error", "duration_s"])
        except CorruptFile as error:
            found.problems.append(
                f"corpus, shard {shard}: {error} It says where audio is, so it cannot be made again from the dataset"
            )
            continue
        for name in found.streams:
            _look_at(root, found, shard, name, rows["error"].to_pylist(), errors)
        on_shard(rows.num_rows, sum(rows["duration_s"].to_pylist()))
    return found


def _look_at(root: Root, found: Damage, shard: int, name: str, known: list[str | None], errors: frozenset[str]) -> None:
    snapshot = found.streams[name]
    if shard not in snapshot.files:
        found.problems.append(f"stream {name} lacks shard {shard}: run `wavemill tokenize`")
        return
    found.files += 1
    try:
        ours = read_codes(root, snapshot, shard).errors
    except CorruptFile:
        found.damaged.add((shard, name))
        return
    new = {error for error, before in zip(ours, known, strict=True) if error is not None and before is None}
    if new and (ANY_ERROR in errors or new & errors):
        found.erroneous.add((shard, name))


def mend(
    root: Root,
    found: Damage,
    engine: Callable[[], Engine],
    options: TokenizeOptions,
    *,
    accept: bool = False,
    weights: Mapping[str, str] | None = None,
    local_files_only: bool = False,
    on_start: Callable[[int], None] = lambda segments: None,
    on_report: Callable[[ShardReport], None] = lambda report: None,
    on_warning: Callable[[str], None] = lambda warning: None,
) -> Repaired:
    """Make again what is damaged, and what had errors.

    A damaged file whose codes come out otherwise than they were is left as it is and told, unless `accept`: then what
    other streams made of it is made again, too. Raises what `tokenize` raises.
    """
    corpus, snapshots = found.corpus, found.streams
    require_named(root, corpus, "source", options.source_roots, flag="--source")
    repaired = Repaired(found.files, len(found.damaged), problems=list(found.problems))
    tasks = found.tasks(derived=accept)
    if not tasks:
        return repaired
    names = sorted({name for task in tasks for name in task.streams})
    on_start(sum(corpus.files[task.shard].num_rows for task in tasks))
    streams = sources_first(
        [stream_config(name, snapshots[name], weights=weights, local_files_only=local_files_only) for name in names]
    )
    lacking = {name: {task.shard for task in tasks if name in task.streams} for name in names}
    sources = read_sources(root, corpus, streams, snapshots, lacking)
    root.require_writable()
    with SoleDriver(root, [stream_folder(name) for name in names], on_warning=on_warning), closing(engine()) as running:
        about = running.start(options.work(root, corpus, streams, sources, tasks), len(tasks))
        for name, fingerprint in about.fingerprints.items():
            require_same_fingerprint(root, name, snapshots[name], full_fingerprint(fingerprint, corpus))
        other: dict[str, list[Receipt]] = {}
        for report in running.run(tasks):
            require_fingerprints(report.fingerprints, about.fingerprints)
            for name, receipt in report.receipts.items():
                is_damaged = (report.shard, name) in found.damaged
                if receipt.file_name == snapshots[name].files[report.shard].file_name:
                    repaired.restored += is_damaged
                elif accept or not is_damaged:
                    other.setdefault(name, []).append(receipt)
                else:
                    repaired.problems.append(_otherwise(name, report.shard, snapshots[name], report.numerics[name]))
            on_report(report)
        # what is made of a stream before it: if this ends in between, it is damaged still, and both are made again
        for name in [stream.name for stream in reversed(streams) if stream.name in other]:
            receipts = other[name]
            damaged = {shard for shard, stream in found.damaged if stream == name}
            TableWriter(root, stream_folder(name)).replace(receipts, damaged=damaged)
            repaired.replaced += len(receipts)
    return repaired


def _otherwise(name: str, shard: int, snapshot: Snapshot, numerics: dict[str, str]) -> str:
    here = numerics == snapshot.metadata["numerics"]
    why = "its recordings have changed, or cannot be read now" if here else "this machine is of another numerics class"
    return (
        f"stream {name}, shard {shard}: made again, it is not what was written ({why}), so it stays damaged. Repair on "
        "a machine like the first with the recordings as they were, or take what is made now with --accept"
    )
