"""A child process that decodes audio, so that a file that hangs, crashes or bloats a decoder harms nobody else.

The child gets an open descriptor, never a name: it can open nothing, write nothing, and needs no more memory than it
is given. Of a recording in an object store it gets not even that: it asks the parent for bytes, and knows neither where
they come from nor with whose credentials. `Decoder` is the parent's side; run as a module, this file is the child's.
"""

import contextlib
import json
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, BinaryIO, NoReturn

import numpy as np
from numpy.typing import NDArray

from ..storage.failpoints import failpoint
from ..tokenizers.spec import RunFailed
from . import audio
from .audio import Limits, Probe, Span
from .entries import AudioError
from .format_bytes import Part, RangesFile
from .opened import OpenRecording, Ranges

_LENGTH = struct.Struct("<I")
_REPLY = struct.Struct("<cII")  # what it is, span index, bytes that follow
_RANGE = struct.Struct("<QQ")  # begin and end of the bytes that the child wants
_ALIVE, _RESULT, _SAMPLES, _ERROR, _DONE, _WANT = b"A", b"R", b"S", b"E", b"D", b"W"
_ALIVE_EVERY_S = 1.0
_START_S = 120.0  # for a child to be there, on a machine that is busy
_SOCKET_BYTES = 1 << 22
_OPEN_FILES = 64
_ASKED_BYTES = 1 << 16  # of a recording in a store, at a time
_KEPT_BLOCKS = 16  # of so many bytes
_HARMLESS = ("PATH", "HOME", "TMPDIR", "LANG", "LC_", "LD_LIBRARY_PATH", "MALLOC_", "PYTHON", "WAVEMILL_FAILPOINTS")
_ATTEMPTS = 2  # a death that does not repeat was not the file's fault
FATAL_KINDS = frozenset({"decoder-hang", "decoder-crash", "decoder-memory"})


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderSettings:
    """What a decoder may take."""

    deadline_s: float = 60.0  # without a sign of life
    memory_bytes: int = 2 << 30  # beyond what it has when it starts


class _ChildFailed(Exception):
    """The child hung, died or ran out of memory. Carries the `AudioError` that blames the file."""

    def __init__(self, error: AudioError) -> None:
        super().__init__(error.message)
        self.error = error


class Decoder:
    """One child process, started when first needed and again after each death. For one thread at a time."""

    def __init__(self, settings: DecoderSettings) -> None:
        self._settings = settings
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None

    def probe(self, opened: OpenRecording, limits: Limits) -> Probe:
        """What the header says, or what counting says where no header does. Raises `AudioError`."""
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                replies = list(self._ask(opened, {"do": "probe", "limits": asdict(limits)}))
                return Probe(**json.loads(replies[-1][2]))
            except _ChildFailed as failed:
                if attempt == _ATTEMPTS:
                    raise failed.error from None
        raise AssertionError("a probe has a result or an error")

    def decode(
        self, opened: OpenRecording, *, format: str, spans: Sequence[Span]
    ) -> Generator[tuple[int, NDArray[np.float32]], None, None]:
        """`audio.decode` in the child: span index and samples `[n, channels of the span]`. Raises `AudioError`."""
        done = [0] * len(spans)  # samples handed out
        for attempt in range(1, _ATTEMPTS + 1):
            skip = list(done)  # a second attempt gives the same samples again
            request = {"do": "decode", "format": format, "spans": [asdict(span) for span in spans]}
            try:
                for kind, index, payload in self._ask(opened, request):
                    if kind != _SAMPLES:
                        continue
                    piece_NC = np.frombuffer(payload, dtype=np.float32).reshape(-1, len(spans[index].channels))
                    new_NC = piece_NC[skip[index] :]
                    skip[index] = max(0, skip[index] - len(piece_NC))
                    done[index] += len(new_NC)
                    if len(new_NC):
                        yield index, new_NC
                return
            except _ChildFailed as failed:
                if attempt == _ATTEMPTS:
                    raise failed.error from None

    def close(self) -> None:
        """End the child."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _ask(self, opened: OpenRecording, request: dict[str, Any]) -> Iterator[tuple[bytes, int, bytearray]]:
        """The child's replies to one request. A reader that leaves early costs the child its life."""
        complete = False
        try:
            link = self._socket or self._start()
            self._send(link, opened, request)
            silent_s = 0.0
            while True:
                started = time.monotonic()
                link.settimeout(self._settings.deadline_s - silent_s)
                kind, index, size = _REPLY.unpack(_receive(link, _REPLY.size))
                payload = _receive(link, size)
                if kind == _WANT and not isinstance(
                    opened.content, int
                ):  # no sign of life; but what the store takes to answer is not the child's time
                    silent_s += time.monotonic() - started
                    if silent_s >= self._settings.deadline_s:
                        raise TimeoutError
                    _give(link, opened.content, opened.offset, opened.size, *_RANGE.unpack(payload))
                    continue
                silent_s = 0.0
                if kind == _ERROR:
                    complete = True
                    said = json.loads(payload)
                    if said["kind"] == "decoder-memory":
                        raise _ChildFailed(AudioError(**said))
                    raise AudioError(**said)
                if kind == _DONE:
                    complete = True
                    return
                yield kind, index, payload
        except TimeoutError:
            raise _ChildFailed(
                AudioError(
                    "decoder-hang",
                    f"the decoder gave no sign of life for {self._settings.deadline_s:g} s and was stopped",
                )
            ) from None
        except (EOFError, ConnectionError):
            raise _ChildFailed(AudioError("decoder-crash", f"the decoder {self._death()} on this recording")) from None
        finally:
            if not complete:
                self.close()

    def _send(self, link: socket.socket, opened: OpenRecording, request: dict[str, Any]) -> None:
        """Send a request, and the descriptor of a recording that has one."""
        descriptors = [opened.content] if isinstance(opened.content, int) else []
        place = {"offset": opened.offset if descriptors else 0, "size": opened.size, "name": opened.name}
        message = json.dumps(request | place).encode()
        socket.send_fds(link, [_LENGTH.pack(len(message))], descriptors)
        link.sendall(message)

    def _death(self) -> str:
        if self._process is None:
            return "died"
        code = self._process.wait()
        if code == -signal.SIGKILL:
            return "was killed (out of memory?)"
        return f"crashed ({signal.Signals(-code).name})" if code < 0 else f"ended with status {code}"

    def _start(self) -> socket.socket:
        """Start a child and wait until it is there. Raises `RunFailed` if it is not: no file is to blame for that."""
        for _ in range(_ATTEMPTS - 1):
            with contextlib.suppress(RunFailed):  # somebody may have killed it
                return self._start_once()
        return self._start_once()

    def _start_once(self) -> socket.socket:
        ours, theirs = socket.socketpair()
        for end in (ours, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BYTES)
        # -P: the folder that we were started in, which may hold anything, is no place to import from
        command = [sys.executable, "-P", "-m", __name__, str(theirs.fileno()), str(self._settings.memory_bytes)]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,  # decoders print warnings of their own; what counts is in the replies
            pass_fds=[theirs.fileno()],
            start_new_session=True,  # Ctrl-C is for the parent
            env=_harmless(os.environ) | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
        )
        theirs.close()
        self._socket = ours
        ours.settimeout(_START_S)
        try:
            _receive(ours, _REPLY.size)
        except (EOFError, OSError):
            self._process.kill()
            raise RunFailed(
                f"The decoder process does not start: it {self._death()}. Try it by hand: {' '.join(command[:4])}"
            ) from None
        ours.settimeout(self._settings.deadline_s)
        return ours


def _harmless(environment: Mapping[str, str]) -> dict[str, str]:
    """What Python and its libraries need to start; no credentials, and no names of stores."""
    return {name: value for name, value in environment.items() if name.startswith(_HARMLESS)}


def _give(link: socket.socket, ranges: Ranges, offset: int, size: int, begin: int, end: int) -> None:
    """Send the child bytes of a recording, never others: it may be under the spell of a hostile one."""
    end = min(end, size, begin + _ASKED_BYTES)
    found = bytearray()
    while begin + len(found) < end:
        found += ranges.read(offset + begin + len(found), offset + end)
    link.sendall(_LENGTH.pack(len(found)) + found)


def _receive(link: socket.socket, size: int) -> bytearray:
    content = bytearray(size)
    view = memoryview(content)
    while view:
        got = link.recv_into(view)
        if not got:
            raise EOFError
        view = view[got:]
    return content


def serve(link: socket.socket) -> NoReturn:
    """The child's loop: requests in, samples out, until the parent is gone."""
    link.sendall(_REPLY.pack(_ALIVE, 0, 0))
    while True:
        header, descriptors, _, _ = socket.recv_fds(link, _LENGTH.size, 1)
        if not header:
            sys.exit(0)
        request = json.loads(_receive(link, _LENGTH.unpack(header)[0]))
        with os.fdopen(descriptors[0], "rb") if descriptors else RangesFile(_Asked(link)) as file:
            _answer(link, request, file)


class _Asked:
    """A recording's bytes, asked of the parent in blocks, of which the last few are kept."""

    def __init__(self, link: socket.socket) -> None:
        self._link = link
        self._blocks: dict[int, bytes] = {}  # by where they begin

    def read(self, begin: int, end: int) -> bytes:
        """Bytes from `begin` to `end` or to the end of a block."""
        start = begin - begin % _ASKED_BYTES
        block = self._blocks.get(start)
        if block is None:
            if len(self._blocks) == _KEPT_BLOCKS:
                del self._blocks[next(iter(self._blocks))]
            range = _RANGE.pack(start, start + _ASKED_BYTES)
            self._link.sendall(_REPLY.pack(_WANT, 0, len(range)) + range)
            block = bytes(_receive(self._link, _LENGTH.unpack(_receive(self._link, _LENGTH.size))[0]))
            self._blocks[start] = block
        return block[begin - start : end - start]

    def close(self) -> None:
        """Nothing: the socket goes on to the next recording."""


def _answer(link: socket.socket, request: dict[str, Any], file: "BinaryIO | RangesFile") -> None:
    def reply(kind: bytes, payload: bytes | memoryview = b"", index: int = 0) -> None:
        link.sendall(_REPLY.pack(kind, index, len(payload)))
        if len(payload):
            link.sendall(payload)

    recording: Any = file
    recording.seek(0)
    if request["offset"] or isinstance(file, RangesFile):
        recording = Part(file, request["offset"], request["size"])
    try:
        failpoint(f"decoder-{request['name']}")
        if request["do"] == "probe":
            limits = Limits(**request["limits"])
            found = audio.probe(recording, request["size"], limits, on_progress=_now_and_then(lambda: reply(_ALIVE)))
            reply(_RESULT, json.dumps(asdict(found)).encode())
        else:
            spans = [
                Span(span["start_sample"], span["num_samples"], tuple(span["channels"])) for span in request["spans"]
            ]
            for index, piece_NC in audio.decode(recording, request["size"], format=request["format"], spans=spans):
                flat = np.ascontiguousarray(piece_NC, dtype=np.float32)
                reply(_SAMPLES, flat.data.cast("B") if flat.size else b"", index)
    except AudioError as error:
        reply(_ERROR, json.dumps({"kind": error.kind, "message": error.message}).encode())
    except MemoryError:
        message = "the decoder needs more memory than it may have for this recording"
        reply(_ERROR, json.dumps({"kind": "decoder-memory", "message": message}).encode())
    else:
        reply(_DONE)


def _now_and_then(report: Callable[[], None]) -> Callable[[], None]:
    last = time.monotonic()

    def tick() -> None:
        nonlocal last
        if time.monotonic() - last >= _ALIVE_EVERY_S:
            last = time.monotonic()
            report()

    return tick


def _confine(memory_bytes: int) -> None:
    """Take from this process what decoding does not need: memory past a limit, files to write, core dumps."""
    limits = {
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NOFILE: _OPEN_FILES,
    }
    if os.path.exists("/proc/self/statm"):  # elsewhere address space cannot be told, nor capped
        with open("/proc/self/statm") as statm:
            limits[resource.RLIMIT_AS] = int(statm.read().split()[0]) * resource.getpagesize() + memory_bytes
    for kind, limit in limits.items():
        hard = resource.getrlimit(kind)[1]
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(kind, (limit, limit))


def _end_with(parent: int) -> None:
    """Exit when the parent has gone, even from within a decoder that hangs."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=_end_with, args=[os.getppid()], daemon=True).start()
    _confine(int(sys.argv[2]))
    serve(socket.socket(fileno=int(sys.argv[1])))
