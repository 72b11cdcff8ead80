"""What is told of a fit in a codebook's header: figures that two fits with one seed share.

Axes: N frames, D dimensions, K codebooks, C centroids, P phones.
"""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..pipelines.phones import MAX_PHONES, agreement
from ..pipelines.sampled import Sampled
from ..tokenizers.codebook import Codebook
from ..tokenizers.kmeans import Frames

_BLOCK = 16_384  # frames at a time
_MEASURED = 65_536  # frames whose distances are counted: the first, which are a sample themselves
_BINS = 40


def mean_square(frames_ND: NDArray[np.float32], *, spherical: bool) -> float:
    """Of the frames about their mean, in one pass over what may not fit into memory."""
    total_D, squares, first_D = np.zeros(frames_ND.shape[1]), 0.0, frames_ND[0].astype(np.float64)
    for block_ND in _blocks(frames_ND, spherical=spherical):
        apart_ND = block_ND.double().numpy() - first_D  # about one of them: their squares lose no digits
        total_D += apart_ND.sum(axis=0)
        squares += float(np.square(apart_ND).sum())
    mean_D = total_D / len(frames_ND)
    return squares / len(frames_ND) - float(np.square(mean_D).sum())


def distances(frames_ND: NDArray[np.float32], codebook: Codebook, *, device: str) -> dict[str, Any]:
    """How far frames are from what their codes stand for: a histogram of the first many, as `numpy.histogram` gives it.

    `edges` in the units of the features, `counts` of frames.
    """
    quantizer = codebook.open(device=device)
    found = []
    for block_ND in _blocks(frames_ND[:_MEASURED], spherical=codebook.spherical):
        frames = block_ND.to(device)
        found.append((frames - quantizer.decode(quantizer.encode(frames))).double().square().sum(dim=1).sqrt().cpu())
    distances_N = torch.cat(found).numpy()
    counts, edges = np.histogram(distances_N, bins=_BINS, range=(0.0, max(float(distances_N.max()), 1e-12)))
    return {
        "frames": len(distances_N),
        "mean": round(float(distances_N.mean()), 6),
        "edges": [round(float(edge), 6) for edge in edges],
        "counts": counts.tolist(),
    }


def phones(
    sampled: Sampled, frames_ND: NDArray[np.float32], codebook: Codebook, *, device: str
) -> dict[str, Any] | None:
    """How well units of the first codebook and the corpus's phones agree on the sample; None where there are none."""
    labelled = np.flatnonzero(sampled.phones_N >= 0)
    if not len(labelled) or len(sampled.phones) > MAX_PHONES:
        return None
    quantizer, size = codebook.open(device=device), codebook.centroids_QCD.shape[1]
    joint_PC = np.zeros((len(sampled.phones), size), dtype=np.int64)
    for begin in range(0, len(labelled), _BLOCK):
        chosen = labelled[begin : begin + _BLOCK]
        units_N = quantizer.encode(torch.from_numpy(frames_ND[chosen]).to(device))[0].cpu().numpy()
        np.add.at(joint_PC, (sampled.phones_N[chosen], units_N), 1)
    return {"frames": len(labelled), **asdict(agreement(joint_PC))}


def _blocks(frames_ND: NDArray[np.float32], *, spherical: bool) -> Iterator[Tensor]:
    """Frames in memory, a block at a time."""
    frames = Frames(frames_ND, directions=spherical)
    for rows in frames.blocks():
        yield frames.read(rows)
