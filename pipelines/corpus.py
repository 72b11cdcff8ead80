"""From sources to the rows of a corpus: probe, segment, assign to shards. Append-only: what is known is passed over."""

import itertools
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from ..storage.parquet import read_parquet
from ..storage.root import Root
from ..storage.schema import CORPUS_SCHEMA, segment_id
from ..storage.table import Snapshot
from ..tokenizers.spec import UserError
from .audio import AudioError, Probe, probe
from .sniff import FORMATS
from .sources import Entry, Source, full_path

CORPUS = "corpus"
CHANNEL_POLICIES = ("mix",)
MAX_SEGMENT_S = 12 * 3600
_MAX_SHARD_SEGMENTS = 20_000
_PROBES_AHEAD = 256
_PROBE_THREADS = 8

_KNOWN_COLUMNS = [
    *("id", "source", "source_root", "path", "format", "size_bytes"),
    *("sample_rate", "num_channels", "recording_samples"),
]

Row = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class CorpusPolicy:
    """How recordings become segments: fixed when a corpus is created, the same for all that is added later."""

    window_s: float | None = None  # None: whole recordings
    channels: str = "mix"


@dataclass(slots=True)
class Known:
    """What a corpus holds already, for telling what is new."""

    ids: set[str] = field(default_factory=set)
    recordings: dict[tuple[str, str], tuple[int | None, Probe | None]] = field(default_factory=dict)
    roots: dict[str, str] = field(default_factory=dict)  # source name -> where it was

    @classmethod
    def read(cls, root: Root, snapshot: Snapshot) -> "Known":
        known = cls()
        for shard in snapshot.files:
            rows = read_parquet(root, snapshot.path(shard), schema=CORPUS_SCHEMA, columns=_KNOWN_COLUMNS)
            for row in rows.to_pylist():
                known.add(row)
        return known

    def add(self, row: Row) -> None:
        self.ids.add(row["id"])
        self.roots[row["source"]] = row["source_root"]
        self.recordings[row["source"], row["path"]] = (row["size_bytes"], _probe_of(row))


@dataclass(slots=True)
class BuildCounts:
    """What a build met. Every entry of every source is counted once as new, known, changed or twice named."""

    new: int = 0
    known: int = 0
    replaced: int = 0  # other bytes now behind a path and length the corpus has: its row stays as it is
    twice: int = 0  # named twice by this build
    errors: int = 0
    duration_s: float = 0.0


def new_rows(sources: Iterable[Source], known: Known, policy: CorpusPolicy, counts: BuildCounts) -> Iterator[Row]:
    """Rows, without a shard yet, of all segments that the corpus does not have, in the order of the sources.

    Headers are probed on threads, a bounded number ahead. Raises `UserError` for two sources of one name.
    """
    _require_own_names(sources := list(sources), known)
    for source, entry, found in _probed(sources, known):
        size, result = found
        seen = known.recordings.get((source.name, _plain_path(entry)))
        for row in _segment_rows(source, entry, size, result, policy):
            if row["id"] not in known.ids:
                known.ids.add(row["id"])
                counts.new += 1
                counts.errors += row["error"] is not None
                counts.duration_s += row["duration_s"]
                yield row
            elif seen is None:
                counts.twice += 1
            elif seen[0] != size:
                counts.replaced += 1
            else:
                counts.known += 1


def shards(rows: Iterable[Row], *, first: int, shard_hours: float) -> Iterator[pa.Table]:
    """Corpus tables of about `shard_hours` of audio each, numbered from `first`, in the order of the rows."""
    number = itertools.count(first)
    pending: list[Row] = []
    duration_s = 0.0
    for row in rows:
        pending.append(row)
        duration_s += row["duration_s"]
        if duration_s >= shard_hours * 3600 or len(pending) >= _MAX_SHARD_SEGMENTS:
            yield _shard_table(pending, next(number))
            pending, duration_s = [], 0.0
    if pending:
        yield _shard_table(pending, next(number))


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


def _probed(sources: list[Source], known: Known) -> Iterator[tuple[Source, Entry, "_Found"]]:
    """Entries with what their headers say, in order, probed on threads a bounded number ahead."""
    pending: deque[tuple[Source, Entry, Future[_Found]]] = deque()
    with ThreadPoolExecutor(_PROBE_THREADS, thread_name_prefix="probe") as pool:
        for source in sources:
            for entry in source.entries:
                seen = known.recordings.get((source.name, _plain_path(entry)))
                pending.append((source, entry, pool.submit(_find, source.root, entry.path, seen)))
                if len(pending) >= _PROBES_AHEAD:
                    done = pending.popleft()
                    yield done[0], done[1], done[2].result()
        while pending:
            done = pending.popleft()
            yield done[0], done[1], done[2].result()


_Found = tuple[int | None, Probe | AudioError]  # size in bytes, and the header or why there is none


def _find(source_root: str, path: str, seen: tuple[int | None, Probe | None] | None) -> _Found:
    size = None
    try:
        full = full_path(source_root, path)
        path.encode()
        size = _size(full)
        if seen is not None and seen[1] is not None and seen[0] == size:
            return size, seen[1]
        return size, probe(full)
    except UnicodeEncodeError:
        return size, AudioError("bad-name", "the file's name is not valid UTF-8; rename it")
    except AudioError as error:
        return size, error


def _size(path: str) -> int | None:
    try:
        return os.stat(path).st_size
    except OSError:
        return None  # probe says why


def _segment_rows(
    source: Source, entry: Entry, size: int | None, found: Probe | AudioError, policy: CorpusPolicy
) -> Iterator[Row]:
    row: Row = {
        "source": source.name,
        "source_root": source.root,
        "path": _plain_path(entry),
        "channel": policy.channels,
        "size_bytes": size,
        "text": entry.text,
        "speaker": entry.speaker,
        "language": entry.language,
    }
    if isinstance(found, AudioError):
        # the offset keeps two parts of one unreadable recording apart
        yield _finish(row, round(entry.offset_s * 1000), 0, error=found)
        return
    row |= {
        "format": found.format.name,
        "sample_rate": found.sample_rate,
        "num_channels": found.num_channels,
        "recording_samples": found.num_samples,
    }
    start = round(entry.offset_s * found.sample_rate)
    end = found.num_samples
    if entry.duration_s is not None:
        end = start + round(entry.duration_s * found.sample_rate)
        if start < found.num_samples < end <= found.num_samples + found.sample_rate // 10:
            end = found.num_samples  # manifests round: a tenth of a second past the end is the end
    if end > found.num_samples or start >= end:
        message = (
            f"the manifest asks for samples {start:,} to {end:,}, the recording has {found.num_samples:,} "
            f"at {found.sample_rate:,} Hz"
        )
        yield _finish(row, start, max(0, end - start), error=AudioError("out-of-range", message))
        return
    window = round(policy.window_s * found.sample_rate) if policy.window_s else end - start
    if end - start > window:
        row["text"] = None  # which words fall into which window is not known
    for first in range(start, end, window):
        num_samples = min(window, end - first)
        error = None
        if num_samples > MAX_SEGMENT_S * found.sample_rate:
            error = AudioError("too-long", f"over {MAX_SEGMENT_S // 3600} hours in one segment; build with --window")
        yield _finish(row, first, num_samples, error=error)


def _plain_path(entry: Entry) -> str:
    """The path as a table can hold it: bytes that are no UTF-8 become escapes."""
    return entry.path.encode("utf-8", "backslashreplace").decode()


def _finish(row: Row, start_sample: int, num_samples: int, *, error: AudioError | None) -> Row:
    rate = row.get("sample_rate")
    return {
        **row,
        "id": segment_id(
            row["source"],
            row["path"],
            member="",
            channel=row["channel"],
            start_sample=start_sample,
            num_samples=num_samples,
        ),
        "start_sample": start_sample,
        "num_samples": num_samples,
        "duration_s": num_samples / rate if rate and error is None else 0.0,
        "error": error.kind if error else None,
        "error_message": error.message if error else None,
    }


def _probe_of(row: Row) -> Probe | None:
    if row["format"] is None:
        return None
    return Probe(
        format=FORMATS[row["format"]],
        size_bytes=row["size_bytes"],
        sample_rate=row["sample_rate"],
        num_channels=row["num_channels"],
        num_samples=row["recording_samples"],
    )
