"""The ladder of lengths that segments are padded to on a GPU, and the batches they make: pure functions of integers.

Lengths here are units of 10 ms, which are whole samples at every rate that a tokenizer has.
"""

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .tokenizer import Mode

VERSION = "1"  # changes with anything that changes a rung or a batch size: in `fast` mode these decide the codes
UNITS_PER_S = 100
_STEPS_PER_OCTAVE = 20  # more: less padding, but more rungs for which segments have to be waited for
_TOP, _BOTTOM = 3_000, 25

# Seconds of padded audio in a batch. `exact` computes in float32, where as many as fit do no harm. In `fast` each rung
# has dummies in its last batch, so that large batches cost what they gain (infra/bench/padding.py).
BATCH_SECONDS = {Mode.EXACT: 256.0, Mode.FAST: 72.0}


def _ladder() -> tuple[int, ...]:
    rungs, step = {_TOP}, 0
    while min(rungs) > _BOTTOM:
        step += 1
        rungs.add(max(_BOTTOM, round(_TOP * 2 ** (-step / _STEPS_PER_OCTAVE))))
    return tuple(sorted(rungs))


RUNGS = _ladder()  # 0.25 s ... 7.5 s ... 15 s ... 30 s, each 3.5 % longer than the last, to 10 ms


def rung_of(num_samples: int, sample_rate: int) -> int | None:
    """The rung that a segment is padded to, a function of it alone; None if it is longer than the top, 30 s."""
    units = -(-num_samples * UNITS_PER_S // sample_rate)
    place = bisect_left(RUNGS, units)
    return RUNGS[place] if place < len(RUNGS) else None


def padded_length(rung: int, sample_rate: int) -> int:
    """Samples of a rung; a segment resampled to any rate is no longer than its rung there."""
    return -(-rung * sample_rate // UNITS_PER_S)


def batch_size(rung: int, budget: int) -> int:
    """Segments of a full batch: the largest power of two that keeps to `budget` units of padded audio, or 1."""
    return 1 << (max(1, budget // rung).bit_length() - 1)


def next_size(num_waiting: int, rung: int, budget: int, mode: Mode) -> int:
    """Size of the next batch of segments of one rung.

    `exact`: a full one, or the next smaller power of two (13 of 16: 8, then 4, then 1). `fast`: always a full one,
    filled with dummies where segments are wanting, for its results depend on the shape.
    """
    full = batch_size(rung, budget)
    return full if mode is Mode.FAST else min(full, 1 << (num_waiting.bit_length() - 1))


@dataclass(frozen=True, slots=True)
class Batch:
    """Segments that are encoded together."""

    rung: int
    members: tuple[int, ...]  # places among the segments that were planned
    size: int  # with dummies


def batches(rungs: Sequence[int], budget: int, mode: Mode) -> list[Batch]:
    """All segments in batches, rung by rung from the shortest, in the order given."""
    members: dict[int, list[int]] = {}
    for place, length in enumerate(rungs):
        members.setdefault(length, []).append(place)
    planned = []
    for length, waiting in sorted(members.items()):
        done = 0
        while done < len(waiting):
            size = next_size(len(waiting) - done, length, budget, mode)
            planned.append(Batch(length, tuple(waiting[done : done + size]), size))
            done += size
    return planned


def useful_share(durations_s: Iterable[float], planned: Iterable[Batch]) -> float:
    """The share of what is encoded that is segments; the rest is padding and dummies."""
    return sum(durations_s) * UNITS_PER_S / sum(batch.rung * batch.size for batch in planned)
