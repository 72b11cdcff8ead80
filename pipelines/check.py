"""Holds a tokenizer to its promises on a person's own weights and recordings: the same codes, however they are made.

Axes: K codebooks, T frames, N samples, D dimensions, C centroids, Q stages. A waveform of two channels is `[2, N]`.
"""

import random
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import torch
from torch import Tensor

from ..storage.root import Root
from ..storage.schema import CORPUS_SCHEMA
from ..tokenizers.codebook import Codebook
from ..tokenizers.compare import Comparison, compare_codes
from ..tokenizers.ladder import RUNGS
from ..tokenizers.ladder import padded_length as rung_length
from ..tokenizers.numerics import use_exact_math, use_one_thread
from ..tokenizers.published import published_encoder
from ..tokenizers.registry import CodebookTokenizer, describe, load_features, load_tokenizer, require_tokenizer
from ..tokenizers.spec import Sound, StreamSpec, UserError, decoded_samples, num_frames
from ..tokenizers.tokenizer import (
    BatchFeatures,
    BatchTokenizer,
    Description,
    Features,
    Mode,
    PiecewiseFeatures,
    Tokenizer,
    TokenizerConfig,
    fingerprint_hash,
)
from .centroids import read_centroids
from .corpus import BuildCounts, Known, new_rows
from .entries import AudioError
from .policy import CorpusPolicy
from .reading import Reader, Row
from .sources import open_source

_WINDOW_S = 30.0  # recordings are cut so that a few long ones do not take all day
_BATCH = 4
_MAX_CENTROIDS = 500
_FRAMES_PER_CENTROID = 4
_MAX_FRAMES = 16_384  # that centroids are drawn from


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckOptions:
    codebook: str | None = None  # a file; None: centroids are drawn from the recordings' own features
    limit: int = 8
    seed: int = 0
    device: str = "cpu"


@dataclass(frozen=True, slots=True)
class Promise:
    """One thing that was compared."""

    name: str
    of: str  # what `compared` and `different` count
    compared: int
    different: int
    near_ties: int  # frames in which the first code that differs may fall either way
    kept: bool

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(slots=True)
class Checked:
    """What was checked, and each promise."""

    tokenizer: str
    fingerprint: str
    codebook: str  # in words
    segments: int
    duration_s: float
    unreadable: int
    promises: list[Promise] = field(default_factory=list)
    fast: tuple[int, int] | None = None  # codes that mode `fast` changes, of how many; no promise is made

    @property
    def kept(self) -> bool:
        return all(promise.kept for promise in self.promises)

    @property
    def miss_rate(self) -> float:
        """Share of codes, of all that were compared, that differ."""
        codes = [promise for promise in self.promises if promise.of == "codes"]
        return sum(promise.different for promise in codes) / max(1, sum(promise.compared for promise in codes))

    def to_json(self) -> dict[str, Any]:
        names = ("tokenizer", "fingerprint", "codebook", "segments", "duration_s", "unreadable", "miss_rate", "kept")
        return {
            **{name: getattr(self, name) for name in names},
            "promises": [promise.to_json() for promise in self.promises],
            "fast": self.fast and {"changed": self.fast[0], "compared": self.fast[1]},
        }


def check_tokenizer(
    config: TokenizerConfig,
    source: str,
    options: CheckOptions,
    *,
    on_step: Callable[[str], None] = lambda step: None,
) -> Checked:
    """Encode segments of `source` alone, again, from other memory and in batches, and compare code by code.

    `source` is what `corpus build` takes; the first `options.limit` segments of at most 30 s that can be read are
    taken. Raises `UserError` for what `describe` refuses, a codebook that does not fit, and a source without audio.
    """
    described = describe(config)
    if require_tokenizer(config.tokenizer).takes != "audio" or not described.spec.has_clock:
        raise UserError(
            f"Tokenizer {config.tokenizer} gives no codes that follow a clock, which are compared here. Make a stream "
            "with it; `wavemill verify` then makes some of it again."
        )
    if described.spec.dim:
        raise UserError(
            f"Tokenizer {config.tokenizer} gives numbers and takes no codebook: there are no codes to compare. Make a "
            "stream with it; `wavemill verify` then makes some of it again."
        )
    codebook = _codebook_file(options.codebook, described) if options.codebook else None
    waveforms, unreadable = _recordings(source, described.spec.sound, options.limit)
    use_one_thread()
    use_exact_math()
    words = "its own" if codebook is None else f"{options.codebook}"
    if codebook is None and require_tokenizer(config.tokenizer).needs_codebook:
        on_step("drawing centroids")
        codebook = _drawn(config, waveforms, options)
        size = codebook.centroids_QCD.shape[1]
        words = f"{size} centroids drawn from the features of these very recordings, seed {options.seed}"
    name = options.codebook or "drawn"
    tokenizer = load_tokenizer(config, codebook, codebook_name=name, device=options.device)
    checked = Checked(
        tokenizer=config.tokenizer,
        fingerprint=fingerprint_hash(tokenizer.fingerprint),
        codebook=words,
        segments=len(waveforms),
        duration_s=sum(waveform_N.shape[-1] for waveform_N in waveforms) / described.spec.sample_rate,
        unreadable=unreadable,
    )
    on_step("encoding each segment alone")
    alone = [_encode(tokenizer, waveform_N) for waveform_N in waveforms]
    checked.promises += _shapes(waveforms, alone, tokenizer.spec)
    on_step("encoding again, from other memory, in another order")
    again = [_encode(tokenizer, waveform_N) for waveform_N in waveforms]
    checked.promises.append(_identical("same codes again", alone, again))
    elsewhere = _from_elsewhere(tokenizer, waveforms, options.seed)
    checked.promises.append(_identical("same from other memory and order", alone, elsewhere))
    if config.mode is Mode.EXACT and options.device == "cpu":
        promise = _as_published(tokenizer, described, waveforms, alone, on_step)
        checked.promises += [promise] if promise else []
    if _encodes_batches(tokenizer):
        on_step("encoding in batches")
        checked.promises.append(_batches(tokenizer, config.mode, waveforms, alone, options.seed))
    if tokenizer.spec.decode_sample_rate:
        on_step("decoding")
        checked.promises.append(_decoded(tokenizer, waveforms, alone))
    if set(require_tokenizer(config.tokenizer).modes) >= {Mode.EXACT, Mode.FAST}:
        on_step("comparing the modes")
        other = replace(config, mode=Mode.EXACT if config.mode is Mode.FAST else Mode.FAST)
        del tokenizer
        tokenizer = load_tokenizer(other, codebook, codebook_name=name, device=options.device)
        changed = [_encode(tokenizer, waveform_N) for waveform_N in waveforms]
        checked.fast = _num_different(alone, changed), _numel(alone)
    return checked


def _recordings(source: str, sound: Sound, limit: int) -> tuple[list[Tensor], int]:
    """Waveforms of the first segments that can be read, one of each recording before a second; how many cannot."""
    opened = open_source(source, exclude="")
    firsts: list[Row] = []
    others: list[Row] = []
    seen: set[tuple[str, str]] = set()
    unreadable, problem = 0, ""
    found = new_rows([opened], Known(), CorpusPolicy(window_s=_WINDOW_S), BuildCounts())
    with closing(cast("Generator[Row, None, None]", found)) as rows:
        for row in rows:
            recording = (row["path"], row["member"])
            if row["error"] is not None:
                unreadable += 1
                problem = problem or f"{row['path']}: {row['error']} ({row['error_message']})"
            elif recording not in seen:
                seen.add(recording)
                firsts.append(row)
            elif len(others) < limit:
                others.append(row)
            if len(firsts) >= limit:
                break
    waveforms = []
    chosen = sorted((firsts + others)[:limit], key=lambda row: (row["path"], row["member"], row["start_sample"]))
    table = pa.Table.from_pylist([{**row, "shard": 0} for row in chosen], schema=CORPUS_SCHEMA)
    with Reader(Root("."), {}) as reader:
        for row, result in zip(chosen, reader.read(table.to_pylist(), {sound}), strict=True):
            if isinstance(result, AudioError):
                unreadable += 1
                problem = problem or f"{row['path']}: {result.kind} ({result.message})"
            else:
                waveforms.append(result[sound])
    if not waveforms and problem:
        raise UserError(f"None of the recordings of {source} can be read; the first is {problem}. Name other ones.")
    if not waveforms:
        raise UserError(f"No audio was found in {source}.")
    return waveforms, unreadable


def _codebook_file(path: str, described: Description) -> Codebook:
    """The codebook in a file of ours, or centroids that numpy.save wrote. Raises `UserError`."""
    if not require_tokenizer(described.config.tokenizer).needs_codebook:
        raise UserError(f"Tokenizer {described.config.tokenizer} has codebooks of its own: leave out --codebook.")
    if path.endswith(".safetensors"):
        try:
            return Codebook.from_bytes(Path(path).read_bytes(), name=path)
        except OSError as error:
            raise UserError(f"Cannot read the codebook {path}: {error.strerror}.") from error
    if not path.endswith(".npy"):
        raise UserError(f"--codebook {path!r}: expected a file in .npy, or one in .safetensors of a root's codebooks.")
    centroids_QCD, _ = read_centroids(path, described)
    return Codebook(centroids_QCD, {"tokenizer": described.config.tokenizer, **described.fingerprint})


def _drawn(config: TokenizerConfig, waveforms: Sequence[Tensor], options: CheckOptions) -> Codebook:
    """A codebook whose centroids are frames of the recordings. Raises `UserError` for too few frames."""
    exact = replace(config, mode=Mode.EXACT)
    features = load_features(exact, device=options.device)
    total = sum(num_frames(waveform_N.shape[-1], features.spec) for waveform_N in waveforms)
    every = -(-total // _MAX_FRAMES)
    with torch.inference_mode():
        frames_ND = torch.cat([_frames(features, waveform_N)[:: every or 1] for waveform_N in waveforms])
    size = min(_MAX_CENTROIDS, frames_ND.shape[0] // _FRAMES_PER_CENTROID)
    if size < 2:
        raise UserError(
            f"The recordings give {frames_ND.shape[0]} frames, too few to draw centroids from. Name longer ones, or a "
            "--codebook."
        )
    generator = torch.Generator().manual_seed(options.seed)
    chosen_C = torch.randperm(frames_ND.shape[0], generator=generator)[:size]
    header = {"tokenizer": config.tokenizer, **describe(exact).fingerprint}
    return Codebook(frames_ND[chosen_C][None].clone(), header)


def _frames(features: Features, waveform_N: Tensor) -> Tensor:
    """Features `[T, D]` on the CPU."""
    if not isinstance(features, PiecewiseFeatures):
        return features.extract(waveform_N).cpu()
    pieces = [piece_TD.cpu() for piece_TD in features.pieces(waveform_N)]
    return torch.cat(pieces) if pieces else torch.empty(0, features.dim)


def _encode(tokenizer: Tokenizer, waveform_N: Tensor) -> Tensor:
    with torch.inference_mode():
        return tokenizer.encode(waveform_N)


def _shapes(waveforms: Sequence[Tensor], codes: Sequence[Tensor], spec: StreamSpec) -> list[Promise]:
    """Whether each segment has the frames that its length gives, and each code is one of the codebook."""
    expected = [(spec.num_codebooks, num_frames(waveform_N.shape[-1], spec)) for waveform_N in waveforms]
    wrong = sum(tuple(codes_KT.shape) != shape for codes_KT, shape in zip(codes, expected, strict=True))
    outside = sum(bool(((codes_KT < 0) | (codes_KT >= spec.codebook_size)).any()) for codes_KT in codes)
    return [
        Promise(f"frames by the rule ({spec.frame_rule})", "segments", len(codes), wrong, 0, not wrong),
        Promise(f"codes from 0 to {spec.codebook_size - 1:,}", "segments", len(codes), outside, 0, not outside),
    ]


def _as_published(
    tokenizer: Tokenizer,
    described: Description,
    waveforms: Sequence[Tensor],
    alone: Sequence[Tensor],
    on_step: Callable[[str], None],
) -> Promise | None:
    """The published implementation's own codes, one segment at a time; None if there is none to ask."""
    published = published_encoder(described)
    if published is None:
        return None
    on_step("encoding with transformers")
    found = Comparison()
    for waveform_N, alone_KT in zip(waveforms, alone, strict=True):
        if not alone_KT.shape[1]:
            continue  # where a tokenizer has no frame, the published model raises
        with torch.inference_mode():
            theirs = published(waveform_N)
            if isinstance(tokenizer, CodebookTokenizer):
                theirs = tokenizer.quantizer.encode(theirs)
        found += compare_codes(tokenizer, waveform_N, alone_KT, theirs)
    name = "same as transformers gives"
    return Promise(name, "codes", found.num_codes, found.num_different, found.near_ties, not found.mismatches)


def _from_elsewhere(tokenizer: Tokenizer, waveforms: Sequence[Tensor], seed: int) -> list[Tensor]:
    """Codes of each waveform out of odd places in memory, in another order."""
    order = list(range(len(waveforms)))
    random.Random(seed).shuffle(order)
    codes: dict[int, Tensor] = {}
    for number, place in enumerate(order):
        waveform_N = waveforms[place]
        offset, stride = 1 + number % 15, 1 + number % 3
        *channels, num_samples = waveform_N.shape
        buffer = torch.full((*channels, offset + stride * num_samples), 0.5)
        view_N = buffer[..., offset::stride]
        codes[place] = _encode(tokenizer, view_N.copy_(waveform_N))
    return [codes[place] for place in range(len(waveforms))]


def _encodes_batches(tokenizer: Tokenizer) -> bool:
    if isinstance(tokenizer, CodebookTokenizer):
        return isinstance(tokenizer.features, BatchFeatures)
    return isinstance(tokenizer, BatchTokenizer)


def _batches(tokenizer: Any, mode: Mode, waveforms: Sequence[Tensor], alone: Sequence[Tensor], seed: int) -> Promise:
    """`exact`: batches give what each segment has alone. `fast`, whose codes depend on shapes: neighbours do not."""
    batched = _in_batches(tokenizer, waveforms, mode, seed + 1)
    if mode is Mode.FAST:
        others = _in_batches(tokenizer, waveforms, mode, seed + 2)
        return _identical("same beside other neighbours", batched, others)
    found = Comparison()
    for waveform_N, alone_KT, batched_KT in zip(waveforms, alone, batched, strict=True):
        found += compare_codes(tokenizer, waveform_N, alone_KT, batched_KT)
    name = "same in a batch"
    return Promise(name, "codes", found.num_codes, found.num_different, found.near_ties, not found.mismatches)


def _in_batches(tokenizer: Any, waveforms: Sequence[Tensor], mode: Mode, seed: int) -> list[Tensor]:
    """Codes of each waveform beside others, in batches of one size: in `fast` all padded to one length, else to any."""
    chance = random.Random(seed)
    order = list(range(len(waveforms)))
    chance.shuffle(order)
    rate = tokenizer.spec.sample_rate
    codes: dict[int, Tensor] = {}
    for begin in range(0, len(order), _BATCH):
        places = order[begin : begin + _BATCH]
        neighbours = [waveforms[place] for place in places]
        longest = max(waveform_N.shape[-1] for waveform_N in neighbours)
        rungs = [rung for rung in RUNGS if rung_length(rung, rate) >= longest]
        padded_length = rung_length(rungs[-1] if mode is Mode.FAST else chance.choice(rungs), rate)
        dummies = [torch.zeros(*neighbours[0].shape[:-1], padded_length)] * (
            _BATCH - len(neighbours) if mode is Mode.FAST else 0
        )
        with torch.inference_mode():
            encoded = tokenizer.encode_batch([*neighbours, *dummies], padded_length)
        codes.update(zip(places, encoded, strict=False))
    return [codes[place] for place in range(len(waveforms))]


def _identical(name: str, ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> Promise:
    """A promise that not even near-ties excuse: the computation is the same."""
    different = _num_different(ours, theirs)
    return Promise(name, "codes", _numel(ours), different, 0, not different)


def _num_different(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> int:
    """Codes that differ; of two shapes, all."""
    return sum(
        int((a_KT != b_KT).sum()) if a_KT.shape == b_KT.shape else max(a_KT.numel(), b_KT.numel(), 1)
        for a_KT, b_KT in zip(ours, theirs, strict=True)
    )


def _numel(codes: Sequence[Tensor]) -> int:
    return sum(codes_KT.numel() for codes_KT in codes)


def _decoded(tokenizer: Tokenizer, waveforms: Sequence[Tensor], codes: Sequence[Tensor]) -> Promise:
    """Whether the sound of each segment's codes is as long as the rule says, and finite."""
    wrong = compared = 0
    for waveform_N, codes_KT in zip(waveforms, codes, strict=True):
        if codes_KT.shape[1] == 0:
            continue
        with torch.inference_mode():
            sound_N = tokenizer.decode(codes_KT)
        compared += 1
        expected = (*waveform_N.shape[:-1], decoded_samples(codes_KT.shape[1], tokenizer.spec))
        wrong += tuple(sound_N.shape) != expected or not bool(sound_N.isfinite().all())
    return Promise("length of the sound", "segments", compared, wrong, 0, not wrong)
