"""The registry of tokenizers by name, and the one way to a tokenizer: describe it, then open it."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from . import (
    dac,
    encodec,
    encodec_48khz,
    higgs_audio,
    lyra,
    mel,
    mfcc,
    mimi,
    pocket_tts,
    snac,
    speech_tokenizer,
    ssl_features,
    text_tokens,
    unit_bpe,
    units,
    vibevoice,
    w2v_bert,
    wav2vec2_codes,
    whisper_features,
    whisper_text,
    word_tokens,
    xcodec,
    xcodec2,
    xvector,
)
from .codebook import Codebook
from .continuous import ContinuousTokenizer, describe_continuous
from .spec import UserError, did_you_mean, num_frames
from .tokenizer import (
    BatchFeatures,
    Description,
    Features,
    Output,
    PiecewiseFeatures,
    SourceStream,
    Synthesizer,
    TokenizerConfig,
    TokenizerEntry,
)
from .unit_bpe import UnitModel

FAMILIES = (
    mfcc,
    mel,
    ssl_features,
    w2v_bert,
    whisper_features,
    wav2vec2_codes,
    dac,
    encodec,
    encodec_48khz,
    mimi,
    xcodec,
    higgs_audio,
    speech_tokenizer,
    snac,
    lyra,
    xcodec2,
    whisper_text,
    text_tokens,
    word_tokens,
    units,
    unit_bpe,
    pocket_tts,
    vibevoice,
    xvector,
)
REGISTRY: dict[str, TokenizerEntry] = {entry.spec.tokenizer: entry for family in FAMILIES for entry in family.ENTRIES}


def require_tokenizer(name: str) -> TokenizerEntry:
    """The entry of a name. Raises `UserError` for one that nobody registered."""
    if name not in REGISTRY:
        there = sorted(REGISTRY)
        raise UserError(f"There is no tokenizer {name!r}; there are: {', '.join(there)}.{did_you_mean(name, there)}")
    return REGISTRY[name]


def describe(config: TokenizerConfig) -> Description:
    """What `config` will give; reads configurations and hashes weights, builds nothing.

    Raises `UserError` for everything that can be wrong with it: options the tokenizer does not have, weights that are
    missing, pickled, of another architecture or rate, layers and codebooks beyond what there is.
    """
    name = config.tokenizer
    entry = require_tokenizer(name)
    if entry.weights is None and (config.weights or config.revision):
        raise UserError(f"Tokenizer {name} has no weights; leave out weights and revision.")
    if entry.layer is None and config.layer is not None:
        raise UserError(f"Tokenizer {name} has no layers to choose from; leave out layer.")
    if entry.needs_codebook and config.num_codebooks is not None:
        raise UserError(
            f"The codebooks of {name} are those of the codebook that is fitted for it; leave out num_codebooks."
        )
    if not entry.needs_codebook and (config.output is not None or config.reduce is not None):
        gives = "numbers as they are" if entry.spec.dim else "codes of its own, not features"
        raise UserError(f"Tokenizer {name} gives {gives}; leave out output and reduce.")
    if entry.takes != "audio" and config.num_codebooks is not None:
        raise UserError(f"Tokenizer {name} has no codebooks to choose from; leave out num_codebooks.")
    if not entry.hears_words and (config.language is not None or config.task is not None):
        raise UserError(f"Tokenizer {name} writes down no words; leave out language and task.")
    if config.reduce is not None and output_of(config) is not Output.FEATURES:
        raise UserError("reduce makes fewer frames of features: it needs output=features.")
    if config.mode not in entry.modes:
        raise UserError(f"Tokenizer {name} has no mode {config.mode.value!r}; it has: {', '.join(entry.modes)}.")
    return entry.describe(config)


def output_of(config: TokenizerConfig) -> Output:
    """What a stream of `config` holds. Raises `UserError` for a tokenizer that nobody registered."""
    return config.output or require_tokenizer(config.tokenizer).output


def takes_codebook(config: TokenizerConfig) -> bool:
    """Whether a stream of `config` needs a codebook of the root."""
    return require_tokenizer(config.tokenizer).needs_codebook and output_of(config) is Output.CODES


def describe_features(config: TokenizerConfig) -> Description:
    """`describe` of what a codebook is fitted on. Raises `UserError`, also for what has codebooks of its own."""
    entry = require_tokenizer(config.tokenizer)
    if entry.takes != "audio":
        raise UserError(f"Tokenizer {config.tokenizer} takes {entry.takes}: there is no codebook to fit or to name.")
    if not entry.needs_codebook:
        raise UserError(f"Tokenizer {config.tokenizer} {why_no_codebook(entry)}: there is none to fit or to name.")
    return describe(config)


def why_no_codebook(entry: TokenizerEntry) -> str:
    """What to say of a tokenizer that a codebook is named for in vain."""
    return "gives numbers as they are" if entry.spec.dim else "has codebooks of its own"


def load_features(config: TokenizerConfig, *, device: str = "cpu") -> Features:
    """The features that `config` names. Raises `UserError` as `describe_features` does."""
    described = describe_features(config)
    return require_tokenizer(config.tokenizer).open(described, device)


def describe_tokenizer(
    config: TokenizerConfig,
    codebook: Codebook | UnitModel | None,
    *,
    codebook_name: str = "",
    source: SourceStream | None = None,
) -> Description:
    """`describe` with the part of the codebook, or of the source and the model of units.

    Raises `UserError`, naming the difference, if they do not fit.
    """
    entry = require_tokenizer(config.tokenizer)
    if entry.derive is not None:
        if source is None:
            raise UserError(f"Tokenizer {config.tokenizer} makes tokens of another stream's codes: add of=STREAM.")
        return entry.derive(describe(config), source, codebook)
    assert not isinstance(codebook, UnitModel), "only what takes codes has a model of units"
    if codebook is not None and config.output is None and entry.needs_codebook:
        config = replace(config, output=Output.CODES)
    described = describe(config)
    if not takes_codebook(config):
        if codebook is not None:
            why = "keeps its features as they are" if entry.needs_codebook else why_no_codebook(entry)
            raise UserError(f"Tokenizer {config.tokenizer} {why}: leave out {codebook_name!r}.")
        return describe_continuous(described, output_of(config)) if entry.needs_codebook else described
    if codebook is None:
        raise UserError(f"Tokenizer {config.tokenizer} needs a codebook: NAME={config.tokenizer}:CODEBOOK.")
    _require_fits(described, codebook, codebook_name)
    num_codebooks, size, _ = codebook.centroids_QCD.shape
    spec = replace(described.spec, num_codebooks=num_codebooks, codebook_size=size)
    fingerprint = {
        "tokenizer": config.tokenizer,
        **described.fingerprint,
        "codebook": codebook.sha256,
        "precision": config.mode.precision,
    }
    if codebook.groups > 1:  # not said of others, so that streams from before there were groups stay what they are
        fingerprint["groups"] = str(codebook.groups)
    if codebook.spherical:
        fingerprint["spherical"] = "yes"
    return replace(described, spec=spec, fingerprint=fingerprint)


def load_tokenizer(
    config: TokenizerConfig,
    codebook: Codebook | UnitModel | None = None,
    *,
    codebook_name: str = "",
    source: SourceStream | None = None,
    device: str = "cpu",
) -> Any:
    """The tokenizer that `config` names, with `codebook` where it needs one: see `TokenizerEntry`.

    Raises `UserError` as `describe` does.
    """
    entry = require_tokenizer(config.tokenizer)
    described = describe_tokenizer(config, codebook, codebook_name=codebook_name, source=source)
    if described.spec.dim and entry.needs_codebook:
        return ContinuousTokenizer(load_features(config, device=device), described, device=device)
    opened = entry.open(described, device)
    if isinstance(codebook, Codebook):
        return CodebookTokenizer(opened, codebook, described, device=device)
    return opened


class CodebookTokenizer:
    """Features, then residual quantization by a fitted codebook; sound again where the features know the way."""

    def __init__(self, features: Features, codebook: Codebook, described: Description, *, device: str = "cpu") -> None:
        self.features = features
        self.spec = described.spec
        self.fingerprint = described.fingerprint
        self.quantizer = codebook.open(device=device)

    def encode(self, waveform_N: Tensor) -> Tensor:
        if not isinstance(self.features, PiecewiseFeatures):
            return self.quantizer.encode(self.features.extract(waveform_N)).cpu()
        # made at once: small tensors kept from piece to piece would hold the memory between them
        num, begin = num_frames(waveform_N.shape[-1], self.spec), 0
        codes_KT = torch.empty(self.spec.num_codebooks, num, dtype=torch.int64)
        for piece_TD in self.features.pieces(waveform_N):
            codes_KT[:, begin : begin + piece_TD.shape[0]] = self.quantizer.encode(piece_TD)
            begin += piece_TD.shape[0]
        assert begin == num, "frames are as many as the frame rule says"
        return codes_KT

    def encode_batch(self, waveforms: Sequence[Tensor], padded_length: int) -> list[Tensor]:
        if not isinstance(self.features, BatchFeatures):
            return [self.encode(waveform_N) for waveform_N in waveforms]
        batch = self.features.extract_batch(waveforms, padded_length)
        codes_QN = self.quantizer.encode(torch.cat(batch)).cpu()
        return list(codes_QN.split([features_TD.shape[0] for features_TD in batch], dim=1))

    def gaps(self, waveform_N: Tensor) -> Tensor:
        return self.quantizer.gaps(self.features.extract(waveform_N)).cpu()

    def decode(self, codes_KT: Tensor) -> Tensor:
        if not isinstance(self.features, Synthesizer):
            raise UserError(
                f"Tokenizer {self.spec.tokenizer} has no decoder: semantic tokens do not say how it sounds."
            )
        return self.features.synthesize(self.quantizer.decode(codes_KT)).cpu()


# what a codebook has to agree on with the features it is used with; the revision may differ if the weights do not
FITTED_ON = ("features", "weights", "config", "layer", "normalize")


def _require_fits(described: Description, codebook: Codebook, codebook_name: str) -> None:
    name = described.config.tokenizer
    again = f"Fit one with `wavemill codebook fit ROOT {name}`, or name another codebook."
    header = codebook.header
    if header.get("tokenizer") != name:
        raise UserError(
            f"Codebook {codebook_name} was fitted for tokenizer {header.get('tokenizer')!r}, this stream uses {name!r}."
            f" {again}"
        )
    dim = codebook.dim
    if dim != described.dim:
        raise UserError(
            f"Codebook {codebook_name} has centroids of {dim} dimensions, the features of {name} have {described.dim}. "
            f"{again}"
        )
    for part in FITTED_ON:
        fitted_on, ours = header.get(part), described.fingerprint.get(part)
        if fitted_on != ours:
            raise UserError(
                f"Codebook {codebook_name} was fitted on {part} {str(fitted_on)[:24]}, this stream uses "
                f"{str(ours)[:24]}. {again}"
            )
