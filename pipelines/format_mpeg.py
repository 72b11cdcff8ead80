"""MPEG audio (ISO 11172-3, 13818-3) and ADTS: frame headers, and what a Xing, Info or LAME tag states. A leaf."""

from collections.abc import Callable
from dataclasses import dataclass

from .format_bytes import Part

_RATES = (44_100, 48_000, 32_000)  # MPEG-1; half of it for MPEG-2, a quarter for 2.5
_KBITS_1 = (
    (32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),  # layer I
    (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
)
_KBITS_2 = (
    (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
)
_TAG_SEARCH = 256  # bytes of the first frame
_HAS_FRAMES, _HAS_BYTES = 1, 2
_HEAD = 4_096  # bytes looked at for a tag
_ID3V1_BYTES = 128
_MAX_LINKS = 10_000
_TAIL = 1 << 15  # bytes: three frames of any kind
_IN_A_ROW = 3  # frames that convince where a stream does not begin with one


@dataclass(frozen=True, slots=True)
class FrameHeader:
    """What four bytes say of a frame."""

    kind: tuple[int, int, int]  # version, layer, sample rate: the same throughout a stream
    size: int  # bytes; 0 for the free format, which does not say


def parse_header(head: bytes, at: int = 0) -> FrameHeader | None:
    """The frame header at a place, or None if there is none."""
    if len(head) < at + 4 or head[at] != 0xFF or head[at + 1] & 0xE0 != 0xE0:
        return None
    version, layer = head[at + 1] >> 3 & 3, 4 - (head[at + 1] >> 1 & 3)
    bitrate, rate, padding = head[at + 2] >> 4, head[at + 2] >> 2 & 3, head[at + 2] >> 1 & 1
    if version == 1 or layer == 4 or bitrate == 15 or rate == 3:
        return None
    sample_rate = _RATES[rate] >> (0 if version == 3 else 1 if version == 2 else 2)
    kind = (version, layer, sample_rate)
    if bitrate == 0:
        return FrameHeader(kind, 0)
    bits = 1_000 * (_KBITS_1 if version == 3 else _KBITS_2)[layer - 1][bitrate - 1]
    if layer == 1:
        return FrameHeader(kind, (12 * bits // sample_rate + padding) * 4)
    factor = 72 if layer == 3 and version != 3 else 144
    return FrameHeader(kind, factor * bits // sample_rate + padding)


def parse_adts(head: bytes, at: int = 0) -> FrameHeader | None:
    """The ADTS header (ISO 13818-7) at a place, or None if there is none."""
    if len(head) < at + 6 or head[at] != 0xFF or head[at + 1] & 0xF6 != 0xF0 or head[at + 2] >> 2 & 15 > 12:
        return None
    size = (head[at + 3] & 3) << 11 | head[at + 4] << 3 | head[at + 5] >> 5
    return FrameHeader((head[at + 1], 0, head[at + 2] >> 2 & 15), size) if size > 6 else None


def stream_start(head: bytes, parse: Callable[[bytes, int], FrameHeader | None] = parse_header) -> int | None:
    """Where the first of several frames in a row begins, for streams that were cut out of another; or None."""
    at = head.find(b"\xff")
    while at >= 0:
        place, found, first = at, 0, parse(head, at)
        while first and first.size and found < _IN_A_ROW:
            frame = parse(head, place)
            if frame is None or frame.kind != first.kind or not frame.size:
                break
            found += 1
            place += frame.size
        if found == _IN_A_ROW:
            return at
        at = head.find(b"\xff", at + 1)
    return None


def _tag_at(head: bytes) -> int:
    """Where the Xing or Info tag begins, or -1."""
    first = head[:_TAG_SEARCH]
    return max(first.find(b"Xing"), first.find(b"Info"))


def is_tagged(head: bytes) -> bool:
    """Whether the first frame states how many frames follow."""
    at = _tag_at(head)
    return at >= 0 and bool(int.from_bytes(head[at + 4 : at + 8]) & _HAS_FRAMES)


def stated_bytes(head: bytes) -> int | None:
    """The bytes from the first frame to the end of the last, as the tag states them."""
    at = _tag_at(head)
    flags = int.from_bytes(head[at + 4 : at + 8])
    if at < 0 or not flags & _HAS_BYTES:
        return None
    place = at + 8 + (4 if flags & _HAS_FRAMES else 0)
    return int.from_bytes(head[place : place + 4]) or None


def id3_size(head: bytes) -> int:
    """Bytes of the ID3v2 tag a file begins with; 0 if there is none."""
    if head[:3] != b"ID3" or len(head) < 10:
        return 0
    size = 0
    for byte in head[6:10]:
        size = size << 7 | byte & 0x7F
    return size + 10 + (10 if head[5] & 0x10 else 0)


def links(audio: Part) -> list[tuple[int, int, bool]]:
    """The files of which an MP3 with a tag is put together: begin, end and whether each has a tag.

    A file ends where its tag says so; that another begins is believed only of ID3 tags with frames behind them, or of
    frames with a tag of their own.
    """
    found, start = [], 0
    while len(found) < _MAX_LINKS:
        head = audio.at(start, _HEAD)
        stated = stated_bytes(head) if is_tagged(head) else None
        if stated is None or start + stated >= audio.size:
            break
        end = start + stated
        following, has_id3 = _behind_tags(audio, end)
        head = audio.at(following, _HEAD)
        if parse_header(head) is None or not (is_tagged(head) or (has_id3 and stream_start(head) == 0)):
            break
        found.append((start, end, True))
        start = following
    return [*found, (start, audio.size, is_tagged(audio.at(start, _HEAD)))]


def _behind_tags(audio: Part, place: int) -> tuple[int, bool]:
    """The first byte behind ID3 tags (v1 and v2) that begin at `place`, and whether there are any."""
    begin = place
    for _ in range(_MAX_LINKS):
        head = audio.at(place, 10)
        size = _ID3V1_BYTES if head[:3] == b"TAG" else id3_size(head)
        if not size:
            break
        place += size
    return place, place > begin


def goes_on_behind_tag(audio: Part) -> bool:
    """Whether frames of the same kind follow what the tag states: files put one behind the other, a wrong tag."""
    head = audio.at(0, _HEAD)
    first, stated = parse_header(head), stated_bytes(head)
    if first is None or stated is None or stated >= audio.size:
        return False
    behind = audio.at(stated, 1 << 16)
    at = stream_start(behind)
    return at is not None and (frame := parse_header(behind, at)) is not None and frame.kind == first.kind


def is_cut(audio: Part) -> bool:
    """Whether the file ends before what the tag states."""
    stated = stated_bytes(audio.at(0, _HEAD))
    return stated is None or audio.size < stated


def ends_inside_frame(name: str, audio: Part) -> bool:
    """Whether the last frame of a stream without any header of its own is not whole."""
    parse = parse_adts if name == "aac" else parse_header
    tail = audio.at(max(0, audio.size - _TAIL), _TAIL)
    place = stream_start(tail, parse)
    if place is None or (first := parse(tail, place)) is None:
        return False
    while (frame := parse(tail, place)) is not None and frame.kind == first.kind and frame.size:
        if place + frame.size > len(tail):
            return True
        place += frame.size
    return False
