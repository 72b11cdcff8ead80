"""Same audio, same codes: inline and on Ray, in shards of any size, alone and together, in any order."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from conftest import STREAMS
from wavemill.jobs.corpus import build_corpus
from wavemill.jobs.engine import InlineEngine
from wavemill.jobs.ray_engine import RayEngine
from wavemill.jobs.tokenize import TokenizeOptions, tokenize
from wavemill.pipelines.policy import CorpusPolicy
from wavemill.storage.codes import open_corpus, open_stream, read_codes
from wavemill.storage.root import Root
from wavemill.tokenizers.spec import UserError


def rows(root: Path | str) -> dict[str, dict[str, tuple[object, ...]]]:
    """Error, shape and hash of the codes of every segment, by stream and id."""
    place = Root(root)
    found: dict[str, dict[str, tuple[object, ...]]] = {}
    for stream in STREAMS:
        snapshot = open_stream(place, stream.name)
        found[stream.name] = {}
        for shard in snapshot.files:
            part = read_codes(place, snapshot, shard)
            for place_in_shard, segment in enumerate(part.ids):
                codes_KT = part.codes(place_in_shard)
                content = None if codes_KT is None else hashlib.sha256(codes_KT.tobytes()).hexdigest()
                shape = None if codes_KT is None else codes_KT.shape
                found[stream.name][segment] = (part.errors[place_in_shard], shape, content)
    return found


def made(
    root: Path, fitted: Path, sources: Sequence[str], *, shard_hours: float, options: TokenizeOptions | None = None
) -> Path:
    build_corpus(Root(root), sources, CorpusPolicy(), shard_hours=shard_hours)
    shutil.copytree(fitted / "codebooks", root / "codebooks")
    tokenize(Root(root), STREAMS, InlineEngine, options or TokenizeOptions())
    return root


def both_sources(samples: Path) -> list[str]:
    return [f"speech={samples / 'manifest.jsonl'}", f"broken={samples / 'broken'}"]


def test_ray_writes_the_very_files_that_the_inline_engine_writes(
    fitted_root: Path, finished_root: Path, copy_root: Callable[[Path], Path]
):
    root = copy_root(fitted_root)
    tokenize(Root(root), STREAMS, lambda: RayEngine(address=None, num_workers=2), TokenizeOptions())
    for stream in STREAMS:
        ours, theirs = (open_stream(Root(path), stream.name) for path in (root, finished_root))
        assert ours.files == theirs.files
        for shard in ours.files:
            assert (root / ours.path(shard)).read_bytes() == (finished_root / theirs.path(shard)).read_bytes()


@pytest.mark.parametrize("shard_hours", [pytest.param(0.002, marks=pytest.mark.slow), 5.0])
def test_the_size_of_shards_changes_no_code(
    shard_hours: float, fitted_root: Path, finished_root: Path, samples: Path, tmp_path: Path
):
    root = made(tmp_path / "root", fitted_root, both_sources(samples), shard_hours=shard_hours)
    assert len(open_corpus(Root(root)).files) != len(open_corpus(Root(finished_root)).files)
    assert rows(root) == rows(finished_root)


@pytest.mark.slow
def test_the_order_of_sources_and_the_decoding_threads_change_no_code(
    fitted_root: Path, finished_root: Path, samples: Path, tmp_path: Path
):
    options = TokenizeOptions(decode_threads=3, decode_ahead_bytes=1)
    sources = list(reversed(both_sources(samples)))
    root = made(tmp_path / "root", fitted_root, sources, shard_hours=0.01, options=options)
    assert rows(root) == rows(finished_root)


def test_a_segment_tokenized_alone_in_a_dataset_of_its_own_has_the_same_codes(
    fitted_root: Path, finished_root: Path, samples: Path, tmp_path: Path
):
    together = rows(finished_root)
    lines = (samples / "manifest.jsonl").read_text().splitlines()
    for number in (0, 40, 77, 107):
        fields = json.loads(lines[number])
        folder = tmp_path / str(number)
        folder.mkdir()
        manifest = folder / "speech.jsonl"
        fields["audio_filepath"] = str(samples / fields["audio_filepath"])
        manifest.write_text(json.dumps(fields))
        alone = rows(made(folder / "root", fitted_root, [str(manifest)], shard_hours=1))
        for stream in STREAMS:
            ((_, (error, shape, content)),) = alone[stream.name].items()
            assert error is None
            assert (None, shape, content) in together[stream.name].values()


def test_streams_made_apart_equal_streams_made_together(
    fitted_root: Path, finished_root: Path, copy_root: Callable[[Path], Path]
):
    root = copy_root(fitted_root)
    for stream in reversed(STREAMS):
        tokenize(Root(root), [stream], InlineEngine, TokenizeOptions())
    assert rows(root) == rows(finished_root)
    for stream in STREAMS:
        assert open_stream(Root(root), stream.name).files == open_stream(Root(finished_root), stream.name).files


@pytest.mark.slow
def test_threads_of_the_machine_change_no_code(
    fitted_root: Path, finished_root: Path, copy_root: Callable[[Path], Path]
):
    root = copy_root(fitted_root)
    env = {**os.environ, "OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2"}
    command = [sys.executable, "-m", "wavemill.jobs.cli", "tokenize", str(root), "--engine", "inline"]
    assert subprocess.run(command, env=env, capture_output=True, check=False).returncode == 0
    assert rows(root) == rows(finished_root)


def test_every_file_of_a_stream_says_in_which_numerics_class_it_was_made(finished_root: Path):
    for stream in STREAMS:
        snapshot = open_stream(Root(finished_root), stream.name)
        for shard in snapshot.files:
            metadata = pq.read_metadata(finished_root / snapshot.path(shard)).metadata
            assert json.loads(metadata[b"wavemill.numerics"]) == snapshot.metadata["numerics"]
            assert snapshot.metadata["numerics"]["threads"] == "1"


@pytest.mark.slow
def test_another_numerics_class_is_refused_by_its_difference_unless_allowed(
    fitted_root: Path, samples: Path, tmp_path: Path
):
    first, second = both_sources(samples)
    root = made(tmp_path / "root", fitted_root, [first], shard_hours=0.03)
    for name in ("semantic", "acoustic"):  # as if the stream had been begun on another machine
        log = root / "streams" / name / "_delta_log" / "00000000000000000000.json"
        log.write_text(log.read_text().replace('\\"instructions\\": \\"', '\\"instructions\\": \\"NEON or '))
    build_corpus(Root(root), [first, second], CorpusPolicy(), shard_hours=0.03)
    with pytest.raises(UserError, match=r"another numerics class \(instructions: NEON or .* there, .* here\)"):
        tokenize(Root(root), STREAMS, InlineEngine, TokenizeOptions(max_error_share=1.0))
    allowed = TokenizeOptions(max_error_share=1.0, any_numerics=True)
    assert tokenize(Root(root), STREAMS, InlineEngine, allowed).shards == 1


@pytest.mark.slow
def test_a_corpus_that_grows_leaves_what_was_there_and_adds_the_rest(
    fitted_root: Path, finished_root: Path, samples: Path, tmp_path: Path
):
    first, second = both_sources(samples)
    root = made(tmp_path / "root", fitted_root, [first], shard_hours=0.009)
    before = {stream.name: open_stream(Root(root), stream.name).files for stream in STREAMS}
    build_corpus(Root(root), [first, second], CorpusPolicy(), shard_hours=0.009)
    summary = tokenize(Root(root), STREAMS, InlineEngine, TokenizeOptions())
    assert summary.shards == 1
    for stream in STREAMS:
        after = open_stream(Root(root), stream.name).files
        assert {shard: after[shard] for shard in before[stream.name]} == before[stream.name]
    assert rows(root) == rows(finished_root)
