"""Bad audio becomes an error of the right class, hangs nobody, opens nothing else and harms no neighbour."""

import errno
import io
import os
import shutil
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
import torch
from audio_at import probe_at, read_at, read_rows
from conftest import STREAMS
from numpy.typing import NDArray
from torch import Tensor
from wavemill.jobs.corpus import build_corpus
from wavemill.pipelines.audio import Span
from wavemill.pipelines.entries import AudioError
from wavemill.pipelines.policy import CorpusPolicy
from wavemill.pipelines.reading import Reader, Row
from wavemill.pipelines.source_paths import is_audio
from wavemill.pipelines.streams import load_stream_tokenizer
from wavemill.pipelines.tokenize import Encoded, encode_rows
from wavemill.storage.codes import open_corpus
from wavemill.storage.parquet import read_parquet
from wavemill.storage.root import Root
from wavemill.storage.schema import CORPUS_SCHEMA
from wavemill.tokenizers.tokenizer import Tokenizer

pytestmark = pytest.mark.timeout(60)  # nothing here takes long unless something hangs

NOISE = (0.2 * np.random.default_rng(0).standard_normal(60_000)).astype(np.float32)
SILENCE = np.zeros(0, dtype=np.float32)


def outcome(path: Path | str) -> AudioError | Tensor:
    """The recording's samples at 16 kHz, or the error it ends in, when it is probed or when it is read."""
    try:
        [result] = read_at(path, [Span(0, probe_at(path).num_samples)], [16_000])
    except AudioError as error:
        result = error
    if isinstance(result, AudioError):
        assert 0 < len(result.message) <= 300
        assert result.message.isprintable()  # no line breaks, no escapes
        return result
    return result[16_000]


def kind_of(path: Path | str) -> str:
    result = outcome(path)
    assert isinstance(result, AudioError), f"{len(result):,} samples were read"
    return result.kind


def sound(format: str, subtype: str | None = None, samples: NDArray[np.floating] = NOISE, rate: int = 16_000) -> bytes:
    content = io.BytesIO()
    soundfile.write(content, samples, rate, format=format, subtype=subtype)
    return content.getvalue()


def container(format: str, codec: str, **options: str) -> bytes:
    with tempfile.NamedTemporaryFile() as file:  # some options need a file that FFmpeg can open again
        _write_container(file.name, format, codec, options)
        return Path(file.name).read_bytes()


def _write_container(path: str, format: str, codec: str, options: dict[str, str]) -> None:
    with av.open(path, "w", format=format, options=options) as out:
        stream = out.add_stream(codec, rate=16_000, layout="mono")
        frame = av.AudioFrame.from_ndarray(NOISE[None], format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 16_000, 0
        fitted = av.AudioResampler(format=stream.format.name, layout="mono", rate=16_000)
        for part in [*fitted.resample(frame), *fitted.resample(None)]:
            out.mux(stream.encode(part))
        out.mux(stream.encode(None))


def wav(*, rate: int, num_channels: int, num_frames: int = 100) -> bytes:
    samples = bytes(2 * num_channels * num_frames)
    frame_bytes = 2 * num_channels % 2**16
    chunk = struct.pack("<HHIIHH", 1, num_channels, rate, rate * frame_bytes % 2**32, frame_bytes, 16)
    body = b"WAVEfmt " + struct.pack("<I", 16) + chunk + b"data" + struct.pack("<I", len(samples)) + samples
    return b"RIFF" + struct.pack("<I", len(body)) + body


def half(content: bytes) -> bytes:
    return content[: len(content) // 2]


def with_value(value: float, subtype: str) -> bytes:
    return sound("WAV", subtype, np.concatenate([NOISE, [value], NOISE]))


def flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 0x55]) + content[middle + 1 :]


ID3 = b"ID3\x03\x00\x00\x00\x00\x00\x0a" + bytes(10)

BROKEN: dict[str, tuple[Callable[[], bytes], str]] = {
    "nothing": (lambda: b"", "empty"),
    "a WAV header without samples": (lambda: sound("WAV", samples=SILENCE), "no-samples"),
    "an Ogg header without samples": (lambda: sound("OGG", samples=SILENCE), "no-samples"),
    "an AIFF header without samples": (lambda: sound("AIFF", samples=SILENCE), "no-samples"),
    "a WAV cut inside its header": (lambda: sound("WAV")[:20], "corrupt"),
    "a WAV cut inside its first word": (lambda: sound("WAV")[:11], "not-audio"),
    "a WAV cut behind its header": (lambda: sound("WAV")[:44], "truncated"),
    "a WAV that lacks half": (lambda: half(sound("WAV")), "truncated"),
    "a WAV that lacks a byte": (lambda: sound("WAV", "PCM_24")[:-1], "truncated"),
    "a FLAC cut behind its magic": (lambda: sound("FLAC")[:4], "corrupt"),
    "a FLAC cut behind its header": (lambda: sound("FLAC")[:42], "truncated"),
    "a FLAC that lacks half": (lambda: half(sound("FLAC")), "truncated"),
    "a FLAC that lacks a byte": (lambda: sound("FLAC")[:-1], "corrupt"),
    "a FLAC with a wrong byte": (lambda: flipped(sound("FLAC")), "corrupt"),
    "an MP3 that lacks half": (lambda: half(container("mp3", "libmp3lame")), "truncated"),
    "an MP3 with nothing behind its tag": (lambda: ID3, "not-audio"),
    "an MP3 whose tag is longer than the file": (lambda: b"ID3\x03\x00\x00\x7f\x7f\x7f\x7f" + bytes(99), "not-audio"),
    "an Ogg cut inside its header": (lambda: sound("OGG")[:1_000], "truncated"),
    "an M4A without its index": (lambda: half(container("ipod", "aac")), "truncated"),
    "an M4A that lacks half": (lambda: half(container("ipod", "aac", movflags="faststart")), "truncated"),
    "an M4A that lacks all sound": (lambda: container("ipod", "aac", movflags="faststart")[:1_200], "truncated"),
    "a WebM that is a header": (lambda: container("webm", "libopus")[:200], "truncated"),
    "an error page": (lambda: b"<!DOCTYPE html><html><body>404 Not Found</body></html>", "not-audio"),
    "an error page behind blank lines": (lambda: b"\xef\xbb\xbf\r\n\n <html>403</html>", "not-audio"),
    "an XML answer": (lambda: b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "not-audio"),
    "a text": (lambda: "Grüße an alle.\n".encode() * 50, "not-audio"),
    "an M3U playlist": (lambda: b"#EXTM3U\nother.wav\n", "not-audio"),
    "a PLS playlist": (lambda: b"[playlist]\nFile1=other.wav\n", "not-audio"),
    "an ffconcat script": (lambda: b"ffconcat version 1.0\nfile other.wav\n", "not-audio"),
    "a Git LFS pointer": (lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "not-audio"),
    "random bytes": (lambda: np.random.default_rng(5).bytes(10_000), "not-audio"),
    "zeros": (lambda: bytes(10_000), "not-audio"),
    "not a number in float": (lambda: with_value(float("nan"), "FLOAT"), "non-finite"),
    "not a number in double": (lambda: with_value(float("nan"), "DOUBLE"), "non-finite"),
    "infinity in float": (lambda: with_value(float("inf"), "FLOAT"), "non-finite"),
    "minus infinity in double": (lambda: with_value(float("-inf"), "DOUBLE"), "non-finite"),
    "a double beyond float32": (lambda: with_value(1e300, "DOUBLE"), "non-finite"),
    "1 Hz": (lambda: wav(rate=1, num_channels=1), "unsupported"),
    "3,999 Hz": (lambda: wav(rate=3_999, num_channels=1), "unsupported"),
    "2^31 - 1 Hz": (lambda: wav(rate=2**31 - 1, num_channels=1), "unsupported"),
    "2^32 - 1 Hz": (lambda: wav(rate=2**32 - 1, num_channels=1), "corrupt"),
    "0 Hz": (lambda: wav(rate=0, num_channels=1), "corrupt"),
    "0 channels": (lambda: wav(rate=16_000, num_channels=0), "corrupt"),
    "65 channels": (lambda: wav(rate=16_000, num_channels=65), "unsupported"),
    "200 channels": (lambda: wav(rate=16_000, num_channels=200), "unsupported"),
    "65,535 channels": (lambda: wav(rate=16_000, num_channels=65_535), "corrupt"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_each_kind_of_bad_file_has_its_class_under_any_suffix(name: str, tmp_path: Path) -> None:
    make, kind = BROKEN[name]
    content = make()
    for suffix in (".wav", ".mp3", ".m4a", ""):
        path = tmp_path / f"bad{suffix}"
        path.write_bytes(content)
        assert kind_of(path) == kind


def test_the_limits_themselves_are_accepted(tmp_path: Path) -> None:
    for content in (
        wav(rate=4_000, num_channels=1),
        wav(rate=768_000, num_channels=1),
        wav(rate=16_000, num_channels=64),
    ):
        (tmp_path / "a.wav").write_bytes(content)
        assert isinstance(outcome(tmp_path / "a.wav"), Tensor)


def test_what_a_bad_file_seems_to_be_is_said(tmp_path: Path) -> None:
    for content, words in (
        (b"<html>", "HTML"),
        (b"#EXTM3U\n", "playlist"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
        ("nur Text äöü".encode(), "text"),
        (ID3, "ID3"),
    ):
        path = tmp_path / "bad.mp3"
        path.write_bytes(content)
        result = outcome(path)
        assert isinstance(result, AudioError)
        assert words in result.message


def test_a_vorbis_cut_short_is_told_by_its_missing_end(tmp_path: Path) -> None:
    (tmp_path / "whole.ogg").write_bytes(sound("OGG", "VORBIS"))
    (tmp_path / "cut.ogg").write_bytes(half(sound("OGG", "VORBIS")))
    whole_N = outcome(tmp_path / "whole.ogg")
    assert isinstance(whole_N, Tensor)
    assert len(whole_N) == 60_000
    assert kind_of(tmp_path / "cut.ogg") == "truncated"


def test_an_opus_cut_short_gives_what_is_there_and_no_other_samples(tmp_path: Path) -> None:
    """Opus streams are often recorded without an end: the last whole page is taken for one."""
    (tmp_path / "whole.ogg").write_bytes(sound("OGG", "OPUS"))
    (tmp_path / "cut.ogg").write_bytes(half(sound("OGG", "OPUS")))
    whole_N, cut_N = outcome(tmp_path / "whole.ogg"), outcome(tmp_path / "cut.ogg")
    assert isinstance(whole_N, Tensor)
    assert isinstance(cut_N, Tensor)
    assert 10_000 < len(cut_N) < 50_000 < len(whole_N) == 60_000
    assert torch.equal(cut_N, whole_N[: len(cut_N)])


def test_audio_whose_codec_nobody_here_decodes_is_an_error(tmp_path: Path) -> None:
    """Protected or rare: the container is fine, FFmpeg has no decoder."""
    for content, known, unknown in (
        (container("ipod", "alac"), b"alac", b"ac-4"),
        (container("matroska", "flac"), b"A_FLAC", b"A_XLAC"),
        (container("webm", "libopus"), b"A_OPUS", b"A_XPUS"),
    ):
        assert known in content
        path = tmp_path / "a.m4a"
        path.write_bytes(content.replace(known, unknown))
        assert kind_of(path) in ("unsupported", "corrupt", "no-samples")


def test_a_film_without_sound_is_an_error(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "a.mp4"), "w", format="mp4") as out:
        stream = out.add_stream("mpeg4", rate=25)
        stream.width = stream.height = 32
        out.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), dtype=np.uint8), format="rgb24")))
        out.mux(stream.encode(None))
    assert kind_of(tmp_path / "a.mp4") == "no-samples"


def test_garbage_behind_any_magic_number_is_an_error_or_samples_and_never_a_crash(tmp_path: Path) -> None:
    generator = np.random.default_rng(11)
    magics = (
        b"RIFF\0\0\0\0WAVEfmt ", b"RF64\0\0\0\0WAVEds64", b"RIFX\0\0\0\0WAVE", b"FORM\0\0\0\0AIFFCOMM", b"fLaC",
        b"OggS", b".snd", b"caff", b"NIST_1A\n   1024\n", b"\0\0\0\x20ftypM4A ", b"\x1a\x45\xdf\xa3",
        b"\xff\xfb\x90\x64", b"\xff\xf3\x40\xc0", ID3 + b"\xff\xfb\x90\x64",
        bytes.fromhex("726966662e91cf11a5d628db04c10000"),
    )  # fmt: skip
    for magic in magics:
        for size in (0, 10, 100, 3_000, 20_000):
            path = tmp_path / "bad"
            path.write_bytes(magic + generator.bytes(size))
            outcome(path)


def test_a_file_of_one_sample_is_fine(tmp_path: Path, tokenizers: dict[str, Tokenizer]) -> None:
    rows = []
    for format in ("WAV", "FLAC", "OGG", "MP3"):
        (tmp_path / f"a.{format}").write_bytes(sound(format, samples=NOISE[:1]))
        result = outcome(tmp_path / f"a.{format}")
        assert isinstance(result, Tensor)
        assert len(result) == 1
        rows.append(build(tmp_path / f"a.{format}", tmp_path / f"root-{format}")[0])
    for codes in encode(rows, tokenizers):
        assert isinstance(codes, dict)
        assert codes["semantic"].codes_KT.shape == (1, 0)
        assert codes["acoustic"].codes_KT.shape == (8, 1)


def test_samples_so_large_that_they_overflow_stop_no_run_and_harm_no_neighbour(
    tmp_path: Path, tokenizers: dict[str, Tokenizer]
) -> None:
    """Each is a finite float32; sums of them, as in a resampler, or squares of them, as in a spectrum, are not."""
    (tmp_path / "s").mkdir()
    loud = {"1e15.wav": 1e15, "1e20.wav": 1e20, "3e38.wav": 3e38}
    for name, value in loud.items():
        (tmp_path / "s" / name).write_bytes(sound("WAV", "FLOAT", value * np.sign(NOISE), rate=44_100))
    (tmp_path / "s" / "good.wav").write_bytes(sound("WAV"))
    rows = build(tmp_path / "s", tmp_path / "root")
    results = dict(zip((row["path"] for row in rows), encode(rows, tokenizers), strict=True))
    good = rows[-1]
    assert good["path"] == "good.wav"
    assert same(results["good.wav"], encode([good], tokenizers)[0])
    for name in loud:
        result = results[name]
        if isinstance(result, AudioError):
            assert result.kind == "non-finite"
        else:
            waveform_N = outcome(tmp_path / "s" / name)
            assert isinstance(waveform_N, Tensor)
            for stream, tokens in result.items():
                codes_KT = tokens.codes_KT
                assert tokenizers[stream].encode(waveform_N).equal(codes_KT)
                assert 0 <= codes_KT.min() <= codes_KT.max() < tokenizers[stream].spec.codebook_size
                assert tokenizers[stream].features.extract(waveform_N).isfinite().all()  # codes of NaN mean nothing


def test_what_is_no_regular_file_is_an_error_and_hangs_nobody(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.wav")
    (tmp_path / "folder.wav").mkdir()
    (tmp_path / "dangling.wav").symlink_to(tmp_path / "nowhere.wav")
    (tmp_path / "loop.wav").symlink_to(tmp_path / "loop.wav")
    assert kind_of(tmp_path / "pipe.wav") == "not-a-file"
    assert kind_of(tmp_path / "folder.wav") == "not-a-file"
    assert kind_of("/dev/zero") == "not-a-file"
    assert kind_of(tmp_path / "dangling.wav") == "missing"
    assert kind_of(tmp_path / "nowhere.wav") == "missing"
    assert kind_of(tmp_path / "loop.wav") == "unreadable"
    assert kind_of(tmp_path / ("x" * 300)) == "unreadable"
    assert kind_of(f"{tmp_path}/a\0b.wav") == "unreadable"
    assert not any(is_audio(str(tmp_path), path.name) for path in tmp_path.iterdir())


def test_a_file_that_changed_or_went_since_it_was_probed_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    path.write_bytes(sound("WAV"))
    found = probe_at(path)
    row = {"source_root": str(tmp_path), "path": path.name, "format": found.format, "size_bytes": found.size_bytes}
    row |= {"sample_rate": found.sample_rate, "start_sample": 0, "num_samples": found.num_samples}

    def kind() -> str:
        (result,) = read_rows([row], [16_000])
        assert isinstance(result, AudioError)
        return result.kind

    path.write_bytes(sound("WAV", samples=NOISE[:100]))
    assert kind() == "changed"
    path.write_bytes(np.random.default_rng(0).bytes(found.size_bytes))
    assert kind() == "not-audio"
    path.unlink()
    assert kind() == "missing"
    os.mkfifo(path)
    assert kind() == "not-a-file"


@pytest.mark.parametrize("suffix", [".wav", ".mp3", ".m4a", ".ogg", ".m3u8", ".ffconcat"])
def test_a_playlist_that_poses_as_audio_never_opens_what_it_names(suffix: str, tmp_path: Path) -> None:
    """What it names is a pipe nobody writes to: opening it for reading would hang, and would be seen."""
    bait = tmp_path / "bait.wav"
    os.mkfifo(bait)
    playlists = (
        f"#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{bait}\n#EXT-X-ENDLIST\n",
        f"#EXTM3U\n#EXTINF:1,x\nfile://{bait}\n",
        f"[playlist]\nFile1={bait}\nNumberOfEntries=1\n",
        f"ffconcat version 1.0\nfile '{bait}'\n",
        f"# comment\nfile '{bait}'\n",
        f"concat:{bait}",
        f'<?xml version="1.0"?><MPD><Period><AdaptationSet><BaseURL>{bait}</BaseURL></AdaptationSet></Period></MPD>',
        f"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\na=control:file://{bait}\nm=audio 0 RTP/AVP 0\n",
        f"{bait}\n",
    )
    for number, playlist in enumerate(playlists):
        for start in (b"", ID3):
            path = tmp_path / f"list-{number}{suffix}"
            path.write_bytes(start + playlist.encode())
            assert kind_of(path) == "not-audio"
            with pytest.raises(OSError, match="No such device or address") as caught:
                os.open(bait, os.O_WRONLY | os.O_NONBLOCK)  # succeeds only while somebody reads
            assert caught.value.errno == errno.ENXIO


# Rows and codes of whole folders


@pytest.fixture(scope="module")
def tokenizers(fitted_root: Path) -> dict[str, Tokenizer]:
    return {stream.name: load_stream_tokenizer(Root(fitted_root), stream, device="cpu") for stream in STREAMS}


READERS: list[Reader] = []  # kept warm, as workers do


def build(source: Path | str, root: Path, *, window_s: float | None = None) -> list[Row]:
    """All rows of a fresh corpus, in order."""
    build_corpus(Root(root), [f"x={source}"], CorpusPolicy(window_s=window_s), shard_hours=1)
    corpus = open_corpus(Root(root))
    return [
        row
        for shard in corpus.files
        for row in read_parquet(Root(root), corpus.path(shard), schema=CORPUS_SCHEMA).to_pylist()
    ]


def encode(
    rows: list[Row], tokenizers: dict[str, Tokenizer], *, threads: int = 1, ahead_bytes: int = 1 << 26
) -> list[Encoded]:
    while len(READERS) < threads:
        READERS.append(Reader(Root("/nonexistent")))
    return encode_rows(rows, tokenizers, READERS[:threads], ahead_bytes=ahead_bytes)[0]


def same(one: Encoded, other: Encoded) -> bool:
    if isinstance(one, AudioError) or isinstance(other, AudioError):
        return isinstance(one, AudioError) and isinstance(other, AudioError) and one.kind == other.kind
    return one.keys() == other.keys() and all(torch.equal(one[name].codes_KT, other[name].codes_KT) for name in one)


def test_paths_that_lead_out_of_their_source_are_errors(tmp_path: Path) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    for folder in (inside, outside):
        folder.mkdir()
        (folder / "a.wav").write_bytes(sound("WAV"))
    (inside / "link.wav").symlink_to(outside / "a.wav")
    (inside / "far.wav").symlink_to("/" + "/".join(["deep" * 20] * 40))
    (inside / "device.wav").symlink_to("/dev/zero")
    (inside / "good.wav").symlink_to("a.wav")
    found = {row["path"]: row["error"] for row in build(inside, tmp_path / "root")}
    assert found == {
        "a.wav": None,
        "device.wav": "outside-source",
        "far.wav": "outside-source",
        "good.wav": None,
        "link.wav": "outside-source",
    }
    manifest = inside / "list.jsonl"
    manifest.write_text('{"audio_filepath": "../outside/a.wav"}\n{"audio_filepath": "x/../../outside/a.wav"}\n')
    rows = build(manifest, tmp_path / "root-2")
    assert [row["error"] for row in rows] == ["outside-source"]  # both are one path
    assert all(len(row["error_message"]) <= 300 for row in rows)


def test_a_source_that_is_a_link_itself_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.wav").write_bytes(sound("WAV"))
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert [row["error"] for row in build(tmp_path / "link", tmp_path / "root")] == [None]


def test_one_bad_window_fails_alone(tmp_path: Path, tokenizers: dict[str, Tokenizer]) -> None:
    whole = (0.2 * np.random.default_rng(1).standard_normal(10 * 22_050)).astype(np.float32)
    spoilt = whole.copy()
    spoilt[int(4.5 * 22_050)] = np.nan
    results = []
    for name, samples in (("whole", whole), ("spoilt", spoilt)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.wav").write_bytes(sound("WAV", "FLOAT", samples, 22_050))
        rows = build(tmp_path / name, tmp_path / f"root-{name}", window_s=1.0)
        assert [row["start_sample"] for row in rows] == [22_050 * second for second in range(10)]
        results.append(encode(rows, tokenizers))
    for second, (clean, marred) in enumerate(zip(*results, strict=True)):
        if second == 4:
            assert isinstance(marred, AudioError)
            assert marred.kind == "non-finite"
        else:
            assert isinstance(clean, dict)
            assert same(clean, marred)


@pytest.mark.parametrize("format", ["FLAC", "MP3"])
def test_windows_before_the_place_where_a_recording_breaks_off_keep_their_codes(
    format: str, tmp_path: Path, tokenizers: dict[str, Tokenizer]
) -> None:
    samples = (0.2 * np.random.default_rng(1).standard_normal(40 * 16_000)).astype(np.float32)
    results = []
    for name, cut in (("whole", lambda content: content), ("cut", lambda content: content[: len(content) * 3 // 4])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a").write_bytes(cut(sound(format, samples=samples)))
        results.append(encode(build(tmp_path / name, tmp_path / f"root-{name}", window_s=2.0), tokenizers))
    whole, marred = results
    assert len(whole) == len(marred) == 20
    kept = [same(one, other) for one, other in zip(whole, marred, strict=True)]
    assert kept == sorted(kept, reverse=True)  # good up to one place, errors from there on
    assert kept.count(True) >= 8
    assert {error.kind for error, good in zip(marred, kept, strict=True) if not good} == {"truncated"}


def test_bad_files_never_disturb_their_neighbours_codes(
    samples: Path, tmp_path: Path, tokenizers: dict[str, Tokenizer]
) -> None:
    good, mixed = tmp_path / "good", tmp_path / "mixed"
    good.mkdir()
    for path in sorted((samples / "speech").glob("en_anna_0*")):
        if path.suffix != ".txt":
            shutil.copy(path, good)
    shutil.copytree(good, mixed)
    bad = sorted((name, make()) for name, (make, _) in BROKEN.items())
    for number, (_, content) in enumerate(bad):
        (mixed / f"{'abcdefghijklmnopqrstuvwxyz'[number % 26]}{number}.wav").write_bytes(content)
    rows = build(good, tmp_path / "root-good")
    alone = dict(zip((row["id"] for row in rows), encode(rows, tokenizers), strict=True))
    assert len(alone) == 9
    mixed_rows = build(mixed, tmp_path / "root-mixed")
    together = dict(zip((row["id"] for row in mixed_rows), encode(mixed_rows, tokenizers, threads=3), strict=True))
    assert len(together) == 9 + len(BROKEN)
    for segment, codes in alone.items():
        assert isinstance(codes, dict)
        assert same(codes, together.pop(segment))
    assert all(isinstance(error, AudioError) for error in together.values())


@pytest.mark.timeout(30)
def test_bad_recordings_give_back_the_memory_they_had_booked(tmp_path: Path, tokenizers: dict[str, Tokenizer]) -> None:
    """Two threads under a budget for one segment: if a failure freed nothing, the other thread would wait for ever."""
    long = np.concatenate([np.tile(NOISE, 30), [np.nan]])  # the second thread waits by the time this fails
    (tmp_path / "1.wav").write_bytes(sound("WAV", "FLOAT", long, rate=24_000))
    (tmp_path / "2.wav").write_bytes(sound("WAV"))
    rows = build(tmp_path, tmp_path / "root")
    for _ in range(20):
        results = encode(rows, tokenizers, threads=2, ahead_bytes=1)
        assert [isinstance(result, AudioError) for result in results] == [True, False]


def test_memory_and_threads_for_decoding_ahead_change_no_code(
    samples: Path, tmp_path: Path, tokenizers: dict[str, Tokenizer]
) -> None:
    for path in sorted((samples / "speech").glob("en_*_0[1-3].*")):
        if path.suffix != ".txt":
            shutil.copy(path, tmp_path)
    rows = build(tmp_path, tmp_path / "root")
    first = encode(rows, tokenizers)
    assert len(first) >= 6
    for threads, ahead_bytes in ((1, 1), (2, 200_000), (4, 1 << 30)):
        for one, other in zip(first, encode(rows, tokenizers, threads=threads, ahead_bytes=ahead_bytes), strict=True):
            assert isinstance(one, dict)
            assert same(one, other)


def test_a_window_beside_damage_is_read_alike_alone_and_with_its_neighbours(tmp_path: Path) -> None:
    path = tmp_path / "damaged.flac"
    soundfile.write(path, np.random.default_rng(0).standard_normal(16_000 * 30) * 0.1, 16_000)
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 255
    path.write_bytes(content)
    common = {"source": "s", "source_root": str(tmp_path), "path": path.name, "format": "flac", "sample_rate": 16_000}
    rows = [
        {**common, "size_bytes": len(content), "start_sample": 48_000 * number, "num_samples": 48_000}
        for number in range(10)
    ]
    together = read_rows(rows, [16_000])
    alone = [read_rows([row], [16_000])[0] for row in rows]
    for one, other in zip(together, alone, strict=True):
        assert isinstance(one, AudioError) == isinstance(other, AudioError)
        assert isinstance(one, AudioError) or torch.equal(one[16_000], other[16_000])
    assert isinstance(alone[0], dict)
    assert isinstance(alone[-1], dict)
