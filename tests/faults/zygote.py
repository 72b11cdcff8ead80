"""Command lines that cost no start: one process has imported everything and forks a real driver for each request.

    python zygote.py SOCKET PID

listens at the socket until the process PID has ended. A request is one line of JSON with the arguments, the environment
and what to set in wavemill's modules, and comes with the descriptors of stdout and stderr; the answers are the driver's
process id and, when it has ended, its exit status. The zygote itself uses nothing that starts threads, which a fork
would lose: libraries are imported, and first used behind it.
"""

import gc
import importlib
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

HEAVY = (
    "wavemill.jobs.cli",
    "wavemill.jobs.commands_corpus",
    "wavemill.jobs.stages",
    "wavemill.jobs.repair",
    "wavemill.pipelines.verify",
    "wavemill.storage.vacuum",
    "wavemill.tokenizers.registry",
    "faiss",
    "s3fs",
    "soundfile",
    "torchaudio",
)


class Driver:
    """A command line that was forked, as far as tests need it of `subprocess.Popen`."""

    def __init__(self, link: socket.socket, out: int, err: int) -> None:
        self._link = link
        self._outputs = out, err
        self.pid = self._number()
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None and select.select([self._link], [], [], 0)[0]:
            self.wait()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The exit status, negative for a signal's. Raises `subprocess.TimeoutExpired`."""
        if self.returncode is None:
            if not select.select([self._link], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(["wavemill"], timeout or 0)
            self.returncode = self._number()
            self._link.close()
        return self.returncode

    def _number(self) -> int:
        """The next line. Not a byte more is taken: `select` would not see it."""
        line = b""
        while not line.endswith(b"\n"):
            byte = self._link.recv(1)
            assert byte, "the zygote has ended"
            line += byte
        return int(line)

    def communicate(self, *, timeout: float | None = None) -> tuple[str, str]:
        """What it wrote to stdout and stderr."""
        self.wait(timeout)
        said = []
        for output in self._outputs:
            with os.fdopen(os.dup(output), "rb") as file:
                file.seek(0)
                said.append(file.read().decode())
        return said[0], said[1]

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def __del__(self) -> None:
        for output in self._outputs:
            os.close(output)


class Zygote:
    """Starts drivers, each in a session of its own."""

    def __init__(self, path: Path) -> None:
        self._path = str(path)

    def start(self, *arguments: str | Path, env: dict[str, str] | None = None, **settings: Any) -> Driver:
        """Run the command line with this environment added to ours; `settings` are set in modules, by their names."""
        outputs = [os.memfd_create(name) for name in ("stdout", "stderr")]
        request = {
            "arguments": [str(argument) for argument in arguments],
            "env": {**os.environ, **(env or {})},
            "settings": settings,
            "folder": os.getcwd(),
        }
        link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        link.connect(self._path)
        content = json.dumps(request).encode() + b"\n"
        socket.send_fds(link, [content[:1]], outputs)
        link.sendall(content[1:])
        return Driver(link, *outputs)


@cache
def zygote() -> Zygote:
    """The one zygote of this process, which ends with it."""
    path = Path(tempfile.mkdtemp(prefix="wavemill-zygote-")) / "socket"
    process = subprocess.Popen([sys.executable, __file__, path, str(os.getpid())], stdin=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, "the zygote did not start"
        assert time.monotonic() < until, "the zygote did not start in two minutes"
        time.sleep(0.05)
    return Zygote(path)


def serve(path: str, parent: int) -> None:
    for name in HEAVY:
        importlib.import_module(name)
    gc.freeze()  # else a collection in a child would copy every page
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(path + ".new")
    listener.listen(64)
    os.rename(path + ".new", path)
    ended = os.pidfd_open(parent)
    children: dict[int, tuple[int, socket.socket]] = {}  # process id and who asked for it, by pidfd
    while True:
        ready = select.select([listener, ended, *children], [], [])[0]
        for found in ready:
            if isinstance(found, socket.socket):
                link = listener.accept()[0]
                pid = _fork(link, listener)
                link.sendall(b"%d\n" % pid)
                children[os.pidfd_open(pid)] = pid, link
            elif found == ended:
                for pid, _ in children.values():  # they may stand still
                    os.kill(pid, signal.SIGKILL)
                shutil.rmtree(os.path.dirname(path))
                return
            else:
                pid, link = children.pop(found)
                status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                os.close(found)
                with suppress(OSError):  # nobody may want to know
                    link.sendall(b"%d\n" % status)
                link.close()


def _fork(link: socket.socket, listener: socket.socket) -> int:
    content, outputs, _, _ = socket.recv_fds(link, 1, 2)
    while not content.endswith(b"\n"):
        content += link.recv(1 << 16)
    pid = os.fork()
    if pid:
        for output in outputs:
            os.close(output)
        return pid
    status = 70
    try:
        os.setsid()
        listener.close()
        for output, standard in zip(outputs, (1, 2), strict=True):
            os.dup2(output, standard)
        os.closerange(3, 256)
        status = _run(json.loads(content))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _run(request: dict[str, Any]) -> int:
    """The command line, in the environment that a process of its own would have."""
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["folder"])
    from wavemill.jobs.cli import main
    from wavemill.storage import failpoints

    importlib.reload(failpoints)  # it reads the environment once
    for name, value in request["settings"].items():
        module, _, variable = name.rpartition(".")
        assert hasattr(sys.modules[module], variable), name
        setattr(sys.modules[module], variable, value)
    sys.argv = ["wavemill", *request["arguments"]]
    try:
        main()
    except SystemExit as stopped:
        return int(stopped.code or 0)
    return 0


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]))
