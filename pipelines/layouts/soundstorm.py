"""Semantic tokens and all codebooks side by side: what parallel decoding of acoustic tokens is trained on."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction

from ...tokenizers.spec import StreamSpec
from .clock import max_frames, rate_on_clock
from .grid import GridPlan, side_by_side
from .vocabulary import require_distinct


@dataclass(frozen=True, slots=True)
class soundstorm:
    """A step per acoustic frame: its semantic tokens, then its codes, one column for each codebook.

    SoundStorm (Borsos et al. 2023): semantic tokens condition, codes are predicted codebook by codebook under masks,
    which are the training's (masks.py): each column of codes has a `<mask>`. A semantic stream slower than the acoustic
    one is repeated, as in the paper (25 and 50 Hz); a faster one has as many columns as frames of it can begin within
    an acoustic frame (HuBERT's 50 Hz beside Mimi's 12.5 Hz: four). `<pad>` stands where one of the two is over before
    the other: the last semantic token is repeated no further than its frame.
    """

    semantic: str
    acoustic: str
    codebooks: int | None = None  # of the acoustic stream; None: all that are read

    @property
    def streams(self) -> Mapping[str, int | None]:
        return {self.semantic: 1, self.acoustic: self.codebooks}

    def plan(self, specs: Mapping[str, StreamSpec]) -> GridPlan:
        require_distinct("soundstorm", self.semantic, self.acoustic)
        (semantic,) = side_by_side("soundstorm", self.semantic, specs, 1)
        codes = side_by_side("soundstorm", self.acoustic, specs, self.codebooks)
        rate = rate_on_clock("soundstorm", specs, self.semantic, self.acoustic)
        conditions = [replace(semantic, part=part) for part in range(max_frames(rate))]
        rates = {self.semantic: rate, self.acoustic: Fraction(1)}
        return GridPlan.of([*conditions, *codes], rates, specs, masked=[self.acoustic])
