"""One segment from near: its row of the corpus, its codes in every stream, its sound."""

import math
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..storage.codes import list_streams, open_stream, read_codes, stream_spec
from ..storage.parquet import read_parquet
from ..storage.root import Root
from ..storage.schema import CORPUS_SCHEMA
from ..storage.table import Snapshot
from ..tokenizers.spec import Sound, StreamSpec, UserError

SOUND_RATE = 16_000  # Hz
_SOUND = Sound(SOUND_RATE)
FIRST_FRAMES = 20  # codes in the facts


@dataclass(frozen=True, slots=True)
class StreamCodes:
    """What one stream has of a segment: codes `[K, T]`, or why there are none."""

    name: str
    spec: StreamSpec
    codes_KT: NDArray[np.integer] | None
    missing: str | None  # "not done yet", or the error's class and message
    frames_TD: NDArray[np.float16] | None = None  # of a continuous stream
    text: str | None = None

    def until(self, seconds: Fraction) -> "StreamCodes":
        """The frames that begin before `seconds`."""
        if self.codes_KT is None:
            return self
        if not self.spec.bits_per_second:  # without a clock
            return self
        first = math.ceil(seconds * self.spec.mean_frame_rate)
        frames_TD = None if self.frames_TD is None else self.frames_TD[:first]
        return replace(self, codes_KT=self.codes_KT[:, :first], frames_TD=frames_TD)

    def frame_edges_s(self) -> list[Fraction]:
        """Where frames begin and end, T + 1 times in seconds: frame t is `[t, t + 1) * hop_length / sample_rate`.

        In a chunked stream, where frames of two chunks overlap, they are as if spread evenly.
        """
        num_frames = 0 if self.codes_KT is None else self.codes_KT.shape[1]
        return [frame / self.spec.mean_frame_rate for frame in range(num_frames + 1)]


@dataclass(frozen=True, slots=True)
class Segment:
    """A row of the corpus, by column, and the streams."""

    row: dict[str, Any]
    streams: list[StreamCodes]


def read_segment(root: Root, corpus: Snapshot, segment: str) -> Segment:
    """The segment of this id. Raises `UserError` if the corpus has none."""
    for shard in corpus.files:
        ids = read_parquet(root, corpus.path(shard), schema=CORPUS_SCHEMA, columns=["id"])["id"].to_pylist()
        if segment not in ids:
            continue
        place = ids.index(segment)
        [row] = read_parquet(root, corpus.path(shard), schema=CORPUS_SCHEMA).slice(place, 1).to_pylist()
        return Segment(row, [_stream_codes(root, name, shard, place, segment) for name in list_streams(root)])
    raise UserError(
        f"There is no segment {segment!r} in the corpus of {root}. Ids have 26 letters and digits, as `wavemill "
        "quarantine` and the column `id` of every table show them."
    )


def describe_segment(segment: Segment) -> dict[str, Any]:
    """A segment's facts, as JSON takes them: the row, and each stream's frames and first codes."""
    return {
        "corpus": segment.row,
        "streams": [
            {
                "stream": stream.name,
                "tokenizer": stream.spec.tokenizer,
                "frame_rate": str(stream.spec.frame_rate),
                "num_codebooks": stream.spec.num_codebooks,
                "codebook_size": stream.spec.codebook_size,
                "frames": None if stream.codes_KT is None else stream.codes_KT.shape[1],
                "dim": stream.spec.dim,
                "text": stream.text,
                "first_codes": None if stream.codes_KT is None else stream.codes_KT[:, :FIRST_FRAMES].tolist(),
                "missing": stream.missing,
            }
            for stream in segment.streams
        ],
    }


def read_sound(
    root: Root, corpus: Snapshot, row: dict[str, Any], source_roots: dict[str, str], *, max_s: int
) -> NDArray[np.float32]:
    """The first `max_s` seconds of a segment's sound `[N]` at `SOUND_RATE`. Raises `UserError` if it cannot be read."""
    from .entries import AudioError
    from .reading import open_reader

    if row["error"] is not None:
        raise UserError(f"Segment {row['id']} has no sound: {row['error']} ({row['error_message']}).")
    begin = {**row, "num_samples": min(row["num_samples"], max_s * row["sample_rate"])}
    with open_reader(root, corpus.metadata, source_roots) as reader:
        [sound] = reader.read([begin], [_SOUND])
    if isinstance(sound, AudioError):
        raise UserError(f"The sound of segment {row['id']} cannot be read: {sound.kind} ({sound.message}).")
    return sound[_SOUND].numpy()


def _stream_codes(root: Root, name: str, shard: int, place: int, segment: str) -> StreamCodes:
    snapshot = open_stream(root, name)
    spec = stream_spec(snapshot)
    if shard not in snapshot.files:
        return StreamCodes(name, spec, None, "not done yet")
    codes = read_codes(root, snapshot, shard, more=True)
    if codes.ids[place : place + 1] != [segment]:
        raise UserError(f"Stream {name!r} does not hold the corpus's segments in shard {shard}; run `wavemill verify`.")
    error = codes.errors[place]
    missing = None if error is None else f"{error} ({codes.error_messages[place]})"
    frames_TD = codes.frames(place) if "frames" in codes.more else None
    text = codes.text(place) if "text" in codes.more else None
    return StreamCodes(name, spec, codes.codes(place), missing, frames_TD, text)
