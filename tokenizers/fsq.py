"""Finite scalar quantization (Mentzer et al. 2023, "Finite Scalar Quantization: VQ-VAE Made Simple").

Axes: N frames, D dimensions of a latent, E dimensions that are rounded, K codebooks, of which there is one.
"""

import math
from typing import Any

import torch
from torch import Tensor


class FiniteScalarQuantizer:
    """One codebook that nobody stores: a latent is projected to a few dimensions, each is bounded and rounded to one
    of its levels, and the levels are the digits of the code, the first dimension's the lowest.

    The parameters and the bound are those of transformers' `Xcodec2Quantizer`, which bounds twice, as X-Codec-2 was
    trained. What is rounded is float32, halves to even.
    """

    def __init__(self, quantizer: Any, *, device: str = "cpu") -> None:
        self._quantizer = quantizer.to(device)
        levels = [int(level) for level in quantizer.quantizer.quantization_levels]
        self.size = math.prod(levels)
        self._levels_E = torch.tensor(levels, device=device)
        self._lowest_E = -(self._levels_E // 2)
        self._highest_E = self._lowest_E + self._levels_E - 1
        self._digits_E = torch.tensor([math.prod(levels[:dim]) for dim in range(len(levels))], device=device)

    @torch.no_grad()
    def encode(self, frames_ND: Tensor) -> Tensor:
        """Codes `[1, N]`, int64, of float32 latents."""
        level_NE = self._bounded(frames_ND).round().long() - self._lowest_E
        return (level_NE * self._digits_E).sum(dim=1)[None]

    @torch.no_grad()
    def gaps(self, frames_ND: Tensor) -> Tensor:
        """How sure each code is, `[1, N]` float64: twice the distance to the nearest border between two levels.

        That of the dimension that is nearest to one: 0 on a border, 1 midway between two, in steps of a level. Where it
        is under 1e-5, rounding that came before the quantizer may let the code fall either way: a near-tie.
        """
        bounded_NE = self._bounded(frames_ND.double())
        level_NE = bounded_NE.round()
        to_lower_NE = torch.where(level_NE > self._lowest_E, bounded_NE - (level_NE - 0.5), 0.5)
        to_upper_NE = torch.where(level_NE < self._highest_E, (level_NE + 0.5) - bounded_NE, 0.5)
        return 2.0 * torch.minimum(to_lower_NE, to_upper_NE).amin(dim=1).clamp(0.0, 0.5)[None]

    @torch.no_grad()
    def decode(self, codes_KN: Tensor) -> Tensor:
        """Latents `[N, D]` of codes `[1, N]`. Raises `ValueError` for codes that there are none of."""
        if codes_KN.shape[0] != 1:
            raise ValueError(f"{codes_KN.shape[0]} codes a frame, of one codebook")
        if codes_KN.numel():
            least, most = (int(bound) for bound in codes_KN.aminmax())
            if least < 0 or most >= self.size:
                raise ValueError(f"codes from {least} to {most}, of a codebook of {self.size:,}")
        return self._quantizer.from_codes(codes_KN[0, :, None])

    def _bounded(self, frames_ND: Tensor) -> Tensor:
        """`[N, E]` in the dtype of the frames; a level is as far from the next as 1 from 2."""
        project, bound = self._quantizer.project_in, self._quantizer.quantizer.bound
        weight_ED, bias_E = project.weight.to(frames_ND.dtype), project.bias.to(frames_ND.dtype)
        return bound(bound(torch.nn.functional.linear(frames_ND, weight_ED, bias_E)))
