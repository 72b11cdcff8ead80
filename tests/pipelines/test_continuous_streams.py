"""Streams of numbers from the recordings to what is made of them: read back, verified, exported, heard, looked at."""

import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import weights_ssl
import weights_xvector
from conftest import SEMANTIC
from numpy.typing import NDArray
from wavemill.jobs.corpus import build_corpus
from wavemill.jobs.engine import InlineEngine
from wavemill.jobs.tokenize import TokenizeOptions, tokenize
from wavemill.pipelines.closeup import describe_segment, read_segment
from wavemill.pipelines.export import export_webdataset
from wavemill.pipelines.inspection import describe_streams
from wavemill.pipelines.listen import decode_segments
from wavemill.pipelines.policy import CorpusPolicy
from wavemill.pipelines.streams import StreamConfig
from wavemill.pipelines.verify import Verdict, verify
from wavemill.storage.codes import open_corpus, open_stream, read_codes, stream_spec
from wavemill.storage.parquet import CorruptFile, read_parquet
from wavemill.storage.root import Root
from wavemill.storage.schema import CORPUS_SCHEMA, stream_schema
from wavemill.storage.statistics import stream_statistics
from wavemill.storage.table import create_table, write_shard
from wavemill.storage.writer import TableWriter
from wavemill.tokenizers.spec import UserError, num_frames
from wavemill.tokenizers.tokenizer import Output, TokenizerConfig

Copy = Callable[[Path], Path]


def streams_of(hubert: Path, guide: Path) -> list[StreamConfig]:
    asked: dict[str, Any] = {"tokenizer": "hubert-base", "weights": str(hubert), "layer": 1}
    mel = TokenizerConfig(tokenizer="mel-rvq", output=Output.FEATURES)
    merged = TokenizerConfig(**asked, output=Output.FEATURES, reduce=f"ctc:{guide}")
    return [
        SEMANTIC,
        StreamConfig(name="mel", tokenizer=mel),
        StreamConfig(name="vector", tokenizer=TokenizerConfig(**asked, output=Output.EMBEDDING)),
        StreamConfig(name="merged", tokenizer=merged),
    ]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    base = tmp_path_factory.mktemp("weights")
    hubert = weights_ssl.make("hubert-base", base / "hubert", small=True, num_hidden_layers=1)
    return hubert, weights_xvector.make_ctc("hubert-base", base / "ctc", num_hidden_layers=1)


@pytest.fixture(scope="module")
def made(
    fitted_root: Path, samples: Path, weights: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A root of a few recordings, one of them broken, with a stream of codes and three of numbers."""
    base = tmp_path_factory.mktemp("continuous")
    shutil.copytree(fitted_root / "codebooks", base / "root" / "codebooks")
    (base / "speech").mkdir()
    for name in ("speech/de_frieda_02.flac", "speech/de_frieda_12.wav", "speech/en_anna_01.opus", "broken/empty.mp3"):
        shutil.copy(samples / name, base / "speech")
    root = Root(base / "root")
    build_corpus(root, [f"speech={base / 'speech'}"], CorpusPolicy(), shard_hours=0.003)
    tokenize(root, streams_of(*weights), InlineEngine, TokenizeOptions(max_error_share=0.5))
    return base / "root"


def frames_in(root: Path, stream: str) -> list[NDArray[np.float16]]:
    place = Root(root)
    snapshot = open_stream(place, stream)
    found = []
    for shard in snapshot.files:
        rows = read_codes(place, snapshot, shard, more=True)
        found += [frames_TD for row in range(len(rows.ids)) if (frames_TD := rows.frames(row)) is not None]
    return found


def check(root: Path, sample: int = 0) -> Verdict:
    place = Root(root)
    return verify(place, open_corpus(place), sample=sample, seed=0, source_roots={})


def test_each_segment_has_the_frames_of_its_length(made: Path):
    place = Root(made)
    corpus = open_corpus(place)
    for name in ("mel", "vector", "merged"):
        snapshot = open_stream(place, name)
        spec = stream_spec(snapshot)
        assert sorted(snapshot.files) == sorted(corpus.files)
        for shard in snapshot.files:
            rows = read_codes(place, snapshot, shard, more=True)
            recordings = read_parquet(
                place, corpus.path(shard), schema=CORPUS_SCHEMA, columns=["num_samples", "sample_rate"]
            )
            for row, recording in enumerate(recordings.to_pylist()):
                frames_TD = rows.frames(row)
                if rows.errors[row] is not None:
                    assert frames_TD is None
                    continue
                assert frames_TD is not None
                assert frames_TD.shape == (rows.num_frames[row], spec.dim)
                if spec.has_clock and recording["sample_rate"] == spec.sample_rate:
                    assert len(frames_TD) == num_frames(recording["num_samples"], spec)
                if spec.durations:
                    durations_T = rows.durations(row)
                    assert durations_T is not None
                    assert len(durations_T) == len(frames_TD)
                    assert durations_T.sum() <= recording["num_samples"] / recording["sample_rate"] * 50
    assert any(len(frames_TD) > 100 for frames_TD in frames_in(made, "mel"))
    assert {len(frames_TD) for frames_TD in frames_in(made, "vector")} == {1}


def test_what_was_written_is_what_each_segment_gives_alone(made: Path):
    verdict = check(made, sample=3)
    assert verdict.problems == []
    assert verdict.tokenized_again == 3
    assert verdict.codes_compared > 10_000
    assert verdict.codes_different == 0


def test_a_ctc_model_that_has_moved_is_named_by_its_stream(
    made: Path, weights: tuple[Path, Path], copy_root: Copy, tmp_path: Path, in_process: Callable[..., Any]
):
    root, moved = copy_root(made), tmp_path / "moved"
    shutil.copytree(weights[1], moved)
    place = Root(root)
    streams = streams_of(weights[0], moved)
    shutil.rmtree(root / "streams")
    tokenize(place, [streams[0], streams[3]], InlineEngine, TokenizeOptions(max_error_share=0.5))
    shutil.rmtree(moved)
    lost = in_process("verify", root, "--sample", "1")
    assert lost.returncode == 1
    assert f"There is no folder {moved}" in lost.stderr
    found = in_process("verify", root, "--sample", "1", "--weights", f"merged.ctc={weights[1]}")
    assert found.returncode == 0, found.stderr
    wrong = in_process("verify", root, "--sample", "1", "--weights", f"semantic.ctc={weights[1]}")
    assert "Stream 'semantic' was made with no CTC model: leave out semantic.ctc=" in wrong.stderr


def test_the_same_recordings_give_the_same_files_to_the_last_bit(
    made: Path, weights: tuple[Path, Path], copy_root: Copy
):
    again = copy_root(made)
    shutil.rmtree(again / "streams")
    tokenize(Root(again), streams_of(*weights), InlineEngine, TokenizeOptions(max_error_share=0.5))
    for stream in ("mel", "vector", "merged"):
        files = [
            {path.name: path.read_bytes() for path in (root / "streams" / stream).glob("*.parquet")}
            for root in (made, again)
        ]
        assert files[0]
        assert files[0] == files[1]


def spoil(root: Path, stream: str, change: Callable[[dict[str, Any]], dict[str, Any]], **metadata: Any) -> None:
    """Write a stream anew with other numbers in its rows; with `metadata`, as another machine would."""
    place = Root(root)
    old = open_stream(place, stream)
    schema = stream_schema(stream_spec(old))
    tables = {shard: read_parquet(place, old.path(shard), schema=schema) for shard in old.files}
    shutil.rmtree(root / old.folder)
    create_table(place, old.folder, schema=schema, metadata={**old.metadata, **metadata})
    receipts = []
    for shard, table in tables.items():
        rows = [row if row["frames"] is None else row | change(row) for row in table.to_pylist()]
        receipts.append(write_shard(place, old.folder, shard, table.from_pylist(rows, schema=schema)))
    TableWriter(place, old.folder).commit(receipts)


def turned(row: dict[str, Any]) -> dict[str, Any]:
    return {"frames": row["frames"][2:] + row["frames"][:2]}


def one_less(row: dict[str, Any]) -> dict[str, Any]:
    num = row["num_frames"]
    size = len(row["frames"]) // num
    return {"num_frames": num - 1, "frames": row["frames"][:-size], "durations": row["durations"][:-1]}


@pytest.mark.parametrize(
    ("stream", "change", "said"),
    [("vector", turned, "codes differ when it is tokenized alone"), ("merged", one_less, "codes of another shape")],
)
def test_numbers_of_another_numerics_class_are_counted_and_not_blamed(
    stream: str, change: Callable[[dict[str, Any]], dict[str, Any]], said: str, made: Path, copy_root: Copy
):
    root = copy_root(made)
    here = open_stream(Root(root), stream).metadata["numerics"]
    spoil(root, stream, change, numerics={**here, "instructions": "of another machine"})
    verdict = check(root, sample=2)
    assert verdict.problems == []
    assert verdict.codes_different > 0
    spoil(root, stream, lambda row: {}, numerics=here)
    verdict = check(root, sample=2)
    assert verdict.num_problems == 2
    assert all(said in problem for problem in verdict.problems)


def test_frames_whose_bytes_are_no_whole_frames_are_told_once_and_not_compared(made: Path, copy_root: Copy):
    root = copy_root(made)
    spoil(root, "mel", lambda row: {"frames": row["frames"][:-2]})
    verdict = check(root, sample=1_000)
    assert verdict.num_problems == len(frames_in(made, "mel"))
    assert all("stream mel" in problem and "no whole frames of" in problem for problem in verdict.problems)


def test_verification_finds_a_number_that_is_not_the_segments(made: Path, copy_root: Copy):
    root = copy_root(made)
    spoil(root, "vector", turned)
    verdict = check(root, sample=2)
    assert verdict.num_problems == 2
    assert all(
        "stream vector" in problem and "differ when it is tokenized alone" in problem for problem in verdict.problems
    )
    with pytest.raises(UserError, match="has no statistics in its footer"):
        stream_statistics(Root(root), "vector")


@pytest.mark.parametrize("stream", ["mel", "vector", "merged"])
def test_the_footers_know_mean_and_variance_of_all_frames(stream: str, made: Path, copy_root: Copy):
    frames_TD = np.concatenate(frames_in(made, stream)).astype(np.float64)
    root = copy_root(made)
    for path in (root / "streams" / stream).glob("*.parquet"):
        content = bytearray(path.read_bytes())
        length = int.from_bytes(content[-8:-4], "little") + 8
        content[: len(content) - length] = b"x" * (len(content) - length)
        path.write_bytes(content)  # all but the footer is gone: no more is read
    count, mean_D, variance_D = stream_statistics(Root(root), stream)
    assert count == len(frames_TD)
    np.testing.assert_allclose(mean_D, frames_TD.mean(axis=0), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(variance_D, frames_TD.var(axis=0), rtol=1e-9, atol=1e-12)


def test_statistics_of_codes_and_of_damaged_footers_are_refused(made: Path, copy_root: Copy):
    with pytest.raises(UserError, match=r"Stream 'semantic' .mfcc-kmeans. has no frames of numbers"):
        stream_statistics(Root(made), "semantic")
    root = copy_root(made)
    path = sorted((root / "streams" / "mel").glob("*.parquet"))[0]
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    with pytest.raises(CorruptFile, match=path.name):
        stream_statistics(Root(root), "mel")


def test_an_exported_sample_has_its_frames_and_what_they_stand_for(made: Path, copy_root: Copy):
    root = copy_root(made)
    place = Root(root)
    streams = {name: open_stream(place, name) for name in ("mel", "merged", "semantic", "vector")}
    export_webdataset(place, open_corpus(place), streams, view="all")
    exported: dict[str, Any] = {}
    for path in sorted((root / "webdataset" / "all").glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None
                if member.name.endswith(".npy"):
                    exported[member.name] = np.load(io.BytesIO(file.read()))
    for name in ("mel", "merged", "vector"):
        found = [array for key, array in exported.items() if key.endswith(f".{name}.npy")]
        assert all(array.dtype == np.float16 for array in found)
        for array, written in zip(found, frames_in(made, name), strict=True):
            assert np.array_equal(array, written)
    lengths = {key.split(".")[0]: len(array) for key, array in exported.items() if key.endswith(".merged.npy")}
    durations = {key.split(".")[0]: len(array) for key, array in exported.items() if ".durations." in key}
    assert lengths == durations
    assert any(key.endswith(".semantic.npy") and array.ndim == 2 for key, array in exported.items())


def test_frames_of_mel_are_heard_again_and_vectors_are_not(made: Path, tmp_path: Path):
    place = Root(made)
    corpus = open_corpus(place)
    ask: dict[str, Any] = {"ids": frozenset(), "limit": 2, "folder": str(tmp_path / "sound")}
    decoded = list(decode_segments(place, corpus, "mel", num_codebooks=None, **ask))
    assert len(decoded) == 2
    for sound in decoded:
        samples, rate = soundfile.read(sound.path)
        row = read_segment(place, corpus, sound.id).row
        assert rate == 16_000
        assert len(samples) == pytest.approx(row["duration_s"] * rate, abs=1)
        assert np.abs(samples).max() > 0.01
    with pytest.raises(UserError, match=r"'vector' .hubert-base. cannot be decoded: these frames know no way back"):
        list(decode_segments(place, corpus, "vector", num_codebooks=None, **ask))
    with pytest.raises(UserError, match="'mel' has frames of 160 numbers, no codebooks; leave out --codebooks"):
        list(decode_segments(place, corpus, "mel", num_codebooks=1, **ask))


def test_a_glance_tells_how_the_numbers_lie(
    made: Path, in_process: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
):
    place = Root(made)
    described = {stream["stream"]: stream for stream in describe_streams(place, open_corpus(place))}
    count, mean_D, variance_D = stream_statistics(place, "mel")
    mel = described["mel"]
    assert (mel["dim"], mel["frames"], mel["codebooks"]) == (160, count, [])
    np.testing.assert_allclose(mel["mean"], mean_D)
    np.testing.assert_allclose(mel["deviation"], np.sqrt(variance_D))
    assert described["semantic"]["mean"] is None
    assert described["merged"]["hours"] is None
    monkeypatch.setenv("COLUMNS", "160")
    shown = in_process("inspect", made)
    assert shown.returncode == 0, shown.stderr
    row = next(line for line in shown.stdout.splitlines() if "mean of each number" in line)
    assert f"{mean_D.min():.3g} ... {mean_D.max():.3g}" in row
    told = json.loads(in_process("inspect", made, "--json").stdout)
    assert {stream["stream"]: stream["mean"] for stream in told["streams"]}["mel"] == mel["mean"]


def test_a_segment_from_near_has_the_numbers_of_its_frames(made: Path, in_process: Callable[..., Any]):
    place = Root(made)
    corpus = open_corpus(place)
    good = read_codes(place, open_stream(place, "mel"), min(corpus.files), more=True)
    segment = next(name for row, name in enumerate(good.ids) if good.errors[row] is None)
    facts = {stream["stream"]: stream for stream in describe_segment(read_segment(place, corpus, segment))["streams"]}
    assert facts["mel"]["dim"] == 160
    assert facts["vector"]["frames"] == 1
    shown = in_process("inspect", made, "--segment", segment)
    assert shown.returncode == 0, shown.stderr
    assert "mel: mel-rvq, frames of 160 numbers" in shown.stdout
