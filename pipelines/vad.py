"""Where somebody speaks: Silero VAD's probabilities over a recording in bounded memory, and spans made of them."""

from collections.abc import Iterator
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..tokenizers.numerics import use_one_thread
from ..tokenizers.spec import UserError
from .entries import AudioError
from .policy import GRID_HZ, VadPolicy
from .resample import StreamResampler, can_resample

SAMPLE_RATE = 16_000  # Hz, what the model takes
CHUNK = 512  # samples that one probability stands for
_CONTEXT = 64  # samples before a chunk that the model sees with it
_HYSTERESIS = 0.15  # speech ends that much below the threshold, as Silero has it
_MIN_THRESHOLD = 0.01
_PAUSE_CHUNKS = 9  # 0.29 s: the depth of a pause is the mean probability over so many chunks

Spans = list[tuple[int, int]]  # [start, end), ascending, not overlapping


def vad_model() -> str:
    """The installed model, as `VadPolicy.model` names it. Raises `UserError` when the package is missing."""
    try:
        return f"silero-vad/{version('silero-vad')}"
    except PackageNotFoundError as error:
        raise UserError("Cutting at pauses needs Silero VAD: pip install 'wavemill[vad]'.") from error


def require_vad_model(policy: VadPolicy) -> None:
    """Raises `UserError` unless the installed model is the one that the policy names, if it names one."""
    installed = vad_model()
    if policy.model not in ("", installed):
        raise UserError(
            f"This corpus is cut at pauses that {policy.model} finds, installed is {installed}, which may find others: "
            f"pip install {policy.model.replace('/', '==')}"
        )


class SpeechDetector:
    """Speech probabilities of one recording, taken block by block, whole seconds each but for the last.

    The model is Silero VAD at 16 kHz (https://github.com/snakers4/silero-vad), with its state carried from block to
    block: what it gives is what the package's own loop over chunks gives, to 1e-4 (sums in another order, through a
    recurrence). Blocks are resampled with a second of sound on both sides.
    """

    def __init__(self, sample_rate: int) -> None:
        """Raises `UserError` when the package is missing, `AudioError` for a rate that cannot be resampled."""
        if not can_resample(sample_rate, SAMPLE_RATE):
            raise AudioError("unsupported", f"{sample_rate:,} Hz cannot be resampled to {SAMPLE_RATE:,} Hz for VAD")
        self._core, self._lstm = _model()
        self._sample_rate = sample_rate
        self._before_N = self._block_N = torch.empty(0)
        self._pending_N = torch.zeros(_CONTEXT)  # silence before the first sample, then what is not yet used up
        self._state: tuple[Tensor, Tensor] | None = None
        self._probabilities: list[Tensor] = []

    def push(self, block_N: NDArray[np.float32]) -> None:
        following_N = torch.from_numpy(block_N)
        self._take(self._resampled(following_N))
        self._before_N = self._block_N[-self._sample_rate :]
        self._block_N = following_N

    def finish(self) -> NDArray[np.float32]:
        """Probabilities `[T]`, one per `CHUNK` samples at 16 kHz; the last chunk is filled up with silence."""
        self._take(self._resampled(torch.empty(0)))
        missing = -(self._pending_N.shape[0] - _CONTEXT) % CHUNK
        self._take(torch.zeros(missing))
        return torch.cat([torch.empty(0), *self._probabilities]).numpy()

    def _resampled(self, following_N: Tensor) -> Tensor:
        """The held block at 16 kHz; it begins whole seconds after the recording, so at a sample of both rates."""
        rate = self._sample_rate
        window_N = torch.cat([self._before_N, self._block_N, following_N[:rate]])
        resampler = StreamResampler(window_N.shape[0], rate, SAMPLE_RATE)
        resampler.push(window_N)
        begin = self._before_N.shape[0] // rate * SAMPLE_RATE
        count = -(-self._block_N.shape[0] * SAMPLE_RATE // rate)
        return resampler.finish()[begin : begin + count]

    def _take(self, waveform_N: Tensor) -> None:
        self._pending_N = torch.cat([self._pending_N, waveform_N])
        num_chunks = (self._pending_N.shape[0] - _CONTEXT) // CHUNK
        if num_chunks == 0:
            return
        with torch.inference_mode():
            chunks_TN = self._pending_N.unfold(0, _CONTEXT + CHUNK, CHUNK)
            features_TD = self._core.encoder(self._core.run_extractors(chunks_TN)).squeeze(-1)
            hidden_TD, self._state = self._lstm(features_TD, self._state)
            self._probabilities.append(self._core.decoder.decoder(hidden_TD.unsqueeze(-1)).flatten())
        self._pending_N = self._pending_N[num_chunks * CHUNK :]


@lru_cache(maxsize=1)
def _model() -> tuple[Any, torch.nn.LSTM]:
    """Silero's network with its LSTM cell as an LSTM: the rest has no state, so it takes many chunks at once.

    Thirteen times faster than the packaged loop, which calls the whole network for every 32 ms; and no state of a
    recording lives in the model, so threads may share it.
    """
    vad_model()
    from silero_vad import load_silero_vad

    use_one_thread()
    model: Any = load_silero_vad()
    core = model._model
    lstm = torch.nn.LSTM(core.decoder.rnn.weight_ih.shape[1], core.decoder.rnn.weight_hh.shape[1])
    lstm.load_state_dict({f"{name}_l0": weight for name, weight in core.decoder.rnn.state_dict().items()})
    return core, lstm.eval()


def speech_spans(
    probabilities_T: NDArray[np.float32], *, sample_rate: int, num_samples: int, policy: VadPolicy
) -> Spans:
    """Spans of speech in samples at `sample_rate`, from the first of the `num_samples` that were pushed.

    Speech begins at a chunk of at least the threshold and ends at the first below threshold - 0.15 after which
    `min_silence_s` pass without another start: Silero's rule. Spans of `min_speech_s` or less are dropped; the rest
    is padded, to the middle of the pause where neighbours are near, and rounded to the grid of 10 ms. What is longer
    than `max_speech_s` is cut, without a gap, where the probability averaged over 0.29 s is lowest: between half the
    maximum and the maximum, and so that what follows is no shorter than a quarter of it, nor than `min_speech_s`.
    """
    if num_samples == 0:
        return []
    total = -(-num_samples * SAMPLE_RATE // sample_rate)
    padded = _pad(list(_triggered(probabilities_T, total, policy)), total, round(policy.pad_s * SAMPLE_RATE))
    num_frames = -(-num_samples * GRID_HZ // sample_rate)
    per_frame = SAMPLE_RATE // GRID_HZ
    smooth_T = np.convolve(probabilities_T, np.full(_PAUSE_CHUNKS, 1 / _PAUSE_CHUNKS), mode="same")
    depths_F = smooth_T[np.minimum(np.arange(num_frames) * per_frame // CHUNK, len(smooth_T) - 1)]
    spans = []
    for start, end in padded:
        first = (2 * start + per_frame) // (2 * per_frame)
        last = num_frames if end == total else (2 * end + per_frame) // (2 * per_frame)
        cuts = list(_cuts(depths_F, first, last, policy))
        for begin, stop in zip([first, *cuts], [*cuts, last], strict=True):
            spans.append((begin * sample_rate // GRID_HZ, min(num_samples, stop * sample_rate // GRID_HZ)))
    return [(start, end) for start, end in spans if start < end]


def _triggered(probabilities_T: NDArray[np.float32], total: int, policy: VadPolicy) -> Iterator[tuple[int, int]]:
    """Unpadded spans in samples at 16 kHz, of which the recording has `total`."""
    leave = max(policy.threshold - _HYSTERESIS, _MIN_THRESHOLD)
    min_speech, min_silence = policy.min_speech_s * SAMPLE_RATE, policy.min_silence_s * SAMPLE_RATE
    start: int | None = None  # of the speech we are in
    quiet: int | None = None  # where it may have ended
    for index, probability in enumerate(probabilities_T.tolist()):
        at = index * CHUNK
        if probability >= policy.threshold:
            quiet = None
            start = at if start is None else start
        elif probability < leave and start is not None:
            quiet = at if quiet is None else quiet
            if at - quiet >= min_silence:
                if quiet - start > min_speech:
                    yield start, quiet
                start = quiet = None
    if start is not None and total - start > min_speech:
        yield start, total


def _pad(spans: Spans, total: int, pad: int) -> Spans:
    starts = [max(0, start - pad) for start, _ in spans]
    ends = [min(total, end + pad) for _, end in spans]
    for index in range(1, len(spans)):
        if ends[index - 1] > starts[index]:
            ends[index - 1] = starts[index] = (spans[index - 1][1] + spans[index][0]) // 2
    return list(zip(starts, ends, strict=True))


def _cuts(depths_F: NDArray[np.float32], first: int, last: int, policy: VadPolicy) -> Iterator[int]:
    """Frames in (first, last) at which a span is cut so that no part is longer than `max_speech_s`."""
    longest = int(policy.max_speech_s * GRID_HZ)
    rest = max(longest // 4, int(policy.min_speech_s * GRID_HZ))
    while last - first > longest:
        low, high = first + longest // 2, min(first + longest, last - rest)
        first = low + int(depths_F[low : high + 1].argmin())
        yield first
