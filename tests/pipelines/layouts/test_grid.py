"""Several tokens a step: every codebook in its column, as late as it should be, and back again."""

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from streams_made import (
    disturbed,
    random_rows,
    require_invertible,
    require_refused_or_true,
    rows,
    rows_of_streams,
    segment_of,
    spec,
    specs,
    write_root,
)
from wavemill.pipelines.layouts.grid import Column, GridPlan, delay, parallel
from wavemill.storage.batches import PackedBatch
from wavemill.storage.dataset import TokenDataset
from wavemill.storage.layouts import Laid, PlannedLayout
from wavemill.storage.packing import PackingMethod
from wavemill.storage.selection import Pack
from wavemill.tokenizers.spec import UserError

ONE = specs(acoustic=(4, 9))


@st.composite
def grids(draw: st.DrawFn) -> tuple[GridPlan, dict]:
    """Up to three streams of any rates, codebooks and delays on one clock, in columns of any order."""
    rates, made, columns = {}, {}, []
    for name in ["x", "y", "z"][: draw(st.integers(1, 3))]:
        made[name] = spec(draw(st.integers(1, 3)), draw(st.integers(1, 5)))
        rates[name] = Fraction(draw(st.integers(1, 5)), draw(st.integers(1, 5)))
        for book in range(made[name].num_codebooks):
            late = draw(st.integers(0, 3))
            parts = max(1, -(-rates[name].numerator // rates[name].denominator))
            columns += [Column(name, book, late, part) for part in range(parts)]
    columns = draw(st.permutations(columns))
    return GridPlan.of(columns, rates, made, ends=draw(st.booleans())), made


def test_the_delay_pattern_is_that_of_musicgens_figure() -> None:
    plan = delay("acoustic").plan(ONE)
    codes_KT = np.array([[1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4]])
    _ = plan.vocabulary.token("<pad>")
    assert plan.lay(rows(ONE, acoustic=[codes_KT])).tokens.T.tolist() == [
        [1, 2, 3, 4, _, _, _],
        [_, 1, 2, 3, 4, _, _],
        [_, _, 1, 2, 3, 4, _],
        [_, _, _, 1, 2, 3, 4],
    ]


def test_codebooks_in_parallel_are_the_codes_themselves() -> None:
    plan = parallel("acoustic").plan(ONE)
    laid = plan.lay(rows(ONE, acoustic=[[[1, 2], [3, 4], [5, 6], [7, 8]], [[0], [1], [2], [3]]]))
    assert laid.tokens.tolist() == [[1, 3, 5, 7], [2, 4, 6, 8], [0, 1, 2, 3]]
    assert laid.loss_S is None


def test_each_column_begins_and_ends_as_late_as_its_codes() -> None:
    plan = delay("acoustic", (0, 2), ends=True).plan(ONE)
    pad, bos, eos = (plan.vocabulary.token(name) for name in ("<pad>", "<bos>", "<eos>"))
    codes = rows(specs(acoustic=(2, 9)), acoustic=[[[1, 2, 3], [4, 5, 6]], [[], []]])
    assert plan.lay(codes).tokens.T.tolist() == [
        [bos, 1, 2, 3, eos, pad, pad, bos, eos, pad, pad],
        [bos, pad, pad, 4, 5, 6, eos, bos, pad, pad, eos],
    ]


@settings(max_examples=60)
@given(st.data())
def test_a_grid_inverts_exactly(data: st.DataObject) -> None:
    plan, made = data.draw(grids())
    require_invertible(plan, data.draw(rows_of_streams(made)))


@settings(max_examples=60)
@given(st.data(), st.integers(1, 4), st.booleans())
def test_parallel_and_delay_invert_exactly(data: st.DataObject, num_codebooks: int, ends: bool) -> None:
    one = specs(acoustic=(4, data.draw(st.integers(1, 9))))
    codes = data.draw(rows_of_streams(one))
    held = {"acoustic": range(num_codebooks)}
    laid = require_invertible(parallel("acoustic", num_codebooks, ends=ends).plan(one), codes, held)
    counts_N = codes["acoustic"].counts_N
    assert len(laid.tokens) == (counts_N + 2 * ends).sum()
    delays = data.draw(st.lists(st.integers(0, 5), min_size=num_codebooks, max_size=num_codebooks).map(tuple))
    plan = delay("acoustic", delays, ends=ends).plan(one)
    require_invertible(plan, codes, held)
    there = counts_N[counts_N > 0]
    assert plan.num_steps(codes)[counts_N > 0].tolist() == (there + max(delays) + 2 * ends).tolist()
    assert (plan.num_steps(codes)[counts_N == 0] == (max(delays) + 2 if ends else 0)).all()


@given(st.data())
def test_steps_that_no_segment_gives_are_refused(data: st.DataObject) -> None:
    plan, made = data.draw(grids())
    codes = {
        name: random_rows(each, [data.draw(st.integers(0, 4))], np.random.default_rng(0)) for name, each in made.items()
    }
    require_refused_or_true(plan, data.draw(disturbed(plan, plan.lay(codes).tokens)))


@pytest.mark.parametrize(
    ("tokens", "said"),
    [
        ([[1, 9, 9, 9]], r"codebooks of acoustic with \[1, 0, 0, 0\] frames"),
        ([[1, 9, 9, 9], [9, 1, 9, 9], [9, 9, 1, 9]], r"codebooks of acoustic with \[1, 1, 1, 0\] frames"),
        ([[1, 9, 9, 9], [9, 1, 9, 9], [9, 9, 1, 9], [9, 9, 9, 1], [9, 9, 9, 9]], "5 steps, where .* takes 4"),
        ([[1, 3, 9, 9], [9, 1, 9, 9], [9, 9, 1, 9], [9, 9, 9, 1]], "tokens at step 0 that no segment gives"),
        ([[1, 9, 9]], r"tokens \[1, 3\] of 4 column"),
    ],
)
def test_what_is_wrong_with_steps_is_said(tokens: list[list[int]], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        delay("acoustic").plan(ONE).invert(Laid(np.array(tokens)))


def test_the_vocabulary_names_each_columns_tokens() -> None:
    plan = delay("acoustic", (0, 1), ends=True).plan(ONE)
    assert plan.column_sizes == (12, 12)
    assert [plan.vocabulary.said(token, 1) for token in (0, 8, 9, 10, 11)] == [
        "acoustic.1:0",
        "acoustic.1:8",
        "<pad>",
        "<bos>",
        "<eos>",
    ]


def test_codes_of_the_largest_alphabet_of_two_bytes_leave_room_for_padding() -> None:
    large = specs(x=(1, 2**15), y=(2, 2**15))
    plan = GridPlan.of(
        [Column("x", 0), Column("x", 0, part=1), Column("y", 0), Column("y", 1)],
        {"x": Fraction(2), "y": Fraction(1)},
        large,
    )
    codes = {name: random_rows(each, [3], np.random.default_rng(0)) for name, each in large.items()}
    assert plan.lay(codes).tokens[1, 1] == 2**15
    require_invertible(plan, codes)


@pytest.mark.parametrize(
    ("layout", "said"),
    [
        (
            delay("acoustic", (0, 1, 2, 3, 4)),
            r"Layout delay takes 5 codebook\(s\) of stream 'acoustic', of which 4 are read",
        ),
        (
            delay("acoustic", (0, 1), codebooks=3),
            r"Layout delay has 2 delay\(s\) for 3 codebook\(s\): give one for each",
        ),
        (delay("acoustic", (0, -1)), "Layout delay has a delay of -1 steps; each must be 0 or more"),
        (delay("acoustic", ()), "Layout delay takes 1 codebook of stream 'acoustic' or more; 0 were asked for"),
        (parallel("acoustic", 9), r"Layout parallel takes 9 codebook\(s\) of stream 'acoustic', of which 4 are read"),
        (parallel("acoustic", 0), "Layout parallel takes 1 codebook of stream 'acoustic' or more; 0 were asked for"),
        (parallel("acustic"), "takes stream 'acustic'; there are: acoustic, latents. Did you mean 'acoustic'"),
        (parallel("latents"), "Layout parallel takes codes; stream 'latents' holds frames of 8 numbers"),
    ],
)
def test_what_a_stream_does_not_have_is_said(layout: PlannedLayout, said: str) -> None:
    with pytest.raises(UserError, match=said):
        layout.plan({**ONE, "latents": spec(0, 0, dim=8)})


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards of a stream of four codebooks, with segments longer than a sequence and some of no frames."""
    path, rng = tmp_path_factory.mktemp("grid"), np.random.default_rng(1)
    shards = [{"acoustic": random_rows(ONE["acoustic"], counts, rng)} for counts in ([5, 0, 31, 7, 12], [3, 20, 0, 9])]
    write_root(path, ONE, shards)
    return path


@pytest.mark.parametrize("method", list(PackingMethod))
@pytest.mark.parametrize("layout", [parallel("acoustic"), delay("acoustic", (0, 1, 3), ends=True), delay("acoustic")])
def test_packed_steps_of_columns_are_the_streams_codes(
    root: Path, layout: PlannedLayout, method: PackingMethod
) -> None:
    num = layout.streams["acoustic"] or 4
    unpacked = TokenDataset(str(root), {"acoustic": num}, shuffle=False, batch_size=1)
    expected = {batch.ids[0]: batch.codes["acoustic"][0].tolist() for batch in unpacked}  # type: ignore[union-attr]
    length = 48 if method is PackingMethod.BEST_FIT else 16  # it puts cut segments anywhere
    packed = TokenDataset(str(root), batch_size=2, pack=Pack(layout, length, method), seed=3)
    steps: dict[str, list[list[int]]] = {}
    for batch in packed:
        assert isinstance(batch, PackedBatch)
        assert batch.tokens.shape == (2, length, num)
        for row, ids in enumerate(batch.ids):
            for number, id_ in enumerate(ids, start=1):
                steps.setdefault(id_, []).extend(batch.tokens[row][batch.segment_ids[row] == number].tolist())
    plan = layout.plan(specs(acoustic=(num, 9)))
    for id_, codes_KT in expected.items():
        laid = Laid(np.array(steps.get(id_, [])).reshape(-1, num))
        found = plan.invert(laid)["acoustic"]  # type: ignore[attr-defined]
        assert [book.tolist() for book in found.books] == codes_KT


def test_segments_laid_together_stand_one_after_another() -> None:
    plan = delay("acoustic").plan(ONE)
    codes = {"acoustic": random_rows(ONE["acoustic"], [3, 0, 5], np.random.default_rng(0))}
    alone = [plan.lay(segment_of(codes, index)).tokens for index in range(3)]
    np.testing.assert_array_equal(plan.lay(codes).tokens, np.concatenate(alone))
    assert [len(tokens) for tokens in alone] == [6, 0, 8]
