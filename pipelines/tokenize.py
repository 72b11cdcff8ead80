"""Shards: their recordings decoded ahead on threads, each waveform encoded for every stream, one file per stream.

On a CPU one shard at a time and each segment alone; on a GPU several shards, so that batches fill.
"""

import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import pyarrow as pa
import torch

from ..storage.failpoints import failpoint
from ..storage.parquet import read_parquet
from ..storage.root import Root
from ..storage.schema import CORPUS_SCHEMA, code_columns, more_columns, stream_schema
from ..storage.statistics import KEY as STATISTICS
from ..storage.statistics import Statistics
from ..storage.table import Receipt, Snapshot, write_shard
from ..tokenizers.ladder import VERSION as LADDER_VERSION
from ..tokenizers.ladder import rung_of
from ..tokenizers.numerics import numerics_class, use_exact_math, use_one_thread
from ..tokenizers.registry import output_of, require_tokenizer
from ..tokenizers.spec import RunFailed, StreamSpec
from ..tokenizers.tokenizer import (
    Mode,
    Output,
    RowTokenizer,
    TextTokenizer,
    Tokenizer,
    TokenizerConfig,
    Tokens,
    UnitTokenizer,
    WordTokenizer,
    tokens_of,
)
from .ahead import DecodeAhead
from .batching import Batcher, Lane, require_frame_rule
from .decoder import DecoderSettings
from .derived import Result, hearing_ones, of_texts, of_tokens, stored_results
from .entries import AudioError
from .reading import Reader, Row, Waveforms
from .streams import StreamConfig, load_stream_tokenizer, without_revision

_TOGETHER, _TOGETHER_AS_NUMBERS = 10_000, 500  # segments of the shards that a GPU's worker takes together

AnyTokenizer = Tokenizer | RowTokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Everything a worker needs to know before its first shard. Picklable."""

    root_uri: str
    corpus: Snapshot
    streams: tuple[StreamConfig, ...]  # each after the one that it is made of
    device: str
    source_roots: dict[str, str]  # where a source is now, if it has moved
    decode_threads: int
    decode_ahead_bytes: int
    decoder: DecoderSettings = field(default_factory=DecoderSettings)
    batch_seconds: dict[Mode, float] | None = None  # of padded audio, for GPUs; None: each segment alone
    max_waiting_bytes: int = 2 * 1024**3  # of waveforms that wait for their batch
    sources: dict[str, Snapshot] = field(default_factory=dict)  # what derived streams are made of, where it is there
    idle: frozenset[str] = frozenset()  # streams that no shard lacks: their models are not loaded

    @property
    def together(self) -> int:
        """Segments whose tokens a worker may hold before it writes them: fewer where these are numbers."""
        continuous = any(output_of(stream.tokenizer) is Output.FEATURES for stream in self.streams)
        return _TOGETHER_AS_NUMBERS if continuous else _TOGETHER

    def worker(self) -> "Worker":
        return Worker(self)

    def open_readers(self, root: Root) -> list[Reader]:
        """A reader, with its decoder process, for each decoding thread."""
        separator = self.corpus.metadata["policy"]["separate"]
        return [
            Reader(root, self.source_roots, separator=separator, settings=self.decoder)
            for _ in range(self.decode_threads)
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardTask:
    """A shard and the streams that it has no file in yet."""

    shard: int
    streams: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardReport:
    """What a worker hands back: receipts to commit, and figures to show."""

    shard: int
    receipts: dict[str, Receipt]  # by stream name
    num_segments: int
    num_errors: int
    duration_s: float  # of the audio
    decode_s: float  # thread time in decoding and resampling
    encode_s: float
    write_s: float
    fingerprints: dict[str, dict[str, str]]  # by stream name
    numerics: dict[str, dict[str, str]]  # by stream name
    errors_by_class: dict[str, int]
    example_error: str  # of the first segment with one: its path and why


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerAbout:
    """What a worker is, for the driver to compare with its peers and with the streams; by stream, without idle ones."""

    specs: dict[str, StreamSpec]
    fingerprints: dict[str, dict[str, str]]
    numerics: dict[str, dict[str, str]]


class Worker:
    """Holds warm tokenizers and turns shards into files. The same class inline and on Ray."""

    def __init__(self, work: Work) -> None:
        use_one_thread()
        use_exact_math()
        self._work = work
        self._root = Root(work.root_uri)
        self._folders = {stream.name: stream.folder for stream in work.streams}
        self._receipts_sent = 0
        self._numerics = {
            stream.name: numerics_of(stream.tokenizer, work.device, work.batch_seconds)
            for stream in work.streams
            if stream.name not in work.idle
        }

    # what takes long is made when it is first needed: that a worker has a place is known before its weights are there

    @cached_property
    def _tokenizers(self) -> dict[str, Any]:
        work = self._work
        return {
            stream.name: load_stream_tokenizer(self._root, stream, work.streams, device=work.device)
            for stream in work.streams
            if stream.name not in work.idle
        }

    @cached_property
    def _lanes(self) -> dict[str, Lane] | None:
        return _lanes(self._work, hearing_ones(self._tokenizers))

    @cached_property
    def _readers(self) -> list[Reader]:
        return self._work.open_readers(self._root)

    def about(self) -> WorkerAbout:
        return WorkerAbout(
            specs={name: tokenizer.spec for name, tokenizer in self._tokenizers.items()},
            fingerprints={name: tokenizer.fingerprint for name, tokenizer in self._tokenizers.items()},
            numerics=self._numerics,
        )

    def close(self) -> None:
        """End the decoder processes."""
        for reader in self.__dict__.get("_readers", ()):
            reader.close()

    def run(self, tasks: Sequence[ShardTask]) -> list[ShardReport]:
        """Tokenize shards together for the streams that they lack, which are the same, and write their files."""
        if self._receipts_sent:
            failpoint("receipt-sent")
        try:
            return self._tokenize(tasks)
        except Exception as error:
            error.add_note(f"while tokenizing shard {', '.join(str(task.shard) for task in tasks)}")
            raise

    def _tokenize(self, tasks: Sequence[ShardTask]) -> list[ShardReport]:
        hearing = hearing_ones({name: self._tokenizers[name] for name in tasks[0].streams})
        assert all(task.streams == tasks[0].streams for task in tasks), "shards of a group lack the same streams"
        corpus = self._work.corpus
        shards = [read_parquet(self._root, corpus.path(task.shard), schema=CORPUS_SCHEMA).to_pylist() for task in tasks]
        rows = [row for shard in shards for row in shard]
        encoded: list[Encoded] = []
        decode_s = encode_s = 0.0
        if hearing:
            batcher = None
            if self._lanes is not None:
                lanes = [self._lanes[name] for name in hearing]
                batcher = Batcher(lanes, max_waiting_bytes=self._work.max_waiting_bytes)
            encoded, decode_s, encode_s = encode_rows(
                rows, hearing, self._readers, ahead_bytes=self._work.decode_ahead_bytes, batcher=batcher
            )
        reports, end = [], 0
        for task, shard in zip(tasks, shards, strict=True):
            begin, end = end, end + len(shard)
            share = len(shard) / max(1, len(rows))
            started = time.perf_counter()
            results = self._results(task, shard, encoded[begin:end])
            derive_s = time.perf_counter() - started
            reports.append(self._write(task, shard, results, decode_s * share, encode_s * share + derive_s))
        return reports

    def _results(self, task: ShardTask, rows: list[Row], encoded: list["Encoded"]) -> dict[str, list[Result]]:
        """What each stream has of each row of a shard, the streams in the order in which they are made."""
        results: dict[str, list[Result]] = {}
        for stream in self._work.streams:
            name = stream.name
            if name not in task.streams:
                continue
            tokenizer = self._tokenizers[name]
            if isinstance(tokenizer, (TextTokenizer, WordTokenizer)):
                results[name] = of_texts(name, rows, tokenizer)
            elif isinstance(tokenizer, UnitTokenizer):
                assert stream.of is not None, "describing it asks for its source"
                made = stream.of in results
                source = results[stream.of] if made else stored_results(self._root, self._work.sources[stream.of], rows)
                results[name] = of_tokens(name, source, tokenizer)
            else:
                results[name] = [each if isinstance(each, AudioError) else each[name] for each in encoded]
        return results

    def _write(
        self, task: ShardTask, rows: list[Row], results: dict[str, list[Result]], decode_s: float, encode_s: float
    ) -> ShardReport:
        """Write a shard's files; its report, with its share of the seconds that its group took."""
        started = time.perf_counter()
        receipts = {}
        for name in task.streams:
            spec = self._tokenizers[name].spec
            table = stream_table(rows, results[name], spec, self._numerics[name])
            receipts[name] = write_shard(
                self._root, self._folders[name], task.shard, table, codebook_size=spec.codebook_size
            )
        self._receipts_sent += 1
        errors = _first_errors(rows, list(results.values()))
        return ShardReport(
            shard=task.shard,
            receipts=receipts,
            num_segments=len(rows),
            num_errors=len(errors),
            duration_s=sum(row["duration_s"] for row in rows),
            decode_s=decode_s,
            encode_s=encode_s,
            write_s=time.perf_counter() - started,
            fingerprints={name: without_revision(self._tokenizers[name].fingerprint) for name in task.streams},
            numerics={name: self._numerics[name] for name in task.streams},
            errors_by_class=dict(Counter(error.kind for _, error in errors)),
            example_error=f"{errors[0][0]['path']}: {errors[0][1].message}" if errors else "",
        )


def _first_errors(rows: list[Row], results: list[list[Result]]) -> list[tuple[Row, AudioError]]:
    """The rows that have an error in some stream, with the first."""
    of_rows = zip(rows, zip(*results, strict=True), strict=True)
    found = [(row, next((one for one in each if isinstance(one, AudioError)), None)) for row, each in of_rows]
    return [(row, error) for row, error in found if error is not None]


def _lanes(work: Work, tokenizers: dict[str, AnyTokenizer]) -> dict[str, Lane] | None:
    """How each stream is batched, by its name; None where each segment is encoded alone."""
    if work.batch_seconds is None:
        return None
    modes = {stream.name: stream.tokenizer.mode for stream in work.streams}
    return {
        name: Lane(name, tokenizer, modes[name], batch_seconds=work.batch_seconds[modes[name]])
        for name, tokenizer in tokenizers.items()
    }


def numerics_of(config: TokenizerConfig, device: str, batch_seconds: dict[Mode, float] | None) -> dict[str, str]:
    """The numerics class of one stream: that of the device and, in `fast` mode, the shapes of batches.

    Those of `exact` mode are free. What computes with integers alone is of one class everywhere.
    """
    if integers_only(config.tokenizer):
        return {"device": "any"}
    if batch_seconds is None or config.mode is Mode.EXACT:
        return numerics_class(device)
    batches = f"ladder {LADDER_VERSION}, {batch_seconds[Mode.FAST]:g} s in fast mode"
    return numerics_class(device) | {"batches": batches}


def integers_only(tokenizer: str) -> bool:
    """Whether nothing is rounded on the way to a tokenizer's tokens: ids of texts, and what is made of codes."""
    entry = require_tokenizer(tokenizer)
    return entry.takes != "audio" and not entry.spec.dim


Encoded = dict[str, Tokens] | AudioError  # by stream, or why there are none


def encode_rows(
    rows: list[Row],
    tokenizers: dict[str, AnyTokenizer],
    readers: Sequence[Reader],
    *,
    ahead_bytes: int,
    batcher: Batcher | None = None,
) -> tuple[list[Encoded], float, float]:
    """Tokens or an error for each row, in order, with the seconds spent in decoding and in encoding.

    Without a `batcher`, or if it is longer than the ladder's top, a segment is encoded alone.
    """
    encoded: list[Encoded] = [_known_error(row) for row in rows]
    encode_s = 0.0
    sounds = {tokenizer.spec.sound for tokenizer in tokenizers.values()}
    ahead = DecodeAhead(rows, sounds, readers, ahead_bytes)
    for index, waveforms in ahead:
        if isinstance(waveforms, AudioError):
            encoded[index] = waveforms
            continue
        started = time.perf_counter()
        rung = rung_of(rows[index]["num_samples"], rows[index]["sample_rate"]) if batcher else None
        if batcher is None or rung is None:
            encoded[index] = encode_segment(waveforms, tokenizers)
        else:
            for finished, tokens in batcher.add(index, waveforms, rung):
                encoded[finished] = tokens
        encode_s += time.perf_counter() - started
    started = time.perf_counter()
    for finished, tokens in batcher.flush() if batcher else []:
        encoded[finished] = tokens
    return encoded, ahead.decode_s, encode_s + time.perf_counter() - started


def encode_segment(waveforms: Waveforms, tokenizers: dict[str, AnyTokenizer]) -> dict[str, Tokens]:
    """Tokens by stream from the one decoded waveform. Raises if a tokenizer breaks its own frame rule."""
    tokens = {}
    with torch.inference_mode():
        for name, tokenizer in tokenizers.items():
            waveform = waveforms[tokenizer.spec.sound]
            try:
                tokens[name] = tokens_of(tokenizer, waveform)
            except torch.OutOfMemoryError as error:
                length_s = waveform.shape[-1] / tokenizer.spec.sample_rate
                raise RunFailed(
                    f"{name}: a segment of {length_s:.1f} s does not fit into the device's memory. End what else runs "
                    "on it, use a larger one, or --device cpu."
                ) from error
            require_frame_rule(name, tokens[name], waveform, tokenizer.spec)
    return tokens


def stream_table(rows: list[Row], results: Sequence[Result], spec: StreamSpec, numerics: dict[str, str]) -> pa.Table:
    """A shard's rows of one stream, in the order of the corpus rows."""
    schema = stream_schema(spec)
    tokens = [None if isinstance(result, AudioError) else result for result in results]
    codes = [None if each is None else each.codes_KT.numpy() for each in tokens]
    errors = [result if isinstance(result, AudioError) else None for result in results]
    columns: dict[str, Any] = {
        "id": [row["id"] for row in rows],
        "shard": [row["shard"] for row in rows],
        "num_frames": [None if codes_KT is None else codes_KT.shape[1] for codes_KT in codes],
        "error": [error.kind if error else None for error in errors],
        "error_message": [error.message if error else None for error in errors],
    }
    for book, column in enumerate(code_columns(spec.num_codebooks)):
        columns[column] = [None if codes_KT is None else codes_KT[book] for codes_KT in codes]
    for column in more_columns(spec):
        columns[column] = [None if each is None else _MORE[column](each) for each in tokens]
    table = pa.Table.from_pydict(columns, schema=schema)
    told = {"wavemill.numerics": json.dumps(numerics, sort_keys=True)}
    if spec.dim:
        frames = (each.frames_TD.numpy() for each in tokens if each is not None and each.frames_TD is not None)
        told[STATISTICS] = Statistics.of(frames, spec.dim).to_json()
    return table.replace_schema_metadata(told)


_MORE: dict[str, Callable[[Tokens], Any]] = {
    "frames": lambda tokens: tokens.frames_TD.numpy().astype("<f2").tobytes(),  # pyright: ignore[reportOptionalMemberAccess]
    "durations": lambda tokens: tokens.durations_T.numpy(),  # pyright: ignore[reportOptionalMemberAccess]
    "chunk_scales": lambda tokens: tokens.scales_C.numpy(),  # pyright: ignore[reportOptionalMemberAccess]
    "text": lambda tokens: tokens.text,
}


def _known_error(row: Row) -> AudioError:
    """The error a row brings from the corpus; a placeholder for the rows that will be decoded."""
    return AudioError(row["error"] or "unreadable", row["error_message"] or "")
