"""k-means by Lloyd's rounds in bounded memory, with torch: how one codebook is fitted.

Axes: N frames, M frames of a sample, B frames of a block, E dimensions, C centroids, L candidates.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import embedding_bag, normalize

from .codebook import unit_length

Result = TypeVar("Result")

_BLOCK_BYTES = 8 << 20  # of frames that a thread holds at a time
_BLOCK_BYTES_ON_GPU = 256 << 20
_SCORES = 256 << 10  # at a time: they stay in a core's cache
_SAMPLE_BYTES = 64 << 20
_SAMPLE_FRAMES = 64  # per centroid, on which the first rounds run
_SEED_FRAMES = 16  # per centroid, of which the first centroids are chosen
_LEAST_SAMPLE = 8_192
_ROUNDS = 40  # at most
_PART_GAIN, _GAIN = 2e-3, 1e-4  # a round that takes off less of the inertia is the last: on a part, on all frames
_EXACT_ROUNDS = 2
_HALVING_ROUNDS = 4
_FAST_DIM = 128  # below it the search for the best score takes longer than the products


@dataclass(frozen=True, slots=True)
class Frames:
    """Frames `[N, E]` that may be larger than memory: columns of an array or a memory map, read a block at a time."""

    array_ND: NDArray[Any]
    columns: slice = field(default_factory=lambda: slice(None))
    directions: bool = False  # each frame is divided by its length; zeros stay zeros
    origin_E: Tensor | None = None  # what is subtracted from each frame

    def __len__(self) -> int:
        return len(self.array_ND)

    @property
    def dim(self) -> int:
        return len(range(*self.columns.indices(self.array_ND.shape[1])))

    def read(self, rows: slice | NDArray[np.int64]) -> Tensor:
        """A copy of some frames, `[B, E]` float32."""
        block_BE = torch.from_numpy(np.array(self.array_ND[rows, self.columns], dtype=np.float32, order="C"))
        if self.directions:
            block_BE = unit_length(block_BE)
        return block_BE if self.origin_E is None else block_BE.sub_(self.origin_E)

    def blocks(self, *, stride: int = 1, size_bytes: int = _BLOCK_BYTES) -> list[slice]:
        """All frames in order, or every `stride`-th, as the rows of blocks that take `size_bytes`."""
        rows = max(64, size_bytes // (4 * self.dim)) * stride
        return [slice(begin, min(begin + rows, len(self)), stride) for begin in range(0, len(self), rows)]


@dataclass(frozen=True, slots=True)
class Clusters:
    """Centroids `[C, E]` float32 and the inertia that each round over all frames left."""

    centroids_CE: Tensor
    curve: list[float]


def lloyd(frames: Frames, size: int, *, rng: np.random.Generator, device: str = "cpu") -> Clusters:
    """k-means: rounds over a sample, over ever larger parts of the frames, over all of them.

    The first centroids are chosen from the sample by greedy k-means++. Inertia is the mean squared distance; of
    directions, whose centroids have length one, it is 1 - cos. Rounds compute distances in bfloat16 where the device
    multiplies in it, the last ones in float32. The result is the same on any number of cores: a block is one thread's,
    and what blocks give is added in their order. There must be `size` distinct frames. Arthur and Vassilvitskii 2007
    (k-means++); Newling and Fleuret 2016 (nested parts).
    """
    sample = _sample(frames, size, rng)
    frames = replace(frames, origin_E=sample.origin_E)  # rounding of distances grows with how far the origin is
    with Workers(device) as workers:
        centroids_CE = _seed(sample, frames, size, rng)
        rounds = _Rounds(workers, device, sample)
        fast = _fast_type(device, frames.dim)
        if len(sample) < len(frames):
            centroids_CE, _ = rounds.run(sample, centroids_CE, fast, gain=_PART_GAIN)
        stride = _first_stride(len(frames), len(sample))
        while stride > 1:
            centroids_CE, _ = rounds.run(frames, centroids_CE, fast, gain=_PART_GAIN, stride=stride)
            stride //= 2
        centroids_CE, curve = rounds.run(frames, centroids_CE, fast, gain=_GAIN)
        if fast != torch.float32:
            centroids_CE, more = rounds.run(frames, centroids_CE, torch.float32, gain=_GAIN, most=_EXACT_ROUNDS)
            curve += more
    return Clusters(centroids_CE if sample.origin_E is None else centroids_CE + sample.origin_E, curve)


def first_centroids(frames: Frames, size: int, rng: np.random.Generator) -> Tensor:
    """`[C, E]` frames to start from, all distinct if `size` are."""
    sample = _sample(frames, size, rng)
    centroids_CE = _seed(sample, replace(frames, origin_E=sample.origin_E), size, rng)
    return centroids_CE if sample.origin_E is None else centroids_CE + sample.origin_E


def distinct_frames(frames: Frames, most: int) -> Tensor:
    """The first frames that are distinct, up to `most` of them, `[<= most, E]`; read until they are found."""
    found: dict[bytes, None] = {}
    for rows in frames.blocks():
        for frame_E in (frames.read(rows) + 0.0).numpy():  # -0.0 is 0.0
            found.setdefault(frame_E.tobytes())
            if len(found) == most:
                break
        else:
            continue
        break
    return torch.from_numpy(np.frombuffer(b"".join(found), np.float32).reshape(-1, frames.dim).copy())


def _sample(frames: Frames, size: int, rng: np.random.Generator) -> Frames:
    """Some of the frames, in memory, about their mean."""
    num = max(_SAMPLE_FRAMES * size, _LEAST_SAMPLE)
    num = min(len(frames), num, max(_SAMPLE_BYTES // (4 * frames.dim), 2 * size))
    rows_M = np.sort(rng.choice(len(frames), num, replace=False, shuffle=False))
    sample_ME = frames.read(rows_M)
    origin_E = None if frames.directions else sample_ME.double().mean(dim=0).float()
    return Frames(sample_ME.numpy(), directions=frames.directions, origin_E=origin_E)


def _first_stride(num_frames: int, num_sample: int) -> int:
    """The largest power of two of which every n-th frame makes more than twice the sample."""
    stride = 1
    while num_frames // (2 * stride) > 2 * num_sample:
        stride *= 2
    return stride


def _seed(sample: Frames, frames: Frames, size: int, rng: np.random.Generator) -> Tensor:
    """`[C, E]` of the sample, by greedy k-means++: of a few drawn by their squared distance, the one that helps most.

    What the sample lacks is taken from all frames; if they have fewer than `size` distinct ones, the rest is zeros.
    """
    rows_M = np.sort(rng.choice(len(sample), min(len(sample), _SEED_FRAMES * size), replace=False, shuffle=False))
    frames_ME = sample.read(rows_M)
    squares_M = frames_ME.square().sum(dim=1)
    num_candidates = 2 + int(np.log(size))
    chosen = [int(rng.integers(len(frames_ME)))]
    nearest_M = _distances(frames_ME, squares_M, torch.tensor(chosen))[0]
    while len(chosen) < size:
        cumulated_M = nearest_M.cumsum(dim=0, dtype=torch.float64)
        if cumulated_M[-1] <= 0:
            break
        drawn_L = torch.from_numpy(rng.random(num_candidates)) * cumulated_M[-1]
        candidates_L = torch.searchsorted(cumulated_M, drawn_L, right=True).clamp_(max=len(frames_ME) - 1)
        distances_LM = torch.minimum(_distances(frames_ME, squares_M, candidates_L), nearest_M)
        best = int(distances_LM.sum(dim=1).argmin())
        nearest_M = distances_LM[best]
        chosen.append(int(candidates_L[best]))
    centroids_CE = frames_ME[chosen]
    if len(chosen) < size:
        there = {frame_E.tobytes() for frame_E in (centroids_CE + 0.0).numpy()}
        others = [frame_E for frame_E in distinct_frames(frames, size) if frame_E.numpy().tobytes() not in there]
        nothing = [torch.zeros(frames.dim)] * size
        centroids_CE = torch.stack([*centroids_CE, *others, *nothing][:size])
    return centroids_CE


def _distances(frames_ME: Tensor, squares_M: Tensor, chosen_L: Tensor) -> Tensor:
    """Squared distances `[L, M]`; exactly zero of a frame to itself."""
    products_LM = frames_ME[chosen_L] @ frames_ME.t()
    distances_LM = (squares_M - 2 * products_LM + squares_M[chosen_L][:, None]).clamp_(min=0)
    # the rounding of near ones' distances is no distance: duplicates would be chosen
    distances_LM[distances_LM <= 1e-6 * squares_M] = 0
    return distances_LM


class Workers:
    """A thread for each core, or one for a GPU. Each computes alone, since rounding depends on how work is shared."""

    def __init__(self, device: str = "cpu") -> None:
        self._num = num_cores() if torch.device(device).type == "cpu" else 1

    def __enter__(self) -> "Workers":
        self._before = torch.get_num_threads()
        torch.set_num_threads(1)
        self._pool = ThreadPoolExecutor(self._num, initializer=torch.set_num_threads, initargs=(1,))
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        torch.set_num_threads(self._before)

    def each(self, run: Callable[[slice], Result], blocks: Iterable[slice]) -> Iterator[Result]:
        """What `run` gives for each block, in order. Few are in flight, so few results wait."""
        waiting: deque[Future[Result]] = deque()
        for block in blocks:
            waiting.append(self._pool.submit(run, block))
            if len(waiting) > self._num:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


class _Rounds:
    """Lloyd's rounds on the threads of a pool; centroids without frames move to where a sample wants for them."""

    def __init__(self, workers: Workers, device: str, sample: Frames) -> None:
        self._workers, self._device, self._sample = workers, device, sample
        self._block_bytes = _BLOCK_BYTES if torch.device(device).type == "cpu" else _BLOCK_BYTES_ON_GPU

    def run(
        self,
        frames: Frames,
        centroids_CE: Tensor,
        dtype: torch.dtype,
        *,
        gain: float,
        stride: int = 1,
        most: int = _ROUNDS,
    ) -> tuple[Tensor, list[float]]:
        """Rounds until one takes off less than `gain` of the inertia; the centroids, and the inertia of each round."""
        curve: list[float] = []
        whole = stride == 1 and frames is not self._sample
        for _ in range(most):
            sums_CE, counts_C, squares = self._sums(frames, centroids_CE, dtype, stride)
            means_CE, inertia = _means(sums_CE, counts_C, squares, directions=frames.directions)
            curve.append(inertia)
            empty_C = counts_C == 0
            centroids_CE = torch.where(empty_C[:, None], centroids_CE, means_CE)
            moved = False
            if whole and empty_C.any():  # in a part of the frames they may lack frames that others have
                centroids_CE, moved = split_clusters(self._sample, centroids_CE, empty_C)
            if not moved and len(curve) > 1 and curve[-2] - curve[-1] <= gain * curve[-2]:
                break
        return centroids_CE, curve

    def _sums(
        self, frames: Frames, centroids_CE: Tensor, dtype: torch.dtype, stride: int
    ) -> tuple[Tensor, Tensor, float]:
        """Of the frames nearest to each centroid their sum `[C, E]` float64 and number `[C]`, and all squares' sum."""
        centroids = centroids_CE.to(self._device)
        table_EC, bias_C = centroids.to(dtype).t(), (-0.5 * centroids.square().sum(dim=1)).to(dtype)
        step = max(64, _SCORES // len(centroids_CE)) if self._device == "cpu" else 1 << 16

        def of_block(rows: slice) -> tuple[Tensor, Tensor, float]:
            block_BE = frames.read(rows).to(self._device)
            parts = block_BE.to(dtype).split(step)
            codes_B = torch.cat([torch.addmm(bias_C, part, table_EC).argmax(dim=1) for part in parts])
            order_B = codes_B.argsort(stable=True)
            counts_C = codes_B.bincount(minlength=len(centroids_CE))
            sums_CE = embedding_bag(order_B, block_BE, counts_C.cumsum(dim=0) - counts_C, mode="sum")
            return sums_CE.cpu(), counts_C.cpu(), float(block_BE.square().sum(dim=1).double().sum())

        total_CE = torch.zeros(centroids_CE.shape, dtype=torch.float64)
        total_C = torch.zeros(len(centroids_CE), dtype=torch.int64)
        squares = 0.0
        for sums_CE, counts_C, block_squares in self._workers.each(
            of_block, frames.blocks(stride=stride, size_bytes=self._block_bytes)
        ):
            total_CE += sums_CE
            total_C += counts_C
            squares += block_squares
        return total_CE, total_C, squares


def _means(sums_CE: Tensor, counts_C: Tensor, squares: float, *, directions: bool) -> tuple[Tensor, float]:
    """The new centroids, and the inertia of the frames about them; it follows from the sums alone."""
    num = int(counts_C.sum())
    lengths_C = sums_CE.square().sum(dim=1)
    if directions:  # sum |x - c|^2 / 2 = sum (|x|^2 + 1) / 2 - c.s, and c.s = |s|
        inertia = ((squares + num) / 2 - float(lengths_C.sqrt().sum())) / num
        return normalize(sums_CE, dim=1).float(), inertia
    inertia = (squares - float((lengths_C / counts_C.clamp(min=1)).sum())) / num
    return (sums_CE / counts_C.clamp(min=1)[:, None]).float(), inertia


def split_clusters(sample: Frames, centroids_CE: Tensor, empty_C: Tensor) -> tuple[Tensor, bool]:
    """Give each centroid without frames a half of the cluster that has the largest error in the sample, in turn.

    The centroids, and whether any moved. Halves are those of k-means with two centroids (balanced splitting). Where
    there are too few distinct frames some stay.
    """
    frames_ME = sample.read(slice(None))
    filled_C = (~empty_C).nonzero()[:, 0]
    products_MC = torch.addmm(-0.5 * centroids_CE[filled_C].square().sum(dim=1), frames_ME, centroids_CE[filled_C].t())
    codes_M = filled_C[products_MC.argmax(dim=1)]
    errors_M = (frames_ME - centroids_CE[codes_M]).square().sum(dim=1).double()
    errors_C = torch.zeros(len(centroids_CE), dtype=torch.float64).index_add_(0, codes_M, errors_M)
    centroids_CE = centroids_CE.clone()
    moved = False
    for empty in empty_C.nonzero()[:, 0].tolist():
        donor = int(errors_C.argmax())
        members = (codes_M == donor).nonzero()[:, 0]
        if len(members) < 2 or errors_C[donor] <= 0:
            break
        halves_2E, second = _halves(frames_ME[members])
        if not 0 < int(second.sum()) < len(members):
            break
        moved = True
        codes_M[members[second]] = empty
        for code, centroid_E in zip((donor, empty), halves_2E, strict=True):
            centroids_CE[code] = normalize(centroid_E, dim=0) if sample.directions else centroid_E
            mine_ME = frames_ME[codes_M == code]
            errors_C[code] = (mine_ME - centroids_CE[code]).square().sum(dtype=torch.float64)
    return centroids_CE, moved


def _halves(frames_ME: Tensor) -> tuple[Tensor, Tensor]:
    """Two centroids, and which frames are the second one's; the first two are far from each other."""
    first_E = frames_ME[(frames_ME - frames_ME.mean(dim=0)).square().sum(dim=1).argmax()]
    second_E = frames_ME[(frames_ME - first_E).square().sum(dim=1).argmax()]
    centroids_2E = torch.stack([first_E, second_E])
    second = torch.zeros(len(frames_ME), dtype=torch.bool)
    for _ in range(_HALVING_ROUNDS):
        scores_M2 = torch.addmm(-0.5 * centroids_2E.square().sum(dim=1), frames_ME, centroids_2E.t())
        second = scores_M2[:, 1] > scores_M2[:, 0]
        if not 0 < int(second.sum()) < len(second):
            break
        centroids_2E = torch.stack([frames_ME[~second].mean(dim=0), frames_ME[second].mean(dim=0)])
    return centroids_2E, second


def num_cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _fast_type(device: str, dim: int) -> torch.dtype:
    """bfloat16 where the device has instructions for its products, and these are most of the work."""
    if torch.device(device).type == "cuda":
        has = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        can = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        has = can.get("amx_bf16") or can.get("avx512_bf16")
    return torch.bfloat16 if has and dim >= _FAST_DIM else torch.float32
