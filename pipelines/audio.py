"""Audio files to mono waveforms: probing, decoding, mixing down; bad audio becomes an `AudioError`."""

import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import av
import numpy as np
import soundfile
import torch
from av.error import FFmpegError
from numpy.typing import NDArray
from torch import Tensor

from .resample import StreamResampler, can_resample
from .sniff import FORMATS, SNIFF_BYTES, AudioFormat, describe, id3_size, sniff

DECODER_VERSION = "mix-mean/1"
MIN_SAMPLE_RATE, MAX_SAMPLE_RATE = 4_000, 768_000  # Hz
MAX_CHANNELS = 64
SEEKABLE_FORMATS = frozenset({"wav", "flac", "aiff", "au", "w64"})  # a span can be reached past damage before it
_BLOCK_FRAMES = 1 << 17  # sample frames decoded at a time
_MAX_SAMPLE = 1e10  # full scale is 1; integers written as floats reach 2^31; past this, spectra overflow
_UNKNOWN_LENGTH = 1 << 48  # samples
_MAX_CHUNKS = 10_000  # of a RIFF file, before its samples
_STREAMED_WAV = 0x7FFF_0000  # data sizes from here up are what programs write that cannot seek back


class AudioError(Exception):
    """Audio that cannot be tokenized: a class for counting, a message for the person. Becomes a row."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind
        self.message = " ".join(message.split())[:300]


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """What a recording's header says."""

    format: AudioFormat
    size_bytes: int
    sample_rate: int  # Hz
    num_channels: int
    num_samples: int  # per channel


@dataclass(frozen=True, slots=True)
class Span:
    """Part of a recording, in samples at its own rate."""

    start_sample: int
    num_samples: int


def probe(path: str) -> Probe:
    """Read a file's header. Where the header does not say the exact length, the audio is decoded to count it.

    Raises `AudioError`.
    """
    with _open(path) as file:
        size = os.fstat(file.fileno()).st_size
        format = _identify(file)
        if format.name == "wav":
            _require_whole_wav(file, size)
    with closing(_reader(path, format)) as reader:
        _require_sane(reader.sample_rate, reader.num_channels)
        num_samples = reader.num_samples
        if num_samples is None:
            num_samples = sum(len(block) for block in reader.blocks())
        if num_samples <= 0:
            raise AudioError("no-samples", f"the {format.name} header is there, but no samples follow it")
        return Probe(
            format=format,
            size_bytes=size,
            sample_rate=reader.sample_rate,
            num_channels=reader.num_channels,
            num_samples=num_samples,
        )


def probe_format(path: str) -> AudioFormat:
    """The format that a file's first bytes show. Raises `AudioError` for one that is no audio or cannot be opened."""
    with _open(path) as file:
        return _identify(file)


def read_spans(
    path: str, *, format_name: str, size_bytes: int, spans: Iterable[Span], sample_rates: Iterable[int]
) -> Iterator["dict[int, Tensor] | AudioError"]:
    """Waveforms of ascending spans of one recording, each mixed down to mono and at each wanted sample rate.

    The file is decoded once, front to back, and only resampled audio is kept. Yields `{rate: float32 [N]}` per span,
    or its `AudioError` where only that span is bad. Raises `AudioError` where nothing further can be read.
    """
    with _open(path) as file:
        found = os.fstat(file.fileno()).st_size
    if found != size_bytes:
        raise AudioError("changed", f"the file had {size_bytes:,} bytes when the corpus was built, now {found:,}")
    rates = sorted(set(sample_rates))
    with closing(_reader(path, FORMATS[format_name])) as reader:
        for rate in rates:
            if not can_resample(reader.sample_rate, rate):
                raise AudioError(
                    "unsupported", f"{reader.sample_rate:,} Hz has no small whole-number ratio to {rate:,} Hz"
                )
        cutter = _Cutter(reader)
        for span in spans:
            sinks = {rate: StreamResampler(span.num_samples, reader.sample_rate, rate) for rate in rates}
            finite = True
            for piece_N in cutter.cut(span):
                finite = finite and bool((piece_N.abs() <= _MAX_SAMPLE).all())  # false for NaN, too
                for sink in sinks.values():
                    sink.push(piece_N)
            if finite:
                yield {rate: sink.finish() for rate, sink in sinks.items()}
            else:
                yield AudioError("non-finite", f"there are samples that are NaN, infinite or beyond {_MAX_SAMPLE:.0e}")


class _Cutter:
    """Mono pieces of ascending spans from one pass over a reader's blocks."""

    def __init__(self, reader: "_SoundfileReader | _AvReader") -> None:
        self._reader = reader
        self._blocks: Iterator[NDArray[np.float32]] | None = None
        self._begin = 0  # sample at which `_block` begins
        self._block = np.empty((0, 1), dtype=np.float32)

    def cut(self, span: Span) -> Iterator[Tensor]:
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
                    raise AudioError(
                        "truncated",
                        f"the header promises {end:,} samples or more, decoding ended after {self._begin:,}",
                    )
                self._block = block
                continue
            part = self._block[position - self._begin : end - self._begin]
            mono = np.ascontiguousarray(part.mean(axis=1, dtype=np.float32) if part.shape[1] > 1 else part[:, 0])
            position += len(mono)
            yield torch.from_numpy(mono)


class _SoundfileReader:
    """libsndfile: WAV, FLAC, MP3, Ogg and their kin."""

    def __init__(self, path: str, format: AudioFormat) -> None:
        self._file = _open(path)
        try:
            self._sound = soundfile.SoundFile(self._file.fileno(), closefd=False)
        except soundfile.LibsndfileError as error:
            self._file.close()
            # code 6 speaks of a missing file; with an open file it means that nothing in it could be decoded
            reason = "no frame can be decoded" if error.code == 6 else error.error_string
            raise AudioError("corrupt", f"libsndfile cannot read this {format.name}: {reason}") from error
        # where a seek is sample-exact
        self.needed = _BLOCK_FRAMES  # samples that the reader's user still wants
        self._seekable = self._sound.seekable() and (
            format.name == "flac" or self._sound.subtype.startswith(("PCM_", "FLOAT", "DOUBLE", "ULAW", "ALAW"))
        )
        # python-soundfile seeks after every read and never reads past the length it was promised; a seek makes MP3
        # lose its bit reservoir and so glitch, and for a stream without a length the promise is wrong
        self._sound.seekable = lambda: False
        self.sample_rate = self._sound.samplerate
        self.num_channels = self._sound.channels
        # MPEG frames are estimated without a tag, and a streamed FLAC has a length of 2^63 - 1: None, count them
        exact = format.exact_length and not (format.name == "wav" and "MPEG" in self._sound.subtype)
        self.num_samples = self._sound.frames if exact and self._sound.frames < _UNKNOWN_LENGTH else None

    def seek_near(self, sample: int) -> int:
        """Move to `sample` where that is exact; the sample that reading will begin at."""
        if sample == 0 or not self._seekable:
            return 0
        try:
            return self._sound.seek(sample)
        except soundfile.LibsndfileError as error:
            raise AudioError("corrupt", f"cannot seek to sample {sample:,}: {error.error_string}") from error

    def blocks(self) -> Iterator[NDArray[np.float32]]:
        while True:
            try:
                # no further than asked: damage behind a span must not reach it
                block = self._sound.read(min(_BLOCK_FRAMES, self.needed), dtype="float32", always_2d=True)
            except soundfile.LibsndfileError as error:
                raise AudioError("corrupt", f"decoding failed: {error.error_string}") from error
            if len(block) == 0:
                return
            yield block.astype(np.float32, copy=False)

    def close(self) -> None:
        self._sound.close()
        self._file.close()


class _AvReader:
    """FFmpeg through PyAV: MP4/M4A, WebM, ADTS. Reads from an open file under a forced demuxer: no names, no links."""

    def __init__(self, path: str, format: AudioFormat) -> None:
        self.needed = 0  # FFmpeg decodes packet by packet whatever is wanted
        self._file = _open(path)
        try:
            self._container = av.open(self._file, mode="r", format=format.demuxer, metadata_errors="replace")
            self._stream = next(iter(self._container.streams.audio), None)
        except (FFmpegError, ValueError) as error:
            self._file.close()
            raise AudioError("corrupt", f"FFmpeg cannot read this {format.name}: {_reason(error)}") from error
        if self._stream is None:
            self.close()
            raise AudioError("no-samples", f"the {format.name} holds no audio track")
        context = self._stream.codec_context
        if context is None:
            self.close()
            raise AudioError(
                "unsupported", f"the audio track of this {format.name} has a codec that FFmpeg cannot decode"
            )
        self.sample_rate = context.sample_rate or 0
        self.num_channels = context.channels or 0
        self.num_samples = None
        if format.exact_length and self._stream.duration and self._stream.time_base and not _is_fragmented(self._file):
            # the track's own length: padding that the encoder added is cut away (ISO 14496-12 edit lists)
            self.num_samples = round(self._stream.duration * self._stream.time_base * self.sample_rate)

    def seek_near(self, sample: int) -> int:
        del sample
        return 0

    def blocks(self) -> Iterator[NDArray[np.float32]]:
        to_float = av.AudioResampler(format="flt")  # packed: PyAV cannot hand over more than 8 planes
        try:
            for frame in self._container.decode(self._stream):
                assert isinstance(frame, av.AudioFrame)
                if frame.sample_rate != self.sample_rate or len(frame.layout.channels) != self.num_channels:
                    raise AudioError("unsupported", "the sample rate or the channels change inside the file")
                for packed in to_float.resample(frame):
                    yield packed.to_ndarray().reshape(-1, self.num_channels).astype(np.float32, copy=False)
        except (FFmpegError, ValueError) as error:
            raise AudioError("corrupt", f"decoding failed: {_reason(error)}") from error

    def close(self) -> None:
        self._container.close()
        self._file.close()


def _reader(path: str, format: AudioFormat) -> _SoundfileReader | _AvReader:
    return _SoundfileReader(path, format) if format.backend == "soundfile" else _AvReader(path, format)


def _open(path: str) -> BinaryIO:
    """Open a regular file. A FIFO or a device would block for ever, so what it is is asked first."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise AudioError("not-a-file", "not a regular file")
        return Path(path).open("rb")
    except FileNotFoundError as error:
        raise AudioError("missing", "the file is not there") from error
    except (OSError, ValueError) as error:
        raise AudioError("unreadable", f"the file cannot be opened: {_reason(error)}") from error


def _identify(file: BinaryIO) -> AudioFormat:
    """The format that a file's first bytes show; the file is left rewound. Raises `AudioError` if it is no audio."""
    try:
        head = file.read(SNIFF_BYTES)
        tag = id3_size(head)
        if tag:
            file.seek(tag)
            behind_tag = file.read(SNIFF_BYTES).lstrip(b"\0")
            found = sniff(behind_tag)
        else:
            found = sniff(head)
        file.seek(0)
    except OSError as error:
        raise AudioError("unreadable", f"the file cannot be read: {_reason(error)}") from error
    if found is None:
        raise AudioError("empty" if not head else "not-audio", f"this is {describe(head)}")
    return found


def _require_whole_wav(file: BinaryIO, size: int) -> None:
    """Raise `AudioError` if the data chunk promises more than the file has: libsndfile would say nothing."""
    riff = file.read(12)
    order = "big" if riff[:4] == b"RIFX" else "little"
    if riff[:4] != b"RF64":
        for _ in range(_MAX_CHUNKS):
            header = file.read(8)
            if len(header) < 8:
                break
            chunk_size = int.from_bytes(header[4:], order)
            if header[:4] == b"data":
                rest = size - file.tell()
                if rest < chunk_size < _STREAMED_WAV:
                    raise AudioError(
                        "truncated",
                        f"the header promises {chunk_size:,} bytes of samples, the file has {rest:,}",
                    )
                break
            file.seek(chunk_size + chunk_size % 2, os.SEEK_CUR)
    file.seek(0)


def _is_fragmented(file: BinaryIO) -> bool:
    """Whether an MP4 is in fragments (ISO 14496-12 `moof`), whose index does not know the exact length."""
    place = file.tell()
    file.seek(0)
    try:
        while len(header := file.read(16)) >= 8:
            size = int.from_bytes(header[:4])
            if header[4:8] == b"moof":
                return True
            if size == 1:
                size = int.from_bytes(header[8:16])
            if size < 8:
                return False
            file.seek(size - len(header), os.SEEK_CUR)
        return False
    finally:
        file.seek(place)


def _require_sane(sample_rate: int, num_channels: int) -> None:
    if not MIN_SAMPLE_RATE <= sample_rate <= MAX_SAMPLE_RATE:
        raise AudioError(
            "unsupported",
            f"the sample rate is {sample_rate:,} Hz; accepted are {MIN_SAMPLE_RATE:,} to {MAX_SAMPLE_RATE:,} Hz",
        )
    if not 1 <= num_channels <= MAX_CHANNELS:
        raise AudioError("unsupported", f"there are {num_channels:,} channels; accepted are 1 to {MAX_CHANNELS}")


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
