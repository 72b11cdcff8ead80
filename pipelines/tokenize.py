"""One shard: its recordings decoded ahead on threads, each waveform encoded for every stream, one file per stream."""

import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
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
from ..tokenizers.registry import describe_tokenizer, load_tokenizer, require_tokenizer
from ..tokenizers.spec import StreamSpec, UserError, did_you_mean, num_frames
from ..tokenizers.tokenizer import Description, Mode, Tokenizer, TokenizerConfig, fingerprint_hash
from .ahead import DecodeAhead
from .audio import DECODER_VERSION
from .decoder import DecoderSettings
from .entries import AudioError
from .policy import CorpusPolicy
from .reading import Reader, Row
from .resample import VERSION as RESAMPLER_VERSION

STREAMS = "streams"
CODEBOOKS = "codebooks"


class StreamMismatch(UserError):
    """A stream in the root was made with something else than this run has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamConfig:
    """What a stream is made with: `name=tokenizer:codebook,weights=...` on the command line."""

    name: str
    tokenizer: TokenizerConfig
    codebook: str | None = None  # of the root; None: the one of the tokenizer's name, or the tokenizer's own

    @property
    def codebook_name(self) -> str | None:
        """The codebook of the root that the stream uses, or None if its tokenizer has codebooks of its own."""
        name = self.tokenizer.tokenizer
        return (self.codebook or name) if require_tokenizer(name).needs_codebook else self.codebook

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
    decoder: DecoderSettings = field(default_factory=DecoderSettings)

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
        self._readers = work.open_readers(self._root)
        self._folders = {stream.name: stream.folder for stream in work.streams}
        self._receipts_sent = 0
        self._numerics = numerics_class(work.device)

    def about(self) -> WorkerAbout:
        return WorkerAbout(
            specs={name: tokenizer.spec for name, tokenizer in self._tokenizers.items()},
            fingerprints={name: tokenizer.fingerprint for name, tokenizer in self._tokenizers.items()},
            numerics=self._numerics,
        )

    def close(self) -> None:
        """End the decoder processes."""
        for reader in self._readers:
            reader.close()

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
        encoded, decode_s, encode_s = encode_rows(
            rows, tokenizers, self._readers, ahead_bytes=self._work.decode_ahead_bytes
        )
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
    name, codebook = _stream_codebook(root, stream)
    return load_tokenizer(stream.tokenizer, codebook, codebook_name=name, device=device)


def describe_stream(root: Root, stream: StreamConfig) -> Description:
    """What a stream's tokenizer will be, without building its model. Raises `UserError`."""
    name, codebook = _stream_codebook(root, stream)
    return describe_tokenizer(stream.tokenizer, codebook, codebook_name=name)


def _stream_codebook(root: Root, stream: StreamConfig) -> tuple[str, Codebook | None]:
    name = stream.codebook_name
    if name is None or not require_tokenizer(stream.tokenizer.tokenizer).needs_codebook:
        return name or "", None
    return name, load_codebook(root, name, tokenizer=stream.tokenizer.tokenizer)


def full_fingerprint(fingerprint: dict[str, str], corpus: Snapshot) -> dict[str, str]:
    """A tokenizer's fingerprint with the rules that turned files into its waveforms."""
    policy = CorpusPolicy.from_json(corpus.metadata["policy"])
    return {
        **fingerprint,
        "decoder": DECODER_VERSION,
        "resampler": RESAMPLER_VERSION,
        "transforms": policy.transforms_fingerprint(),
        "separator": policy.separate or "none",
    }


def stream_config(name: str, snapshot: Snapshot, *, weights: str | None = None) -> StreamConfig:
    """What a stream was made with; `weights` says where its weights are now, if they have moved."""
    metadata = snapshot.metadata
    config = dict(metadata["tokenizer"])
    moved = {"weights": weights, "revision": None} if weights else {}
    tokenizer = TokenizerConfig(**{**config, "mode": Mode(config["mode"]), **moved})
    return StreamConfig(name=name, tokenizer=tokenizer, codebook=metadata["codebook"])


def open_stream_tokenizer(
    root: Root, name: str, snapshot: Snapshot, corpus: Snapshot, *, weights: str | None = None
) -> Tokenizer:
    """The tokenizer that a stream was made with, on the CPU, in a process set to one thread as workers are.

    `weights` says where its weights are now, if they have moved. Raises `StreamMismatch` if it is no longer the same.
    """
    use_one_thread()
    tokenizer = load_stream_tokenizer(root, stream_config(name, snapshot, weights=weights), device="cpu")
    require_same_fingerprint(root, name, snapshot, full_fingerprint(tokenizer.fingerprint, corpus))
    return tokenizer


def require_same_corpus(root: Root, name: str, stream: Snapshot, corpus: Snapshot) -> None:
    """Raise `StreamMismatch` unless the stream was made over this very corpus table."""
    if stream.metadata["corpus"] != corpus.table_id:
        raise StreamMismatch(
            f'Stream "{name}" in {root} was made over another corpus than the one that is there now: its rows are '
            "other segments. Give the new run another stream name, or restore the old corpus."
        )


def require_same_fingerprint(root: Root, name: str, snapshot: Snapshot, ours: dict[str, str]) -> None:
    """Raise `StreamMismatch`, naming the first difference, unless the stream's full fingerprint is ours."""
    written = snapshot.metadata["fingerprint"]
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
    """A codebook of the root. Raises `UserError` if there is none by that name, or no such tokenizer."""
    require_tokenizer(tokenizer)
    try:
        content = root.read_bytes(f"{CODEBOOKS}/{name}.safetensors")
    except FileNotFoundError as error:
        named = [file.removesuffix(".safetensors") for file in root.list(CODEBOOKS)]
        raise UserError(
            f"There is no codebook {name!r} in {root}; there are: {', '.join(named) or 'none'}."
            f"{did_you_mean(name, named)} "
            f"Fit it first: wavemill codebook fit {root} {tokenizer}{f' --name {name}' if name != tokenizer else ''}"
        ) from error
    return Codebook.from_bytes(content, name=name)


def encode_rows(
    rows: list[Row], tokenizers: dict[str, Tokenizer], readers: Sequence[Reader], *, ahead_bytes: int
) -> tuple[list[Encoded], float, float]:
    """Codes or an error for each row, in order, with the seconds spent in decoding and in encoding."""
    encoded: list[Encoded] = [_known_error(row) for row in rows]
    encode_s = 0.0
    rates = {tokenizer.spec.sample_rate for tokenizer in tokenizers.values()}
    ahead = DecodeAhead(rows, rates, readers, ahead_bytes)
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
