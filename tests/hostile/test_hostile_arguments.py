"""Hostile manifests, recipes and ids: refused, and nothing fetched, run or read."""

import gzip
import json
import os
import subprocess
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hostile_containers import many_members, zeros_in_gzip
from hostile_files import file
from hostile_runs import rows_of, run
from hostile_teller import Teller
from hostile_tools import CANARY_RATE, World, control_characters, snapshot
from wavemill.jobs.corpus import build_corpus
from wavemill.jobs.recipe_file import load_recipe
from wavemill.pipelines.entries import AudioError
from wavemill.pipelines.policy import CorpusPolicy
from wavemill.pipelines.recordings import Opener, Place
from wavemill.pipelines.sources import open_source
from wavemill.storage.root import Root
from wavemill.tokenizers.spec import UserError

pytest_plugins = ["hostile_table"]
pytestmark = pytest.mark.timeout(200)


def build(world: World, source: Path | str) -> dict[str, str | None]:
    """Errors by path and member of a corpus of a source."""
    root = world.folder.parent / "root"
    build_corpus(Root(root), [f"x={source}"], CorpusPolicy(), shard_hours=1)
    rows = rows_of(root)
    assert all(row["sample_rate"] != CANARY_RATE for row in rows)
    return {row["path"] + (f" > {row['member']}" if row["member"] else ""): row["error"] for row in rows}


def test_the_refusal_of_a_url_does_not_repeat_its_password_or_signature(world: World, tell: Teller) -> None:
    for url in ("https://user:hunter2@127.0.0.1/a.wav", "https://b.s3.amazonaws.com/a.wav?X-Amz-Signature=hunter2"):
        (world.source / "list.jsonl").write_text(json.dumps({"audio_filepath": url}))
        with pytest.raises(UserError, match="line 1") as refusal:
            open_source(str(world.source / "list.jsonl"), exclude="/nowhere")
        assert "hunter2" not in str(refusal.value)
        tell.case(f"{url.partition('?')[0].replace('hunter2', '...')} in a manifest", str(refusal.value))


@pytest.mark.parametrize(
    "command", ["touch TOUCHED |", "cat CANARY |", "sph2pipe -f wav CANARY|", "|touch TOUCHED", "-", "CANARY:123"]
)
def test_pipes_and_offsets_of_a_kaldi_wav_scp_are_refused(world: World, tell: Teller, command: str) -> None:
    line = command.replace("TOUCHED", str(world.touched)).replace("CANARY", str(world.outside / "canary.wav"))
    (world.source / "wav.scp").write_text(f"utt1 {line}\n")
    with pytest.raises(UserError) as refusal:
        list(open_source(str(world.source), exclude="/nowhere").entries)
    tell.case(f"{command!r} in Kaldi's wav.scp", str(refusal.value).partition("wav.scp, ")[2])


@pytest.mark.parametrize("kind", ["url", "command", "memory", "pickle", "shar"])
def test_lhotse_sources_that_are_no_files_are_refused(world: World, tell: Teller, kind: str) -> None:
    text = world.listener.url if kind == "url" else f"touch {world.touched}"
    source = {"type": kind, "channels": [0], "source": text}
    recording = {"id": "r", "sources": [source], "sampling_rate": 16000, "num_samples": 16000, "duration": 1.0}
    (world.source / "recordings.jsonl").write_text(json.dumps(recording) + "\n")
    with pytest.raises(UserError) as refusal:
        list(open_source(str(world.source / "recordings.jsonl"), exclude="/nowhere", kind="lhotse").entries)
    tell.case(f"a source of the type {kind} in Lhotse's recordings", str(refusal.value).partition(".jsonl, ")[2])


@pytest.mark.parametrize("name", ["a.wav", "folder"])
def test_a_link_that_leads_to_itself_stops_no_build(world: World, tell: Teller, name: str) -> None:
    (world.source / name).symlink_to(name)
    found = build(world, world.source)
    assert found["good.wav"] is None
    assert found.get("a.wav", "unreadable") == "unreadable"
    tell.case(f"a link called {name} that leads to itself", found.get("a.wav") or "passed over")


# Bombs of their own


@pytest.mark.slow
def test_a_gigabyte_of_zeros_in_a_gzipped_tar_takes_no_gigabyte_of_memory(
    world: World, tell: Teller, tmp_path: Path
) -> None:
    file("a.tar.gz", zeros_in_gzip(1 << 29))(world.source, world)
    file("b.tar", many_members(100_000))(world.source, world)
    before = snapshot(world.source)
    done = run(world, "corpus", "build", f"x={world.source}", "--to", tmp_path / "root")
    assert done.status == 0, done.err
    tell.figure("peak_bytes", done.peak_bytes)
    assert done.peak_bytes < 1_000_000_000
    assert done.wall_s < 120
    assert snapshot(world.source) == before
    tell.case(
        "a gigabyte of zeros in a gzipped tar, a tar of 100,000 members",
        f"not-audio, in {done.peak_bytes >> 20:,} MiB and {done.wall_s:.0f} s",
    )
    wanted = {"zeros": "not-audio", "wave": None, "good": None}
    assert {row["member"]: row["error"] for row in rows_of(tmp_path / "root") if row["member"]} == {
        f"{name}.wav": error for name, error in wanted.items()
    }


@pytest.mark.timeout(900)
@pytest.mark.slow
def test_a_tar_of_a_million_members_is_listed_in_bounded_memory_and_time(
    world: World, tell: Teller, tmp_path: Path
) -> None:
    thousand = gzip.compress(tarfile.TarInfo("x.bin").tobuf(tarfile.USTAR_FORMAT) * 1_000)
    (world.source / "a.tar.gz").write_bytes(thousand * 1_000 + gzip.compress(many_members(0)))
    done = run(world, "corpus", "build", f"x={world.source}", "--to", tmp_path / "root", timeout=800)
    assert done.status == 0, done.err
    assert done.peak_bytes < 1_000_000_000
    tell.figure("peak_bytes", done.peak_bytes)
    assert {row["member"]: row["error"] for row in rows_of(tmp_path / "root") if row["member"]} == {"good.wav": None}
    tell.case("a tar of a million members", f"listed in {done.peak_bytes >> 20:,} MiB and {done.wall_s:.0f} s")


def test_a_member_too_large_for_memory_is_refused_before_it_is_read(tell: Teller, tmp_path: Path) -> None:
    header = tarfile.TarInfo("a.wav")
    header.size = 3 << 30
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(header.tobuf() + bytes(1 << 20)))
    started = time.monotonic()
    with pytest.raises(AudioError) as refusal:
        Opener().open(Place(source_root=str(tmp_path), path="a.tar.gz", member="a.wav", size_bytes=3 << 30))
    assert refusal.value.kind == "too-large"
    assert time.monotonic() - started < 5
    tell.case("a member of 3 GiB in a gzipped tar", refusal.value.kind)


# Recipes


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
def test_a_recipe_with_tags_bombs_or_urls_is_refused_and_nothing_is_made_of_it(
    world: World, tell: Teller, text: str
) -> None:
    recipe = world.folder / "desk" / "recipe.yaml"
    recipe.write_text(text.replace("TOUCHED", str(world.touched)).replace("URL", world.listener.url))
    with pytest.raises(UserError) as refusal:
        open_source(load_recipe(str(recipe)).corpus.sources[0].path, exclude="/nowhere")
    tell.case(f"the recipe {text.splitlines()[0][:70]!r}", str(refusal.value).rpartition("recipe.yaml")[2])


# Ids and names of streams

STRANGE_NAMES = [
    *("../../x", "/etc/passwd", "..", ".", "a/../../b", "%2e%2e", "x" * 300, "*", "A", "\x1b[31mx", "\u202ex", "<b>x"),
    *("a b", "a;touch x", "$(touch x)", "a\nb", "@SUM(1)", "con:x", "é"),
]
STRANGE_IDS = ["../../x", "/etc/passwd", "..", "a/../../b", "%2e%2e", "\x1b[31mx", "x" * 10_000, "", "*", "a\0b"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["decode", "inspect", "streams"])
def test_ids_and_names_that_are_paths_are_refused_and_nothing_is_written(
    world: World, tell: Teller, finished_root: Path, name: str
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
    tell.case(f"{value!r} for an id or a stream to {name}", done.err.strip().rpartition("Error: ")[2])


USES = {
    "a stream's name": "tokenize {root} --engine inline --stream NAME=mfcc-kmeans",
    "a fitted codebook's name": "codebook fit {root} mfcc-kmeans --size 4 --name NAME",
    "an imported codebook's name": "codebook import {root} {centroids} mfcc-kmeans --name NAME",
    "a codebook to use": "tokenize {root} --engine inline --stream x=mfcc-kmeans:NAME",
    "a view's name": "export {root} --view NAME",
    "a pin's name": "pin {root} NAME",
    "a pin to drop": "unpin {root} NAME",
    "a tokenizer": "codebook fit {root} NAME",
    "a class of errors": "quarantine {root} --class NAME",
    "a stream of phones": "phones {root} --stream NAME",
}


@pytest.mark.parametrize("use", USES)
def test_names_that_are_paths_or_steer_terminals_are_refused_and_nothing_is_written(
    world: World,
    tell: Teller,
    in_process: Callable[..., subprocess.CompletedProcess[str]],
    finished_root: Path,
    copy_root: Callable[[Path], Path],
    use: str,
) -> None:
    root, centroids = copy_root(finished_root), world.folder / "desk" / "centroids.npy"
    np.save(centroids, np.random.default_rng(0).normal(size=(4, 39)).astype(np.float32))
    before = snapshot(world.folder), set(snapshot(root))
    for name in STRANGE_NAMES:
        words = [word.format(root=root, centroids=centroids) for word in USES[use].split()]
        done = in_process(*(word.replace("NAME", name) for word in words))
        assert done.returncode == 2, (name, done.stdout, done.stderr)
        assert "Traceback" not in done.stderr
        assert control_characters(done.stdout + done.stderr) == set()
        assert (snapshot(world.folder), set(snapshot(root))) == before
    tell.case(f"{len(STRANGE_NAMES)} paths, escapes, marks, formulas as {use}", done.stderr.strip()[len("Error: ") :])


def test_sources_may_have_any_name_and_it_is_only_a_name(
    world: World, tell: Teller, in_process: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    root = tmp_path / "root"
    before = snapshot(world.folder)
    names = ["..", "<b>", "\x1b[31mred", "\u202egnp", "%2e%2e%2f", "$(touch x)", "@SUM(1)"]
    for name in names:
        done = in_process("corpus", "build", f"{name}={world.source}", "--to", root)
        assert done.returncode == 0, done.stderr
        assert control_characters(done.stdout + done.stderr) == set()
    for command in (("corpus", "show", root), ("corpus", "show", root, "--json"), ("inspect", root)):
        done = in_process(*command)
        assert done.returncode == 0, done.stderr
        assert control_characters(done.stdout + done.stderr) == set()
    assert {row["source"] for row in rows_of(root)} == set(names)
    assert snapshot(world.folder) == before
    tell.case(f"{len(names)} paths, escapes, marks, formulas as a source's name", "the name, printed harmlessly")


def test_library_calls_refuse_strange_ids_too(tell: Teller, finished_root: Path, tmp_path: Path) -> None:
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
                    folder=str(tmp_path / "out"),
                )
            )
    assert not (tmp_path / "out").exists() or os.listdir(tmp_path / "out") == []
    tell.case(f"{len(STRANGE_IDS)} paths, escapes, patterns as ids, to the library", "a sentence")
