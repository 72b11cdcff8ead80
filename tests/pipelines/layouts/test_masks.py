"""What training hides: the shares that papers say, nothing outside a segment, and all of it from the generator."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from streams_made import require_invertible, rows_of_streams, spec, specs
from torch import Tensor
from wavemill.pipelines.layouts.masks import (
    choose,
    hide,
    masked,
    most_confident,
    soundstorm_masks,
    span_masks,
    uncovered_by_iteration,
)
from wavemill.tokenizers.spec import UserError

LEVELS = 4


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def packed(*sequences: list[int]) -> tuple[Tensor, Tensor]:
    """Segment ids and positions of sequences with segments of so many steps, as `PackedBatch` has them."""
    length = max(sum(sizes) for sizes in sequences) + 1
    ids, positions = torch.zeros(2, len(sequences), length, dtype=torch.int32)
    for row, sizes in enumerate(sequences):
        begin = 0
        for number, size in enumerate(sizes, start=1):
            ids[row, begin : begin + size] = number
            positions[row, begin : begin + size] = torch.arange(size)
            begin += size
    return ids, positions


PACKED = st.lists(st.lists(st.integers(1, 12), max_size=4), min_size=1, max_size=3).map(lambda sizes: packed(*sizes))


@given(PACKED, st.integers(0, 2**32), st.booleans())
def test_soundstorm_asks_for_one_level_and_hides_the_finer_ones(
    steps: tuple[Tensor, Tensor], seed: int, prompt: bool
) -> None:
    ids_BL, positions_BL = steps
    hidden_BLQ, asked_BLQ = soundstorm_masks(ids_BL, positions_BL, LEVELS, generator(seed), prompt=prompt)
    assert not (asked_BLQ & ~hidden_BLQ).any()
    assert not hidden_BLQ[ids_BL == 0].any()
    for row in range(len(ids_BL)):
        for number in range(1, int(ids_BL[row].max()) + 1):
            hidden_TQ, asked_TQ = (each[row, ids_BL[row] == number] for each in (hidden_BLQ, asked_BLQ))
            (level,) = asked_TQ.any(dim=0).nonzero().flatten().tolist()  # exactly one, and always something of it
            assert not hidden_TQ[:, :level].any()
            assert (hidden_TQ[:, level] == asked_TQ[:, level]).all()
            finer_TQ = hidden_TQ[:, level + 1 :]
            if level + 1 < LEVELS:
                begins = finer_TQ[:, 0].long().argmax()  # the frames before are the prompt
                assert prompt or begins == 0
                assert (finer_TQ == (torch.arange(len(finer_TQ)) >= begins)[:, None]).all()
                assert not asked_TQ[:begins].any()


def test_soundstorms_shares_follow_the_cosine() -> None:
    ids_BL, positions_BL = packed(*[[50] * 20] * 200)
    asked_BLQ = soundstorm_masks(ids_BL, positions_BL, LEVELS, generator(), prompt=False).asked_BLQ
    per_segment = torch.stack([asked_BLQ[ids_BL == number].view(200, 50, LEVELS) for number in range(1, 21)])
    share = per_segment.any(dim=-1).double().mean(dim=-1).flatten()
    assert float(share.mean()) == pytest.approx(2 / math.pi + 0.01, abs=0.015)  # of cos(u); half a frame is rounded up
    assert float((share > math.cos(math.pi / 4)).double().mean()) == pytest.approx(0.5, abs=0.03)
    level = per_segment.any(dim=2).double().flatten(0, 1)
    assert level.mean(dim=0).tolist() == pytest.approx([1 / LEVELS] * LEVELS, abs=0.03)
    with_prompt = soundstorm_masks(ids_BL, positions_BL, LEVELS, generator()).asked_BLQ
    assert float(with_prompt.sum() / asked_BLQ.sum()) == pytest.approx(0.5, abs=0.03)  # uniform prompts give half


def test_every_frame_behind_a_prompt_is_as_likely_to_be_asked_for() -> None:
    ids_BL, positions_BL = packed(*[[10]] * 4000)
    asked_BLQ = soundstorm_masks(ids_BL, positions_BL, 1, generator(), prompt=False).asked_BLQ
    by_place = asked_BLQ[:, :10, 0].double().mean(dim=0)
    assert by_place.tolist() == pytest.approx([float(by_place.mean())] * 10, abs=0.03)


@given(PACKED, st.integers(0, 2**32), st.integers(1, 5))
def test_spans_begin_and_end_within_their_segment(steps: tuple[Tensor, Tensor], seed: int, span: int) -> None:
    ids_BL, _ = steps
    hidden_BL = span_masks(ids_BL, generator(seed), span=span)
    assert not hidden_BL[ids_BL == 0].any()
    for row in range(len(ids_BL)):
        for number in range(1, int(ids_BL[row].max()) + 1):
            hidden_T = hidden_BL[row, ids_BL[row] == number].tolist()
            runs = "".join("x" if each else " " for each in hidden_T).split()
            assert runs
            at_end = hidden_T[-1]
            assert all(len(run) >= span for run in (runs[:-1] if at_end else runs))


def test_span_shares_are_huberts_and_berts() -> None:
    ids_BL, _ = packed(*[[500, 500]] * 40)
    huberts = span_masks(ids_BL, generator())[:, :1000].double().mean()
    assert float(huberts) == pytest.approx(1 - (1 - 0.08) ** 10, abs=0.02)
    berts = span_masks(ids_BL, generator(), share_of_starts=0.15, span=1)[:, :1000].double().mean()
    assert float(berts) == pytest.approx(0.15, abs=0.002)
    short, _ = packed(*[[30] * 10] * 200)  # 2.4 starts each
    starts = span_masks(short, generator(), span=1)[:, :300].double().mean()
    assert float(starts) == pytest.approx(0.08, abs=0.004)


@given(st.integers(0, 2**32))
def test_the_generator_alone_decides(seed: int) -> None:
    ids_BL, positions_BL = packed([5, 9], [20])
    codes_BL = torch.arange(ids_BL.numel()).view(ids_BL.shape) % 7

    def drawn(seed: int) -> list[Tensor]:
        source = generator(seed)
        spans = span_masks(ids_BL, source)
        return [*soundstorm_masks(ids_BL, positions_BL, LEVELS, source), spans, hide(codes_BL, spans, 7, 7, source)]

    torch.manual_seed(seed)
    first = drawn(seed)
    torch.manual_seed(seed + 1)
    assert all(torch.equal(one, other) for one, other in zip(first, drawn(seed), strict=True))
    assert any(not torch.equal(one, other) for one, other in zip(first, drawn(seed + 1), strict=True))


@given(PACKED, st.integers(0, 2**32), st.data())
def test_as_many_steps_as_asked_for_are_chosen(steps: tuple[Tensor, Tensor], seed: int, data: st.DataObject) -> None:
    ids_BL, _ = steps
    num = int(ids_BL.max()) + 1
    there = torch.stack([(ids_BL == number).sum(dim=1) for number in range(num)], dim=1)
    wanted_BM = torch.tensor([[data.draw(st.integers(0, int(count))) for count in row] for row in there])
    chosen_BL = choose(ids_BL, wanted_BM, generator(seed))
    assert not chosen_BL[ids_BL == 0].any()
    for number in range(1, num):
        assert ((chosen_BL & (ids_BL == number)).sum(dim=1) == wanted_BM[:, number]).all()


def test_hidden_codes_are_masked_changed_or_kept_in_berts_shares() -> None:
    codes = torch.arange(100_000) % 50
    hidden = torch.arange(100_000) % 2 == 0
    seen = hide(codes, hidden, 50, 50, generator())
    assert torch.equal(seen[~hidden], codes[~hidden])
    of_hidden = seen[hidden]
    assert float((of_hidden == 50).double().mean()) == pytest.approx(0.8, abs=0.01)
    assert float((of_hidden == codes[hidden]).double().mean()) == pytest.approx(0.1 + 0.1 / 50, abs=0.01)
    other = of_hidden[(of_hidden != 50) & (of_hidden != codes[hidden])]
    assert set(other.tolist()) == set(range(50))
    assert (hide(codes, hidden, 50, 50, generator(), shares=(1, 0, 0))[hidden] == 50).all()
    with pytest.raises(UserError, match="give three that add up to 1"):
        hide(codes, hidden, 50, 50, generator(), shares=(0.8, 0.1, 0.2))


@given(st.integers(0, 300), st.integers(1, 40))
def test_parallel_decoding_uncovers_all_frames_few_at_first(num_frames: int, num_iterations: int) -> None:
    uncovered = uncovered_by_iteration(num_frames, num_iterations)
    assert sum(uncovered) == num_frames
    assert all(count > 0 for count in uncovered)
    assert len(uncovered) == min(num_frames, num_iterations)


def test_the_decoding_schedule_is_the_cosine() -> None:
    assert uncovered_by_iteration(100, 1) == [100]
    left = [100 * math.cos(math.pi / 2 * done / 4) for done in (1, 2, 3)]
    assert left == pytest.approx([92.388, 70.711, 38.268], abs=1e-3)
    assert uncovered_by_iteration(100, 4) == [100 - 92, 92 - 70, 70 - 38, 38]
    with pytest.raises(UserError, match="0 iterations"):
        uncovered_by_iteration(10, 0)


def test_the_most_confident_hidden_steps_are_uncovered() -> None:
    scores = torch.tensor([[0.5, 0.9, 0.9, 0.1], [0.3, -torch.inf, 0.2, 0.1], [1.0, 1.0, 1.0, 1.0]])
    hidden = torch.tensor([[True, False, True, True], [False, True, False, True], [False, True, True, True]])
    uncovered = most_confident(scores, hidden, torch.tensor([2, 2, 1]))
    assert uncovered.tolist() == [[True, False, True, False], [False, True, False, True], [False, True, False, False]]


@given(st.data(), st.integers(1, 3))
def test_masked_units_are_the_units_and_a_mask_beside_them(data: st.DataObject, num_codebooks: int) -> None:
    made = specs(units=(num_codebooks, 7))
    plan = masked("units").plan(made)
    laid = require_invertible(plan, data.draw(rows_of_streams(made)))
    for column in range(num_codebooks):
        mask = plan.vocabulary.token("<mask>", column)
        assert mask < plan.column_sizes[column]
        assert not (laid.tokens.reshape(-1, num_codebooks)[:, column] == mask).any()
    assert laid.tokens.ndim == (1 if num_codebooks == 1 else 2)


def test_masked_units_need_units() -> None:
    with pytest.raises(UserError, match="Layout masked takes codes; stream 'x' holds frames of 4 numbers"):
        masked("x").plan({"x": spec(0, 0, dim=4)})
    with pytest.raises(UserError, match=r"Layout masked takes 2 codebook\(s\) of stream 'x', of which 1 is read"):
        masked("x", 2).plan({"x": spec(1, 4)})
