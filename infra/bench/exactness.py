"""Measures the promise: codes that differ batched, chunked, and in `fast`, at published sizes with random weights.

`make bench-exactness` takes the shipped samples, CORPUS=FOLDER your own recordings, NAMES some tokenizers. For each:

- against transformers' own extractor and model, one segment at a time, float32: codes that differ;
- batched: segments padded to one length of the ladder, against each alone; beside it transformers' own padded batch;
- long: one recording of --long seconds, which wavemill chunks, against transformers over the whole of it;
- fast: codes that differ from exact's; with --fast nothing else.

Centroids of semantic tokenizers are k-means (K = 500) on their own features. `first flips` counts frames whose first
differing stage has a float64 top-2 gap of 1e-5 or more: a true mismatch. Prints a table and, last, one JSON object.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch
from published_loop import published_batch
from speech import read_recordings, read_speech
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
from random_weights import make_weights, open_published, oracle
from wavemill.tokenizers.compare import compare_all
from wavemill.tokenizers.ladder import padded_length, rung_of
from wavemill.tokenizers.registry import REGISTRY
from wavemill.tokenizers.tokenizer import BatchTokenizer, Mode, Tokenizer

MAX_SEGMENT_S, BATCH = 12.0, 8
BATCHED_BY_TRANSFORMERS = ("hubert", "wavlm", "wav2vec2", "encodec", "mimi", "dac")


def measure(
    name: str, folder: Path, corpus: Path | None, *, total_s: float, long_s: float, fast_alone: bool
) -> dict[str, object]:
    spec = REGISTRY[name].spec
    rate = spec.sample_rate
    make_weights(name, folder, small=False)
    long_N = read_speech(corpus, rate, duration_s=long_s)
    segments = read_recordings(corpus, rate, duration_s=total_s, each_s=MAX_SEGMENT_S)[:24]
    fitted_on = read_speech(corpus, rate, duration_s=1.5 * total_s)
    tokenizer = open_published(name, folder, small=False, speech_N=fitted_on)
    with torch.inference_mode():
        alone = [tokenizer.encode(segment_N) for segment_N in segments]
        figures: dict[str, object] = {"segments": len(segments), "codes": sum(codes_KT.numel() for codes_KT in alone)}
        if not fast_alone:
            figures |= exact_figures(name, folder, tokenizer, segments, alone, long_N)
        if Mode.FAST in REGISTRY[name].modes:
            fast = open_published(name, folder, small=False, mode=Mode.FAST, speech_N=fitted_on)
            changed = [fast.encode(segment_N) for segment_N in segments]
            figures["fast"] = told(tokenizer, segments, alone, changed)
    return figures


def exact_figures(
    name: str, folder: Path, tokenizer: Tokenizer, segments: list[Tensor], alone: list[Tensor], long_N: Tensor
) -> dict[str, object]:
    figures: dict[str, object] = {}
    published = [quantized(tokenizer, oracle(name, folder, segment_N)) for segment_N in segments]
    figures["published"] = told(tokenizer, segments, alone, published)
    if isinstance(tokenizer, BatchTokenizer):
        batched = in_batches(tokenizer, segments, tokenizer.spec.sample_rate)
        figures["batched"] = told(tokenizer, segments, alone, batched)
    figures["padded_by_transformers"] = padded_share(name, folder, tokenizer, segments, alone)
    whole_KT = quantized(tokenizer, oracle(name, folder, long_N))
    figures["long"] = told(tokenizer, [long_N], [tokenizer.encode(long_N)], [whole_KT])
    return figures


def quantized(tokenizer: Tokenizer, published: Tensor) -> Tensor:
    """Published codes as they are; published features by the tokenizer's own codebook."""
    codes = published.dtype == torch.int64
    return published[: tokenizer.spec.num_codebooks] if codes else tokenizer.quantizer.encode(published)


def in_batches(tokenizer: BatchTokenizer, segments: list[Tensor], rate: int) -> list[Tensor]:
    """Codes of each segment, encoded beside others of all lengths."""
    codes: list[Tensor] = []
    for begin in range(0, len(segments), BATCH):
        batch = segments[begin : begin + BATCH]
        length = rung_of(max(len(segment_N) for segment_N in batch), rate)
        assert length is not None, "segments are shorter than the ladder's top"
        codes += tokenizer.encode_batch(batch, padded_length(length, rate))
    return codes


def padded_share(
    name: str, folder: Path, tokenizer: Tokenizer, segments: list[Tensor], alone: list[Tensor]
) -> float | None:
    """Share of codes that transformers' own padded batch changes. None for what `published_batch` does not know."""
    centroids_CD = tokenizer.quantizer.centroids_QCD[0] if REGISTRY[name].needs_codebook else None
    if name == "wav2vec2-codes" or name.partition("-")[0] not in BATCHED_BY_TRANSFORMERS:
        return None
    encode = published_batch(name, folder, num_centroids=0, centroids_CD=centroids_CD)
    different = total = 0
    for begin in range(0, len(segments), BATCH):
        batch = encode(segments[begin : begin + BATCH])
        for row, codes_KT in zip(batch, alone[begin : begin + BATCH], strict=True):
            theirs_KT = row.reshape(-1, row.shape[-1])[: codes_KT.shape[0], : codes_KT.shape[1]]
            different += int((theirs_KT != codes_KT).sum())
            total += codes_KT.numel()
    return round(different / total, 6)


def told(tokenizer: Tokenizer, segments: list[Tensor], ours: list[Tensor], theirs: list[Tensor]) -> dict[str, object]:
    found = compare_all(tokenizer, segments, ours, theirs)
    return {
        "codes": found.num_codes,
        "different": found.num_different,
        "share": round(found.miss_rate, 6),
        "near_tie_frames": found.near_ties,
        "mismatch_frames": found.mismatches,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", default=[name for name, entry in REGISTRY.items() if entry.weights])
    parser.add_argument("--corpus", type=Path)
    parser.add_argument("--seconds", type=float, default=100.0, help="of segments; codebooks take 1.5 times that")
    parser.add_argument("--long", type=float, default=75.0, help="seconds of the one long recording")
    parser.add_argument("--fast", action="store_true", help="measure what `fast` changes alone")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = {}
    for name in arguments.names:
        with tempfile.TemporaryDirectory() as folder:
            results[name] = measure(
                name,
                Path(folder),
                arguments.corpus,
                total_s=arguments.seconds,
                long_s=arguments.long,
                fast_alone=arguments.fast,
            )
        print(name, json.dumps(results[name], indent=1), flush=True)
    print(json.dumps({"name": "exactness", "threads": 1, "long_s": arguments.long, "all": results}))


if __name__ == "__main__":
    main()
