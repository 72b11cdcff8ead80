"""Packing of segments into sequences of one length: which tokens of which segment lie where. Pure functions.

Axes: N segments, P pieces (a piece is a run of one segment's tokens inside one sequence).
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


class PackingMethod(StrEnum):
    """How segments share sequences. None drops a token; what is left of a sequence is padding."""

    CONCATENATE = "concatenate"  # end to end, cut at the ends of sequences: no padding but at a lane's end
    BEST_FIT = "best-fit"  # whole where they fit: best fit decreasing (Ding et al. 2024, "Fewer Truncations")
    SINGLE = "single"  # each begins a sequence of its own


@dataclass(frozen=True, slots=True)
class Packed:
    """Pieces by sequence, then by place in it."""

    num_sequences: int
    segment_P: Ints
    start_P: Ints  # the piece's first token, in its segment
    size_P: Ints  # tokens
    sequence_P: Ints
    place_P: Ints  # the piece's first token, in its sequence


def pack(sizes_N: Ints, length: int, method: PackingMethod) -> Packed:
    """Segments of `sizes_N` tokens, in this order, in sequences of `length` tokens.

    Segments longer than a sequence are cut into pieces of its length and a rest. Those of no tokens have no piece.
    """
    match method:
        case PackingMethod.CONCATENATE:
            return _concatenate(sizes_N, length)
        case PackingMethod.BEST_FIT:
            return _best_fit(sizes_N, length)
        case PackingMethod.SINGLE:
            segment_P, start_P, size_P = _cut(sizes_N, length)
            return Packed(
                len(size_P), segment_P, start_P, size_P, np.arange(len(size_P)), np.zeros(len(size_P), dtype=np.int64)
            )


def _concatenate(sizes_N: Ints, length: int) -> Packed:
    ends_N = np.cumsum(sizes_N)
    total = int(ends_N[-1]) if len(ends_N) else 0
    num_sequences = -(-total // length)
    cuts = np.union1d(ends_N - sizes_N, np.arange(num_sequences, dtype=np.int64) * length)
    cuts = cuts[cuts < total]
    segment_P = np.searchsorted(ends_N, cuts, side="right")
    return Packed(
        num_sequences,
        segment_P,
        cuts - (ends_N - sizes_N)[segment_P] if len(cuts) else cuts,
        np.diff(np.append(cuts, total)) if len(cuts) else cuts,
        cuts // length,
        cuts % length,
    )


def _cut(sizes_N: Ints, length: int) -> tuple[Ints, Ints, Ints]:
    """Segment, start and size of pieces of at most `length` tokens."""
    pieces_N = -(-sizes_N // length)
    segment_P = np.repeat(np.arange(len(sizes_N)), pieces_N)
    first_N = np.cumsum(pieces_N) - pieces_N
    start_P = (np.arange(len(segment_P)) - first_N[segment_P]) * length
    return segment_P, start_P, np.minimum(sizes_N[segment_P] - start_P, length)


def _best_fit(sizes_N: Ints, length: int) -> Packed:
    """Largest pieces first, each into the sequence that it leaves the least room in; ties go to the earliest.

    Sequences stand in the order of the first segment of each, pieces in a sequence in that of their segments.
    """
    segment_P, start_P, size_P = _cut(sizes_N, length)
    bins: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # room left and sequence, ascending
    for piece in np.argsort(-size_P, kind="stable").tolist():
        size = int(size_P[piece])
        fit = bisect_left(rooms, (size, -1))
        if fit == len(rooms):
            bins.append([piece])
            room, index = length - size, len(bins) - 1
        else:
            room, index = rooms.pop(fit)
            bins[index].append(piece)
            room -= size
        if room:
            insort(rooms, (room, index))
    return _laid_out(sorted(sorted(pieces) for pieces in bins), segment_P, start_P, size_P)


def _laid_out(bins: Sequence[Sequence[int]], segment_P: Ints, start_P: Ints, size_P: Ints) -> Packed:
    order_P = np.array([piece for pieces in bins for piece in pieces], dtype=np.int64)
    counts = np.array([len(pieces) for pieces in bins], dtype=np.int64)
    sequence_P = np.repeat(np.arange(len(bins)), counts)
    size_P = size_P[order_P]
    before_P = np.cumsum(size_P) - size_P
    first = np.cumsum(counts) - counts
    place_P = before_P - before_P[first][sequence_P] if len(bins) else before_P
    return Packed(len(bins), segment_P[order_P], start_P[order_P], size_P, sequence_P, place_P)
