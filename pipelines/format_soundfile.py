"""libsndfile as a reader: WAV, FLAC, tagged MP3, Ogg, AIFF and their kin."""

import io
import os
from collections.abc import Iterator

import numpy as np
import soundfile
from numpy.typing import NDArray

from . import format_chunks, format_flac, format_mpeg
from .entries import AudioError
from .format_bytes import Part
from .sniff import AudioFormat

BLOCK_FRAMES = 1 << 17  # sample frames decoded at a time
_BUFFER_BYTES = 1 << 16  # mpg123 reads a few bytes at a time
_UNKNOWN_LENGTH = 1 << 48  # samples
_SEEKABLE_CODECS = ("PCM_", "FLOAT", "DOUBLE", "ULAW", "ALAW")  # where a seek is sample-exact, FLAC besides
_BLOCK_CODECS = ("IMA_ADPCM", "MS_ADPCM", "GSM610", "G721", "NMS_ADPCM")


class SoundfileReader:
    """Blocks `[n, C]` of one file. `needed` says how many samples the user still wants: no more are decoded."""

    def __init__(self, audio: Part, format: AudioFormat) -> None:
        self.needed = BLOCK_FRAMES
        self._format = format
        if format.name == "flac":
            info = format_flac.stream_info(audio)
            if info and format_flac.goes_on_behind_total(audio, info):
                audio = format_flac.without_total(audio, info)
        if format.name == "wav" and (place := format_chunks.unclosed_wav(audio)) is not None:
            audio = audio.part(0, patch=(place, b"\xff" * 4))
        self._audio = audio
        self._position = 0
        fd = audio.whole_descriptor
        if fd is not None:
            os.lseek(fd, 0, os.SEEK_SET)
        else:
            audio.seek(0)
        try:
            self._sound = soundfile.SoundFile(
                io.BufferedReader(audio, _BUFFER_BYTES) if fd is None else fd, closefd=False
            )
        except soundfile.LibsndfileError as error:
            reason = error.error_string
            if reason.startswith("File does not exist"):  # the file is open: mpg123 found nothing in it to decode
                reason = "no frame can be decoded"
            raise AudioError("corrupt", f"libsndfile cannot read this {format.name}: {reason}") from error
        subtype = self._sound.subtype
        self._seekable = self._sound.seekable() and (format.name == "flac" or subtype.startswith(_SEEKABLE_CODECS))
        # python-soundfile seeks after every read and never reads past the length it was promised; a seek makes MP3
        # lose its bit reservoir and so glitch, and for a stream without a length the promise is wrong
        self._sound.seekable = lambda: False
        self.sample_rate = self._sound.samplerate
        self.num_channels = self._sound.channels
        # MPEG frames are estimated without a tag, and a streamed FLAC has a length of 2^63 - 1: None, count them
        exact = format.exact_length and not (format.name == "wav" and "MPEG" in subtype)
        self.num_samples = self._sound.frames if exact and self._sound.frames < _UNKNOWN_LENGTH else None
        if format.name == "wav" and self.num_samples and subtype.startswith(_BLOCK_CODECS):
            self.num_samples = format_chunks.fact_samples(audio, self.num_samples)

    def seek_near(self, sample: int) -> int:
        """Move to `sample` where that is exact; the sample that reading will begin at."""
        if sample == 0 or not self._seekable:
            return 0
        try:
            self._position = self._sound.seek(sample)
        except soundfile.LibsndfileError as error:
            raise self._failure(f"cannot seek to sample {sample:,}", error, sample) from error
        return self._position

    def blocks(self) -> Iterator[NDArray[np.float32]]:
        while True:
            wanted = min(BLOCK_FRAMES, self.needed)  # no further than asked: damage behind a span must not reach it
            try:
                block = self._sound.read(wanted, dtype="float32", always_2d=True)
            except soundfile.LibsndfileError as error:
                raise self._failure("decoding failed", error, self._position + wanted) from error
            if len(block) == 0:
                return
            self._position += len(block)
            yield block.astype(np.float32, copy=False)

    def early_end(self, promised: int) -> AudioError:
        """The error for a recording that gave fewer samples than `promised`."""
        if self._format.name == "flac":
            cut = format_flac.cut_at(self._audio) is not None
        elif self._format.name == "mp3":
            cut = format_mpeg.is_cut(self._audio)
        else:
            cut = format_chunks.is_cut(self._format.name, self._audio)
        return early_end(promised, self._position, cut=cut)

    def close(self) -> None:
        self._sound.close()

    def _failure(self, what: str, error: soundfile.LibsndfileError, end: int) -> AudioError:
        """`end` is the sample that was to be reached: where a cut lies before it, the cut is the reason."""
        cut_at = format_flac.cut_at(self._audio) if self._format.name == "flac" else None
        if cut_at is not None and end > cut_at:
            return AudioError(
                "truncated", f"the file ends in the middle: its last frame begins with sample {cut_at:,}, more follow"
            )
        return AudioError("corrupt", f"{what}: {error.error_string}")


def early_end(promised: int, found: int, *, cut: bool) -> AudioError:
    """The error for a recording that gave fewer samples than promised, with and without an end that is cut off."""
    if cut:
        return AudioError(
            "truncated", f"the header promises {promised:,} samples or more, decoding ended after {found:,}"
        )
    return AudioError(
        "length-mismatch",
        f"the header promises {promised:,} samples or more and the file is whole, but decoding gives {found:,}",
    )
