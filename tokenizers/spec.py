"""What a stream is: its clock and its alphabet. A leaf: storage may import this file and nothing else here."""

import difflib
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from enum import StrEnum
from fractions import Fraction
from typing import Any


class UserError(Exception):
    """A mistake or a condition that the person can mend: one clear sentence, no traceback."""


class RunFailed(Exception):
    """A job that could not finish, through no mistake of the person's: what is done stays done, and why is said."""


def did_you_mean(name: str, there: Iterable[str]) -> str:
    """` Did you mean 'acoustic'?`, or nothing if no name that is there is like the one that was given."""
    near = difflib.get_close_matches(name, list(there), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


class FrameRule(StrEnum):
    """How many frames n samples give; see `num_frames`."""

    FLOOR = "floor"
    CEIL = "ceil"


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamSpec:
    """The clock and alphabet of one stream: codes `[K, T]`, K codebooks, T frames.

    A stream is chunked where its tokenizer encodes overlapping chunks, each for itself (EnCodec 48 kHz: 1 s every
    0.99 s): frames of two chunks then stand for the same samples, and its clock is `chunk_frames`, not a rate.
    """

    tokenizer: str  # the name in the registry
    sample_rate: int  # Hz, what encode takes
    decode_sample_rate: int  # Hz, what decode gives; 0 if there is no decoder
    hop_length: int  # input samples per frame
    window_length: int  # input samples the first frame sees
    frame_rule: FrameRule
    num_codebooks: int  # K
    codebook_size: int  # codes lie in [0, codebook_size)
    decode_trim: int = 0  # samples that decode gives less than whole hops: DAC with odd strides
    chunk_length: int = 0  # samples of a chunk; 0 if the stream is not chunked
    chunk_stride: int = 0  # samples from chunk to chunk

    @property
    def frame_rate(self) -> Fraction:
        """Frames per second, exact."""
        return Fraction(self.sample_rate, self.hop_length)

    @property
    def bits_per_second(self) -> float:
        """T x K x log2(codebook size), before any entropy coding."""
        return float(self.frame_rate) * self.num_codebooks * math.log2(self.codebook_size)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "StreamSpec":
        return cls(**{**fields, "frame_rule": FrameRule(fields["frame_rule"])})


def num_frames(num_samples: int, spec: StreamSpec) -> int:
    """Frames that `num_samples` samples at `spec.sample_rate` give, over all chunks.

    `floor` (HuBERT, Hsu et al. 2021): whole windows only. `ceil` (SoundStream, EnCodec): the last hop is padded.
    """
    return sum(chunk_frames(num_samples, spec))


def chunk_frames(num_samples: int, spec: StreamSpec) -> list[int]:
    """Frames of each chunk, in order; of a stream that is not chunked, all of them as one.

    A chunk begins at each whole `chunk_stride` within the samples and ends at `chunk_length` or with them
    (transformers' EncodecModel.encode; Defossez et al. 2022, section 3.4).
    """
    if not spec.chunk_length:
        return [_frames(num_samples, spec)]
    starts = range(0, num_samples, spec.chunk_stride)
    return [_frames(min(spec.chunk_length, num_samples - start), spec) for start in starts]


def decoded_samples(num_frames: int, spec: StreamSpec) -> int:
    """Samples at `spec.decode_sample_rate` that `num_frames` frames of a stream that is not chunked decode to."""
    hop = Fraction(spec.hop_length * spec.decode_sample_rate, spec.sample_rate)
    return max(0, int(num_frames * hop) - spec.decode_trim)


def _frames(num_samples: int, spec: StreamSpec) -> int:
    if spec.frame_rule is FrameRule.CEIL:
        return -(-num_samples // spec.hop_length)
    if num_samples < spec.window_length:
        return 0
    return (num_samples - spec.window_length) // spec.hop_length + 1
