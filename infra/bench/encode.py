"""Times encoding against the published loop: one segment at a time, one thread, random weights of published sizes.

`make bench-encode` takes the shipped samples, `make bench-encode CORPUS=FOLDER` your own recordings; NAMES="mimi" only
some tokenizers. The peer is transformers as its model cards use it: feature extractor, then the whole model (all 12
layers of HuBERT-base, of which layer 9 is taken), then the nearest of 500 centroids by cdist. Repeats are interleaved;
ratios are medians over them. Prints a table and, last, one JSON object.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from published_loop import published_loop
from speech import read_speech
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
from random_weights import make_weights, open_published
from wavemill.tokenizers.registry import REGISTRY

TARGETS = {("hubert-base", "exact"): 1.25, ("hubert-base", "fast"): 2.5}
SEGMENTS, SEGMENT_S = 4, 10.0


def timed(encode: Callable[[Tensor], object], segments: list[Tensor]) -> float:
    """Seconds for all segments, one after the other."""
    started = time.perf_counter()
    with torch.inference_mode():
        for segment_N in segments:
            encode(segment_N)
    return time.perf_counter() - started


def bench(name: str, folder: Path, corpus: Path | None, repeats: int) -> dict[str, dict[str, object]]:
    entry = REGISTRY[name]
    rate = entry.spec.sample_rate
    speech_N = read_speech(corpus, rate, duration_s=SEGMENTS * SEGMENT_S)
    segments = list(speech_N.split(int(SEGMENT_S * rate)))
    make_weights(name, folder, small=False)
    ours = {
        mode.value: open_published(name, folder, small=False, mode=mode, speech_N=speech_N).encode
        for mode in entry.modes
    }
    loops = {"published": published_loop(name, folder, ours_centroids=500), **ours}
    times: dict[str, list[float]] = {each: [] for each in loops}
    for repeat in range(repeats + 1):
        for each, encode in loops.items():
            taken_s = timed(encode, segments)
            if repeat:  # the first round warms up
                times[each].append(taken_s)
    audio_s = sum(len(segment_N) for segment_N in segments) / rate
    figures: dict[str, dict[str, object]] = {}
    for mode in ours:
        ratios = [theirs / us for theirs, us in zip(times["published"], times[mode], strict=True)]
        figures[mode] = {
            "ratio": round(statistics.median(ratios), 2),
            "target": TARGETS.get((name, mode)),
            "spread": [round(min(ratios), 2), round(max(ratios), 2)],
            "x_realtime": round(audio_s / statistics.median(times[mode]), 1),
            "peer_x_realtime": round(audio_s / statistics.median(times["published"]), 1),
        }
        print(f"{name:20} {mode:6} " + "  ".join(f"{key} {value}" for key, value in figures[mode].items()), flush=True)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", default=["hubert-base", "encodec-24khz", "dac-16khz", "mimi"])
    parser.add_argument("--corpus", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = {}
    for name in arguments.names:
        with tempfile.TemporaryDirectory() as folder:
            results[name] = bench(name, Path(folder), arguments.corpus, arguments.repeats)
    import transformers

    first = results[arguments.names[0]]
    print(
        json.dumps(
            {
                "name": "encode",
                "tokenizer": arguments.names[0],
                **first["exact"],
                "peer": f"transformers {transformers.__version__}, one segment at a time",
                "threads": 1,
                "segments": f"{SEGMENTS} x {SEGMENT_S:.0f} s",
                "all": results,
            }
        )
    )


if __name__ == "__main__":
    main()
