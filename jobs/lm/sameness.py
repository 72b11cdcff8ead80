"""How codes that were generated compare with those of held-out recordings: entropy, and how long they repeat.

Axes: T frames, C codes of a codebook.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import cast

import numpy as np
from numpy.typing import NDArray

from ...storage.batches import TokenBatch
from ...storage.dataset import TokenDataset
from .settings import Record

_PIECES = 32  # of held-out recordings that figures are made of, at most
_LONGEST = 3_000  # frames of a piece, at most: repeats are looked for in time that grows with their square


@dataclass(frozen=True, slots=True, kw_only=True)
class Sameness:
    """Figures of the generated codes of one codebook, and of held-out pieces of as many frames each.

    Entropy is that of how often each code is there. Of few frames it is less than of many, so pieces are as long as
    what was generated: each of one recording, or where none is as long of those after it, too.
    """

    stream: str
    codebook: int
    frames: int
    bits: float
    held_out_bits: float | None  # the mean over pieces; None: all that is held out is shorter
    held_out_bits_of_all: float
    repeat: int  # frames of the longest span that comes again behind itself: in a loop half of all
    held_out_repeat: int | None  # the longest of any piece


def compare(record: Record, root: str, stream: str, books: Sequence[Sequence[int]]) -> list[Sameness]:
    """Figures of each codebook of what was generated of a stream, beside those of a run's held-out recordings."""
    if not books or not books[0]:
        return []
    held_out, found = list(_held_out(record, root, stream, len(books))), []
    for number, book in enumerate(books):
        codes_T = np.array(book[:_LONGEST])
        recordings = [codes_KT[number] for codes_KT in held_out]
        every = np.concatenate([np.zeros(0, dtype=np.int64), *recordings])
        pieces = _pieces(recordings, len(codes_T)) or _pieces([every], len(codes_T))
        found.append(
            Sameness(
                stream=stream,
                codebook=number,
                frames=len(book),
                bits=entropy_bits(codes_T),
                held_out_bits=float(np.mean([entropy_bits(piece) for piece in pieces])) if pieces else None,
                held_out_bits_of_all=entropy_bits(every),
                repeat=longest_repeat(codes_T),
                held_out_repeat=max(map(longest_repeat, pieces)) if pieces else None,
            )
        )
    return found


def entropy_bits(codes_T: NDArray[np.integer]) -> float:
    """Of how often each code is there; 0 of none."""
    _, counts_C = np.unique(codes_T, return_counts=True)
    shares_C = counts_C / max(1, len(codes_T))
    return float(abs(-(shares_C * np.log2(shares_C)).sum()))


def longest_repeat(codes_T: NDArray[np.integer]) -> int:
    """Frames of the longest span that is there once more behind its end."""
    num, longest = len(codes_T), 0
    alike = np.zeros(num + 1, dtype=np.int64)  # of the frame before and each other one: how long they end alike
    places = np.arange(1, num + 1)
    for end in range(num):
        alike[1:] = np.where(codes_T == codes_T[end], alike[:-1] + 1, 0)
        apart = places - 1 - end  # spans that end here and there may be no longer, or they would overlap
        behind = np.minimum(alike[1:], apart)[end + 1 :]
        longest = max(longest, int(behind.max(initial=0)))
    return longest


def _held_out(record: Record, root: str, stream: str, num_codebooks: int) -> Iterator[NDArray[np.int64]]:
    """Codes `[K, T]` of the recordings that the run was not trained on."""
    versions = {name: record.versions[name] for name in (stream, "corpus")}
    dataset = TokenDataset(
        root,
        {stream: num_codebooks},
        where=record.split.held_out,
        versions=versions,
        shuffle=False,
        rank=0,
        world_size=1,
    )
    for batch in dataset:
        batch = cast(TokenBatch, batch)
        for codes_KT, num in zip(batch.codes[stream], batch.num_frames[stream].tolist(), strict=True):
            if num:
                yield codes_KT[:, :num].numpy()


def _pieces(every: Sequence[NDArray[np.int64]], length: int) -> list[NDArray[np.int64]]:
    """Pieces of so many frames, one after the other; not more than are needed."""
    cut = (
        codes_T[begin : begin + length]
        for codes_T in every
        for begin in range(0, len(codes_T) - length + 1, max(1, length))
    )
    return list(islice(cut, _PIECES))
