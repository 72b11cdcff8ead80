"""Every failpoint x {killed, failing, standing still while another run does the work} x {disk, object store}.

After each the same command is given again: nothing lost, nothing twice, the same bytes, every version whole.
"""

import os
import signal
import sys
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
from _pytest.mark import ParameterSet

sys.path.insert(0, str(Path(__file__).parent))
from killing import (
    committed,
    failpoints_env,
    finish,
    require_whole,
    require_whole_at_every_version,
    state_of,
    table_content,
)
from object_store import Swift, require_swift
from places import EAGER, RECORDINGS, SHARD_HOURS, Small, small_in_store, small_on_disk
from tally import tally
from wavemill.jobs.cli import BUG
from wavemill.storage.codes import CORPUS, open_corpus
from wavemill.storage.pins import list_pins, read_pin
from wavemill.storage.root import Root
from wavemill.tokenizers.codebook import Codebook
from zygote import Driver, zygote

PLACES = ("disk", "store")
ACTIONS = ("kill", "raise", "stop")
TOKENIZE = [
    "before-create",
    "after-create",
    "before-create@2",
    "before-fence",
    "after-fence",
    "after-fence@2",
    "shard-before-write",
    "shard-before-write@4",
    "before-replace@2",  # a temporary file lies beside its place
    "shard-written",
    "shard-written@3",
    "receipt-received",
    "receipt-sent",
    "before-look@2",
    "before-look@5",  # the read-back: before it, after it
    "before-commit",
    "before-commit-acoustic",  # between the commits of two streams
    "before-commit@4",
    "after-commit",
    "after-commit@2",
    "after-commit@6",
]
BUILD = [
    "before-create",
    "after-create",
    "before-fence",
    "after-fence",
    "shard-before-write@2",
    "before-replace@2",
    "shard-written@2",
    "before-commit@2",
    "after-commit",
    "after-commit@3",
]
USUAL = frozenset(
    {
        ("disk", "before-commit-acoustic", "raise"),
        ("disk", "after-commit@2", "stop"),
        ("disk", "shard-written@3", "kill"),
        ("store", "after-fence@2", "kill"),
    }
)


FILES = ["before-write", "before-replace", "after-write"]
IN_STORE = {  # fewer, since each costs a thousand requests; a temporary file beside its place there is on disks only
    *("before-create", "after-create", "before-fence", "after-fence", "after-fence@2"),
    *("shard-before-write@4", "shard-written@3", "receipt-received", "before-look@5", "before-commit-acoustic"),
    *("before-commit@4", "after-commit@2", "shard-written@2", "before-commit@2", "before-write", "after-write"),
}


def cells(failpoints: list[str], *, usual: frozenset[tuple[str, str, str]] = frozenset()) -> list[ParameterSet]:
    """Every place x failpoint x action, the unusual ones marked slow."""
    return [
        pytest.param(*cell, marks=() if cell in usual else pytest.mark.slow)
        for cell in product(PLACES, failpoints, ACTIONS)
        if cell[0] == "disk" or cell[1] in IN_STORE
    ]


@pytest.fixture(scope="module")
def on_disk(samples: Path, fitted_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Small:
    return small_on_disk(samples, fitted_root, tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def in_store(samples: Path, fitted_root: Path, tmp_path_factory: pytest.TempPathFactory, swift: Swift) -> Small:
    with swift.environment():
        return small_in_store(samples, fitted_root, tmp_path_factory.mktemp("small"), swift)


@pytest.fixture
def small(place: str, request: pytest.FixtureRequest) -> Small:
    if place == "store":
        require_swift()
        request.getfixturevalue("on_swift")
    tally("matrix", tried=1)
    return request.getfixturevalue("on_disk" if place == "disk" else "in_store")


def tokenizing(root: Root, failpoints: str = "") -> Driver:
    options = ("--engine", "inline", "--max-error-share", "1", "--json")
    return zygote().start("tokenize", root.uri, *options, env=failpoints_env(failpoints), **EAGER)


def building(root: Root, small: Small, failpoints: str = "") -> Driver:
    arguments = ("corpus", "build", f"speech={small.sources}", "--to", root.uri, "--shard-hours", str(SHARD_HOURS))
    return zygote().start(*arguments, env=failpoints_env(failpoints), **EAGER)


def disturb(start: Callable[[str], Driver], failpoint: str, action: str, *, overtaking: int = 0) -> None:
    """Run until the failpoint has done its work; one that stands still goes on when another run has done it all.

    `overtaking` is the exit status of that other one.
    """
    name, _, hit = failpoint.partition("@")
    driver = start(f"{name}={action}@{hit or 1}")
    if action == "stop":
        until = time.monotonic() + 60
        while state_of(driver.pid) != "T":
            assert driver.poll() is None, f"{failpoint} was not reached: {driver.communicate()}"
            assert time.monotonic() < until, f"{failpoint} was not reached in a minute"
            time.sleep(0.02)
        status, _, said = finish(start(""))
        assert status == overtaking, said
        os.kill(driver.pid, signal.SIGCONT)
    status, _, said = finish(driver)
    if action == "kill":
        assert status == -signal.SIGKILL, said
    elif action == "raise":
        assert status == BUG, said
        assert f"FailpointError: {name}" in said
    else:  # it was overtaken: it says so, or had nothing left to do
        assert status in (0, 1, 2), said
        assert "bug in wavemill" not in said
    assert "Traceback" not in said


@pytest.mark.parametrize(("place", "failpoint", "action"), cells(TOKENIZE, usual=USUAL))
def test_a_run_disturbed_anywhere_is_finished_by_the_same_command(
    place: str, failpoint: str, action: str, small: Small
) -> None:
    root = small.root()
    disturb(lambda failpoints: tokenizing(root, failpoints), failpoint, action)
    require_whole_at_every_version(small.here(root.uri))
    status, _, said = finish(tokenizing(root))
    assert status == 0, said
    found = small.here(root.uri)
    assert committed(found.uri) == small.streams
    require_whole(found)
    versions = require_whole_at_every_version(found)
    tally("matrix", cells=1, versions=versions, **{f"cells_{place}": 1})


@pytest.mark.parametrize(
    ("place", "failpoint", "action"), cells(BUILD, usual=frozenset({("disk", "before-commit@2", "kill")}))
)
def test_a_build_disturbed_anywhere_is_finished_by_the_same_command(
    place: str, failpoint: str, action: str, small: Small
) -> None:
    root = Root(small.fresh())
    disturb(lambda failpoints: building(root, small, failpoints), failpoint, action)
    require_whole_at_every_version(small.here(root.uri))
    status, _, said = finish(building(root, small))
    assert status == 0, said
    found = small.here(root.uri)
    assert table_content(found, CORPUS) == small.corpus
    versions = require_whole_at_every_version(found)
    tally("matrix", cells=1, versions=versions, **{f"cells_{place}": 1})


@pytest.mark.slow
@pytest.mark.parametrize("action", ["kill", "raise", "sleep:1000"])
@pytest.mark.parametrize("place", PLACES)
def test_a_decoder_that_dies_or_sleeps_past_its_deadline_once_costs_no_recording(
    place: str, action: str, small: Small, tmp_path: Path
) -> None:
    root, once = small.root(), tmp_path / "once"
    failpoints = failpoints_env(f"decoder-{RECORDINGS[1]}={action}", once)
    options = ("--engine", "inline", "--max-error-share", "1", "--deadline", "2s")
    status, _, said = finish(zygote().start("tokenize", root.uri, *options, env=failpoints, **EAGER))
    assert status == 0, said
    assert [flag.name for flag in once.iterdir()] == [f"decoder-{RECORDINGS[1]}"]
    assert committed(root.uri) == small.streams
    tally("matrix", cells=1, **{f"cells_{place}": 1})


@pytest.mark.parametrize(("place", "failpoint", "action"), cells(FILES))
def test_a_codebook_is_whole_or_not_there_wherever_its_fit_is_disturbed(
    place: str, failpoint: str, action: str, small: Small
) -> None:
    root, relative = small.root(), "codebooks/second.safetensors"

    def fitting(failpoints: str = "") -> Driver:
        options = ("--name", "second", "--size", "8", "--budget", "1MB", "--replace")
        return zygote().start("codebook", "fit", root.uri, "mfcc-kmeans", *options, env=failpoints_env(failpoints))

    # three shards' frames, index and report come first; and a store is tried with an object of no bytes
    disturb(fitting, f"{failpoint}@{9 + 1 + (place == 'store')}", action)
    found = root.read_bytes(relative) if root.exists(relative) else None
    status, _, said = finish(fitting())
    assert status == 0, said
    written = root.read_bytes(relative)
    Codebook.from_bytes(written, name="second")
    assert found in (None, written)
    assert (found is None) == (failpoint != "after-write" and action != "stop")
    tally("matrix", cells=1, **{f"cells_{place}": 1})


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("hit", [1, 2, 3, 5])
def test_a_fit_disturbed_while_it_samples_is_finished_by_the_same_command(
    hit: int, action: str, on_disk: Small
) -> None:
    """One that stands still goes on when another has ended and removed the sample: neither may leave a torn one."""
    tally("matrix", tried=1)
    root = on_disk.root()

    def fitting(failpoints: str = "") -> Driver:
        options = ("--name", f"n{time.monotonic_ns()}", "--size", "8", "--budget", "1MB")
        return zygote().start("codebook", "fit", root.uri, "mfcc-kmeans", *options, env=failpoints_env(failpoints))

    disturb(fitting, f"after-write@{hit}", action)
    status, _, said = finish(fitting())
    assert status == 0, said
    fitted = {root.read_bytes(f"codebooks/{name}") for name in root.list("codebooks") if name.startswith("n")}
    assert len({Codebook.from_bytes(content, name="n").sha256 for content in fitted}) == 1
    assert not root.list("tmp")
    tally("matrix", cells=1, cells_disk=1)


@pytest.mark.parametrize(("place", "failpoint", "action"), cells(FILES))
def test_a_pin_is_whole_or_not_there_wherever_it_is_disturbed(
    place: str, failpoint: str, action: str, small: Small
) -> None:
    root = small.root()

    def pinning(failpoints: str = "") -> Driver:
        return zygote().start("pin", root.uri, "base", env=failpoints_env(failpoints))

    disturb(pinning, failpoint, action, overtaking=2 if failpoint == "after-write" else 0)
    there = failpoint == "after-write" or action == "stop"
    assert list_pins(root) == (["base"] if there else [])
    status, _, said = finish(pinning())
    assert status == (2 if there else 0), said
    assert read_pin(root, "base")[CORPUS].table_id == open_corpus(root).table_id
    tally("matrix", cells=1, **{f"cells_{place}": 1})
