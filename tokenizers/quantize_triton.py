"""Residual search on an NVIDIA GPU: a GEMM whose epilogue keeps the best two scores, so that no score reaches memory.

Axes: N frames, D dimensions, C centroids, Q stages. `tables` is a `ResidualQuantizer`.

A frame is unsure if at some stage its best two scores are too close. The codes of all others are those that `tables`
finds on a CPU. Proof: let x be what is left of a frame at some stage, less the centroids' mean, c a centroid less it,
both exact; u = 2^-24. The nearest centroid has the highest x.c - |c|^2 / 2, whatever "mean" is. Of |x| |c| u, the
computed x.c is off by no more than

- 2, for x and c are rounded to float32;
- 12.2: they are scaled by powers of two, so that the largest component of the frame and of the stage's centroids lies
  between 2^14 and 2^15, and split into float16 halves of 11 bits: x = h + l + r, |l| <= 2^-11 |x|, |r| <= 2^-22 |x|,
  plus 2^-25 a component below the range of float16. h.h + h.l + l.h leaves out three products of 2^-22 |x| |c| at most
  (Ootomo and Yokota 2022, "Recovering single precision accuracy from Tensor Cores"): three GEMMs at the rate of
  float16, where 3xTF32 is as exact at half of it;
- 2.25 B + 3: a tensor core multiplies halves exactly, aligns 8 or more products and the sum so far to the largest of
  them and cuts, not rounds, at 24 bits: of k + 1 numbers each loses 2 u of the largest, which is no more than the sum
  of all |x_i c_i|, that is |x| |c| (Fasi et al. 2021, "Numerical behavior of NVIDIA tensor cores"). B products of h.h
  are summed so, on top of 2 B small ones;
- D / B: blocks of B dimensions are added in float32.

|c|^2 / 2, rounded from float64, and the last two additions are off by 2 u (|x| |c| + 2 |c|^2). So with |c| + L / 1024
for |c|, L being the longest of the stage, which is more than enough for what is below the range of float16, a score is
off by e_c = u |c| (|x| + |c|) (2.25 B + D / B + 24) at most; of the 24, 4 are left for |x| and the comparison. The
kernels look for the highest score + e_c. A frame is sure if it exceeds the second highest by more than its own 2 e_c,
and by more than twice what float64 distances are off by, (D + 2) 2^-53 (|x| + L)^2, too: then no other centroid is as
near, nor looks so in float64. What is left of it is the same float32 subtraction as on a CPU, so the next stage begins
alike. Scores under 1e-30, that underflow could touch, and numbers that are not finite are unsure.
"""

import functools
import importlib.util
import weakref
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

_MOST_ON_CHIP = 256  # dimensions of a frame that stays in registers
_STREAMED_DIMS = 64  # at a time, of longer frames
_SIZE_STEP = 128  # every BLOCK_C divides it
_UNIT = 2.0**-24


class Tables(Protocol):
    """What is used of a `ResidualQuantizer`, whose file imports this one."""

    centroids_QCD: Tensor
    _mean_Q1D: Tensor
    _centred_QCD: Tensor


@functools.cache
def is_available(device: torch.device) -> bool:
    """Whether the kernels run there: on an NVIDIA GPU of compute capability 8.0 or more, with Triton installed."""
    if device.type != "cuda" or torch.version.cuda is None or importlib.util.find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


@torch.no_grad()
def encode_residual(frames_ND: Tensor, tables: Tables) -> tuple[Tensor, Tensor]:
    """Codes `[Q, N]` int64, and which frames are unsure, `[N]` bool: their codes may be wrong, all others are right.

    Up to 256 dimensions all stages are one launch, and what is left of a frame stays on chip. Raises `ValueError` for
    frames that are not float32 of the tables' length.
    """
    stages, _, dim = tables.centroids_QCD.shape
    if frames_ND.dtype != torch.float32 or frames_ND.shape[1:] != (dim,):
        raise ValueError(f"frames are {list(frames_ND.shape)} {frames_ND.dtype}; expected [N, {dim}] torch.float32")
    num_frames = frames_ND.shape[0]
    codes_QN = torch.empty(stages, num_frames, dtype=torch.int64, device=frames_ND.device)
    unsure_N = torch.zeros(num_frames, dtype=torch.int8, device=frames_ND.device)
    if num_frames:
        search = _search_on_chip if dim <= _MOST_ON_CHIP else _search_streamed
        with torch.cuda.device_of(frames_ND):
            search(frames_ND.contiguous(), tables, codes_QN, unsure_N)
    return codes_QN, unsure_N.bool()


@torch.no_grad()
def decode_sum(codes_QN: Tensor, tables: Tables) -> Tensor:
    """Sum of the centroids of the first `len(codes)` stages, `[N, D]` float32, added stage by stage.

    Codes must be the tables': nothing is checked.
    """
    from . import quantize_kernels

    _, size, dim = tables.centroids_QCD.shape
    stages, num_frames = codes_QN.shape
    sums_ND = torch.empty(num_frames, dim, device=codes_QN.device)
    if num_frames:
        with torch.cuda.device_of(codes_QN):
            quantize_kernels.run_sum(
                codes_ptr=codes_QN.contiguous(),
                centroids_ptr=tables.centroids_QCD,
                sums_ptr=sums_ND,
                num_frames=num_frames,
                size=size,
                dim=dim,
                stages=stages,
            )
    return sums_ND


def _search_on_chip(frames_ND: Tensor, tables: Tables, codes_QN: Tensor, unsure_N: Tensor) -> None:
    from . import quantize_kernels

    stages, size, dim = tables.centroids_QCD.shape
    halves = _halves_of(tables)
    near, far = _slack(dim, dim)
    quantize_kernels.run(
        quantize_kernels.search_stages,
        "up to 128 dimensions" if dim <= 128 else "up to 256 dimensions",
        num_frames=frames_ND.shape[0],
        device=frames_ND.device.type,
        frames_ptr=frames_ND,
        centroids_ptr=tables.centroids_QCD,
        mean_ptr=halves.mean_QD,
        high_ptr=halves.high_QCD,
        low_ptr=halves.low_QCD,
        bias_ptr=halves.bias_QC,
        reach_ptr=halves.reach_QC,
        longest_ptr=halves.longest_Q,
        unscale_ptr=halves.unscale_Q,
        codes_ptr=codes_QN,
        unsure_ptr=unsure_N,
        size=size,
        dim=dim,
        padded_size=halves.bias_QC.shape[1],
        stages=stages,
        near=near,
        far=far,
        BLOCK_D=halves.mean_QD.shape[1],
    )


def _search_streamed(frames_ND: Tensor, tables: Tables, codes_QN: Tensor, unsure_N: Tensor) -> None:
    from . import quantize_kernels

    stages, size, dim = tables.centroids_QCD.shape
    halves = _halves_of(tables)
    near, far = _slack(dim, _STREAMED_DIMS)
    for stage in range(stages):
        quantize_kernels.run(
            quantize_kernels.search_stage,
            "streamed",
            num_frames=frames_ND.shape[0],
            device=frames_ND.device.type,
            frames_ptr=frames_ND,
            mean_ptr=halves.mean_QD[stage],
            high_ptr=halves.high_QCD[stage],
            low_ptr=halves.low_QCD[stage],
            bias_ptr=halves.bias_QC[stage],
            reach_ptr=halves.reach_QC[stage],
            longest_ptr=halves.longest_Q[stage],
            unscale_ptr=halves.unscale_Q[stage],
            codes_ptr=codes_QN[stage],
            unsure_ptr=unsure_N,
            size=size,
            dim=dim,
            padded_size=halves.bias_QC.shape[1],
            padded_dim=halves.mean_QD.shape[1],
            near=near,
            far=far,
            BLOCK_D=_STREAMED_DIMS,
        )
        if stage + 1 < stages:
            frames_ND = frames_ND - tables.centroids_QCD[stage].index_select(0, codes_QN[stage])


def _slack(dim: int, block: int) -> tuple[float, float]:
    """What |c| (|x| + |c|), and what (|x| + L)^2 is multiplied by. See above."""
    return _UNIT * (2.25 * block + dim / block + 24), 2 * (dim + 2) * 2.0**-53


@dataclass(frozen=True, slots=True, kw_only=True)
class _Halves:
    """Centroids about their mean, scaled and split in halves, padded to what the kernels take at a time."""

    mean_QD: Tensor
    high_QCD: Tensor  # float16
    low_QCD: Tensor  # float16
    bias_QC: Tensor  # -|c|^2 / 2; minus infinity where there is no centroid
    reach_QC: Tensor  # |c| + L / 1024
    longest_Q: Tensor  # L
    unscale_Q: Tensor  # the inverse of the scale, a power of two


_known: "weakref.WeakKeyDictionary[Tables, _Halves]" = weakref.WeakKeyDictionary()


def _halves_of(tables: Tables) -> _Halves:
    halves = _known.get(tables)
    if halves is None:
        halves = _known[tables] = _split(tables)
    return halves


def _split(tables: Tables) -> _Halves:
    stages, size, dim = tables.centroids_QCD.shape
    padded_dim = -(-dim // _STREAMED_DIMS) * _STREAMED_DIMS
    if dim <= _MOST_ON_CHIP:
        padded_dim = max(16, 1 << (dim - 1).bit_length())  # Triton's blocks are powers of two
    padded_size = -(-size // _SIZE_STEP) * _SIZE_STEP
    mean_QD = tables.centroids_QCD.new_zeros(stages, padded_dim)
    mean_QD[:, :dim] = tables._mean_Q1D[:, 0]
    centred_QCD = tables.centroids_QCD.new_zeros(stages, padded_size, padded_dim)
    centred_QCD[:, :size, :dim] = tables._centred_QCD
    exponent_Q = torch.frexp(centred_QCD.abs().amax(dim=(1, 2))).exponent.clamp_min(-100)
    scaled_QCD = torch.ldexp(centred_QCD, 15 - exponent_Q[:, None, None])
    high_QCD = scaled_QCD.half()
    squares_QC = centred_QCD.double().square().sum(dim=2)
    bias_QC = (-0.5 * squares_QC).float()
    bias_QC[:, size:] = -torch.inf
    lengths_QC = squares_QC.sqrt()
    longest_Q1 = lengths_QC.amax(dim=1, keepdim=True)
    return _Halves(
        mean_QD=mean_QD,
        high_QCD=high_QCD,
        low_QCD=(scaled_QCD - high_QCD.float()).half(),
        bias_QC=bias_QC,
        reach_QC=(lengths_QC + longest_Q1 / 1024).float(),
        longest_Q=longest_Q1[:, 0].float(),
        unscale_Q=torch.ldexp(torch.ones_like(bias_QC[:, 0]), exponent_Q - 15),
    )
