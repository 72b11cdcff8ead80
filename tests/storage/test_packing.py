"""Packing: every token once, in sequences of one length, by each of the three methods."""

from collections import defaultdict
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from wavemill.storage.packing import Packed, PackingMethod, pack

METHODS = list(PackingMethod)

# many empty segments, many that fill sequences exactly, some that are longer than several
segments = st.lists(st.one_of(st.just(0), st.integers(0, 6), st.integers(0, 60)), max_size=40)
lengths = st.integers(1, 16)
each_method = pytest.mark.parametrize("method", METHODS)


class Piece(NamedTuple):
    segment: int
    start: int
    size: int
    sequence: int
    place: int


def pieces(packed: Packed) -> list[Piece]:
    columns = (packed.segment_P, packed.start_P, packed.size_P, packed.sequence_P, packed.place_P)
    return [Piece(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]


def packed_pieces(sizes: list[int], length: int, method: PackingMethod) -> tuple[int, list[Piece]]:
    packed = pack(np.array(sizes, dtype=np.int64), length, method)
    return packed.num_sequences, pieces(packed)


@each_method
@given(segments, lengths)
def test_every_token_of_every_segment_lies_in_one_place(method: PackingMethod, sizes: list[int], length: int) -> None:
    num_sequences, found = packed_pieces(sizes, length, method)
    tokens = [(piece.segment, piece.start + token) for piece in found for token in range(piece.size)]
    places = [(piece.sequence, piece.place + token) for piece in found for token in range(piece.size)]
    assert sorted(tokens) == [(segment, token) for segment, size in enumerate(sizes) for token in range(size)]
    assert len(set(places)) == len(places)
    for sequence, place in places:
        assert 0 <= sequence < num_sequences
        assert 0 <= place < length


@each_method
@given(segments, lengths)
def test_no_piece_crosses_the_end_of_its_sequence_and_none_is_empty(
    method: PackingMethod, sizes: list[int], length: int
) -> None:
    for piece in packed_pieces(sizes, length, method)[1]:
        assert piece.size > 0
        assert piece.place + piece.size <= length


@each_method
@given(segments, lengths)
def test_pieces_come_by_sequence_and_place_and_no_sequence_is_empty(
    method: PackingMethod, sizes: list[int], length: int
) -> None:
    num_sequences, found = packed_pieces(sizes, length, method)
    assert found == sorted(found, key=lambda piece: (piece.sequence, piece.place))
    assert {piece.sequence for piece in found} == set(range(num_sequences))


@each_method
@given(segments, lengths)
def test_sequences_are_filled_from_their_beginning_without_holes(
    method: PackingMethod, sizes: list[int], length: int
) -> None:
    filled: dict[int, int] = defaultdict(int)
    for piece in packed_pieces(sizes, length, method)[1]:
        assert piece.place == filled[piece.sequence]
        filled[piece.sequence] += piece.size


@pytest.mark.parametrize("method", [PackingMethod.CONCATENATE, PackingMethod.SINGLE])
@given(segments, lengths)
def test_segments_are_met_in_order_and_read_from_first_to_last(
    method: PackingMethod, sizes: list[int], length: int
) -> None:
    _, found = packed_pieces(sizes, length, method)
    assert [(piece.segment, piece.start) for piece in found] == sorted((piece.segment, piece.start) for piece in found)


@given(segments, lengths)
def test_concatenation_leaves_no_gap_but_at_the_very_end(sizes: list[int], length: int) -> None:
    num_sequences, found = packed_pieces(sizes, length, PackingMethod.CONCATENATE)
    assert num_sequences == -(-sum(sizes) // length)
    begin = 0
    for piece in found:
        assert piece.sequence * length + piece.place == begin
        begin += piece.size
    assert begin == sum(sizes)


@given(segments, lengths)
def test_concatenation_cuts_segments_at_the_ends_of_sequences_only(sizes: list[int], length: int) -> None:
    _, found = packed_pieces(sizes, length, PackingMethod.CONCATENATE)
    for piece in found:
        if piece.start > 0:
            assert piece.place == 0
        if piece.start + piece.size < sizes[piece.segment]:
            assert piece.place + piece.size == length


@given(segments, lengths)
def test_single_gives_every_piece_a_sequence_of_its_own(sizes: list[int], length: int) -> None:
    num_sequences, found = packed_pieces(sizes, length, PackingMethod.SINGLE)
    assert [piece.sequence for piece in found] == list(range(num_sequences))
    assert {piece.place for piece in found} <= {0}


@pytest.mark.parametrize("method", [PackingMethod.BEST_FIT, PackingMethod.SINGLE])
@given(segments, lengths)
def test_a_segment_that_fits_is_not_cut_and_a_longer_one_only_where_it_must_be(
    method: PackingMethod, sizes: list[int], length: int
) -> None:
    cuts: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for piece in packed_pieces(sizes, length, method)[1]:
        cuts[piece.segment].append((piece.start, piece.size))
    for segment, found in cuts.items():
        starts = range(0, sizes[segment], length)
        assert sorted(found) == [(start, min(length, sizes[segment] - start)) for start in starts]


def best_fit_naively(sizes: list[int], length: int) -> list[Piece]:
    """Best fit decreasing by looking at every sequence for every piece; a sequence is a list of pieces."""
    cut = [
        (segment, start, min(length, size - start))
        for segment, size in enumerate(sizes)
        for start in range(0, size, length)
    ]
    sequences: list[list[tuple[int, int, int]]] = []
    for piece in sorted(cut, key=lambda piece: -piece[2]):
        best = None
        for sequence in sequences:
            room = length - sum(size for _, _, size in sequence)
            if room >= piece[2] and (best is None or room < best[0]):
                best = room, sequence
        if best is None:
            sequences.append([piece])
        else:
            best[1].append(piece)
    laid_out = []
    for index, sequence in enumerate(sorted(sorted(sequence) for sequence in sequences)):
        place = 0
        for segment, start, size in sequence:
            laid_out.append(Piece(segment, start, size, index, place))
            place += size
    return laid_out


@given(segments, lengths)
def test_best_fit_is_best_fit_decreasing(sizes: list[int], length: int) -> None:
    assert packed_pieces(sizes, length, PackingMethod.BEST_FIT)[1] == best_fit_naively(sizes, length)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32 - 1))
def test_best_fit_is_best_fit_decreasing_for_hundreds_of_segments(seed: int) -> None:
    sizes = np.random.default_rng(seed).integers(0, 90, 200).tolist()
    assert packed_pieces(sizes, 64, PackingMethod.BEST_FIT)[1] == best_fit_naively(sizes, 64)


def test_best_fit_wastes_little_of_many_short_segments() -> None:
    sizes = np.random.default_rng(0).integers(1, 300, 2_000).tolist()
    num_sequences, _ = packed_pieces(sizes, 1024, PackingMethod.BEST_FIT)
    assert num_sequences * 1024 <= 1.01 * sum(sizes)


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (
            PackingMethod.CONCATENATE,
            [(0, 0, 3, 0, 0), (2, 0, 1, 0, 3), (2, 1, 4, 1, 0), (2, 5, 4, 2, 0), (3, 0, 2, 3, 0), (4, 0, 1, 3, 2)],
        ),
        (
            PackingMethod.BEST_FIT,
            [(0, 0, 3, 0, 0), (2, 8, 1, 0, 3), (2, 0, 4, 1, 0), (2, 4, 4, 2, 0), (3, 0, 2, 3, 0), (4, 0, 1, 3, 2)],
        ),
        (
            PackingMethod.SINGLE,
            [(0, 0, 3, 0, 0), (2, 0, 4, 1, 0), (2, 4, 4, 2, 0), (2, 8, 1, 3, 0), (3, 0, 2, 4, 0), (4, 0, 1, 5, 0)],
        ),
    ],
)
def test_a_small_example_looks_as_it_would_on_paper(method: PackingMethod, expected: list[tuple[int, ...]]) -> None:
    num_sequences, found = packed_pieces([3, 0, 9, 2, 1], 4, method)
    assert found == [Piece(*row) for row in expected]
    assert num_sequences == expected[-1][3] + 1


@each_method
@pytest.mark.parametrize("sizes", [[], [0], [0, 0, 0]])
def test_nothing_packs_into_no_sequences(method: PackingMethod, sizes: list[int]) -> None:
    assert packed_pieces(sizes, 8, method) == (0, [])


@each_method
def test_positions_are_whole_numbers_even_where_there_are_none(method: PackingMethod) -> None:
    for sizes in ([], [0], [5, 0, 20]):
        packed = pack(np.array(sizes, dtype=np.int64), 8, method)
        for column in (packed.segment_P, packed.start_P, packed.size_P, packed.sequence_P, packed.place_P):
            assert column.dtype == np.int64
