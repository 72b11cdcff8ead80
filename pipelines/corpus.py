"""From sources to the rows of a corpus: probe, segment, assign to shards. Append-only: what is known is passed over."""

import itertools
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field

import pyarrow as pa

from ..storage.parquet import read_parquet
from ..storage.root import Root
from ..storage.schema import CORPUS_SCHEMA
from ..storage.table import Snapshot
from ..tokenizers.spec import UserError
from .analysis import metadata_reason
from .audio import Limits, Probe
from .decoder import DecoderSettings
from .entries import Entry, Source
from .policy import CorpusPolicy
from .recordings import Fetched, Place, fetch_first
from .remote import FIRST_BYTES
from .segments import Finding, KnownRecording, Prober, Row, entry_place, segment_rows
from .source_paths import plain_path

_MAX_SHARD_SEGMENTS = 20_000
_PROBES_AHEAD = 256
_FETCHES_AT_ONCE = 16  # from a store, where each takes its time
_GLANCE_BYTES = 512  # of a recording that the corpus has: the answer says whether it is still the same

_KNOWN_COLUMNS = [
    *("id", "source", "source_root", "path", "member", "format", "size_bytes", "version"),
    *("sample_rate", "num_channels", "recording_samples", "start_sample", "num_samples", "pair"),
]


@dataclass(slots=True)
class Known:
    """What a corpus holds already, for telling what is new."""

    ids: set[str] = field(default_factory=set)
    recordings: dict[tuple[str, str, str], KnownRecording] = field(default_factory=dict)  # by source, path, member
    roots: dict[str, str] = field(default_factory=dict)  # source name -> where it was
    pairs: dict[tuple[str, str], int] = field(default_factory=dict)  # by source and pair, the shard of its first row

    @classmethod
    def read(cls, root: Root, snapshot: Snapshot) -> "Known":
        known = cls()
        for shard in snapshot.files:
            rows = read_parquet(root, snapshot.path(shard), schema=CORPUS_SCHEMA, columns=_KNOWN_COLUMNS)
            for row in rows.to_pylist():
                known.add(row)
                known.place_pair(row, shard)
        return known

    def add(self, row: Row) -> None:
        self.ids.add(row["id"])
        self.roots[row["source"]] = row["source_root"]
        key = (row["source"], row["path"], row["member"])
        recording = self.recordings.setdefault(key, KnownRecording(row["size_bytes"], row["version"], _probe_of(row)))
        recording.spans.append((row["start_sample"], row["start_sample"] + row["num_samples"]))

    def place_pair(self, row: Row, shard: int) -> bool:
        """Whether a row of this shard lies in another one than the first row of its pair."""
        return row["pair"] is not None and self.pairs.setdefault((row["source"], row["pair"]), shard) != shard


@dataclass(slots=True)
class BuildCounts:
    """What a build met. Every segment of every source is counted once as new, known, replaced, twice or left out."""

    new: int = 0
    known: int = 0
    replaced: int = 0  # other bytes now behind a path and length the corpus has: its row stays as it is
    twice: int = 0  # named twice by this build
    errors: int = 0
    duration_s: float = 0.0
    apart: int = 0  # rows that lie in another shard than the first row of their pair
    left_out: Counter[str] = field(default_factory=Counter)  # by the filters and the segmentation, with the reason


def new_rows(
    sources: Iterable[Source],
    known: Known,
    policy: CorpusPolicy,
    counts: BuildCounts,
    *,
    limits: Limits | None = None,
    num_separated: int = 0,
    settings: DecoderSettings | None = None,
    num_threads: int = 4,
) -> Iterator[Row]:
    """Rows, without a shard yet, of all segments that the corpus does not have, in the order of the sources.

    Recordings are probed, and where the policy asks for it listened to, on `num_threads` threads with a decoder
    process each, a bounded number ahead. With `num_separated`, each segment has as many children, one per separated
    source. Raises `UserError` for two sources of one name.
    """
    _require_own_names(sources := list(sources), known)
    with ExitStack() as stack:
        probers = [
            stack.enter_context(Prober(policy, limits or Limits(), settings or DecoderSettings()))
            for _ in range(num_threads)
        ]
        for source, entry, finding in _findings(sources, known, policy, probers):
            key = (source.name, plain_path(entry.path), entry.member)
            seen = known.recordings.get(key)
            for row in segment_rows(source, entry, finding, policy, num_separated=num_separated):
                if row["id"] not in known.ids:
                    known.ids.add(row["id"])
                    counts.new += 1
                    counts.errors += row["error"] is not None
                    counts.duration_s += row["duration_s"]
                    yield row
                elif seen is None:
                    counts.twice += 1
                elif not seen.is_same(finding.size_bytes, finding.version):
                    counts.replaced += 1
                else:
                    counts.known += 1
            counts.known += finding.known_segments
            counts.left_out.update(finding.left_out)


def shards(rows: Iterable[Row], *, first: int, shard_hours: float) -> Iterator[pa.Table]:
    """Corpus tables of about `shard_hours` of audio each, numbered from `first`, in the order of the rows.

    Neighbours that belong together share a shard, unless there are so many that a shard would grow without bounds.
    """
    number = itertools.count(first)
    pending: list[Row] = []
    duration_s = 0.0
    before: Row = {}  # the last row that was not separated from another
    for row in rows:
        is_full = duration_s >= shard_hours * 3600 or len(pending) >= _MAX_SHARD_SEGMENTS
        if is_full and (not _belong_together(before, row) or len(pending) >= 2 * _MAX_SHARD_SEGMENTS):
            yield _shard_table(pending, next(number))
            pending, duration_s = [], 0.0
        pending.append(row)
        before = row if row.get("parent") is None else before
        duration_s += row["duration_s"]
    if pending:
        yield _shard_table(pending, next(number))


def _belong_together(before: Row, row: Row) -> bool:
    """Whether two rows are of one pair, or a segment and what was separated from it."""
    if row.get("parent") is not None:
        return row["parent"] == before.get("id")
    return row.get("pair") is not None and (row["source"], row["pair"]) == (before.get("source"), before.get("pair"))


def _shard_table(rows: list[Row], shard: int) -> pa.Table:
    return pa.Table.from_pylist([{**row, "shard": shard} for row in rows], schema=CORPUS_SCHEMA)


def _require_own_names(sources: list[Source], known: Known) -> None:
    places = dict(known.roots)
    for source in sources:
        other = places.setdefault(source.name, source.root)
        if other != source.root:
            raise UserError(
                f"The source name {source.name!r} stands for {other} already, so {source.root} needs another: "
                f"NAME={source.root}. (The same recordings, moved: tokenize with --source {source.name}={source.root}.)"
            )


def _findings(
    sources: list[Source], known: Known, policy: CorpusPolicy, probers: list[Prober]
) -> Iterator[tuple[Source, Entry, Finding]]:
    """Entries with what their recordings are, in order; entries of one recording are found one after the other."""
    pending: deque[tuple[Source, Entry, Future[Finding]]] = deque()
    with ExitStack() as stack:
        pools = [
            stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix=f"probe-{number}"))
            for number in range(len(probers))
        ]
        heads = _Heads(policy)
        try:
            for source in sources:
                for entry in source.entries:
                    seen = known.recordings.get((source.name, plain_path(entry.path), entry.member))
                    turn = hash((source.name, entry.path)) % len(pools)  # a container is read front to back by one
                    head = heads.fetch(entry_place(source.root, entry), entry, seen)
                    job = pools[turn].submit(probers[turn].find, source.root, entry, seen, head)
                    pending.append((source, entry, job))
                    if len(pending) >= _PROBES_AHEAD:
                        yield _result(pending.popleft())
            while pending:
                yield _result(pending.popleft())
        finally:
            heads.close()
            for _, _, job in pending:
                job.cancel()


class _Heads:
    """Fetches the first bytes of recordings in stores: those of several at once, and of neighbours of one once."""

    def __init__(self, policy: CorpusPolicy) -> None:
        self._pool = ThreadPoolExecutor(_FETCHES_AT_ONCE, thread_name_prefix="heads")
        self._policy = policy
        self._last: tuple[Place, Callable[[], Fetched]] | None = None

    def fetch(self, place: Place, entry: Entry, known: KnownRecording | None) -> Callable[[], Fetched] | None:
        """What gives the first bytes; None for what lies in no store, or will not be opened."""
        if entry.error or not place.is_object or metadata_reason(entry.language, entry.speaker, self._policy):
            return None
        if self._last is None or self._last[0] != place:
            num_bytes = FIRST_BYTES if known is None else _GLANCE_BYTES
            self._last = place, self._pool.submit(fetch_first, place, num_bytes).result
        return self._last[1]

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


def _result(job: tuple[Source, Entry, Future[Finding]]) -> tuple[Source, Entry, Finding]:
    return job[0], job[1], job[2].result()


def _probe_of(row: Row) -> Probe | None:
    if row["format"] is None:
        return None
    return Probe(
        format=row["format"],
        size_bytes=row["size_bytes"],
        sample_rate=row["sample_rate"],
        num_channels=row["num_channels"],
        num_samples=row["recording_samples"],
    )
