"""What kind of audio a file is, by its first bytes and never by its name."""

from dataclasses import dataclass
from typing import Literal

SNIFF_BYTES = 4_096

Backend = Literal["soundfile", "pyav"]


@dataclass(frozen=True, slots=True)
class AudioFormat:
    """A container we read, who decodes it, and whether its header says how many samples decoding gives."""

    name: str
    backend: Backend
    demuxer: str = ""  # FFmpeg's name, forced on PyAV so that no playlist or script can pose as audio
    exact_length: bool = True


_SOUNDFILE = {
    name: AudioFormat(name, "soundfile") for name in ("wav", "flac", "ogg", "aiff", "au", "caf", "w64", "sphere")
}
FORMATS = {
    **_SOUNDFILE,
    "mp3": AudioFormat("mp3", "soundfile"),  # with a Xing or Info tag
    # libsndfile reads no further than its estimate
    "mp3-untagged": AudioFormat("mp3-untagged", "pyav", "mp3", exact_length=False),
    "mp4": AudioFormat("mp4", "pyav", "mp4"),
    "webm": AudioFormat("webm", "pyav", "matroska", exact_length=False),
    "aac": AudioFormat("aac", "pyav", "aac", exact_length=False),
}

# what people name audio files; in a folder, such a file is reported even if its content is no audio
AUDIO_SUFFIXES = frozenset(
    f".{suffix}"
    for line in (
        "wav wave rf64 w64 flac aif aiff aifc au snd caf sph",
        "mp1 mp2 mp3 ogg oga opus spx m4a mp4 aac webm mka",
        "wma asf ape wv tta amr ac3 gsm raw pcm",
    )
    for suffix in line.split()
)

_W64 = bytes.fromhex("726966662e91cf11a5d628db04c10000")


def sniff(head: bytes) -> AudioFormat | None:
    """The format of a file that begins with `head` (`SNIFF_BYTES` of it, ID3v2 tag skipped), or None."""
    if head[:4] in (b"RIFF", b"RIFX", b"RF64") and head[8:12] == b"WAVE":
        return FORMATS["wav"]
    if head[:4] == b"FORM" and head[8:12] in (b"AIFF", b"AIFC"):
        return FORMATS["aiff"]
    if head[4:8] == b"ftyp":
        return FORMATS["mp4"]
    for magic, name in _MAGIC:
        if head.startswith(magic):
            return FORMATS[name]
    return _mpeg(head)


_MAGIC = (
    (b"fLaC", "flac"),
    (b"OggS", "ogg"),
    (b".snd", "au"),
    (b"caff", "caf"),
    (b"NIST_1A", "sphere"),
    (_W64, "w64"),
    (b"\x1a\x45\xdf\xa3", "webm"),
)


def _mpeg(head: bytes) -> AudioFormat | None:
    """MPEG audio or ADTS by a valid frame header (ISO 11172-3, 13818-7)."""
    if len(head) < 4 or head[0] != 0xFF or head[1] & 0xE0 != 0xE0:
        return None
    if head[1] == 0xFE and not any(head[3:32:2]):
        return None  # text in UTF-16 behind its byte order mark
    version, layer = head[1] >> 3 & 3, head[1] >> 1 & 3
    if layer == 0:
        return FORMATS["aac"] if head[1] & 0xF0 == 0xF0 and head[2] >> 2 & 15 < 13 else None
    bitrate, rate = head[2] >> 4, head[2] >> 2 & 3
    if version == 1 or bitrate == 15 or rate == 3:
        return None
    tagged = b"Xing" in head[:256] or b"Info" in head[:256]
    return FORMATS["mp3" if tagged else "mp3-untagged"]


def id3_size(head: bytes) -> int:
    """Bytes of the ID3v2 tag a file begins with; 0 if there is none."""
    if head[:3] != b"ID3" or len(head) < 10:
        return 0
    size = 0
    for byte in head[6:10]:
        size = size << 7 | byte & 0x7F
    return size + 10 + (10 if head[5] & 0x10 else 0)


def describe(head: bytes) -> str:
    """What a file that is no audio seems to be, in words for the person who has to look at it."""
    if not head:
        return "an empty file"
    start = head[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    for marks, words in _NOT_AUDIO:
        if start.startswith(marks):
            return words
    if b"\0" not in head[:512]:
        try:
            head[:512].decode()
        except UnicodeDecodeError as error:
            if error.start < 500:
                return "data of a kind that wavemill does not know"
        return "a text file"
    return "data of a kind that wavemill does not know"


_NOT_AUDIO = (
    ((b"<!doctype html", b"<html", b"<head"), "a web page (HTML)"),
    ((b"#extm3u", b"[playlist]", b"ffconcat"), "a playlist"),
    ((b"version https://git-lfs",), "a Git LFS pointer, not the file it stands for"),
    ((b"<?xml",), "an XML file"),
    ((b"\x30\x26\xb2\x75",), "Windows Media (ASF), which this version does not read"),
    ((b"#!amr",), "AMR, which this version does not read"),
    ((b"wvpk",), "WavPack, which this version does not read"),
    ((b"mac ",), "Monkey's Audio, which this version does not read"),
    ((b"id3",), "an ID3 tag with no MPEG audio behind it"),
    ((b"riff",), "a cut-off or damaged RIFF header"),
)
