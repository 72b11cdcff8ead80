"""Features kept as numbers: streams of frames for models that take them as they are, and one vector of a segment.

Axes: N samples, T frames, D dimensions.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .ctc import CtcLabels, find_ctc, require_ctc_clock
from .reduction import Way, merge_runs, parse_reduction, reduce_pieces, reduced_spec
from .spec import FrameRule, UserError, num_frames
from .tokenizer import BatchFeatures, Description, Features, Output, PiecewiseFeatures, Synthesizer, Tokens

_LARGEST = torch.finfo(torch.float16).max


class ContinuousTokenizer:
    """A `RowTokenizer` and `BatchRowTokenizer` of features: float16, saturated at its ends."""

    def __init__(self, features: Features, described: Description, *, device: str = "cpu") -> None:
        self.features = features
        self.spec = described.spec
        self.fingerprint = described.fingerprint
        config = described.config
        self._embeds = config.output is Output.EMBEDDING
        self._reduction = parse_reduction(config.reduce) if config.reduce else None
        self._ctc: CtcLabels | None = None
        if self._reduction is not None and self._reduction.way is Way.CTC:
            self._ctc = CtcLabels(find_ctc(self._reduction.weights, config), device=device)

    def tokens(self, waveform_N: Tensor) -> Tokens:
        return self._tokens(waveform_N, _pieces(self.features, waveform_N))

    def tokens_batch(self, waveforms: Sequence[Tensor], padded_length: int) -> list[Tokens]:
        if not isinstance(self.features, BatchFeatures):
            return [self.tokens(waveform_N) for waveform_N in waveforms]
        batch = self.features.extract_batch(waveforms, padded_length)
        return [self._tokens(*each) for each in zip(waveforms, ([one_TD] for one_TD in batch), strict=True)]

    def decode_tokens(self, tokens: Tokens) -> Tensor:
        """Sound of the frames. Raises `UserError` for features that know no way back, and frames that were reduced."""
        if not self.spec.decode_sample_rate or not isinstance(self.features, Synthesizer):
            raise UserError(f"Tokenizer {self.spec.tokenizer} has no decoder for these frames.")
        assert tokens.frames_TD is not None
        with torch.inference_mode():
            return self.features.synthesize(tokens.frames_TD.float()).cpu()

    def _tokens(self, waveform_N: Tensor, pieces: Iterable[Tensor]) -> Tokens:
        if self._embeds:
            return self._of(self._mean(pieces))
        if self._ctc is not None:
            labels_T = self._ctc.labels(waveform_N)
            merged = [
                (stored(frames_RD), sizes_R) for frames_RD, sizes_R in merge_runs(pieces, labels_T, (self._ctc.blank,))
            ]
            durations_R = torch.cat([torch.empty(0, dtype=torch.int32), *(sizes_R for _, sizes_R in merged)])
            return replace(self._of(frames_RD for frames_RD, _ in merged), durations_T=durations_R)
        if self._reduction is not None:
            pieces = reduce_pieces(pieces, self._reduction, self.spec.frame_rule)
        return self._fill(pieces, num_frames(waveform_N.shape[-1], self.spec))

    def _mean(self, pieces: Iterable[Tensor]) -> Iterator[Tensor]:
        """The mean frame `[1, D]`, taken in float64; none of a segment without frames."""
        total_D, num = torch.zeros(self.spec.dim, dtype=torch.float64), 0
        for piece_TD in pieces:
            total_D += piece_TD.double().sum(dim=0).cpu()
            num += piece_TD.shape[0]
        if num:
            yield (total_D / num)[None].float()

    def _fill(self, pieces: Iterable[Tensor], num: int) -> Tokens:
        # made at once: small tensors kept from piece to piece would hold the memory between them
        stored_TD = torch.empty(num, self.spec.dim, dtype=torch.float16)
        begin = 0
        for piece_TD in pieces:
            stored_TD[begin : begin + piece_TD.shape[0]] = stored(piece_TD)
            begin += piece_TD.shape[0]
        assert begin == num, "frames are as many as the frame rule says"
        return Tokens(codes_KT=torch.empty(0, num, dtype=torch.int64), frames_TD=stored_TD)

    def _of(self, pieces: Iterable[Tensor]) -> Tokens:
        stored_TD = torch.cat([torch.empty(0, self.spec.dim, dtype=torch.float16), *map(stored, pieces)])
        return Tokens(codes_KT=torch.empty(0, stored_TD.shape[0], dtype=torch.int64), frames_TD=stored_TD)


def describe_continuous(described: Description, output: Output) -> Description:
    """`described` of features as a stream of numbers. Raises `UserError` for a reduction that cannot be."""
    config = described.config
    spec = replace(described.spec, num_codebooks=0, codebook_size=1, dim=described.dim or 0)
    parts = {"output": str(output), "precision": config.mode.precision}
    if output is Output.EMBEDDING:
        spec = replace(spec, frame_rule=FrameRule.ONE, decode_sample_rate=0, decode_trim=0)
    if config.reduce is not None:
        reduction = parse_reduction(config.reduce)
        spec = replace(spec, decode_sample_rate=0, decode_trim=0)
        if reduction.way is Way.CTC:
            require_ctc_clock(spec)
            spec = replace(spec, frame_rule=FrameRule.FREE, durations=True)
            parts |= {"reduce": "ctc", **find_ctc(reduction.weights, config).fingerprint}
        elif spec.frame_rule is FrameRule.ONE:
            raise UserError(f"{spec.tokenizer} gives one vector a segment: leave out reduce.")
        else:
            stacked = reduction.by if reduction.way is Way.STACK else 1
            spec = replace(reduced_spec(spec, reduction.by), dim=spec.dim * stacked)
            parts["reduce"] = config.reduce
    fingerprint = {"tokenizer": config.tokenizer, **described.fingerprint, **parts}
    return replace(described, config=replace(config, output=output), spec=spec, fingerprint=fingerprint)


def stored(frames_TD: Tensor) -> Tensor:
    """Frames as they are kept: float16, saturated at its ends, on the CPU, where there is more room."""
    return frames_TD.clamp(-_LARGEST, _LARGEST).half().cpu()


def _pieces(features: Features, waveform_N: Tensor) -> Iterable[Tensor]:
    if isinstance(features, PiecewiseFeatures):
        return features.pieces(waveform_N)
    return [features.extract(waveform_N)]
