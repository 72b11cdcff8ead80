"""FFmpeg, through PyAV, as a reader: MP4, Matroska, ADTS, ASF and all that libsndfile does not read."""

from collections.abc import Iterator

import av
import numpy as np
from av.codec.context import Flags2
from av.error import FFmpegError, PatchWelcomeError
from numpy.typing import NDArray

from . import format_chunks
from .entries import AudioError
from .format_bytes import Part
from .format_soundfile import early_end
from .sniff import AudioFormat

# containers whose header states the length in samples: fewer were cut off
_STATED = frozenset({"ape", "wavpack", "tta", "tak", "musepack8", "dsf", "caf-ffmpeg", "sox"})
_STRICT = {"err_detect": "crccheck+explode"}  # checksums, where a codec has any, are compared
_CHECKED = frozenset({"mpegts", "ogg-ffmpeg", "flac-ffmpeg"})  # "not whole" may be a checksum's or a counter's word


class PyavReader:
    """Blocks `[n, C]` of one file under a forced demuxer: FFmpeg follows no names and no links."""

    def __init__(self, audio: Part, format: AudioFormat) -> None:
        self.needed = 0  # FFmpeg decodes packet by packet, whatever is wanted
        self._audio, self._format = audio, format
        self._position = 0
        audio.seek(0)
        try:
            self._container = av.open(audio, mode="r", format=format.demuxer, metadata_errors="replace")
        except (FFmpegError, ValueError) as error:
            raise self._failure(f"FFmpeg cannot read this {format.name}", error) from error
        try:
            self._open_track()
        except BaseException:
            self._container.close()
            raise

    def _open_track(self) -> None:
        name = self._format.name
        self._stream = next(iter(self._container.streams.audio), None)
        if self._stream is None:
            raise AudioError("no-samples", f"the {name} holds no audio track")
        context = self._stream.codec_context
        if context is None:
            raise AudioError("unsupported", f"the audio track of this {name} has a codec that FFmpeg cannot decode")
        assert isinstance(context, av.AudioCodecContext)
        self._codec = _better_decoder(self._format, context)
        if name == "caf-ffmpeg" and context.name == "alac":
            self._codec.flags2 |= Flags2.skip_manual  # FFmpeg would cut the padding of the last packet off twice
        self._codec.options = _STRICT
        self._skip = _left_of_pre_skip(name, context)
        self._frames = self._decoded()
        self._first = next(self._frames, None)  # what a header says of AAC may be half its rate and channels
        if self._first is None:
            if format_chunks.is_cut(name, self._audio) or (name in _STATED and self._stream.duration):
                raise AudioError("truncated", f"the {name} ends before its first sample")
            raise AudioError("no-samples", f"the audio track of this {name} is empty")
        self.sample_rate = self._first.sample_rate
        self.num_channels = len(self._first.layout.channels)  # the most so far
        duration, unit = self._stream.duration, self._stream.time_base
        self._in_header = round(duration * unit * self.sample_rate) if duration and unit else None
        self._stated = self._in_header if name in _STATED else None

    @property
    def num_samples(self) -> int | None:
        """The track's own length, without what the encoder added (ISO 14496-12 edit lists); None: only counting tells.

        Edit lists count in milliseconds or so, and may round up past the last packet.
        """
        if not self._in_header or not self._format.exact_length or format_chunks.is_fragmented(self._audio):
            return None
        return min(self._in_header, self._index_end() or self._in_header)

    def _index_end(self) -> int | None:
        """The sample behind the last packet of the track, or None if it cannot be reached."""
        end = None
        try:
            with av.open(
                self._audio.part(0), mode="r", format=self._format.demuxer, metadata_errors="replace"
            ) as again:
                track = again.streams.audio[0]
                again.seek(track.duration or 0, stream=track)
                for packet in again.demux(track):
                    if packet.pts is not None and packet.duration and packet.time_base:
                        end = round((packet.pts + packet.duration) * packet.time_base * self.sample_rate)
        except (FFmpegError, ValueError):
            return None  # cut short: decoding tells
        return end

    def seek_near(self, sample: int) -> int:
        """Reading always begins at the first sample: nothing here seeks to the sample."""
        del sample
        return 0

    def blocks(self) -> Iterator[NDArray[np.float32]]:
        shape, to_float = None, av.AudioResampler(format="flt")
        while self._first is not None:
            frame = self._first
            if frame.sample_rate != self.sample_rate:
                raise AudioError(
                    "unsupported",
                    f"the sample rate changes inside the recording, from {self.sample_rate:,} to "
                    f"{frame.sample_rate:,} Hz after {self._position:,} samples",
                )
            if shape != (frame.format.name, frame.layout.name):
                shape = (frame.format.name, frame.layout.name)
                to_float = av.AudioResampler(format="flt")  # packed: PyAV cannot hand over more than 8 planes
            num_channels = len(frame.layout.channels)
            self.num_channels = max(self.num_channels, num_channels)
            for packed in to_float.resample(frame):
                block = packed.to_ndarray().reshape(-1, num_channels).astype(np.float32, copy=False)
                block, self._skip = block[self._skip :], max(0, self._skip - len(block))
                self._position += len(block)
                yield block
            self._first = next(self._frames, None)
        if self._stated is not None and self._position < self._stated:
            raise early_end(self._stated, self._position, cut=True)

    def early_end(self, promised: int) -> AudioError:
        """The error for a recording that gave fewer samples than `promised`."""
        return early_end(promised, self._position, cut=format_chunks.is_cut(self._format.name, self._audio))

    def close(self) -> None:
        self._container.close()

    def _decoded(self) -> Iterator[av.AudioFrame]:
        try:
            for packet in self._container.demux(self._stream):
                if packet.is_corrupt:
                    raise self._failure("a packet is not whole", None)
                for frame in self._codec.decode(packet if packet.size else None):
                    assert isinstance(frame, av.AudioFrame)
                    self._require_no_gap(frame)
                    yield frame
        except (FFmpegError, ValueError) as error:
            raise self._failure("decoding failed", error) from error

    def _require_no_gap(self, frame: av.AudioFrame) -> None:
        """FFmpeg drops damaged FLAC frames without a word; the times of those that follow tell."""
        if self._format.name == "flac-ffmpeg" and frame.pts is not None and frame.time_base is not None:
            expected, found = self._position, round(frame.pts * frame.time_base * frame.sample_rate)
            if expected != found:
                raise AudioError("corrupt", f"frames between samples {expected:,} and {found:,} are damaged")

    def _failure(self, what: str, error: Exception | None) -> AudioError:
        reason = f": {_reason(error)}" if error else ""
        not_whole = error is None and self._format.name not in _CHECKED
        if not_whole or format_chunks.is_cut(self._format.name, self._audio):
            return AudioError("truncated", f"the file ends before what its header promises ({what}{reason})")
        kind = "unsupported" if isinstance(error, PatchWelcomeError) else "corrupt"
        return AudioError(kind, f"{what} after {self._position:,} samples{reason}")


def _left_of_pre_skip(name: str, context: av.CodecContext) -> int:
    """Samples of Opus's pre-skip (48 kHz) that FFmpeg leaves standing in Matroska.

    It takes CodecDelay, which it reads in units of the track's sampling rate; OpusHead (RFC 7845) knows better.
    """
    if name != "webm" or context.name not in ("opus", "libopus") or (context.extradata or b"")[:8] != b"OpusHead":
        return 0
    assert context.extradata is not None
    return max(0, int.from_bytes(context.extradata[10:12], "little") - context.delay)


def _better_decoder(format: AudioFormat, context: av.AudioCodecContext) -> av.AudioCodecContext:
    if not format.decoder:
        return context
    better = av.CodecContext.create(format.decoder, "r")
    assert isinstance(better, av.AudioCodecContext)
    better.sample_rate, better.layout = context.sample_rate, "mono"  # AMR has one channel
    return better


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
