"""Shards to frames that codebooks are fitted on: the chosen segments decoded, their features kept in part.

A shard's sample is a few files below `tmp/` in the root, the last of which says that it is whole: so a fit that was
killed goes on from there. Axes: N frames of a shard's sample, T frames of a segment, D dimensions.
"""

import io
import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..storage.failpoints import failpoint
from ..storage.parquet import read_parquet
from ..storage.root import Root
from ..storage.schema import CORPUS_SCHEMA
from ..storage.table import Snapshot
from ..tokenizers.numerics import use_exact_math, use_one_thread
from ..tokenizers.registry import load_features
from ..tokenizers.spec import RunFailed, UserError, num_frames
from ..tokenizers.spill import reserved
from ..tokenizers.tokenizer import Features, LayeredFeatures, PiecewiseFeatures, TokenizerConfig
from .ahead import DecodeAhead
from .entries import AudioError
from .phones import paint_row
from .reading import Reader, Row
from .resample import resampled_length
from .sample_plan import SamplePlan
from .streams import without_revision
from .tokenize import ShardTask, Work

_PART_BYTES = 64 * 1024 * 1024  # of frames in a file, and in memory while it is written
_COLUMNS_NOT_READ = ("text", "words")

Layers = tuple[int | None, ...]  # (None,): of features without layers


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleWork:
    """Everything a worker needs to know before its first shard. Picklable."""

    work: Work  # with no streams: where the recordings are, and how they are decoded
    config: TokenizerConfig  # opened for the highest of the layers
    layers: Layers
    plan: SamplePlan
    folder: str  # of the samples, below the root

    @property
    def corpus(self) -> Snapshot:
        return self.work.corpus

    @property
    def device(self) -> str:
        return self.work.device

    @property
    def batch_seconds(self) -> None:
        """Each segment alone."""
        return None

    @property
    def together(self) -> int:
        return 1

    def worker(self) -> "Sampler":
        return Sampler(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleReport:
    """What a shard's sample is made of; the file that says that it is whole holds the same."""

    shard: int
    frames: int
    parts: int  # files of frames for each layer
    segments: int
    errors: int
    duration_s: float  # of the audio decoded
    speakers: list[str]
    phones: list[str]  # names of those in the index
    fingerprint: dict[str, str]  # of the features

    def to_bytes(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_bytes(cls, content: bytes) -> "SampleReport":
        return cls(**json.loads(content))


def report_file(shard: int) -> str:
    return f"shard-{shard:06d}.json"


def index_file(shard: int) -> str:
    """Of each frame its number, its stratum's place in the plan, and its phone's place in the report or -1."""
    return f"shard-{shard:06d}-index.npz"


def part_file(shard: int, layer: int | None, part: int) -> str:
    """Frames `[n, D]` of a layer."""
    return f"shard-{shard:06d}-{'frames' if layer is None else f'l{layer}'}-{part:03d}.npy"


class Sampler:
    """Holds warm features and turns shards into samples. The same class inline and on Ray."""

    def __init__(self, work: SampleWork) -> None:
        use_one_thread()
        use_exact_math()
        self._work = work
        self._root = Root(work.work.root_uri)
        self._places = {value: place for place, value in enumerate(work.plan.strata)}

    @cached_property
    def _features(self) -> Features:
        return load_features(self._work.config, device=self._work.device)

    @cached_property
    def _readers(self) -> list[Reader]:
        return self._work.work.open_readers(self._root)

    def about(self) -> dict[str, str]:
        """The fingerprint of the features."""
        return self._features.fingerprint

    def close(self) -> None:
        """End the decoder processes."""
        for reader in self.__dict__.get("_readers", ()):
            reader.close()

    def run(self, tasks: Sequence[ShardTask]) -> list[SampleReport]:
        """Sample shards and write their files."""
        try:
            return [self._sample(task.shard) for task in tasks]
        except Exception as error:
            error.add_note(f"while sampling shard {', '.join(str(task.shard) for task in tasks)}")
            raise

    def _sample(self, shard: int) -> SampleReport:
        work, spec = self._work, self._features.spec
        columns = [name for name in CORPUS_SCHEMA.names if name not in _COLUMNS_NOT_READ]
        every = read_parquet(self._root, work.corpus.path(shard), schema=CORPUS_SCHEMA, columns=columns).to_pylist()
        rows = [row for row in every if work.plan.chooses(row)]
        nums = [
            num_frames(resampled_length(row["num_samples"], row["sample_rate"], spec.sample_rate), spec) for row in rows
        ]
        kept = [work.plan.frames_of(row, num) for row, num in zip(rows, nums, strict=True)]
        begins = np.cumsum([0, *(len(frames) for frames, _ in kept)])
        total = int(begins[-1])
        numbers_N = np.concatenate([numbers for _, numbers in kept]) if kept else np.empty(0)
        failed: set[int] = set()
        with ExitStack() as stack:
            # on the disk, since a shard may be long: memory holds what the system lets it
            scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="wavemill-sample-"))
            frames_of = {
                layer: reserved(Path(scratch) / f"{layer}.frames", (total, self._features.dim)) for layer in work.layers
            }
            ahead = DecodeAhead(rows, {spec.sound}, self._readers, work.work.decode_ahead_bytes)
            for index, waveforms in ahead:
                if isinstance(waveforms, AudioError):
                    failed.add(index)
                    numbers_N[begins[index] : begins[index + 1]] = np.nan
                    continue
                places = slice(int(begins[index]), int(begins[index + 1]))
                into = {layer: frames_ND[places] for layer, frames_ND in frames_of.items()}
                self._compute(rows[index], waveforms[spec.sound], nums[index], kept[index][0], into)
            names, phones_N = self._phones(rows, nums, kept)
            strata_N = np.repeat([self._places[work.plan.value_of(row)] for row in rows], np.diff(begins))
            whole_N = np.flatnonzero(~np.isnan(numbers_N))
            num_parts = self._write_parts(shard, frames_of, whole_N)
            index = {
                "numbers": numbers_N[whole_N],
                "strata": strata_N[whole_N].astype(np.int32),
                "phones": phones_N[whole_N],
            }
            content = io.BytesIO()
            np.savez(content, **index)
            self._put(index_file(shard), content.getvalue())
        report = SampleReport(
            shard=shard,
            frames=len(whole_N),
            parts=num_parts,
            segments=len(rows) - len(failed),
            errors=len(failed),
            duration_s=sum(row["duration_s"] for row in rows),
            speakers=sorted({row["speaker"] for i, row in enumerate(rows) if row["speaker"] and i not in failed}),
            phones=names,
            fingerprint=without_revision(self._features.fingerprint),
        )
        failpoint("before-shard-sampled")
        self._put(report_file(shard), report.to_bytes())
        failpoint("shard-sampled")
        return report

    def _compute(
        self,
        row: Row,
        waveform_N: Tensor,
        num: int,
        kept: NDArray[np.int64],
        into: dict[int | None, NDArray[np.float32]],
    ) -> None:
        """Put the features of a segment's kept frames where they belong. Raises `UserError` for those that are NaN."""
        name, begin = self._features.spec.tokenizer, 0
        with torch.inference_mode():
            for piece in _pieces(self._features, waveform_N, self._work.layers):
                length = next(iter(piece.values())).shape[0]
                first, last = np.searchsorted(kept, (begin, begin + length))
                for layer, piece_TD in piece.items():
                    frames_ND = piece_TD.cpu().numpy()[kept[first:last] - begin]
                    if not np.isfinite(frames_ND).all():
                        at = "" if layer is None else f" at layer {layer}"
                        raise UserError(
                            f"The features of {name}{at} are NaN or infinite for {row['path']}, sample "
                            f"{row['start_sample']:,} on. Look at the weights; with good ones, leave the recording out."
                        )
                    into[layer][first:last] = frames_ND
                begin += length
        if begin != num:
            raise RunFailed(f"{name} gave {begin} frames for a segment that has {num}: it breaks its own frame rule.")

    def _phones(
        self, rows: list[Row], nums: list[int], kept: list[tuple[NDArray[np.int64], NDArray[np.float64]]]
    ) -> tuple[list[str], NDArray[np.int32]]:
        """Names of phones, and for each kept frame which of them is said, or -1."""
        names: dict[str, int] = {}
        painted = [
            paint_row(row, num, self._features.spec, names)[frames]
            for row, num, (frames, _) in zip(rows, nums, kept, strict=True)
        ]
        return list(names), (np.concatenate(painted) if painted else np.empty(0)).astype(np.int32)

    def _write_parts(
        self, shard: int, frames_of: dict[int | None, NDArray[np.float32]], whole_N: NDArray[np.int64]
    ) -> int:
        """Write the frames of segments that could be decoded; into how many files."""
        rows_per_part = max(1, _PART_BYTES // (4 * self._features.dim))
        starts = range(0, len(whole_N), rows_per_part)
        for layer, frames_ND in frames_of.items():
            for part, start in enumerate(starts):
                content = io.BytesIO()
                np.save(content, frames_ND[whole_N[start : start + rows_per_part]])
                self._put(part_file(shard, layer, part), content.getvalue())
        return len(starts)

    def _put(self, name: str, content: bytes) -> None:
        self._root.write_bytes(f"{self._work.folder}/{name}", content)


def _pieces(features: Features, waveform_N: Tensor, layers: Layers) -> Iterator[dict[int | None, Tensor]]:
    """Features by layer, from the first frame to the last, piece by piece where they need not be in memory at once."""
    if len(layers) > 1:
        assert isinstance(features, LayeredFeatures), "only those that have layers are asked for several"
        numbers = [layer for layer in layers if layer is not None]
        for piece in features.layer_pieces(waveform_N, numbers):
            yield {layer: piece[layer] for layer in numbers}
        return
    whole = isinstance(features, PiecewiseFeatures)
    for piece_TD in features.pieces(waveform_N) if whole else [features.extract(waveform_N)]:
        yield {next(iter(layers)): piece_TD}
