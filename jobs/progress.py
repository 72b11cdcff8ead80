"""The live line of long work: on a terminal it moves, in a pipe it is a log line every few seconds."""

import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.text import Text

_LOG_EVERY_S = 5.0


class LiveLine:
    """A line on stderr: on a terminal it moves, in a pipe it is printed every few seconds."""

    def __init__(self) -> None:
        self._logged = time.monotonic()
        self._said = ""
        console = Console(stderr=True)
        self._live = Live(console=console, transient=True, refresh_per_second=4) if console.is_terminal else None

    def start(self) -> None:
        if self._live:
            self._live.start()

    def show(self, line: str, *, at_s: float | None = None) -> None:
        """Put the line there; a log has it if the last one is old enough at this time of `time.monotonic`."""
        if self._live:
            self._live.update(Text(line))
        elif at_s is not None and at_s - self._logged >= _LOG_EVERY_S:
            self._logged, self._said = at_s, line
            print(line, file=sys.stderr, flush=True)

    def stop(self, last: str = "") -> None:
        """Take the line away; the last one stays, if it has not been said."""
        if self._live:
            self._live.stop()
        if last and last != self._said:
            print(last, file=sys.stderr)


class Progress:
    """Counts segments, hours of audio and errors, and shows them with speed and time to go, on stderr."""

    def __init__(self, label: str, *, total_segments: int | None = None) -> None:
        self._label = label
        self._total = total_segments
        self._segments = 0
        self._errors = 0
        self._audio_s = 0.0
        self._started = self._last = time.monotonic()
        self._live = LiveLine()

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop(self.line() if kind is None and self._segments else "")

    def expect(self, total_segments: int) -> None:
        """Say how many segments there are to do."""
        self._total = total_segments
        self._live.show(self.line())

    def advance(self, *, segments: int, audio_s: float, errors: int) -> None:
        """Count what has been done since the last call."""
        self._segments += segments
        self._audio_s += audio_s
        self._errors += errors
        self._last = time.monotonic()
        self._live.show(self.line(), at_s=self._last)

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
            parts.append(f"{clock(elapsed / self._segments * (self._total - self._segments))} to go")
        else:
            parts.append(f"{clock(elapsed)}")
        parts.append(f"{self._errors:,} errors")
        return ", ".join(parts)


def clock(seconds: float) -> str:
    """Seconds as minutes and hours: 1:05, 2:00:00."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
