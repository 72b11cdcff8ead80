"""Rows to waveforms: channels, spans, gain and separated sources, against numpy and the separator's own output."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import soundfile
import torch
from audio_at import PLAIN, read_rows
from conftest import STREAMS
from numpy.typing import NDArray
from torchaudio.models import ConvTasNet
from wavemill.jobs.corpus import build_corpus
from wavemill.jobs.engine import InlineEngine
from wavemill.jobs.tokenize import TokenizeOptions, tokenize
from wavemill.pipelines.entries import AudioError
from wavemill.pipelines.policy import CorpusPolicy
from wavemill.pipelines.reading import Reader, load_separator
from wavemill.pipelines.verify import verify
from wavemill.storage.codes import open_corpus
from wavemill.storage.parquet import read_parquet
from wavemill.storage.root import Root
from wavemill.storage.schema import CORPUS_SCHEMA
from wavemill.tokenizers.separate import Separator
from wavemill.tokenizers.spec import RunFailed, Sound, UserError

pytestmark = pytest.mark.timeout(100)
Row = dict[str, Any]
RATE = 16_000


def stereo(path: Path, num_samples: int = 200_000, num_channels: int = 2, rate: int = RATE) -> NDArray[np.float32]:
    """Writes noise and gives it back as soundfile reads it, `[N, C]`."""
    noise_NC = 0.2 * np.random.default_rng(0).standard_normal((num_samples, num_channels))
    soundfile.write(path, noise_NC, rate)
    return soundfile.read(path, dtype="float32", always_2d=True)[0]


def row_of(path: Path, start_sample: int, num_samples: int, **more: Any) -> Row:
    row = {
        "source_root": str(path.parent),
        "path": path.name,
        "format": path.suffix[1:],
        "size_bytes": path.stat().st_size,
        "sample_rate": soundfile.info(path).samplerate,
        "start_sample": start_sample,
        "num_samples": num_samples,
    }
    return row | more


def samples_of(rows: list[Row], rate: int = RATE) -> list[NDArray[np.float32]]:
    found = read_rows(rows, [rate])
    assert all(not isinstance(result, AudioError) for result in found), found
    return [result[rate].numpy() for result in found if not isinstance(result, AudioError)]


def expected(sound_NC: NDArray[np.float32], row: Row) -> NDArray[np.float32]:
    part_NC = sound_NC[row["start_sample"] : row["start_sample"] + row["num_samples"]]
    channel = row.get("channel", "mix")
    return part_NC.mean(axis=1, dtype=np.float32) if channel == "mix" else part_NC[:, int(channel)]


# Channels and spans


@pytest.mark.parametrize("suffix", [".wav", ".flac"])
@pytest.mark.parametrize("num_channels", [1, 2, 5])
def test_channels_and_their_mean_from_one_pass_are_those_of_soundfile(
    tmp_path: Path, suffix: str, num_channels: int
) -> None:
    path = tmp_path / f"a{suffix}"
    sound_NC = stereo(path, num_channels=num_channels)
    names = ["mix", *map(str, range(num_channels))]
    rows = [
        row_of(path, start, 30_000, channel=channel)
        for start in range(0, 180_000, 30_000)
        for channel in (names if start % 60_000 else names[::-1])
    ]
    for row, got_N in zip(rows, samples_of(rows), strict=True):
        assert np.array_equal(got_N, expected(sound_NC, row)), (row["channel"], row["start_sample"])


def test_a_channel_wanted_twice_is_given_twice(tmp_path: Path) -> None:
    sound_NC = stereo(tmp_path / "a.wav")
    rows = [row_of(tmp_path / "a.wav", 100, 5_000, channel=channel) for channel in ("1", "1", "mix", "0", "1")]
    for row, got_N in zip(rows, samples_of(rows), strict=True):
        assert np.array_equal(got_N, expected(sound_NC, row))


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".ogg", ".mp3"])
def test_spans_that_overlap_go_back_or_repeat_are_those_of_the_whole(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    stereo(path)
    name = {".ogg": "ogg", ".mp3": "mp3"}.get(suffix, suffix[1:])
    [whole_N] = samples_of([row_of(path, 0, soundfile.info(path).frames, format=name)])
    spans = [(0, 50_000), (25_000, 50_000), (25_000, 50_000), (74_999, 2), (0, 1), (150_000, 49_000), (149_999, 10)]
    rows = [row_of(path, start, count, format=name) for start, count in spans]
    for (start, count), got_N in zip(spans, samples_of(rows), strict=True):
        assert np.array_equal(got_N, whole_N[start : start + count])


def test_rows_of_several_recordings_come_in_their_order(tmp_path: Path) -> None:
    sounds = {}
    for name in ("a", "b"):
        sounds[name] = stereo(tmp_path / f"{name}.wav", 20_000 + ord(name))
    order = ["a", "a", "b", "a", "b", "b"]
    rows = [row_of(tmp_path / f"{name}.wav", 100 * number, 9_000) for number, name in enumerate(order)]
    for name, row, got_N in zip(order, rows, samples_of(rows), strict=True):
        assert np.array_equal(got_N, expected(sounds[name], row))


def test_every_rate_comes_from_one_pass_and_is_what_it_is_alone(tmp_path: Path) -> None:
    stereo(tmp_path / "a.wav", rate=44_100)
    row = row_of(tmp_path / "a.wav", 1_234, 100_000)
    [together] = read_rows([row], [RATE, 24_000, 44_100])
    assert isinstance(together, dict)
    assert together.keys() == {RATE, 24_000, 44_100}
    for rate in together:
        assert np.array_equal(together[rate].numpy(), samples_of([row], rate)[0])


# Stereo


def stereo_of(rows: list[Row], rate: int = RATE) -> list[NDArray[np.float32]]:
    """`[2, N]` of each row, read together with mono."""
    with Reader(Root("/nonexistent")) as reader:
        found = list(reader.read([PLAIN | row for row in rows], [Sound(rate, 2), Sound(rate)]))
    assert all(not isinstance(result, AudioError) for result in found), found
    return [result[Sound(rate, 2)].numpy() for result in found if not isinstance(result, AudioError)]


def test_the_mix_of_two_channels_is_these_two_in_stereo(tmp_path: Path) -> None:
    sound_NC = stereo(tmp_path / "a.wav")
    rows = [row_of(tmp_path / "a.wav", start, 40_000, num_channels=2, gain_db=6.0) for start in (0, 50_000)]
    for row, got_CN in zip(rows, stereo_of(rows), strict=True):
        part_NC = sound_NC[row["start_sample"] : row["start_sample"] + 40_000]
        assert np.allclose(got_CN, part_NC.T * 10 ** (6 / 20), rtol=1e-6)
        assert not np.allclose(got_CN[0], got_CN[1])
    alone = [stereo_of([row], 24_000)[0] for row in rows]
    for row, alone_CN, got_CN in zip(rows, alone, stereo_of(rows, 24_000), strict=True):
        assert np.array_equal(alone_CN, got_CN)
        for channel in (0, 1):
            [channel_N] = samples_of([row | {"channel": str(channel)}], 24_000)
            assert np.array_equal(alone_CN[channel], channel_N)


@pytest.mark.parametrize(("num_channels", "channel"), [(1, "mix"), (2, "1"), (3, "mix")])
def test_what_is_one_channel_or_the_mean_of_many_is_on_both_in_stereo(
    tmp_path: Path, num_channels: int, channel: str
) -> None:
    stereo(tmp_path / "a.flac", num_channels=num_channels)
    row = row_of(tmp_path / "a.flac", 100, 30_000, num_channels=num_channels, channel=channel)
    [got_CN], [mono_N] = stereo_of([row]), samples_of([row])
    assert np.array_equal(got_CN, np.stack([mono_N, mono_N]))


def test_one_channel_that_is_not_finite_is_an_error_in_stereo_too(tmp_path: Path) -> None:
    sound_NC = np.zeros((20_000, 2), dtype=np.float32)
    sound_NC[15_000, 1] = np.nan
    soundfile.write(tmp_path / "a.wav", sound_NC, RATE, subtype="FLOAT")
    rows = [PLAIN | row_of(tmp_path / "a.wav", start, 10_000, num_channels=2) for start in (0, 10_000)]
    with Reader(Root("/nonexistent")) as reader:
        good, bad = reader.read(rows, [Sound(RATE, 2)])
    assert isinstance(good, dict)
    assert isinstance(bad, AudioError)
    assert bad.kind == "non-finite"


# Gain


@pytest.mark.parametrize("gain_db", [-20.0, 6.5, 0.0])
def test_gain_multiplies_every_sample(tmp_path: Path, gain_db: float) -> None:
    stereo(tmp_path / "a.wav")
    row = row_of(tmp_path / "a.wav", 0, 50_000)
    [plain_N], [gained_N] = samples_of([row]), samples_of([row | {"gain_db": gain_db}])
    assert np.allclose(gained_N, plain_N * 10 ** (gain_db / 20), rtol=1e-6)
    assert np.array_equal(gained_N, plain_N) == (gain_db == 0.0)


def test_neighbours_of_one_span_have_gains_of_their_own(tmp_path: Path) -> None:
    sound_NC = stereo(tmp_path / "a.wav")
    gains = {"0": 6.0, "1": None, "mix": -6.0}
    rows = [row_of(tmp_path / "a.wav", 0, 9_000, channel=channel, gain_db=gain) for channel, gain in gains.items()]
    for row, got_N in zip(rows, samples_of(rows), strict=True):
        assert np.allclose(got_N, expected(sound_NC, row) * 10 ** ((row["gain_db"] or 0) / 20), rtol=1e-6)


# Separation


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Conv-TasNet that was never trained: what it gives is noise, but always the same noise."""
    torch.manual_seed(0)
    model = ConvTasNet(
        num_sources=2,
        enc_num_feats=32,
        msk_num_feats=12,
        msk_num_hidden_feats=20,
        msk_num_stacks=2,
        msk_activate="relu",
    )
    path = tmp_path_factory.mktemp("weights") / "separator.safetensors"
    safetensors.torch.save_file(model.state_dict(), path)
    return path


def rows_of(root: Root) -> list[Row]:
    corpus = open_corpus(root)
    tables = [read_parquet(root, corpus.path(shard), schema=CORPUS_SCHEMA) for shard in corpus.files]
    return [row for table in tables for row in table.to_pylist()]


def built(path: Path, source: Path, weights: Path | None, **policy: Any) -> Root:
    separate = str(weights) if weights else None
    build_corpus(Root(path), [f"x={source}"], CorpusPolicy(**policy), shard_hours=1, separate=separate)
    return Root(path)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "source").mkdir()
    stereo(tmp_path / "source" / "a.wav", 40_000, rate=8_000)
    stereo(tmp_path / "source" / "b.flac", 60_000, rate=44_100)
    (tmp_path / "source" / "a.txt").write_text("two at once\n")
    return tmp_path / "source"


def test_children_of_a_segment_are_its_span_and_name_their_parent(tmp_path: Path, source: Path, weights: Path) -> None:
    rows = rows_of(built(tmp_path / "root", source, weights, channels="split", window_s=2.0))
    parents = [row for row in rows if row["parent"] is None]
    children = [row for row in rows if row["parent"] is not None]
    assert len(parents) == 2 * (3 + 1)  # channels x windows
    assert len(children) == 2 * len(parents)
    assert len({row["id"] for row in rows}) == len(rows)
    by_id = {row["id"]: row for row in parents}
    for child in children:
        parent = by_id[child["parent"]]
        for name in ("path", "channel", "start_sample", "num_samples", "sample_rate", "size_bytes", "shard"):
            assert child[name] == parent[name]
        assert child["text"] is None
    assert {(row["parent"], row["separated"]) for row in children} == {(name, n) for name in by_id for n in (0, 1)}
    assert all(row["separated"] is None for row in parents)
    plain = rows_of(built(tmp_path / "plain", source, None, channels="split", window_s=2.0))
    assert [row["id"] for row in parents] == [row["id"] for row in plain]  # separation changes no parent


def test_separated_sources_are_the_separators_at_the_mixtures_peak(tmp_path: Path, source: Path, weights: Path) -> None:
    root = built(tmp_path / "root", source, weights)
    rows = [row for row in rows_of(root) if row["path"] == "a.wav"]
    separator = Separator.from_file(weights)
    with Reader(root, separator=separator.sha256) as reader:
        mixture, *found = list(reader.read(rows, [Sound(8_000)]))
        alone = [next(iter(reader.read([row], [Sound(8_000)]))) for row in rows[1:]]
    assert isinstance(mixture, dict)
    assert len(found) == 2
    sources_SN = separator.separate(mixture[Sound(8_000)])
    factor = mixture[Sound(8_000)].abs().max() / sources_SN.abs().max()
    for number, (child, single) in enumerate(zip(found, alone, strict=True)):
        assert isinstance(child, dict)
        assert isinstance(single, dict)
        assert torch.allclose(child[Sound(8_000)], sources_SN[number] * factor, rtol=1e-6)
        assert torch.equal(child[Sound(8_000)], single[Sound(8_000)])  # with its neighbours or alone
    peak = max(float(child[Sound(8_000)].abs().max()) for child in found if isinstance(child, dict))
    assert peak == pytest.approx(float(mixture[Sound(8_000)].abs().max()), rel=1e-6)


def test_a_separated_corpus_is_tokenized_and_verified(
    fitted_root: Path, tmp_path: Path, source: Path, weights: Path
) -> None:
    shutil.copytree(fitted_root / "codebooks", tmp_path / "root" / "codebooks")
    root = built(tmp_path / "root", source, weights, window_s=3.0)
    summary = tokenize(root, STREAMS, InlineEngine, TokenizeOptions())
    rows = rows_of(root)
    assert (summary.segments, summary.errors) == (len(rows), 0)
    assert len(rows) == 3 * (2 + 1)
    verdict = verify(root, open_corpus(root), sample=20, seed=0, source_roots={})
    assert verdict.num_problems == 0, verdict.problems
    assert (verdict.tokenized_again, verdict.codes_different) == (len(rows), 0)
    assert tokenize(root, STREAMS, InlineEngine, TokenizeOptions()).shards == 0


def test_the_weights_are_kept_in_the_root_and_missed_in_words(tmp_path: Path, source: Path, weights: Path) -> None:
    root = built(tmp_path / "root", source, weights)
    sha256 = Separator.from_file(weights).sha256
    assert load_separator(root, sha256).sha256 == sha256
    with pytest.raises(UserError, match="separated"):
        built(tmp_path / "root", source, None)
    (tmp_path / "root" / "separators" / f"{sha256}.safetensors").unlink()
    with pytest.raises(RunFailed, match="Restore it"):
        load_separator(root, sha256)


def test_segments_too_long_to_be_separated_are_errors_and_their_parents_are_not(tmp_path: Path, weights: Path) -> None:
    (tmp_path / "source").mkdir()
    stereo(tmp_path / "source" / "a.wav", 61 * 8_000, 1, rate=8_000)
    rows = rows_of(built(tmp_path / "root", tmp_path / "source", weights))
    assert [(row["separated"], row["error"]) for row in rows] == [(None, None), (0, "too-long"), (1, "too-long")]
    rows = rows_of(built(tmp_path / "windows", tmp_path / "source", weights, window_s=60.0))
    assert [row["error"] for row in rows] == [None] * 6


# Errors


def test_what_is_not_finite_is_an_error_of_its_span_alone(tmp_path: Path) -> None:
    samples = np.full(30_000, 0.1, dtype=np.float32)
    samples[15_000] = np.inf
    soundfile.write(tmp_path / "a.wav", samples, RATE, subtype="FLOAT")
    results = read_rows([row_of(tmp_path / "a.wav", start, 10_000) for start in (0, 10_000, 20_000)], [RATE])
    kinds = [result.kind if isinstance(result, AudioError) else None for result in results]
    assert kinds == [None, "non-finite", None]


def test_what_is_not_finite_in_one_channel_is_no_error_of_another(tmp_path: Path) -> None:
    """A row gets the same, whichever rows are its neighbours."""
    samples_NC = np.full((20_000, 2), 0.1, dtype=np.float32)
    samples_NC[7_000, 1] = np.nan
    soundfile.write(tmp_path / "a.wav", samples_NC, RATE, subtype="FLOAT")
    rows = [row_of(tmp_path / "a.wav", 0, 20_000, channel=channel) for channel in ("0", "1", "mix")]
    together = read_rows(rows, [RATE])
    alone = [read_rows([row], [RATE])[0] for row in rows]
    for results in (together, alone):
        assert [result.kind if isinstance(result, AudioError) else None for result in results] == [
            None,
            "non-finite",
            "non-finite",
        ]


def test_a_source_that_is_gone_stops_the_run_and_a_file_that_is_gone_does_not(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    stereo(tmp_path / "source" / "a.wav")
    row = row_of(tmp_path / "source" / "a.wav", 0, 1_000)
    (tmp_path / "source" / "a.wav").unlink()
    [result] = read_rows([row], [RATE])
    assert isinstance(result, AudioError)
    assert result.kind == "missing"
    (tmp_path / "source").rmdir()
    with pytest.raises(RunFailed, match="not there"):
        read_rows([row], [RATE])
