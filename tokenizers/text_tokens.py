"""Transcripts as tokens of a text tokenizer, and as one vector of a text encoder, both in Hugging Face layout.

Axes: T tokens, D dimensions.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .continuous import stored
from .hub import (
    MODEL_PATTERNS,
    TEXT_PATTERNS,
    Weights,
    files_sha256,
    find_folder,
    find_weights,
    fingerprint_of,
    load_model,
    load_text_tokenizer,
    read_json,
)
from .spec import FrameRule, StreamSpec, UserError
from .tokenizer import Description, TokenizerConfig, TokenizerEntry, Tokens

# by the model_type of config.json, and how many of max_position_embeddings are no places
ENCODERS = {
    "t5": ("T5EncoderModel", 0),
    "mt5": ("MT5EncoderModel", 0),
    "umt5": ("UMT5EncoderModel", 0),
    "bert": ("BertModel", 0),
    "distilbert": ("DistilBertModel", 0),
    "roberta": ("RobertaModel", 2),
    "xlm-roberta": ("XLMRobertaModel", 2),
    "mpnet": ("MPNetModel", 2),
}
_WIDTHS = ("d_model", "hidden_size", "dim")  # of config.json: T5 and its kin, BERT and its, DistilBERT
_PLACES = 512  # of encoders that do not say: T5's were trained with so many


class TextIds:
    """A text tokenizer without special tokens: a text that holds that of one has the ids of its letters."""

    def __init__(self, words: Any) -> None:
        self._words = words
        added = words.added_tokens_decoder.items()
        self._special = {each: str(token) for each, token in added if token.special}
        self._special.pop(words.unk_token_id, None)  # what letters that it lacks become

    def ids(self, text: str) -> list[int]:
        return self.ids_and_ends(text)[0]

    def ids_and_ends(self, text: str) -> tuple[list[int], list[int]]:
        """The ids, and of each behind which letter of the text it ends."""
        found = self._words(
            text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True, verbose=False
        )
        ids, ends = [], []
        for each, (_, end) in zip(found.input_ids, found.offset_mapping, strict=True):
            parts = self._parts(each)
            ids += parts
            ends += [end] * len(parts)
        return ids, ends

    def _parts(self, each: int) -> list[int]:
        """The id itself; of a special token, which models such as T5's Unigram have among their words, its letters'."""
        if each not in self._special:
            return [each]
        model = self._words.backend_tokenizer.model
        return [token.id for letter in self._special[each] for token in model.tokenize(letter)]


class TextTokens:
    """A `TextTokenizer`: ids without special tokens, which layouts add; none of a segment without a transcript.

    A transcript that holds the text of a special token has the ids of its letters.
    """

    def __init__(self, description: Description) -> None:
        self.spec = description.spec
        self.fingerprint = description.fingerprint
        self._words = TextIds(description.weights)

    def tokens_of_text(self, text: str | None) -> Tokens:
        ids = [] if text is None else self._words.ids(text)
        return Tokens(codes_KT=torch.tensor([ids], dtype=torch.int64).reshape(1, len(ids)), text=text)


@dataclass(frozen=True, slots=True)
class _Found:
    weights: Weights
    words: Any


class TextEmbedding:
    """A `TextTokenizer`: the mean of a text encoder's last hidden states `[1, D]` over all tokens, special ones too.

    Zeros for a segment without a transcript, as MusicGen (Copet et al. 2023) has them for music without a description.
    What does not fit the encoder's places is cut off. Special tokens are those that its tokenizer puts around every
    text, none that a transcript spells.
    """

    def __init__(self, description: Description, *, device: str = "cpu") -> None:
        found: _Found = description.weights
        self.spec = description.spec
        self.fingerprint = description.fingerprint
        self._device = device
        self._words = TextIds(found.words)
        self._before, self._behind = _around(found.words)
        model, no_places = ENCODERS[found.weights.config["model_type"]]
        places = found.weights.config.get("max_position_embeddings") or _PLACES + no_places
        self._most = min(places - no_places, found.words.model_max_length)
        self._model: Any = load_model(model, found.weights, may_lack=("pooler.dense.weight", "pooler.dense.bias"))
        self._model.to(device)

    def tokens_of_text(self, text: str | None) -> Tokens:
        mean_D = torch.zeros(self.spec.dim) if text is None else self._mean(text)
        return Tokens(codes_KT=torch.empty(0, 1, dtype=torch.int64), frames_TD=stored(mean_D[None]), text=text)

    def _mean(self, text: str) -> Tensor:
        room = self._most - len(self._before) - len(self._behind)
        ids = [*self._before, *self._words.ids(text)[:room], *self._behind]
        ids_1T = torch.tensor([ids], device=self._device)
        with torch.inference_mode():
            hidden_TD = self._model(input_ids=ids_1T, attention_mask=torch.ones_like(ids_1T)).last_hidden_state[0]
        return hidden_TD.double().mean(dim=0).float().cpu()


def _around(words: Any) -> tuple[list[int], list[int]]:
    """The special tokens that a text tokenizer puts before and behind every text."""
    asked = words("a", return_special_tokens_mask=True, verbose=False)
    own = [place for place, special in enumerate(asked.special_tokens_mask) if not special] or [len(asked.input_ids)]
    return asked.input_ids[: own[0]], asked.input_ids[own[-1] + 1 :]


def _files(config: TokenizerConfig, default: str, *, more: tuple[str, ...] = ()) -> tuple[str, Path, str]:
    """Where a text tokenizer lies, as given and as a folder, and its revision. Raises `UserError` if there is none."""
    source = config.weights or default
    folder, revision = find_folder(
        source, revision=config.revision, local_files_only=config.local_files_only, patterns=(*TEXT_PATTERNS, *more)
    )
    read_json(folder / "tokenizer.json", source)
    return source, folder, revision


def _sha256(folder: Path) -> str:
    return files_sha256(folder / name for name in TEXT_PATTERNS if (folder / name).exists())


def text_files(config: TokenizerConfig, default: str) -> tuple[Any, dict[str, str]]:
    """A text tokenizer of transformers, and its part of a fingerprint. Raises `UserError` if there is none."""
    source, folder, revision = _files(config, default)
    return load_text_tokenizer(folder, source), {"words": _sha256(folder), "revision": revision}


def _describe_tokens(config: TokenizerConfig) -> Description:
    words, fingerprint = text_files(config, ENTRIES[0].weights or "")
    fingerprint = {"tokenizer": config.tokenizer, "text": "tokens/2", **fingerprint}
    return Description(config, replace(ENTRIES[0].spec, codebook_size=len(words)), fingerprint, weights=words)


def _describe_embedding(config: TokenizerConfig) -> Description:
    source, folder, _ = _files(config, ENTRIES[1].weights or "", more=MODEL_PATTERNS)
    kind = read_json(folder / "config.json", source).get("model_type")
    if kind not in ENCODERS:
        raise UserError(
            f"{source} holds a model of type {kind!r} (its config.json says so); {config.tokenizer} takes: "
            f"{', '.join(ENCODERS)}. Name other weights."
        )
    weights = find_weights(
        source,
        tokenizer=config.tokenizer,
        architecture=kind,
        revision=config.revision,
        local_files_only=config.local_files_only,
    )
    dim = next((weights.config[key] for key in _WIDTHS if weights.config.get(key)), None)
    if dim is None:
        raise UserError(
            f"{source}/config.json does not say how many numbers a vector has: expected one of {', '.join(_WIDTHS)}. "
            "Fetch it again, or name other weights."
        )
    fingerprint = {
        "tokenizer": config.tokenizer,
        "text": "embedding/2",
        **fingerprint_of(weights),
        "words": _sha256(folder),
        "precision": config.mode.precision,
    }
    words = load_text_tokenizer(folder, source)
    return Description(config, replace(ENTRIES[1].spec, dim=dim), fingerprint, dim=dim, weights=_Found(weights, words))


_SPEC = StreamSpec(
    tokenizer="text-tokens",
    sample_rate=16_000,  # of nothing: texts have no clock
    decode_sample_rate=0,
    hop_length=16_000,
    window_length=0,
    frame_rule=FrameRule.FREE,
    num_codebooks=1,
    codebook_size=50_257,
    text=True,
)

ENTRIES = (
    TokenizerEntry(
        spec=_SPEC,
        kind="text",
        takes="text",
        about="transcripts as tokens of any text tokenizer, without special ones",
        needs_codebook=False,
        last_frame="-",
        long_audio="takes the corpus's texts, no audio",
        weights="openai-community/gpt2",
        licence="MIT",
        describe=_describe_tokens,
        open=lambda description, device: TextTokens(description),
    ),
    TokenizerEntry(
        spec=replace(
            _SPEC, tokenizer="text-embedding", frame_rule=FrameRule.ONE, num_codebooks=0, codebook_size=1, dim=768
        ),
        kind="text",
        takes="text",
        about="transcripts as one vector each: the mean of a text encoder (T5, BERT and its kin)",
        needs_codebook=False,
        last_frame="-",
        long_audio="takes the corpus's texts, no audio; tokens past the encoder's places are cut off",
        weights="google-t5/t5-base",
        licence="Apache-2.0",
        describe=_describe_embedding,
        open=lambda description, device: TextEmbedding(description, device=device),
    ),
)
