"""Residual quantization against a naive search in float64.

Axes: N frames, D dimensions, C centroids, Q stages.
"""

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from numpy.typing import NDArray
from torch import Tensor
from wavemill.tokenizers.codebook import Codebook
from wavemill.tokenizers.quantize import BLOCK_FRAMES, GroupedQuantizer, ResidualQuantizer, open_quantizer
from wavemill.tokenizers.registry import load_features
from wavemill.tokenizers.spec import UserError
from wavemill.tokenizers.tokenizer import TokenizerConfig

NEAR_TIE = 1e-5  # of the squared distance: below it, float32 may choose either


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=generator(seed))


def gaps_where_codes_first_differ(frames_ND: Tensor, centroids_QCD: Tensor, codes_QN: Tensor) -> list[float]:
    """How much further, relatively, the chosen centroid is than the nearest, at the first stage that is not nearest.

    One number for each frame that differs anywhere from the search in float64 over explicit differences.
    """
    gaps = []
    residual_ND = frames_ND.numpy().astype(np.float64)
    alike_N = np.ones(len(residual_ND), dtype=bool)
    for centroids_CD, codes_N in zip(centroids_QCD.numpy().astype(np.float64), codes_QN.numpy(), strict=True):
        distances_NC = squared_distances(residual_ND, centroids_CD)
        nearest_N = distances_NC.argmin(axis=1)
        for frame in np.flatnonzero(alike_N & (nearest_N != codes_N)):
            nearest, chosen = distances_NC[frame, [nearest_N[frame], codes_N[frame]]]
            gaps.append(float((chosen - nearest) / nearest) if nearest else float("inf"))
            alike_N[frame] = False
        residual_ND = residual_ND - centroids_CD[codes_N]
    return gaps


def squared_distances(frames_ND: NDArray[np.float64], centroids_CD: NDArray[np.float64]) -> NDArray[np.float64]:
    blocks = np.array_split(frames_ND, max(1, len(frames_ND) * len(centroids_CD) // 100_000))
    return np.concatenate([np.square(block[:, None] - centroids_CD).sum(axis=2) for block in blocks])


def speech_features(samples: Path, tokenizer: str, *, gain: float = 1.0) -> Tensor:
    """Features of a sample as a recorder of that gain would have it: 16 bits with dither."""
    sound, sample_rate = soundfile.read(samples / "speech" / "de_jonas_01.flac", dtype="float64")
    assert sample_rate == 16_000
    rng = np.random.default_rng(0)
    dither = rng.random(len(sound)) - rng.random(len(sound))
    recorded = np.round(sound * gain * 32_768 + dither) / 32_768
    return load_features(TokenizerConfig(tokenizer=tokenizer)).extract(torch.from_numpy(recorded.astype(np.float32)))


@pytest.mark.parametrize(
    ("num_stages", "size", "dim"), [(1, 100, 39), (8, 64, 160), (4, 37, 7), (2, 1000, 16), (3, 1, 5), (2, 2, 1)]
)
def test_codes_are_the_nearest_centroids_but_for_near_ties(num_stages: int, size: int, dim: int) -> None:
    frames_ND = normal(800, dim, seed=size)
    centroids_QCD = normal(num_stages, size, dim, seed=size + 1) / torch.arange(1, num_stages + 1)[:, None, None]
    codes_QN = ResidualQuantizer(centroids_QCD).encode(frames_ND)
    assert codes_QN.dtype == torch.int64
    gaps = gaps_where_codes_first_differ(frames_ND, centroids_QCD, codes_QN)
    assert max(gaps, default=0.0) < NEAR_TIE
    assert len(gaps) <= 2, "near-ties are rare"


@pytest.mark.parametrize("tokenizer", ["mfcc-kmeans", "mel-rvq"])
def test_codes_of_speech_are_the_nearest_centroids_of_its_codebook(
    samples: Path, fitted_root: Path, tokenizer: str
) -> None:
    content = (fitted_root / "codebooks" / f"{tokenizer}.safetensors").read_bytes()
    centroids_QCD = Codebook.from_bytes(content, name=tokenizer).centroids_QCD
    frames_ND = speech_features(samples, tokenizer)
    gaps = gaps_where_codes_first_differ(frames_ND, centroids_QCD, ResidualQuantizer(centroids_QCD).encode(frames_ND))
    assert max(gaps, default=0.0) < NEAR_TIE
    assert len(gaps) <= 2, "near-ties are rare"


@pytest.mark.parametrize("gain", [1.0, 1e-2, 1e-4])
def test_codes_of_quiet_speech_are_the_nearest_centroids_too(samples: Path, gain: float) -> None:
    # log-mel frames of quiet sound are long vectors, |x|^2 about 21,000, a squared distance of a few apart
    frames_ND = speech_features(samples, "mel-rvq", gain=gain)
    chosen_C = torch.randperm(len(frames_ND), generator=generator(4))[:64]
    centroids_QCD = frames_ND[chosen_C][None] + 0.05 * normal(1, 64, 160, seed=5)
    gaps = gaps_where_codes_first_differ(frames_ND, centroids_QCD, ResidualQuantizer(centroids_QCD).encode(frames_ND))
    assert max(gaps, default=0.0) < NEAR_TIE


@pytest.mark.parametrize(("size", "dim"), [(2, 3), (37, 7), (100, 39), (513, 33), (1024, 160)])
def test_ties_go_to_the_lowest_index(size: int, dim: int) -> None:
    distinct = (size + 1) // 2
    centroids_CD = normal(distinct, dim, seed=size)
    repeats = torch.randint(0, distinct, (size - distinct,), generator=generator(size))
    quantizer = ResidualQuantizer(torch.cat([centroids_CD, centroids_CD[repeats]])[None])
    assert quantizer.encode(normal(1_000, dim, seed=size + 1)).max() < distinct
    assert torch.equal(quantizer.encode(centroids_CD[repeats])[0], repeats)


def test_a_frame_halfway_between_two_centroids_takes_the_first() -> None:
    centroids_QCD = torch.tensor([[[9.0, 9.0], [0.0, 1.0], [0.0, -1.0], [1.0, 0.0], [-1.0, 0.0]]])
    assert ResidualQuantizer(centroids_QCD).encode(torch.zeros(3, 2)).tolist() == [[1, 1, 1]]


def test_decoding_sums_the_centroids_of_the_stages_given() -> None:
    centroids_QCD = normal(5, 32, 11, seed=1)
    codes_QN = torch.randint(0, 32, (5, 700), generator=generator(2))
    quantizer = ResidualQuantizer(centroids_QCD)
    for num_stages in range(1, 6):
        expected_ND = np.zeros((700, 11))
        for stage in range(num_stages):
            expected_ND += centroids_QCD[stage].numpy().astype(np.float64)[codes_QN[stage].numpy()]
        decoded_ND = quantizer.decode(codes_QN[:num_stages])
        np.testing.assert_allclose(decoded_ND.numpy(), expected_ND, rtol=1e-5, atol=1e-5)


def test_decoding_adds_up_in_float32_stage_by_stage() -> None:
    centroids_QCD = normal(6, 50, 37, seed=1) * torch.logspace(3, -4, 6)[:, None, None]
    codes_QN = torch.randint(0, 50, (6, 1_000), generator=generator(2))
    expected_ND = torch.zeros(1_000, 37)
    for centroids_CD, codes_N in zip(centroids_QCD, codes_QN, strict=True):
        expected_ND += centroids_CD[codes_N]
    assert torch.equal(ResidualQuantizer(centroids_QCD).decode(codes_QN), expected_ND)


@pytest.mark.parametrize("code", [-1, 32])
def test_codes_that_the_codebook_has_not_are_refused(code: int) -> None:
    quantizer = ResidualQuantizer(normal(3, 32, 4, seed=1))
    codes_QN = torch.zeros(3, 10, dtype=torch.int64)
    codes_QN[1, 4] = code  # the next or the last stage's, if stages lay end to end
    with pytest.raises(ValueError, match="of a codebook of 32"):
        quantizer.decode(codes_QN)
    with pytest.raises(ValueError, match="4 codes a frame, of a codebook of 3 stages"):
        quantizer.decode(torch.zeros(4, 10, dtype=torch.int64))


def test_every_further_codebook_brings_speech_closer(samples: Path, fitted_root: Path) -> None:
    content = (fitted_root / "codebooks" / "mel-rvq.safetensors").read_bytes()
    quantizer = ResidualQuantizer(Codebook.from_bytes(content, name="mel-rvq").centroids_QCD)
    frames_ND = speech_features(samples, "mel-rvq")
    codes_QN = quantizer.encode(frames_ND)
    errors = [float((quantizer.decode(codes_QN[:count]) - frames_ND).square().mean()) for count in range(1, 9)]
    assert errors == sorted(errors, reverse=True)
    assert len(set(errors)) == 8
    assert errors[7] < 0.5 * errors[0]


@pytest.mark.parametrize(("size", "dim"), [(100, 39), (64, 160), (37, 7)])
def test_codes_do_not_depend_on_where_frames_or_centroids_lie_in_memory(size: int, dim: int) -> None:
    frames_ND = normal(600, dim, seed=1)
    centroids_QCD = normal(3, size, dim, seed=2)
    expected_QN = ResidualQuantizer(centroids_QCD).encode(frames_ND)
    for offset in (1, 2, 3, 5, 13):
        larger = normal(600 + 2 * offset, dim + 1, seed=3)
        larger[offset : offset + 600, 1:] = frames_ND
        assert torch.equal(ResidualQuantizer(centroids_QCD).encode(larger[offset : offset + 600, 1:]), expected_QN)
        moved = torch.empty(offset + centroids_QCD.numel())[offset:].view_as(centroids_QCD).copy_(centroids_QCD)
        assert torch.equal(ResidualQuantizer(moved).encode(frames_ND), expected_QN)
    transposed = frames_ND.t().contiguous().t()
    assert torch.equal(ResidualQuantizer(centroids_QCD).encode(transposed), expected_QN)


def test_frames_do_not_feel_what_comes_before_or_after() -> None:
    frames_ND = normal(2 * BLOCK_FRAMES + 17, 39, seed=1)
    centroids_QCD = normal(2, 100, 39, seed=2)
    centroids_QCD[:, 50:] = centroids_QCD[:, :50] * (1 + 1e-7)  # most codes hang on the last bits
    quantizer = ResidualQuantizer(centroids_QCD)
    codes_QN = quantizer.encode(frames_ND)
    for begin, end in ((0, 1), (0, BLOCK_FRAMES), (0, BLOCK_FRAMES + 3), (5, 700), (BLOCK_FRAMES - 1, 1_041)):
        assert torch.equal(quantizer.encode(frames_ND[begin:end]), codes_QN[:, begin:end])


def nearest_in_float64(frames_ND: Tensor, centroids_QCD: Tensor) -> Tensor:
    """Codes by explicit differences in float64, what is left kept in float32."""
    residual_ND, codes = frames_ND.clone(), []
    for centroids_CD in centroids_QCD:
        distances_NC = squared_distances(residual_ND.double().numpy(), centroids_CD.double().numpy())
        codes.append(torch.from_numpy(distances_NC.argmin(axis=1)))
        residual_ND = residual_ND - centroids_CD[codes[-1]]
    return torch.stack(codes)


@pytest.mark.parametrize(("offset", "spread"), [(0.0, 1e-6), (0.0, 1e-7), (100.0, 1e-5), (3.0, 3e-7)])
def test_centroids_that_float32_scores_cannot_tell_apart_are_told_apart(offset: float, spread: float) -> None:
    # pairs of centroids as close as the last bits of a score, under frames far from nought
    base_CD = normal(60, 96, seed=1) + offset
    centroids_QCD = torch.stack([base_CD, base_CD - offset]).repeat(1, 2, 1)
    centroids_QCD[:, 60:] += spread * normal(2, 60, 96, seed=2)
    frames_ND = normal(600, 96, seed=3) + offset
    expected_QN = nearest_in_float64(frames_ND, centroids_QCD)
    assert torch.equal(ResidualQuantizer(centroids_QCD).encode(frames_ND), expected_QN)
    squares_QC = centroids_QCD.square().sum(dim=2)
    naive_N = (squares_QC[0] - 2 * frames_ND @ centroids_QCD[0].t()).argmin(dim=1)
    assert (naive_N != expected_QN[0]).sum() > 10, "float32 scores alone do not tell"


def test_a_frame_of_nan_or_infinity_still_has_codes_of_the_codebook() -> None:
    frames_ND = normal(5, 8, seed=1)
    frames_ND[1, 3], frames_ND[2, 0], frames_ND[3] = torch.nan, torch.inf, 1e30
    quantizer = ResidualQuantizer(normal(2, 10, 8, seed=2))
    codes_QN = quantizer.encode(frames_ND)
    assert ((codes_QN >= 0) & (codes_QN < 10)).all()
    assert torch.equal(codes_QN[:, [0, 4]], quantizer.encode(frames_ND[[0, 4]]))


def test_encoding_leaves_the_frames_as_they_were() -> None:
    frames_ND = normal(300, 8, seed=1)
    before = frames_ND.clone()
    ResidualQuantizer(normal(2, 10, 8, seed=2)).encode(frames_ND)
    assert torch.equal(frames_ND, before)


def test_no_frames_give_no_codes_and_no_codes_no_frames() -> None:
    quantizer = ResidualQuantizer(normal(4, 10, 8, seed=1))
    codes_QN = quantizer.encode(torch.empty(0, 8))
    assert codes_QN.shape == (4, 0)
    assert quantizer.decode(codes_QN).shape == (0, 8)


def test_gaps_are_those_of_distances_computed_one_by_one() -> None:
    generator = torch.Generator().manual_seed(5)
    centroids_QCD = torch.randn(3, 7, 4, generator=generator)
    frames_ND = torch.randn(20, 4, generator=generator)
    quantizer = ResidualQuantizer(centroids_QCD)
    codes_QN, gaps_QN = quantizer.encode(frames_ND), quantizer.gaps(frames_ND)
    for n, frame_D in enumerate(frames_ND.double()):
        for stage, centroids_CD in enumerate(centroids_QCD.double()):
            nearest, second = sorted(float((frame_D - centroid_D).norm()) for centroid_D in centroids_CD)[:2]
            assert float(gaps_QN[stage, n]) == pytest.approx((second - nearest) / second)
            frame_D = frame_D - centroids_CD[codes_QN[stage, n]]


def test_a_frame_between_two_centroids_is_a_near_tie() -> None:
    quantizer = ResidualQuantizer(torch.tensor([[[1.0, 0.0], [-1.0, 0.0], [0.0, 9.0]]]))
    assert float(quantizer.gaps(torch.tensor([[0.0, 0.5]]))) == 0.0


@pytest.mark.parametrize(("groups", "num_stages"), [(2, 1), (3, 2), (4, 3)])
def test_groups_are_quantized_each_as_if_alone(groups: int, num_stages: int) -> None:
    centroids_KCE = normal(groups * num_stages, 16, 5, seed=1)
    frames_ND = normal(700, groups * 5, seed=2)
    quantizer = open_quantizer(centroids_KCE, groups=groups)
    codes_KN, gaps_KN = quantizer.encode(frames_ND), quantizer.gaps(frames_ND)
    decoded_ND = quantizer.decode(codes_KN)
    assert codes_KN.shape == (groups * num_stages, 700)
    for group in range(groups):
        rows, columns = (slice(group * size, (group + 1) * size) for size in (num_stages, 5))
        alone = ResidualQuantizer(centroids_KCE[rows])
        assert torch.equal(codes_KN[rows], alone.encode(frames_ND[:, columns]))
        assert torch.equal(gaps_KN[rows], alone.gaps(frames_ND[:, columns]))
        assert torch.equal(decoded_ND[:, columns], alone.decode(codes_KN[rows]))


def test_groups_without_codes_decode_to_nought() -> None:
    quantizer = open_quantizer(normal(6, 16, 5, seed=1), groups=3)
    frames_ND = normal(40, 15, seed=2)
    codes_KN = quantizer.encode(frames_ND)
    whole_ND = quantizer.decode(codes_KN)
    assert torch.equal(quantizer.decode(codes_KN[:2]), torch.cat([whole_ND[:, :5], torch.zeros(40, 10)], dim=1))
    half_ND = quantizer.decode(codes_KN[:3])
    assert torch.equal(half_ND[:, :5], whole_ND[:, :5])
    assert not torch.equal(half_ND[:, 5:10], whole_ND[:, 5:10])
    assert half_ND[:, 5:10].abs().min() > 0
    assert (half_ND[:, 10:] == 0).all()
    assert torch.equal(quantizer.decode(codes_KN[:0]), torch.zeros(40, 15))


def test_one_group_is_plain_residual_quantization() -> None:
    assert isinstance(open_quantizer(normal(6, 16, 5, seed=1)), ResidualQuantizer)
    assert isinstance(open_quantizer(normal(6, 16, 5, seed=1), groups=6), GroupedQuantizer)


@pytest.mark.parametrize("groups", [0, 4, 7])
def test_codebooks_that_groups_cannot_share_equally_are_refused(groups: int) -> None:
    with pytest.raises(UserError, match=f"6 codebooks cannot be shared out among {groups} groups"):
        open_quantizer(normal(6, 16, 5, seed=1), groups=groups)


def test_frames_of_another_dimension_are_refused() -> None:
    for groups, dim in ((1, 5), (3, 15)):
        with pytest.raises(RuntimeError):
            open_quantizer(normal(6, 16, 5, seed=1), groups=groups).encode(normal(10, dim + groups, seed=2))
