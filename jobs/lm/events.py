"""Event files that TensorBoard shows, of single figures: its format is small, its package is not.

Records as TensorFlow's record_writer.cc has them (length, its checksum, content, its checksum), the content a message
`Event` of event.proto, with a `Summary` of values or, where a run goes on, a `SessionLog` that hides what came after.
"""

import struct
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

_POLYNOMIAL = 0x82F63B78  # CRC-32C (Castagnoli), reflected
_START = 1  # SessionLog.SessionStatus


class EventFile:
    """Figures of steps, appended to a new file in `folder`. `wall_time_s` is that of its beginning, and its name.

    Of files that are there before it, TensorBoard hides the steps after `from_step`; None: all of them.
    """

    def __init__(self, folder: Path, wall_time_s: float, *, from_step: int | None) -> None:
        number = len(list(folder.glob("events.out.tfevents.*")))
        self._file = open(folder / f"events.out.tfevents.{int(wall_time_s):010d}.{number}.wavemill", "wb")  # noqa: SIM115
        self._append(_event(wall_time_s, 0, _text(3, "brain.Event:2")))
        if number:
            first = 0 if from_step is None else from_step + 1
            self._append(_event(wall_time_s, first, _message(7, _whole(1, _START))))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def add(self, wall_time_s: float, step: int, figures: Mapping[str, float]) -> None:
        values = b"".join(
            _message(1, _text(1, name) + b"\x15" + struct.pack("<f", value)) for name, value in figures.items()
        )
        self._append(_event(wall_time_s, step, _message(5, values)))

    def _append(self, content: bytes) -> None:
        length = struct.pack("<Q", len(content))
        self._file.write(length + _masked(length) + content + _masked(content))
        self._file.flush()


def crc32c(content: bytes) -> int:
    """The checksum of RFC 3720, appendix B.4."""
    crc = 0xFFFFFFFF
    for byte in content:
        crc = _TABLE[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


def _table() -> list[int]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = (byte >> 1) ^ (_POLYNOMIAL if byte & 1 else 0)
        table.append(byte)
    return table


_TABLE = _table()


def _masked(content: bytes) -> bytes:
    crc = crc32c(content)
    return struct.pack("<I", (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF)


def _event(wall_time_s: float, step: int, what: bytes) -> bytes:
    return b"\x09" + struct.pack("<d", wall_time_s) + _whole(2, step) + what


def _whole(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _text(field: int, text: str) -> bytes:
    return _message(field, text.encode())


def _message(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    parts = []
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*parts, value])
