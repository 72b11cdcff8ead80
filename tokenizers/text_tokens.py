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


class TextTokens:
    """A `TextTokenizer`: ids without special tokens, which layouts add; none of a segment without a transcript.

    A transcript that holds the text of a special token has the ids of its letters.
    """

    def __init__(self, description: Description) -> None:
        self.spec = description.spec
        self.fingerprint = description.fingerprint
        self._words: Any = description.weights
        added = self._words.added_tokens_decoder.items()
        self._special = {each: str(token) for each, token in added if token.special}
        self._special.pop(self._words.unk_token_id, None)  # what letters that it lacks become

    def tokens_of_text(self, text: str | None) -> Tokens:
        ids = [part for each in self._ids(text) for part in self._parts(each)]
        return Tokens(codes_KT=torch.tensor([ids], dtype=torch.int64).reshape(1, len(ids)), text=text)

    def _ids(self, text: str | None) -> list[int]:
        if text is None:
            return []
        return self._words(text, add_special_tokens=False, split_special_tokens=True, verbose=False).input_ids

    def _parts(self, each: int) -> list[int]:
        """The id itself; of a special token, which models such as T5's Unigram have among their words, its letters'."""
        if each not in self._special:
            return [each]
        model = self._words.backend_tokenizer.model
        return [token.id for letter in self._special[each] for token in model.tokenize(letter)]


@dataclass(frozen=True, slots=True)
class _Found:
    weights: Weights
    words: Any


class TextEmbedding:
    """A `TextTokenizer`: the mean of a text encoder's last hidden states `[1, D]` over all tokens, special ones too.

    Zeros for a segment without a transcript, as MusicGen (Copet et al. 2023) has them for music without a description.
    What does not fit the encoder's places is cut off.
    """

    def __init__(self, description: Description, *, device: str = "cpu") -> None:
        found: _Found = description.weights
        self.spec = description.spec
        self.fingerprint = description.fingerprint
        self._device = device
        self._words = found.words
        model, no_places = ENCODERS[found.weights.config["model_type"]]
        places = found.weights.config.get("max_position_embeddings") or _PLACES + no_places
        self._most = min(places - no_places, found.words.model_max_length)
        self._model: Any = load_model(model, found.weights, may_lack=("pooler.dense.weight", "pooler.dense.bias"))
        self._model.to(device)

    def tokens_of_text(self, text: str | None) -> Tokens:
        mean_D = torch.zeros(self.spec.dim) if text is None else self._mean(text)
        return Tokens(codes_KT=torch.empty(0, 1, dtype=torch.int64), frames_TD=stored(mean_D[None]), text=text)

    def _mean(self, text: str) -> Tensor:
        asked = self._words(text, truncation=True, max_length=self._most, return_tensors="pt", verbose=False)
        with torch.inference_mode():
            hidden_TD = self._model(
                input_ids=asked.input_ids.to(self._device), attention_mask=asked.attention_mask.to(self._device)
            ).last_hidden_state[0]
        return hidden_TD.double().mean(dim=0).float().cpu()


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


def _describe_tokens(config: TokenizerConfig) -> Description:
    source, folder, revision = _files(config, ENTRIES[0].weights or "")
    words = load_text_tokenizer(folder, source)
    fingerprint = {"tokenizer": config.tokenizer, "text": "tokens/2", "words": _sha256(folder), "revision": revision}
    return Description(config, replace(ENTRIES[0].spec, codebook_size=len(words)), fingerprint, weights=words)


def _describe_embedding(config: TokenizerConfig) -> Description:
    model_patterns = ("config.json", "*.safetensors", "*.safetensors.index.json")
    source, folder, _ = _files(config, ENTRIES[1].weights or "", more=model_patterns)
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
        "text": "embedding/1",
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
