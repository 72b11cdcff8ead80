"""The reference Transformer: what a step sees, packed, alone or a few steps at a time.

Axes: B sequences, L steps, D width, Q columns, V tokens of a column.
"""

import dataclasses

import pytest
import torch
from torch import Tensor
from wavemill.jobs.lm.model import Cache, ModelConfig, TokenModel, num_parameters
from wavemill.tokenizers.spec import UserError

CONFIG = ModelConfig(dim=16, num_layers=2, num_heads=2)
CLOSE = {"rtol": 1e-4, "atol": 1e-6}


def model(*column_sizes: int, seed: int = 0) -> TokenModel:
    torch.manual_seed(seed)
    made = TokenModel(CONFIG, column_sizes)
    for parameter in made.parameters():  # wide enough that what is seen shows
        torch.nn.init.normal_(parameter, std=0.3)
    return made.eval()


def segment(tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens `[L]` or `[L, Q]` as a sequence of one segment, with segment ids and positions."""
    length = len(tokens)
    return tokens[None], torch.ones(1, length, dtype=torch.int32), torch.arange(length)[None]


@pytest.mark.parametrize("stream", ["type", "keys", "forward", "a-stream@1"])
def test_a_stream_of_numbers_may_have_any_name(stream: str):
    made = TokenModel(CONFIG, [5], {stream: 4}, {stream: 3})
    frames = {stream: torch.tensor([[1.0, 0.0, 2.0]])}
    tokens = torch.tensor([[1, 4]])
    moved = (made.embed(tokens, frames) - made.embeddings[0](tokens)).abs().sum(dim=-1)[0]
    assert moved[0] == 0
    assert moved[1] > 0


@torch.no_grad()
def test_a_packed_segment_gives_what_it_gives_alone():
    made, rng = model(20), torch.Generator().manual_seed(1)
    parts = [torch.randint(20, (length,), generator=rng) for length in (5, 1, 7)]
    ids = [torch.full((len(part),), number + 1) for number, part in enumerate(parts)]
    padding = torch.zeros(3, dtype=torch.int64)
    packed = made(
        torch.cat([*parts, padding])[None],
        torch.cat([*ids, padding])[None],
        torch.cat([*(torch.arange(len(part)) for part in parts), padding])[None],
    )[0]
    assert torch.isfinite(packed).all()
    for part, hidden in zip(parts, packed.split([5, 1, 7, 3]), strict=False):
        assert torch.allclose(hidden, made(*segment(part))[0], **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("causal", [True, False])
def test_a_step_sees_those_after_it_only_where_that_is_asked_for(causal: bool):
    made, tokens = model(20), torch.arange(8)
    other = tokens.clone()
    other[5] = 19
    before, after = (made(*segment(each), causal=causal)[0] for each in (tokens, other))
    moved = (before - after).abs().amax(dim=1) > 1e-4
    assert moved.tolist() == [not causal] * 5 + [True] * 3


@torch.no_grad()
def test_steps_given_a_few_at_a_time_give_what_they_give_together():
    made = model(20, 30)
    tokens = torch.randint(20, (9, 2), generator=torch.Generator().manual_seed(2))
    whole, cache, found = made(*segment(tokens)), Cache(), []
    batch = segment(tokens)
    for begin, end in ((0, 4), (4, 5), (5, 9)):
        assert cache.num_steps == begin
        found.append(made(*(each[:, begin:end] for each in batch), cache=cache))
    assert torch.allclose(torch.cat(found, dim=1), whole, **CLOSE)


@torch.no_grad()
def test_positions_tell_steps_apart_by_their_distance_only():
    made, tokens = model(20), torch.tensor([3, 3, 4, 3])
    given, ids, positions = segment(tokens)
    assert torch.allclose(made(given, ids, positions), made(given, ids, positions + 100), rtol=1e-3, atol=1e-4)
    assert not torch.allclose(made(given, ids, positions), made(given, ids, positions * 2), rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_every_column_has_a_say_and_logits_of_its_own():
    made, tokens = model(20, 30), torch.tensor([[1, 2], [3, 4]])
    hidden = made(*segment(tokens))
    assert [made.logits(hidden, column).shape for column in (0, 1)] == [(1, 2, 20), (1, 2, 30)]
    for column in (0, 1):
        other = tokens.clone()
        other[1, column] = 9
        assert not torch.allclose(hidden[0, 1], made(*segment(other))[0, 1])
    assert torch.allclose(
        made.embed(tokens[None]), made.embeddings[0](tokens[None, :, 0]) + made.embeddings[1](tokens[None, :, 1])
    )


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
def test_heads_are_the_embeddings_or_matrices_of_their_own(tied: bool):
    torch.manual_seed(0)
    made = TokenModel(dataclasses.replace(CONFIG, tied=tied), [20, 30])
    hidden = made(*segment(torch.tensor([[1, 2], [3, 4]])))
    for column in (0, 1):
        same = torch.allclose(made.logits(hidden, column), hidden @ made.embeddings[column].weight.T)
        assert same is tied


def test_a_frame_of_numbers_is_heard_where_its_token_stands_and_learns():
    torch.manual_seed(0)
    made = TokenModel(CONFIG, [12], {"speaker": 11}, {"speaker": 4})
    tokens = torch.tensor([[11, 1, 2], [3, 11, 4]])
    frames_MD = torch.tensor([[1.0, 2, 3, 4], [4, 0, 1, 1]], dtype=torch.float16).requires_grad_()
    given = made.embed(tokens, {"speaker": frames_MD}) - made.embeddings[0](tokens)
    assert (given.abs().amax(dim=2) > 0).tolist() == [[True, False, False], [False, True, False]]
    assert torch.allclose(given[1, 1], made.frames["of-speaker"](frames_MD[1].float()), **CLOSE)
    given.square().sum().backward()
    assert frames_MD.grad is not None
    assert (frames_MD.grad.abs().sum(dim=1) > 0).all()


def test_the_same_seed_gives_the_same_model_and_another_another():
    same, other = model(20, seed=3), model(20, seed=4)
    for first, second in zip(model(20, seed=3).parameters(), same.parameters(), strict=True):
        assert torch.equal(first, second)
    assert not torch.equal(same.embeddings[0].weight, other.embeddings[0].weight)
    assert num_parameters(same) == num_parameters(other) > 0


@pytest.mark.parametrize(("changed", "told"), [({"dim": 18, "num_heads": 4}, "heads"), ({"dropout": 1.0}, "dropout")])
def test_sizes_that_cannot_be_are_refused_in_a_sentence(changed: dict[str, float], told: str):
    with pytest.raises(UserError, match=told):
        ModelConfig(**changed)  # type: ignore[arg-type]
