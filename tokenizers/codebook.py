"""A codebook: centroids with the story of how they were fitted, in one safetensors file."""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from .quantize import GroupedQuantizer, ResidualQuantizer, open_quantizer
from .spec import UserError

_HEADER_KEY = "wavemill"


@dataclass(frozen=True, slots=True)
class Codebook:
    """Centroids `[Q, C, D]` float32 (Q stages of C centroids of D dimensions) and their provenance.

    `header` holds at least `tokenizer` (the registry name they were fitted for) and `features` (the fingerprint of
    the features they were fitted on), then what a person wants to know: frames, seed, inertia, versions. With
    `groups` G in it, frames of G * D dimensions are cut into G parts, each with Q / G stages of its own, group by group
    (product quantization, Jegou et al. 2011). With `spherical`, frames are brought to length one first, as the
    centroids are: the nearest is the one at the smallest angle.
    """

    centroids_QCD: Tensor
    header: dict[str, Any]

    @property
    def groups(self) -> int:
        return self.header.get("groups", 1)

    @property
    def spherical(self) -> bool:
        return self.header.get("spherical", False)

    @property
    def dim(self) -> int:
        """Dimensions of the frames."""
        return self.groups * self.centroids_QCD.shape[2]

    def open(self, *, device: str = "cpu") -> "ResidualQuantizer | GroupedQuantizer | SphericalQuantizer":
        """What turns frames into codes."""
        quantizer = open_quantizer(self.centroids_QCD, groups=self.groups, device=device)
        return SphericalQuantizer(quantizer) if self.spherical else quantizer

    @property
    def sha256(self) -> str:
        """Hash of the centroids alone: two fits that gave the same numbers are the same codebook."""
        shape = ",".join(str(size) for size in self.centroids_QCD.shape)
        return hashlib.sha256(shape.encode() + self.centroids_QCD.contiguous().numpy().tobytes()).hexdigest()

    def to_bytes(self) -> bytes:
        return safetensors.torch.save(
            {"centroids": self.centroids_QCD.contiguous()}, metadata={_HEADER_KEY: json.dumps(self.header)}
        )

    @classmethod
    def from_bytes(cls, content: bytes, *, name: str) -> "Codebook":
        """Read a file's content. `name` is what errors call it. Raises `UserError` if it is not one of ours."""
        try:
            centroids_QCD = safetensors.torch.load(content)["centroids"]
            header_size = int.from_bytes(content[:8], "little")
            metadata = json.loads(content[8 : 8 + header_size])["__metadata__"]
            header = json.loads(metadata[_HEADER_KEY])
            if not isinstance(header, dict):
                raise ValueError("its header is not an object")
        except (SafetensorError, KeyError, ValueError, RecursionError) as error:
            raise UserError(
                f"Codebook {name} is not a codebook file of wavemill ({error}). Fit one with `wavemill codebook fit`."
            ) from error
        if centroids_QCD.ndim != 3 or 0 in centroids_QCD.shape:
            raise UserError(
                f"Codebook {name} has centroids of shape {list(centroids_QCD.shape)}; expected "
                "[stages, size, dimensions]. Fit one with `wavemill codebook fit`."
            )
        groups, spherical = header.get("groups", 1), header.get("spherical", False)
        if type(groups) is not int or groups < 1 or centroids_QCD.shape[0] % groups or type(spherical) is not bool:
            raise UserError(
                f"Codebook {name} says that its {centroids_QCD.shape[0]} codebooks are in {groups!r} groups, spherical "
                f"{spherical!r}: that is no codebook of wavemill. Fit one with `wavemill codebook fit`."
            )
        return cls(centroids_QCD.float(), header)


class SphericalQuantizer:
    """Nearest by angle: frames are brought to length one, where the nearest of centroids of length one is that.

    |x - c|^2 = 2 - 2 x.c. A frame of zeros, which has no direction, is as far from all: its codes are those of index 0.
    """

    def __init__(self, quantizer: ResidualQuantizer | GroupedQuantizer) -> None:
        self._quantizer = quantizer

    def encode(self, frames_ND: Tensor) -> Tensor:
        return self._quantizer.encode(unit_length(frames_ND))

    def decode(self, codes_KN: Tensor) -> Tensor:
        return self._quantizer.decode(codes_KN)

    def gaps(self, frames_ND: Tensor) -> Tensor:
        return self._quantizer.gaps(unit_length(frames_ND))


def unit_length(frames_ND: Tensor) -> Tensor:
    """Frames of length one, zeros as they are.

    Lengths are taken in float64, so that float32 does not show in which order a device sums with other batch mates.
    """
    lengths_N1 = frames_ND.double().square().sum(dim=1, keepdim=True).sqrt()
    return (frames_ND / lengths_N1.clamp_min(torch.finfo(torch.float64).tiny)).float()
