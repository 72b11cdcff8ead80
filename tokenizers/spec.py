"""What a stream is: its clock and its alphabet. A leaf: storage may import this file and nothing else here."""

import difflib
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
    """The clock and alphabet of one stream: codes `[K, T]`, K codebooks, T frames."""

    tokenizer: str  # the name in the registry
    sample_rate: int  # Hz, what encode takes
    decode_sample_rate: int  # Hz, what decode gives; 0 if there is no decoder
    hop_length: int  # input samples per frame
    window_length: int  # input samples the first frame sees
    frame_rule: FrameRule
    num_codebooks: int  # K
    codebook_size: int  # codes lie in [0, codebook_size)

    @property
    def frame_rate(self) -> Fraction:
        """Frames per second, exact."""
        return Fraction(self.sample_rate, self.hop_length)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "StreamSpec":
        return cls(**{**fields, "frame_rule": FrameRule(fields["frame_rule"])})


def num_frames(num_samples: int, spec: StreamSpec) -> int:
    """Frames that `num_samples` samples at `spec.sample_rate` give.

    `floor` (HuBERT, Hsu et al. 2021): whole windows only. `ceil` (SoundStream, EnCodec): the last hop is padded.
    """
    if spec.frame_rule is FrameRule.CEIL:
        return -(-num_samples // spec.hop_length)
    if num_samples < spec.window_length:
        return 0
    return (num_samples - spec.window_length) // spec.hop_length + 1
