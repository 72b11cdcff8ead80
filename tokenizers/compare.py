"""Compares two encodings of the same samples: what differs, and whether a near-tie excuses it."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from .tokenizer import Tokenizer

NEAR_TIE = 1e-5  # relative gap of float64 distances; below it float32 may let a code fall either way


@dataclass(frozen=True, slots=True)
class Comparison:
    """How two encodings differ. Frames count once, by their first differing stage: later ones follow from it."""

    num_codes: int = 0
    num_different: int = 0  # codes
    near_ties: int = 0  # frames whose first differing stage has two centroids as good as equally near
    mismatches: int = 0  # frames whose first differing stage has not

    def __add__(self, other: "Comparison") -> "Comparison":
        return Comparison(
            self.num_codes + other.num_codes,
            self.num_different + other.num_different,
            self.near_ties + other.near_ties,
            self.mismatches + other.mismatches,
        )

    @property
    def miss_rate(self) -> float:
        """Share of codes that differ, near-ties and what follows from them included."""
        return self.num_different / self.num_codes if self.num_codes else 0.0


def compare_codes(tokenizer: Tokenizer, waveform_N: Tensor, ours_KT: Tensor, theirs_KT: Tensor) -> Comparison:
    """Compare codes `[K, T]` of one waveform; `ours_KT` are the tokenizer's own. Another shape is all mismatch."""
    num_codes = ours_KT.numel()
    if ours_KT.shape != theirs_KT.shape:
        frames = max(ours_KT.shape[1], theirs_KT.shape[1], 1)
        return Comparison(num_codes, max(num_codes, theirs_KT.numel(), 1), 0, frames)
    different_KT = ours_KT != theirs_KT
    if not different_KT.any():
        return Comparison(num_codes)
    with torch.inference_mode():
        gaps_KT = tokenizer.gaps(waveform_N).cpu()
    frames_F = different_KT.any(dim=0).nonzero()[:, 0]
    first_F = different_KT[:, frames_F].int().argmax(dim=0)
    near_ties = int((gaps_KT[first_F, frames_F] < NEAR_TIE).sum())
    return Comparison(num_codes, int(different_KT.sum()), near_ties, len(frames_F) - near_ties)


def compare_all(
    tokenizer: Tokenizer, waveforms: Iterable[Tensor], ours: Iterable[Tensor], theirs: Iterable[Tensor]
) -> Comparison:
    """`compare_codes` over several waveforms, added up."""
    found = Comparison()
    for waveform_N, ours_KT, theirs_KT in zip(waveforms, ours, theirs, strict=True):
        found += compare_codes(tokenizer, waveform_N, ours_KT, theirs_KT)
    return found
