"""Frames of numbers, one a step, with what stands in front of them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from streams_made import random_rows, refused_kinds, require_invertible, rows, rows_of_streams, spec, text_spec
from wavemill.pipelines.layouts.continuous import continuous
from wavemill.storage.layouts import Laid, StreamRows
from wavemill.tokenizers.spec import UserError

LATENTS = spec(0, 0, dim=3)
SPECS = {"text": text_spec(7), "latents": LATENTS}
FRAMES = np.arange(9, dtype=np.float16).reshape(3, 3)


def latents(*counts: int) -> dict[str, StreamRows]:
    """Segments of so many frames, the numbers of which count up."""
    total = sum(counts)
    frames_TD = np.arange(total * 3, dtype=np.float16).reshape(total, 3)
    return {"latents": StreamRows(np.array(counts, dtype=np.int64), (), frames_TD)}


@pytest.mark.parametrize("prefix", [None, "text"])
@pytest.mark.parametrize("ends", [False, True])
@given(st.data())
def test_what_went_in_comes_out(prefix: str | None, ends: bool, data: st.DataObject) -> None:
    layout = continuous("latents", prefix=prefix, ends=ends)
    taken = {name: SPECS[name] for name in layout.streams}
    laid = require_invertible(layout.plan(taken), data.draw(rows_of_streams(taken)))
    assert laid.frames["latents"].dtype == np.float16


def test_each_frame_is_a_step_between_a_beginning_and_an_end() -> None:
    plan = continuous("latents").plan(SPECS)
    frame, bos, eos = (plan.vocabulary.token(name) for name in ("<frame>", "<bos>", "<eos>"))
    laid = plan.lay(latents(2, 0, 1))
    assert laid.tokens.tolist() == [bos, frame, frame, eos, bos, eos, bos, frame, eos]
    assert laid.loss_S is None
    assert plan.frame_tokens == {"latents": frame}
    np.testing.assert_array_equal(laid.frames["latents"], FRAMES)
    alone = continuous("latents", ends=False).plan(SPECS)
    assert alone.lay(latents(2, 0, 1)).tokens.tolist() == [1, 1, 1]  # not 0, which stands where there is padding
    assert alone.column_sizes == (2,)


def test_a_text_in_front_is_given_and_the_frames_are_predicted() -> None:
    plan = continuous("latents", prefix="text").plan(SPECS)
    frame, bos, eos = (plan.vocabulary.token(name) for name in ("<frame>", "<bos>", "<eos>"))
    laid = plan.lay({**rows(SPECS, text=[[4, 6], []]), **latents(1, 2)})
    assert laid.tokens.tolist() == [4, 6, bos, frame, eos, bos, frame, frame, eos]
    assert laid.loss_S is not None
    assert laid.loss_S.tolist() == [False, False, False, True, True, False, True, True, True]


def test_only_the_first_codebook_of_what_stands_in_front_is_read() -> None:
    specs = {"acoustic": spec(3, 5), "latents": LATENTS}
    layout = continuous("latents", prefix="acoustic")
    assert layout.streams == {"acoustic": 1, "latents": None}
    taken = {**random_rows_of(specs), **latents(1)}
    assert layout.plan(specs).lay(taken).tokens[:2].tolist() == taken["acoustic"].books[0].tolist()


def random_rows_of(specs: dict) -> dict[str, StreamRows]:
    return {"acoustic": random_rows(specs["acoustic"], [2], np.random.default_rng(0))}


@pytest.mark.parametrize(
    ("tokens", "num_frames"),
    [
        ([8, 7, 7, 9], 1),  # fewer frames than steps for them
        ([7, 8, 9], 1),  # a frame before the beginning
        ([8, 7], 1),  # no end
        ([8, 7, 9, 9], 1),
        ([8, 7, 3, 9], 1),  # text behind a frame
        ([8, 9, 7], 1),
        ([], 0),
    ],
)
def test_steps_that_no_segment_gives_are_refused(tokens: list[int], num_frames: int) -> None:
    plan = continuous("latents", prefix="text").plan(SPECS)
    with pytest.raises(ValueError, match=r"\w"):
        plan.invert(Laid(np.array(tokens, dtype=np.int64), None, {"latents": FRAMES[:num_frames]}))
    with pytest.raises(ValueError, match="no frames of latents"):
        plan.invert(Laid(np.array([8, 9])))


def test_streams_of_another_kind_are_refused_in_a_sentence() -> None:
    asked = continuous("latents", prefix="text")
    for specs in refused_kinds(SPECS, "text").values():
        with pytest.raises(UserError, match=r"^Layout continuous takes .*'text'.*\.$"):
            asked.plan(specs)
    codes, chunked = (
        {**SPECS, "latents": each} for each in (spec(1), spec(0, 0, dim=3, chunk_length=9, chunk_stride=8))
    )
    with pytest.raises(UserError, match=r"'latents' \(toy\) holds codes"):
        asked.plan(codes)
    with pytest.raises(UserError, match="'latents' is made of chunks"):
        asked.plan(chunked)
    with pytest.raises(UserError, match=r"takes stream 'latent', .*: text, latents\. Did you mean 'latents'\?"):
        continuous("latent").plan(SPECS)
