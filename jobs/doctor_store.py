"""Whether an object store can hold a dataset: tried out below the root's prefix, in a place that is removed again."""

import os
import time
import uuid
from collections.abc import Callable

from ..storage.drivers import RACERS, race_creation
from ..storage.root import Root
from ..storage.stores import StoreTrouble, creation_is_known_atomic, where
from ..tokenizers.spec import UserError
from .checks import Check

_ROUNDS = 20
_PART_BYTES = 5 << 20  # the least that S3 takes for a part
_MAX_SKEW_S = 5.0


def check_store(root: Root, check_table: Callable[[Root], Check]) -> list[Check]:
    """Checks of a store: what a run needs of it, in the order in which it would need them."""
    try:
        root.require_writable()
    except (UserError, StoreTrouble) as error:
        return [Check("root", "fail", str(error), "See that the bucket is there and that its credentials may write.")]
    trial = root.below(f"tmp/doctor-{uuid.uuid4().hex}")
    checks = [Check("root", "ok", f"{root} can be written ({where(root.uri)})")]
    steps = (check_overwrite, check_listing, check_ranges, check_parts, check_creation, check_table, check_clock)
    try:
        for step in steps:
            if step is check_table and checks[-1].status != "ok":
                continue  # whose creation may be won by several
            checks.append(step(trial))
    except StoreTrouble as error:
        checks.append(Check("root's store", "fail", str(error), "See what the store logs of these requests."))
    finally:
        trial.remove_tree()
    return checks


def check_overwrite(root: Root) -> Check:
    """Who reads behind a write gets what was written, also over something older."""
    stale = 0
    for number in range(_ROUNDS):
        root.write_bytes("replaced", bytes([number]))
        stale += root.read_bytes("replaced") != bytes([number])
    if stale:
        told = f"{stale} of {_ROUNDS} reads behind a write gave something older"
        return Check("root's reads", "fail", told, "Use a store with strong consistency.")
    return Check("root's reads", "ok", "each read behind a write gave what was written")


def check_listing(root: Root) -> Check:
    """What was written is listed at once, and what was removed no longer."""
    wrong = 0
    for number in range(_ROUNDS):
        root.write_bytes(f"listed/{number}", b"")
        wrong += str(number) not in root.list("listed")
    for number in range(_ROUNDS):
        root.remove(f"listed/{number}")
        wrong += str(number) in root.list("listed")
    if wrong:
        told = f"{wrong} of {2 * _ROUNDS} listings were behind the writes before them"
        return Check("root's listings", "fail", told, "Use a store with strong consistency.")
    return Check("root's listings", "ok", "each showed what was written and removed before it")


def check_ranges(root: Root) -> Check:
    """Parts of an object can be read for themselves: so trainers read single codebooks."""
    content = os.urandom(1 << 18)
    root.write_bytes("ranges", content)
    ranges = [(0, 4), (100_000, 100_100), (len(content) - 8, len(content))]
    if root.read_ranges("ranges", ranges) != [content[begin:end] for begin, end in ranges]:
        return Check(
            "root's ranges", "fail", "ranged reads give other bytes", "Use a store that answers Range headers."
        )
    return Check("root's ranges", "ok", f"{len(ranges)} ranges of an object read for themselves")


def check_parts(root: Root) -> Check:
    """Large objects are written in parts."""
    content = os.urandom(2 * _PART_BYTES + 1)
    started = time.perf_counter()
    root.write_bytes("parts", content, part_bytes=_PART_BYTES)
    written = time.perf_counter()
    same = root.read_bytes("parts") == content
    read = time.perf_counter()
    if not same:
        return Check("root's parts", "fail", "an object written in parts reads differently", "See the store's log.")
    rates = (f"{len(content) / 1e6 / seconds:,.0f} MB/s" for seconds in (written - started, read - written))
    return Check(
        "root's parts", "ok", f"{len(content) / 1e6:.0f} MB in 3 parts: written at {next(rates)}, read at {next(rates)}"
    )


def check_creation(root: Root) -> Check:
    """Of several who create one object at once, exactly one wins: table commits rest on this."""
    winners = race_creation(root, rounds=_ROUNDS)
    if winners == 1:
        return Check("root's commits", "ok", f"put-if-absent holds: one of {RACERS} won each of {_ROUNDS} races")
    told = f"conditional creation is not atomic: of {RACERS} who created one object at once, up to {winners} won"
    if creation_is_known_atomic(root.uri):
        return Check("root's commits", "fail", told, "This store should do better: report it to its makers.")
    advice = (
        "Let one run at a time write to a dataset here; wavemill warns, and refuses a second one while it sees a first."
    )
    return Check("root's commits", "warn", told, advice)


def check_clock(root: Root) -> Check:
    """Whether the store's clock is this machine's."""
    before = time.time()
    root.write_bytes("clock", b"")
    skew_s = root.modified("clock") - before
    if abs(skew_s) > _MAX_SKEW_S:
        advice = "Set both clocks (NTP): signatures count time, and the age of files decides what vacuum may remove."
        return Check("root's clock", "warn", f"{skew_s:+.0f} s from this machine's", advice)
    return Check("root's clock", "ok", "the same as this machine's")
