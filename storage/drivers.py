"""One driver at a time where a store lets two create one object: there, commits alone cannot keep two apart.

Table commits rest on conditional creation (put if absent). Most stores do it atomically; in some (OpenStack Swift) of
several who create one object at once more than one may be told that they did. There, each driver writes an object of
its own now and then, and one that sees another alive does not begin.
"""

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress

from ..tokenizers.spec import RunFailed
from .root import Root
from .stores import StoreTrouble, creation_is_known_atomic

RACERS = 8
_ROUNDS = 5  # Swift lets two win in three of four
_DRIVERS = "tmp/drivers"
_BEAT_S = 4.0
_SILENT_S = 5 * _BEAT_S  # a driver that has not written for so long has ended

_Beats = dict[str, tuple[str, int]]  # by a driver's name: who it is, how often it has written


class DriverRefused(RunFailed):
    """Another driver writes to this table, in a store that cannot keep the two apart."""


def race_creation(root: Root, *, rounds: int = _ROUNDS) -> int:
    """How many of `RACERS` who created one object at once were told that they did, at worst: 1 in a sound store."""
    worst = 1
    for _ in range(rounds):
        relative = f"tmp/race-{uuid.uuid4().hex}"
        barrier = threading.Barrier(RACERS)

        def create(racer: int, relative: str = relative, barrier: threading.Barrier = barrier) -> bool:
            barrier.wait()
            return root.create(relative, bytes([racer]))

        with ThreadPoolExecutor(RACERS) as pool:
            worst = max(worst, sum(pool.map(create, range(RACERS))))
        root.remove(relative)
    return worst


class SoleDriver(AbstractContextManager["SoleDriver"]):
    """Holds others off these tables' folders where the store cannot; does nothing on disks and in sound stores.

    Raises `DriverRefused` where another driver is alive; if two begin at the same moment, both may be refused. One that
    was killed is waited for until it counts as gone, 20 s.
    """

    def __init__(self, root: Root, folders: Sequence[str], *, on_warning: Callable[[str], None]) -> None:
        self._root = root
        self._folders = list(folders)
        self._on_warning = on_warning
        self._name = f"{uuid.uuid4().hex}.json"
        self._beats = 0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "SoleDriver":
        root = self._root
        if root.is_local or creation_is_known_atomic(root.uri):
            return self
        winners = race_creation(root)
        if winners == 1:
            return self
        fault = f"conditional creation is not atomic there (of {RACERS} who created one object at once, {winners} won)"
        self._on_warning(
            f"Warning: {root} lies in a store that cannot keep two runs apart: {fault}. This run goes on alone; "
            "another that begins meanwhile is refused."
        )
        self._beat()
        self._thread = threading.Thread(target=self._keep_beating, daemon=True)
        self._thread.start()
        try:
            self._require_alone(fault)
        except BaseException:
            self._leave()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        if self._thread is not None:
            self._leave()

    def _require_alone(self, fault: str) -> None:
        silent = self._others()
        until = time.monotonic() + _SILENT_S
        while silent and time.monotonic() < until:
            time.sleep(_BEAT_S / 4)
            for name, (who, beats) in self._others().items():
                if silent.get(name) != (who, beats):
                    raise DriverRefused(
                        f"Another run ({who}) writes to {', '.join(self._folders)} in {self._root}, and the store "
                        f"cannot keep two apart: {fault}. Nothing was changed. Run the command again when that run has "
                        "ended."
                    )
        for name in silent:
            with suppress(FileNotFoundError):
                self._root.remove(f"{_DRIVERS}/{name}")

    def _others(self) -> _Beats:
        found: _Beats = {}
        for name in self._root.list(_DRIVERS):
            with suppress(FileNotFoundError, ValueError, KeyError, TypeError):
                said = json.loads(self._root.read_bytes(f"{_DRIVERS}/{name}"))
                if name != self._name and set(said["folders"]) & set(self._folders):
                    found[name] = said["who"], said["beats"]
        return found

    def _keep_beating(self) -> None:
        while not self._stop.wait(_BEAT_S):
            with suppress(StoreTrouble):  # commits will tell, if it stays
                self._beat()

    def _beat(self) -> None:
        self._beats += 1
        said = {"who": f"{socket.gethostname()}, process {os.getpid()}", "folders": self._folders, "beats": self._beats}
        self._root.write_bytes(f"{_DRIVERS}/{self._name}", json.dumps(said).encode())

    def _leave(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        with suppress(FileNotFoundError, StoreTrouble):
            self._root.remove(f"{_DRIVERS}/{self._name}")
