"""A folder full of hostile files: one build, one run, and for each file what had to become of it."""

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import STREAMS
from hostile_containers import CONTAINERS
from hostile_files import FILES
from hostile_names import NAMES_AND_KINDS
from hostile_runs import Row, Run, rows_of, run
from hostile_tools import (
    CANARY_RATE,
    MARKER,
    Offer,
    OpenWatch,
    World,
    control_characters,
    offers_by_folder,
    snapshot,
    sound,
)
from wavemill.jobs.corpus import build_corpus
from wavemill.jobs.engine import InlineEngine
from wavemill.jobs.tokenize import TokenizeOptions, tokenize
from wavemill.pipelines.error_classes import ERROR_CLASSES
from wavemill.pipelines.policy import CorpusPolicy
from wavemill.storage.root import Root

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
    before, watch = snapshot(world.folder), OpenWatch(world.canaries)
    runs = {
        "build": run(world, "corpus", "build", f"x={world.source}", "--to", root, "--json"),
        "tokenize": run(world, "tokenize", root, "--engine", "inline", "--max-error-share", "1", "--json"),
        "quarantine": run(world, "quarantine", root, "--limit", "1000"),
        "inspect": run(world, "inspect", root),
    }
    opened, after = watch.opened(), snapshot(world.folder)
    watch.close()
    yield Outcome(world, root, before, after, opened, runs, rows_of(root))
    world.listener.close()


@pytest.mark.parametrize("folder", OFFERS, ids=[f"{name}: {offer.sentence}" for name, offer in OFFERS.items()])
def test_of_each_hostile_input_becomes_what_should(outcome: Outcome, folder: str) -> None:
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


def _place(folder: str, path: str, world: World) -> str:
    """What stands in the table: paths in their one spelling, members as they are."""
    path, arrow, member = path.partition(" > ")
    return os.path.normpath(f"{folder}/{path}") + arrow + member.replace("URL", world.listener.url)


def test_nothing_hostile_stops_a_build_or_a_run(outcome: Outcome) -> None:
    for name, done in outcome.runs.items():
        assert done.status == 0, f"{name}: {done.err}"
        assert "Traceback" not in done.out + done.err


def test_nobody_connects_to_anything_that_a_file_names(outcome: Outcome) -> None:
    assert outcome.world.listener.hits == 0


def test_no_file_outside_the_source_is_opened_and_none_of_it_is_in_the_dataset(outcome: Outcome) -> None:
    assert outcome.opened == set()
    texts = [row[name] or "" for row in outcome.rows for name in ("text", "error_message", "speaker")]
    said = [done.out + done.err for done in outcome.runs.values()]
    assert MARKER not in "".join(texts + said)


def test_the_observers_see_what_they_watch_for(tmp_path: Path) -> None:
    """A watch that sees nothing would prove nothing."""
    import socket

    world = World.make(tmp_path / "world")
    watch = OpenWatch(world.canaries)
    before = snapshot(world.folder)
    socket.create_connection(("127.0.0.1", world.listener.port)).recv(10)
    (world.outside / "canary.txt").read_text()
    world.touched.touch()
    assert world.listener.hits == 1
    assert watch.opened() == {world.outside / "canary.txt"}
    assert snapshot(world.folder) != before
    watch.close()
    world.listener.close()


def test_nothing_is_written_outside_the_root_and_nothing_is_executed(outcome: Outcome) -> None:
    tmp = str(outcome.world.folder / "tmp")  # may be used, and is left empty
    assert {path: status for path, status in outcome.after.items() if path != tmp} == {
        path: status for path, status in outcome.before.items() if path != tmp
    }
    assert not outcome.world.touched.exists()
    assert not list(outcome.world.folder.rglob("touched"))


def test_memory_and_time_stay_bounded(outcome: Outcome) -> None:
    for name, done in outcome.runs.items():
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
