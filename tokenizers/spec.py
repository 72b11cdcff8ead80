"""What a stream is: its clock and its alphabet. A leaf: storage may import this file and nothing else here."""

import difflib
import math
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from enum import StrEnum
from fractions import Fraction
from typing import Any, NamedTuple


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
    ONE = "one"
    FREE = "free"


class Sound(NamedTuple):
    """What a waveform is: float32 `[N]`, or `[channels, N]` of more channels than one."""

    sample_rate: int  # Hz
    channels: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamSpec:
    """The clock and alphabet of one stream: codes `[K, T]`, K codebooks, T frames.

    A continuous stream has frames of `dim` numbers instead, K = 0. A stream without a clock (FREE: units of text, of
    merged frames) has as many frames as its content gives; `hop_length` is then that of the frames it was made of.
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
    dim: int = 0  # numbers in a frame of a continuous stream
    durations: bool = False  # each frame says for how many frames of `hop_length` it stands
    text: bool = False  # each segment has a text
    channels: int = 1  # of what encode takes and decode gives: `[N]` of one, else `[channels, N]`

    @property
    def sound(self) -> Sound:
        """What encode takes."""
        return Sound(self.sample_rate, self.channels)

    @property
    def has_clock(self) -> bool:
        """Whether the number of samples alone says how many frames there are."""
        return self.frame_rule is not FrameRule.FREE

    @property
    def frame_rate(self) -> Fraction:
        """Frames per second, exact."""
        return Fraction(self.sample_rate, self.hop_length)

    @property
    def mean_frame_rate(self) -> Fraction:
        """Frames per second of long audio, exact: of a chunked stream those of both chunks of an overlap counted."""
        if not self.chunk_length:
            return self.frame_rate
        return Fraction(_frames(self.chunk_length, self) * self.sample_rate, self.chunk_stride)

    @property
    def bits_per_second(self) -> float:
        """T x K x log2(codebook size) of long audio, before any entropy coding; of numbers 16 bits each.

        0 of a stream without a clock, or with one frame a segment.
        """
        if self.frame_rule not in (FrameRule.FLOOR, FrameRule.CEIL):
            return 0.0
        bits = 16 * self.dim if self.dim else self.num_codebooks * math.log2(self.codebook_size)
        return float(self.mean_frame_rate) * bits

    def to_json(self) -> dict[str, Any]:
        fields = asdict(self)
        return {name: value for name, value in fields.items() if value != _ADDED_LATER.get(name, _NEVER)}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "StreamSpec":
        return cls(**{**fields, "frame_rule": FrameRule(fields["frame_rule"])})


# not said where they are as they always were, so that older readers understand
_ADDED_LATER = {"dim": 0, "durations": False, "text": False, "channels": 1}
_NEVER = object()


def num_frames(num_samples: int, spec: StreamSpec) -> int:
    """Frames that `num_samples` samples at `spec.sample_rate` give, over all chunks.

    `floor` (HuBERT, Hsu et al. 2021): whole windows only. `ceil` (SoundStream, EnCodec): the last hop is padded. `one`
    (an embedding of the segment): one, of at least a window. Raises `ValueError` for `free`, where samples do not say.
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


def frames_by_chunk(total: int, spec: StreamSpec) -> list[int]:
    """`chunk_frames` of a segment that has `total` frames. Raises `ValueError` if there is none with so many.

    With a sample more no chunk has fewer frames: so all segments with as many in total have them in the same chunks.
    """
    shortest = bisect_left(range(total * spec.hop_length), total, key=lambda length: num_frames(length, spec))
    frames = chunk_frames(shortest, spec)
    if sum(frames) != total:
        raise ValueError(f"no segment has {total} frames of {spec.tokenizer}")
    return frames


def decoded_samples(num_frames: int, spec: StreamSpec) -> int:
    """Samples at `spec.decode_sample_rate` that `num_frames` frames decode to; chunks are laid over one another."""
    hop = Fraction(spec.hop_length * spec.decode_sample_rate, spec.sample_rate)
    if not spec.chunk_length:
        return max(0, int(num_frames * hop) - spec.decode_trim)
    *before, last = frames_by_chunk(num_frames, spec) or [0]
    return len(before) * spec.chunk_stride + int(last * hop)


def _frames(num_samples: int, spec: StreamSpec) -> int:
    if not spec.has_clock:
        raise ValueError(f"{spec.tokenizer} has no clock: its frames follow from its content")
    if spec.frame_rule is FrameRule.ONE:
        return int(num_samples >= spec.window_length)
    if spec.frame_rule is FrameRule.CEIL:
        return -(-num_samples // spec.hop_length)
    if num_samples < spec.window_length:
        return 0
    return (num_samples - spec.window_length) // spec.hop_length + 1
