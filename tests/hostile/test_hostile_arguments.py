"""Hostile manifests, recipes, codebooks, separators and ids: refused, and nothing fetched, run or read."""

import gzip
import json
import os
import shutil
import struct
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.numpy
from hostile_containers import many_members, zeros_in_gzip
from hostile_files import file
from hostile_runs import rows_of, run
from hostile_tools import CANARY_RATE, OpenWatch, World, control_characters, pickled, snapshot, sound
from wavemill.jobs.corpus import build_corpus
from wavemill.jobs.recipe_file import load_recipe
from wavemill.pipelines.entries import AudioError
from wavemill.pipelines.policy import CorpusPolicy
from wavemill.pipelines.recordings import Opener, Place
from wavemill.pipelines.sources import open_source
from wavemill.storage.root import Root
from wavemill.tokenizers.codebook import Codebook
from wavemill.tokenizers.separate import Separator
from wavemill.tokenizers.spec import UserError

pytestmark = pytest.mark.timeout(200)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    """A watched world with one good recording; on leaving, nobody may have connected, run or read anything."""
    world = World.make(tmp_path / "world")
    (world.source / "good.wav").write_bytes(sound())
    watch = OpenWatch(world.canaries)
    yield world
    opened = watch.opened()
    watch.close()
    world.listener.close()
    assert world.listener.hits == 0
    assert opened == set()
    assert not world.touched.exists()


def build(world: World, source: Path | str) -> dict[str, str | None]:
    """Errors by path and member of a corpus of a source."""
    root = world.folder.parent / "root"
    build_corpus(Root(root), [f"x={source}"], CorpusPolicy(), shard_hours=1)
    rows = rows_of(root)
    assert all(row["sample_rate"] != CANARY_RATE for row in rows)
    return {row["path"] + (f" > {row['member']}" if row["member"] else ""): row["error"] for row in rows}


# Manifests

ELSEWHERE = [
    "URL",
    "http://169.254.169.254/latest/meta-data/iam/security-credentials/",
    "http://[fd00:ec2::254]/latest/",
    "https://user:secret@127.0.0.1/a.wav",
    "s3://bucket/a.wav",
    "file:///etc/passwd",
    "HTTP://127.0.0.1/a.wav",
    "ftp://127.0.0.1/a.wav",
    "concat://a|b",
    "pipe:touch touched",
]
MANIFESTS: dict[str, Callable[[str], bytes]] = {
    "list.jsonl": lambda path: json.dumps({"audio_filepath": path}).encode(),
    "list.csv": lambda path: f'path,text\n"{path}",x\n'.encode(),
    "list.tsv": lambda path: f"path\ttext\n{path}\tx\n".encode(),
    "wav.scp": lambda path: f"utt1 {path}\n".encode(),
}


@pytest.mark.parametrize("path", ELSEWHERE)
@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_that_names_a_url_or_a_command_is_refused_and_nothing_is_fetched(
    world: World, name: str, path: str
) -> None:
    manifest = world.source / name
    manifest.write_bytes(MANIFESTS[name](path.replace("URL", world.listener.url)))
    with pytest.raises(UserError, match=r"line \d") as refusal:
        open_source(str(manifest if name != "wav.scp" else world.source), exclude="/nowhere")
    assert len(str(refusal.value)) < 600


def test_the_refusal_of_a_url_does_not_repeat_its_password_or_signature(world: World) -> None:
    for url in ("https://user:hunter2@127.0.0.1/a.wav", "https://b.s3.amazonaws.com/a.wav?X-Amz-Signature=hunter2"):
        (world.source / "list.jsonl").write_text(json.dumps({"audio_filepath": url}))
        with pytest.raises(UserError, match="line 1") as refusal:
            open_source(str(world.source / "list.jsonl"), exclude="/nowhere")
        assert "hunter2" not in str(refusal.value)


@pytest.mark.parametrize(
    "command", ["touch TOUCHED |", "cat CANARY |", "sph2pipe -f wav CANARY|", "|touch TOUCHED", "-", "CANARY:123"]
)
def test_pipes_and_offsets_of_a_kaldi_wav_scp_are_refused(world: World, command: str) -> None:
    line = command.replace("TOUCHED", str(world.touched)).replace("CANARY", str(world.outside / "canary.wav"))
    (world.source / "wav.scp").write_text(f"utt1 {line}\n")
    with pytest.raises(UserError):
        list(open_source(str(world.source), exclude="/nowhere").entries)


@pytest.mark.parametrize("kind", ["url", "command", "memory", "pickle", "shar"])
def test_lhotse_sources_that_are_no_files_are_refused(world: World, kind: str) -> None:
    text = world.listener.url if kind == "url" else f"touch {world.touched}"
    source = {"type": kind, "channels": [0], "source": text}
    recording = {"id": "r", "sources": [source], "sampling_rate": 16000, "num_samples": 16000, "duration": 1.0}
    (world.source / "recordings.jsonl").write_text(json.dumps(recording) + "\n")
    with pytest.raises(UserError):
        list(open_source(str(world.source / "recordings.jsonl"), exclude="/nowhere", kind="lhotse").entries)


@pytest.mark.parametrize("argument", ["http://127.0.0.1/x", "pipe:touch touched", "hf://datasets/x", "x=s3://b/c"])
def test_a_source_that_is_a_url_or_a_command_is_refused(argument: str) -> None:
    with pytest.raises(UserError, match="is a URL"):
        open_source(argument, exclude="/nowhere")


def test_relative_paths_of_a_manifest_that_lead_out_are_errors(world: World) -> None:
    paths = ["../outside/canary.wav", "x/../../outside/canary.wav", "good.wav"]
    (world.source / "list.jsonl").write_text("\n".join(json.dumps({"audio_filepath": path}) for path in paths))
    assert build(world, world.source / "list.jsonl") == {"../outside/canary.wav": "outside-source", "good.wav": None}


def test_a_table_found_in_a_folder_cannot_name_recordings_outside_of_it(tmp_path: Path) -> None:
    world = World.make(tmp_path / "world")
    watch = OpenWatch(world.canaries)
    pq.write_table(pa.table({"path": [str(world.outside / "canary.wav")]}), world.source / "a.parquet")
    try:
        build(world, world.source)
        assert watch.opened() == set()
    finally:
        watch.close()
        world.listener.close()


@pytest.mark.parametrize("name", ["a.wav", "folder"])
def test_a_link_that_leads_to_itself_stops_no_build(world: World, name: str) -> None:
    (world.source / name).symlink_to(name)
    found = build(world, world.source)
    assert found["good.wav"] is None
    assert found.get("a.wav", "unreadable") == "unreadable"


# Bombs of their own


@pytest.mark.slow
def test_a_gigabyte_of_zeros_in_a_gzipped_tar_takes_no_gigabyte_of_memory(world: World, tmp_path: Path) -> None:
    file("a.tar.gz", zeros_in_gzip(1 << 29))(world.source, world)
    file("b.tar", many_members(100_000))(world.source, world)
    before = snapshot(world.source)
    done = run(world, "corpus", "build", f"x={world.source}", "--to", tmp_path / "root")
    assert done.status == 0, done.err
    assert done.peak_bytes < 1_000_000_000
    assert done.wall_s < 120
    assert snapshot(world.source) == before
    wanted = {"zeros": "not-audio", "wave": None, "good": None}
    assert {row["member"]: row["error"] for row in rows_of(tmp_path / "root") if row["member"]} == {
        f"{name}.wav": error for name, error in wanted.items()
    }


def test_a_member_too_large_for_memory_is_refused_before_it_is_read(tmp_path: Path) -> None:
    header = tarfile.TarInfo("a.wav")
    header.size = 3 << 30
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(header.tobuf() + bytes(1 << 20)))
    started = time.monotonic()
    with pytest.raises(AudioError) as refusal:
        Opener().open(Place(source_root=str(tmp_path), path="a.tar.gz", member="a.wav", size_bytes=3 << 30))
    assert refusal.value.kind == "too-large"
    assert time.monotonic() - started < 5


# Things that could be executed


def test_a_codebook_that_is_a_pickle_is_refused_and_not_unpickled(
    world: World, copy_root: Callable[[Path], Path], fitted_root: Path
) -> None:
    root = copy_root(fitted_root)
    (root / "codebooks" / "mfcc-kmeans.safetensors").write_bytes(pickled(world.touched))
    done = run(world, "tokenize", root, "--engine", "inline")
    assert done.status != 0
    assert "mfcc-kmeans" in done.err
    assert "Traceback" not in done.err


@pytest.mark.slow
def test_a_run_on_ray_imports_nothing_from_the_folder_it_is_started_in(tmp_path: Path, fitted_root: Path) -> None:
    """A dataset that somebody is in may hold a numpy.py, as the world's desk does."""
    with tempfile.TemporaryDirectory(prefix="wm") as short:  # Ray's sockets have long names below it
        world = World.make(Path(short) / "w")
        (world.source / "good.wav").write_bytes(sound())
        shutil.copytree(fitted_root / "codebooks", tmp_path / "root" / "codebooks")
        assert run(world, "corpus", "build", f"x={world.source}", "--to", tmp_path / "root").status == 0
        done = run(world, "tokenize", tmp_path / "root", "--workers", "1")
        world.listener.close()
        assert done.status == 0, done.err
        assert not world.touched.exists()


@pytest.mark.parametrize("size", [2**63 - 1, 2**40, 10**8, 0])
def test_a_codebook_whose_header_claims_to_be_enormous_is_refused(size: int) -> None:
    with pytest.raises(UserError):
        Codebook.from_bytes(struct.pack("<Q", size) + b"{}", name="x")


def test_a_codebook_with_a_pickle_as_metadata_is_refused_and_not_unpickled(world: World) -> None:
    metadata = {"wavemill": pickled(world.touched, protocol=0).decode("latin-1")}
    content = safetensors.numpy.save({"centroids": np.zeros((4, 3), dtype=np.float32)}, metadata=metadata)
    with pytest.raises(UserError):
        Codebook.from_bytes(content, name="x")


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors", "a.pkl"])
def test_a_separator_that_is_a_pickle_is_refused_and_not_unpickled(world: World, name: str) -> None:
    for protocol in (0, 2, 4):
        (world.folder / "desk" / name).write_bytes(pickled(world.touched, protocol=protocol))
        with pytest.raises(UserError, match="never unpickled"):
            Separator.from_file(world.folder / "desk" / name)


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:os.system ['touch TOUCHED']",
        "corpus: !!python/object/apply:os.system ['touch TOUCHED']",
        "corpus: {sources: [{path: !!python/name:os.system }]}",
        "corpus: {sources: !!python/object/new:type {args: [x, [], {}]}}",
        "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\nd: &d [*c, *c]\ncorpus: *d",
        "<<: !!python/module:os",
        "corpus: " + "[" * 5_000,
        "corpus: {sources: [{path: 'URL'}]}",
    ],
)
def test_a_recipe_with_tags_bombs_or_urls_is_refused_and_nothing_is_made_of_it(world: World, text: str) -> None:
    recipe = world.folder / "desk" / "recipe.yaml"
    recipe.write_text(text.replace("TOUCHED", str(world.touched)).replace("URL", world.listener.url))
    with pytest.raises(UserError):
        open_source(load_recipe(str(recipe)).corpus.sources[0].path, exclude="/nowhere")


# Ids and names of streams

STRANGE_IDS = ["../../x", "/etc/passwd", "..", "a/../../b", "%2e%2e", "\x1b[31mx", "x" * 10_000, "", "*", "a\0b"]


@pytest.mark.parametrize("name", ["decode", "inspect", "streams"])
def test_ids_and_names_that_are_paths_are_refused_and_nothing_is_written(
    world: World, finished_root: Path, name: str
) -> None:
    to = world.folder / "home" / "decoded"
    before = set(snapshot(world.folder))
    value = "../../\x1b[31mx"
    commands = {
        "decode": ("decode", finished_root, value, "--to", to),
        "inspect": ("inspect", finished_root, "--segment", value),
        "streams": ("decode", finished_root, "--stream", value, "--to", to),
    }
    done = run(world, *commands[name])
    assert done.status in (1, 2), done.out
    assert "Traceback" not in done.err
    assert control_characters(done.err) == set()
    assert set(snapshot(world.folder)) - {str(to)} == before


def test_library_calls_refuse_strange_ids_too(finished_root: Path, tmp_path: Path) -> None:
    from wavemill.pipelines.closeup import read_segment
    from wavemill.pipelines.listen import decode_segments
    from wavemill.storage.codes import open_corpus

    root = Root(finished_root)
    corpus = open_corpus(root)
    for value in STRANGE_IDS:
        with pytest.raises(UserError):
            read_segment(root, corpus, value)
        with pytest.raises(UserError):
            list(
                decode_segments(
                    root,
                    corpus,
                    "acoustic",
                    ids=frozenset({value}),
                    limit=1,
                    num_codebooks=None,
                    folder=tmp_path / "out",
                )
            )
    assert not (tmp_path / "out").exists() or os.listdir(tmp_path / "out") == []
