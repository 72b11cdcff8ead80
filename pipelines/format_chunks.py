"""Containers that say how many bytes they hold: whether the file has them all. A leaf.

Decoders read such a file to its end and say nothing, so the sizes are compared here before anything is decoded.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from .format_bytes import Part

_MAX_CHUNKS = 10_000
# sizes that programs write which cannot seek back: the most that fits, signed or unsigned, or a little less
_STREAMED_32 = (range(0x7FFF_0000, 0x8000_0001), range(0xFFFF_0000, 1 << 64))
_STREAMED_64 = (range(1 << 62, 1 << 64),)


@dataclass(frozen=True, slots=True)
class Promise:
    """Bytes of samples: what the header promises and what the file has."""

    promised: int
    found: int


@dataclass(frozen=True, slots=True)
class _Chunked:
    """How a container writes its chunks: [id][size][content, padded]."""

    begin: int
    id_bytes: int
    size_bytes: int
    order: Literal["big", "little"]
    wanted: bytes
    padding: int = 1  # content is padded to a multiple of this
    counts_header: bool = False  # the size includes id and size

    def find(self, file: Part, wanted: bytes | None = None) -> tuple[int, int] | None:
        """Where the content of the wanted chunk begins, and its stated size."""
        place, header_size = self.begin, self.id_bytes + self.size_bytes
        for _ in range(_MAX_CHUNKS):
            header = file.at(place, header_size)
            if len(header) < header_size:
                return None
            size = int.from_bytes(header[self.id_bytes :], self.order)
            if self.counts_header:
                size -= header_size
            if size < 0:
                return None
            if header.startswith(wanted or self.wanted):
                return place + header_size, size
            place += header_size + size + -size % self.padding
        return None


_RIFF = _Chunked(12, 4, 4, "little", b"data", padding=2)
_RIFX = _Chunked(12, 4, 4, "big", b"data", padding=2)
_W64 = _Chunked(40, 16, 8, "little", b"data\xf3\xac\xd3\x11", padding=8, counts_header=True)
_AIFF = _Chunked(12, 4, 4, "big", b"SSND", padding=2)
_SVX = _Chunked(12, 4, 4, "big", b"BODY", padding=2)
_CAF = _Chunked(8, 4, 8, "big", b"data")
_DSF = _Chunked(28, 4, 8, "little", b"data", counts_header=True)
_DSDIFF = _Chunked(16, 4, 8, "big", b"DSD ", padding=2)


def promise(name: str, file: Part) -> Promise | None:
    """What the header of a format promises; None where it promises nothing."""
    find = _PROMISES.get(name.removesuffix("-ffmpeg"))
    return find(file) if find else None


def is_cut(name: str, file: Part) -> bool:
    """Whether the file ends before what its header promises."""
    found = promise(name, file)
    return found is not None and found.found < found.promised


def fact_samples(file: Part, num_frames: int) -> int:
    """The samples of a WAV in whole blocks of a codec, less those at the end that `fact` says are padding.

    Some writers pad by a block more than they need; what differs by more than two is no padding, and `fact` is wrong.
    """
    riff = _RIFX if file.at(0, 4) == b"RIFX" else _RIFF
    fact, fmt = riff.find(file, b"fact"), riff.find(file, b"fmt ")
    if fact is None or fmt is None or fact[1] < 4 or fmt[1] < 20:
        return num_frames
    stated = int.from_bytes(file.at(fact[0], 4), riff.order)
    per_block = int.from_bytes(file.at(fmt[0] + 18, 2), riff.order)
    return stated if 0 <= num_frames - stated < 2 * per_block and stated else num_frames


def unclosed_wav(file: Part) -> int | None:
    """Where the data chunk's size is, if it is zero because the writer never came back, and samples follow it."""
    riff = _RIFX if file.at(0, 4) == b"RIFX" else _RIFF
    found = riff.find(file)
    if found is None or found[1] or file.size - found[0] < 8 or _is_chunk_name(file.at(found[0], 4)):
        return None
    return found[0] - 4


def _is_chunk_name(name: bytes) -> bool:
    return re.fullmatch(rb"[A-Za-z_]\w{2}[\w ]", name) is not None


def _within(file: Part, found: tuple[int, int] | None, *, streamed: tuple[range, ...] = _STREAMED_64) -> Promise | None:
    if found is None or any(found[1] in sizes for sizes in streamed):
        return None
    return Promise(found[1], file.size - found[0])


def _wav(file: Part) -> Promise | None:
    head = file.at(0, 4)
    riff = _RIFX if head == b"RIFX" else _RIFF
    found = riff.find(file)
    if head in (b"RF64", b"BW64") and found and found[1] == 0xFFFF_FFFF:
        ds64 = riff.find(file, b"ds64")
        if ds64 is None:
            return None
        return _within(file, (found[0], int.from_bytes(file.at(ds64[0] + 8, 8), "little")))
    return _within(file, found, streamed=_STREAMED_32)


def _au(file: Part) -> Promise | None:
    head = file.at(0, 12)
    if len(head) < 12:
        return None
    order: Literal["big", "little"] = "little" if head[:4] == b"dns." else "big"
    place, size = int.from_bytes(head[4:8], order), int.from_bytes(head[8:12], order)
    return _within(file, (place, size), streamed=_STREAMED_32)


def _sphere(file: Part) -> Promise | None:
    """NIST SPHERE: a header of text, `name -type value` in lines."""
    text = file.at(0, 16_384).decode("latin-1")
    fields = dict(re.findall(r"^(\w+)\s+-\w+\s+(.*?)\s*$", text.partition("end_head")[0], re.MULTILINE))
    size = re.match(r"NIST_1A\s+(\d+)", text)
    if size is None or fields.get("sample_coding", "pcm").partition(",")[2]:
        return None  # compressed
    try:
        count = int(fields["sample_count"]) * int(fields.get("channel_count", 1)) * int(fields["sample_n_bytes"])
    except (KeyError, ValueError):
        return None
    return _within(file, (int(size[1]), count))


def _voc(file: Part) -> Promise | None:
    """Creative Voice: blocks of one byte of kind and three of size; kind 0 ends them."""
    place, found = int.from_bytes(file.at(20, 2), "little"), None
    for _ in range(_MAX_CHUNKS):
        header = file.at(place, 4)
        if len(header) < 4 or header[0] == 0:
            return found
        size = int.from_bytes(header[1:], "little")
        found = Promise(size, file.size - place - 4)
        place += 4 + size
    return found


def _avr(file: Part) -> Promise | None:
    """Audio Visual Research: 128 bytes of header with channels, bits and samples per channel."""
    head = file.at(0, 30)
    if len(head) < 30:
        return None
    num_channels, bits = (2 if head[12:14] != b"\0\0" else 1), int.from_bytes(head[14:16])
    return _within(file, (128, int.from_bytes(head[26:30]) * num_channels * (2 if bits > 8 else 1)))


def _mp4(file: Part) -> Promise | None:
    """ISO 14496-12: boxes one after the other; the last one must end with the file."""
    place = 0
    for _ in range(_MAX_CHUNKS):
        header = file.at(place, 16)
        if len(header) < 8 or not re.fullmatch(rb"[ -~\xa9]{4}", header[4:8]):
            return None
        size = int.from_bytes(header[:4])
        if size == 1:
            size = int.from_bytes(header[8:16])
        if size < 8:
            return None  # 0: to the end
        if place + size > file.size:
            return Promise(size, file.size - place)
        place += size
    return None


def is_fragmented(file: Part) -> bool:
    """Whether an MP4 is in fragments (`moof`), whose index does not know the exact length."""
    place = 0
    for _ in range(_MAX_CHUNKS):
        header = file.at(place, 16)
        if len(header) < 8 or header[4:8] == b"moof":
            return len(header) >= 8
        size = int.from_bytes(header[8:16]) if header[:4] == b"\0\0\0\1" else int.from_bytes(header[:4])
        if size < 8:
            return False
        place += size
    return False


def _matroska(file: Part) -> Promise | None:
    """EBML: the header element, then one segment whose size is known unless it was streamed."""
    head = file.at(0, 512)
    _, place = _ebml_number(head, 4)
    size, place = _ebml_number(head, 4)
    if size is None:
        return None
    place += size
    head = file.at(place, 16)
    if head[:4] != b"\x18\x53\x80\x67":
        return None
    size, begin = _ebml_number(head, 4)
    return _within(file, (place + begin, size)) if size is not None else None


def _ebml_number(content: bytes, at: int) -> tuple[int | None, int]:
    """A number whose leading zero bits say how long it is, and where what follows begins. All ones: not known."""
    if at >= len(content) or content[at] == 0:
        return None, at
    length = 9 - content[at].bit_length()
    number = int.from_bytes(content[at : at + length]) & (1 << 7 * length) - 1
    return (None if number == (1 << 7 * length) - 1 else number), at + length


def _asf(file: Part) -> Promise | None:
    """The file properties object knows the size of the file, unless it is a broadcast."""
    head = file.at(0, 8_192)
    at = head.find(bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365"))
    if at < 0 or len(head) < at + 92:
        return None
    size, flags = int.from_bytes(head[at + 40 : at + 48], "little"), int.from_bytes(head[at + 88 : at + 92], "little")
    return None if flags & 1 or not size else Promise(size, file.size)


def _riff_file(file: Part) -> Promise | None:
    size = int.from_bytes(file.at(4, 4), "little")
    return _within(file, (8, size), streamed=_STREAMED_32)


_PROMISES: dict[str, Callable[[Part], Promise | None]] = {
    "wav": _wav,
    "w64": lambda file: _within(file, _W64.find(file)),
    "aiff": lambda file: _within(file, _AIFF.find(file), streamed=_STREAMED_32),
    "svx": lambda file: _within(file, _SVX.find(file), streamed=_STREAMED_32),
    "caf": lambda file: _within(file, _CAF.find(file)),
    "dsf": lambda file: _within(file, _DSF.find(file)),
    "dsdiff": lambda file: _within(file, _DSDIFF.find(file)),
    "au": _au,
    "sphere": _sphere,
    "voc": _voc,
    "avr": _avr,
    "mp4": _mp4,
    "webm": _matroska,
    "asf": _asf,
    "avi": _riff_file,
    "xwma": _riff_file,
    "qcp": _riff_file,
}
