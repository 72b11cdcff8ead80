"""The live line of long work: on a terminal it moves, in a pipe it is a log line every few seconds."""

import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.text import Text

_LOG_EVERY_S = 5.0


class Progress:
    """Counts segments, hours of audio and errors, and shows them with speed and time to go, on stderr."""

    def __init__(self, label: str, *, total_segments: int | None = None) -> None:
        self._label = label
        self._total = total_segments
        self._segments = 0
        self._errors = 0
        self._audio_s = 0.0
        self._started = self._logged = self._last = time.monotonic()
        console = Console(stderr=True)
        self._live = Live(console=console, transient=True, refresh_per_second=4) if console.is_terminal else None

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()
        if kind is None and self._segments and self._logged != self._last:
            print(self.line(), file=sys.stderr)

    def expect(self, total_segments: int) -> None:
        """Say how many segments there are to do."""
        self._total = total_segments
        if self._live:
            self._live.update(Text(self.line()))

    def advance(self, *, segments: int, audio_s: float, errors: int) -> None:
        """Count what has been done since the last call."""
        self._segments += segments
        self._audio_s += audio_s
        self._errors += errors
        now = self._last = time.monotonic()
        if self._live:
            self._live.update(Text(self.line()))
        elif now - self._logged >= _LOG_EVERY_S:
            self._logged = now
            print(self.line(), file=sys.stderr, flush=True)

    def line(self) -> str:
        """All figures in one line."""
        elapsed = max(self._last - self._started, 1e-9)
        done = f"{self._segments:,}" + (f"/{self._total:,}" if self._total is not None else "")
        parts = [
            f"{self._label}: {done} segments",
            f"{self._audio_s / 3600:.2f} h of audio",
            f"{self._audio_s / elapsed:,.0f} x realtime",
        ]
        if self._total is not None and 0 < self._segments < self._total:
            parts.append(f"{_clock(elapsed / self._segments * (self._total - self._segments))} to go")
        else:
            parts.append(f"{_clock(elapsed)}")
        parts.append(f"{self._errors:,} errors")
        return ", ".join(parts)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
