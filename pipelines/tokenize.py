"""One shard: its recordings decoded ahead on threads, each waveform encoded for every stream, one file per stream."""

import json
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from queue import SimpleQueue
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from ..storage.failpoints import failpoint
from ..storage.parquet import read_parquet
from ..storage.root import Root
from ..storage.schema import CORPUS_SCHEMA, code_columns, stream_schema
from ..storage.table import Receipt, Snapshot, write_shard
from ..tokenizers.codebook import Codebook
from ..tokenizers.numerics import numerics_class, use_one_thread
from ..tokenizers.spec import RunFailed, StreamSpec, UserError, num_frames
from ..tokenizers.tokenizer import Tokenizer, fingerprint_hash, load_tokenizer
from .audio import DECODER_VERSION, SEEKABLE_FORMATS, AudioError, Span, read_spans
from .resample import VERSION as RESAMPLER_VERSION
from .resample import resampled_length
from .sources import full_path

STREAMS = "streams"
CODEBOOKS = "codebooks"

Row = dict[str, Any]


class StreamMismatch(UserError):
    """A stream in the root was made with something else than this run has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamConfig:
    """What a stream is made with: `name=tokenizer:codebook` on the command line."""

    name: str
    tokenizer: str
    codebook: str

    @property
    def folder(self) -> str:
        return f"{STREAMS}/{self.name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Everything a worker needs to know before its first shard. Picklable."""

    root_uri: str
    corpus: Snapshot
    streams: tuple[StreamConfig, ...]
    device: str
    source_roots: dict[str, str]  # where a source is now, if it has moved
    decode_threads: int
    decode_ahead_bytes: int


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
    numerics: dict[str, str]
    errors_by_class: dict[str, int]
    example_error: str  # of the first segment with one: its path and why


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerAbout:
    """What a worker is, for the driver to compare with its peers and with the streams."""

    specs: dict[str, StreamSpec]
    fingerprints: dict[str, dict[str, str]]
    numerics: dict[str, str]


class Worker:
    """Holds warm tokenizers and turns shards into files. The same class inline and on Ray."""

    def __init__(self, work: Work) -> None:
        use_one_thread()
        self._work = work
        self._root = Root(work.root_uri)
        self._tokenizers = {
            stream.name: load_stream_tokenizer(self._root, stream, device=work.device) for stream in work.streams
        }
        self._folders = {stream.name: stream.folder for stream in work.streams}
        self._receipts_sent = 0
        self._numerics = numerics_class(work.device)

    def about(self) -> WorkerAbout:
        return WorkerAbout(
            specs={name: tokenizer.spec for name, tokenizer in self._tokenizers.items()},
            fingerprints={name: tokenizer.fingerprint for name, tokenizer in self._tokenizers.items()},
            numerics=self._numerics,
        )

    def tokenize(self, task: ShardTask) -> ShardReport:
        """Tokenize one shard for the streams that lack it and write their files."""
        if self._receipts_sent:
            failpoint("receipt-sent")
        try:
            return self._tokenize(task)
        except Exception as error:
            error.add_note(f"while tokenizing shard {task.shard}")
            raise

    def _tokenize(self, task: ShardTask) -> ShardReport:
        rows = read_parquet(self._root, self._work.corpus.path(task.shard), schema=CORPUS_SCHEMA).to_pylist()
        tokenizers = {name: self._tokenizers[name] for name in task.streams}
        encoded, decode_s, encode_s = encode_rows(rows, tokenizers, self._work)
        started = time.perf_counter()
        receipts = {}
        for name, tokenizer in tokenizers.items():
            table = stream_table(rows, encoded, name, tokenizer.spec, self._numerics)
            receipts[name] = write_shard(
                self._root, self._folders[name], task.shard, table, codebook_size=tokenizer.spec.codebook_size
            )
        self._receipts_sent += 1
        errors = [(row, error) for row, error in zip(rows, encoded, strict=True) if isinstance(error, AudioError)]
        return ShardReport(
            shard=task.shard,
            receipts=receipts,
            num_segments=len(rows),
            num_errors=len(errors),
            duration_s=sum(row["duration_s"] for row in rows),
            decode_s=decode_s,
            encode_s=encode_s,
            write_s=time.perf_counter() - started,
            numerics=self._numerics,
            errors_by_class=dict(Counter(error.kind for _, error in errors)),
            example_error=f"{errors[0][0]['path']}: {errors[0][1].message}" if errors else "",
        )


Encoded = dict[str, Tensor] | AudioError  # codes [K, T] by stream, or why there are none


def load_stream_tokenizer(root: Root, stream: StreamConfig, *, device: str) -> Tokenizer:
    """The tokenizer of a stream, with its codebook from the root. Raises `UserError`."""
    return load_tokenizer(
        stream.tokenizer,
        load_codebook(root, stream.codebook, tokenizer=stream.tokenizer),
        codebook_name=stream.codebook,
        device=device,
    )


def full_fingerprint(fingerprint: dict[str, str]) -> dict[str, str]:
    """A tokenizer's fingerprint with the rules that turned files into its waveforms."""
    return {**fingerprint, "decoder": DECODER_VERSION, "resampler": RESAMPLER_VERSION}


def open_stream_tokenizer(root: Root, name: str, snapshot: Snapshot) -> Tokenizer:
    """The tokenizer that a stream was made with, on the CPU, in a process set to one thread as workers are.

    Raises `StreamMismatch` if it is no longer the same.
    """
    use_one_thread()
    metadata = snapshot.metadata
    config = StreamConfig(name=name, tokenizer=metadata["spec"]["tokenizer"], codebook=metadata["codebook"])
    tokenizer = load_stream_tokenizer(root, config, device="cpu")
    require_same_fingerprint(root, name, snapshot, tokenizer.fingerprint)
    return tokenizer


def require_same_corpus(root: Root, name: str, stream: Snapshot, corpus: Snapshot) -> None:
    """Raise `StreamMismatch` unless the stream was made over this very corpus table."""
    if stream.metadata["corpus"] != corpus.table_id:
        raise StreamMismatch(
            f'Stream "{name}" in {root} was made over another corpus than the one that is there now: its rows are '
            "other segments. Give the new run another stream name, or restore the old corpus."
        )


def require_same_fingerprint(root: Root, name: str, snapshot: Snapshot, fingerprint: dict[str, str]) -> None:
    """Raise `StreamMismatch`, naming the first difference, unless the stream was made with this very tokenizer."""
    written, ours = snapshot.metadata["fingerprint"], full_fingerprint(fingerprint)
    if written != ours:
        part, theirs, here = first_difference(written, ours)
        raise StreamMismatch(
            f'Stream "{name}" in {root} was written with {written["tokenizer"]}@{fingerprint_hash(written)}, '
            f"this run has {ours['tokenizer']}@{fingerprint_hash(ours)} ({part} differs: {theirs[:16]} there, "
            f"{here[:16]} here). Give the new run another stream name, or restore the old {part}."
        )


def first_difference(theirs: dict[str, str], ours: dict[str, str]) -> tuple[str, str, str]:
    """The first part in which two fingerprints or numerics classes differ, and both sides of it."""
    for part in [*theirs, *ours]:
        if theirs.get(part) != ours.get(part):
            return part, str(theirs.get(part)), str(ours.get(part))
    raise AssertionError("there is no difference")


def load_codebook(root: Root, name: str, *, tokenizer: str) -> Codebook:
    """A codebook of the root. Raises `UserError` if there is none by that name."""
    try:
        content = root.read_bytes(f"{CODEBOOKS}/{name}.safetensors")
    except FileNotFoundError as error:
        named = [file.removesuffix(".safetensors") for file in root.list(CODEBOOKS)]
        raise UserError(
            f"There is no codebook {name!r} in {root} (there are: {', '.join(named) or 'none'}). "
            f"Fit it first: wavemill codebook fit {root} {tokenizer}" + (f" --name {name}" if name != tokenizer else "")
        ) from error
    return Codebook.from_bytes(content, name=name)


def encode_rows(rows: list[Row], tokenizers: dict[str, Tokenizer], work: Work) -> tuple[list[Encoded], float, float]:
    """Codes or an error for each row, in order, with the seconds spent in decoding and in encoding."""
    encoded: list[Encoded] = [_known_error(row) for row in rows]
    encode_s = 0.0
    rates = {tokenizer.spec.sample_rate for tokenizer in tokenizers.values()}
    ahead = DecodeAhead(rows, rates, work)
    for index, waveforms in ahead:
        if isinstance(waveforms, AudioError):
            encoded[index] = waveforms
            continue
        started = time.perf_counter()
        encoded[index] = encode_segment(waveforms, tokenizers)
        encode_s += time.perf_counter() - started
    return encoded, ahead.decode_s, encode_s


def encode_segment(waveforms: dict[int, Tensor], tokenizers: dict[str, Tokenizer]) -> dict[str, Tensor]:
    """Codes `[K, T]` by stream from the one decoded waveform. Raises if a tokenizer breaks its own frame rule."""
    codes = {}
    with torch.inference_mode():
        for name, tokenizer in tokenizers.items():
            waveform_N = waveforms[tokenizer.spec.sample_rate]
            codes_KT = tokenizer.encode(waveform_N)
            expected = (tokenizer.spec.num_codebooks, num_frames(waveform_N.shape[0], tokenizer.spec))
            if tuple(codes_KT.shape) != expected:
                raise RuntimeError(f"{name}: codes of shape {tuple(codes_KT.shape)}, the frame rule says {expected}")
            codes[name] = codes_KT
    return codes


def read_segments(rows: Iterable[Row], sample_rates: Iterable[int], source_roots: dict[str, str]) -> Iterator[Any]:
    """`{rate: waveform}` or an `AudioError` for each row; rows of one recording, being neighbours, share a pass."""
    rates = list(sample_rates)
    for (source, path), group in groupby(rows, key=lambda row: (row["source"], row["path"])):
        members = list(group)
        yield from _read_recording(members, path, source_roots.get(source) or members[0]["source_root"], rates)


def _read_recording(rows: list[Row], path: str, source_root: str, rates: list[int]) -> Iterator[Any]:
    while rows:
        run = _ascending_run(rows)
        rows = rows[len(run) :]
        done = 0
        try:
            for result in read_spans(
                full_path(source_root, path),
                format_name=run[0]["format"],
                size_bytes=run[0]["size_bytes"],
                spans=[Span(row["start_sample"], row["num_samples"]) for row in run],
                sample_rates=rates,
            ):
                done += 1
                yield result
        except AudioError as error:  # nothing further can be read in this pass
            if not os.path.isdir(source_root):
                raise RunFailed(
                    f"The source folder {source_root} is not there (any more), so its recordings cannot be read. "
                    "Mount it, or say where it is now with --source NAME=FOLDER; then run the command again."
                ) from error
            if error.kind == "corrupt" and len(run) > 1 and run[0]["format"] in SEEKABLE_FORMATS:
                # each of the rest in a pass of its own, so that what is good does not depend on its neighbours
                for row in run[done:]:
                    yield from _read_recording([row], path, source_root, rates)
            else:
                yield from [error] * (len(run) - done)


def _ascending_run(rows: list[Row]) -> list[Row]:
    """The leading rows that one pass can serve: each begins where the last one ended or later."""
    end = 0
    for count, row in enumerate(rows):
        if row["start_sample"] < end:
            return rows[:count]
        end = row["start_sample"] + row["num_samples"]
    return rows


class DecodeAhead:
    """Iterates `(index, waveforms or error)` over the rows without an error, decoded ahead in bounded memory.

    Threads take whole recordings; what they have decoded and nobody has taken yet stays under the budget, one
    segment always being allowed. The order of results is not the order of rows.
    """

    def __init__(self, rows: list[Row], rates: set[int], work: Work) -> None:
        self.decode_s = 0.0
        self._rates = rates
        self._work = work
        good = [(index, row) for index, row in enumerate(rows) if row["error"] is None]
        self._groups = deque(list(g) for _, g in groupby(good, key=lambda pair: (pair[1]["source"], pair[1]["path"])))
        self._num_rows = len(good)
        self._ready: SimpleQueue[tuple[int, Any]] = SimpleQueue()
        self._room = threading.Condition()
        self._held_bytes = 0
        self._stopped = False

    def __iter__(self) -> Iterator[tuple[int, dict[int, Tensor] | AudioError]]:
        threads = [threading.Thread(target=self._decode, daemon=True) for _ in range(self._work.decode_threads)]
        for thread in threads:
            thread.start()
        try:
            for _ in range(self._num_rows):
                index, result = self._ready.get()
                if isinstance(result, BaseException) and not isinstance(result, AudioError):
                    raise result
                yield index, result
                if not isinstance(result, AudioError):
                    self._release(result)
        finally:
            with self._room:
                self._stopped = True
                self._room.notify_all()
            for thread in threads:
                thread.join()

    def _decode(self) -> None:
        try:
            while not self._stopped:
                try:
                    group = self._groups.popleft()
                except IndexError:
                    return
                self._decode_group(group)
        except BaseException as error:  # noqa: BLE001 - carried to the thread that waits, and raised there
            self._ready.put((-1, error))

    def _decode_group(self, group: list[tuple[int, Row]]) -> None:
        results = read_segments([row for _, row in group], self._rates, self._work.source_roots)
        for index, row in group:
            size = sum(4 * resampled_length(row["num_samples"], row["sample_rate"], rate) for rate in self._rates)
            if not self._reserve(size):
                return
            started = time.perf_counter()
            result = next(results)
            elapsed = time.perf_counter() - started
            with self._room:
                self.decode_s += elapsed
                if isinstance(result, AudioError):
                    self._held_bytes -= size
                    self._room.notify_all()
            self._ready.put((index, result))

    def _reserve(self, size: int) -> bool:
        with self._room:
            while self._held_bytes and self._held_bytes + size > self._work.decode_ahead_bytes and not self._stopped:
                self._room.wait()
            self._held_bytes += size
            return not self._stopped

    def _release(self, waveforms: dict[int, Tensor]) -> None:
        with self._room:
            self._held_bytes -= sum(4 * waveform_N.shape[0] for waveform_N in waveforms.values())
            self._room.notify_all()


def stream_table(
    rows: list[Row], encoded: list[Encoded], name: str, spec: StreamSpec, numerics: dict[str, str]
) -> pa.Table:
    """A shard's rows of one stream, in the order of the corpus rows."""
    schema = stream_schema(spec)
    codes = [None if isinstance(result, AudioError) else result[name].numpy() for result in encoded]
    errors = [result if isinstance(result, AudioError) else None for result in encoded]
    columns: dict[str, Any] = {
        "id": [row["id"] for row in rows],
        "shard": [row["shard"] for row in rows],
        "num_frames": [None if codes_KT is None else codes_KT.shape[1] for codes_KT in codes],
        "error": [error.kind if error else None for error in errors],
        "error_message": [error.message if error else None for error in errors],
    }
    for book, column in enumerate(code_columns(spec.num_codebooks)):
        columns[column] = [None if codes_KT is None else codes_KT[book] for codes_KT in codes]
    table = pa.Table.from_pydict(columns, schema=schema)
    return table.replace_schema_metadata({"wavemill.numerics": json.dumps(numerics, sort_keys=True)})


def _known_error(row: Row) -> AudioError:
    """The error a row brings from the corpus; a placeholder for the rows that will be decoded."""
    return AudioError(row["error"] or "unreadable", row["error_message"] or "")
