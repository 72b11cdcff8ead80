"""Small recordings in object stores, fetched while others are decoded, in bounded memory."""

import threading
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

from .recordings import Fetched, Place, fetch_to_end

FETCH_AHEAD_BYTES = 256 << 20
_MAX_THREADS = 8


class FetchAhead:
    """Fetches recordings, by number, in the order of their numbers, until it is closed.

    What is being fetched, or was and is not released yet, stays under the budget. Only what somebody waits for is
    fetched beyond it. For any number of threads.
    """

    def __init__(
        self, places: Mapping[int, Place], *, budget_bytes: int = FETCH_AHEAD_BYTES, num_threads: int = _MAX_THREADS
    ) -> None:
        self._places = places
        self._waiting = deque(sorted(places))
        self._begun: dict[int, Future[Fetched]] = {}
        self._free_bytes = budget_bytes
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="fetch")
        with self._lock:
            self._begin_more()

    def fetch(self, number: int) -> Callable[[], Fetched] | None:
        """What waits for a recording and gives it, or raises what `fetch_to_end` does; None if it is not ours."""
        if number not in self._places:
            return None
        with self._lock:
            if number not in self._begun:
                self._waiting.remove(number)
                self._begin(number)
            return self._begun[number].result

    def release(self, number: int) -> None:
        """Say that a recording is done with."""
        with self._lock:
            if self._begun.pop(number, None) is not None:
                self._free_bytes += self._size(number)
                self._begin_more()

    def close(self) -> None:
        with self._lock:
            self._waiting.clear()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _begin_more(self) -> None:
        while self._waiting and self._size(self._waiting[0]) <= self._free_bytes:
            self._begin(self._waiting.popleft())

    def _begin(self, number: int) -> None:
        self._free_bytes -= self._size(number)
        self._begun[number] = self._pool.submit(fetch_to_end, self._places[number])

    def _size(self, number: int) -> int:
        return self._places[number].size_bytes or 0
