"""k-means in torch: rounds, seeding, centroids without frames, frames read in blocks."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from wavemill.tokenizers import kmeans
from wavemill.tokenizers.kmeans import Frames, distinct_frames, first_centroids, lloyd, split_clusters


def blobs(num: int = 6_000, *, places: int = 40, dim: int = 12, seed: int = 0) -> NDArray[np.float32]:
    rng = np.random.default_rng(seed)
    places_PD = 6 * rng.standard_normal((places, dim))
    return (places_PD[rng.integers(0, places, num)] + rng.standard_normal((num, dim))).astype(np.float32)


def inertia(frames_ND: NDArray[np.float32], centroids_CD: torch.Tensor) -> float:
    return float(torch.cdist(torch.from_numpy(frames_ND).double(), centroids_CD.double()).amin(dim=1).square().mean())


def fixed_point(frames_ND: NDArray[np.float32], centroids_CD: torch.Tensor, rounds: int = 200) -> torch.Tensor:
    """Lloyd's algorithm as it is written in books, in float64."""
    frames, centroids_CD = torch.from_numpy(frames_ND).double(), centroids_CD.double()
    for _ in range(rounds):
        codes_N = torch.cdist(frames, centroids_CD).argmin(dim=1)
        centroids_CD = torch.stack([frames[codes_N == code].mean(dim=0) for code in range(len(centroids_CD))])
    return centroids_CD


@pytest.mark.parametrize("fast_dim", [1, 10_000])
@pytest.mark.parametrize("offset", [0.0, 3_000.0])
def test_rounds_end_near_a_fixed_point_of_lloyds_algorithm(
    fast_dim: int, offset: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kmeans, "_FAST_DIM", fast_dim)  # bfloat16 where this machine has it, or never
    frames_ND = blobs() + np.float32(offset)
    found = lloyd(Frames(frames_ND), 60, rng=np.random.default_rng(0))
    told = inertia(frames_ND, found.centroids_CE)
    assert told < 1.005 * inertia(frames_ND, fixed_point(frames_ND, found.centroids_CE, 20))
    assert told == pytest.approx(found.curve[-1], rel=0.005)


def test_greedy_seeding_beats_frames_drawn_blindly() -> None:
    frames_ND = blobs()
    rng = np.random.default_rng(0)
    drawn = torch.from_numpy(frames_ND[rng.choice(len(frames_ND), 40, replace=False)])
    assert inertia(frames_ND, first_centroids(Frames(frames_ND), 40, rng)) < 0.6 * inertia(frames_ND, drawn)


def test_nearly_every_far_place_gets_a_centroid_with_any_seed() -> None:
    frames_ND = blobs()
    places_PD = torch.from_numpy(
        6 * np.random.default_rng(0).standard_normal((40, 12))
    ).float()  # as `blobs` draws them
    for seed in range(5):
        found = lloyd(Frames(frames_ND), 40, rng=np.random.default_rng(seed))
        lonely = torch.cdist(places_PD, found.centroids_CE).amin(dim=1) > 2
        assert int(lonely.sum()) <= 4, "more than two pairs of places share a centroid"


@pytest.mark.parametrize("bytes_", [20_000, 100_000])
def test_a_sample_smaller_than_the_frames_costs_little(bytes_: int, monkeypatch: pytest.MonkeyPatch) -> None:
    frames_ND = blobs()
    whole = lloyd(Frames(frames_ND), 60, rng=np.random.default_rng(0))
    monkeypatch.setattr(kmeans, "_SAMPLE_BYTES", bytes_)
    part = lloyd(Frames(frames_ND), 60, rng=np.random.default_rng(0))
    assert inertia(frames_ND, part.centroids_CE) < 1.05 * inertia(frames_ND, whole.centroids_CE)


def test_centroids_without_frames_take_halves_of_the_worst_clusters() -> None:
    frames_ND = blobs()
    good_CD = lloyd(Frames(frames_ND), 40, rng=np.random.default_rng(0)).centroids_CE
    centroids_CD = good_CD.clone()
    centroids_CD[30:] = 1e4  # where no frame is
    empty_C = torch.arange(40) >= 30
    split_CD, moved = split_clusters(Frames(frames_ND), centroids_CD, empty_C)
    counts_C = torch.cdist(torch.from_numpy(frames_ND), split_CD).argmin(dim=1).bincount(minlength=40)
    assert moved
    assert counts_C[30:].min() > 20
    assert inertia(frames_ND, split_CD) < 0.6 * inertia(frames_ND, centroids_CD)
    assert torch.equal(split_CD, split_clusters(Frames(frames_ND), centroids_CD, empty_C)[0])


def test_a_fit_that_begins_with_empty_clusters_ends_without(monkeypatch: pytest.MonkeyPatch) -> None:
    frames_ND = blobs()

    def badly(sample: Frames, frames: Frames, size: int, rng: np.random.Generator) -> torch.Tensor:
        return torch.cat([sample.read(slice(0, 5)), torch.full((size - 5, 12), 1e4)])

    monkeypatch.setattr(kmeans, "_seed", badly)
    found = lloyd(Frames(frames_ND), 40, rng=np.random.default_rng(0))
    counts_C = torch.cdist(torch.from_numpy(frames_ND), found.centroids_CE).argmin(dim=1).bincount(minlength=40)
    assert counts_C.min() > 0


def test_distinct_frames_are_found_in_order_wherever_they_are() -> None:
    frames_ND = np.zeros((50_000, 4), dtype=np.float32)
    frames_ND[1] = -0.0
    frames_ND[49_999] = 7
    assert distinct_frames(Frames(frames_ND), 5).tolist() == [[0.0] * 4, [7.0] * 4]
    assert len(distinct_frames(Frames(frames_ND), 1)) == 1


@pytest.mark.parametrize("stride", [1, 2, 8])
def test_blocks_hold_every_strided_frame_once(stride: int) -> None:
    frames = Frames(np.arange(30_000, dtype=np.float64).reshape(10_000, 3), slice(1, 3))
    read = torch.cat([frames.read(rows) for rows in frames.blocks(stride=stride, size_bytes=9_000)])
    assert read.dtype == torch.float32
    assert torch.equal(read, torch.from_numpy(frames.array_ND[::stride, 1:3]).float())
