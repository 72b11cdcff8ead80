"""Two runs at a time in an object store: on one stream one of them ends with a sentence; on two streams both complete.

Where creation is atomic, commits keep the two apart. Where it is not, the second is refused before it begins.
"""

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from killing import committed, failpoints_env, finish, require_whole, require_whole_at_every_version, state_of
from object_store import Swift
from places import EAGER, Small, small_in_store
from tally import tally
from wavemill.storage.root import Root
from zygote import Driver, zygote

SOUND = {"wavemill.storage.drivers.RACERS": 8}  # as it is: so many find out that a store is not sound
GONE_S = 20.0  # a driver that has been silent for so long counts as gone

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def in_store(samples: Path, fitted_root: Path, tmp_path_factory: pytest.TempPathFactory, swift: Swift) -> Small:
    with swift.environment():
        return small_in_store(samples, fitted_root, tmp_path_factory.mktemp("small"), swift)


@pytest.fixture
def racing(swift: Swift) -> Iterator[Swift]:
    """The store without atomic creation, as the one that all find."""
    swift.clear()
    with swift.environment(AWS_ENDPOINT_URL=swift.racing_endpoint):
        yield swift


def tokenizing(root: Root, *options: str, failpoints: str = "") -> Driver:
    usual = ("--engine", "inline", "--max-error-share", "1", "--json")
    return zygote().start("tokenize", root.uri, *usual, *options, env=failpoints_env(failpoints), **{**EAGER, **SOUND})


def wait_for(driver: Driver, root: Root, *, commits: int) -> None:
    """Until a driver has made so many commits of its first stream."""
    until = time.monotonic() + 90
    while len(root.list("streams/semantic/_delta_log")) < 2 + commits:  # the table's creation and the fence
        assert driver.poll() is None, driver.communicate()
        assert time.monotonic() < until, "no commit in a minute and a half"
        time.sleep(0.1)


def require_undisturbed(root: Root, small: Small) -> None:
    found = small.here(root.uri)
    assert committed(found.uri) == small.streams
    require_whole(found)
    require_whole_at_every_version(found)


def test_a_run_that_another_overtakes_says_so_and_changes_nothing(in_store: Small, on_swift: Swift) -> None:
    root = in_store.root()
    first = tokenizing(root, failpoints="receipt-received=stop@2")
    wait_for(first, root, commits=1)
    while state_of(first.pid) != "T":
        time.sleep(0.05)
    status, _, said = finish(tokenizing(root))
    assert status == 0, said
    before = in_store.here(root.uri)
    os.kill(first.pid, signal.SIGCONT)
    status, _, said = finish(first)
    assert status == 1
    assert "was taken over by another run that started after this one" in said
    assert "Nothing is lost: run the command again when the other has ended." in said
    assert committed(in_store.here(root.uri).uri) == committed(before.uri)
    require_undisturbed(root, in_store)
    tally("drivers", runs=2, refused=1)


def test_runs_on_two_streams_of_one_dataset_both_complete(in_store: Small, on_swift: Swift) -> None:
    root = in_store.root()
    drivers = [tokenizing(root, "--stream", made) for made in ("semantic=mfcc-kmeans", "acoustic=mel-rvq")]
    for driver in drivers:
        status, _, said = finish(driver)
        assert status == 0, said
        assert "Warning" not in said
    require_undisturbed(root, in_store)
    tally("drivers", runs=2)


def test_where_creation_is_not_atomic_a_second_run_is_refused_and_the_first_completes(
    in_store: Small, racing: Swift
) -> None:
    root = in_store.root()
    first = tokenizing(root, failpoints="receipt-received=sleep:25@2")
    wait_for(first, root, commits=1)
    status, _, said = finish(tokenizing(root))
    assert status == 1
    assert f"process {first.pid}) writes to streams/semantic, streams/acoustic in {root}" in said
    assert "conditional creation is not atomic there" in said
    assert "Nothing was changed. Run the command again when that run has ended." in said
    status, _, said = finish(first)
    assert status == 0, said
    assert f"Warning: {root} lies in a store that cannot keep two runs apart" in said
    assert root.list("tmp/drivers") == []
    require_undisturbed(root, in_store)
    tally("drivers", runs=2, refused=1)


def test_where_creation_is_not_atomic_runs_on_two_streams_both_complete(in_store: Small, racing: Swift) -> None:
    root = in_store.root()
    drivers = [tokenizing(root, "--stream", made) for made in ("semantic=mfcc-kmeans", "acoustic=mel-rvq")]
    for driver in drivers:
        status, _, said = finish(driver)
        assert status == 0, said
    require_undisturbed(root, in_store)
    tally("drivers", runs=2)


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGSTOP])
def test_where_creation_is_not_atomic_a_silent_run_is_waited_for_and_then_taken_over(
    end: signal.Signals, in_store: Small, racing: Swift
) -> None:
    root = in_store.root()
    first = tokenizing(root, failpoints="before-commit=sleep:2@3")
    wait_for(first, root, commits=1)
    os.kill(first.pid, end)
    started = time.monotonic()
    status, _, said = finish(tokenizing(root))
    assert status == 0, said
    assert time.monotonic() - started > GONE_S
    if end == signal.SIGSTOP:  # as on a computer that slept: it goes on, and finds that it was taken over
        os.kill(first.pid, signal.SIGCONT)
        status, _, said = finish(first)
        assert status == 1, said
        assert "was taken over by another run" in said
    require_undisturbed(root, in_store)
    tally("drivers", runs=2, refused=int(end == signal.SIGSTOP))
