"""Odd files: rare containers and codecs, headers that lie, damage, cuts; each is read whole or has its error class."""

import ast
import csv
import io
import tempfile
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray
from wavemill.pipelines.audio import AudioError, Limits, Probe, Span, decode, identify, probe
from wavemill.pipelines.error_classes import ERROR_CLASSES
from wavemill.pipelines.format_ogg import checksum
from wavemill.pipelines.sniff import FORMATS

pytestmark = pytest.mark.timeout(60)
REPO = Path(__file__).resolve().parents[2]
RATE = 16_000
LAYOUTS = {1: "mono", 2: "stereo"}


def sound(num_samples: int = 60_001, num_channels: int = 1, *, seed: int = 0) -> NDArray[np.float32]:
    """`[N, C]`: tones under noise."""
    t_N = np.arange(num_samples) / RATE
    tones_NC = np.stack([np.sin(2 * np.pi * (300 + 170 * c) * t_N) for c in range(num_channels)], axis=1)
    noise_NC = np.random.default_rng(seed).standard_normal((num_samples, num_channels))
    return (0.3 * tones_NC + 0.05 * noise_NC).astype(np.float32)


def by_soundfile(
    format: str, subtype: str | None = None, sound_NC: NDArray[np.float32] | None = None, **how: Any
) -> bytes:
    content = io.BytesIO()
    samples = sound() if sound_NC is None else sound_NC
    soundfile.write(content, samples, how.pop("rate", RATE), format=format, subtype=subtype, **how)
    return content.getvalue()


def by_ffmpeg(
    container: str, codec: str, sound_NC: NDArray[np.float32] | None = None, rate: int = RATE, **options: str
) -> bytes:
    samples_NC = sound() if sound_NC is None else sound_NC
    layout = LAYOUTS[samples_NC.shape[1]]
    with tempfile.NamedTemporaryFile() as file:  # some options need a file that FFmpeg can open again
        with av.open(file.name, "w", format=container, options=options) as out:
            stream = out.add_stream(codec, rate=rate, layout=layout)
            assert isinstance(stream, av.AudioStream)
            frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples_NC.T), format="fltp", layout=layout)
            frame.sample_rate, frame.pts = rate, 0
            fitted = av.AudioResampler(format=stream.format.name, layout=layout, rate=rate)
            for part in [*fitted.resample(frame), *fitted.resample(None)]:
                out.mux(stream.encode(part))
            out.mux(stream.encode(None))
        return Path(file.name).read_bytes()


def read(content: bytes, limits: Limits | None = None) -> tuple[Probe, NDArray[np.float32]]:
    """What probing finds, and the whole recording's mean of all channels, `[N]`."""
    file = io.BytesIO(content)
    found = probe(file, len(content), limits or Limits())
    pieces = decode(file, len(content), format=found.format, spans=[Span(0, found.num_samples)])
    mono_N = np.concatenate([piece_NC[:, 0] for _, piece_NC in pieces])
    assert len(mono_N) == found.num_samples
    return found, mono_N


def kind_of(content: bytes) -> str:
    with pytest.raises(AudioError) as caught:
        read(content)
    assert 0 < len(caught.value.message) <= 300
    assert caught.value.kind in ERROR_CLASSES
    return caught.value.kind


def half(content: bytes) -> bytes:
    return content[: len(content) // 2]


# The recordings beside the repository


def test_odd_files_found_in_the_wild_are_read_or_refused_as_their_manifest_says(dev_recordings: Path) -> None:
    rows = list(csv.DictReader((dev_recordings / "odd" / "MANIFEST.csv").open()))
    strict = [row for row in rows if row["strict"] == "1" and not row["file"].endswith(".tar")]
    assert len(strict) > 100
    wrong = []
    for row in strict:
        content = (dev_recordings / row["file"]).read_bytes()
        try:
            found, mono_N = read(content)
            verdict = "ok" if np.isfinite(mono_N).all() else "quarantine"
            said = f"{found.num_samples:,} samples"
        except AudioError as error:
            verdict, said = "quarantine", f"{error.kind}: {error.message}"
        if verdict != row["expected"]:
            wrong.append((row["file"], row["expected"], said))
    assert wrong == []


@pytest.mark.parametrize(
    ("name", "num_samples"),
    [
        ("flac_faulty_05_-_wrong_total_number_of_samples.flac", 109_487),  # its header promises 39,842
        ("made_opus.webm", 120_000),  # 2.5 s
        ("made_wmav2.wma", 39_936),
        ("made_aac.m4a", 40_000),
        ("made_gsm_ms.wav", 20_160),
        ("made_narrow.amr-nb", 20_000),
        ("mediafile__full.ape", 44_100),
        ("mediafile__full.wv", 44_100),
        ("tinytag__alac_silence.m4a", 800),
        ("tinytag__24bit_pcm_extended_to_als.mp4", 1_024),
        ("made_silence_1h.flac", 57_600_000),
    ],
)
def test_odd_files_found_in_the_wild_have_their_lengths(name: str, num_samples: int, dev_recordings: Path) -> None:
    assert read((dev_recordings / "odd" / name).read_bytes())[0].num_samples == num_samples


# Containers, codecs, lengths

EXACT: dict[str, tuple[Callable[[], bytes], str]] = {
    "WAV, unsigned 8 bit": (lambda: by_soundfile("WAV", "PCM_U8"), "wav"),
    "WAV, big-endian": (lambda: by_soundfile("WAV", "PCM_16", endian="BIG"), "wav"),
    "WAV, RF64": (lambda: by_soundfile("RF64", "PCM_24"), "wav"),
    "WAV, 64-bit integers": (lambda: by_ffmpeg("wav", "pcm_s64le"), "wav-ffmpeg"),
    "WAV, MS ADPCM": (lambda: by_soundfile("WAV", "MS_ADPCM"), "wav"),
    "WAV, GSM": (lambda: by_soundfile("WAV", "GSM610"), "wav"),
    "WAV, FLAC": (lambda: by_ffmpeg("wav", "flac"), "wav-ffmpeg"),
    "W64": (lambda: by_soundfile("W64", "PCM_24"), "w64"),
    "AIFF": (lambda: by_soundfile("AIFF", "PCM_16"), "aiff"),
    "AIFC, float": (lambda: by_soundfile("AIFF", "DOUBLE"), "aiff"),
    "CAF": (lambda: by_soundfile("CAF", "PCM_24"), "caf"),
    "CAF, ALAC": (lambda: by_ffmpeg("caf", "alac"), "caf-ffmpeg"),
    "AU": (lambda: by_soundfile("AU", "ULAW"), "au"),
    "AU, little-endian": (lambda: by_soundfile("AU", "PCM_16", endian="LITTLE"), "au"),
    "SPHERE": (lambda: by_soundfile("NIST", "PCM_16"), "sphere"),
    "SPHERE, A-law": (lambda: by_soundfile("NIST", "ALAW"), "sphere"),
    "VOC": (lambda: by_soundfile("VOC", "PCM_16"), "voc"),
    "IRCAM": (lambda: by_soundfile("IRCAM", "FLOAT"), "ircam"),
    "PAF": (lambda: by_soundfile("PAF", "PCM_16"), "paf"),
    "PVF": (lambda: by_soundfile("PVF", "PCM_16"), "pvf"),
    "SVX": (lambda: by_soundfile("SVX", "PCM_16"), "svx"),
    "AVR": (lambda: by_soundfile("AVR", "PCM_16"), "avr"),
    "SoX": (lambda: by_ffmpeg("sox", "pcm_s32le"), "sox"),
    "FLAC": (lambda: by_soundfile("FLAC", "PCM_24"), "flac"),
    "FLAC in Ogg": (lambda: by_ffmpeg("ogg", "flac"), "ogg-ffmpeg"),
    "FLAC in MP4": (lambda: by_ffmpeg("mp4", "flac"), "mp4"),
    "FLAC in Matroska": (lambda: by_ffmpeg("matroska", "flac"), "webm"),
    "ALAC in MP4": (lambda: by_ffmpeg("ipod", "alac"), "mp4"),
    "PCM in MOV": (lambda: by_ffmpeg("mov", "pcm_s16le"), "mp4"),
    "PCM in AVI": (lambda: by_ffmpeg("avi", "pcm_s16le"), "avi"),
    "PCM in NUT": (lambda: by_ffmpeg("nut", "pcm_s16le"), "nut"),
    "WavPack": (lambda: by_ffmpeg("wv", "wavpack"), "wavpack"),
    "WavPack in Matroska": (lambda: by_ffmpeg("matroska", "wavpack"), "webm"),
    "True Audio": (lambda: by_ffmpeg("tta", "tta"), "tta"),
    "Vorbis": (lambda: by_soundfile("OGG", "VORBIS"), "ogg"),
    "Opus": (lambda: by_ffmpeg("ogg", "libopus"), "ogg"),
    "Opus in WebM": (lambda: by_ffmpeg("webm", "libopus"), "webm"),
    "MP3 with a tag": (lambda: by_ffmpeg("mp3", "libmp3lame"), "mp3"),
}


@pytest.mark.parametrize("name", EXACT)
def test_what_states_its_length_is_read_to_the_sample_and_sounds_like_what_was_written(name: str) -> None:
    make, format = EXACT[name]
    found, mono_N = read(make())
    assert found.format == format
    written_N = sound()[:, 0]
    if name == "Opus in WebM":
        assert found.num_samples == 3 * len(written_N)
        mono_N = mono_N[::3]
    assert len(mono_N) == len(written_N)
    similarity = np.corrcoef(mono_N, written_N)[0, 1]  # a shift by one sample costs more than any codec here
    assert similarity > (0.95 if "Opus" in name or "GSM" in name else 0.98)


PADDED: dict[str, tuple[Callable[[], bytes], str, int]] = {
    # frames that an encoder pads, and no word of it in the container: whole frames, with the encoder's delay
    "MP2": (lambda: by_ffmpeg("mp2", "mp2"), "mp3-untagged", 2 * 1_152),
    "MP3 without a tag": (lambda: by_ffmpeg("mp3", "libmp3lame", write_xing="0"), "mp3-untagged", 4 * 1_152),
    "ADTS": (lambda: by_ffmpeg("adts", "aac"), "aac", 3 * 1_024),
    "LATM": (lambda: by_ffmpeg("latm", "aac"), "loas", 3 * 1_024),
    "AC-3": (lambda: by_ffmpeg("ac3", "ac3", sound(96_001, 2), 48_000), "ac3", 2 * 1_536),
    "E-AC-3": (lambda: by_ffmpeg("eac3", "eac3", sound(96_001, 2), 48_000), "eac3", 2 * 1_536),
    "MPEG-TS": (lambda: by_ffmpeg("mpegts", "aac"), "mpegts", 3 * 1_024),
    "MPEG-PS": (lambda: by_ffmpeg("mpeg", "mp2"), "mpeg", 2 * 1_152),
    "FLV": (lambda: by_ffmpeg("flv", "aac"), "flv", 3 * 1_024),
    "MP3 in AVI": (lambda: by_ffmpeg("avi", "libmp3lame"), "avi", 4 * 1_152),
    "MP3 in WAV": (lambda: by_ffmpeg("wav", "libmp3lame"), "wav", 4 * 1_152),
    "AC-3 in WAV": (lambda: by_ffmpeg("wav", "ac3", sound(96_001, 2), 48_000), "wav-ffmpeg", 2 * 1_536),
    "G.722 in WAV": (lambda: by_ffmpeg("wav", "adpcm_g722"), "wav-ffmpeg", 2),
    "IMA ADPCM in AIFC": (lambda: by_ffmpeg("aiff", "adpcm_ima_qt"), "aiff", 64),
}


@pytest.mark.parametrize("name", PADDED)
def test_what_does_not_state_its_length_is_counted_and_lacks_nothing(name: str) -> None:
    make, format, most = PADDED[name]
    found, mono_N = read(make())
    assert found.format == format
    written = 96_001 if found.sample_rate == 48_000 else 60_001
    assert written <= len(mono_N) <= written + most


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 24_000, 44_100])
def test_an_m4a_that_ends_with_a_frame_is_read_to_there(rate: int) -> None:
    """Its edit list counts in milliseconds, and rounds up past the last frame."""
    for num_samples in (1_023, 20_477, 20_480, 20_481, 21_503):
        found, _ = read(by_ffmpeg("ipod", "aac", sound(num_samples), rate))
        assert abs(found.num_samples - num_samples) <= rate / 1_000 + 1


def test_amr_is_read() -> None:
    for container in ("amr", "3gp"):
        found, mono_N = read(by_ffmpeg(container, "libopencore_amrnb", sound(24_000), 8_000))
        assert found.sample_rate == 8_000
        assert abs(len(mono_N) - 24_000) <= 320


def test_every_format_names_a_demuxer_and_decoder_there_is_and_says_what_its_length_is() -> None:
    readable = {name for short in av.formats_available for name in short.split(",")}
    for name, format in FORMATS.items():
        assert name == format.name
        assert (format.backend == "pyav") == bool(format.demuxer)
        assert not format.demuxer or format.demuxer in readable, name
        assert not format.decoder or av.codec.Codec(format.decoder, "r").is_decoder
        assert not format.fallback or FORMATS[format.fallback].backend == "pyav"
        assert format.length_rule.endswith(".")
        assert format.demuxer not in (
            "hls",
            "concat",
            "dash",
            "image2",
            "lavfi",
            "sdp",
            "rtsp",
            "srt",
            "imf",
            "vapoursynth",
        )


# Headers that do not know, or lie


def with_bytes(content: bytes, place: int, new: bytes) -> bytes:
    return content[:place] + new + content[place + len(new) :]


@pytest.mark.parametrize("size", [0xFFFFFFFF, 0x7FFFFFFF, 0x7FFFF000, 0])
def test_a_wav_written_to_a_pipe_is_read_to_its_end(size: int) -> None:
    content = by_soundfile("WAV", "PCM_16")
    at = content.index(b"data") + 4
    found, mono_N = read(with_bytes(content, at, size.to_bytes(4, "little")))
    assert np.array_equal(mono_N, read(content)[1])
    assert found.num_samples == 60_001


def with_total(flac: bytes, total: int) -> bytes:
    field = int.from_bytes(flac[18:26]) >> 36 << 36 | total
    return with_bytes(flac, 18, field.to_bytes(8))


def test_a_flac_whose_header_promises_too_little_is_read_to_its_end() -> None:
    content = by_soundfile("FLAC", "PCM_16")
    whole_N = read(content)[1]
    for total in (0, 1, 20_000, 60_000):
        assert np.array_equal(read(with_total(content, total))[1], whole_N)


def test_headers_that_promise_more_than_is_there_end_in_an_error_and_take_no_memory() -> None:
    content = by_soundfile("FLAC", "PCM_16")
    assert kind_of(with_total(content, 60_002)) == "truncated"
    assert kind_of(with_total(content, 2**36 - 1)) == "too-large"
    rf64 = by_soundfile("RF64", "PCM_16")
    at = rf64.index(b"ds64") + 16
    assert int.from_bytes(rf64[at : at + 8], "little") == 2 * 60_001
    assert kind_of(with_bytes(rf64, at, (2**40).to_bytes(8, "little"))) == "truncated"


@pytest.mark.parametrize("format", ["FLAC", "MP3", "WAV", "OGG", "AIFF"])
def test_tags_before_the_audio_are_passed_over_however_many(format: str) -> None:
    content = by_soundfile(format)
    tag = b"ID3\x04\0\0\0\0\x01\x00" + bytes(128)
    plain, plain_N = read(content)
    for before in (tag, tag + tag, tag + bytes(700) + tag):
        found, mono_N = read(before + content)
        assert (found.format, found.num_samples) == (plain.format, plain.num_samples)
        assert np.array_equal(mono_N, plain_N)


def test_mp3s_one_behind_the_other_are_read_to_the_end_of_the_last() -> None:
    one, other = (by_ffmpeg("mp3", "libmp3lame", sound(num_samples)) for num_samples in (30_000, 50_000))
    found, mono_N = read(one + other)
    assert found.format == "mp3-chained"
    assert np.array_equal(mono_N, np.concatenate([read(one)[1], read(other)[1]]))
    assert found.num_samples == 80_000
    for tail in (b"TAG" + bytes(125), bytes(3_000), b"APETAGEX" + bytes(500)):
        assert read(one + tail)[0].num_samples == 30_000


def test_an_mp3_cut_out_of_a_stream_is_found_where_its_frames_begin() -> None:
    content = by_ffmpeg("mp3", "libmp3lame", write_xing="0")
    found, mono_N = read(content[1_000:])
    assert found.format == "mp3-untagged"
    assert 50_000 < len(mono_N) < 60_000


def shifted(ogg: bytes, by: int) -> bytes:
    """An Ogg whose granule positions do not begin with zero: cut out of a stream."""
    out = []
    for page in pages(ogg):
        granule = int.from_bytes(page[6:14], "little")
        if 0 < granule < 1 << 63:  # not of headers, nor -1 where no packet ends
            granule += by
        without = page[:6] + granule.to_bytes(8, "little") + page[14:22] + bytes(4) + page[26:]
        out.append(with_bytes(without, 22, checksum(without).to_bytes(4, "little")))
    return b"".join(out)


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
def test_an_ogg_cut_out_of_a_stream_has_the_length_of_its_own_part(subtype: str) -> None:
    content = by_soundfile("OGG", subtype)
    assert shifted(content, 0) == content
    for by in (1_000, 10**9, 2**40):
        found, mono_N = read(shifted(content, by))
        assert found.num_samples == 60_001
        if subtype == "VORBIS":  # libsndfile leaves Opus's pre-skip in such a stream: 6 ms before the sound
            assert np.array_equal(mono_N, read(content)[1])


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
def test_all_links_of_a_chained_ogg_are_read(subtype: str) -> None:
    parts = [by_soundfile("OGG", subtype, sound(length, seed=length)) for length in (30_000, 7, 44_444)]
    found, mono_N = read(b"".join(parts))
    assert found.format == "ogg-chained"
    assert found.num_samples == 30_000 + 7 + 44_444
    assert np.array_equal(mono_N, np.concatenate([read(part)[1] for part in parts]))


def test_a_chain_whose_links_differ_in_rate_is_refused() -> None:
    assert kind_of(by_soundfile("OGG", "VORBIS") + by_soundfile("OGG", "VORBIS", rate=22_050)) == "unsupported"


# Damage


def flips(content: bytes, first: int, count: int) -> Iterator[bytes]:
    generator = np.random.default_rng(3)
    for _ in range(count):
        at = int(generator.integers(first, len(content)))
        yield with_bytes(content, at, bytes([content[at] ^ int(generator.integers(1, 256))]))


@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24"])
def test_any_wrong_byte_among_flac_frames_is_found(subtype: str) -> None:
    content = by_soundfile("FLAC", subtype)
    for damaged in flips(content, content.index(b"\xff\xf8", 42), 60):
        assert kind_of(damaged) in ("corrupt", "truncated", "length-mismatch")


@pytest.mark.parametrize("codec", ["VORBIS", "OPUS", "flac"])
def test_any_wrong_byte_in_an_ogg_is_found(codec: str) -> None:
    content = by_ffmpeg("ogg", codec) if codec == "flac" else by_soundfile("OGG", codec)
    for damaged in flips(content, 4, 60):
        assert kind_of(damaged) in ("corrupt", "truncated")


@pytest.mark.parametrize("name", ["FLAC in Matroska", "WavPack", "WavPack in Matroska", "True Audio", "AC-3", "E-AC-3"])
def test_checksums_that_a_codec_carries_are_compared(name: str) -> None:
    content = (EXACT | PADDED)[name][0]()
    whole_N = read(content)[1]
    for damaged in flips(content, len(content) // 4, 12):
        try:
            mono_N = read(damaged)[1]
        except AudioError as error:
            assert error.kind in ("corrupt", "truncated")  # noqa: PT017
        else:
            assert np.array_equal(mono_N, whole_N)  # a byte between frames


def pages(ogg: bytes) -> list[bytes]:
    starts = [at for at in range(len(ogg)) if ogg.startswith(b"OggS\0", at)] + [len(ogg)]
    return [ogg[begin:end] for begin, end in pairwise(starts)]


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
def test_a_lost_page_of_an_ogg_is_found(subtype: str) -> None:
    whole = pages(by_soundfile("OGG", subtype, sound(200_000)))
    assert len(whole) > 5
    for lost in range(1, len(whole) - 1):
        assert kind_of(b"".join(whole[:lost] + whole[lost + 1 :])) == "corrupt"
    without_end = b"".join(whole[:-1])
    if subtype == "VORBIS":
        assert kind_of(without_end) == "truncated"
    else:  # RFC 7845 wants streams recorded from the air read as far as they go
        found, mono_N = read(without_end)
        assert np.array_equal(mono_N, read(b"".join(whole))[1][: found.num_samples])
        assert found.num_samples > 100_000


CUT: dict[str, Callable[[], bytes]] = {
    "WAV": lambda: by_soundfile("WAV"),
    "big-endian WAV": lambda: by_soundfile("WAV", "PCM_16", endian="BIG"),
    "ADPCM": lambda: by_soundfile("WAV", "MS_ADPCM"),
    "RF64": lambda: by_soundfile("RF64"),
    "W64": lambda: by_soundfile("W64"),
    "AIFF": lambda: by_soundfile("AIFF"),
    "CAF": lambda: by_soundfile("CAF"),
    "ALAC in CAF": lambda: by_ffmpeg("caf", "alac"),
    "AU": lambda: by_soundfile("AU"),
    "SPHERE": lambda: by_soundfile("NIST"),
    "VOC": lambda: by_soundfile("VOC"),
    "SVX": lambda: by_soundfile("SVX"),
    "AVR": lambda: by_soundfile("AVR"),
    "FLAC": lambda: by_soundfile("FLAC"),
    "Vorbis": lambda: by_soundfile("OGG"),
    "FLAC in Ogg": lambda: by_ffmpeg("ogg", "flac"),
    "MP3": lambda: by_ffmpeg("mp3", "libmp3lame"),
    "MP3 without a tag": lambda: by_ffmpeg("mp3", "libmp3lame", write_xing="0"),
    "ADTS": lambda: by_ffmpeg("adts", "aac"),
    "M4A": lambda: by_ffmpeg("ipod", "aac"),
    "M4A, index first": lambda: by_ffmpeg("ipod", "aac", movflags="faststart"),
    "ALAC, index first": lambda: by_ffmpeg("ipod", "alac", movflags="faststart"),
    "MP4 in fragments": lambda: by_ffmpeg("mp4", "aac", movflags="frag_keyframe+empty_moov"),
    "WebM": lambda: by_ffmpeg("webm", "libopus"),
    "Matroska": lambda: by_ffmpeg("matroska", "flac"),
    "AVI": lambda: by_ffmpeg("avi", "pcm_s16le"),
    "WavPack": lambda: by_ffmpeg("wv", "wavpack"),
    "True Audio": lambda: by_ffmpeg("tta", "tta"),
    "SoX": lambda: by_ffmpeg("sox", "pcm_s32le"),
}


@pytest.mark.parametrize("name", CUT)
def test_half_of_a_recording_is_truncated_and_never_taken_for_the_whole(name: str) -> None:
    content = CUT[name]()
    read(content)
    assert kind_of(half(content)) == "truncated"


@pytest.mark.parametrize("name", ["FLAC", "MP3", "M4A, index first", "ALAC, index first"])
def test_windows_before_a_cut_are_those_of_the_whole(name: str) -> None:
    content = CUT[name]()
    whole_N = read(content)[1]
    cut = io.BytesIO(half(content))
    found = probe(cut, len(half(content)), Limits())
    assert abs(found.num_samples - len(whole_N)) <= RATE / 1_000 + 1  # an edit list's milliseconds
    got: list[NDArray[np.float32]] = []
    spans = [Span(start, 4_000) for start in range(0, 56_000, 4_000)]
    pieces = decode(cut, len(half(content)), format=found.format, spans=spans)
    with pytest.raises(AudioError, match=r"promises|ends in the middle"):
        got.extend(piece_NC[:, 0] for _, piece_NC in pieces)
    mono_N = np.concatenate(got)
    assert 16_000 <= len(mono_N) < 40_000
    assert np.array_equal(mono_N, whole_N[: len(mono_N)])


# Limits


def test_each_limit_is_named_with_the_option_that_raises_it() -> None:
    wav = by_soundfile("WAV", "PCM_16", sound(16_000, 2))
    silence = by_soundfile("FLAC", "PCM_16", np.zeros((1_600_000, 1), dtype=np.float32))
    untagged = by_ffmpeg("mp3", "libmp3lame", write_xing="0")
    for content, limits, kind, option in (
        (wav, Limits(max_bytes=len(wav) - 1), "too-large", "--max-bytes"),
        (wav, Limits(max_channels=1), "unsupported", "--max-channels"),
        (wav, Limits(min_sample_rate=RATE + 1), "unsupported", "--min-sample-rate"),
        (wav, Limits(max_sample_rate=RATE - 1), "unsupported", "--max-sample-rate"),
        (wav, Limits(max_duration_s=0.99), "too-large", "--max-recording"),
        (untagged, Limits(max_duration_s=2), "too-large", "--max-recording"),
        (silence, Limits(max_expansion=100), "too-large", "--max-expansion"),
    ):
        with pytest.raises(AudioError, match=option) as caught:
            probe(io.BytesIO(content), len(content), limits)
        assert caught.value.kind == kind
    at_the_limit = Limits(max_bytes=len(wav), max_channels=2, max_sample_rate=RATE, max_duration_s=1)
    assert read(wav, at_the_limit)[0].num_samples == 16_000
    assert read(silence)[0].num_samples == 1_600_000


def test_counting_and_checking_say_now_and_then_that_they_live() -> None:
    for content in (by_ffmpeg("adts", "aac"), by_soundfile("OGG"), by_ffmpeg("matroska", "flac")):
        beats: list[int] = []
        probe(io.BytesIO(content), len(content), Limits(), on_progress=lambda beats=beats: beats.append(1))
        assert beats


def test_identifying_leaves_a_file_at_its_start_and_knows_what_is_no_audio() -> None:
    file = io.BytesIO(b"ID3\x04\0\0\0\0\0\x0a" + bytes(10) + by_soundfile("FLAC"))
    assert identify(file).name == "flac"
    assert file.tell() == 0
    for content, kind in (
        (b"", "empty"),
        (b"\0" * 5_000, "not-audio"),
        (sound().astype("<i2").tobytes(), "not-audio"),  # headerless
        (np.random.default_rng(0).bytes(50_000), "not-audio"),
        (b"#EXTM3U\nfile:///etc/passwd\n", "not-audio"),
    ):
        assert kind_of(content) == kind


def test_all_error_classes_that_the_code_raises_are_explained() -> None:
    raised = set()
    for path in (REPO / "pipelines").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "AudioError" and node.args:
                first = node.args[0]
                choices = [first.body, first.orelse] if isinstance(first, ast.IfExp) else [first]
                raised |= {each.value for each in choices if isinstance(each, ast.Constant)}
    assert {"truncated", "corrupt", "not-audio", "empty", "too-large"} <= raised
    assert raised <= ERROR_CLASSES.keys()
    assert all(sentence.endswith(".") for sentence in ERROR_CLASSES.values())
