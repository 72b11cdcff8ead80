"""Tokens made of units give the units back, whatever they are, and say for how long each stands."""

import json
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from wavemill.tokenizers.registry import describe_tokenizer, load_tokenizer
from wavemill.tokenizers.spec import FrameRule, StreamSpec, UserError
from wavemill.tokenizers.tokenizer import SourceStream, TokenizerConfig, Tokens, fingerprint_hash
from wavemill.tokenizers.unit_bpe import MOST_UNITS, UnitModel, fit_bpe

SPEC = StreamSpec(
    tokenizer="toy",
    sample_rate=16_000,
    decode_sample_rate=16_000,
    hop_length=320,
    window_length=400,
    frame_rule=FrameRule.FLOOR,
    num_codebooks=1,
    codebook_size=12,
)
SOURCE = SourceStream("units", SPEC, {"tokenizer": "toy", "weights": "1"})
DEDUPLICATE = TokenizerConfig(tokenizer="deduplicate")
BPE = TokenizerConfig(tokenizer="bpe")
units = st.lists(st.integers(0, 11), max_size=60)


def fitted(sequences: list[list[int]], size: int, num_units: int = 12) -> UnitModel:
    merges = fit_bpe([np.array(each) for each in sequences], num_units=num_units, size=size)
    return UnitModel(num_units, merges, {"stream": "units", "source": fingerprint_hash(SOURCE.fingerprint)})


SPOKEN = [[1, 2, 3, 3, 4] * 3 + [5, 6, 7] * 4, [1, 2, 3, 3, 4, 9, 9, 9, 9] * 2, [5, 6, 7, 8] * 5]
MODEL = fitted(SPOKEN, 24)


def deduplicated(spec: StreamSpec = SPEC) -> Any:
    return load_tokenizer(DEDUPLICATE, source=replace(SOURCE, spec=spec))


def joined(model: UnitModel = MODEL, spec: StreamSpec = SPEC) -> Any:
    return load_tokenizer(BPE, model, source=replace(SOURCE, spec=spec))


def tokens_of(codes: list[list[int]], dtype: torch.dtype = torch.int64) -> Tokens:
    return Tokens(codes_KT=torch.tensor(codes, dtype=dtype))


@settings(max_examples=60, deadline=None)
@given(units, st.sampled_from([torch.int64, torch.int16, torch.int32]))
def test_runs_give_back_their_units(sequence: list[int], dtype: torch.dtype) -> None:
    tokenizer, source = deduplicated(), tokens_of([sequence], dtype)
    tokens = tokenizer.tokens_of_tokens(source)
    restated = [value for place, value in enumerate(sequence) if place == 0 or sequence[place - 1] != value]
    assert tokens.codes_KT.tolist() == [restated]
    assert tokens.codes_KT.dtype == torch.int64
    assert tokens.durations_T is not None
    assert int(tokens.durations_T.sum()) == len(sequence)
    assert torch.equal(tokenizer.source_of(tokens), torch.tensor([sequence], dtype=torch.int64))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), max_size=40))
def test_a_run_of_several_codebooks_is_equal_in_all_of_them(frames: list[tuple[int, int]]) -> None:
    tokenizer = deduplicated(replace(SPEC, num_codebooks=2))
    codes_KT = torch.tensor(frames, dtype=torch.int64).reshape(-1, 2).T
    tokens = tokenizer.tokens_of_tokens(Tokens(codes_KT=codes_KT))
    assert tokens.num_frames == sum(1 for place, one in enumerate(frames) if place == 0 or frames[place - 1] != one)
    assert torch.equal(tokenizer.source_of(tokens), codes_KT)


@settings(max_examples=60, deadline=None)
@given(units)
def test_joined_units_give_back_their_units(sequence: list[int]) -> None:
    tokenizer, source = joined(), tokens_of([sequence], torch.int16)
    tokens = tokenizer.tokens_of_tokens(source)
    assert torch.equal(tokenizer.source_of(tokens), source.codes_KT.long())
    assert tokens.durations_T is not None
    assert tokens.durations_T.tolist() == [len(MODEL.parts[token]) for token in tokens.codes_KT[0].tolist()]
    assert tokens.codes_KT.tolist() == [_merged(sequence, MODEL)]


def test_joined_runs_last_as_long_as_their_runs() -> None:
    runs = deduplicated()
    spec = replace(runs.spec, tokenizer="deduplicate")
    [sequence] = SPOKEN[:1]
    source = runs.tokens_of_tokens(tokens_of([sequence]))
    model = fitted([source.codes_KT[0].tolist()], 20)
    tokenizer = joined(model, spec)
    tokens = tokenizer.tokens_of_tokens(source)
    assert source.durations_T is not None
    assert tokens.durations_T is not None
    ends = np.cumsum([len(model.parts[token]) for token in tokens.codes_KT[0].tolist()])
    until = np.concatenate([[0], np.cumsum(source.durations_T.numpy())])
    assert np.cumsum(tokens.durations_T.numpy()).tolist() == until[ends].tolist()
    assert torch.equal(tokenizer.source_of(tokens), source.codes_KT)
    assert len(ends) < source.num_frames


def test_a_frequent_sequence_becomes_one_token_and_fewer_are_needed() -> None:
    assert MODEL.size == 24
    assert (1, 2, 3, 3, 4) in MODEL.parts
    tokens = joined().tokens_of_tokens(tokens_of(SPOKEN[:1]))
    assert tokens.num_frames < len(SPOKEN[0]) / 2


def test_fitting_again_gives_the_same_model_in_every_order_of_equal_counts() -> None:
    assert fitted(SPOKEN, 24) == MODEL
    assert fitted(SPOKEN[::-1], 24).merges == MODEL.merges
    assert fitted(SPOKEN, 24).sha256 == MODEL.sha256
    assert fitted(SPOKEN, 20).merges == MODEL.merges[: 20 - 12]
    assert fitted(SPOKEN, 20).sha256 != MODEL.sha256


def test_a_model_survives_its_file() -> None:
    again = UnitModel.from_bytes(MODEL.to_bytes(), name="mine")
    assert again == MODEL
    assert again.to_bytes() == MODEL.to_bytes()


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "other"},
        {"num_units": 0},
        {"num_units": MOST_UNITS + 1},
        {"merges": [[0, 1, 13]]},
        {"merges": [[0, 12, 12]]},
        {"merges": [[-1, 0, 12]]},
        {"merges": [[0, 1]]},
        {"merges": 7},
        {"story": 7},
    ],
)
def test_a_file_that_is_no_model_is_refused(changes: dict[str, Any]) -> None:
    content = {**json.loads(MODEL.to_bytes()), **changes}
    with pytest.raises(UserError, match=r"mine is no model of units \(.*\)\. Fit one"):
        UnitModel.from_bytes(json.dumps(content).encode(), name="mine")
    with pytest.raises(UserError, match="mine is no model of units"):
        UnitModel.from_bytes(MODEL.to_bytes()[:-9], name="mine")


def test_units_beyond_a_plane_of_characters_are_told_apart_and_too_many_refused() -> None:
    last, most = [65_533, 65_534, 65_539, 0] * 2, 65_540
    tokenizer = joined(fitted([last], most + 2, most), replace(SPEC, codebook_size=most))
    tokens = tokenizer.tokens_of_tokens(tokens_of([last]))
    assert tokens.num_frames < len(last)
    assert tokenizer.source_of(tokens).tolist() == [last]
    with pytest.raises(UserError, match="has too many for BPE"):
        fit_bpe([], num_units=MOST_UNITS + 1, size=MOST_UNITS + 2)
    with pytest.raises(UserError, match="leaves no room"):
        fit_bpe([], num_units=12, size=12)


def test_the_spec_keeps_the_clock_of_the_source_and_says_that_tokens_last() -> None:
    for tokenizer in (deduplicated(), joined()):
        spec: StreamSpec = tokenizer.spec
        assert (spec.sample_rate, spec.hop_length, spec.frame_rule) == (16_000, 320, FrameRule.FREE)
        assert spec.durations
        assert spec.decode_sample_rate == 0
    assert joined().spec.codebook_size == 24


def test_fingerprints_are_those_of_the_source_and_of_the_model() -> None:
    other = replace(SOURCE, fingerprint={"tokenizer": "toy", "weights": "2"})
    one, two = (describe_tokenizer(DEDUPLICATE, None, source=each).fingerprint for each in (SOURCE, other))
    assert one != two
    smaller = fitted(SPOKEN, 20)
    assert joined(MODEL).fingerprint != joined(smaller).fingerprint
    assert joined(UnitModel(12, MODEL.merges, {**MODEL.story, "seed": 7})).fingerprint == joined(MODEL).fingerprint


def refusal(config: TokenizerConfig, source: SourceStream | None, model: UnitModel | None = None) -> str:
    with pytest.raises(UserError) as refused:
        describe_tokenizer(config, model, source=source)
    return str(refused.value)


def test_sources_that_cannot_be_are_refused() -> None:
    runs = replace(SOURCE, spec=deduplicated().spec)
    assert "has durations already" in refusal(DEDUPLICATE, runs)
    assert "of=STREAM" in refusal(DEDUPLICATE, None)
    wide = replace(SOURCE, spec=replace(SPEC, num_codebooks=2))
    assert "has 2. Name a stream of one." in refusal(BPE, wide, MODEL)
    other = replace(SOURCE, fingerprint={"tokenizer": "toy", "weights": "2"})
    assert "fitted on stream 'units'" in refusal(BPE, other, MODEL)
    more = replace(SOURCE, spec=replace(SPEC, codebook_size=13))
    assert "13 units" in refusal(BPE, more, MODEL)


def _merged(sequence: list[int], model: UnitModel) -> list[int]:
    """Byte-pair encoding by its definition: the earliest merge first, from left to right."""
    tokens = list(sequence)
    while True:
        ranks = {(left, right): rank for rank, (left, right, _) in reversed(list(enumerate(model.merges)))}
        there = [ranks[pair] for pair in pairwise(tokens) if pair in ranks]
        if not there:
            return tokens
        left, right, into = model.merges[min(there)]
        place = 0
        while place < len(tokens) - 1:
            if (tokens[place], tokens[place + 1]) == (left, right):
                tokens[place : place + 2] = [into]
            place += 1


def test_empty_segments_stay_empty() -> None:
    for tokenizer in (deduplicated(), joined()):
        tokens = tokenizer.tokens_of_tokens(Tokens(codes_KT=torch.empty(1, 0, dtype=torch.int64)))
        assert tuple(tokens.codes_KT.shape) == (1, 0)
        assert tokens.durations_T is not None
        assert tuple(tokens.durations_T.shape) == (0,)
        given_back: Tensor = tokenizer.source_of(tokens)
        assert tuple(given_back.shape) == (1, 0)
