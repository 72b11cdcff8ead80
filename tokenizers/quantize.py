"""Nearest-centroid and residual quantization in float32.

Axes: N frames, D dimensions, C centroids, Q stages (codebooks), K codebooks of a stream, T frames of a segment.
"""

import torch
from torch import Tensor

BLOCK_FRAMES = 256  # scores of a block, 256 x 1024 float32, stay in a core's cache


class ResidualQuantizer:
    """Residual vector quantization: x_1 = x; i_q = argmin_i |x_q - C_q[i]|^2; x_{q+1} = x_q - C_q[i_q].

    One stage is plain k-means assignment. Distances are compared in float32 as x.c - |c|^2 / 2; ties go to the
    lowest index. Frames are taken in blocks of `BLOCK_FRAMES` counted from the first frame of the segment, so a
    segment's codes never depend on what else is in flight. SoundStream, Zeghidour et al. 2021, section III-C.
    """

    def __init__(self, centroids_QCD: Tensor, *, device: str = "cpu") -> None:
        self.centroids_QCD = centroids_QCD.to(device=device, dtype=torch.float32).contiguous()
        self._bias_QC = -0.5 * self.centroids_QCD.square().sum(dim=2)

    def encode(self, frames_ND: Tensor) -> Tensor:
        """Codes `[Q, N]`, int64."""
        num_stages = self.centroids_QCD.shape[0]
        codes_QN = torch.empty(num_stages, frames_ND.shape[0], dtype=torch.int64, device=frames_ND.device)
        for begin in range(0, frames_ND.shape[0], BLOCK_FRAMES):
            # a copy of its own: BLAS results may depend on the alignment of what it is given
            residual_ND = frames_ND[begin : begin + BLOCK_FRAMES].clone(memory_format=torch.contiguous_format)
            for stage in range(num_stages):
                centroids_CD = self.centroids_QCD[stage]
                scores_NC = torch.addmm(self._bias_QC[stage], residual_ND, centroids_CD.t())
                codes_N = scores_NC.max(dim=1).indices
                codes_QN[stage, begin : begin + BLOCK_FRAMES] = codes_N
                residual_ND -= centroids_CD[codes_N]
        return codes_QN

    def decode(self, codes_QN: Tensor) -> Tensor:
        """Sum of the centroids of the first `len(codes)` stages, `[N, D]`. Fewer stages, lower fidelity."""
        frames_ND = torch.zeros(codes_QN.shape[1], self.centroids_QCD.shape[2], device=self.centroids_QCD.device)
        for stage, codes_N in enumerate(codes_QN):
            frames_ND += self.centroids_QCD[stage][codes_N]
        return frames_ND
