"""A codebook: centroids with the story of how they were fitted, in one safetensors file."""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from .spec import UserError

_HEADER_KEY = "wavemill"


@dataclass(frozen=True, slots=True)
class Codebook:
    """Centroids `[Q, C, D]` float32 (Q stages of C centroids of D dimensions) and their provenance.

    `header` holds at least `tokenizer` (the registry name they were fitted for) and `features` (the fingerprint of
    the features they were fitted on), then what a person wants to know: frames, seed, inertia, versions.
    """

    centroids_QCD: Tensor
    header: dict[str, Any]

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
        return cls(centroids_QCD.float(), header)
