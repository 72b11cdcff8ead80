"""Triton kernels of quantize_triton.py, which says how exact they are. The only file that knows Triton.

Axes: N frames, D dimensions, C centroids; the tables' D and C are padded, with zeros and scores of minus infinity.
"""
# pyright: reportIndexIssue=false, reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false
# pyright: reportOperatorIssue=false, reportGeneralTypeIssues=false

import functools
from typing import Any

import triton
import triton.language as tl

_FLOOR = tl.constexpr(1e-30)  # scores below it may have lost bits to underflow
_NUM_STEADY_FRAMES = 16_384  # with fewer, what a trial finds is noise
_INTERPRETED = {"BLOCK_N": 64, "BLOCK_C": 128}


def _config(block_n: int, block_c: int, num_warps: int, num_stages: int) -> triton.Config:
    return triton.Config({"BLOCK_N": block_n, "BLOCK_C": block_c}, num_warps=num_warps, num_stages=num_stages)


# The first of each fits any GPU of compute capability 8.0, the others what an H200 has.
_CONFIGS = {
    "up to 128 dimensions": [_config(64, 32, 4, 2), _config(64, 64, 8, 2), _config(128, 64, 8, 2)],
    "up to 256 dimensions": [_config(32, 32, 4, 2), _config(64, 32, 8, 2), _config(64, 64, 8, 2)],
    "streamed": [_config(64, 64, 4, 2), _config(64, 128, 4, 3), _config(128, 128, 8, 3)],
}


@triton.jit(do_not_specialize=["num_frames"])
def search_stages(
    frames_ptr,
    centroids_ptr,
    mean_ptr,
    high_ptr,
    low_ptr,
    bias_ptr,
    reach_ptr,
    longest_ptr,
    unscale_ptr,
    codes_ptr,
    unsure_ptr,
    num_frames,
    size,
    dim,
    padded_size: tl.constexpr,
    stages: tl.constexpr,
    near,
    far,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """All stages for BLOCK_N frames; what is left of them stays on chip. BLOCK_D is all (padded) dimensions."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    dims = tl.arange(0, BLOCK_D)
    inside = (rows[:, None] < num_frames) & (dims[None, :] < dim)
    left = tl.load(frames_ptr + rows[:, None] * dim + dims[None, :], mask=inside, other=0.0)
    place = codes_ptr + rows
    unsure = tl.zeros([BLOCK_N], tl.int1)
    for stage in range(stages):
        centred = left - tl.load(mean_ptr + stage * BLOCK_D + dims)[None, :]
        length = tl.sqrt(tl.sum(centred * centred, axis=1))
        scale, unscale = _powers_of_two(tl.max(tl.abs(centred), axis=1))
        unscale *= tl.load(unscale_ptr + stage)
        high, low = _halves(centred * scale[:, None])
        best, second, code = _nothing_yet(BLOCK_N)
        for begin in range(0, padded_size, BLOCK_C):
            columns = stage * padded_size + begin + tl.arange(0, BLOCK_C)
            table = columns[None, :] * BLOCK_D + dims[:, None]
            sums = _products(high, low, high_ptr + table, low_ptr + table)
            most = _at_most(sums * unscale[:, None], length, near, bias_ptr + columns, reach_ptr + columns)
            best, second, code = _fold(most, begin, best, second, code, BLOCK_C)
        code = tl.minimum(code, size - 1)  # of a frame that is not of numbers it may be any
        reach = tl.load(reach_ptr + stage * padded_size + code)
        unsure |= _is_unsure(best, second, length, reach, tl.load(longest_ptr + stage), near, far)
        tl.store(place, code, mask=rows < num_frames)
        place += num_frames
        nearest = (stage * size + code)[:, None] * dim + dims[None, :]
        left -= tl.load(centroids_ptr + nearest, mask=dims[None, :] < dim, other=0.0)
    tl.store(unsure_ptr + rows, unsure.to(tl.int8), mask=rows < num_frames)


@triton.jit(do_not_specialize=["num_frames"])
def search_stage(
    frames_ptr,
    mean_ptr,
    high_ptr,
    low_ptr,
    bias_ptr,
    reach_ptr,
    longest_ptr,
    unscale_ptr,
    codes_ptr,
    unsure_ptr,
    num_frames,
    size,
    dim,
    padded_size: tl.constexpr,
    padded_dim: tl.constexpr,
    near,
    far,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One stage for BLOCK_N frames of any length, BLOCK_D dimensions at a time; adds to what is unsure."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    largest = tl.zeros([BLOCK_N], tl.float32)
    squares = tl.zeros([BLOCK_N], tl.float32)
    for first in range(0, padded_dim, BLOCK_D):
        centred = _centred(frames_ptr, mean_ptr, rows, first, num_frames, dim, BLOCK_D)
        largest = tl.maximum(largest, tl.max(tl.abs(centred), axis=1))
        squares += tl.sum(centred * centred, axis=1)
    length = tl.sqrt(squares)
    scale, unscale = _powers_of_two(largest)
    unscale *= tl.load(unscale_ptr)
    best, second, code = _nothing_yet(BLOCK_N)
    for begin in range(0, padded_size, BLOCK_C):
        columns = begin + tl.arange(0, BLOCK_C)
        sums = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
        for first in range(0, padded_dim, BLOCK_D):
            centred = _centred(frames_ptr, mean_ptr, rows, first, num_frames, dim, BLOCK_D)
            high, low = _halves(centred * scale[:, None])
            table = columns[None, :] * padded_dim + (first + tl.arange(0, BLOCK_D))[:, None]
            sums += _products(high, low, high_ptr + table, low_ptr + table)
        most = _at_most(sums * unscale[:, None], length, near, bias_ptr + columns, reach_ptr + columns)
        best, second, code = _fold(most, begin, best, second, code, BLOCK_C)
    code = tl.minimum(code, size - 1)  # of a frame that is not of numbers it may be any
    unsure = _is_unsure(best, second, length, tl.load(reach_ptr + code), tl.load(longest_ptr), near, far)
    tl.store(codes_ptr + rows, code, mask=rows < num_frames)
    before = tl.load(unsure_ptr + rows, mask=rows < num_frames, other=0)
    tl.store(unsure_ptr + rows, before | unsure.to(tl.int8), mask=rows < num_frames)


@triton.jit(do_not_specialize=["num_frames"])
def sum_stages(
    codes_ptr,
    centroids_ptr,
    sums_ptr,
    num_frames,
    size,
    dim,
    stages: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The sum of each frame's centroids, in the order of the stages."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    dims = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = (rows[:, None] < num_frames) & (dims[None, :] < dim)
    sums = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    place = codes_ptr + rows
    for stage in range(stages):
        code = tl.load(place, mask=rows < num_frames, other=0)
        place += num_frames
        sums += tl.load(centroids_ptr + (stage * size + code)[:, None] * dim + dims[None, :], mask=inside, other=0.0)
    tl.store(sums_ptr + rows[:, None] * dim + dims[None, :], sums, mask=inside)


@triton.jit
def _centred(frames_ptr, mean_ptr, rows, first, num_frames, dim, BLOCK_D: tl.constexpr):
    dims = first + tl.arange(0, BLOCK_D)
    inside = (rows[:, None] < num_frames) & (dims[None, :] < dim)
    frames = tl.load(frames_ptr + rows[:, None] * dim + dims[None, :], mask=inside, other=0.0)
    return frames - tl.load(mean_ptr + dims)[None, :]


@triton.jit
def _powers_of_two(largest):
    """What brings the largest component of each frame to between 2^14 and 2^15, and its inverse, by their bits."""
    exponent = tl.maximum(largest.to(tl.int32, bitcast=True) >> 23, 15)
    scale = ((268 - exponent) << 23).to(tl.float32, bitcast=True)
    unscale = ((exponent - 14) << 23).to(tl.float32, bitcast=True)
    return scale, unscale


@triton.jit
def _halves(scaled):
    high = scaled.to(tl.float16)
    return high, (scaled - high.to(tl.float32)).to(tl.float16)


@triton.jit
def _products(high, low, high_ptr, low_ptr):
    """x.c of every frame with every centroid of a tile. The smaller products first, so that they lose least."""
    table_high = tl.load(high_ptr)
    sums = tl.dot(low, table_high)
    sums = tl.dot(high, tl.load(low_ptr), sums)
    return tl.dot(high, table_high, sums)


@triton.jit
def _nothing_yet(BLOCK_N: tl.constexpr):
    best = tl.full([BLOCK_N], float("-inf"), tl.float32)
    return best, best, tl.zeros([BLOCK_N], tl.int32)


@triton.jit
def _at_most(products, length, near, bias_ptr, reach_ptr):
    """The scores as high as rounding may have lowered them from."""
    reach = tl.load(reach_ptr)
    return products + length[:, None] * (near * reach)[None, :] + (tl.load(bias_ptr) + near * reach * reach)[None, :]


@triton.jit
def _fold(scores, begin, best, second, code, BLOCK_C: tl.constexpr):
    """The highest so far, the second highest and where the highest is, the first of equal ones."""
    top, where = tl.max(scores, axis=1, return_indices=True)
    others = tl.where(tl.arange(0, BLOCK_C)[None, :] == where[:, None], float("-inf"), scores)
    second = tl.maximum(tl.maximum(second, tl.max(others, axis=1)), tl.minimum(best, top))
    code = tl.where(top > best, begin + where, code)
    return tl.maximum(best, top), second, code


@triton.jit
def _is_unsure(best, second, length, reach, longest, near, far):
    span = length + longest
    slack = 2 * near * reach * (length + reach) + far * span * span + _FLOOR
    return (second < best - slack) == 0  # so that NaN is unsure


def run(kernel: Any, configs: str, *, num_frames: int, device: str, **arguments: Any) -> None:
    """Launch a search, with the blocks that are fastest on this GPU. On the CPU Triton must be its interpreter."""
    blocks: dict[str, int] = {}
    if device == "cpu":
        blocks = _INTERPRETED
    elif num_frames < _NUM_STEADY_FRAMES:
        blocks = _CONFIGS[configs][0].all_kwargs()
    else:
        kernel = _tuned(kernel, configs)
    kernel[lambda meta: (triton.cdiv(num_frames, meta["BLOCK_N"]),)](**arguments, **blocks, num_frames=num_frames)


@functools.cache
def _tuned(kernel: Any, configs: str) -> Any:
    return triton.autotune(configs=_CONFIGS[configs], key=["padded_size", "dim"])(kernel)


def run_sum(*, num_frames: int, dim: int, **arguments: Any) -> None:
    """Launch `sum_stages`."""
    block_d = min(128, triton.next_power_of_2(dim))
    grid = (triton.cdiv(num_frames, 32), triton.cdiv(dim, block_d))
    sum_stages[grid](**arguments, num_frames=num_frames, dim=dim, BLOCK_N=32, BLOCK_D=block_d)
