"""`wavemill layout`: what it lists, a real segment through a layout and back, its picture and its sound."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import soundfile
from layout_roots import make_layout_root, make_talkers_root
from wavemill.jobs import layout_pictures
from wavemill.jobs.layout_pictures import draw_layout
from wavemill.pipelines.layouts.closeup import beginning, differing, lay_out
from wavemill.pipelines.layouts.registry import ENTRIES, LAYOUTS, layout_said, parse_layout
from wavemill.storage.codes import open_stream, read_codes
from wavemill.storage.layouts import GroupBy
from wavemill.storage.root import Root

CLI = Callable[..., subprocess.CompletedProcess[str]]
MadeOnce = Callable[[str, Callable[[Path], None]], Path]


@pytest.fixture(scope="session")
def every(made_once: MadeOnce, samples: Path, fitted_root: Path) -> Path:
    """A dataset of a few samples with streams of every kind, and one of separated talkers."""

    def make(path: Path) -> None:
        make_layout_root(path / "every", samples, fitted_root / "codebooks")
        make_talkers_root(path / "talkers", samples)

    return made_once("layouts", make)


def root_of(every: Path, name: str) -> Path:
    grouping = LAYOUTS[name].grouping
    return every / ("talkers" if grouping and grouping.by is GroupBy.PARENT else "every") / "root"


def test_the_list_has_every_layout_and_how_it_is_written(in_process: CLI):
    listed = in_process("layout", "list").stdout
    for entry in ENTRIES:
        assert entry.name in listed
        assert entry.example in listed.replace("\n", "").replace(" ", "")
    told = json.loads(in_process("layout", "list", "--json").stdout)
    assert [layout["name"] for layout in told] == list(LAYOUTS)
    [fine] = [layout for layout in told if layout["name"] == "fine"]
    assert fine["streams"] == {"acoustic": 4}
    assert {"name": "coarse", "expected": "a whole number", "default": "4", "required": False} in fine["options"]


@pytest.mark.parametrize("name", list(LAYOUTS))
def test_a_layout_shows_a_real_segment_and_gives_its_codes_back(name: str, every: Path, in_process: CLI):
    done = in_process("layout", "show", LAYOUTS[name].example, str(root_of(every, name)), "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["differing"] == []
    assert told["layout"] == layout_said(parse_layout(LAYOUTS[name].example))
    assert told["steps"] == len(told["tokens"]) > 20
    assert all(amount["frames"] > 0 for amount in told["held"].values())
    sizes = np.array(told["column_sizes"])
    tokens = np.array(told["tokens"]).reshape(told["steps"], -1)
    assert tokens.min() >= 0
    assert (tokens < sizes).all()


@pytest.mark.parametrize("name", list(LAYOUTS))
def test_what_a_picture_shows_of_a_segment_is_its_beginning(name: str, every: Path):
    laid = lay_out(Root(root_of(every, name)), parse_layout(LAYOUTS[name].example))
    part = beginning(laid, max_steps=40)
    assert differing(part, part.inverted()) == []
    assert len(part.laid.tokens) <= 40
    for stream, rows in part.rows.items():
        count = int(rows.counts_N[0])
        assert count <= laid.rows[stream].counts_N[0]
        for book, whole in zip(rows.books, laid.rows[stream].books, strict=True):
            np.testing.assert_array_equal(book, whole[:count])


def test_what_is_printed_are_the_tables_codes_by_name(finished_root: Path, in_process: CLI):
    root = Root(finished_root)
    stream = open_stream(root, "acoustic")
    codes = read_codes(root, stream, 0)
    row = next(row for row, error in enumerate(codes.errors) if error is None)
    codes_KT = codes.codes(row)
    assert codes_KT is not None
    said = ("layout", "show", "delay:stream=acoustic,codebooks=2", finished_root, "--segment", codes.ids[row])
    lines = in_process(*said).stdout.splitlines()
    assert lines[0] == f"delay:stream=acoustic,codebooks=2, segment {codes.ids[row]}"
    steps = [line.split() for line in lines if line.lstrip()[0].isdigit() and "steps of" not in line]
    assert steps[0] == ["0", f"acoustic.0:{codes_KT[0, 0]}", "<pad>"]
    assert steps[5] == ["5", f"acoustic.0:{codes_KT[0, 5]}", f"acoustic.1:{codes_KT[1, 4]}"]
    num_steps = codes_KT.shape[1] + 1
    assert steps[-1] == [str(num_steps - 1), "<pad>", f"acoustic.1:{codes_KT[1, -1]}"]
    assert f"  ...  {num_steps - 26} more" in lines
    assert lines[-1] == f"acoustic: the inverse gives the table's {codes_KT.shape[1]} frames of 2 codebook(s) exactly"


def test_steps_that_are_given_say_so(every: Path, in_process: CLI):
    asked = ("layout", "show", "vall-e:text=text,acoustic=acoustic", every / "every" / "root")
    told = json.loads(in_process(*asked, "--json").stdout)
    frames = told["streams"]["text"]["frames"]
    assert told["given"] == list(range(frames + 1))  # the text and <sep>
    lines = [line.split() for line in in_process(*asked).stdout.splitlines()]
    words = {step: words for step, *words in lines if step.isdigit() and "steps" not in words}
    assert words["0"][1:] == words[str(min(frames, 19))][1:] == ["given"]
    assert words[str(told["steps"] - 1)] == ["<eos>"]


def test_a_segment_with_an_error_or_outside_all_groups_is_told_in_a_sentence(
    every: Path, finished_root: Path, in_process: CLI
):
    root = Root(finished_root)
    stream = open_stream(root, "semantic")
    shards = [read_codes(root, stream, shard) for shard in stream.files]
    broken = next(each.ids[row] for each in shards for row, error in enumerate(each.errors) if error == "truncated")
    done = in_process("layout", "show", "semantic:stream=semantic", finished_root, "--segment", broken)
    assert done.returncode == 2
    assert done.stderr.startswith(f"Error: Segment {broken} has no codes in stream 'semantic': truncated (")
    place = every / "every" / "root"
    alone = lay_out(Root(place), parse_layout("masked:stream=semantic")).ids[0]
    done = in_process("layout", "show", "units-to-units:source=semantic", place, "--segment", alone)
    assert done.returncode == 2
    assert "is in no whole group: the layout takes 2 rows of the corpus with the same 'pair'." in done.stderr


@pytest.mark.parametrize("asked", [2, 8])
def test_the_sound_of_the_inverse_is_what_decode_makes(
    asked: int, finished_root: Path, tmp_path: Path, in_process: CLI
):
    layout = f"flatten:stream=acoustic,codebooks={asked}"
    done = in_process("layout", "show", layout, finished_root, "--decode", tmp_path / "a.wav", "--json")
    [segment] = json.loads(done.stdout)["segments"]
    assert done.stderr == f"Wrote {tmp_path}/a.wav.\n"
    in_process("decode", finished_root, segment, "--codebooks", str(asked), "--to", tmp_path)
    ours, rate = soundfile.read(tmp_path / "a.wav")
    theirs, _ = soundfile.read(tmp_path / f"{segment}.wav")
    np.testing.assert_array_equal(ours, theirs)
    assert len(ours) > rate
    assert np.abs(ours).max() > 0.01


def test_a_picture_has_a_cell_for_each_step_in_the_colour_of_its_codebook(finished_root: Path, tmp_path: Path):
    laid = lay_out(Root(finished_root), parse_layout("delay:stream=acoustic,codebooks=4"))
    draw_layout(laid, str(tmp_path / "a.png"))
    picture = matplotlib.image.imread(tmp_path / "a.png")[:, :, :3]
    assert picture.shape[1] == 1_600
    cell, row, left, top = (1_600 - 155 - 35) / layout_pictures.LINE_STEPS, 34, 155, 75
    colours = np.array(  # near the upper left corner of cells, away from what is written in them
        [
            [picture[int(top + row * (column + 0.15)), int(left + cell * (step + 0.15))] for step in range(32)]
            for column in range(4)
        ]
    )
    padding = np.array([0xEC, 0xEF, 0xF1]) / 255
    is_padding = np.abs(colours - padding).max(axis=2) < 0.01
    assert is_padding.tolist() == [[not column <= step < column + 29 for step in range(32)] for column in range(4)]
    books = [colours[column, column] for column in range(4)]
    for column in range(4):
        assert np.allclose(colours[column, column : column + 29], books[column], atol=0.01)
    brightness = [float(book.sum()) for book in books]
    assert brightness == sorted(brightness, reverse=True)
    assert len(set(brightness)) == 4


@pytest.mark.parametrize("name", ["unified", "continuous", "conditioned", "moshi"])
def test_pictures_of_text_numbers_and_tags_are_small(name: str, every: Path, tmp_path: Path, in_process: CLI):
    picture = tmp_path / "a.png"
    done = in_process("layout", "show", LAYOUTS[name].example, root_of(every, name), "--png", picture)
    assert done.returncode == 0, done.stderr
    assert 10_000 < picture.stat().st_size < 200_000
