"""Times k-means assignment against fairseq's formula.

`make bench-assign`. 100,000 frames of 768 dimensions, as HuBERT-base has, 500 centroids, one utterance of 500 frames at
a time, one thread. Frames are log-mel speech, eight neighbours each; centroids are fitted to them. The peer is
`ApplyKmeans` of fairseq's examples/hubert/simple_kmeans/dump_km_label.py, by torch and by NumPy, which is what
`dump_label` gives it without a GPU. Repeats are interleaved; ratios are medians over them. Ids that differ from ours
are counted, with the widest relative gap between the squared distances of both in float64, and ids that a search in
float64 does not give. Prints a table and, last, one JSON object.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from interleaved import compared, interleaved, print_report
from latents import fitted_codebooks, flips, speech_frames
from torch import Tensor
from wavemill.tokenizers.quantize import ResidualQuantizer

FRAMES, UTTERANCE, DIM, SIZE, TARGET = 100_000, 500, 768, 500, 1.24


def fairseq_torch(centroids_CD: Tensor) -> Callable[[Tensor], Tensor]:
    centroids_DC = torch.from_numpy(centroids_CD.numpy().transpose())
    norms_1C = torch.from_numpy((centroids_CD.numpy().transpose() ** 2).sum(0, keepdims=True))

    def assign(x_ND: Tensor) -> Tensor:
        dist_NC = x_ND.pow(2).sum(1, keepdim=True) - 2 * torch.matmul(x_ND, centroids_DC) + norms_1C
        return dist_NC.argmin(dim=1)

    return assign


def fairseq_numpy(centroids_CD: Tensor) -> Callable[[Tensor], Tensor]:
    centroids_DC = centroids_CD.numpy().transpose()
    norms_1C = (centroids_DC**2).sum(0, keepdims=True)

    def assign(frames_ND: Tensor) -> Tensor:
        x_ND = frames_ND.numpy()
        dist_NC = (x_ND**2).sum(1, keepdims=True) - 2 * np.matmul(x_ND, centroids_DC) + norms_1C
        return torch.from_numpy(np.argmin(dist_NC, axis=1))

    return assign


def widest_gap(frames_MD: Tensor, centroids_CD: Tensor, ours_M: Tensor, theirs_M: Tensor) -> float:
    """Between the squared distances to two choices, relative to the farther."""
    squares = [
        (frames_MD.double() - centroids_CD[codes_M].double()).square().sum(dim=1) for codes_M in (ours_M, theirs_M)
    ]
    gaps_M = (squares[0] - squares[1]).abs() / torch.maximum(*squares)
    return float(gaps_M.max()) if len(gaps_M) else 0.0


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--corpus", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    frames_ND = speech_frames(FRAMES, DIM, arguments.corpus)
    centroids_1CD = fitted_codebooks(frames_ND[::5].contiguous(), num_stages=1, size=SIZE)
    quantizer = ResidualQuantizer(centroids_1CD)
    assigners: dict[str, Callable[[Tensor], Tensor]] = {
        "wavemill": lambda x_ND: quantizer.encode(x_ND)[0],
        "fairseq-torch": fairseq_torch(centroids_1CD[0]),
        "fairseq-numpy": fairseq_numpy(centroids_1CD[0]),
    }

    def ids(assign: Callable[[Tensor], Tensor]) -> Tensor:
        return torch.cat([assign(utterance_ND) for utterance_ND in frames_ND.split(UTTERANCE)])

    runs = {name: (lambda assign=assign: ids(assign)) for name, assign in assigners.items()}
    figures = compared(interleaved(runs, arguments.repeats))
    ours_N = ids(assigners["wavemill"])
    for name, assign in assigners.items():
        theirs_N = ids(assign)
        differ_M = (ours_N != theirs_N).nonzero()[:, 0]
        gap = widest_gap(frames_ND[differ_M], centroids_1CD[0], ours_N[differ_M], theirs_N[differ_M])
        flipped, _ = flips(frames_ND, centroids_1CD, theirs_N[None])
        figures[name] |= {"differing": len(differ_M), "gap": gap, "flipped": flipped}
    figures["fairseq-torch"]["target"] = TARGET
    print_report("assign", figures, against="fairseq-torch", peer="fairseq ApplyKmeans, its formula by torch", n=FRAMES)


if __name__ == "__main__":
    main()
