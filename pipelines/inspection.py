"""A dataset at a glance: what is in it, how its codes are used, what went wrong."""

from collections import Counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..storage.codes import list_streams, open_stream, read_codes, stream_spec
from ..storage.parquet import read_parquet
from ..storage.root import Root
from ..storage.schema import CORPUS_SCHEMA
from ..storage.statistics import merged_statistics
from ..storage.table import Snapshot

MAX_SHARDS = 256  # a larger dataset is looked at through this many shards, evenly spread


def describe_corpus(root: Root, corpus: Snapshot) -> dict[str, Any]:
    """Figures of a corpus, over all of its rows."""
    columns = ["source", "path", "member", "format", "sample_rate", "duration_s", "speaker", "language", "error"]
    counts: dict[str, Counter[Any]] = {
        name: Counter() for name in ("source", "format", "sample_rate", "language", "error")
    }
    speakers: set[str] = set()
    recordings = 0
    duration_s = 0.0
    last = None
    for shard in corpus.files:
        table = read_parquet(root, corpus.path(shard), schema=CORPUS_SCHEMA, columns=columns)
        duration_s += sum(table["duration_s"].to_pylist())
        speakers.update(name for name in table["speaker"].to_pylist() if name is not None)
        for name, counter in counts.items():
            counter.update(value for value in table[name].to_pylist() if value is not None)
        places = dict.fromkeys(zip(*(table[name].to_pylist() for name in ("source", "path", "member")), strict=True))
        recordings += len(places) - (last in places)  # a recording's windows may go on in the next shard
        last = next(reversed(places), None)
    return {
        "root": root.uri,
        "version": corpus.version,
        "policy": corpus.metadata["policy"],
        "segments": corpus.num_rows,
        "recordings": recordings,
        "shards": len(corpus.files),
        "hours": duration_s / 3600,
        "errors": corpus.num_errors,
        "speakers": len(speakers),
        "sources": dict(counts["source"].most_common()),
        "formats": dict(counts["format"].most_common()),
        "sample_rates": {str(rate): count for rate, count in counts["sample_rate"].most_common()},
        "languages": dict(counts["language"].most_common()),
        "errors_by_class": dict(counts["error"].most_common()),
    }


def describe_streams(root: Root, corpus: Snapshot) -> list[dict[str, Any]]:
    """Figures of every stream, by name."""
    return [_describe_stream(root, corpus, name, open_stream(root, name)) for name in list_streams(root)]


def _describe_stream(root: Root, corpus: Snapshot, name: str, snapshot: Snapshot) -> dict[str, Any]:
    spec = stream_spec(snapshot)
    looked_at = _spread(list(snapshot.files))
    usage_KC, num_frames, errors = _usage(root, snapshot, looked_at)
    size_bytes = sum(snapshot.files[shard].size_bytes for shard in looked_at)
    num_codes = int(usage_KC.sum())
    rate = float(spec.mean_frame_rate) if spec.bits_per_second else 0.0  # 0 where frames are no clock
    entropies = [_entropy_bits(usage_C) for usage_C in usage_KC]
    numbers = merged_statistics(root, snapshot, looked_at) if spec.dim else None
    return {
        "stream": name,
        "tokenizer": spec.tokenizer,
        "version": snapshot.version,
        "fingerprint": snapshot.metadata["fingerprint_hash"],
        "fingerprint_parts": snapshot.metadata["fingerprint"],
        "numerics": snapshot.metadata["numerics"],
        "frame_rate": str(spec.frame_rate),
        "num_codebooks": spec.num_codebooks,
        "codebook_size": spec.codebook_size,
        "dim": spec.dim,
        "mean": None if numbers is None else numbers.mean_D.tolist(),
        "deviation": None if numbers is None else np.sqrt(numbers.variance_D).tolist(),
        "segments": snapshot.num_rows,
        "shards": len(snapshot.files),
        "shards_missing": len(corpus.files) - len(set(corpus.files) & set(snapshot.files)),
        "shards_looked_at": len(looked_at),
        "hours": num_frames / rate / 3600 if rate else None,
        "frames": num_frames,
        "size_bytes": size_bytes,
        "bytes_per_code": size_bytes / num_codes if num_codes else None,
        "bits_per_second": spec.bits_per_second,
        "entropy_bits_per_second": sum(entropies) * rate,
        "codebooks": [
            {"codebook": book, "used_codes": int((usage_C > 0).sum()), "entropy_bits": entropy}
            for book, (usage_C, entropy) in enumerate(zip(usage_KC, entropies, strict=True))
        ],
        "errors": snapshot.num_errors,
        "errors_by_class": dict(errors.most_common()),
    }


def stream_usage(root: Root, name: str) -> NDArray[np.int64]:
    """How often each code of each codebook of a stream is used, `[K, C]`, in the shards that figures are made of."""
    snapshot = open_stream(root, name)
    return _usage(root, snapshot, _spread(list(snapshot.files)))[0]


def corpus_durations(root: Root, corpus: Snapshot) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """How many segments last how long: counts `[B]` between edges `[B + 1]` in seconds, 20 to a factor of ten.

    Segments with an error are left out; the first bin holds all that is shorter, the last all that is longer.
    """
    edges_s = np.logspace(-2, 5, 141)
    counts_B = np.zeros(len(edges_s) - 1, dtype=np.int64)
    for shard in corpus.files:
        table = read_parquet(root, corpus.path(shard), schema=CORPUS_SCHEMA, columns=["duration_s", "error"])
        duration_s = table["duration_s"].to_numpy()[table["error"].is_null().to_numpy()]
        counts_B += np.histogram(np.clip(duration_s, edges_s[0], edges_s[-1]), edges_s)[0]
    return counts_B, edges_s


def _usage(root: Root, snapshot: Snapshot, shards: list[int]) -> tuple[NDArray[np.int64], int, Counter[str]]:
    """Uses of codes `[K, C]`, frames, and errors by class."""
    spec = stream_spec(snapshot)
    num_frames = 0
    usage_KC = np.zeros((spec.num_codebooks, spec.codebook_size), dtype=np.int64)
    errors: Counter[str] = Counter()
    for shard in shards:
        codes = read_codes(root, snapshot, shard)
        errors.update(error for error in codes.errors if error is not None)
        num_frames += sum(num for num in codes.num_frames if num is not None)
        for book, (values, _) in enumerate(codes.books):
            usage_KC[book] += np.bincount(values, minlength=spec.codebook_size)
    return usage_KC, num_frames, errors


def _entropy_bits(usage_C: np.ndarray) -> float:
    total = usage_C.sum()
    if not total:
        return 0.0
    share_C = usage_C[usage_C > 0] / total
    return float(abs(-(share_C * np.log2(share_C)).sum()))


def _spread(shards: list[int]) -> list[int]:
    if len(shards) <= MAX_SHARDS:
        return shards
    return [shards[index * len(shards) // MAX_SHARDS] for index in range(MAX_SHARDS)]
