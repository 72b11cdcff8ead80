"""Segments in batches of equal padded length: what waits for its batch, when it is run, what each segment gets.

On a GPU only: on a CPU every segment is encoded alone. A segment's padded length is its own (see tokenizers/ladder.py),
so it does not matter which others it meets in a batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..tokenizers.ladder import UNITS_PER_S, batch_size, next_size, padded_length
from ..tokenizers.spec import RunFailed, Sound, StreamSpec, chunk_frames, num_frames
from ..tokenizers.tokenizer import Mode, RowTokenizer, Tokenizer, Tokens, tokens_of_batch


class Lane:
    """A stream's tokenizer and how much it takes at once: `budget` units of 10 ms of padded audio."""

    def __init__(self, name: str, tokenizer: Tokenizer | RowTokenizer, mode: Mode, *, batch_seconds: float) -> None:
        self.name = name
        self.tokenizer = tokenizer
        self.mode = mode
        self.budget = int(batch_seconds * UNITS_PER_S)

    @property
    def sound(self) -> Sound:
        return self.tokenizer.spec.sound

    def encode(self, waveforms: Sequence[Tensor], rung: int) -> list[Tokens]:
        """Tokens of each waveform of a rung, codes in the narrow type that they are stored in: many are held.

        If the device's memory is out, batches are halved from then on; in `fast` mode, where the size of the batch
        decides the codes, `RunFailed`.
        """
        done: list[Tokens] = []
        while len(done) < len(waveforms):
            size = next_size(len(waveforms) - len(done), rung, self.budget, self.mode)
            batch = self._encode_batch(waveforms[len(done) : len(done) + size], rung, size)
            if batch is None:
                self._halve(rung, size)
            else:
                done += batch
        return done

    def _encode_batch(self, waveforms: Sequence[Tensor], rung: int, size: int) -> list[Tokens] | None:
        """Tokens of a batch filled with dummies, or None if it does not fit the device's memory."""
        spec = self.tokenizer.spec
        length = padded_length(rung, spec.sample_rate)
        dummies = [torch.zeros((spec.channels, length) if spec.channels > 1 else length)] * (size - len(waveforms))
        try:
            with torch.inference_mode():
                tokens = tokens_of_batch(self.tokenizer, [*waveforms, *dummies], length)[: len(waveforms)]
        except torch.OutOfMemoryError:
            return None
        for waveform, each in zip(waveforms, tokens, strict=True):
            require_frame_rule(self.name, each, waveform, spec)
        dtype = torch.int16 if spec.codebook_size <= 1 << 15 else torch.int32
        return [replace(each, codes_KT=each.codes_KT.to(dtype)) for each in tokens]

    def _halve(self, rung: int, size: int) -> None:
        """Let batches of `size` at a rung be half as large. Raises `RunFailed` if that cannot be."""
        batch = f"{self.name}: {size} segment(s) padded to {rung / UNITS_PER_S:g} s do not fit into the device's memory"
        if self.mode is Mode.FAST:
            raise RunFailed(
                f"{batch}. In fast mode the size of a batch decides the codes, so it is not halved along the way: end "
                "what else runs on it, use a larger one, or give the stream a new name and mode=exact."
            )
        if size == 1:
            raise RunFailed(f"{batch}, and there is no smaller batch. End what else runs on it, or use a larger one.")
        self.budget = rung * size // 2
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()  # what is cached is cut to the larger shapes


@dataclass(frozen=True, slots=True)
class _Segment:
    index: int
    waveforms: dict[Sound, Tensor]

    @property
    def size_bytes(self) -> int:
        return sum(4 * waveform.numel() for waveform in self.waveforms.values())


Finished = list[tuple[int, dict[str, Tokens]]]  # the number a segment was added with, and its tokens by stream


class Batcher:
    """Holds segments until their batch is full; what waits stays under `max_waiting_bytes` of waveforms.

    If it does not, the rung that is nearest to being full is run as it is.
    """

    def __init__(self, lanes: Sequence[Lane], *, max_waiting_bytes: int) -> None:
        self._lanes = lanes
        self._max_waiting_bytes = max_waiting_bytes
        self._waiting: dict[int, list[_Segment]] = {}
        self.waiting_bytes = 0

    def add(self, index: int, waveforms: dict[Sound, Tensor], rung: int) -> Finished:
        """Take a segment; what is finished by that, in any order."""
        segment = _Segment(index, waveforms)
        self._waiting.setdefault(rung, []).append(segment)
        self.waiting_bytes += segment.size_bytes
        finished = self._run(rung) if self._fullness(rung) >= 1 else []
        while self.waiting_bytes > self._max_waiting_bytes:
            finished += self._run(max(self._waiting, key=lambda rung: (self._fullness(rung), rung)))
        return finished

    def flush(self) -> Finished:
        """Run what is left, the longest segments first, so that memory that is too small shows at once."""
        return [finished for rung in sorted(self._waiting, reverse=True) for finished in self._run(rung)]

    def _fullness(self, rung: int) -> float:
        return len(self._waiting[rung]) / max(batch_size(rung, lane.budget) for lane in self._lanes)

    def _run(self, rung: int) -> Finished:
        segments = self._waiting.pop(rung)
        self.waiting_bytes -= sum(segment.size_bytes for segment in segments)
        tokens: list[dict[str, Tokens]] = [{} for _ in segments]
        for lane in self._lanes:
            waveforms = [segment.waveforms[lane.sound] for segment in segments]
            for found, each in zip(tokens, lane.encode(waveforms, rung), strict=True):
                found[lane.name] = each
        return [(segment.index, found) for segment, found in zip(segments, tokens, strict=True)]


def require_frame_rule(name: str, tokens: Tokens, waveform: Tensor, spec: StreamSpec) -> None:
    """Raise if a tokenizer breaks its own frame rule."""
    num_samples = waveform.shape[-1]
    expected = num_frames(num_samples, spec) if spec.has_clock else tokens.num_frames
    shapes = [(tokens.codes_KT, (spec.num_codebooks, expected))]
    shapes += [(tokens.frames_TD, (expected, spec.dim))] if spec.dim else []
    shapes += [(tokens.durations_T, (expected,))] if spec.durations else []
    shapes += [(tokens.scales_C, (len(chunk_frames(num_samples, spec)),))] if spec.chunk_length else []
    for found, shape in shapes:
        if found is None or tuple(found.shape) != shape:
            there = None if found is None else tuple(found.shape)
            raise RuntimeError(f"{name}: tokens of shape {there}, the frame rule says {shape}")
