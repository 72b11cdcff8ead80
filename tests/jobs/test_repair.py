"""Shards that rot or vanish are made again byte for byte; errors are tried again when asked for."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from conftest import STREAMS
from wavemill.jobs.corpus import build_corpus
from wavemill.jobs.engine import InlineEngine
from wavemill.jobs.repair import ANY_ERROR, look, mend
from wavemill.jobs.tokenize import TokenizeOptions, tokenize
from wavemill.pipelines.policy import CorpusPolicy
from wavemill.storage.codes import open_stream, read_codes
from wavemill.storage.parquet import CorruptFile
from wavemill.storage.pins import pin
from wavemill.storage.root import Root
from wavemill.storage.table import read_snapshot
from wavemill.tokenizers.spec import UserError

Wavemill = Callable[..., CompletedProcess[str]]


def shard_file(root: Path, stream: str, shard: int) -> Path:
    return root / open_stream(Root(root), stream).path(shard)


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8 % len(content)] ^= 1 << bit % 8
    path.write_bytes(content)


def test_shards_that_rot_or_vanish_are_again_what_they_were(
    finished_root: Path, copy_root: Callable[[Path], Path], in_process: Wavemill
):
    root = copy_root(finished_root)
    rotten, gone, both = (shard_file(root, *where) for where in (("semantic", 1), ("acoustic", 2), ("acoustic", 1)))
    before = {path: path.read_bytes() for path in (rotten, gone, both)}
    flip(rotten, 4321)
    flip(both, 98765)
    gone.unlink()
    ill = in_process("verify", root, "--sample", "0")
    assert ill.returncode == 1
    assert all(f"shard {shard}" in ill.stderr for shard in (1, 2))
    assert "wavemill repair" in ill.stderr
    versions = {name: open_stream(Root(root), name).version for name in ("semantic", "acoustic")}
    done = in_process("repair", root, "--engine", "inline", "--json")
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert (figures["damaged"], figures["restored"], figures["replaced"], figures["problems"]) == (3, 3, 0, [])
    assert {path: path.read_bytes() for path in before} == before
    assert {name: open_stream(Root(root), name).version for name in versions} == versions, "nothing had to be committed"
    assert in_process("verify", root, "--sample", "0").returncode == 0
    assert look(Root(root)).tasks() == []


@pytest.mark.slow
def test_a_shard_that_comes_out_otherwise_is_left_alone_unless_that_is_accepted(
    fitted_root: Path, samples: Path, tmp_path: Path
):
    audio, root = tmp_path / "audio", Root(tmp_path / "root")
    shutil.copytree(samples / "speech", audio)
    build_corpus(root, [f"speech={audio}"], CorpusPolicy(), shard_hours=0.02)
    shutil.copytree(fitted_root / "codebooks", tmp_path / "root" / "codebooks")
    tokenize(root, STREAMS, InlineEngine, TokenizeOptions())
    pin(root, "base")
    first = next(iter(sorted(audio.glob("*.flac")) or sorted(audio.glob("*.wav"))))
    first.unlink()
    shard = next(
        shard for shard, rows in corpus_paths(root).items() if first.name in {Path(path).name for path in rows}
    )
    path = Path(root.join(open_stream(root, "semantic").path(shard)))
    flip(path, 12345)
    damaged = path.read_bytes()
    refused = mend(root, look(root), InlineEngine, TokenizeOptions())
    assert (refused.damaged, refused.restored, refused.replaced) == (1, 0, 0)
    assert "its recordings have changed, or cannot be read now" in refused.problems[0]
    assert path.read_bytes() == damaged
    accepted = mend(root, look(root), InlineEngine, TokenizeOptions(), accept=True)
    assert (accepted.restored, accepted.replaced, accepted.problems) == (0, 1, [])
    codes = read_codes(root, open_stream(root, "semantic"), shard)
    assert codes.errors.count("missing") == 1
    assert look(root).tasks() == []


@pytest.mark.slow
def test_errors_that_have_gone_are_tried_again_and_pinned_readers_notice_nothing(
    fitted_root: Path, samples: Path, tmp_path: Path
):
    audio, root = tmp_path / "audio", Root(tmp_path / "root")
    shutil.copytree(samples / "speech", audio)
    build_corpus(root, [f"speech={audio}"], CorpusPolicy(), shard_hours=0.02)
    shutil.copytree(fitted_root / "codebooks", tmp_path / "root" / "codebooks")
    undisturbed = tmp_path / "undisturbed"
    shutil.copytree(tmp_path / "root", undisturbed)
    tokenize(Root(undisturbed), STREAMS, InlineEngine, TokenizeOptions())
    away = sorted(audio.iterdir())[0]
    away.rename(tmp_path / away.name)
    tokenize(root, STREAMS, InlineEngine, TokenizeOptions(max_error_share=1))
    versions = pin(root, "before")
    assert open_stream(root, "semantic").num_errors >= 1
    (tmp_path / away.name).rename(away)
    assert look(root).tasks() == []
    assert look(root, frozenset({"corrupt"})).tasks() == []
    done = mend(root, look(root, frozenset({"missing"})), InlineEngine, TokenizeOptions())
    assert (done.damaged, done.restored, done.replaced, done.problems) == (0, 0, 2, [])
    for name in ("semantic", "acoustic"):
        ours, theirs = open_stream(root, name), open_stream(Root(undisturbed), name)
        assert {shard: file.file_name for shard, file in ours.files.items()} == {
            shard: file.file_name for shard, file in theirs.files.items()
        }
        pinned = open_stream(root, name, version=versions[name])
        assert sum(read_codes(root, pinned, shard).errors.count("missing") for shard in pinned.files) >= 1
    assert look(root, frozenset({ANY_ERROR})).tasks() == []


def test_what_cannot_be_mended_is_told(finished_root: Path, copy_root: Callable[[Path], Path], in_process: Wavemill):
    root = copy_root(finished_root)
    corpus = read_snapshot(Root(root), "corpus")
    assert corpus is not None
    flip(root / corpus.path(1), 777)
    done = in_process("repair", root, "--engine", "inline")
    assert done.returncode == 1
    assert "corpus, shard 1" in done.stderr
    assert "cannot be made again from the dataset" in done.stderr
    assert "Traceback" not in done.stderr
    nonsense = in_process("repair", root, "--errors", "mising")
    assert nonsense.returncode == 2
    assert "Did you mean 'missing'?" in nonsense.stderr


def test_an_empty_root_has_nothing_to_repair(fitted_root: Path):
    with pytest.raises(UserError, match="There is no stream"):
        look(Root(fitted_root))


def test_damage_tells_of_repair(finished_root: Path, copy_root: Callable[[Path], Path]):
    root = copy_root(finished_root)
    shard_file(root, "semantic", 0).write_bytes(b"PAR1 but nothing else")
    with pytest.raises(CorruptFile, match="wavemill repair"):
        read_codes(Root(root), open_stream(Root(root), "semantic"), 0)


def corpus_paths(root: Root) -> dict[int, list[str]]:
    from wavemill.storage.parquet import read_parquet
    from wavemill.storage.schema import CORPUS_SCHEMA

    corpus = read_snapshot(root, "corpus")
    assert corpus is not None
    return {
        shard: read_parquet(root, corpus.path(shard), schema=CORPUS_SCHEMA, columns=["path"])["path"].to_pylist()
        for shard in corpus.files
    }
