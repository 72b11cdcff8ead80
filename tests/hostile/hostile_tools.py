"""What hostile inputs are made of, and what watches over them: bytes of containers, and observers of the outside."""

import contextlib
import ctypes
import io
import os
import pickle
import socket
import struct
import tarfile
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from numpy.typing import NDArray

RATE = 16_000
CANARY_RATE = 11_025  # of the recordings that nobody may read: no row may have it
MARKER = "CANARY-7f3a"  # in texts that nobody may read
NOISE = (0.2 * np.random.default_rng(0).standard_normal(RATE)).astype(np.float32)

# Observers


class Listener:
    """A server on 127.0.0.1 that counts who connects, and answers like a web server."""

    def __init__(self) -> None:
        self.hits = 0
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = self._server.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/canary.wav"
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        self._server.close()

    def _serve(self) -> None:
        while True:
            try:
                link, _ = self._server.accept()
            except OSError:
                return
            self.hits += 1
            with link, contextlib.suppress(OSError):
                link.sendall(b"HTTP/1.0 200 OK\r\nContent-Length: 0\r\n\r\n")


class OpenWatch:
    """The kernel's own account (inotify) of who opens or reads files, in any process."""

    _ACCESS, _OPEN = 0x1, 0x20

    def __init__(self, paths: list[Path]) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self._fd = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        self._names = {
            libc.inotify_add_watch(self._fd, os.fsencode(path), self._ACCESS | self._OPEN): path for path in paths
        }

    def opened(self) -> set[Path]:
        """What was opened since the last call."""
        found = set()
        with contextlib.suppress(BlockingIOError):
            while content := os.read(self._fd, 1 << 16):
                while content:
                    watch, _, _, length = struct.unpack("iIII", content[:16])
                    content = content[16 + length :]
                    found.add(self._names[watch])
        return found

    def close(self) -> None:
        os.close(self._fd)


def snapshot(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Everything below a folder: kind, size, time of change, by its path."""
    found = {}
    for path in [folder, *folder.rglob("*")]:
        status = path.lstat()
        found[str(path)] = (status.st_mode, status.st_size, status.st_mtime_ns)
    return found


def control_characters(text: str) -> set[str]:
    """What steers terminals or turns text around: C0, C1, bidirectional marks; not the line's end."""
    marks = {*map(chr, range(0x202A, 0x202F)), *map(chr, range(0x2066, 0x206A)), "\u200e", "\u200f"}
    control = {character for character in text if ord(character) < 32 or 127 <= ord(character) < 160}
    return (control | (marks & set(text))) - {"\n"}


class Payload:
    """Unpickled, it touches a file."""

    def __init__(self, touched: Path) -> None:
        self._touched = touched

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self._touched}",)


def pickled(touched: Path, *, protocol: int = 4) -> bytes:
    return pickle.dumps(Payload(touched), protocol=protocol)


# Sound and containers


def sound(format: str = "WAV", subtype: str | None = None, samples: NDArray[Any] = NOISE, rate: int = RATE) -> bytes:
    content = io.BytesIO()
    soundfile.write(content, samples, rate, format=format, subtype=subtype)
    return content.getvalue()


def wav_header(*, rate: int = RATE, num_channels: int = 1, data_bytes: int = 32_000) -> bytes:
    """A WAV's 44 bytes, whatever they promise."""
    frame = 2 * num_channels % 2**16
    chunk = struct.pack("<HHIIHH", 1, num_channels, rate, rate * frame % 2**32, frame, 16)
    size = min(36 + data_bytes, 2**32 - 1)
    return (
        b"RIFF"
        + struct.pack("<I", size)
        + b"WAVEfmt \x10\0\0\0"
        + chunk
        + b"data"
        + struct.pack("<I", min(data_bytes, 2**32 - 1))
    )


def silent_flac(*, num_frames: int = 20, total: int | None = None) -> bytes:
    """Eight channels of silence in frames of 65,535 samples: some 29,000 decoded bytes for each byte."""
    num_samples = 65_535 * num_frames if total is None else total
    packed = RATE << 44 | 7 << 41 | 15 << 36 | num_samples
    info = struct.pack(">HH", 65_535, 65_535) + bytes(6) + packed.to_bytes(8, "big") + bytes(16)
    frames = b""
    for number in range(num_frames):
        frame = b"\xff\xf8\x70\x78" + bytes([number]) + struct.pack(">H", 65_534)
        frame += bytes([_crc(frame, 0x07, 8)]) + bytes(3 * 8)
        frames += frame + struct.pack(">H", _crc(frame, 0x8005, 16))
    return b"fLaC\x80\0\0\x22" + info + frames


def _crc(content: bytes, polynomial: int, bits: int) -> int:
    value = 0
    for byte in content:
        value ^= byte << (bits - 8)
        for _ in range(8):
            value = value << 1 ^ polynomial if value >> (bits - 1) else value << 1
            value &= (1 << bits) - 1
    return value


def box(kind: bytes, *parts: bytes) -> bytes:
    """An MP4 box."""
    content = b"".join(parts)
    return struct.pack(">I", 8 + len(content)) + kind + content


def full_box(kind: bytes, *parts: bytes, flags: int = 0) -> bytes:
    return box(kind, struct.pack(">I", flags), *parts)


FTYP = box(b"ftyp", b"qt  \0\0\0\0qt  ")


def mp4(*, reference: bytes, data: bytes = b"", table: Mapping[bytes, bytes] | None = None) -> bytes:
    """An MP4 of PCM whose samples lie where `reference`, an entry of its `dref`, says. `table` replaces boxes."""
    num_samples = 8_000
    boxes = {
        b"stts": struct.pack(">III", 1, num_samples, 1),
        b"stsc": struct.pack(">IIII", 1, 1, num_samples, 1),
        b"stsz": struct.pack(">II", 2, num_samples),
        b"stco": struct.pack(">II", 1, 28),
        **(table or {}),
    }
    entry = bytes(6) + struct.pack(">H", 1) + bytes(8) + struct.pack(">HHHHI", 1, 16, 0, 0, RATE << 16)
    stsd = full_box(b"stsd", struct.pack(">I", 1), box(b"sowt", entry))
    stbl = box(b"stbl", stsd, *(full_box(kind, content) for kind, content in boxes.items()))
    dinf = box(b"dinf", full_box(b"dref", struct.pack(">I", 1), reference))
    minf = box(b"minf", full_box(b"smhd", bytes(4)), dinf, stbl)
    times = struct.pack(">IIII", 0, 0, RATE, num_samples)
    mdia = box(
        b"mdia",
        full_box(b"mdhd", times, bytes(4)),
        full_box(b"hdlr", b"mhlrsoun", bytes(13)),
        minf,
    )
    track = struct.pack(">IIIII", 0, 0, 1, 0, num_samples) + bytes(60)
    moov = box(b"moov", full_box(b"mvhd", times, bytes(80)), box(b"trak", full_box(b"tkhd", track, flags=7), mdia))
    return FTYP + box(b"mdat", data) + moov


def alias(path: str) -> bytes:
    """A Macintosh alias record, as QuickTime's `dref` has it, of an absolute path."""
    name = os.path.basename(path).encode()[:63]
    record = bytes(10) + b"\x04disk".ljust(28, b"\0") + bytes(12) + bytes([len(name)]) + name.ljust(63, b"\0")
    record += bytes(16) + struct.pack(">HH", 1, 1) + bytes(16)
    for kind, value in ((2, b"disk" + path.encode()), (18, path.encode()), (19, b"/")):
        record += struct.pack(">HH", kind, len(value)) + value + bytes(len(value) % 2)
    return full_box(b"alis", record + b"\xff\xff\0\0".ljust(60, b"\0"))


def ebml(element: str, content: bytes) -> bytes:
    """A Matroska element, named by its id in hexadecimal."""
    return bytes.fromhex(element) + (len(content) | 1 << 56).to_bytes(8, "big") + content


def matroska(url: str) -> bytes:
    """PCM in Matroska, with links to other segments, an attached playlist and tags that name `url`."""
    playlist = f"#EXTM3U\n{url}\n".encode()
    header = ebml("1A45DFA3", ebml("4282", b"matroska") + ebml("4287", b"\4") + ebml("4285", b"\2"))
    links = ebml("3E83BB", url.encode()) + ebml("3C83AB", url.encode()) + ebml("3EB923", bytes(16))
    info = ebml("1549A966", ebml("2AD7B1", (1_000_000).to_bytes(4, "big")) + links)
    kind = ebml("B5", struct.pack(">f", RATE)) + ebml("9F", b"\1") + ebml("6264", b"\x10")
    track = (
        ebml("D7", b"\1") + ebml("73C5", b"\1") + ebml("83", b"\2") + ebml("86", b"A_PCM/INT/LIT") + ebml("E1", kind)
    )
    attached = ebml("466E", b"list.m3u8") + ebml("4660", b"application/x-mpegurl")
    attached += ebml("465C", playlist) + ebml("46AE", b"\1")
    tag = ebml("7373", ebml("63C0", b"") + ebml("67C8", ebml("45A3", b"URL") + ebml("4487", url.encode())))
    samples = (NOISE * 32767).astype("<i2").tobytes()
    blocks = [
        ebml("A3", b"\x81" + struct.pack(">h", 100 * n) + b"\x80" + samples[3_200 * n :][:3_200]) for n in range(10)
    ]
    cluster = ebml("1F43B675", ebml("E7", b"\0") + b"".join(blocks))
    tracks, attachments = ebml("1654AE6B", ebml("AE", track)), ebml("1941A469", ebml("61A7", attached))
    return header + ebml("18538067", info + tracks + attachments + ebml("1254C367", tag) + cluster)


def id3(*frames: tuple[bytes, bytes]) -> bytes:
    """An ID3v2.3 tag."""
    content = b"".join(name + struct.pack(">IH", len(value), 0) + value for name, value in frames)
    size = bytes(len(content) >> shift & 127 for shift in (21, 14, 7, 0))
    return b"ID3\x03\0\0" + size + content


# Tars

Member = tuple[str, bytes] | tarfile.TarInfo


def tar(*members: Member, gz: bool = False, format: int = tarfile.PAX_FORMAT) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz" if gz else "w", format=format) as file:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                file.addfile(member)
            else:
                header = tarfile.TarInfo(member[0])
                header.size = len(member[1])
                file.addfile(header, io.BytesIO(member[1]))
    return content.getvalue()


def special(name: str, kind: bytes, *, link: str = "") -> tarfile.TarInfo:
    header = tarfile.TarInfo(name)
    header.type, header.linkname, header.devmajor, header.devminor = kind, link, 1, 5
    return header


# The world


@dataclass(frozen=True, slots=True)
class World:
    """Where hostile inputs live: what may be read, what may not, and where a program that is led astray would write."""

    folder: Path
    listener: Listener

    @property
    def source(self) -> Path:
        return self.folder / "source"

    @property
    def outside(self) -> Path:
        return self.folder / "outside"

    @property
    def touched(self) -> Path:
        """What payloads that are executed touch."""
        return self.folder / "touched"

    @property
    def canaries(self) -> list[Path]:
        return sorted(self.outside.iterdir())

    @property
    def env(self) -> dict[str, str]:
        return {**os.environ, "TMPDIR": str(self.folder / "tmp"), "HOME": str(self.folder / "home")}

    @classmethod
    def make(cls, folder: Path) -> "World":
        for name in ("source", "outside", "desk", "tmp", "home"):
            (folder / name).mkdir(parents=True)
        for name in ("numpy", "soundfile", "av", "json", "wavemill", "sitecustomize", "torch"):
            # whoever is started here must not import it
            (folder / "desk" / f"{name}.py").write_text(f"open({str(folder / 'touched')!r}, 'w')\n")
        outside = folder / "outside"
        (outside / "canary.wav").write_bytes(sound(samples=np.resize(NOISE, 23_456), rate=CANARY_RATE))
        (outside / "canary.txt").write_text(f"{MARKER}\n")
        (outside / "canary.tar").write_bytes(tar(("in.wav", sound(rate=CANARY_RATE))))
        return cls(folder, Listener())


@dataclass(frozen=True, slots=True)
class Offer:
    """One hostile input: what is offered, and what must become of it."""

    sentence: str
    make: Callable[[Path, World], None]  # puts it into a folder of its own
    rows: dict[str, str | None]  # its rows: path below the folder (then " > MEMBER"), error class or None for codes


def offers_by_folder(offers: list[Offer]) -> Iterator[tuple[str, Offer]]:
    for number, offer in zip(count(), offers):
        yield f"c{number:02d}", offer
