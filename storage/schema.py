"""The columns of a corpus and of a stream, and the ids that join them."""

import base64
import hashlib
import re

import pyarrow as pa

from ..tokenizers.spec import StreamSpec, UserError

FORMAT_VERSION = 4
ADDED_COLUMNS = frozenset({"pair"})  # since tables of this format were first written; older files are read as null

# words or phones with their times: samples of the recording, counted from the segment's first
_LABELS = pa.list_(
    pa.struct(
        [
            pa.field("start_sample", pa.int64(), nullable=False),
            pa.field("num_samples", pa.int64(), nullable=False),
            pa.field("label", pa.string(), nullable=False),
        ]
    )
)

CORPUS_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("shard", pa.int32(), nullable=False),
        pa.field("source", pa.string(), nullable=False),  # the name ids are made of
        pa.field("source_root", pa.string(), nullable=False),  # where that source was when it was read
        pa.field("path", pa.string(), nullable=False),  # relative to source_root
        pa.field("member", pa.string(), nullable=False),  # of a tar, or COLUMN/ROW of a table; "": path is the audio
        pa.field("member_offset", pa.int64()),  # bytes before a member of a plain tar; null: see `member`
        pa.field("channel", pa.string(), nullable=False),  # "mix": the mean of all channels; else the channel, from "0"
        pa.field("parent", pa.string()),  # the segment that this one was separated from
        pa.field("separated", pa.int16()),  # which of its separated sources, from 0
        pa.field("format", pa.string()),
        pa.field("size_bytes", pa.int64()),
        pa.field("version", pa.string()),  # what tells the bytes from others: a hash over a sample, a store's ETag
        pa.field("sample_rate", pa.int32()),
        pa.field("num_channels", pa.int32()),
        pa.field("recording_samples", pa.int64()),  # samples of the whole recording, at sample_rate
        pa.field("start_sample", pa.int64(), nullable=False),
        pa.field("num_samples", pa.int64(), nullable=False),
        pa.field("duration_s", pa.float64(), nullable=False),
        pa.field("gain_db", pa.float64()),  # loudness normalisation, measured when the corpus was built
        pa.field("text", pa.string()),
        pa.field("speaker", pa.string()),
        pa.field("language", pa.string()),
        # rows of a source with the same pair belong together, as source and target of a translation do
        pa.field("pair", pa.string()),
        pa.field("words", _LABELS),
        pa.field("phones", _LABELS),
        pa.field("error", pa.string()),
        pa.field("error_message", pa.string()),
    ]
)

_STREAM_NAME = re.compile(r"[a-z][a-z0-9_-]{0,63}")


def stream_schema(spec: StreamSpec) -> pa.Schema:
    """One row per segment: codes or an error. One column per codebook, so that a reader takes only what it wants.

    Frames of a continuous stream are `[T, dim]` numbers, raw float16, little-endian.
    """
    code = pa.int16() if spec.codebook_size <= 32_768 else pa.int32()
    codes = pa.list_(pa.field("element", code, nullable=False))  # never null: read 1.3 times as fast
    return pa.schema(
        [
            pa.field("id", pa.string(), nullable=False),
            pa.field("shard", pa.int32(), nullable=False),
            pa.field("num_frames", pa.int32()),
            pa.field("error", pa.string()),
            pa.field("error_message", pa.string()),
            *(pa.field(name, codes) for name in code_columns(spec.num_codebooks)),
            *(pa.field(name, _MORE[name]) for name in more_columns(spec)),
        ]
    )


_MORE = {
    "frames": pa.binary(),
    "durations": pa.list_(pa.field("element", pa.int32(), nullable=False)),
    "chunk_scales": pa.list_(pa.field("element", pa.float32(), nullable=False)),
    "text": pa.string(),
}


def more_columns(spec: StreamSpec) -> list[str]:
    """The columns that a stream has beside codes."""
    has = {
        "frames": spec.dim > 0,
        "durations": spec.durations,
        "chunk_scales": spec.chunk_length > 0,
        "text": spec.text,
    }
    return [name for name, there in has.items() if there]


def code_columns(num_codebooks: int) -> list[str]:
    return [f"codes_{index:02d}" for index in range(num_codebooks)]


def require_stream_name(name: str) -> None:
    if not _STREAM_NAME.fullmatch(name) or name == "corpus":
        raise UserError(
            f"{name!r} cannot name a stream, a codebook or a view: use a small letter, then small letters, digits, _ "
            "and -."
        )


def segment_id(source: str, path: str, *, member: str, channel: str, start_sample: int, num_samples: int) -> str:
    """26 base32 characters of blake2b over what places a segment: the same tree elsewhere gives the same ids."""
    parts = (source, path, member, channel, str(start_sample), str(num_samples))
    digest = hashlib.blake2b(digest_size=17)
    for part in parts:
        encoded = part.encode()
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return base64.b32encode(digest.digest()).decode()[:26].lower()
