"""Decoding ahead: threads that turn rows into waveforms while others are encoded, in bounded memory.

Where the recordings lie in a store, small ones are fetched before that.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from queue import SimpleQueue
from typing import Any

from ..tokenizers.spec import Sound
from .entries import AudioError
from .fetching import FETCH_AHEAD_BYTES, FetchAhead
from .reading import Reader, Row, Waveforms
from .recordings import Fetched
from .resample import resampled_length


class DecodeAhead:
    """Iterates `(index, waveforms or error)` over the rows without an error, decoded ahead in bounded memory.

    A thread per reader takes whole recordings; what they have decoded and nobody has taken yet stays under the budget,
    one segment always being allowed. The order of results is not the order of rows.
    """

    def __init__(
        self,
        rows: list[Row],
        sounds: set[Sound],
        readers: Sequence[Reader],
        ahead_bytes: int,
        *,
        fetch_ahead_bytes: int = FETCH_AHEAD_BYTES,
    ) -> None:
        self.decode_s = 0.0
        self._sounds = sounds
        self._readers = readers
        self._ahead_bytes = ahead_bytes
        self._fetch_ahead_bytes = fetch_ahead_bytes
        good = [(index, row) for index, row in enumerate(rows) if row["error"] is None]
        groups = [list(group) for _, group in groupby(good, key=lambda pair: _pass_key(pair[1]))]
        self._groups = deque(enumerate(groups))
        places = {number: readers[0].place(group[0][1]) for number, group in self._groups}
        self._to_fetch = {number: place for number, place in places.items() if place.is_object and place.is_small}
        self._num_rows = len(good)
        self._ready: SimpleQueue[tuple[int, Any]] = SimpleQueue()
        self._room = threading.Condition()
        self._held_bytes = 0
        self._stopped = False

    def __iter__(self) -> Iterator[tuple[int, Waveforms | AudioError]]:
        fetching = FetchAhead(self._to_fetch, budget_bytes=self._fetch_ahead_bytes)
        threads = [
            threading.Thread(target=self._decode, args=[reader, fetching], daemon=True) for reader in self._readers
        ]
        for thread in threads:
            thread.start()
        try:
            for _ in range(self._num_rows):
                index, result = self._ready.get()
                if isinstance(result, BaseException) and not isinstance(result, AudioError):
                    raise result
                yield index, result
                if not isinstance(result, AudioError):
                    self._release(result)
        finally:
            with self._room:
                self._stopped = True
                self._room.notify_all()
            fetching.close()
            for thread in threads:
                thread.join()

    def _decode(self, reader: Reader, fetching: FetchAhead) -> None:
        try:
            while not self._stopped:
                try:
                    number, group = self._groups.popleft()
                except IndexError:
                    return
                self._decode_group(reader, group, fetching.fetch(number))
                fetching.release(number)
        except BaseException as error:  # noqa: BLE001 - carried to the thread that waits, and raised there
            self._ready.put((-1, error))

    def _decode_group(
        self, reader: Reader, group: list[tuple[int, Row]], fetched: Callable[[], Fetched] | None
    ) -> None:
        results = reader.read([row for _, row in group], self._sounds, fetched)
        for index, row in group:
            size = sum(
                4 * channels * resampled_length(row["num_samples"], row["sample_rate"], rate)
                for rate, channels in self._sounds
            )
            if not self._reserve(size):
                results.close()
                return
            started = time.perf_counter()
            result = next(results)
            elapsed = time.perf_counter() - started
            with self._room:
                self.decode_s += elapsed
                if isinstance(result, AudioError):
                    self._held_bytes -= size
                    self._room.notify_all()
            self._ready.put((index, result))

    def _reserve(self, size: int) -> bool:
        with self._room:
            while self._held_bytes and self._held_bytes + size > self._ahead_bytes and not self._stopped:
                self._room.wait()
            self._held_bytes += size
            return not self._stopped

    def _release(self, waveforms: Waveforms) -> None:
        with self._room:
            self._held_bytes -= sum(4 * waveform.numel() for waveform in waveforms.values())
            self._room.notify_all()


def _pass_key(row: Row) -> tuple[str, ...]:
    """Rows of one key are read by one thread: those of a recording, or of a container that has to be read in order."""
    if row["member"] and row["member_offset"] is None:
        return (row["source"], row["path"])
    return (row["source"], row["path"], row["member"])
