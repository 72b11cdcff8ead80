"""Audio files of every kind, written here by libsndfile and FFmpeg, against a plain decode by the same libraries."""

import io
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

import av
import numpy as np
import pytest
import soundfile
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchaudio.transforms import Resample
from wavemill.pipelines.audio import MIX, Limits, Probe, Span, decode, probe
from wavemill.pipelines.format_bytes import Part
from wavemill.pipelines.resample import StreamResampler

Writer = Callable[[Path, NDArray[np.float32], int], None]
LAYOUTS = {1: "mono", 2: "stereo", 5: "5.0", 16: "hexadecagonal"}


def sound(num_samples: int, num_channels: int, rate: int) -> NDArray[np.float32]:
    """`[N, C]`: a gliding tone under bursts of noise, so that codecs with a bit reservoir save up and spend."""
    t_N = np.arange(num_samples) / rate
    noise_NC = np.random.default_rng(num_channels).standard_normal((num_samples, num_channels))
    bursts_N = np.sin(2 * np.pi * 0.7 * t_N) > 0.3
    tones_NC = np.stack([np.sin(2 * np.pi * (200 + 90 * c + 150 * np.sin(t_N)) * t_N) for c in range(num_channels)], 1)
    return (0.3 * tones_NC + 0.12 * noise_NC * bursts_N[:, None]).astype(np.float32)


def by_soundfile(format: str, subtype: str) -> Writer:
    def write(path: Path, sound_NC: NDArray[np.float32], rate: int) -> None:
        soundfile.write(path, sound_NC, rate, format=format, subtype=subtype)

    return write


def by_pyav(
    container: str,
    codec: str,
    *,
    bit_rate: int = 0,
    quality: int | None = None,
    tags: dict[str, str] | None = None,
    **options: str,
) -> Writer:
    def write(path: Path, sound_NC: NDArray[np.float32], rate: int) -> None:
        layout = LAYOUTS[sound_NC.shape[1]]
        with av.open(str(path), "w", format=container, options=options) as out:
            out.metadata.update(tags or {})
            stream = out.add_stream(codec, rate=rate, layout=layout)
            if bit_rate:
                stream.bit_rate = bit_rate
            if quality is not None:
                stream.codec_context.qscale = True
                stream.codec_context.global_quality = quality * 118  # FF_QP2LAMBDA
            frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(sound_NC.T), format="fltp", layout=layout)
            frame.sample_rate, frame.pts = rate, 0
            fitted = av.AudioResampler(format=stream.format.name, layout=layout, rate=rate)
            for part in [*fitted.resample(frame), *fitted.resample(None)]:
                out.mux(stream.encode(part))
            out.mux(stream.encode(None))

    return write


def streamed_flac(path: Path, sound_NC: NDArray[np.float32], rate: int) -> None:
    """A FLAC as an encoder writes it to a pipe: STREAMINFO's total samples (its last 36 bits but the MD5) are zero."""
    soundfile.write(path, sound_NC, rate, format="FLAC", subtype="PCM_16")
    content = bytearray(path.read_bytes())
    content[18:26] = (int.from_bytes(content[18:26], "big") >> 36 << 36).to_bytes(8, "big")
    path.write_bytes(content)


@dataclass(frozen=True)
class Case:
    name: str
    write: Writer
    rate: int
    num_channels: int
    format: str  # what probe calls it
    oracle: str = "soundfile"  # who decodes it plainly
    tolerance: float = 0.0
    num_samples: int = 150_001  # more than one block of the reader
    lossless: bool = False  # decoding gives as many samples as were written, if not the same ones

    def __str__(self) -> str:
        return self.name


MP3 = 1e-5  # mpg123 and FFmpeg round differently

CASES = [
    Case("wav-16-mono", by_soundfile("WAV", "PCM_16"), 8_000, 1, "wav", num_samples=300_001, lossless=True),
    Case("wav-16-stereo", by_soundfile("WAV", "PCM_16"), 44_100, 2, "wav", lossless=True),
    Case("wav-24-stereo", by_soundfile("WAV", "PCM_24"), 48_000, 2, "wav", lossless=True),
    Case("wav-32-5-channels", by_soundfile("WAV", "PCM_32"), 16_000, 5, "wav", lossless=True),
    Case("wav-float-mono", by_soundfile("WAV", "FLOAT"), 22_050, 1, "wav", lossless=True),
    Case("wav-double-stereo", by_soundfile("WAV", "DOUBLE"), 96_000, 2, "wav", lossless=True),
    Case("wav-ulaw-mono", by_soundfile("WAV", "ULAW"), 8_000, 1, "wav", lossless=True),
    Case("wav-alaw-mono", by_soundfile("WAV", "ALAW"), 8_000, 1, "wav", lossless=True),
    Case("wav-8-5-channels", by_soundfile("WAV", "PCM_U8"), 11_025, 5, "wav", lossless=True),
    Case("wavex-24-5-channels", by_soundfile("WAVEX", "PCM_24"), 48_000, 5, "wav", lossless=True),
    Case("rf64-stereo", by_soundfile("RF64", "PCM_16"), 32_000, 2, "wav", lossless=True),
    Case("wav-ima-adpcm", by_soundfile("WAV", "IMA_ADPCM"), 16_000, 2, "wav"),
    Case("wav-ms-adpcm", by_soundfile("WAV", "MS_ADPCM"), 22_050, 1, "wav", lossless=True),
    Case("wav-gsm", by_soundfile("WAV", "GSM610"), 8_000, 1, "wav", lossless=True),
    Case("wav-g721", by_soundfile("WAV", "G721_32"), 8_000, 1, "wav"),
    Case("wav-mp3", by_pyav("wav", "libmp3lame"), 16_000, 1, "wav", "pyav", MP3),
    Case("w64", by_soundfile("W64", "PCM_16"), 16_000, 1, "w64", lossless=True),
    Case("aiff-24-stereo", by_soundfile("AIFF", "PCM_24"), 44_100, 2, "aiff", lossless=True),
    Case("au-stereo", by_soundfile("AU", "PCM_16"), 16_000, 2, "au", lossless=True),
    Case("caf-alac", by_soundfile("CAF", "ALAC_16"), 44_100, 2, "caf", lossless=True),
    Case("flac-16-mono", by_soundfile("FLAC", "PCM_16"), 16_000, 1, "flac", num_samples=300_001, lossless=True),
    Case("flac-24-stereo", by_soundfile("FLAC", "PCM_24"), 48_000, 2, "flac", lossless=True),
    Case("flac-5-channels", by_soundfile("FLAC", "PCM_16"), 44_100, 5, "flac", lossless=True),
    Case("flac-streamed", streamed_flac, 16_000, 2, "flac", "pyav", lossless=True),
    Case("mp3-tagged-low", by_pyav("mp3", "libmp3lame", bit_rate=32_000), 44_100, 1, "mp3", "pyav", MP3, 600_001),
    Case("mp3-tagged-speech", by_pyav("mp3", "libmp3lame", bit_rate=32_000), 24_000, 1, "mp3", "pyav", MP3, 300_001),
    Case("mp3-tagged-stereo", by_pyav("mp3", "libmp3lame", bit_rate=128_000), 48_000, 2, "mp3", "pyav", MP3),
    Case(
        "mp3-untagged-low",
        by_pyav("mp3", "libmp3lame", bit_rate=32_000, write_xing="0"),
        44_100, 1, "mp3-untagged", "pyav", MP3, 600_001,
    ),
    Case(
        "mp3-untagged-stereo",
        by_pyav("mp3", "libmp3lame", bit_rate=64_000, write_xing="0"),
        22_050, 2, "mp3-untagged", "pyav", MP3,
    ),
    Case("ogg-vorbis-mono", by_soundfile("OGG", "VORBIS"), 16_000, 1, "ogg", lossless=True),
    Case("ogg-vorbis-stereo", by_soundfile("OGG", "VORBIS"), 44_100, 2, "ogg", num_samples=300_001, lossless=True),
    Case("ogg-opus-mono", by_soundfile("OGG", "OPUS"), 16_000, 1, "ogg", lossless=True),
    Case("ogg-opus-stereo", by_soundfile("OGG", "OPUS"), 48_000, 2, "ogg", num_samples=300_001, lossless=True),
    Case("m4a-mono", by_pyav("ipod", "aac"), 16_000, 1, "mp4", "pyav"),
    Case("m4a-stereo", by_pyav("ipod", "aac", movflags="faststart"), 44_100, 2, "mp4", "pyav"),
    Case("m4a-5-channels", by_pyav("ipod", "aac"), 48_000, 5, "mp4", "pyav"),
    Case("m4a-alac", by_pyav("ipod", "alac"), 44_100, 2, "mp4", "pyav"),
    Case("mp4-fragments", by_pyav("mp4", "aac", movflags="frag_keyframe+empty_moov"), 44_100, 1, "mp4", "pyav"),
    Case("mp4-dash", by_pyav("mp4", "aac", movflags="dash+frag_custom+delay_moov"), 44_100, 1, "mp4", "pyav"),
    Case("aac-mono", by_pyav("adts", "aac"), 16_000, 1, "aac", "pyav"),
    Case("aac-stereo", by_pyav("adts", "aac"), 44_100, 2, "aac", "pyav"),
    Case("webm-opus-mono", by_pyav("webm", "libopus"), 48_000, 1, "webm", "pyav"),
    Case("webm-opus-stereo", by_pyav("webm", "libopus"), 24_000, 2, "webm", "pyav"),
    Case("mka-flac", by_pyav("matroska", "flac"), 16_000, 1, "webm", "pyav"),
]  # fmt: skip


@dataclass(frozen=True)
class Made:
    path: Path
    probe: Probe
    whole_N: Tensor  # the mean of all channels


def probe_path(path: Path) -> Probe:
    with path.open("rb") as file:
        return probe(file, path.stat().st_size, Limits())


def read(path: Path, found: Probe, spans: list[Span]) -> list[NDArray[np.float32]]:
    """`[N, channels]` of each span, from one pass."""
    pieces: list[list[NDArray[np.float32]]] = [[] for _ in spans]
    with path.open("rb") as file:
        for index, piece_NC in decode(file, found.size_bytes, format=found.format, spans=spans):
            assert piece_NC.dtype == np.float32
            pieces[index].append(piece_NC)
    whole = [np.concatenate(each) for each in pieces]
    assert [len(each) for each in whole] == [span.num_samples for span in spans]
    return whole


def waveforms(path: Path, found: Probe, spans: list[Span]) -> list[Tensor]:
    return [torch.from_numpy(np.ascontiguousarray(each_NC[:, 0])) for each_NC in read(path, found, spans)]


def plain_pyav(path: Path) -> NDArray[np.float32]:
    """Mono `[N]`: everything FFmpeg decodes, the mean over channels."""
    parts = []
    with av.open(str(path)) as container:
        to_float = av.AudioResampler(format="fltp")
        for frame in container.decode(audio=0):
            parts += [planar.to_ndarray() for planar in to_float.resample(frame)]
    return np.concatenate(parts, axis=1).mean(axis=0, dtype=np.float32)


def plain_soundfile(path: Path) -> NDArray[np.float32]:
    return soundfile.read(path, dtype="float32", always_2d=True)[0].mean(axis=1, dtype=np.float32)


@pytest.fixture(scope="module", params=CASES, ids=str)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture(scope="module")
def made(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Made:
    path = tmp_path_factory.mktemp("made") / case.name
    case.write(path, sound(case.num_samples, case.num_channels, case.rate), case.rate)
    found = probe_path(path)
    return Made(path, found, waveforms(path, found, [Span(0, found.num_samples)])[0])


def test_the_header_is_read_for_what_it_is(case: Case, made: Made) -> None:
    assert made.probe.format == case.format
    assert made.probe.size_bytes == made.path.stat().st_size
    assert made.probe.num_channels == case.num_channels
    assert made.probe.sample_rate == (48_000 if case.name.startswith("webm") else case.rate)
    if case.lossless:
        assert made.probe.num_samples == case.num_samples


def test_samples_are_those_of_a_plain_decode(case: Case, made: Made) -> None:
    plain_N = plain_soundfile(made.path) if case.oracle == "soundfile" else plain_pyav(made.path)
    ours_N = made.whole_N.numpy()
    assert len(ours_N) == made.probe.num_samples
    if made.probe.format == "mp4" or case.name in ("wav-ima-adpcm", "wav-ms-adpcm", "wav-gsm"):
        # the container says where the encoder's padding begins; plain decoding goes on to the end of its block
        assert len(ours_N) <= len(plain_N) < len(ours_N) + 2_048
        plain_N = plain_N[: len(ours_N)]
    assert len(ours_N) == len(plain_N)
    assert np.abs(plain_N).max() > 0.2
    assert np.abs(ours_N - plain_N).max() <= case.tolerance


def test_windows_are_slices_of_the_whole_sample_for_sample(made: Made) -> None:
    num_samples = made.probe.num_samples
    tiles = [Span(start, min(16_001, num_samples - start)) for start in range(0, num_samples, 16_001)]
    odd_places = [Span(1, 1), Span(777, 20_011), Span(50_001, 3), Span(60_013, 80_001), Span(num_samples - 1, 1)]
    for spans in (tiles, odd_places, tiles[5:], tiles[3::3], odd_places[3:], [Span(num_samples - 4_001, 4_001)]):
        for span, window_N in zip(spans, waveforms(made.path, made.probe, spans), strict=True):
            assert torch.equal(window_N, made.whole_N[span.start_sample : span.start_sample + span.num_samples]), span


def test_a_second_reading_gives_the_same_bits(made: Made) -> None:
    assert probe_path(made.path) == made.probe
    again = waveforms(made.path, made.probe, [Span(0, made.probe.num_samples)])[0]
    assert torch.equal(again, made.whole_N)


@pytest.mark.parametrize("name", ["wav-24-stereo", "flac-16-mono", "ogg-opus-stereo", "m4a-stereo", "webm-opus-mono"])
def test_windows_are_resampled_as_torchaudio_resamples_the_slice(name: str, tmp_path: Path) -> None:
    chosen = next(case for case in CASES if case.name == name)
    path = tmp_path / name
    chosen.write(path, sound(chosen.num_samples, chosen.num_channels, chosen.rate), chosen.rate)
    found = probe_path(path)
    spans = [Span(3, 16_001), Span(50_001, 48_000)]
    whole_N = waveforms(path, found, [Span(0, found.num_samples)])[0]
    for span, span_N in zip(spans, waveforms(path, found, spans), strict=True):
        slice_N = whole_N[span.start_sample : span.start_sample + span.num_samples]
        for rate in (16_000, 24_000):
            sink = StreamResampler(span.num_samples, found.sample_rate, rate)
            sink.push(span_N)
            torch.testing.assert_close(sink.finish(), Resample(found.sample_rate, rate)(slice_N), atol=2e-6, rtol=0)


@pytest.mark.parametrize("name", ["wav-16-stereo", "flac-16-mono", "mp3-tagged-stereo", "ogg-vorbis-mono", "m4a-mono"])
def test_a_wrong_suffix_changes_nothing(name: str, tmp_path: Path) -> None:
    chosen = next(case for case in CASES if case.name == name)
    path = tmp_path / "right"
    chosen.write(path, sound(20_000, chosen.num_channels, chosen.rate), chosen.rate)
    found = probe_path(path)
    whole_N = waveforms(path, found, [Span(0, found.num_samples)])[0]
    for wrong in ("a.wav", "a.mp3", "a.m4a", "a.txt", "a.m3u8", "a"):
        copy = tmp_path / wrong
        shutil.copy(path, copy)
        assert probe_path(copy) == found
        assert torch.equal(waveforms(copy, found, [Span(0, found.num_samples)])[0], whole_N)


@pytest.mark.parametrize("rate", [8_000, 16_000, 22_050, 44_100, 48_000])
def test_the_length_of_an_m4a_is_its_containers_own(rate: int, tmp_path: Path) -> None:
    path = tmp_path / "a.m4a"
    by_pyav("ipod", "aac")(path, sound(20_123, 1, rate), rate)
    found = probe_path(path)
    with av.open(str(path)) as container:
        track = container.streams.audio[0]
        assert track.duration is not None
        assert track.time_base is not None
        assert found.num_samples <= round(track.duration * track.time_base * rate)
    assert abs(found.num_samples - 20_123) <= rate / 1_000  # edit lists count milliseconds
    assert found.num_samples < len(plain_pyav(path))


def test_a_variable_bit_rate_mp3_without_a_tag_is_read_to_its_end(tmp_path: Path) -> None:
    rate, path = 44_100, tmp_path / "a.mp3"
    loud_then_quiet_NC = np.full((20 * rate, 1), 1e-6, dtype=np.float32)
    loud_then_quiet_NC[: 4 * rate] = sound(4 * rate, 1, rate)
    by_pyav("mp3", "libmp3lame", quality=2, write_xing="0")(path, loud_then_quiet_NC, rate)
    found = probe_path(path)
    assert found.format == "mp3-untagged"
    assert found.num_samples == len(plain_pyav(path))


@pytest.mark.parametrize(("container", "codec"), [("ipod", "aac"), ("webm", "libopus")])
def test_tags_in_another_encoding_do_not_keep_the_audio_out(container: str, codec: str, tmp_path: Path) -> None:
    path = tmp_path / "a"
    by_pyav(container, codec, tags={"title": "QQQQQQ"})(path, sound(48_000, 1, 48_000), 48_000)
    content = path.read_bytes()
    assert b"QQQQQQ" in content
    path.write_bytes(content.replace(b"QQQQQQ", b"caf\xe9 \xe9"))  # Latin-1
    found = probe_path(path)
    assert len(waveforms(path, found, [Span(0, found.num_samples)])[0]) == found.num_samples


def test_sixteen_channels_are_mixed_down(tmp_path: Path) -> None:
    slope_N = np.linspace(-0.5, 0.5, 48_000, dtype=np.float32)
    soundfile.write(tmp_path / "a.wav", np.repeat(slope_N[:, None], 16, axis=1), 48_000, subtype="FLOAT")
    found = probe_path(tmp_path / "a.wav")
    assert found.num_channels == 16
    whole_N = waveforms(tmp_path / "a.wav", found, [Span(0, 48_000)])[0]
    np.testing.assert_allclose(whole_N.numpy(), slope_N, atol=1e-6)


def test_sixteen_channels_in_a_container_of_ffmpegs_are_mixed_down(tmp_path: Path) -> None:
    """In a process of its own: PyAV may read past the planes of a frame with more than eight, and die of it."""
    slope_N = np.linspace(-16_000, 16_000, 48_000).astype(np.int16)
    with av.open(str(tmp_path / "a.mka"), "w", format="matroska") as out:
        stream = out.add_stream("pcm_s16le", rate=48_000, layout=LAYOUTS[16])
        frame = av.AudioFrame.from_ndarray(np.repeat(slope_N, 16)[None], format="s16", layout=LAYOUTS[16])
        frame.sample_rate, frame.pts = 48_000, 0
        out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    script = """
import sys
import numpy as np
from wavemill.pipelines.audio import Limits, Span, decode, probe
with open(sys.argv[1], "rb") as file:
    size = file.seek(0, 2)
    found = probe(file, size, Limits())
    mono = np.concatenate([x for _, x in decode(file, size, format=found.format, spans=[Span(0, found.num_samples)])])
print(found.num_channels, len(mono), *(round(mono[at, 0] * 32768) for at in (0, -1)))
"""
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "a.mka"], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr[-2_000:]
    assert done.stdout.strip() == "16 48000 -16000 16000"


def test_sound_in_one_of_two_channels_comes_out_at_half(tmp_path: Path) -> None:
    one_sided_NC = np.zeros((4_000, 2), dtype=np.float32)
    one_sided_NC[:, 0] = 0.5
    for format, subtype in (("WAV", "PCM_16"), ("FLAC", "PCM_16"), ("WAV", "FLOAT")):
        path = tmp_path / f"{format}-{subtype}"
        soundfile.write(path, one_sided_NC, 16_000, format=format, subtype=subtype)
        found = probe_path(path)
        mono_N = waveforms(path, found, [Span(0, 4_000)])[0]
        assert (mono_N == 0.25).all()


def test_channels_are_had_one_by_one_and_mixed_in_the_order_asked_for(tmp_path: Path) -> None:
    sound_NC = sound(50_000, 5, 16_000)
    for name, write in (("wav", by_soundfile("WAV", "FLOAT")), ("mka", by_pyav("matroska", "flac"))):
        path = tmp_path / name
        write(path, sound_NC, 16_000)
        found = probe_path(path)
        first_NC, second_NC = read(path, found, [Span(7, 20_000, (4, MIX, 0)), Span(30_000, 20_000, (2,))])
        expected_NC = np.stack([sound_NC[:, 4], sound_NC.mean(axis=1), sound_NC[:, 0]], axis=1)
        np.testing.assert_allclose(first_NC, expected_NC[7:20_007], atol=1e-4)  # FLAC has 16 bits
        np.testing.assert_allclose(second_NC, sound_NC[30_000:, 2:3], atol=1e-4)


@pytest.mark.parametrize(
    "name", ["wav-16-stereo", "flac-24-stereo", "mp3-tagged-stereo", "ogg-opus-stereo", "m4a-stereo"]
)
def test_a_window_without_a_descriptor_is_read_like_a_file(name: str, tmp_path: Path) -> None:
    """A member of a tar: bytes in the middle of a file, with other bytes about them."""
    chosen = next(case for case in CASES if case.name == name)
    path = tmp_path / name
    chosen.write(path, sound(chosen.num_samples, chosen.num_channels, chosen.rate), chosen.rate)
    found = probe_path(path)
    content = path.read_bytes()
    (tmp_path / "tar").write_bytes(b"RIFF....WAVE" * 99 + content + b"\xff\xfb\x90\x64" * 99)
    spans = [Span(0, 5), Span(70_000, 20_000), Span(found.num_samples - 9, 9)]
    expected = read(path, found, spans)
    for window in (io.BytesIO(content), _window(tmp_path / "tar", 12 * 99, len(content))):
        assert probe(window, len(content), Limits()) == found
        pieces = decode(window, len(content), format=found.format, spans=spans)
        got: list[list[NDArray[np.float32]]] = [[], [], []]
        for index, piece_NC in pieces:
            got[index].append(piece_NC)
        for one, other in zip(got, expected, strict=True):
            assert np.array_equal(np.concatenate(one), other)


def _window(path: Path, offset: int, size: int) -> BinaryIO:
    return cast(BinaryIO, Part(open(path, "rb"), offset, size))


def test_an_hour_is_read_in_bounded_memory(tmp_path: Path) -> None:
    """Windows of an hour need one window's memory."""
    with soundfile.SoundFile(tmp_path / "hour.flac", "w", 16_000, 1, subtype="PCM_16") as file:
        for _ in range(60):
            file.write(np.zeros(60 * 16_000, dtype=np.int16))
    script = """
import resource, sys
from wavemill.pipelines.audio import Limits, Span, decode, probe

def grown():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - imported

imported = 0
imported = grown()
with open(sys.argv[1] + "/hour.flac", "rb") as file:
    size = file.seek(0, 2)
    found = probe(file, size, Limits())
    assert found.num_samples == 3600 * 16000, found
    spans = [Span(0, found.num_samples)]
    assert sum(len(x) for _, x in decode(file, size, format="flac", spans=spans)) == found.num_samples
assert "torch" not in sys.modules
print(grown())
"""
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-2_000:]
    assert float(done.stdout) < 60
