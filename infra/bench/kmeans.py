"""Times k-means against scikit-learn's MiniBatchKMeans as fairseq calls it, on speech features.

`make bench-kmeans` takes the shipped samples, CORPUS=FOLDER your own recordings. Features are those of layer 9 of
HuBERT-base (the published shape, random weights) and MFCC, 39 dimensions; every sixth recording is held out. The peer
is learn_kmeans.py of fairseq's examples/hubert/simple_kmeans: k-means++ with 20 starts, batches of 10,000, at most 100
passes. Both get the same cores (--cores); repeats are interleaved and ratios are medians over them. Inertia is the
mean squared distance to the nearest centroid in float32, of the frames fitted on and of those held out. --cache keeps
the features between runs. Prints a table and, last, one JSON object.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from speech import read_recordings

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
import weights_ssl
from wavemill.tokenizers.fit import FitPlan, fit
from wavemill.tokenizers.quantize import ResidualQuantizer
from wavemill.tokenizers.registry import load_features
from wavemill.tokenizers.tokenizer import TokenizerConfig

TARGET = 4.0
HELD_OUT = 6  # every so many recordings one
FEATURES = {"hubert": "hubert-base", "mfcc": "mfcc-kmeans"}

Fit = Callable[[NDArray[np.float32], int, int], NDArray[np.float32]]


def features_of(kind: str, corpus: Path | None, cache: Path, num_frames: int) -> dict[str, NDArray[np.float32]]:
    """Features to fit on and those held out, up to `num_frames` together; from the cache if they are there."""
    cache.mkdir(parents=True, exist_ok=True)
    path = cache / f"{kind}-{num_frames}.npz"
    if not path.exists():
        with tempfile.TemporaryDirectory() as folder:
            weights = None if kind == "mfcc" else str(weights_ssl.make(FEATURES[kind], Path(folder), small=False))
            features = load_features(TokenizerConfig(tokenizer=FEATURES[kind], weights=weights))
            recordings = read_recordings(corpus, 16_000, duration_s=num_frames / 50, each_s=20.0)
            with torch.inference_mode():
                parts = [features.extract(waveform_N).numpy() for waveform_N in recordings]
        held_out = np.concatenate(parts[HELD_OUT - 1 :: HELD_OUT])
        del parts[HELD_OUT - 1 :: HELD_OUT]
        np.savez(path, fitted=np.concatenate(parts), held_out=held_out)
    with np.load(path) as file:
        return dict(file)


def fit_ours(frames_ND: NDArray[np.float32], size: int, seed: int, *, backend: str) -> NDArray[np.float32]:
    return fit(frames_ND, FitPlan(size=size, seed=seed, backend=backend)).centroids_KCE[0].numpy()


def fit_as_fairseq(frames_ND: NDArray[np.float32], size: int, seed: int) -> NDArray[np.float32]:
    """fairseq examples/hubert/simple_kmeans/learn_kmeans.py: its `get_km_model` with the defaults of its options."""
    from sklearn.cluster import MiniBatchKMeans
    from threadpoolctl import threadpool_limits

    kmeans = MiniBatchKMeans(
        n_clusters=size,
        init="k-means++",
        max_iter=100,
        batch_size=10_000,
        verbose=0,
        compute_labels=False,
        tol=0.0,
        max_no_improvement=100,
        init_size=None,
        n_init=20,
        reassignment_ratio=0.0,
        random_state=seed,
    )
    with threadpool_limits(len(os.sched_getaffinity(0))):  # whatever OMP_NUM_THREADS says
        return kmeans.fit(frames_ND).cluster_centers_


def inertia(frames_ND: NDArray[np.float32], centroids_CD: NDArray[np.float32]) -> float:
    quantizer = ResidualQuantizer(torch.from_numpy(centroids_CD)[None])
    frames = torch.from_numpy(frames_ND)
    return float((frames - quantizer.decode(quantizer.encode(frames))).square().sum(dim=1).double().mean())


def bench(frames: dict[str, NDArray[np.float32]], size: int, backends: list[str], repeats: int) -> dict[str, object]:
    """Seconds and inertias of each, and ratios to the peer."""
    fits: dict[str, Fit] = {name: lambda *of, name=name: fit_ours(*of, backend=name) for name in backends}
    fits["sklearn"] = fit_as_fairseq
    took: dict[str, list[float]] = {name: [] for name in fits}
    left: dict[str, list[list[float]]] = {name: [] for name in fits}
    for seed in range(repeats):
        for name, run in fits.items():
            started = time.perf_counter()
            centroids_CD = run(frames["fitted"], size, seed)
            took[name].append(time.perf_counter() - started)
            left[name].append([inertia(part_ND, centroids_CD) for part_ND in (frames["fitted"], frames["held_out"])])
    figures: dict[str, object] = {
        "sklearn": {"seconds": round(statistics.median(took["sklearn"]), 2), **told(left["sklearn"])}
    }
    for name in backends:
        ratios = [theirs / ours for theirs, ours in zip(took["sklearn"], took[name], strict=True)]
        figures[name] = {
            "seconds": round(statistics.median(took[name]), 2),
            "ratio": round(statistics.median(ratios), 2),
            "spread": [round(min(ratios), 2), round(max(ratios), 2)],
            **told(left[name]),
        }
    return figures


def told(left: list[list[float]]) -> dict[str, float]:
    """Medians of the inertias."""
    fitted, held_out = (statistics.median(column) for column in zip(*left, strict=True))
    return {"inertia": round(fitted, 3), "held_out": round(held_out, 3)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--corpus", type=Path)
    parser.add_argument("--features", nargs="*", default=["hubert", "mfcc"], choices=FEATURES)
    parser.add_argument("--sizes", nargs="*", type=int, default=[500, 100])
    parser.add_argument("--backends", nargs="*", default=["torch", "faiss"], choices=["torch", "faiss"])
    parser.add_argument("--frames", type=int, default=60_000, help="at most, those held out included")
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--cache", type=Path, help="a folder that keeps the features")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.cores])
    warnings.filterwarnings("ignore", module="sklearn")
    results: dict[str, dict[str, object]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind, size in product(arguments.features, arguments.sizes):
            frames = features_of(kind, arguments.corpus, arguments.cache or Path(folder), arguments.frames)
            figures = bench(frames, size, arguments.backends, arguments.repeats)
            num, dim = frames["fitted"].shape
            for name, told_of in figures.items():
                said = "  ".join(f"{key} {value}" for key, value in told_of.items())
                print(f"{kind:6} N {num:,} D {dim} K {size:4} {name:8} {said}", flush=True)
            results[f"{kind}-{size}"] = {"n": num, "held_out": len(frames["held_out"]), **figures}
    import sklearn

    first = results[f"{arguments.features[0]}-{arguments.sizes[0]}"]
    ours = first[arguments.backends[0]]
    peer = f"scikit-learn {sklearn.__version__} MiniBatchKMeans as fairseq calls it"
    told_first = {"ratio": ours["ratio"], "target": TARGET, "spread": ours["spread"], "n": first["n"]}
    print(json.dumps({"name": "kmeans", **told_first, "peer": peer, "threads": arguments.cores, "all": results}))


if __name__ == "__main__":
    main()
