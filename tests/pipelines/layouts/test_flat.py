"""Layouts of one stream, the engine of sequences, and vocabularies."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from streams_made import (
    disturbed,
    random_rows,
    refused_kinds,
    require_invertible,
    require_refused_or_true,
    require_same_laid,
    rows,
    rows_of_streams,
    spec,
    specs,
    with_changes,
    write_root,
)
from wavemill.pipelines.layouts.flat import flatten, semantic
from wavemill.pipelines.layouts.sequence import Mark, Run, SequencePlan
from wavemill.pipelines.layouts.vocabulary import Vocabulary, books_of, special
from wavemill.storage.dataset import Pack, TokenDataset
from wavemill.storage.layouts import Laid
from wavemill.tokenizers.spec import UserError


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_codes_come_back_from_flattened_ones(data: st.DataObject) -> None:
    num = data.draw(st.integers(1, 4))
    streams = specs(acoustic=(num, data.draw(st.sampled_from([2, 7, 300]))))
    codebooks, ends = data.draw(st.none() | st.integers(1, num)), data.draw(st.booleans())
    plan = flatten("acoustic", codebooks, ends).plan(streams)
    laid = require_invertible(
        plan, data.draw(rows_of_streams(streams)), held={"acoustic": range(num if codebooks is None else codebooks)}
    )
    assert laid.loss_S is None
    if codebooks == 1 or num == 1:
        read = with_changes(streams, "acoustic", num_codebooks=1)
        assert semantic("acoustic", ends).plan(read).vocabulary == plan.vocabulary


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_steps_that_no_segment_gives_are_refused(data: st.DataObject) -> None:
    streams = specs(acoustic=(2, 3))
    plan = flatten("acoustic", ends=True).plan(streams)
    one = data.draw(rows_of_streams(streams, max_segments=1))
    require_refused_or_true(plan, data.draw(disturbed(plan, plan.lay(one).tokens)))


def test_code_c_of_codebook_k_is_token_c_beyond_k_codebooks() -> None:
    streams = specs(acoustic=(2, 10))
    two = rows(streams, acoustic=[[[1, 2], [3, 4]], [[5], [6]]])
    assert flatten("acoustic").plan(streams).lay(two).tokens.tolist() == [1, 13, 2, 14, 5, 16]
    ended = flatten("acoustic", ends=True).plan(streams)
    assert ended.lay(two).tokens.tolist() == [20, 1, 13, 2, 14, 21, 20, 5, 16, 21]
    assert [ended.vocabulary.said(token) for token in (1, 13, 20, 21)] == [
        "acoustic.0:1",
        "acoustic.1:3",
        "<bos>",
        "<eos>",
    ]
    assert semantic("acoustic").plan(streams).lay(two).tokens.tolist() == [1, 2, 5]


def test_tokens_may_be_larger_than_the_integers_that_codes_are_stored_in() -> None:
    streams = specs(acoustic=(20, 2_048))  # stored as int16; the last codebook begins at 38,912
    codes = np.full((20, 1), 2_047)
    plan = flatten("acoustic").plan(streams)
    laid = require_invertible(plan, rows(streams, acoustic=[codes]))
    assert laid.tokens.tolist() == [2_048 * (book + 1) - 1 for book in range(20)]
    assert laid.tokens.dtype == np.int32


@pytest.mark.parametrize("kind", ["numbers", "chunks", "missing"])
def test_flatten_says_which_streams_it_cannot_take(kind: str) -> None:
    with pytest.raises(UserError, match=r"^Layout flatten takes .*'acoustic'.*\.$"):
        flatten("acoustic").plan(refused_kinds(specs(acoustic=(2, 10)), "acoustic")[kind])


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (3, "Layout flatten takes 3 codebook(s) of stream 'acoustic', of which 2 are read. Read more, or name another"),
        (0, "Layout flatten takes 1 codebook of stream 'acoustic' or more; 0 were asked for."),
    ],
)
def test_codebooks_that_are_not_read_are_refused(asked: int, said: str) -> None:
    with pytest.raises(UserError) as caught:
        flatten("acoustic", asked).plan(specs(acoustic=(2, 10)))
    assert str(caught.value).startswith(said)


def test_a_stream_that_is_misspelt_is_found() -> None:
    with pytest.raises(UserError, match=r"takes stream 'acustic'; there are: acoustic\. Did you mean 'acoustic'\?"):
        flatten("acustic").plan(specs(acoustic=(2, 10)))


def test_runs_of_the_same_tokens_must_have_a_mark_between_them() -> None:
    blocks = books_of("units", spec())
    other = books_of("other", spec())
    one, two, empty = Run("units@0", (0,), block="units"), Run("units@1", (0,), block="units"), Run("other", (0,))
    vocabulary = Vocabulary.of([*blocks, *other, *special("<sep>")])
    SequencePlan((one, Mark("<sep>"), two), vocabulary)
    for parts in ((one, two), (one, empty, two)):  # the one between may have no frames
        with pytest.raises(AssertionError, match="follows a run of the same tokens"):
            SequencePlan(parts, vocabulary)


def test_runs_that_share_a_block_have_the_same_tokens_for_the_same_codes() -> None:
    streams = {"units@0": spec(1, 5), "units@1": spec(1, 5)}
    vocabulary = Vocabulary.of([("units", 0, 5), *special("<sep>")])
    plan = SequencePlan(
        (Run("units@0", (0,), block="units"), Mark("<sep>"), Run("units@1", (0,), block="units")), vocabulary
    )
    two = rows(streams, **{"units@0": [[1, 2], []], "units@1": [[2], [4]]})
    assert require_invertible(plan, two).tokens.tolist() == [1, 2, 5, 2, 5, 4]


def test_a_prompt_is_the_beginning_of_a_run_that_no_loss_is_asked_for() -> None:
    streams = specs(acoustic=(2, 10))
    vocabulary = Vocabulary.of([*books_of("acoustic", streams["acoustic"]), *special("<eos>")])
    plan = SequencePlan((Run("acoustic", (0, 1), prompt=2), Mark("<eos>")), vocabulary)
    made = rows(streams, acoustic=[np.zeros((2, 3)), np.zeros((2, 1)), np.zeros((2, 0))])
    laid = require_invertible(plan, made)
    assert laid.loss_S is not None
    assert laid.loss_S.tolist() == [*[False] * 4, True, True, True, *[False] * 2, True, True]


def test_laying_out_twice_gives_the_same() -> None:
    streams = specs(acoustic=(2, 10))
    plan, made = flatten("acoustic", ends=True).plan(streams), rows(streams, acoustic=[[[1], [2]]])
    require_same_laid(plan.lay(made), plan.lay(plan.invert(plan.lay(made))))


@pytest.mark.parametrize(
    ("tokens", "said"),
    [
        ([20, 1, 13], "no <eos> at step 3"),
        ([20, 1, 13, 2, 21], "3 tokens at step 1, of 2 codebooks"),
        ([20, 13, 1, 21], "do not take turns"),
        ([20, 1, 13, 21, 21], "1 steps more"),
        ([1, 13], "no <bos> at step 0"),
    ],
)
def test_what_is_wrong_with_steps_is_said(tokens: list[int], said: str) -> None:
    plan = flatten("acoustic", ends=True).plan(specs(acoustic=(2, 10)))
    with pytest.raises(ValueError, match=said):
        plan.invert(Laid(np.array(tokens)))


def test_a_damaged_vocabulary_is_refused() -> None:
    made = flatten("acoustic", ends=True).plan(specs(acoustic=(2, 10))).vocabulary.to_json()
    made[1]["offset"] += 1
    with pytest.raises(UserError, match=r"acoustic begins at 11 in column 0, expected 10"):
        Vocabulary.from_json(made)


def test_a_number_of_codebooks_that_is_text_is_refused_in_a_sentence(tmp_path: Path) -> None:
    layout: Any = flatten("units", codebooks="3")  # pyright: ignore[reportArgumentType]
    streams = {"units": spec(3, 7)}
    write_root(tmp_path / "root", streams, [{"units": random_rows(streams["units"], [4], np.random.default_rng(0))}])
    reads: Any = (None, ["units"], {"units": 3}, {"units": "3"})
    for read in reads:
        with pytest.raises(UserError, match=r"umber of codebooks of stream 'units' is '3'; expected a whole number\.$"):
            TokenDataset(str(tmp_path / "root"), read, pack=Pack(layout, 16))
    with pytest.raises(UserError, match=r"is '3'; expected a whole number\.$"):
        layout.plan(streams)
