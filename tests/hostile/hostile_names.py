"""Files with hostile names, of hostile kinds, and with things in them that somebody could execute."""

import os
import socket
import stat
import struct
from pathlib import Path

from hostile_files import files
from hostile_tools import Offer, World, pickled, sound

NAMES = [
    "<img src=x onerror=alert(1)>.wav",
    "=cmd|' !A0'!A1,\"x\".wav",
    "@SUM(1+1).wav",
    "\x1b[31mred\x1b[2J\x1b]0;title\x07.wav",
    "\x9b31mc1.wav",
    "\u202egnp.wav",
    "\u2066isolate\u200f.wav",
    "line\nbreak\r.wav",
    "tab\tand\x08backspace\x7f.wav",
    "\N{PILE OF POO}\N{ZERO WIDTH JOINER}.wav",
    "e\u0301 and \u00e9.wav",
    "$(touch touched) `touch touched`;touch touched|.wav",
    "pipe:touch touched|.wav",
    "http:\\\\127.0.0.1\\x.wav",
    "-rf --help.wav",
    "%s%n{0}{name}[bold][red]x.wav",
    "a" * 251 + ".wav",
    " .wav",
]


def _names(folder: Path, world: World) -> None:
    for name in NAMES:
        (folder / name).write_bytes(sound())
    for name in NAMES[:-2]:
        (folder / f"not {name}").write_bytes(b"no audio")


def _no_utf8(folder: Path, world: World) -> None:
    for name in (b"caf\xe9.wav", b"\xff\xfe\x80.wav"):
        Path(os.fsdecode(bytes(folder) + b"/" + name)).write_bytes(sound())


def _as_url(folder: Path, world: World) -> None:
    """A relative path that reads like a URL."""
    deep = folder / "http:" / f"127.0.0.1:{world.listener.port}"
    deep.mkdir(parents=True)
    (deep / "a.wav").write_bytes(sound())


NAMED = [
    Offer(
        "names with HTML, formulas, escapes, marks and commands are kept as they are",
        _names,
        dict.fromkeys(NAMES) | {f"not {name}": "not-audio" for name in NAMES[:-2]},
    ),
    Offer(
        "names that are no UTF-8 are errors that say so",
        _no_utf8,
        {"caf\\udce9.wav": "bad-name", "\\udcff\\udcfe\\udc80.wav": "bad-name"},
    ),
]


def _nodes(folder: Path, world: World) -> None:
    os.mkfifo(folder / "fifo.wav")
    os.mkfifo(folder / "fifo")
    os.mkfifo(folder / "good.txt")
    os.mkfifo(folder / "fifo.parquet")
    os.mkfifo(folder / "fifo.ctm")
    (folder / "good.wav").write_bytes(sound())
    (folder / "folder.wav").mkdir()
    (folder / "fifo-link.wav").symlink_to("fifo")
    with socket.socket(socket.AF_UNIX) as server:
        here = os.getcwd()
        os.chdir(folder)  # a socket's path is short
        server.bind("socket.wav")
        os.chdir(here)


def _device(folder: Path, world: World) -> None:
    os.mknod(folder / "zero.wav", 0o666 | stat.S_IFCHR, os.makedev(1, 5))
    os.mknod(folder / "zero", 0o666 | stat.S_IFCHR, os.makedev(1, 5))


NODES = [
    Offer(
        "FIFOs and sockets, as recordings, side files and tables, hold nobody up",
        _nodes,
        {"fifo.wav": "not-a-file", "fifo-link.wav": "not-a-file", "socket.wav": "not-a-file", "good.wav": None},
    )
]
if os.geteuid() == 0:
    NODES.append(Offer("a device that never ends is not read", _device, {"zero.wav": "not-a-file"}))

PICKLES = [
    Offer(
        "pickles, object arrays and modules are passed over, and as .wav no audio",
        files(
            ("a.pkl", lambda world: pickled(world.touched)),
            ("a.npy", lambda world: _object_array(world)),
            ("a.pt", lambda world: pickled(world.touched)),
            ("sitecustomize.py", lambda world: f"open({str(world.touched)!r}, 'w')".encode()),
            ("a.pth", lambda world: f"import os; os.mknod({str(world.touched)!r})".encode()),
            ("b.wav", lambda world: pickled(world.touched)),
            ("c.wav", lambda world: pickled(world.touched, protocol=0)),
        ),
        {"b.wav": "not-audio", "c.wav": "not-audio"},
    ),
    Offer(
        "what describes a recording is data: keys that name files, classes or commands do nothing",
        files(
            ("a.wav", sound()),
            (
                "a.json",
                lambda world: (
                    '{"text": "!!python/object/apply:os.system [touch x]", "audio": "FILE", "py/object": "os"}'.replace(
                        "FILE", str(world.outside / "canary.wav")
                    ).encode()
                ),
            ),
        ),
        {"a.wav": None},
    ),
]


def _object_array(world: World) -> bytes:
    header = b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }".ljust(117) + b"\n"
    return b"\x93NUMPY\x01\0" + struct.pack("<H", len(header)) + header + pickled(world.touched)


NAMES_AND_KINDS = [*NAMED, *NODES, *PICKLES]
