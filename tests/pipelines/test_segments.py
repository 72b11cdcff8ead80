"""How recordings become rows: channels, windows, speech, filters, transforms, separated talkers, times and text."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from audio_at import read_rows
from wavemill.jobs.corpus import BuildResult, SourceArgument, build_corpus
from wavemill.pipelines.audio import Limits
from wavemill.pipelines.policy import CorpusPolicy, Filters, Transforms, VadPolicy
from wavemill.storage.codes import open_corpus
from wavemill.storage.parquet import read_parquet
from wavemill.storage.root import Root
from wavemill.storage.schema import CORPUS_SCHEMA
from wavemill.tokenizers.spec import UserError

RATE = 16_000
RANDOM = np.random.default_rng(7)


def build(source: Path, root: Path, policy: CorpusPolicy | None = None, **options: Any) -> BuildResult:
    return build_corpus(Root(root), [f"x={source}"], policy or CorpusPolicy(), shard_hours=1, **options)


def rows_of(root: Path) -> list[dict[str, Any]]:
    corpus = open_corpus(Root(root))
    tables = [read_parquet(Root(root), corpus.path(shard), schema=CORPUS_SCHEMA) for shard in corpus.files]
    return [row for table in tables for row in table.to_pylist()]


def noise(seconds: float, level: float = 0.1, channels: int = 1) -> np.ndarray:
    return level * RANDOM.standard_normal((round(seconds * RATE), channels))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "sound"
    path.mkdir()
    return path


@pytest.fixture(scope="module")
def talk(samples: Path) -> np.ndarray:
    """Two utterances of one voice at 16 kHz with two seconds of quiet around and between them."""
    quiet = 1e-4 * RANDOM.standard_normal(2 * RATE)
    parts = []
    for name in ("en_anna_11.flac", "de_jonas_12.flac"):
        content, rate = soundfile.read(samples / "speech" / name)
        assert rate >= RATE
        resampled = torch.nn.functional.interpolate(
            torch.from_numpy(content if content.ndim == 1 else content.mean(axis=1))[None, None],
            size=round(len(content) * RATE / rate),
            mode="linear",
        )
        parts += [quiet, resampled[0, 0].numpy()]
    return np.concatenate([*parts, quiet])


def test_each_channel_can_be_a_segment_of_its_own(folder: Path, tmp_path: Path) -> None:
    content = np.clip(noise(1.0, channels=3), -0.9, 0.9)
    soundfile.write(folder / "a.wav", content, RATE, subtype="FLOAT")
    wanted = {"mix": {"mix": content.mean(axis=1)}, "first": {"0": content[:, 0]}}
    wanted["split"] = {str(channel): content[:, channel] for channel in range(3)}
    ids = set()
    for policy, channels in wanted.items():
        build(folder, tmp_path / policy, CorpusPolicy(channels=policy))
        rows = rows_of(tmp_path / policy)
        assert [row["channel"] for row in rows] == list(channels)
        for row, waveforms in zip(rows, read_rows(rows, [RATE]), strict=True):
            assert isinstance(waveforms, dict)
            np.testing.assert_allclose(waveforms[RATE].numpy(), channels[row["channel"]], atol=1e-6)
            ids.add(row["id"])
    assert len(ids) == 4  # the first channel is the same segment whether it was split off or taken alone


def test_a_manifest_may_name_one_channel_and_one_too_many_is_an_error(folder: Path, tmp_path: Path) -> None:
    soundfile.write(folder / "a.wav", noise(1.0, channels=2), RATE)
    (folder / "list.csv").write_text("path,channel,text\na.wav,1,right\na.wav,2,nobody\n")
    build_corpus(Root(tmp_path / "r"), [f"x={folder / 'list.csv'}"], CorpusPolicy(), shard_hours=1)
    good, bad = rows_of(tmp_path / "r")
    assert (good["channel"], good["text"], good["error"]) == ("1", "right", None)
    assert bad["error"] == "out-of-range"
    assert "channel 2 (from 0), the recording has 2" in bad["error_message"]


def test_words_say_what_is_said_in_each_window(folder: Path, tmp_path: Path) -> None:
    soundfile.write(folder / "a.wav", noise(3.0), RATE)
    words = [(0.1, 0.9, "one"), (0.9, 1.2, "two"), (1.2, 1.9, "sil"), (2.1, 2.8, "three")]
    (folder / "a.ctm").write_text("".join(f"a 1 {start} {end - start:.1f} {word}\n" for start, end, word in words))
    (folder / "a.txt").write_text("one two three")
    build(folder, tmp_path / "whole")
    (whole,) = rows_of(tmp_path / "whole")
    assert whole["text"] == "one two three"
    assert [word["label"] for word in whole["words"]] == ["one", "two", "sil", "three"]
    assert whole["words"][1] == {"start_sample": 14_400, "num_samples": 4_800, "label": "two"}
    build(folder, tmp_path / "windows", CorpusPolicy(window_s=1.0))
    windows = rows_of(tmp_path / "windows")
    assert [row["text"] for row in windows] == ["one", "two", "three"]
    assert windows[0]["words"][1] == {"start_sample": 14_400, "num_samples": 1_600, "label": "two"}
    assert windows[1]["words"][0] == {"start_sample": 0, "num_samples": 3_200, "label": "two"}


def test_vad_cuts_where_nobody_speaks_and_a_second_build_adds_nothing(
    folder: Path, tmp_path: Path, talk: np.ndarray
) -> None:
    pytest.importorskip("silero_vad", reason="needs the extra vad")
    soundfile.write(folder / "talk.flac", talk, RATE)
    soundfile.write(folder / "quiet.wav", 1e-4 * RANDOM.standard_normal(3 * RATE), RATE)
    result = build(folder, tmp_path / "r", CorpusPolicy(vad=VadPolicy()))
    rows = rows_of(tmp_path / "r")
    assert 2 <= len(rows) <= 6
    assert {row["path"] for row in rows} == {"talk.flac"}
    assert result.counts.left_out["no speech"] == 1
    covered = np.zeros(len(talk), dtype=bool)
    for row in rows:
        covered[row["start_sample"] : row["start_sample"] + row["num_samples"]] = True
    loud = np.abs(talk) > 0.05
    assert covered[loud].mean() > 0.99
    assert covered.mean() < 0.75
    again = build(folder, tmp_path / "r", CorpusPolicy(vad=VadPolicy()))
    assert (again.counts.new, again.counts.known) == (0, len(rows))


def test_the_vad_model_is_part_of_the_policy(folder: Path, tmp_path: Path, talk: np.ndarray) -> None:
    pytest.importorskip("silero_vad", reason="needs the extra vad")
    soundfile.write(folder / "talk.flac", talk, RATE)
    build(folder, tmp_path / "r", CorpusPolicy(vad=VadPolicy()))
    policy = open_corpus(Root(tmp_path / "r")).metadata["policy"]
    assert policy["vad"]["model"].startswith("silero-vad/")
    with pytest.raises(UserError, match=r"was built with speech found by silero-vad/.*this build asks for whole"):
        build(folder, tmp_path / "r")


def test_filters_leave_out_and_count(folder: Path, tmp_path: Path) -> None:
    clipped = np.clip(noise(2.0, level=1.0), -1, 1)
    for name, content in {
        "good": noise(2.0),
        "short": noise(0.2),
        "long": noise(9.0),
        "faint": noise(2.0, level=1e-5),
        "clipped": clipped,
    }.items():
        soundfile.write(folder / f"{name}.wav", content, RATE, subtype="FLOAT")
    filters = Filters(min_duration_s=0.5, max_duration_s=5, min_level_db=-60, max_clipping=0.01)
    result = build(folder, tmp_path / "r", CorpusPolicy(filters=filters))
    assert [row["path"] for row in rows_of(tmp_path / "r")] == ["good.wav"]
    assert dict(result.counts.left_out) == {"too short": 1, "too long": 1, "too quiet": 1, "clipped": 1}


def test_languages_and_speakers_are_chosen_without_opening_the_rest(folder: Path, tmp_path: Path) -> None:
    soundfile.write(folder / "a.wav", noise(1.0), RATE)
    lines = [
        {"audio_filepath": "a.wav", "language": "en", "speaker": "anna"},
        {"audio_filepath": "gone.wav", "language": "de", "speaker": "anna"},
        {"audio_filepath": "gone.wav", "language": "en", "speaker": "bert"},
    ]
    (folder / "list.jsonl").write_text("\n".join(map(json.dumps, lines)))
    policy = CorpusPolicy(filters=Filters(languages=("en",), speakers=("anna",)))
    result = build_corpus(Root(tmp_path / "r"), [f"x={folder / 'list.jsonl'}"], policy, shard_hours=1)
    assert [row["path"] for row in rows_of(tmp_path / "r")] == ["a.wav"]
    assert dict(result.counts.left_out) == {"other language": 1, "other speaker": 1}


def test_trimmed_segments_lie_where_the_sound_is_and_keep_its_samples(folder: Path, tmp_path: Path) -> None:
    loud = np.clip(noise(1.0), -0.9, 0.9)[:, 0]
    content = np.concatenate([np.zeros(8_000), loud, np.zeros(12_000)])
    soundfile.write(folder / "a.wav", content, RATE, subtype="FLOAT")
    build(folder, tmp_path / "r", CorpusPolicy(transforms=Transforms(trim_silence_db=-60)))
    (row,) = rows_of(tmp_path / "r")
    assert (row["start_sample"], row["num_samples"]) == (8_000, 16_000)
    (waveforms,) = read_rows([row], [RATE])
    assert isinstance(waveforms, dict)
    np.testing.assert_allclose(waveforms[RATE].numpy(), loud, atol=1e-6)


def test_loudness_is_brought_to_the_target_by_one_gain(folder: Path, tmp_path: Path) -> None:
    import torchaudio

    for name, level in (("loud", 0.2), ("faint", 0.003)):
        soundfile.write(folder / f"{name}.wav", np.clip(noise(3.0, level), -1, 1), RATE, subtype="FLOAT")
    build(folder, tmp_path / "r", CorpusPolicy(transforms=Transforms(loudness_lufs=-30)))
    rows = rows_of(tmp_path / "r")
    assert rows[0]["gain_db"] > 10 > 0 > rows[1]["gain_db"]
    for waveforms in read_rows(rows, [RATE]):
        assert isinstance(waveforms, dict)
        assert float(torchaudio.functional.loudness(waveforms[RATE][None], RATE)) == pytest.approx(-30, abs=0.2)


@pytest.mark.slow
def test_entries_of_one_recording_without_a_length_count_it_once(folder: Path, tmp_path: Path) -> None:
    """A WebM says no length: counting it for each of many manifest lines would take for ever."""
    import av

    with av.open(str(folder / "a.webm"), "w", format="webm") as container:
        stream = container.add_stream("libopus", rate=48_000)
        frame = av.AudioFrame.from_ndarray(
            (noise(200.0)[:, 0] * 32767).astype(np.int16)[None], format="s16", layout="mono"
        )
        frame.sample_rate = 16_000
        for out in av.AudioResampler(format="flt", layout="stereo", rate=48_000).resample(frame):
            container.mux(stream.encode(out))
        container.mux(stream.encode(None))
    lines = [{"audio_filepath": "a.webm", "offset": 2.0 * n, "duration": 2.0} for n in range(100)]
    (folder / "list.jsonl").write_text("\n".join(map(json.dumps, lines)))
    import time

    started = time.monotonic()
    build_corpus(Root(tmp_path / "one"), [f"x={folder / 'a.webm'}"], CorpusPolicy(), shard_hours=1)
    once_s = time.monotonic() - started
    started = time.monotonic()
    result = build_corpus(Root(tmp_path / "r"), [f"x={folder / 'list.jsonl'}"], CorpusPolicy(), shard_hours=1)
    assert (result.counts.new, result.counts.errors) == (100, 0)
    print(f"one entry {once_s:.2f} s, a hundred {time.monotonic() - started:.2f} s")


def test_limits_are_named_in_the_error_with_the_option_that_raises_them(folder: Path, tmp_path: Path) -> None:
    soundfile.write(folder / "a.wav", noise(2.0, channels=4), RATE)
    for name, limits, option in (
        ("bytes", Limits(max_bytes=1_000), "--max-bytes"),
        ("channels", Limits(max_channels=2), "--max-channels"),
        ("low", Limits(min_sample_rate=22_050), "--min-sample-rate"),
        ("high", Limits(max_sample_rate=8_000), "--max-sample-rate"),
        ("duration", Limits(max_duration_s=1.0), "--max-recording"),
        ("expansion", Limits(max_expansion=0.5), "--max-expansion"),
    ):
        build(folder, tmp_path / name, limits=limits)
        (row,) = rows_of(tmp_path / name)
        assert row["error"] in ("too-large", "unsupported")
        assert option in row["error_message"]


def test_a_source_kind_that_is_none_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no kind of source 'tape'; there are: auto, folder"):
        build_corpus(
            Root(tmp_path / "r"), [SourceArgument(argument=str(folder), kind="tape")], CorpusPolicy(), shard_hours=1
        )
