"""Frames for fitting a codebook: a seeded sample over the whole corpus within a byte budget."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from ..storage.parquet import read_parquet
from ..storage.root import Root
from ..storage.schema import CORPUS_SCHEMA
from ..storage.table import Snapshot
from ..tokenizers.tokenizer import Features
from .ahead import DecodeAhead
from .entries import AudioError
from .reading import Row
from .tokenize import Work

_SPREAD = 8  # decode up to this many times the frames that are kept, so that they come from many segments


@dataclass(frozen=True, slots=True)
class Sample:
    """Frames `[N, D]` float32 and where they came from."""

    frames_ND: NDArray[np.float32]
    num_segments: int
    num_speakers: int
    num_errors: int
    duration_s: float  # of the audio decoded


def sample_frames(
    root: Root,
    corpus: Snapshot,
    features: Features,
    work: Work,
    *,
    budget_bytes: int,
    seed: int,
    leave_out: frozenset[str] = frozenset(),
    on_segment: Callable[[float, bool], None] = lambda duration_s, failed: None,
) -> Sample:
    """Features of segments chosen by a seeded hash of their ids; of each, an equal share of its frames.

    Segments of the speakers in `leave_out` are passed over. The sample depends on the corpus, the seed and the budget,
    and not on order or threads. `on_segment` hears of each segment's duration in seconds and whether it failed.
    """
    budget_frames = max(1, budget_bytes // (4 * features.dim))
    total_s = sum(row["duration_s"] for row in _rows(root, corpus, leave_out))
    total_frames = max(1.0, total_s * features.spec.sample_rate / features.spec.hop_length)
    keep = min(1.0, budget_frames / total_frames)
    segment_share = min(1.0, keep * _SPREAD)
    chosen = [row for row in _rows(root, corpus, leave_out) if _fraction(seed, row["id"]) < segment_share]
    if sum(row["duration_s"] for row in chosen) < 0.5 * segment_share * total_s:  # a few long segments: luck is no plan
        chosen = _first_by_hash(_rows(root, corpus, leave_out), seed, segment_share * total_s)
    chosen_frames = sum(row["duration_s"] for row in chosen) * features.spec.sample_rate / features.spec.hop_length
    share = min(1.0, budget_frames / max(chosen_frames, 1.0)) if keep < 1.0 else 1.0
    kept: dict[str, NDArray[np.float32]] = {}
    num_errors = 0
    readers = work.open_readers(root)
    try:
        for index, waveforms in DecodeAhead(chosen, {features.spec.sample_rate}, readers, work.decode_ahead_bytes):
            row = chosen[index]
            failed = isinstance(waveforms, AudioError)
            on_segment(row["duration_s"], failed)
            if failed:
                num_errors += 1
                continue
            with torch.inference_mode():
                frames_TD = features.extract(waveforms[features.spec.sample_rate]).cpu().numpy()
            kept[row["id"]] = _share_of(frames_TD, share, seed, row["id"])
    finally:
        for reader in readers:
            reader.close()
    frames = [kept[row_id] for row_id in sorted(kept)]
    frames_ND = np.concatenate(frames) if frames else np.empty((0, features.dim), dtype=np.float32)
    return Sample(
        frames_ND[:budget_frames],
        num_segments=len(kept),
        num_speakers=len({row["speaker"] for row in chosen if row["speaker"] is not None and row["id"] in kept}),
        num_errors=num_errors,
        duration_s=sum(row["duration_s"] for row in chosen),
    )


def _rows(root: Root, corpus: Snapshot, leave_out: frozenset[str]) -> Iterator[Row]:
    for shard in corpus.files:
        for row in read_parquet(root, corpus.path(shard), schema=CORPUS_SCHEMA).to_pylist():
            if row["error"] is None and row["speaker"] not in leave_out:
                yield row


def _first_by_hash(rows: Iterable[Row], seed: int, wanted_s: float) -> list[Row]:
    """Rows in the order of their seeded hashes until `wanted_s` seconds are covered."""
    chosen = []
    for row in sorted(rows, key=lambda row: _fraction(seed, row["id"])):
        if wanted_s <= 0:
            break
        chosen.append(row)
        wanted_s -= row["duration_s"]
    return chosen


def _fraction(seed: int, row_id: str) -> float:
    """A number in [0, 1) that only the seed and the id decide."""
    digest = hashlib.blake2b(f"{seed}/{row_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2**64


def _share_of(frames_TD: NDArray[np.float32], share: float, seed: int, row_id: str) -> NDArray[np.float32]:
    if share >= 1.0:
        return frames_TD
    generator = np.random.default_rng(int(_fraction(seed, row_id) * 2**53))
    return frames_TD[generator.random(len(frames_TD)) < share]
