"""Steps of an epoch for one reader: which sequences fill its batches, and where the epoch stands after each.

Axes: N sequences of a window.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import StrEnum
from itertools import count

import numpy as np
from numpy.typing import NDArray

from ..tokenizers.spec import UserError
from .layouts import Grouping
from .order import Consumer, Mixture
from .windows import LaneCodes, LaneTokens, Window, WindowReader

Source = tuple[LaneCodes | LaneTokens, int]  # a lane and a place in it


class Tail(StrEnum):
    """What becomes of the last step of an epoch, which there are too few sequences for."""

    PAD = "pad"  # filled up with rows of padding: no loss, nothing repeated
    DROP = "drop"  # left out


@dataclass(frozen=True, slots=True)
class Cursor:
    """The next sequence of a dataset: of which epoch, in which window, which of that."""

    epoch: int = 0
    window: int = 0
    offset: int = 0


@dataclass(frozen=True, slots=True)
class Step:
    """What one batch is filled with, and where each dataset stands after the step, on all ranks."""

    sources: list[Source]
    cursors: list[Cursor]
    slot: int


class Walk:
    """One dataset's windows from a cursor on, planned as far as steps need them.

    Sequences are counted from where the mixture began: the cursor's is number `first`.
    """

    def __init__(
        self,
        reader: WindowReader,
        cursor: Cursor,
        first: int,
        pool: ThreadPoolExecutor,
        takes: Callable[[NDArray[np.int64]], NDArray[np.bool_]],
    ) -> None:
        self._reader = reader
        self._epoch = cursor.epoch
        self._next_window = cursor.window
        self._skipped = cursor.offset  # of the first window
        self._first = first
        self._pool = pool
        self._takes = takes
        self._windows: deque[tuple[int, int, Window]] = deque()  # index, number of the first sequence
        self.known = first  # sequences before this number are planned
        self.ended = False

    def plan_through(self, number: int) -> None:
        """Plan until sequence `number` is known, and one window more."""
        while not self.ended and (self.known <= number or self._windows[-1][1] <= number):
            self._plan()

    def _plan(self) -> None:
        if self._next_window >= self._reader.num_windows(self._epoch):
            self.ended = True
            return
        window = self._reader.window(self._epoch, self._next_window)
        begin = self.known - self._skipped
        numbers_N = np.arange(begin, begin + len(window))
        wanted_N = numbers_N >= self._first
        wanted_N[wanted_N] = self._takes(numbers_N[wanted_N])
        window.request(wanted_N, self._pool)
        self._windows.append((self._next_window, begin, window))
        self.known = max(self.known, begin + len(window))
        self._skipped = 0
        self._next_window += 1

    def source(self, number: int) -> Source:
        """The lane and place of a planned sequence that this reader takes."""
        _, begin, window = next(entry for entry in self._windows if number < entry[1] + len(entry[2]))
        return window.sequence(number - begin)

    def cursor(self, number: int) -> Cursor:
        """Where the dataset stands before sequence `number`, which is planned or the end of what is."""
        for index, begin, window in self._windows:
            if number < begin + len(window):
                return Cursor(self._epoch, index, number - begin)
        return Cursor(self._epoch, self._next_window, 0)

    def forget(self, number: int) -> None:
        """Let go of windows that lie wholly before sequence `number`."""
        while self._windows and self._windows[0][1] + len(self._windows[0][2]) <= number:
            self._windows.popleft()


def steps(
    readers: Sequence[WindowReader],
    cursors: Sequence[Cursor],
    slot: int,
    *,
    mixture: Mixture,
    consumer: Consumer,
    batch_size: int,
    tail: Tail,
    pool: ThreadPoolExecutor,
) -> Iterator[Step]:
    """The steps of one reader from a state on, to the end of the epoch: that of the dataset that ends first."""

    def takes(part: int) -> Callable[[NDArray[np.int64]], NDArray[np.bool_]]:
        return lambda numbers: consumer.takes(mixture.slots(part, numbers) - slot, batch_size)

    walks = [
        Walk(reader, cursor, mixture.taken(part, slot), pool, takes(part))
        for part, (reader, cursor) in enumerate(zip(readers, cursors, strict=True))
    ]
    width = batch_size * consumer.num_ranks
    for step in count():
        begin, end = slot + step * width, slot + (step + 1) * width
        for part, walk in enumerate(walks):  # the step after this one, too: is this the last?
            walk.plan_through(mixture.taken(part, end + width))
        ends = [int(mixture.slots(part, np.array([walk.known]))[0]) for part, walk in enumerate(walks) if walk.ended]
        limit = min(ends, default=end + width)
        if step == 0:
            of_ended = [reader.grouping for reader, walk in zip(readers, walks, strict=True) if walk.ended]
            grouping = of_ended[ends.index(limit)] if limit in ends else None
            _require_enough(limit - begin, batch_size, consumer.num_ranks, tail, grouping, fresh=slot == 0)
        if limit <= begin or (limit < end and tail is Tail.DROP):
            return
        ended = limit <= end or (limit < end + width and tail is Tail.DROP)
        if step >= consumer.first_step and (step - consumer.first_step) % consumer.num_workers == 0:
            first = begin + consumer.rank * batch_size
            own = [mixture.source(place) for place in range(first, min(first + batch_size, limit))]
            yield Step(
                [walks[part].source(number) for part, number in own],
                [
                    Cursor(cursors[part].epoch + 1) if ended else walk.cursor(mixture.taken(part, end))
                    for part, walk in enumerate(walks)
                ],
                0 if ended else end,
            )
        for part, walk in enumerate(walks):
            walk.forget(mixture.taken(part, end))


def _require_enough(
    there: int, batch_size: int, num_ranks: int, tail: Tail, grouping: Grouping | None, *, fresh: bool
) -> None:
    """Raise `UserError` for an epoch that would be empty, or nothing but padding on some ranks."""
    if not fresh:
        return
    if there <= 0 and grouping is not None:
        raise UserError(
            f"The epoch is empty: nowhere in one shard are {grouping.num_members} segments that belong together by "
            f"{grouping.by.value!r}, without errors and chosen by the filter. `count_groups()` says what there is."
        )
    if there <= 0:
        raise UserError(
            "The epoch is empty: no segment is left of the dataset. Loosen the filter, or see with `wavemill inspect` "
            "how many segments have an error."
        )
    needed = batch_size * num_ranks if tail is Tail.DROP else batch_size * (num_ranks - 1) + 1
    if there < needed:
        other = ", or tail='pad'" if tail is Tail.DROP else ""
        raise UserError(
            f"The epoch has {there} sequence(s), but {num_ranks} rank(s) with batches of {batch_size} need {needed} "
            f"for one step: take smaller batches or fewer ranks{other}."
        )
