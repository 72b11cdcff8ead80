"""What all processes of a run open, connect to and start: told by Python's audit hooks and, where it can, by strace."""

import ast
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[2]

# imported by every Python that is started with its folder on PYTHONPATH. A FIFO: decoders may write no files
_HOOK = """
import os, sys
_events = os.open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "events"), os.O_WRONLY | os.O_CLOEXEC)
_PLACES = {places}

def _note(event, arguments):
    if event == "open" and isinstance(arguments[0], (str, bytes)):
        told = os.path.realpath(os.fsdecode(arguments[0]))
    elif event in _PLACES:
        told = arguments[_PLACES[event]]
    elif event == "pickle.find_class":
        told = ".".join(map(str, arguments))
    else:
        return
    told = told if isinstance(told, (str, bytes)) else repr(told)
    os.write(_events, repr((event, told[:900])).encode("ascii", "backslashreplace") + b"\\n")

sys.addaudithook(_note)
"""


_PLACES = {"socket.connect": 1, "socket.sendto": 1, "socket.getaddrinfo": 0, "urllib.Request": 0}
_PLACES |= {"os.system": 0, "subprocess.Popen": 1, "os.exec": 1, "os.posix_spawn": 1}
_hooks: list[Any] = []


@dataclass(frozen=True, slots=True)
class Event:
    """Something that a process asked the system for."""

    kind: str  # as Python's audit hooks have it
    what: str  # a path with all links followed, an address, a command


class Audit:
    """Notes what every Python process asks for that has `env` in its environment, and whoever it starts."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        (folder / "sitecustomize.py").write_text(_HOOK.format(places=_PLACES))
        os.mkfifo(folder / "events")
        self.env = {"PYTHONPATH": str(folder)}
        self._fd = os.open(folder / "events", os.O_RDWR | os.O_CLOEXEC)
        self._events: list[Event] = []
        self._seen = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def events(self) -> list[Event]:
        """What was asked for since the last call."""
        self._seen.clear()
        os.write(self._fd, b"('seen', '')\n")
        assert self._seen.wait(60)
        found, self._events = self._events, []
        return found

    def close(self) -> None:
        os.write(self._fd, b"('end', '')\n")
        self._reader.join()
        os.close(self._fd)

    def _read(self) -> None:
        with os.fdopen(os.dup(self._fd), "rb") as lines:
            for line in lines:
                kind, what = ast.literal_eval(line.decode())
                if kind == "end":
                    return
                if kind == "seen":
                    self._seen.set()
                else:
                    self._events.append(Event(kind, what if isinstance(what, str) else os.fsdecode(what)))


_watched: list[Event] | None = None  # what this process asked for while it is watched


def _watch_this_process(event: str, arguments: tuple[Any, ...]) -> None:
    if _watched is None:
        return
    if event == "open" and isinstance(arguments[0], str | bytes):
        _watched.append(Event("open", os.path.realpath(os.fsdecode(arguments[0]))))
    elif event in _PLACES:
        _watched.append(Event(event, str(arguments[_PLACES[event]])))
    elif event == "pickle.find_class":
        _watched.append(Event(event, ".".join(map(str, arguments))))


@contextmanager
def this_process() -> Iterator[list[Event]]:
    """What this process asks for while this is entered. (An audit hook stays; outside it does nothing.)"""
    global _watched
    if _watch_this_process not in _hooks:
        _hooks.append(_watch_this_process)
        sys.addaudithook(_watch_this_process)
    _watched = []
    try:
        yield _watched
    finally:
        _watched = None


@cache
def can_trace() -> bool:
    """Whether strace is there and may trace: it sees what libraries do without Python, too."""
    if shutil.which("strace") is None:
        return False
    return subprocess.run(["strace", "-f", "--seccomp-bpf", "-y", "true"], capture_output=True).returncode == 0


def traced(folder: Path) -> list[str]:
    """What to put before a command to have it traced into a folder; nothing where that cannot be."""
    if not can_trace():
        return []
    folder.mkdir()
    calls = "trace=open,openat,openat2,creat,connect,sendto,sendmsg,sendmmsg,execve"
    return ["strace", "-ff", "--seccomp-bpf", "-y", "-qq", "-s", "900", "-e", calls, "-o", str(folder / "trace")]


_OPENED = re.compile(r"""(?:open|openat|openat2|creat)\((?:[^"]*, )?"(.*?)".* = \d+<(.*)>$""")
_OWN = ("/proc/self/environ",)  # that libraries look at under this name; a link that leads there has its number
_ADDRESSED = re.compile(r"(?:connect|send\w+)\(.*(sa_family=AF_INET6?, .*?)\}")
_STARTED = re.compile(r"execve\((.*)\) = 0$")


_NAMES_OF_USERS = ("/etc/passwd", "/etc/group")  # the C library's; where Python opens them, audits tell


def read_trace(folder: Path) -> list[Event]:
    """What the processes that were traced asked for and got; addresses, whether they answered or not."""
    events = []
    for file in sorted(folder.iterdir()) if folder.exists() else ():
        for line in file.read_text(errors="replace").splitlines():
            for kind, pattern in (("open", _OPENED), ("socket.connect", _ADDRESSED), ("os.exec", _STARTED)):
                if (found := pattern.match(line)) and found[1] not in _NAMES_OF_USERS:
                    events.append(Event(kind, found[1] if found[1] in _OWN else found[found.re.groups]))
    return events


_ENVIRONMENT = re.compile(
    r"/(usr|lib|lib32|lib64|opt|nix|sys|run|var/lib|var/cache)/.*|/etc/(?!passwd|shadow|group).*"
    r"|/dev/(null|urandom|random|tty|shm(/.*)?)|(pipe|socket|anon_inode):.*|/memfd:.*"
    r"|/proc/(\d+/(task/\d+/)?(maps|smaps|mounts|children|statm|stat|status|cgroup|mountinfo|cmdline|comm|limits|auxv))"
    r"|/proc/(self/environ|filesystems|cpuinfo|meminfo|stat|uptime|version|mounts|sys/.*)|/proc/\d+(/task)?"
)
_HOME = [Path.home() / name for name in (".cache", ".config", ".aws", ".local")]


def files_outside(events: Iterable[Event], *allowed: Path) -> set[str]:
    """Files that were opened and lie neither in the allowed folders nor in what Python and its libraries are."""
    own = [Path(sys.prefix), Path(sys.base_prefix), REPO, *_HOME, *allowed]
    folders = {os.path.realpath(each) for each in own} | {str(each) for each in own}
    places = [event.what for event in events if event.kind == "open"]
    return {
        place
        for place in places
        if not _ENVIRONMENT.fullmatch(place)
        and not any(place == folder or place.startswith(f"{folder}/") for folder in folders)
    }


def connections_out(events: Iterable[Event], *allowed: str) -> set[str]:
    """Addresses and names that were asked for, without those that hold one of the allowed texts."""
    kinds = ("socket.connect", "socket.sendto", "socket.getaddrinfo", "urllib.Request")
    return {
        event.what
        for event in events
        if event.kind in kinds
        and not event.what.startswith(("/", "\0", "b'"))  # a socket that is a file
        and not any(text in event.what for text in allowed)
    }


def programs_run(events: Iterable[Event]) -> set[str]:
    """Commands that were started, without Python's own."""
    kinds = ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn")
    return {event.what for event in events if event.kind in kinds and sys.executable not in event.what}


def objects_unpickled(events: Iterable[Event]) -> set[str]:
    """Classes and functions that pickles named."""
    return {event.what for event in events if event.kind == "pickle.find_class"}
