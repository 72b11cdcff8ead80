"""FLAC (RFC 9639): what STREAMINFO promises and where the last frame ends. A leaf."""

from dataclasses import dataclass

from .format_bytes import Part

_TAIL = 1 << 18  # bytes searched for the last frame: more than any frame of a usual encoder
_BLOCK_SIZES = {1: 192, 2: 576, 3: 1152, 4: 2304, 5: 4608, **{n: 256 << (n - 8) for n in range(8, 16)}}
TOTAL_PLACE = 18  # of the eight bytes that end in STREAMINFO's 36 bits of total samples


def _crc8_table() -> bytes:
    table = bytearray(256)
    for byte in range(256):
        crc = byte
        for _ in range(8):
            crc = (crc << 1 ^ (0x07 if crc & 0x80 else 0)) & 0xFF
        table[byte] = crc
    return bytes(table)


_CRC8 = _crc8_table()


@dataclass(frozen=True, slots=True)
class StreamInfo:
    """The part of STREAMINFO that is needed here."""

    block_size: int  # the largest
    num_samples: int  # 0: not known
    total_field: int  # the eight bytes that hold it


@dataclass(frozen=True, slots=True)
class LastFrame:
    """The last frame header in the file, in samples."""

    start: int
    end: int


def stream_info(flac: Part) -> StreamInfo | None:
    """STREAMINFO, where it is the first block, as it has to be; else None."""
    head = flac.at(0, 42)
    if len(head) < 42 or head[4] & 0x7F:
        return None
    field = int.from_bytes(head[TOTAL_PLACE : TOTAL_PLACE + 8])
    return StreamInfo(int.from_bytes(head[10:12]), field & (1 << 36) - 1, field)


def without_total(flac: Part, info: StreamInfo) -> Part:
    """The same file with a STREAMINFO that does not know its total: decoders then go on to the end."""
    return flac.part(0, patch=(TOTAL_PLACE, (info.total_field >> 36 << 36).to_bytes(8)))


def last_frames(flac: Part, info: StreamInfo) -> list[LastFrame]:
    """The frame headers near the file's end, last first. One may be a coincidence: about one file in fifty has one."""
    begin = max(0, flac.size - _TAIL)
    tail = flac.at(begin, _TAIL)
    found = []
    at = tail.rfind(b"\xff")
    while at >= 0:
        frame = _frame(tail, at, info)
        if frame:
            found.append(frame)
            if len(found) == 4:
                break
        at = tail.rfind(b"\xff", 0, at)
    return found


def goes_on_behind_total(flac: Part, info: StreamInfo) -> bool:
    """Whether the last frame ends behind the stated total (or none is stated)."""
    if not info.num_samples:
        return True
    frames = last_frames(flac, info)
    return bool(frames) and info.num_samples not in (frame.end for frame in frames) and max(
        frame.end for frame in frames
    ) > info.num_samples  # fmt: skip


def cut_at(flac: Part) -> int | None:
    """The sample that the last frame begins with, where it ends before the stated total: the file was cut there."""
    info = stream_info(flac)
    if info is None or not info.num_samples:
        return None
    frames = last_frames(flac, info)
    if not frames:
        return 0 if flac.size < _TAIL else None
    # a frame that the cut goes through counts as whole by its header, so the end may be the total's
    if frames[0].end < info.num_samples:
        return frames[0].start
    return None


def _frame(tail: bytes, at: int, info: StreamInfo) -> LastFrame | None:
    """The frame whose header is at `at`, if its fields are lawful and its CRC-8 is right."""
    head = tail[at : at + 16]
    if len(head) < 6 or head[1] & 0xFE != 0xF8 or head[3] & 1:
        return None
    size_code, rate_code, channels, bits = head[2] >> 4, head[2] & 15, head[3] >> 4, head[3] >> 1 & 7
    if size_code == 0 or rate_code == 15 or channels > 10 or bits == 3:
        return None
    number, place = _coded_number(head)
    if number is None:
        return None
    if size_code in (6, 7):
        block = int.from_bytes(head[place : place + size_code - 5]) + 1
        place += size_code - 5
    else:
        block = _BLOCK_SIZES[size_code]
    place += {12: 1, 13: 2, 14: 2}.get(rate_code, 0)
    if place >= len(head):
        return None
    crc = 0
    for byte in head[:place]:
        crc = _CRC8[crc ^ byte]
    if crc != head[place]:
        return None
    start = number if head[1] & 1 else number * info.block_size
    return LastFrame(start, start + block)


def _coded_number(head: bytes) -> tuple[int | None, int]:
    """The frame or sample number, coded like UTF-8 in up to seven bytes, and where the header goes on."""
    first = head[4]
    if first < 0x80:
        return first, 5
    length = 0
    while length < 8 and first << length & 0x80:
        length += 1
    if length < 2 or length > 7 or len(head) < 4 + length:
        return None, 0
    number = first & (1 << (7 - length)) - 1 if length < 7 else 0
    for byte in head[5 : 4 + length]:
        if byte & 0xC0 != 0x80:
            return None, 0
        number = number << 6 | byte & 0x3F
    return number, 4 + length
