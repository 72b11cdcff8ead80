"""The main job: every shard of a corpus through every stream's tokenizer, each exactly once.

The tables say what is done: a shard whose file a stream's table names. So running again is resuming.
"""

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from typing import Any

from ..pipelines.decoder import DecoderSettings
from ..pipelines.derived import read_sources
from ..pipelines.named import require_named
from ..pipelines.streams import (
    StreamConfig,
    StreamMismatch,
    describe_stream,
    first_difference,
    full_fingerprint,
    require_same_corpus,
    require_same_fingerprint,
    sources_first,
    without_revision,
)
from ..pipelines.tokenize import ShardReport, ShardTask, Work, WorkerAbout
from ..storage.codes import open_corpus
from ..storage.drivers import SoleDriver
from ..storage.failpoints import failpoint
from ..storage.root import Root
from ..storage.schema import stream_schema
from ..storage.table import Snapshot, create_table, read_snapshot
from ..storage.writer import TableWriter
from ..tokenizers.ladder import BATCH_SECONDS
from ..tokenizers.registry import require_tokenizer
from ..tokenizers.spec import RunFailed, StreamSpec
from ..tokenizers.tokenizer import Mode, fingerprint_hash
from .engine import Engine, WorkersLost
from .interrupts import Interrupted

_COMMIT_EVERY_S = 5.0
_COMMIT_EVERY_SHARDS = 64
_JUDGE_AFTER = 200  # segments, or all if there are fewer: too early, one bad file would stop a run


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizeOptions:
    device: str = "cpu"
    max_error_share: float = 0.05  # of segments
    source_roots: dict[str, str] = field(default_factory=dict)
    any_numerics: bool = False  # take files of more than one numerics class into a stream
    decode_threads: int = 1
    decode_ahead_bytes: int = 512 * 1024 * 1024
    decoder: DecoderSettings = field(default_factory=DecoderSettings)
    batch_seconds: float | None = None  # of padded audio; None: each mode's own on a GPU, none on a CPU

    def batches(self) -> dict[Mode, float] | None:
        """Seconds of padded audio in a batch, or None where each segment is encoded alone."""
        if self.batch_seconds is not None:
            return dict.fromkeys(Mode, self.batch_seconds)
        return BATCH_SECONDS if self.device.startswith("cuda") else None

    def work(
        self,
        root: Root,
        corpus: Snapshot,
        streams: Sequence[StreamConfig],
        sources: Mapping[str, Snapshot],
        tasks: Sequence[ShardTask],
    ) -> Work:
        """What workers are told; `streams` come with their sources first."""
        lacking = {name for task in tasks for name in task.streams}
        return Work(
            root_uri=root.uri,
            corpus=corpus,
            streams=tuple(streams),
            device=self.device,
            source_roots=self.source_roots,
            decode_threads=self.decode_threads,
            decode_ahead_bytes=self.decode_ahead_bytes,
            decoder=self.decoder,
            batch_seconds=self.batches(),
            sources=dict(sources),
            idle=frozenset(stream.name for stream in streams) - lacking,
        )


@dataclass(slots=True, kw_only=True)
class Summary:
    """What a run did: figures over the shards it tokenized itself."""

    shards: int = 0
    segments: int = 0
    errors: int = 0
    duration_s: float = 0.0
    wall_s: float = 0.0
    decode_s: float = 0.0
    encode_s: float = 0.0
    write_s: float = 0.0
    commit_s: float = 0.0

    def and_then(self, later: "Summary") -> "Summary":
        """The figures of both runs."""
        return Summary(**{name: getattr(self, name) + getattr(later, name) for name in self.__dataclass_fields__})

    def add(self, report: ShardReport) -> None:
        self.shards += 1
        self.segments += report.num_segments
        self.errors += report.num_errors
        self.duration_s += report.duration_s
        self.decode_s += report.decode_s
        self.encode_s += report.encode_s
        self.write_s += report.write_s


def tokenize(
    root: Root,
    streams: Sequence[StreamConfig],
    engine: Callable[[], Engine],
    options: TokenizeOptions,
    on_start: Callable[[int], None] = lambda segments: None,
    on_report: Callable[[ShardReport], None] = lambda report: None,
    on_warning: Callable[[str], None] = lambda warning: None,
) -> Summary:
    """Tokenize what the newest corpus snapshot has and the streams lack. Returns once every segment has its row.

    Raises `UserError` before anything is written if the streams do not fit, `StreamTaken` if another run takes one
    over, `RunFailed` if the share of errors passes the limit or shards are lost. What was committed stays. On
    `Interrupted` and `WorkersLost` the shards that are done are committed first.
    """
    streams = sources_first(streams)
    corpus = open_corpus(root)
    require_named(root, corpus, "source", options.source_roots, flag="--source")
    snapshots = {stream.name: read_snapshot(root, stream.folder) for stream in streams}
    fingerprints = {}
    for stream in streams:
        described = describe_stream(root, stream, streams)
        fingerprints[stream.name] = described.fingerprint
        if (snapshot := snapshots[stream.name]) is not None:
            require_same_corpus(root, stream.name, snapshot, corpus)
            require_same_fingerprint(root, stream.name, snapshot, full_fingerprint(described.fingerprint, corpus))
    tasks = _tasks(corpus, streams, snapshots)
    lacking = {stream.name: {task.shard for task in tasks if stream.name in task.streams} for stream in streams}
    sources = read_sources(root, corpus, streams, snapshots, lacking)
    on_start(sum(corpus.files[task.shard].num_rows for task in tasks))
    summary = Summary()
    if not tasks:
        for name, snapshot in snapshots.items():
            _require_complete(name, snapshot or _NO_TABLE, corpus)
        return summary
    root.require_writable()
    started = time.monotonic()
    with SoleDriver(root, [stream.folder for stream in streams], on_warning=on_warning), closing(engine()) as running:
        about: WorkerAbout = running.start(options.work(root, corpus, streams, sources, tasks), len(tasks))
        require_fingerprints(about.fingerprints, fingerprints)
        run = _Run(root, streams, snapshots, corpus, about, options)
        try:
            report: ShardReport
            for report in running.run(tasks):
                failpoint("receipt-received")
                require_fingerprints(report.fingerprints, fingerprints)
                summary.add(report)
                run.take(report)
                on_report(report)
        except (Interrupted, WorkersLost):
            run.commit()  # what is done; what workers have in hand is dropped
            raise
        run.finish()
        summary.commit_s = run.commit_s
    summary.wall_s = time.monotonic() - started
    return summary


class _Run:
    """The driver's side of a run: takes reports, commits receipts in batches, watches numerics and errors."""

    def __init__(
        self,
        root: Root,
        streams: Sequence[StreamConfig],
        snapshots: dict[str, Snapshot | None],
        corpus: Snapshot,
        about: WorkerAbout,
        options: TokenizeOptions,
    ) -> None:
        self.commit_s = 0.0
        self._corpus = corpus
        self._options = options
        self._numerics = {name: dict((snapshots[name] or _NO_TABLE).metadata).get("numerics") for name in snapshots}
        self._require_numerics(about.numerics)
        for stream in streams:
            if snapshots[stream.name] is None:
                spec, fingerprint = about.specs[stream.name], about.fingerprints[stream.name]
                metadata = stream_metadata(stream, corpus, spec, fingerprint, about.numerics[stream.name])
                created = create_table(root, stream.folder, schema=stream_schema(spec), metadata=metadata)
                # another run may have been faster, with another tokenizer
                require_same_fingerprint(root, stream.name, created, full_fingerprint(fingerprint, corpus))
                self._numerics[stream.name] = created.metadata["numerics"]
        self._require_numerics(about.numerics)
        self._writers = {stream.name: TableWriter(root, stream.folder) for stream in streams}
        self._pending: list[ShardReport] = []
        self._kinds: Counter[str] = Counter()
        self._example = ""
        self._last_commit = time.monotonic()
        # rows and errors that the streams hold already count too: a resumed run is the same run
        heard = [stream.name for stream in streams if require_tokenizer(stream.tokenizer.tokenizer).takes == "audio"]
        first = self._writers[(heard or [streams[0].name])[0]].snapshot
        self._segments, self._errors = first.num_rows, first.num_errors

    def take(self, report: ShardReport) -> None:
        self._require_numerics(report.numerics)
        self._pending.append(report)
        self._segments += report.num_segments
        self._errors += report.num_errors
        self._kinds.update(report.errors_by_class)
        self._example = self._example or report.example_error
        if self._too_many_errors():  # what is pending is not committed: once mended, it can be done again
            raise RunFailed(
                f"{self._errors:,} of {self._segments:,} segments so far could not be tokenized: over the limit of "
                f"{self._options.max_error_share:.1%} (in this run: "
                f"{', '.join(f'{kind} {count:,}' for kind, count in self._kinds.most_common())}; "
                f"for example {self._example}). Mend the input, or raise --max-error-share, and run the command again."
            )
        waited = time.monotonic() - self._last_commit
        if waited >= _COMMIT_EVERY_S or len(self._pending) >= _COMMIT_EVERY_SHARDS:
            self.commit()

    def finish(self) -> None:
        """Commit what is left and check that every segment of the corpus has its row in every stream."""
        self.commit()
        for name, writer in self._writers.items():
            _require_complete(name, writer.snapshot, self._corpus)

    def commit(self) -> None:
        """Commit what is pending."""
        started = time.monotonic()
        for name, writer in self._writers.items():
            receipts = [report.receipts[name] for report in self._pending if name in report.receipts]
            failpoint(f"before-commit-{name}")
            writer.commit(receipts)
        self._pending = []
        self._last_commit = time.monotonic()
        self.commit_s += self._last_commit - started

    def _too_many_errors(self) -> bool:
        enough = min(_JUDGE_AFTER, self._corpus.num_rows)
        return self._segments >= enough and self._errors > self._options.max_error_share * self._segments

    def _require_numerics(self, found: dict[str, dict[str, str]]) -> None:
        """Compare the classes of the streams that are being made with those that they were begun in."""
        if self._options.any_numerics:
            return
        for name, here in found.items():
            expected = self._numerics[name]
            if expected is not None and expected != here:
                part, theirs, ours = first_difference(expected, here)
                raise StreamMismatch(
                    f'Stream "{name}" was written in another numerics class ({part}: {theirs} there, {ours} here), so '
                    "codes may differ in rare near-ties. Run on the same kind of machine and versions, give the run "
                    "another stream name, or accept the mixture with --any-numerics."
                )


def require_fingerprints(found: dict[str, dict[str, str]], expected: dict[str, dict[str, str]]) -> None:
    """Raise `StreamMismatch` if a worker made a stream with something else than this machine would."""
    for name, fingerprint in found.items():
        theirs, ours = without_revision(fingerprint), without_revision(expected[name])
        if theirs != ours:
            part, there, here = first_difference(theirs, ours)
            raise StreamMismatch(
                f"A worker makes stream {name!r} with another {part} ({there[:24]}) than this machine ({here[:24]}). "
                "Install the same wavemill everywhere, and let all machines see the same root and the same weights."
            )


def _require_complete(name: str, stream: Snapshot, corpus: Snapshot) -> None:
    for shard, file in corpus.files.items():
        rows = stream.files[shard].num_rows if shard in stream.files else 0
        if rows != file.num_rows:
            raise RunFailed(
                f"Stream {name!r} has {rows:,} rows for shard {shard}, the corpus has {file.num_rows:,} segments. "
                "Run the command again; if this stays, run `wavemill verify`."
            )


_NO_TABLE = Snapshot("", "", -1, "", {}, {})


def stream_metadata(
    stream: StreamConfig, corpus: Snapshot, spec: StreamSpec, fingerprint: dict[str, str], numerics: dict[str, str]
) -> dict[str, Any]:
    """What a stream's table says of itself, in the table's description."""
    parts = full_fingerprint(fingerprint, corpus)
    of = {} if stream.of is None else {"of": stream.of}
    return {
        "kind": "stream",
        "corpus": corpus.table_id,
        "spec": spec.to_json(),
        "tokenizer": asdict(stream.tokenizer),
        "codebook": stream.codebook_name,
        **of,
        "fingerprint": parts,
        "fingerprint_hash": fingerprint_hash(parts),
        "numerics": numerics,
    }


def _tasks(corpus: Snapshot, streams: Sequence[StreamConfig], snapshots: dict[str, Snapshot | None]) -> list[ShardTask]:
    done = {name: set(snapshot.files) if snapshot else set() for name, snapshot in snapshots.items()}
    tasks = []
    for shard in corpus.files:
        missing = tuple(stream.name for stream in streams if shard not in done[stream.name])
        if missing:
            tasks.append(ShardTask(shard=shard, streams=missing))
    return tasks
