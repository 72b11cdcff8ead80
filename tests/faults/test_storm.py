"""Random kill -9 over many jobs in an object store that fails now and then: three drivers on a dataset at a time.

Each job tokenizes one corpus into three streams, a driver for each. Each driver is killed at a random time, or the
decoder that it started is, and the same command is given again, until it is done all the same.
"""

import os
import random
import re
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from killing import descendants, differences, finish, require_whole, require_whole_at_every_version
from object_store import Do, Fault, Swift
from places import EAGER, Small, small_in_store
from tally import tally
from wavemill.storage.root import Root
from zygote import Driver, zygote

STREAMS = {"semantic": "mfcc-kmeans", "acoustic": "mel-rvq", "units": "mfcc-kmeans"}
FAULTS: tuple[Do, ...] = ("503", "lose", "reset", "slow", "cut")
FAULTY_SHARE = 0.08  # of the answers
KILLS, JOBS, PARTS = 300, 20, 4  # parts: tests of their own, which may run at a time
# what a run says that the store has failed for too long, or whose decoders were killed before they were there
AGAIN = re.compile(r"the same command again|then run again|The decoder process does not start")
DECODER_SHARE = 0.15  # of the kills


@pytest.fixture(scope="module")
def in_store(samples: Path, fitted_root: Path, tmp_path_factory: pytest.TempPathFactory, swift: Swift) -> Small:
    recordings = sorted(path.name for path in (samples / "speech").glob("*.flac"))[::2]
    with swift.environment():
        return small_in_store(samples, fitted_root, tmp_path_factory.mktemp("small"), swift, recordings=recordings)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("part", range(PARTS))
def test_a_storm_of_kills_on_a_faulty_store_loses_nothing_and_doubles_nothing(
    part: int, in_store: Small, on_swift: Swift
) -> None:
    kills, jobs = KILLS // PARTS, JOBS // PARTS
    seed = int(os.environ.get("WAVEMILL_STORM_SEED", time.time_ns() % 10**6)) + part
    print(f"\nseed {seed} (WAVEMILL_STORM_SEED={seed - part} repeats it)")
    generator = random.Random(seed)
    expected = {name: in_store.streams[name if name != "units" else "semantic"] for name in STREAMS}
    killed = done = 0
    longest_s = undisturbed_s(in_store) / 3
    while killed < kills or done < jobs:
        root = in_store.root()
        on_swift.clear()
        on_swift.set_faults(*faults(generator))
        deaths = storm(root, generator, most_kills=-(-kills // jobs), longest_s=longest_s)
        run_to_end(root)
        requests = on_swift.requests()
        on_swift.clear()
        here = in_store.here(root.uri)
        found = differences(here, expected)
        versions = require_whole_at_every_version(here)
        faulty = sum(request.fault != "" for request in requests)
        tally("storm", kills=deaths, jobs=1, faulty=faulty, answers=len(requests), versions=versions, **found)
        assert found == {"lost": 0, "doubled": 0, "different": 0}, f"seed {seed}"
        require_whole(here)
        killed, done = killed + deaths, done + 1
        print(f"job {done}: {deaths} kills, {faulty} of {len(requests)} answers faulty, {versions} versions whole")


def faults(generator: random.Random) -> list[Fault]:
    """Some answers go wrong, in each way as often."""
    found = []
    for number, do in enumerate(FAULTS):
        share = FAULTY_SHARE / len(FAULTS) / (1 - FAULTY_SHARE * number / len(FAULTS))  # of those the others leave
        found.append(Fault(do=do, share=share, seconds=0.3, seed=generator.randrange(10**6)))
    return found


def undisturbed_s(small: Small) -> float:
    """How long three drivers take whom nobody disturbs."""
    root, started = small.root(), time.monotonic()
    for driver in [tokenizing(root, name) for name in STREAMS]:
        status, _, said = finish(driver)
        assert status == 0, said
    return time.monotonic() - started


def storm(root: Root, generator: random.Random, *, most_kills: int, longest_s: float) -> int:
    """Kill each driver at a random time and start it again, until it is done all the same; how many were killed."""

    def living(name: str) -> tuple[Driver, float]:
        return tokenizing(root, name), time.monotonic() + generator.uniform(0.0, longest_s)

    drivers = {name: living(name) for name in STREAMS}
    killed = 0
    while drivers and killed < most_kills:
        time.sleep(0.02)
        for name, (driver, dies_s) in list(drivers.items()):
            status = driver.poll()
            if status == 0:
                del drivers[name]
            elif status is not None:
                said = driver.communicate()[1]
                assert status == -signal.SIGKILL or AGAIN.search(said), said
                drivers[name] = living(name)
            elif time.monotonic() >= dies_s:
                decoders = descendants(driver.pid) if generator.random() < DECODER_SHARE else set()
                with suppress(ProcessLookupError):  # it has just ended
                    os.kill(decoders.pop() if decoders else driver.pid, signal.SIGKILL)
                    killed += 1
                drivers[name] = driver, time.monotonic() + generator.uniform(0.2, longest_s)
    for driver, _ in drivers.values():
        driver.kill()
        driver.wait(60)
    return killed


def run_to_end(root: Root) -> None:
    """Run each stream, all at a time, as often as the store wants it."""
    drivers = {name: tokenizing(root, name) for name in STREAMS}
    while drivers:
        for name, driver in list(drivers.items()):
            status, _, said = finish(driver, timeout=240)
            if status == 0:
                del drivers[name]
            else:
                assert AGAIN.search(said), said
                drivers[name] = tokenizing(root, name)


def tokenizing(root: Root, stream: str) -> Driver:
    made_with = f"{stream}={STREAMS[stream]}"
    options = ("--stream", made_with, "--engine", "inline", "--max-error-share", "1", "--json")
    return zygote().start("tokenize", root.uri, *options, **EAGER)
