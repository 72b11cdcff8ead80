"""Adapters between features and a language model: what a segment gives does not depend on its batch.

Axes: B segments, T frames, C numbers of a frame, S vectors.
"""

import math

import pytest
import torch
from torch import Tensor, nn
from wavemill.jobs.lm.adapters import Projector, Resampler
from wavemill.tokenizers.spec import UserError

COUNTS = [7, 0, 12, 1]
DIM, OUT = 5, 6


def adapter(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "resampler":
        return Resampler(DIM, OUT, num_queries=4, width=16, num_heads=2).eval()
    return Projector(DIM, OUT, stack=3).eval()


def segments() -> list[Tensor]:
    rng = torch.Generator().manual_seed(1)
    return [torch.randn(count, DIM, generator=rng) for count in COUNTS]


def batched(parts: list[Tensor], *, fill: float) -> tuple[Tensor, Tensor]:
    longest = max(len(part) for part in parts) + 2
    frames_BTC = torch.stack([torch.cat([part, torch.full((longest - len(part), DIM), fill)]) for part in parts])
    return frames_BTC, torch.tensor([len(part) for part in parts])


@pytest.mark.parametrize("name", ["resampler", "projector"])
def test_a_segment_gives_the_same_alone_and_in_a_batch_whatever_stands_behind_it(name: str):
    made, parts = adapter(name), segments()
    for fill in (0.0, 1e4, math.nan):
        vectors_BSD, num_B = made(*batched(parts, fill=fill))
        for part, vectors_SD, num in zip(parts, vectors_BSD, num_B.tolist(), strict=True):
            alone_1SD, (alone,) = made(part[None], torch.tensor([len(part)]))
            assert num == alone
            assert torch.allclose(vectors_SD[:num], alone_1SD[0, :num], rtol=1e-4, atol=1e-5)
            assert not vectors_SD[num:].any()


def test_a_projector_gives_a_vector_for_each_started_stack_and_a_resampler_always_as_many():
    vectors_BSD, num_B = adapter("projector")(*batched(segments(), fill=0.0))
    assert num_B.tolist() == [3, 0, 4, 1]
    assert vectors_BSD.shape == (4, 5, OUT)
    vectors_BSD, num_B = adapter("resampler")(*batched(segments(), fill=0.0))
    assert num_B.tolist() == [4] * 4
    assert vectors_BSD.shape == (4, 4, OUT)
    assert Resampler(DIM, OUT)(torch.zeros(2, 3, DIM), torch.tensor([3, 2]))[0].shape == (2, 32, OUT)


@pytest.mark.parametrize("name", ["resampler", "projector"])
def test_every_frame_has_a_say_and_its_place_too(name: str):
    made, (frames_TC, *_) = adapter(name), segments()
    given = frames_TC[None].clone().requires_grad_()
    vectors_1SD, _ = made(given, torch.tensor([7]))
    vectors_1SD.square().sum().backward()
    assert given.grad is not None
    assert (given.grad[0].abs().sum(dim=1) > 0).all()
    turned_1SD, _ = made(frames_TC.flip(0)[None], torch.tensor([7]))
    assert not torch.allclose(vectors_1SD, turned_1SD, atol=1e-3)


@pytest.mark.parametrize("name", ["resampler", "projector"])
def test_frames_are_taken_as_tables_have_them(name: str):
    made = adapter(name)
    frames_BTC, num_B = batched([part.half() for part in segments()], fill=0.0)
    halves, _ = made(frames_BTC.half(), num_B)
    floats, _ = made(frames_BTC.half().float(), num_B)
    assert halves.dtype == torch.float32
    assert torch.equal(halves, floats)


def test_sizes_that_cannot_be_are_told():
    with pytest.raises(UserError, match="must be 1 or more"):
        Projector(DIM, OUT, stack=0)
    with pytest.raises(UserError, match="width 10 has 4 heads"):
        Resampler(DIM, OUT, width=10)
