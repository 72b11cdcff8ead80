"""What changes under a job: recordings, the code it runs, who else is at work in the dataset."""

import io
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

sys.path.insert(0, str(Path(__file__).parent))
from killing import (
    committed,
    failpoints_env,
    finish,
    require_whole_at_every_version,
    state_of,
    table_files,
    tokenize_process,
)
from object_store import Swift, require_swift
from places import EAGER, SHARD_HOURS, prepare
from tally import tally
from wavemill.pipelines.ahead import DecodeAhead
from wavemill.pipelines.reading import Reader, Row
from wavemill.storage.codes import CORPUS, open_corpus, open_stream, read_codes
from wavemill.storage.parquet import read_parquet
from wavemill.storage.root import Root
from wavemill.storage.schema import CORPUS_SCHEMA
from wavemill.storage.table import read_snapshot
from wavemill.storage.vacuum import vacuum
from wavemill.tokenizers.spec import Sound
from zygote import Driver, zygote

RUNS_BESIDE_VACUUM = 4
NAMES = [f"{number}.wav" for number in range(8)]
LENGTH = 35_200  # samples of each: two recordings fill a shard


def write(source: str, name: str, swift: Swift | None, *, seed: int, length: int = LENGTH) -> None:
    samples = 0.1 * np.random.default_rng(seed).standard_normal(length)
    content = io.BytesIO()
    soundfile.write(content, samples, 16_000, format="WAV")
    if swift is None:
        Path(source, name).write_bytes(content.getvalue())
    else:
        swift.put(f"{source}/{name}", content.getvalue())


def stopped(driver: Driver) -> None:
    """Wait until a driver stands still at its failpoint."""
    until = time.monotonic() + 90
    while state_of(driver.pid) != "T":
        assert driver.poll() is None, driver.communicate()
        assert time.monotonic() < until, "the failpoint was not reached"
        time.sleep(0.02)


def tokenizing(root: Path | str, failpoints: str = "", **settings: Any) -> Driver:
    options = ("--engine", "inline", "--max-error-share", "1", "--json")
    return zygote().start("tokenize", root, *options, env=failpoints_env(failpoints), **EAGER, **settings)


def outcomes(root: Root) -> dict[str, tuple[str | None, bytes]]:
    """By path, the error and the codes of the stream "semantic"."""
    corpus, stream = open_corpus(root), open_stream(root, "semantic")
    found = {}
    for shard in corpus.files:
        codes = read_codes(root, stream, shard)
        for place, row in enumerate(read_parquet(root, corpus.path(shard), schema=CORPUS_SCHEMA).to_pylist()):
            codes_KT = codes.codes(place)
            found[row["path"]] = codes.errors[place], b"" if codes_KT is None else codes_KT.tobytes()
    return found


@pytest.fixture
def store(place: str, request: pytest.FixtureRequest) -> Swift | None:
    if place == "disk":
        return None
    require_swift()
    return request.getfixturevalue("on_swift")


@pytest.mark.parametrize("place", ["disk", pytest.param("store", marks=pytest.mark.slow)])
def test_recordings_replaced_deleted_and_added_during_a_run_are_told_and_wait(
    place: str, store: Swift | None, fitted_root: Path, tmp_path: Path
) -> None:
    source, root = str(tmp_path / "source"), Root(tmp_path / "root")
    if store is None:
        Path(source).mkdir()
    else:
        source = f"s3://{store.bucket()}/source"
    for number, name in enumerate(NAMES):
        write(source, name, store, seed=number)
    prepare(source, fitted_root, root.uri)
    assert len(open_corpus(root).files) == 4
    shutil.copytree(root.uri, tmp_path / "before")
    assert finish(tokenizing(tmp_path / "before"))[0] == 0
    before = outcomes(Root(tmp_path / "before"))

    driver = tokenizing(root.uri, "receipt-received=stop@2")  # two shards are made
    stopped(driver)
    write(source, "0.wav", store, seed=100)  # made already
    write(source, "4.wav", store, seed=101)  # other sound of the same size
    write(source, "5.wav", store, seed=102, length=LENGTH + 7)
    write(source, "9.wav", store, seed=103)
    if store is None:
        Path(source, "6.wav").unlink()
    else:
        store.delete(f"{source}/6.wav")
    os.kill(driver.pid, signal.SIGCONT)
    status, _, said = finish(driver)
    assert status == 0, said
    found = outcomes(root)
    changed = {"4.wav": "changed", "5.wav": "changed", "6.wav": "missing"}
    assert {path: error for path, (error, _) in found.items() if error} == changed
    assert {path: found[path] for path in found if path not in changed} == {
        path: before[path] for path in before if path not in changed
    }

    build = ("corpus", "build", f"speech={source}", "--to", root.uri, "--shard-hours", str(SHARD_HOURS), "--json")
    status, told, said = finish(zygote().start(*build))
    assert status == 0, said
    assert (told["new"], told["replaced"]) == (2, 2)  # 9, and 5, which has another length and so another id
    status, _, said = finish(tokenizing(root.uri))
    assert status == 0, said
    after = outcomes(root)
    assert after["9.wav"][0] is None
    assert after["9.wav"][1]
    require_whole_at_every_version(root)
    tally("under", changed=2, missing=1, added=1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "settings"),
    [
        pytest.param("decoder", {"wavemill.pipelines.streams.DECODER_VERSION": "other"}, marks=pytest.mark.slow),
        pytest.param("resampler", {"wavemill.pipelines.streams.RESAMPLER_VERSION": "other"}, marks=pytest.mark.slow),
        ("codebook", {}),
    ],
)
def test_what_makes_the_codes_may_not_change_between_a_killed_run_and_the_next(
    part: str, settings: dict[str, Any], fitted_root: Path, finished_root: Path, copy_root: Callable[[Path], Path]
) -> None:
    root = copy_root(fitted_root)
    status, _, said = finish(tokenizing(root, "before-commit=kill@4"))
    assert status == -signal.SIGKILL, said
    before = committed(root)
    assert before["semantic"]
    if part == "codebook":
        fit = ("codebook", "fit", root, "mfcc-kmeans", "--seed", "1", "--size", "500", "--budget", "1MB", "--replace")
        assert finish(zygote().start(*fit))[0] == 0
    status, _, said = finish(tokenizing(root, **settings))
    assert status == 2
    assert f"({part} differs: " in said
    assert f"Give the new run another stream name, or restore the old {part}." in said
    assert committed(root) == before
    if part == "codebook":
        shutil.copytree(fitted_root / "codebooks", root / "codebooks", dirs_exist_ok=True)
    assert finish(tokenizing(root))[0] == 0
    assert committed(root) == committed(finished_root)
    tally("under", refused=1)


@pytest.mark.slow
def test_a_driver_that_is_forked_behaves_as_the_command_line_does(
    fitted_root: Path, finished_root: Path, copy_root: Callable[[Path], Path], tmp_path: Path
) -> None:
    """The zygote's children would prove little if they were not what people run."""

    def started(root: Path, failpoints: str = "") -> "subprocess.Popen[str]":
        return tokenize_process(root, "--engine", "inline", failpoints=failpoints)

    def forked(root: Path, failpoints: str = "") -> Driver:
        return zygote().start("tokenize", root, "--json", "--engine", "inline", env=failpoints_env(failpoints))

    told = []
    for start in (started, forked):
        root = copy_root(fitted_root)
        killed, again, done = finish(start(root, "before-commit=kill")), finish(start(root)), finish(start(root))
        refused = finish(start(tmp_path / "nothing"))
        assert committed(root) == committed(finished_root)
        figures = {name: again[1][name] for name in ("shards", "segments", "errors", "duration_s")}
        told.append((killed[0], again[0], figures, done[0], done[2].replace(str(root), "ROOT"), *refused))
    assert told[0] == told[1]
    assert told[0][0] == -signal.SIGKILL


@pytest.fixture
def leftovers(finished_root: Path, fitted_root: Path, copy_root: Callable[[Path], Path]) -> Path:
    """A root in whose streams lie, of a run killed hours ago, the very files that the next run will write."""
    root, hours_ago = copy_root(fitted_root), time.time() - 10_000
    for name, files in committed(finished_root).items():
        folder = root / "streams" / name
        folder.mkdir(parents=True)
        for file, content in files.items():
            (folder / file).write_bytes(content)
            os.utime(folder / file, (hours_ago, hours_ago))
    return root


@pytest.mark.slow
def test_a_vacuum_that_never_ends_removes_nothing_that_a_run_needs(
    leftovers: Path, finished_root: Path, tmp_path: Path
) -> None:
    """Old leftovers may go at any moment: also while a run writes the same file again and commits it."""
    generator = random.Random(0)
    passes = removed = 0
    for run in range(RUNS_BESIDE_VACUUM):
        root = tmp_path / f"run-{run}"
        shutil.copytree(leftovers, root)
        driver = tokenizing(root, f"shard-before-write=sleep:{generator.uniform(0.0, 0.05):.3f}")
        while driver.poll() is None:
            if (root / "streams" / "acoustic" / "_delta_log").exists():
                removed += len(vacuum(Root(root), older_than_h=2, dry_run=False))
                passes += 1
        status, _, said = finish(driver)
        assert status == 0, said
        folders = [root / "streams" / name for name in ("semantic", "acoustic")]
        named = [folder / file for folder in folders for file in table_files(Root(folder.parent), folder.name)]
        live = sum(not path.exists() for path in named)
        tally("vacuum", live=live)
        assert live == 0
        assert committed(root) == committed(finished_root)
        require_whole_at_every_version(Root(root))
    assert removed > 0
    print(f"\n{passes} passes removed {removed} leftovers beside {RUNS_BESIDE_VACUUM} runs")
    tally("vacuum", runs=RUNS_BESIDE_VACUUM, passes=passes, removed=removed)


def test_a_slow_consumer_bounds_what_is_decoded_ahead(fitted_root: Path) -> None:
    root = Root(fitted_root)
    corpus = open_corpus(root)
    rows: list[Row] = []
    for shard in corpus.files:
        rows += read_parquet(root, corpus.path(shard), schema=CORPUS_SCHEMA).to_pylist()
    longest = max(row["num_samples"] for row in rows if row["error"] is None and row["sample_rate"] == 16_000)
    budget = 3 * 4 * longest
    readers = [Reader(root) for _ in range(2)]
    ahead = DecodeAhead(rows, {Sound(16_000)}, readers, budget)
    taken, most_bytes = 0, 0
    for _, waveforms in ahead:
        time.sleep(0.005)  # longer than decoding takes
        most_bytes = max(most_bytes, ahead._held_bytes)
        taken += isinstance(waveforms, dict)
    for reader in readers:
        reader.close()
    assert taken > 20
    assert 4 * longest <= most_bytes <= budget
    tally("buffers", most_percent=100 * most_bytes / budget)


@pytest.mark.slow
def test_ten_hours_and_ten_thousand_snippets_make_shards_of_one_size_each_time(tmp_path: Path) -> None:
    """No shard is a straggler, and a window at the far end is read as fast as one at the beginning."""
    source, hours, rate = tmp_path / "source", 10, 8_000
    (source / "tiny").mkdir(parents=True)
    with soundfile.SoundFile(source / "long.flac", "w", rate, 1, subtype="PCM_16") as file:
        minute = (1_000 * np.random.default_rng(0).standard_normal(60 * rate)).astype(np.int16)
        for _ in range(hours * 60):
            file.write(minute)
    snippet = (1_000 * np.random.default_rng(1).standard_normal(400)).astype(np.int16)  # 50 ms
    for number in range(10_000):
        soundfile.write(source / "tiny" / f"{number:05d}.wav", snippet, rate)
    plans = []
    for name in ("one", "two"):
        build = ("corpus", "build", f"x={source}", "--to", tmp_path / name, "--window", "30s", "--shard-hours", "0.5")
        status, _, said = finish(zygote().start(*build, "--max-expansion", "100000"), timeout=400)
        assert status == 0, said
        root = Root(tmp_path / name)
        snapshot = read_snapshot(root, CORPUS)
        assert snapshot is not None
        plans.append(
            {shard: read_parquet(root, snapshot.path(shard), schema=CORPUS_SCHEMA) for shard in snapshot.files}
        )
    assert plans[0] == plans[1]
    durations = [sum(shard["duration_s"].to_pylist()) for shard in plans[0].values()]
    assert sum(shard.num_rows for shard in plans[0].values()) == 10_000 + hours * 3600 // 30
    assert max(durations) <= 0.5 * 3600 + 30
    assert max(shard.num_rows for shard in plans[0].values()) <= 20_000
    windows = [row for shard in plans[0].values() for row in shard.to_pylist() if row["path"] == "long.flac"]
    assert [row["start_sample"] for row in windows] == list(range(0, hours * 3600 * rate, 30 * rate))
    with Reader(Root(tmp_path / "one")) as reader:
        list(reader.read(windows[:1], [Sound(16_000)]))  # the decoder starts
        took = []
        for row in (windows[1], windows[-1]):
            started = time.monotonic()
            [waveforms] = reader.read([row], [Sound(16_000)])
            assert isinstance(waveforms, dict)
            took.append(time.monotonic() - started)
    assert took[1] < took[0] + 2, f"the first window took {took[0]:.2f} s, the last {took[1]:.2f} s"
    tally("straggler", files=10_001, most_shard_s=max(durations), shards=len(durations))
