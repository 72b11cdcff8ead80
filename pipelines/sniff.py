"""What kind of audio a file is, by its first bytes and never by its name; the formats there are. A leaf.

No playlist, script, image or subtitle is a format here, and FFmpeg gets its demuxer told: nothing can pose as audio to
make it open something else.
"""

from dataclasses import dataclass
from typing import Literal

from .format_mpeg import is_tagged, parse_header, stream_start

SNIFF_BYTES = 4_096

Backend = Literal["soundfile", "pyav"]


@dataclass(frozen=True, slots=True, kw_only=True)
class AudioFormat:
    """A container that is read, who decodes it, and what counts as the length of a recording in it."""

    name: str
    backend: Backend
    demuxer: str = ""  # FFmpeg's name, forced
    decoder: str = ""  # FFmpeg's name, where its first choice is not the best
    exact_length: bool = True  # the header's length is taken; otherwise the audio is decoded once to count it
    fallback: str = ""  # the format to try where this one's decoder knows the container but not the codec
    length_rule: str


_DATA_CHUNK = "All of the sample chunk; with block codecs (ADPCM, GSM), less the padding that a `fact` chunk states."
_HEADER = "The header's length; the file must hold that much."
_COUNTED = "What decoding gives, counted; codec delay and padding are cut where the container states them."
_LINKS = "From the first sample to the last page's granule position, less Opus's pre-skip; links of a chain in a row."


def _soundfile(name: str, rule: str, *, fallback: str = "") -> AudioFormat:
    return AudioFormat(name=name, backend="soundfile", fallback=fallback, length_rule=rule)


def _pyav(name: str, demuxer: str, rule: str = _COUNTED, *, exact: bool = False, decoder: str = "") -> AudioFormat:
    return AudioFormat(
        name=name, backend="pyav", demuxer=demuxer, decoder=decoder, exact_length=exact, length_rule=rule
    )


_ALL = (
    _soundfile("wav", _DATA_CHUNK, fallback="wav-ffmpeg"),
    _soundfile("w64", _DATA_CHUNK, fallback="w64-ffmpeg"),
    _soundfile("aiff", _DATA_CHUNK, fallback="aiff-ffmpeg"),
    _soundfile("caf", _DATA_CHUNK, fallback="caf-ffmpeg"),
    _soundfile("au", _HEADER, fallback="au-ffmpeg"),
    _soundfile("sphere", _HEADER, fallback="sphere-ffmpeg"),
    _soundfile("voc", _HEADER, fallback="voc-ffmpeg"),
    _soundfile("svx", _HEADER, fallback="svx-ffmpeg"),
    _soundfile("ircam", "All bytes behind the header."),
    _soundfile("paf", "All bytes behind the header."),
    _soundfile("pvf", "All bytes behind the header."),
    _soundfile("avr", _HEADER),
    _soundfile("sds", "What libsndfile finds in it."),
    _soundfile("wve", "What libsndfile finds in it."),
    _soundfile("xi", "What libsndfile finds in it."),
    _soundfile(
        "flac",
        "STREAMINFO's total; where it is zero, or the last frame lies behind it, what decoding gives.",
        fallback="flac-ffmpeg",
    ),
    _soundfile("ogg", _LINKS),  # one Vorbis or Opus stream
    _soundfile("ogg-chained", _LINKS),
    _pyav("ogg-ffmpeg", "ogg", "What decoding gives, counted: FLAC and Speex in Ogg, and audio beside a film."),
    _soundfile("mp3", "The frames that the Xing or Info tag states, less the encoder's delay and padding (LAME)."),
    _soundfile("mp3-chained", "The sum over files put one behind the other, each by its own tag."),
    _pyav("mp3-untagged", "mp3", "All frames, counted: nothing states what an encoder put before and behind."),
    _pyav("aac", "aac", "All frames, counted: ADTS does not state the encoder's delay."),
    _pyav("loas", "loas", "All frames, counted: LATM does not state the encoder's delay."),
    _pyav(
        "mp4", "mp4", "The track after its edit list, up to its last packet's end; in fragments, counted.", exact=True
    ),
    _pyav("webm", "matroska", "What decoding gives, counted, less CodecDelay and DiscardPadding."),
    _pyav("asf", "asf"),
    _pyav("avi", "avi"),
    _pyav("flv", "flv"),
    _pyav("mpegts", "mpegts"),
    _pyav("mpeg", "mpeg"),
    _pyav("real", "rm"),
    _pyav("wtv", "wtv"),
    _pyav("mxf", "mxf"),
    _pyav("nut", "nut"),
    _pyav("amr", "amr", decoder="libopencore_amrnb"),
    _pyav("amr-wb", "amr", decoder="libopencore_amrwb"),
    _pyav("ac3", "ac3"),
    _pyav("eac3", "eac3"),
    _pyav("dts", "dts"),
    _pyav("truehd", "truehd"),
    _pyav("mlp", "mlp"),
    _pyav("ape", "ape"),
    _pyav("wavpack", "wv"),
    _pyav("tta", "tta"),
    _pyav("tak", "tak"),
    _pyav("shorten", "shn"),
    _pyav("musepack", "mpc"),
    _pyav("musepack8", "mpc8"),
    _pyav("dsf", "dsf"),
    _pyav("dsdiff", "iff"),
    _pyav("xwma", "xwma"),
    _pyav("qcp", "qcp"),
    _pyav("sox", "sox"),
    _pyav("oma", "oma"),
    _pyav("qoa", "qoa"),
    _pyav("codec2", "codec2"),
    _pyav("ilbc", "ilbc"),
    _pyav("wav-ffmpeg", "wav"),
    _pyav("w64-ffmpeg", "w64"),
    _pyav("aiff-ffmpeg", "aiff"),
    _pyav("caf-ffmpeg", "caf"),
    _pyav("au-ffmpeg", "au"),
    _pyav("sphere-ffmpeg", "nistsphere"),
    _pyav("voc-ffmpeg", "voc"),
    _pyav("svx-ffmpeg", "iff"),
    _pyav("flac-ffmpeg", "flac", "What decoding gives, counted: FLAC whose number of channels changes."),
)
FORMATS = {format.name: format for format in _ALL}

# what people name audio files; in a folder, such a file is reported even if its content is no audio
AUDIO_SUFFIXES = frozenset(
    f".{suffix}"
    for line in (
        "wav wave rf64 w64 flac aif aiff aifc au snd caf sph voc svx 8svx paf pvf ircam avr",
        "mp1 mp2 mp3 ogg oga opus spx m4a m4b mp4 aac webm mka 3gp 3ga",
        "wma asf ape wv tta tak shn mpc dsf dff amr awb ac3 eac3 dts ra rm gsm raw pcm",
    )
    for suffix in line.split()
)

_W64 = bytes.fromhex("726966662e91cf11a5d628db04c10000")
_ASF = bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c")

_MAGIC = (
    (b"fLaC", "flac"),
    (b"OggS", "ogg"),
    (b".snd", "au"),
    (b"dns.", "au"),
    (b"caff", "caf"),
    (b"NIST_1A", "sphere"),
    (_W64, "w64"),
    (_ASF, "asf"),
    (b"Creative Voice File\x1a", "voc"),
    (b"2BIT", "avr"),
    (b" paf", "paf"),
    (b"fap ", "paf"),
    (b"PVF1\n", "pvf"),
    (b"\x64\xa3\x01\x00", "ircam"),
    (b"\x64\xa3\x02\x00", "ircam"),
    (b"\x64\xa3\x03\x00", "ircam"),
    (b"\x00\x01\xa3\x64", "ircam"),
    (b"\x00\x02\xa3\x64", "ircam"),
    (b"\x00\x03\xa3\x64", "ircam"),
    (b"ALawSoundFile**\x00", "wve"),
    (b"Extended Instrument: ", "xi"),
    (b"\x1a\x45\xdf\xa3", "webm"),
    (b"#!AMR-WB\n", "amr-wb"),
    (b"#!AMR\n", "amr"),
    (b"#!iLBC30\n", "ilbc"),
    (b"#!iLBC20\n", "ilbc"),
    (b"MAC ", "ape"),
    (b"wvpk", "wavpack"),
    (b"TTA1", "tta"),
    (b"tBaK", "tak"),
    (b"ajkg", "shorten"),
    (b"MP+", "musepack"),
    (b"MPCK", "musepack8"),
    (b"DSD \x1c\x00\x00\x00", "dsf"),
    (b".SoX", "sox"),
    (b"XoS.", "sox"),
    (b"ea3\x03", "oma"),
    (b"EA3\x01", "oma"),
    (b"qoaf", "qoa"),
    (b"\xc0\xde\xc2", "codec2"),
    (b"FLV\x01", "flv"),
    (b".RMF\x00", "real"),
    (b".ra\xfd", "real"),
    (bytes.fromhex("b7d800203749da11a64e0007e95ead8d"), "wtv"),
    (b"\x06\x0e\x2b\x34\x02\x05\x01\x01\x0d\x01\x02", "mxf"),
    (b"nut/multimedia container\x00", "nut"),
    (b"\x7f\xfe\x80\x01", "dts"),
    (b"\x00\x00\x01\xba", "mpeg"),
)
_FORMS = {  # four bytes at the start, four at the ninth
    **dict.fromkeys([(b"RIFF", b"WAVE"), (b"RIFX", b"WAVE"), (b"RF64", b"WAVE"), (b"BW64", b"WAVE")], "wav"),
    **dict.fromkeys([(b"FORM", b"AIFF"), (b"FORM", b"AIFC")], "aiff"),
    **dict.fromkeys([(b"FORM", b"8SVX"), (b"FORM", b"16SV")], "svx"),
    (b"RIFF", b"AVI "): "avi",
    (b"RIFF", b"XWMA"): "xwma",
    (b"RIFF", b"QLCM"): "qcp",
    (b"FRM8", b"DSD "): "dsdiff",
}
_MP4_BOXES = (b"ftyp", b"moov", b"mdat", b"wide", b"styp", b"moof", b"sidx")  # before 2001 none said ftyp


def sniff(head: bytes) -> AudioFormat | None:
    """The format of a file that begins with `head` (`SNIFF_BYTES` of it, ID3v2 tags skipped), or None."""
    form = _FORMS.get((head[:4], head[12:16] if head[:4] == b"FRM8" else head[8:12]))
    if form:
        return FORMATS[form]
    for magic, name in _MAGIC:
        if head.startswith(magic):
            return FORMATS[name]
    if head[4:8] in _MP4_BOXES:
        return FORMATS["mp4"]
    if head[:2] == b"\xf0\x7e" and head[3:4] == b"\x01":
        return FORMATS["sds"]
    if head[4:8] == b"\xf8\x72\x6f\xba":
        return FORMATS["truehd"]
    if head[4:8] == b"\xf8\x72\x6f\xbb":
        return FORMATS["mlp"]
    if head[:2] == b"\x0b\x77" and len(head) > 5:
        return FORMATS["eac3" if head[5] >> 3 > 10 else "ac3"]
    if len(head) >= 377 and head[0] == head[188] == head[376] == 0x47:
        return FORMATS["mpegts"]
    return _mpeg(head)


def _mpeg(head: bytes) -> AudioFormat | None:
    """MPEG audio, ADTS or LATM by a valid frame header (ISO 11172-3, 13818-7, 14496-3)."""
    if len(head) < 4 or (head[:2] == b"\xff\xfe" and not any(head[3:32:2])):
        return None  # text in UTF-16 behind its byte order mark
    if head[0] == 0xFF and head[1] & 0xF6 == 0xF0:
        return FORMATS["aac"] if head[2] >> 2 & 15 < 13 else None
    if head[0] == 0x56 and head[1] & 0xE0 == 0xE0:
        size = (head[1] & 0x1F) << 8 | head[2]
        follows = head[size + 3 : size + 5]
        return FORMATS["loas"] if len(follows) == 2 and follows[0] == 0x56 and follows[1] & 0xE0 == 0xE0 else None
    start = 0 if parse_header(head) else stream_start(head)
    if start is None:
        return None
    return FORMATS["mp3" if start == 0 and is_tagged(head) else "mp3-untagged"]


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
                return _UNKNOWN
        return "a text file"
    return _UNKNOWN


_UNKNOWN = "data of a kind that wavemill does not know (headerless samples need a header: WAV, for instance)"
_NOT_AUDIO = (
    ((b"<!doctype html", b"<html", b"<head"), "a web page (HTML)"),
    ((b"#extm3u", b"[playlist]", b"ffconcat"), "a playlist"),
    ((b"version https://git-lfs",), "a Git LFS pointer, not the file it stands for"),
    ((b"<?xml",), "an XML file"),
    ((b"id3",), "an ID3 tag with no MPEG audio behind it"),
    ((b"riff",), "a cut-off or damaged RIFF header"),
)
