"""Ogg (RFC 3533): every page's checksum and number, the links of a chain and the streams in each. A leaf."""

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from .entries import AudioError
from .format_bytes import Part

_HEADER = 27
_FIRST, _LAST = 2, 4  # flags
_MAX_PAGE = _HEADER + 255 + 255 * 255
_READ = 1 << 20
_MIRRORED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))
_CODECS = (
    (b"\x01vorbis", "vorbis"),
    (b"OpusHead", "opus"),
    (b"\x7fFLAC", "flac"),
    (b"Speex   ", "speex"),
    (b"fLaC", "flac"),
)
_SOUNDFILE_CODECS = frozenset({"vorbis", "opus"})


@dataclass(slots=True)
class Stream:
    """One logical stream: its codec ("" if it is no audio) and how far it has been seen."""

    codec: str
    sequence: int  # of the page seen last
    ended: bool
    begun: bool = False  # more than the first page was seen


@dataclass(slots=True)
class Link:
    """A link of a chain: pages from `start` up to `end`, bytes."""

    start: int
    end: int
    streams: dict[int, Stream] = field(default_factory=dict)

    @property
    def simple(self) -> bool:
        """Whether libsndfile reads it: one stream, of a codec it has."""
        return [stream.codec in _SOUNDFILE_CODECS for stream in self.streams.values()] == [True]

    @property
    def has_audio(self) -> bool:
        return any(stream.codec for stream in self.streams.values())


def checksum(page: bytes) -> int:
    """Ogg's CRC-32: the usual polynomial, but bits run the other way, and neither begins nor ends inverted."""
    mirrored = zlib.crc32(page.translate(_MIRRORED), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int.from_bytes(mirrored.to_bytes(4).translate(_MIRRORED)[::-1])


def scan(ogg: Part, on_progress: Callable[[], None] = lambda: None) -> list[Link]:
    """The links of a file, every page of it checked.

    What follows the last stream's end and is no page is passed over. Raises `AudioError`: "corrupt" for a page whose
    checksum or number is wrong, or what is no page in between; "truncated" for a stream whose end is missing. Opus
    alone may lack it: its streams are recorded from the air, and RFC 7845 wants them read as far as they go.
    """
    links: list[Link] = []
    for place, page, missing in _pages(ogg, on_progress):
        if missing:
            break
        _check(links, place, page)
        links[-1].end = place + len(page)
    if not links:
        raise AudioError("truncated", "the Ogg file ends inside its first page")
    for link in links:
        if any(not stream.ended and stream.codec not in ("", "opus") for stream in link.streams.values()):
            raise AudioError("truncated", "the Ogg stream has no end: its last page is missing")
    return links


def _check(links: list[Link], place: int, page: bytes) -> None:
    if checksum(page[:22] + bytes(4) + page[26:]) != int.from_bytes(page[22:26], "little"):
        raise AudioError("corrupt", f"the Ogg page at byte {place:,} does not match its checksum")
    flags = page[5]
    serial, sequence = (int.from_bytes(page[at : at + 4], "little") for at in (14, 18))
    if flags & _FIRST:
        # first pages of one link come together
        if not links or any(stream.begun or stream.ended for stream in links[-1].streams.values()):
            links.append(Link(place, place))
        links[-1].streams[serial] = Stream(_codec(page), sequence, bool(flags & _LAST))
        return
    stream = links[-1].streams.get(serial) if links else None
    if stream is None:
        raise AudioError("corrupt", f"the Ogg page at byte {place:,} belongs to no stream: pages before it are missing")
    if sequence != (stream.sequence + 1) % (1 << 32) and stream.codec:
        raise AudioError("corrupt", f"pages are missing before byte {place:,} of the Ogg file")
    stream.sequence, stream.begun = sequence, True
    stream.ended = stream.ended or bool(flags & _LAST)


def _codec(page: bytes) -> str:
    body = page[_HEADER + page[26] :]
    return next((codec for magic, codec in _CODECS if body.startswith(magic)), "")


def _pages(ogg: Part, on_progress: Callable[[], None]) -> Iterator[tuple[int, bytes, bool]]:
    """Every page with its place; the last is marked where it is cut off. Raises `AudioError` for what is no page."""
    place, buffer, begin, ended = 0, b"", 0, False  # `buffer` begins at byte `begin`
    while place < ogg.size:
        if place + _MAX_PAGE > begin + len(buffer) and begin + len(buffer) < ogg.size:
            on_progress()
            begin, buffer = place, ogg.at(place, _READ)
        at = place - begin
        head = buffer[at : at + _HEADER]
        if head[:4] != b"OggS"[: len(head)]:
            if ended and buffer.find(b"OggS", at) < 0:
                return  # tags and padding behind the end
            raise AudioError("corrupt", f"there is no Ogg page at byte {place:,}, where one should begin")
        if len(head) < _HEADER:
            yield place, head, True
            return
        size = _HEADER + head[26] + sum(buffer[at + _HEADER : at + _HEADER + head[26]])
        page = buffer[at : at + size]
        cut = len(page) < size or at + _HEADER + head[26] > len(buffer)
        yield place, page, cut
        if cut:
            return
        ended = bool(head[5] & _LAST)
        place += size
