"""Transcripts by Whisper (Radford et al. 2022), as ids in which words and timestamps take turns, and as text.

Of the ids those that are neither words nor timestamps are left out. The last 1,501 are the timestamps, 0.00 to 30.00 s
in steps of 0.02 s from the beginning of their window. A window has 30 s; between two stands `<|notimestamps|>`, which
Whisper never says when it is asked for timestamps. As in its paper (section 4.5) and in transformers, the next window
begins where the last whole sentence of the one before ended, or behind it; but each window's loudness is its own, the
model is not told what came before, and there are no retries at higher temperatures: so a window depends on its samples.

Axes: N samples, T ids, M mel bands, F frames of 10 ms.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .hub import (
    MODEL_PATTERNS,
    TEXT_PATTERNS,
    Weights,
    files_sha256,
    find_folder,
    find_weights,
    fingerprint_of,
    load_extractor,
    load_model,
    load_text_tokenizer,
    quiet,
    read_json,
)
from .spec import FrameRule, StreamSpec, UserError, did_you_mean
from .tokenizer import Description, TokenizerConfig, TokenizerEntry, Tokens
from .whisper_features import require_windows

NUM_TIMES = 1_501
HOP = 320  # samples from one timestamp to the next
WINDOW = 30 * 16_000
_BANDS = 80  # of a feature extractor that does not say


@dataclass(frozen=True, slots=True)
class Said:
    """What is said between two timestamps, in samples at 16 kHz from the segment's first."""

    start_sample: int
    end_sample: int | None  # None: Whisper does not say
    ids: tuple[int, ...]  # of words


def timestamps(ids: Sequence[int], num_ids: int) -> list[Said]:
    """The sentences of a segment with their times; `num_ids` is the stream's `codebook_size`."""
    first = num_ids - NUM_TIMES
    said: list[Said] = []
    begin = 0
    for window in _windows(list(ids), first - 1):
        time, words = begin, list[int]()
        for each in window:
            if each < first:
                words.append(each)
                continue
            start, time = time, begin + (each - first) * HOP
            if words:
                said.append(Said(start, time, tuple(words)))
                words = []
        if words:
            said.append(Said(time, None, tuple(words)))
        begin += _advance(window, first)[1]
    return said


def _windows(ids: list[int], separator: int) -> list[list[int]]:
    windows: list[list[int]] = [[]]
    for each in ids:
        if each == separator:
            windows.append([])
        else:
            windows[-1].append(each)
    return windows


def _advance(window: list[int], first: int) -> tuple[list[int], int]:
    """The ids of a window that stay, and by how many samples the next one begins later.

    As transformers' `WhisperGenerationMixin._retrieve_segment`: two timestamps in a row end a sentence and begin
    another; the last, which has no end, is heard again from its beginning, unless its end is the last of all ids. The
    two timestamps stay, so that the ids alone say where the next window begins.
    """
    is_time = [each >= first for each in window]
    pairs = [place for place in range(1, len(window)) if is_time[place - 1] and is_time[place]]
    if not pairs or is_time[-2:] == [False, True]:
        return window, WINDOW
    by = (window[pairs[-1] - 1] - first) * HOP
    return window[: pairs[-1] + 1], by or WINDOW


@dataclass(frozen=True, slots=True)
class _Found:
    weights: Weights
    first: int  # of the timestamps
    end: int  # of the words: `<|endoftext|>`
    asked: dict[str, str]  # language and task, where they were named


class WhisperText:
    """A `RowTokenizer`: ids `[1, T]` and text, each window by transformers' own greedy search in float32."""

    def __init__(self, description: Description, *, device: str = "cpu") -> None:
        found: _Found = description.weights
        self.spec = description.spec
        self.fingerprint = description.fingerprint
        self._device = device
        self._first, self._end = found.first, found.end
        self._asked = found.asked
        self._model: Any = load_model("WhisperForConditionalGeneration", found.weights, may_lack=("proj_out.weight",))
        self._model.to(device)
        self._extractor = load_extractor(found.weights)
        self._words = load_text_tokenizer(found.weights.folder, found.weights.name)

    def tokens(self, waveform_N: Tensor) -> Tokens:
        ids: list[int] = []
        begin = 0
        while begin < waveform_N.shape[0]:
            window, by = _advance(self._hear(waveform_N[begin : begin + WINDOW]), self._first)
            ids += [*([self._first - 1] if begin else []), *window]
            begin += by
        text = self._words.decode([each for each in ids if each < self._end], skip_special_tokens=True).strip()
        return Tokens(codes_KT=torch.tensor([ids], dtype=torch.int64).reshape(1, len(ids)), text=text)

    def _hear(self, waveform_N: Tensor) -> list[int]:
        """Words and timestamps of at most 30 s."""
        mel_1MF = self._extractor(waveform_N.numpy(), sampling_rate=16_000, return_tensors="pt").input_features
        with torch.inference_mode(), quiet():
            [ids] = self._model.generate(
                mel_1MF.to(self._device),
                return_timestamps=True,
                force_unique_generate_call=True,  # no second look at the window's rest: that is the next window
                do_sample=False,
                num_beams=1,
                **self._asked,
            ).tolist()
        return [each for each in ids if each < self._end or self._first <= each < self._first + NUM_TIMES]


def _describe(config: TokenizerConfig) -> Description:
    entry = ENTRIES[0]
    source = config.weights or entry.weights or ""
    place = {"revision": config.revision, "local_files_only": config.local_files_only}
    find_folder(source, patterns=(*MODEL_PATTERNS, *TEXT_PATTERNS, "generation_config.json"), **place)
    weights = find_weights(source, tokenizer=config.tokenizer, architecture="whisper", **place)
    extractor = {"feature_size": _BANDS, **read_json(weights.folder / "preprocessor_config.json", source)}
    require_windows(replace(weights, preprocessor=extractor), config.tokenizer)
    generation = read_json(weights.folder / "generation_config.json", source)
    no_times = generation.get("no_timestamps_token_id")
    first = no_times + 1 if isinstance(no_times, int) else 0
    end = generation.get("eos_token_id", weights.config.get("eos_token_id"))
    if first < 1 or not isinstance(end, int) or first + NUM_TIMES > weights.config["vocab_size"]:
        raise UserError(
            f"{source} cannot tell times: expected a generation_config.json with no_timestamps_token_id and "
            f"eos_token_id, and {NUM_TIMES:,} timestamps in its vocabulary. Name a checkpoint of Whisper that has them."
        )
    asked = _asked(config, generation, source)
    read_json(weights.folder / "tokenizer.json", source)
    files = [weights.folder / name for name in ("generation_config.json", *TEXT_PATTERNS)]
    fingerprint = {
        "tokenizer": config.tokenizer,
        "whisper": "text/1",
        **fingerprint_of(weights),
        "words": files_sha256(file for file in files if file.exists()),
        "precision": config.mode.precision,
        **asked,
    }
    spec = StreamSpec.from_json({**entry.spec.to_json(), "codebook_size": first + NUM_TIMES})
    return Description(config, spec, fingerprint, weights=_Found(weights, first, end, asked))


def _asked(config: TokenizerConfig, generation: dict[str, Any], source: str) -> dict[str, str]:
    """The language and the task that were named. Raises `UserError` for those that the checkpoint does not know."""
    known = {
        "language": sorted(name.strip("<|>") for name in generation.get("lang_to_id") or {}),
        "task": sorted(generation.get("task_to_id") or {}),
    }
    asked = {key: value for key in known if (value := getattr(config, key)) is not None}
    for key, value in asked.items():
        if not generation.get("is_multilingual") or not known[key]:
            raise UserError(f"{source} knows English alone (its generation_config.json says so): leave out {key}.")
        if value not in known[key]:
            there, near = ", ".join(known[key]), did_you_mean(value, known[key])
            raise UserError(f"{source} knows no {key} {value!r}; there are: {there}.{near}")
    return asked


ENTRIES = (
    TokenizerEntry(
        spec=StreamSpec(
            tokenizer="whisper-text",
            sample_rate=16_000,
            decode_sample_rate=0,
            hop_length=HOP,
            window_length=HOP,
            frame_rule=FrameRule.FREE,
            num_codebooks=1,
            codebook_size=51_866,
            text=True,
        ),
        kind="text",
        about="transcripts with timestamps by any checkpoint of Whisper, greedy",
        needs_codebook=False,
        hears_words=True,
        last_frame="windows are filled up to 30 s with zeros, as published",
        long_audio="windows of 30 s, each from where the last whole sentence of the one before ended",
        weights="openai/whisper-large-v3",
        licence="Apache-2.0",
        describe=_describe,
        open=lambda description, device: WhisperText(description, device=device),
    ),
)
