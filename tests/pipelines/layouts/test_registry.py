"""Every layout can be named in text, and its text names it."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from streams_made import random_rows, spec, text_spec, write_root
from timed_made import MARK, TEXT, said, text_rows
from wavemill.pipelines.layouts import registry
from wavemill.pipelines.layouts.closeup import beginning, differing, lay_out
from wavemill.pipelines.layouts.conditioned import conditioned
from wavemill.pipelines.layouts.flat import flatten
from wavemill.pipelines.layouts.grid import delay
from wavemill.pipelines.layouts.registry import ENTRIES, LAYOUTS, layout_said, parse_layout
from wavemill.storage.root import Root
from wavemill.tokenizers.spec import FrameRule, UserError

NAMES = [entry.name for entry in ENTRIES]
FOLDER = Path(registry.__file__).parent


def test_every_layout_of_the_folder_is_in_the_registry():
    told = {entry.layout.__name__ for entry in ENTRIES}
    there = set()
    for path in FOLDER.glob("*.py"):
        lines = path.read_text().splitlines()
        there |= {line[6:-1] for line in lines if line.startswith("class ") and line[6].islower()}
    assert there == told
    assert len(LAYOUTS) == len(ENTRIES)


@pytest.mark.parametrize("name", NAMES)
def test_a_layouts_example_names_it_and_its_text_names_it_again(name: str):
    entry = LAYOUTS[name]
    layout = parse_layout(entry.example)
    assert isinstance(layout, entry.layout)
    assert parse_layout(layout_said(layout)) == layout


@pytest.mark.parametrize("name", NAMES)
def test_a_layout_is_described_by_its_own_words(name: str):
    told = LAYOUTS[name].describe()
    assert told["about"].endswith((".", ":"))
    assert told["paper"]
    assert told["streams"]
    assert [option["name"] for option in told["options"]] == [field.name for field in fields(LAYOUTS[name].layout)]


def test_options_are_read_by_their_types():
    assert parse_layout("flatten:stream=a,codebooks=3,ends=true") == flatten("a", 3, ends=True)
    assert parse_layout("delay:stream=a-b_2,delays=0,1,2,ends=false") == delay("a-b_2", (0, 1, 2))
    assert parse_layout("delay:delays=0,stream=a") == delay("a", (0,))


def test_lists_are_said_as_they_are_read():
    layout: Any = delay("a", [0, 1])  # pyright: ignore[reportArgumentType]
    assert layout_said(layout) == "delay:stream=a,delays=0,1"
    assert parse_layout(layout_said(layout)) == delay("a", (0, 1))


def test_a_layout_within_a_layout_takes_all_that_follows():
    inner = delay("acoustic", (0, 2), ends=True)
    layout = conditioned("voice", conditioned("text", inner))
    said = layout_said(layout)
    assert said == (
        "conditioned:stream=voice,layout=conditioned:stream=text,layout=delay:stream=acoustic,delays=0,2,ends=true"
    )
    assert parse_layout(said) == layout


@dataclass(frozen=True)
class made_up:
    """A layout with an option of each type."""

    stream: str
    number: int = 4
    maybe: int | None = 7
    share: float = 0.5
    on: bool = True
    numbers: tuple[int, ...] | None = None
    names: tuple[str, ...] = ("a", "b")


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LAYOUTS, "made-up", registry.LayoutEntry(made_up, "nobody's", "made-up:stream=a"))


WORD = st.from_regex(r"[a-z][a-z0-9_-]{0,8}", fullmatch=True).filter(lambda word: word != "none")
COUNT = st.integers(0, 10**9)


@given(
    values=st.fixed_dictionaries(
        {"stream": WORD},
        optional={
            "number": COUNT,
            "maybe": st.none() | COUNT,
            "share": st.floats(0, 1e12),
            "on": st.booleans(),
            "numbers": st.none() | st.lists(COUNT, min_size=1).map(tuple),
            "names": st.lists(WORD, min_size=1).map(tuple),
        },
    )
)
def test_text_of_any_options_gives_the_same_options(values: dict[str, Any]):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(LAYOUTS, "made-up", registry.LayoutEntry(made_up, "nobody's", "made-up:stream=a"))
        layout = made_up(**values)
        assert parse_layout(layout_said(layout)) == layout


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("made-up", "Layout 'made-up': stream is missing; expected a name, as in made-up:stream=a."),
        ("made-up:stream", "Layout 'made-up:stream': expected NAME, or NAME:KEY=VALUE,KEY=VALUE."),
        ("made-up:stream=a,number=", "Layout 'made-up:stream=a,number=': number is empty; give it a value"),
        ("made-up:stream=a,number=-1", "number is '-1'; expected a whole number."),
        ("made-up:stream=a,maybe=x", "maybe is 'x'; expected a whole number."),
        ("made-up:stream=a,share=nan", "share is 'nan'; expected a number, 0 or greater."),
        ("made-up:stream=a,on=yes", "on is 'yes'; expected true or false."),
        ("made-up:stream=a,numbers=1,,2", "numbers is '1,,2'; expected a whole number, or several with commas."),
        ("made-up:stream=a,b", "stream is 'a,b'; expected a name."),
        ("made-up:stream=a,shar=1", "there is no option 'shar'; there are: stream, number,"),
        ("made-up:stream=a,shar=1", "Did you mean 'share'?"),
        ("made-up:stream=a,stream=b", "stream is there twice; keep one."),
        ("maid-up:stream=a", "There is no layout 'maid-up'; there are: semantic,"),
        ("maid-up:stream=a", "Did you mean 'made-up'?"),
        ("conditioned:stream=voice,layout=delai:stream=a", "There is no layout 'delai'; there are: "),
    ],
)
def test_a_mistake_in_a_layouts_text_is_told_in_a_sentence(text: str, says: str):
    with pytest.raises(UserError) as raised:
        parse_layout(text)
    assert says in str(raised.value)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Root:
    """A few segments with two streams of codes and one of text; the last has an error nowhere, but no frames."""
    path = tmp_path_factory.mktemp("layouts") / "root"
    streams = {
        "semantic": spec(1, 100),
        "acoustic": spec(4, 64, hop_length=200, frame_rule=FrameRule.CEIL),
        "text": text_spec(300),
    }
    rng = np.random.default_rng(1)
    frames = {"semantic": (50, 12, 200, 0), "acoustic": (81, 20, 321, 0), "text": (9, 3, 40, 2)}
    write_root(path, streams, [{name: random_rows(streams[name], frames[name], rng) for name in streams}])
    return Root(path)


OF_CODES = [
    name
    for name in NAMES
    if set(parse_layout(LAYOUTS[name].example).streams) <= {"semantic", "acoustic", "text"}
    and LAYOUTS[name].grouping is None
]


@pytest.mark.parametrize("name", OF_CODES)
def test_a_segment_of_a_dataset_goes_through_a_layout_and_back(name: str, root: Root):
    laid = lay_out(root, parse_layout(LAYOUTS[name].example))
    assert differing(laid, laid.inverted()) == []
    assert len(laid.laid.tokens) == laid.plan.num_steps(laid.rows)[0] > 0


@pytest.mark.parametrize("name", OF_CODES)
@pytest.mark.parametrize("max_steps", [1, 30, 10_000])
def test_the_beginning_of_a_segment_is_as_long_as_fits(name: str, max_steps: int, root: Root):
    laid = lay_out(root, parse_layout(LAYOUTS[name].example), "segment-0000")
    part = beginning(laid, max_steps=max_steps)
    assert differing(part, part.inverted()) == []
    if max_steps == 30:
        assert 15 <= len(part.laid.tokens) <= 30
        for stream, rows in part.rows.items():
            count = int(rows.counts_N[0])
            assert 0 < count <= laid.rows[stream].counts_N[0]
            for book, whole in zip(rows.books, laid.rows[stream].books, strict=True):
                np.testing.assert_array_equal(book, whole[:count])
    if max_steps == 10_000:
        np.testing.assert_array_equal(part.laid.tokens, laid.laid.tokens)


def test_the_segment_that_is_shown_by_default_is_short_but_not_empty(root: Root):
    assert lay_out(root, flatten("acoustic", 1)).ids == ("segment-0000",)
    assert lay_out(root, flatten("acoustic")).ids == ("segment-0001",)
    assert lay_out(root, flatten("acoustic"), "segment-0003").laid.tokens.shape == (0,)


def test_words_without_a_stream_that_has_a_clock_are_cut_at_a_time(tmp_path: Path):
    words = [(10 * number, 10 * number + 8, [number % 7]) for number in range(60)]
    codes = [*said(*words), MARK, *said((5, 9, [1]))]  # a second window
    write_root(tmp_path / "root", {"text": TEXT}, [text_rows([codes])])
    laid = lay_out(Root(tmp_path / "root"), flatten("text"))
    assert len(beginning(laid, max_steps=40).laid.tokens) in range(35, 41)
    np.testing.assert_array_equal(beginning(laid, max_steps=10_000).laid.tokens, laid.laid.tokens)


def test_a_difference_between_the_inverse_and_the_table_is_found(root: Root):
    laid = lay_out(root, parse_layout("stages:semantic=semantic,acoustic=acoustic,coarse=1"))
    inverted = laid.inverted()
    inverted["acoustic"].books[3][5] ^= 1
    assert differing(laid, inverted) == ["acoustic"]
