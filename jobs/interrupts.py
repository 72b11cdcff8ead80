"""Ctrl-C and SIGTERM: what is done is committed, the rest is dropped, and the exit status says which it was. A leaf."""

import os
import signal
import sys
import threading
from typing import NoReturn

NOTICE_S = 25.0  # clouds kill 30 s after SIGTERM


class Interrupted(BaseException):
    """Somebody wants us to end. Not KeyboardInterrupt, for which Typer has words of its own."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.status = 128 + number  # the shell's: 130 for Ctrl-C, 143 for SIGTERM

    @property
    def words(self) -> str:
        why = "Preempted (SIGTERM)" if self.status == 128 + signal.SIGTERM else "Stopped"
        return f"{why}. What was committed stays; the same command goes on from there."


def handle_interrupts() -> None:
    """Raise `Interrupted` in the main thread on SIGINT and SIGTERM; 25 s later the process ends, whatever it does."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)


def _interrupt(number: int, frame: object) -> NoReturn:
    interrupted = Interrupted(number)
    ender = threading.Timer(NOTICE_S, _end, [interrupted])
    ender.daemon = True
    ender.start()
    raise interrupted


def _end(interrupted: Interrupted) -> None:
    print(interrupted.words, file=sys.stderr, flush=True)
    os._exit(interrupted.status)
