"""Audio from an open file: what it is, how long it is, and the samples of spans of it.

Runs in a decoder's child process, so nothing here imports torch. Bad audio is an `AudioError`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import pairwise
from typing import BinaryIO, Protocol

import numpy as np
from numpy.typing import NDArray

from . import format_chunks, format_mpeg, format_ogg
from .entries import AudioError
from .format_bytes import Part
from .format_pyav import PyavReader
from .format_soundfile import SoundfileReader, early_end
from .sniff import FORMATS, SNIFF_BYTES, AudioFormat, describe, sniff

DECODER_VERSION = "mix-mean/2"
SEEKABLE_FORMATS = frozenset({"wav", "flac", "aiff", "au", "w64"})  # a span can be reached past damage before it
MIX = -1  # as a channel: the mean of all
_MAX_TAGS = 16  # ID3v2 tags one behind the other
_SAMPLE_BYTES = 2  # of decoded audio, for the expansion: int16


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a recording may be; beyond it is an error before anything of that size is allocated."""

    max_bytes: int = 64 * 10**9
    max_channels: int = 64
    min_sample_rate: int = 4_000  # Hz
    max_sample_rate: int = 768_000  # Hz
    max_duration_s: float = 100 * 3600
    max_expansion: float = 10_000  # decoded bytes, as int16, for each byte of the file; silent FLAC reaches 2,000


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """What a recording is."""

    format: str  # a key of `sniff.FORMATS`
    size_bytes: int
    sample_rate: int  # Hz
    num_channels: int
    num_samples: int  # per channel; decoding gives exactly as many, or ends in an error


@dataclass(frozen=True, slots=True)
class Span:
    """Part of a recording, in samples at its own rate, and the channels wanted of it (`MIX`: their mean)."""

    start_sample: int
    num_samples: int
    channels: tuple[int, ...] = (MIX,)


class _Reader(Protocol):
    """A pass over one recording."""

    needed: int
    sample_rate: int
    num_channels: int

    @property
    def num_samples(self) -> int | None: ...
    def seek_near(self, sample: int) -> int: ...
    def blocks(self) -> Iterator[NDArray[np.float32]]: ...
    def early_end(self, promised: int) -> AudioError: ...
    def close(self) -> None: ...


def identify(file: BinaryIO) -> AudioFormat:
    """The format that a file's first bytes show, ID3 tags skipped; the file is left rewound.

    Raises `AudioError`: "empty", "not-audio", "unreadable".
    """
    return _locate(file)[0]


def probe(file: BinaryIO, size: int, limits: Limits, *, on_progress: Callable[[], None] = lambda: None) -> Probe:
    """What a recording of `size` bytes is. Where no header says the exact length, the audio is decoded to count it.

    `on_progress` is called now and then. Raises `AudioError`.
    """
    _require(size <= limits.max_bytes, "it has {:,} bytes", size, limits.max_bytes, "--max-bytes")
    format, place = _locate(file)
    audio = Part(file, place, size - place)
    format = _refined(format, audio, on_progress)
    if format.name != "mp4":  # its index is read first, so that windows before the cut can be had
        _require_whole(format, audio)
    try:
        return _measured(audio, size, format, limits, on_progress)
    except AudioError as error:
        if not format.fallback or error.kind != "corrupt":
            raise
        try:
            return _measured(audio, size, FORMATS[format.fallback], limits, on_progress)
        except AudioError:
            raise error from None


def decode(
    file: BinaryIO, size: int, *, format: str, spans: Sequence[Span]
) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Samples of ascending spans that do not overlap, from one pass: span index and float32 `[n, channels]`.

    `format` is the one that `probe` found. Pieces come in order and add up to each span's length. A channel that the
    recording does not have (at this place) is silence. Raises `AudioError` where nothing further can be read.
    """
    assert all(one.start_sample + one.num_samples <= other.start_sample for one, other in pairwise(spans))
    known = FORMATS.get(format)
    if known is None:
        raise AudioError("unsupported", f"the format {format!r} is none that this version reads")
    _, place = _locate(file)
    with closing(_reader(Part(file, place, size - place), known)) as reader:
        cutter = _Cutter(reader)
        for index, span in enumerate(spans):
            for piece_NC in cutter.cut(span):
                yield index, piece_NC


def _locate(file: BinaryIO) -> tuple[AudioFormat, int]:
    """The format and the byte it begins with, behind ID3v2 tags and the zeros that pad them."""
    try:
        file.seek(0)
        first = head = file.read(SNIFF_BYTES)
        place = 0
        for _ in range(_MAX_TAGS):
            tag = format_mpeg.id3_size(head)
            zeros = len(head) - len(head.lstrip(b"\0")) if place else 0
            if not tag and not zeros:
                break
            place += tag or zeros
            file.seek(place)
            head = file.read(SNIFF_BYTES)
        file.seek(0)
    except OSError as error:
        raise AudioError("unreadable", f"the file cannot be read: {error.strerror or error}") from error
    found = sniff(head)
    if found is None:
        raise AudioError("empty" if not first else "not-audio", f"this is {describe(first)}")
    return found, place


def _refined(format: AudioFormat, audio: Part, on_progress: Callable[[], None]) -> AudioFormat:
    """The format after a closer look than the first bytes allow."""
    if format.name == "ogg":
        links = format_ogg.scan(audio, on_progress)
        if not any(link.has_audio for link in links):
            raise AudioError("no-samples", "the Ogg file holds no stream of audio")
        if len(links) > 1:
            return FORMATS["ogg-chained"]
        return format if links[0].simple else FORMATS["ogg-ffmpeg"]
    if format.name == "mp3":
        if len(format_mpeg.links(audio)) > 1:
            return FORMATS["mp3-chained"]
        if format_mpeg.goes_on_behind_tag(audio):
            return FORMATS["mp3-untagged"]
    return format


def _require_whole(format: AudioFormat, audio: Part) -> None:
    if format.name in ("aac", "mp3-untagged") and format_mpeg.ends_inside_frame(format.name, audio):
        raise AudioError("truncated", "the file ends in the middle of its last frame")
    found = format_chunks.promise(format.name, audio)
    if found and found.found < found.promised:
        raise AudioError(
            "truncated",
            f"the header promises {found.promised:,} bytes of samples, the file has {max(0, found.found):,}",
        )


def _measured(audio: Part, size: int, format: AudioFormat, limits: Limits, on_progress: Callable[[], None]) -> Probe:
    with closing(_reader(audio, format)) as reader:
        _require_sane(reader, limits)
        num_samples = reader.num_samples
        if num_samples is None:
            num_samples = 0
            for block_NC in reader.blocks():
                num_samples += len(block_NC)
                _require_bounded(reader, num_samples, size, limits)
                on_progress()
            _require_sane(reader, limits)  # channels may have come in between
        if num_samples <= 0:
            raise AudioError("no-samples", f"the {format.name} header is there, but no samples follow it")
        _require_bounded(reader, num_samples, size, limits)
        return Probe(
            format=format.name,
            size_bytes=size,
            sample_rate=reader.sample_rate,
            num_channels=reader.num_channels,
            num_samples=num_samples,
        )


def _reader(audio: Part, format: AudioFormat) -> _Reader:
    if format.name == "ogg-chained":
        links = [
            (audio.part(link.start, link.end - link.start), FORMATS["ogg" if link.simple else "ogg-ffmpeg"])
            for link in format_ogg.scan(audio)
            if link.has_audio
        ]
        return _ChainReader(links)
    if format.name == "mp3-chained":
        return _ChainReader(
            [
                (audio.part(start, end - start), FORMATS["mp3" if tagged else "mp3-untagged"])
                for start, end, tagged in format_mpeg.links(audio)
            ]
        )
    return SoundfileReader(audio, format) if format.backend == "soundfile" else PyavReader(audio, format)


class _ChainReader:
    """Recordings one behind the other in a file: the links of a chained Ogg, MP3 files put together."""

    def __init__(self, links: list[tuple[Part, AudioFormat]]) -> None:
        self.needed = 0
        self._links = links
        self._position = 0
        self.num_samples: int | None = None
        with closing(_reader(*self._links[0])) as first:
            self.sample_rate, self.num_channels = first.sample_rate, first.num_channels

    def seek_near(self, sample: int) -> int:
        """Reading always begins at the first sample."""
        del sample
        return 0

    def blocks(self) -> Iterator[NDArray[np.float32]]:
        for number, (audio, format) in enumerate(self._links, start=1):
            with closing(_reader(audio, format)) as link:
                if link.sample_rate != self.sample_rate:
                    raise AudioError(
                        "unsupported",
                        f"part {number} of the file has {link.sample_rate:,} Hz, the first has {self.sample_rate:,} Hz",
                    )
                self.num_channels = max(self.num_channels, link.num_channels)
                begin = self._position
                for block_NC in link.blocks():
                    self._position += len(block_NC)
                    yield block_NC
                if link.num_samples is not None and self._position < begin + link.num_samples:
                    raise link.early_end(link.num_samples)

    def early_end(self, promised: int) -> AudioError:
        """The error for a recording that gave fewer samples than `promised`."""
        return early_end(promised, self._position, cut=False)

    def close(self) -> None:
        """Each link is closed behind its last block."""


class _Cutter:
    """Pieces of ascending spans from one pass over a reader's blocks."""

    def __init__(self, reader: _Reader) -> None:
        self._reader = reader
        self._blocks: Iterator[NDArray[np.float32]] | None = None
        self._begin = 0  # sample at which `_block` begins
        self._block = np.empty((0, 1), dtype=np.float32)

    def cut(self, span: Span) -> Iterator[NDArray[np.float32]]:
        end = span.start_sample + span.num_samples
        if self._blocks is None:
            self._begin = self._reader.seek_near(span.start_sample)
            self._blocks = self._reader.blocks()
        position = span.start_sample
        while position < end:
            if self._begin + len(self._block) <= position:
                self._begin += len(self._block)
                self._reader.needed = end - self._begin
                block = next(self._blocks, None)
                if block is None:
                    raise self._reader.early_end(end)
                self._block = block
                continue
            part = self._block[position - self._begin : end - self._begin]
            position += len(part)
            yield _channels(part, span.channels)


def _channels(block_NC: NDArray[np.float32], channels: tuple[int, ...]) -> NDArray[np.float32]:
    """The wanted channels of a block, in their order."""
    num_channels = block_NC.shape[1]
    if num_channels == 1 and channels in ((MIX,), (0,)):
        return block_NC
    wanted = np.zeros((len(block_NC), len(channels)), dtype=np.float32)
    for column, channel in enumerate(channels):
        if channel == MIX:
            wanted[:, column] = block_NC.mean(axis=1, dtype=np.float32) if num_channels > 1 else block_NC[:, 0]
        elif channel < num_channels:
            wanted[:, column] = block_NC[:, channel]
    return wanted


def _require_sane(reader: _Reader, limits: Limits) -> None:
    if not limits.min_sample_rate <= reader.sample_rate <= limits.max_sample_rate:
        raise AudioError(
            "unsupported",
            f"the sample rate is {reader.sample_rate:,} Hz; accepted are {limits.min_sample_rate:,} to "
            f"{limits.max_sample_rate:,} Hz (--min-sample-rate, --max-sample-rate)",
        )
    if not 1 <= reader.num_channels <= limits.max_channels:
        raise AudioError(
            "unsupported",
            f"there are {reader.num_channels:,} channels; accepted are 1 to {limits.max_channels:,} (--max-channels)",
        )


def _require_bounded(reader: _Reader, num_samples: int, size: int, limits: Limits) -> None:
    seconds = num_samples / reader.sample_rate
    _require(
        seconds <= limits.max_duration_s, "it lasts {:,.0f} seconds", seconds, limits.max_duration_s, "--max-recording"
    )
    expansion = num_samples * reader.num_channels * _SAMPLE_BYTES / max(1, size)
    _require(
        expansion <= limits.max_expansion,
        "each byte of it becomes {:,.0f} bytes of samples",
        expansion,
        limits.max_expansion,
        "--max-expansion",
    )


def _require(holds: bool, found: str, value: float, limit: float, option: str) -> None:
    if not holds:
        raise AudioError("too-large", f"{found.format(value)}; accepted are up to {limit:,} ({option} raises it)")
