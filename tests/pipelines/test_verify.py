"""Verification finds, and names, whatever can be wrong with a dataset."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from conftest import STREAMS
from safetensors import safe_open
from safetensors.torch import save_file
from wavemill.jobs.corpus import build_corpus
from wavemill.jobs.engine import InlineEngine
from wavemill.jobs.tokenize import TokenizeOptions, tokenize
from wavemill.pipelines.policy import CorpusPolicy
from wavemill.pipelines.recordings import Opener, Place
from wavemill.pipelines.verify import Verdict, verify
from wavemill.storage.codes import open_corpus, open_stream, stream_folder, stream_spec
from wavemill.storage.parquet import read_parquet
from wavemill.storage.root import Root
from wavemill.storage.schema import CORPUS_SCHEMA, stream_schema
from wavemill.storage.table import create_table, write_shard
from wavemill.storage.writer import TableWriter

Copy = Callable[[Path], Path]
Change = Callable[[int, pa.Table], pa.Table | None]


def check(root: Path, *, sample: int = 0, seed: int = 0, source_roots: dict[str, str] | None = None) -> Verdict:
    place = Root(root)
    return verify(place, open_corpus(place), sample=sample, seed=seed, source_roots=source_roots or {})


def the_problem(root: Path, *, sample: int = 0) -> str:
    verdict = check(root, sample=sample)
    assert verdict.num_problems == len(verdict.problems) == 1, verdict.problems
    return verdict.problems[0]


def made_anew(root: Path, stream: str, change: Change) -> None:
    """Write a stream's table again from scratch: every file, name and commit is in order, whatever `change` did."""
    place = Root(root)
    old = open_stream(place, stream)
    schema = stream_schema(stream_spec(old))
    tables = {shard: read_parquet(place, old.path(shard), schema=schema) for shard in old.files}
    folder = stream_folder(stream)
    shutil.rmtree(root / folder)
    create_table(place, folder, schema=schema, metadata=dict(old.metadata))
    writer = TableWriter(place, folder)
    size = stream_spec(old).codebook_size
    changed = {shard: change(shard, table) for shard, table in tables.items()}
    writer.commit(
        write_shard(place, folder, shard, table, codebook_size=size) for shard, table in changed.items() if table
    )


def with_column(table: pa.Table, name: str, values: list[object]) -> pa.Table:
    place = table.column_names.index(name)
    return table.set_column(place, table.schema.field(name), pa.array(values, type=table.schema.field(name).type))


def first_good_row(table: pa.Table, *, num_frames: int = 2) -> int:
    return next(row for row, frames in enumerate(table["num_frames"].to_pylist()) if (frames or 0) >= num_frames)


def file_of(root: Path, table: str, shard: int) -> Path:
    [path] = (root / table).glob(f"shard-{shard:06d}-*.parquet")
    return path


def test_a_whole_dataset_has_no_problems(finished_root: Path) -> None:
    verdict = check(finished_root, sample=1_000)
    assert verdict.problems == []
    assert verdict.num_problems == 0
    num_shards = len(open_corpus(Root(finished_root)).files)
    assert (verdict.segments, verdict.stream_rows, verdict.files) == (112, 224, 3 * num_shards)
    assert verdict.tokenized_again == 108
    assert verdict.codes_different == 0
    num_codes = 0
    for stream, num_codebooks in (("semantic", 1), ("acoustic", 8)):
        for path in (finished_root / "streams" / stream).glob("*.parquet"):
            num_codes += num_codebooks * sum(filter(None, pq.read_table(path)["num_frames"].to_pylist()))
    assert verdict.codes_compared == num_codes


def test_a_dataset_that_was_copied_or_made_anew_is_as_whole(finished_root: Path, copy_root: Copy) -> None:
    root = copy_root(finished_root)
    made_anew(root, "acoustic", lambda shard, table: table)
    verdict = check(root, sample=3)
    assert verdict.problems == []
    assert verdict.tokenized_again == 3


@pytest.mark.slow
def test_the_seed_decides_what_is_tokenized_again_and_none_is_a_sample_too(finished_root: Path) -> None:
    verdicts = [check(finished_root, sample=5, seed=seed) for seed in (1, 1, 2)]
    assert [verdict.tokenized_again for verdict in verdicts] == [5, 5, 5]
    compared = [verdict.codes_compared for verdict in verdicts]
    assert compared[0] == compared[1] != compared[2]
    assert check(finished_root, sample=0).tokenized_again == 0


@pytest.mark.parametrize("table", ["streams/acoustic", "streams/semantic", "corpus"])
@pytest.mark.parametrize("where", [0.0, 0.3, 0.6, 0.99])
def test_a_flipped_byte_is_found_and_its_shard_named(
    table: str, where: float, finished_root: Path, copy_root: Copy
) -> None:
    root = copy_root(finished_root)
    path = file_of(root, table, 3)
    content = bytearray(path.read_bytes())
    content[int(where * len(content))] ^= 0x04
    path.write_bytes(content)
    problem = the_problem(root)
    assert "shard 3" in problem
    assert table.removeprefix("streams/") in problem
    assert path.name in problem


def test_a_file_that_is_cut_short_is_found(finished_root: Path, copy_root: Copy) -> None:
    root = copy_root(finished_root)
    path = file_of(root, "streams/semantic", 0)
    for size in (0, 10, path.stat().st_size - 1):
        os.truncate(path, size)
        assert path.name in the_problem(root)


@pytest.mark.parametrize("table", ["streams/acoustic", "corpus"])
def test_a_deleted_file_is_found(table: str, finished_root: Path, copy_root: Copy) -> None:
    root = copy_root(finished_root)
    path = file_of(root, table, 2)
    path.unlink()
    problem = the_problem(root)
    assert "shard 2" in problem
    assert path.name in problem
    assert "is not there" in problem


def test_a_file_of_another_shard_in_the_place_of_ones_own_is_found(finished_root: Path, copy_root: Copy) -> None:
    root = copy_root(finished_root)
    shutil.copy(file_of(root, "streams/semantic", 1), file_of(root, "streams/semantic", 2))
    assert "shard 2" in the_problem(root)


def test_several_damages_are_all_told(finished_root: Path, copy_root: Copy) -> None:
    root = copy_root(finished_root)
    for table, shard in (("streams/semantic", 1), ("streams/acoustic", 1), ("streams/acoustic", 4)):
        file_of(root, table, shard).unlink()
    verdict = check(root, sample=30)  # some of them from these shards
    assert verdict.num_problems == 3
    for problem, words in zip(
        sorted(verdict.problems),
        (("acoustic", "shard 1"), ("acoustic", "shard 4"), ("semantic", "shard 1")),
        strict=True,
    ):
        assert all(word in problem for word in words)


def test_a_shard_that_a_stream_lacks_is_found(finished_root: Path, copy_root: Copy) -> None:
    root = copy_root(finished_root)
    made_anew(root, "semantic", lambda shard, table: None if shard == 4 else table)
    problem = the_problem(root, sample=30)  # some of them from shard 4
    assert "semantic" in problem
    assert "lacks shard 4" in problem


def test_a_shard_that_the_corpus_lacks_is_found(finished_root: Path, copy_root: Copy) -> None:
    place = Root(copy_root(finished_root))
    snapshot = open_stream(place, "semantic")
    table = read_parquet(place, snapshot.path(0), schema=stream_schema(stream_spec(snapshot)))
    folder = stream_folder("semantic")
    TableWriter(place, folder).commit([write_shard(place, folder, 99, table, codebook_size=100)])
    problem = the_problem(Path(place.uri))
    assert "semantic" in problem
    assert "shard 99" in problem


def test_swapped_rows_are_found(finished_root: Path, copy_root: Copy) -> None:
    root = copy_root(finished_root)

    def change(shard: int, table: pa.Table) -> pa.Table:
        order = list(range(table.num_rows))
        if shard == 2:
            order[0], order[1] = order[1], order[0]
        return table.take(order)

    made_anew(root, "acoustic", change)
    problem = the_problem(root)
    assert "acoustic, shard 2" in problem
    assert "order" in problem


@pytest.mark.parametrize("shift", [-1, 1])
def test_a_row_too_few_or_too_many_is_found(shift: int, finished_root: Path, copy_root: Copy) -> None:
    root = copy_root(finished_root)

    def change(shard: int, table: pa.Table) -> pa.Table:
        if shard != 1:
            return table
        return table.slice(0, table.num_rows - 1) if shift < 0 else pa.concat_tables([table, table.slice(0, 1)])

    made_anew(root, "semantic", change)
    assert "semantic, shard 1" in the_problem(root)


def test_a_single_wrong_code_is_found_by_tokenizing_again(own_root: Path) -> None:
    root = own_root
    spoilt: list[str] = []

    def change(shard: int, table: pa.Table) -> pa.Table:
        if shard != 0:
            return table
        row = first_good_row(table)
        codes = table["codes_03"].to_pylist()
        codes[row][1] = (codes[row][1] + 1) % 64
        spoilt.append(table["id"][row].as_py())
        return with_column(table, "codes_03", codes)

    made_anew(root, "acoustic", change)
    assert check(root, sample=0).problems == []  # well-formed: only the audio can tell
    verdict = check(root, sample=1_000)
    assert (verdict.num_problems, verdict.codes_different) == (1, 1)
    assert f"acoustic, segment {spoilt[0]}" in verdict.problems[0]
    assert "1 codes differ" in verdict.problems[0]


@pytest.mark.parametrize("code", [64, -1, 32_767])
def test_a_code_out_of_range_is_found(code: int, finished_root: Path, copy_root: Copy) -> None:
    root = copy_root(finished_root)

    def change(shard: int, table: pa.Table) -> pa.Table:
        if shard != 5:
            return table
        codes = table["codes_07"].to_pylist()
        codes[first_good_row(table)][0] = code
        return with_column(table, "codes_07", codes)

    made_anew(root, "acoustic", change)
    problem = the_problem(root)
    assert "acoustic, shard 5, segment" in problem
    assert "codes outside 0 to 63" in problem


def _one_frame_less_said(table: pa.Table, row: int) -> pa.Table:
    frames = table["num_frames"].to_pylist()
    frames[row] -= 1
    return with_column(table, "num_frames", frames)


def _one_frame_less_held(table: pa.Table, row: int) -> pa.Table:
    for name in [name for name in table.column_names if name.startswith("codes_")]:
        codes = table[name].to_pylist()
        codes[row].pop()
        table = with_column(table, name, codes)
    return table


def _one_frame_less_in_one_codebook(table: pa.Table, row: int) -> pa.Table:
    codes = table["codes_05"].to_pylist()
    codes[row].pop()
    return with_column(table, "codes_05", codes)


def _one_frame_less_altogether(table: pa.Table, row: int) -> pa.Table:
    return _one_frame_less_held(_one_frame_less_said(table, row), row)


def _no_codes_and_no_error(table: pa.Table, row: int) -> pa.Table:
    for name in [name for name in table.column_names if name.startswith("codes_")]:
        codes = table[name].to_pylist()
        codes[row] = None
        table = with_column(table, name, codes)
    frames = table["num_frames"].to_pylist()
    frames[row] = None
    return with_column(table, "num_frames", frames)


@pytest.mark.parametrize(
    "spoil",
    [
        _one_frame_less_said,
        _one_frame_less_held,
        _one_frame_less_in_one_codebook,
        _one_frame_less_altogether,
        _no_codes_and_no_error,
    ],
)
def test_a_wrong_number_of_frames_is_found(
    spoil: Callable[[pa.Table, int], pa.Table], finished_root: Path, copy_root: Copy
) -> None:
    root = copy_root(finished_root)
    made_anew(root, "acoustic", lambda shard, table: spoil(table, first_good_row(table)) if shard == 6 else table)
    problem = the_problem(root)
    assert "acoustic, shard 6, segment" in problem
    assert "the frame rule gives" in problem


def test_a_missing_code_inside_a_row_cannot_be_written(finished_root: Path, copy_root: Copy) -> None:
    root = copy_root(finished_root)

    def change(shard: int, table: pa.Table) -> pa.Table:
        if shard != 1:
            return table
        codes = table["codes_00"].to_pylist()
        codes[first_good_row(table)][1] = None
        return with_column(table, "codes_00", codes)

    with pytest.raises(pa.ArrowInvalid, match="non-nullable"):
        made_anew(root, "semantic", change)


def test_codes_where_the_corpus_has_an_error_are_found(finished_root: Path, copy_root: Copy) -> None:
    root = copy_root(finished_root)
    changed: list[str] = []

    def change(shard: int, table: pa.Table) -> pa.Table:
        errors = table["error"].to_pylist()
        if "empty" not in errors:
            return table
        row = errors.index("empty")
        changed.append(table["id"][row].as_py())
        errors[row] = None
        codes = table["codes_00"].to_pylist()
        codes[row] = []
        frames = table["num_frames"].to_pylist()
        frames[row] = 0
        return with_column(with_column(with_column(table, "error", errors), "codes_00", codes), "num_frames", frames)

    made_anew(root, "semantic", change)
    problem = the_problem(root)
    assert changed[0] in problem
    assert "the corpus says empty" in problem


def test_an_error_where_the_audio_is_fine_is_found_by_tokenizing_again(own_root: Path) -> None:
    root = own_root

    def change(shard: int, table: pa.Table) -> pa.Table:
        if shard != 0:
            return table
        row = first_good_row(table)
        changes = {"error": "corrupt", "error_message": "so it says", "num_frames": None, "codes_00": None}
        for name, value in changes.items():
            values = table[name].to_pylist()
            values[row] = value
            table = with_column(table, name, values)
        return table

    made_anew(root, "semantic", change)
    assert "semantic, segment" in the_problem(root, sample=1_000)


# The recordings themselves


@pytest.fixture
def own_root(samples: Path, fitted_root: Path, tmp_path: Path) -> Path:
    """A finished root over a copy of three recordings, which may be changed: `tmp_path / "speech"`."""
    (tmp_path / "speech").mkdir()
    for name in ("en_anna_01.opus", "en_anna_11.flac", "en_anna_12.wav"):
        shutil.copy(samples / "speech" / name, tmp_path / "speech")
    root = tmp_path / "own"
    build_corpus(Root(root), [str(tmp_path / "speech")], CorpusPolicy(window_s=1.0), shard_hours=1)
    shutil.copytree(fitted_root / "codebooks", root / "codebooks")
    tokenize(Root(root), STREAMS, InlineEngine, TokenizeOptions())
    assert check(root, sample=1_000).problems == []
    return root


def test_a_deleted_recording_is_found(own_root: Path, tmp_path: Path) -> None:
    (tmp_path / "speech" / "en_anna_12.wav").unlink()
    verdict = check(own_root, sample=1_000)
    windows = [row for row in _rows(own_root) if row["path"] == "en_anna_12.wav"]
    assert verdict.num_problems == 2 * len(windows) > 2
    assert all("cannot be read now" in problem and "not there" in problem for problem in verdict.problems)
    assert {row["id"] for row in windows} == {problem.split("segment ")[1][:26] for problem in verdict.problems}


def test_a_recording_of_another_size_is_found(own_root: Path, tmp_path: Path) -> None:
    with (tmp_path / "speech" / "en_anna_11.flac").open("ab") as file:
        file.write(b"tail")
    problems = check(own_root, sample=1_000).problems
    assert problems
    assert all("bytes when the corpus was built" in problem for problem in problems)


def test_another_recording_of_the_same_size_is_found(own_root: Path, tmp_path: Path) -> None:
    path = tmp_path / "speech" / "en_anna_12.wav"
    samples, rate = soundfile.read(path, dtype="int16")
    soundfile.write(path, samples[::-1], rate, subtype="PCM_16")
    verdict = check(own_root, sample=1_000)
    assert {problem.split("segment ")[1][:26] for problem in verdict.problems} == {
        row["id"] for row in _rows(own_root) if row["path"] == "en_anna_12.wav"
    }
    assert all("but others" in problem for problem in verdict.problems)


def test_other_sound_that_no_sample_of_its_bytes_shows_is_found_by_its_codes(
    samples: Path, fitted_root: Path, tmp_path: Path
) -> None:
    speech_N, rate = soundfile.read(samples / "speech" / "en_anna_12.wav", dtype="int16")
    (tmp_path / "speech").mkdir()
    path, root = tmp_path / "speech" / "long.wav", tmp_path / "own"
    soundfile.write(path, np.tile(speech_N, 20), rate, subtype="PCM_16")
    build_corpus(Root(root), [str(tmp_path / "speech")], CorpusPolicy(window_s=1.0), shard_hours=1)
    shutil.copytree(fitted_root / "codebooks", root / "codebooks")
    tokenize(Root(root), STREAMS, InlineEngine, TokenizeOptions())
    content, version = path.read_bytes(), _rows(root)[0]["version"]
    for begin in range(20_000, len(content), 5_000):
        path.write_bytes(content[:begin] + bytes(10_000) + content[begin + 10_000 :])
        with Opener().open(Place(source_root=str(path.parent), path=path.name)) as opened:
            if opened.version == version:
                break
    else:
        raise AssertionError("a sample of some bytes shows no change in any")
    verdict = check(root, sample=1_000)
    assert verdict.codes_different > 0
    silenced = {(begin - 44 + place) // 2 // rate for place in (0, 9_999)}  # seconds
    assert {problem.split("segment ")[1][:26] for problem in verdict.problems} <= {
        row["id"] for row in _rows(root) if row["start_sample"] // rate in silenced
    }


def test_recordings_that_moved_are_found_where_one_says_they_are(own_root: Path, tmp_path: Path) -> None:
    (tmp_path / "speech").rename(tmp_path / "moved")
    assert check(own_root, sample=1_000).num_problems > 0
    assert check(own_root, sample=1_000, source_roots={"speech": str(tmp_path / "moved")}).problems == []


def test_a_codebook_that_was_exchanged_is_told_among_the_problems(own_root: Path) -> None:
    path = own_root / "codebooks" / "mfcc-kmeans.safetensors"
    with safe_open(path, framework="pt") as file:
        centroids_QCD, header = file.get_tensor("centroids"), file.metadata()
    centroids_QCD[0, 0, 0] += 1.0
    save_file({"centroids": centroids_QCD}, path, metadata=header)
    (problem,) = check(own_root, sample=1).problems
    assert "stream semantic cannot be tokenized again" in problem
    assert "codebook differs" in problem


def _rows(root: Path) -> list[dict[str, object]]:
    corpus = open_corpus(Root(root))
    return [
        row
        for shard in corpus.files
        for row in read_parquet(Root(root), corpus.path(shard), schema=CORPUS_SCHEMA).to_pylist()
    ]
