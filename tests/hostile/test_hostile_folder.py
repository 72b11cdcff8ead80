"""A folder full of hostile files: one build, one run, and for each file what had to become of it."""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import STREAMS
from hostile_containers import CONTAINERS
from hostile_files import FILES
from hostile_names import NAMES_AND_KINDS
from hostile_runs import Row, Run, rows_of, run
from hostile_teller import Teller
from hostile_tools import (
    CANARY_RATE,
    MARKER,
    Offer,
    OpenWatch,
    World,
    control_characters,
    offers_by_folder,
    pickled,
    snapshot,
    sound,
)
from hostile_watch import (
    Audit,
    Event,
    connections_out,
    files_outside,
    objects_unpickled,
    programs_run,
    read_trace,
    this_process,
    traced,
)
from wavemill.jobs.corpus import build_corpus
from wavemill.jobs.engine import InlineEngine
from wavemill.jobs.tokenize import TokenizeOptions, tokenize
from wavemill.pipelines.error_classes import ERROR_CLASSES
from wavemill.pipelines.policy import CorpusPolicy
from wavemill.storage.root import Root

pytest_plugins = ["hostile_table"]
pytestmark = [pytest.mark.timeout(300), pytest.mark.slow]  # `make test-hostile`
OFFERS = dict(offers_by_folder([*FILES, *NAMES_AND_KINDS, *CONTAINERS]))
MOST_BYTES = 2_000_000_000  # of any one process; torch and the libraries alone take 700 MB


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a build and a run over everything hostile left behind."""

    world: World
    root: Path
    before: dict[str, tuple[int, int, int]]
    after: dict[str, tuple[int, int, int]]
    opened: set[Path]
    events: list[Event]
    runs: dict[str, Run]
    rows: list[Row]

    def rows_in(self, folder: str, wanted: set[str]) -> dict[str, Row]:
        """Rows of one offer, those of paths below its folder and those that it names, by path and member."""
        found = {}
        for row in self.rows:
            place = row["path"] + (f" > {row['member']}" if row["member"] else "")
            if place.startswith(f"{folder}/") or place in wanted:
                found[place] = row
        return found


@pytest.fixture(scope="module")
def outcome(fitted_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Outcome]:
    world = World.make(tmp_path_factory.mktemp("hostile") / "world")
    root = world.folder.parent / "root"
    for name, offer in OFFERS.items():
        (world.source / name).mkdir()
        offer.make(world.source / name, world)
    (world.source / "good.wav").write_bytes(sound())
    shutil.copytree(fitted_root / "codebooks", root / "codebooks")
    before, watch, audit = snapshot(world.folder), OpenWatch(world.canaries), Audit(world.folder.parent / "audit")
    commands = {
        "build": ("corpus", "build", f"x={world.source}", "--to", root, "--json"),
        "tokenize": ("tokenize", root, "--engine", "inline", "--max-error-share", "1", "--json"),
        "quarantine": ("quarantine", root, "--limit", "1000"),
        "inspect": ("inspect", root),
    }
    traces = {name: world.folder.parent / f"trace-{name}" for name in commands}
    runs = {name: run(world, *command, env=audit.env, under=traced(traces[name])) for name, command in commands.items()}
    opened, after = watch.opened(), snapshot(world.folder)
    events = [*audit.events(), *(event for trace in traces.values() for event in read_trace(trace))]
    watch.close()
    audit.close()
    yield Outcome(world, root, before, after, opened, events, runs, rows_of(root))
    world.listener.close()


@pytest.mark.parametrize("folder", OFFERS, ids=[f"{name}: {offer.sentence}" for name, offer in OFFERS.items()])
def test_of_each_hostile_input_becomes_what_should(outcome: Outcome, tell: Teller, folder: str) -> None:
    offer: Offer = OFFERS[folder]
    wanted = {_place(folder, path, outcome.world): kind for path, kind in offer.rows.items()}
    found = outcome.rows_in(folder, set(wanted))
    assert {path: row["final"] for path, row in found.items()} == wanted
    for row in found.values():
        assert row["sample_rate"] != CANARY_RATE
        if row["final"] is None:
            assert all(codes_KT is not None for codes_KT in row["codes"].values())
        else:
            assert row["final"] in ERROR_CLASSES
            assert all(codes_KT is None for codes_KT in row["codes"].values())
    came = Counter(row["final"] or "codes" for row in found.values())
    counted = [kind if count == 1 else f"{kind} {count}" for kind, count in came.items()]
    tell.case(offer.sentence, ", ".join(counted) or "passed over")


def _place(folder: str, path: str, world: World) -> str:
    """What stands in the table: paths in their one spelling, members as they are."""
    path, arrow, member = path.partition(" > ")
    return os.path.normpath(f"{folder}/{path}") + arrow + member.replace("URL", world.listener.url)


def test_nothing_hostile_stops_a_build_or_a_run(outcome: Outcome) -> None:
    for name, done in outcome.runs.items():
        assert done.status == 0, f"{name}: {done.err}"
        assert "Traceback" not in done.out + done.err


def test_nobody_connects_to_anything_that_a_file_names(outcome: Outcome, tell: Teller) -> None:
    connections = connections_out(outcome.events)
    tell.figure("connections", outcome.world.listener.hits + len(connections))
    assert outcome.world.listener.hits == 0
    assert connections == set()


def test_no_file_outside_the_source_is_opened_and_none_of_it_is_in_the_dataset(outcome: Outcome, tell: Teller) -> None:
    world = outcome.world
    allowed = (world.source, world.folder / "tmp", world.folder / "home", outcome.root, world.folder.parent / "audit")
    outside = files_outside(outcome.events, *allowed) - _finders(world)
    assert len([event for event in outcome.events if event.kind == "open"]) > 1_000
    tell.figure("outside", len(outcome.opened) + len(outside))
    assert outcome.opened == set()
    assert outside == set()
    texts = [row[name] or "" for row in outcome.rows for name in ("text", "error_message", "speaker")]
    said = [done.out + done.err for done in outcome.runs.values()]
    assert MARKER not in "".join(texts + said)


def _finders(world: World) -> set[str]:
    """What setuptools' finder of the package puts on sys.path, which is no file."""
    return {str(world.folder / "desk" / f"__editable__.wavemill-{version('wavemill')}.finder.__path_hook__")}


def test_the_observers_see_what_they_watch_for(tmp_path: Path) -> None:
    """A watch that sees nothing would prove nothing."""
    world = World.make(tmp_path / "world")
    watch, audit = OpenWatch(world.canaries), Audit(tmp_path / "audit")
    before, canary = snapshot(world.folder), world.outside / "canary.txt"
    (world.source / "link").symlink_to(canary)
    code = f"""
import os, pickle, resource, socket, subprocess
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
socket.create_connection(("127.0.0.1", {world.listener.port})).recv(10)
open({str(world.source / "link")!r}).read()
pickle.loads({pickled(world.touched)!r})
"""
    under = traced(tmp_path / "trace")
    subprocess.run([*under, sys.executable, "-P", "-c", code], env=world.env | audit.env, check=True)
    seen = audit.events()
    for events in (seen, read_trace(tmp_path / "trace")) if under else (seen,):
        assert str(canary) in files_outside(events, world.source)
        assert [address for address in connections_out(events) if str(world.listener.port) in address]
        assert [command for command in programs_run(events) if "touch" in command]
    assert {name.partition(".")[0] for name in objects_unpickled(seen)} == {"posix"}
    with this_process() as own:
        socket.create_connection(("127.0.0.1", world.listener.port)).recv(10)
        canary.read_text()
    assert str(canary) in files_outside(own, world.source)
    assert connections_out(own) == {"127.0.0.1", str(("127.0.0.1", world.listener.port))}
    assert world.listener.hits == 2
    assert watch.opened() == {canary}
    assert snapshot(world.folder) != before
    watch.close()
    audit.close()
    world.listener.close()


def test_nothing_is_written_outside_the_root_and_nothing_is_executed(outcome: Outcome, tell: Teller) -> None:
    tmp = str(outcome.world.folder / "tmp")  # may be used, and is left empty
    assert {path: status for path, status in outcome.after.items() if path != tmp} == {
        path: status for path, status in outcome.before.items() if path != tmp
    }
    executed = programs_run(outcome.events) | objects_unpickled(outcome.events)
    executed |= {str(path) for path in outcome.world.folder.rglob("touched")}
    tell.figure("executed", len(executed))
    assert executed == set()


def test_memory_and_time_stay_bounded(outcome: Outcome, tell: Teller) -> None:
    for name, done in outcome.runs.items():
        tell.figure("peak_bytes", done.peak_bytes)
        assert done.peak_bytes < MOST_BYTES, f"{name} took {done.peak_bytes:,} bytes"
        assert done.wall_s < 120, f"{name} took {done.wall_s:.0f} s"


def test_what_is_printed_holds_no_control_characters(outcome: Outcome) -> None:
    for name, done in outcome.runs.items():
        assert control_characters(done.out + done.err) == set(), name
    assert "1000" not in outcome.runs["quarantine"].out.splitlines()[-1]  # all of them were shown


def test_single_segments_are_shown_without_control_characters(outcome: Outcome) -> None:
    escapes = [row for row in outcome.rows if control_characters(row["path"])]
    bad = next(row for row in escapes if row["final"])
    done = run(outcome.world, "inspect", outcome.root, "--segment", bad["id"])
    assert done.status == 0, done.err
    assert control_characters(done.out + done.err) == set()


def test_pictures_are_drawn_of_segments_with_hostile_names(outcome: Outcome, tell: Teller, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [row for row in outcome.rows if row["final"] is None and control_characters(row["path"])]
    rows += [row for row in outcome.rows if row["final"] is None and ("<img" in row["path"] or "$(" in row["path"])]
    assert len(rows) > 5
    picture = tmp_path / "picture.png"
    for row in rows[:: len(rows) // 4]:
        done = run(outcome.world, "inspect", outcome.root, "--segment", row["id"], "--png", picture)
        assert done.status == 0, done.err
        assert picture.read_bytes().startswith(b"\x89PNG")
        assert row["path"].encode() not in picture.read_bytes()
        picture.unlink()
    tell.case("pictures of segments whose names are markup, formulas and escapes", "drawn")


def test_json_for_programs_holds_no_control_characters(outcome: Outcome) -> None:
    done = run(outcome.world, "quarantine", outcome.root, "--json")
    assert len(json.loads(done.out)) > 50
    assert control_characters(done.out) == set()


def test_the_neighbours_codes_are_those_of_a_run_without_anything_hostile(
    outcome: Outcome, fitted_root: Path, tmp_path: Path
) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "good.wav").write_bytes(sound())
    shutil.copytree(fitted_root / "codebooks", tmp_path / "root" / "codebooks")
    build_corpus(Root(tmp_path / "root"), [f"x={tmp_path / 'source'}"], CorpusPolicy(), shard_hours=1)
    tokenize(Root(tmp_path / "root"), STREAMS, InlineEngine, TokenizeOptions())
    [alone] = rows_of(tmp_path / "root")
    [beside] = [row for row in outcome.rows if row["path"] == "good.wav"]
    same_sound = [row for row in outcome.rows if row["final"] is None and row["path"].endswith("and \u00e9.wav")]
    assert len(same_sound) == 1
    for row in (beside, *same_sound):
        assert _same(row["codes"], alone["codes"])


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def test_every_row_is_where_it_is_said_to_be(outcome: Outcome) -> None:
    """Names are kept as they are, but for bytes that are no UTF-8."""
    for row in outcome.rows:
        if row["final"] is None and not row["member"]:
            assert os.path.exists(os.path.join(row["source_root"], row["path"])), row["path"]
