"""DAC's quantizer: codes are compared in a few dimensions, by direction.

Axes: T frames, D dimensions of a latent, E dimensions that codes are compared in, Q stages (codebooks), S codes of one,
K codebooks given.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .quantize import ResidualQuantizer, relative_gaps

_LEAST_SQUARE = 0.05  # of a distance; 1e-5 of it, where near-ties begin, are four roundings of a float32 near 1


class FactorizedQuantizer:
    """Residual quantization by direction: each stage projects what is left to a few dimensions, takes the code whose
    vector points most nearly the same way, and takes that vector, projected back, from what is left.

    What is left is never formed: projections are linear, so a frame is projected once for all stages, and a code takes
    from the projections of the stages after its own what a table says (worked out in float64, kept in float32).
    Directions are compared as `ResidualQuantizer` compares; of equal ones the first. Frames are taken in blocks
    counted from the first. Kumar et al. 2023, section 3.2; Yu et al. 2022 (ViT-VQGAN).
    """

    def __init__(self, stages: Sequence[Any], *, device: str = "cpu") -> None:
        self._into = [_matrix(stage.in_proj, device) for stage in stages]
        self._back = [_matrix(stage.out_proj, device) for stage in stages]
        self._codebooks = [stage.codebook.weight.detach().to(device=device, dtype=torch.float32) for stage in stages]
        self._into_all = tuple(torch.cat(parts) for parts in zip(*self._into, strict=True))
        self._taken = [self._taken_by(stage) for stage in range(len(stages))]
        directions_QSE = torch.stack([functional.normalize(codebook_SE) for codebook_SE in self._codebooks])
        self._quantizer = ResidualQuantizer(directions_QSE, device=device)
        self._block = self._quantizer.block_frames

    def _taken_by(self, stage: int) -> Tensor:
        """What each code of a stage takes from the projections of the later stages, one after the other."""
        num_stages, (size, dim) = len(self._into), self._codebooks[stage].shape
        later = [self._into[after][0].double() for after in range(stage + 1, num_stages)]
        vectors_SD = _vectors(self._codebooks[stage], self._back[stage], torch.float64)
        taken_SX = torch.cat([vectors_SD.new_empty(size, 0), *(vectors_SD @ weight_ED.t() for weight_ED in later)], 1)
        assert taken_SX.shape[1] == (num_stages - 1 - stage) * dim
        return taken_SX.float()

    @torch.no_grad()
    def encode(self, frames_TD: Tensor) -> Tensor:
        """Codes `[Q, T]`, int64."""
        num_stages, (size, dim) = len(self._into), self._codebooks[0].shape
        codes_QT = torch.empty(num_stages, frames_TD.shape[0], dtype=torch.int64, device=frames_TD.device)
        room_TS = torch.empty(min(self._block, frames_TD.shape[0]), size, device=frames_TD.device)
        for begin in range(0, frames_TD.shape[0], self._block):
            # a copy of its own: BLAS results may depend on the alignment of what it is given
            block_TD = frames_TD[begin : begin + self._block].clone(memory_format=torch.contiguous_format)
            left_TX = functional.linear(block_TD, *self._into_all)
            for stage, taken_SX in enumerate(self._taken):
                direction_TE = functional.normalize(left_TX[:, :dim])
                codes_T = self._quantizer.nearest(direction_TE, stage, room_TS)
                codes_QT[stage, begin : begin + self._block] = codes_T
                left_TX = left_TX[:, dim:]
                left_TX -= taken_SX.index_select(0, codes_T)
        return codes_QT

    def gaps(self, frames_TD: Tensor) -> Tensor:
        """How sure each code is, `[Q, T]` float64: see `ResidualQuantizer.gaps`.

        Distances are those between directions. The published search computes them as 2 - 2 cos in float32, which is
        known to a few 1e-7: of codes that are as good as the same, it may take either.
        """
        residual_TD = frames_TD.to(torch.float64, copy=True)
        gaps = []
        for stage, codes_T in enumerate(self.encode(frames_TD)):
            weight_ED, bias_E = (each.double() for each in self._into[stage])
            direction_TE = functional.normalize(functional.linear(residual_TD, weight_ED, bias_E))
            directions_SE = functional.normalize(self._codebooks[stage].double())
            gaps.append(relative_gaps(direction_TE, directions_SE, power=2, least=_LEAST_SQUARE))
            residual_TD -= _vectors(self._codebooks[stage][codes_T], self._back[stage], torch.float64)
        return torch.stack(gaps)

    @torch.no_grad()
    def decode(self, codes_KT: Tensor) -> Tensor:
        """Latents `[T, D]` of the first `len(codes)` stages. Fewer stages, lower fidelity."""
        latents_TD = self._vectors(0, codes_KT[0])
        for stage, codes_T in enumerate(codes_KT[1:], start=1):
            latents_TD += self._vectors(stage, codes_T)
        return latents_TD

    def _vectors(self, stage: int, codes_T: Tensor) -> Tensor:
        return _vectors(self._codebooks[stage][codes_T], self._back[stage])


def _vectors(codes_TE: Tensor, back: tuple[Tensor, Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
    """Vectors of codebooks projected back, `[T, D]`."""
    weight_DE, bias_D = (each.to(dtype) for each in back)
    return functional.linear(codes_TE.to(dtype), weight_DE, bias_D)


def _matrix(conv: Any, device: str) -> tuple[Tensor, Tensor]:
    """Weight and bias of a convolution over single positions."""
    on_device = {"device": device, "dtype": torch.float32}
    return conv.weight.detach()[..., 0].to(**on_device).contiguous(), conv.bias.detach().to(**on_device)
