"""The registry of tokenizers by name, and the one way to a tokenizer: describe it, then open it."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from . import dac, encodec, mel, mfcc, mimi, ssl_features, wav2vec2_codes
from .codebook import Codebook
from .spec import UserError, did_you_mean
from .tokenizer import (
    BatchFeatures,
    Description,
    Features,
    PiecewiseFeatures,
    Synthesizer,
    Tokenizer,
    TokenizerConfig,
    TokenizerEntry,
)

FAMILIES = (
    mfcc,
    mel,
    ssl_features,
    wav2vec2_codes,
    dac,
    encodec,
    mimi,
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
    if config.mode not in entry.modes:
        raise UserError(f"Tokenizer {name} has no mode {config.mode.value!r}; it has: {', '.join(entry.modes)}.")
    return entry.describe(config)


def describe_features(config: TokenizerConfig) -> Description:
    """`describe` of what a codebook is fitted on. Raises `UserError`, also for what has codebooks of its own."""
    if not require_tokenizer(config.tokenizer).needs_codebook:
        raise UserError(f"Tokenizer {config.tokenizer} has codebooks of its own: there is none to fit or to name.")
    return describe(config)


def load_features(config: TokenizerConfig, *, device: str = "cpu") -> Features:
    """The features that `config` names. Raises `UserError` as `describe_features` does."""
    described = describe_features(config)
    return require_tokenizer(config.tokenizer).open(described, device)


def describe_tokenizer(config: TokenizerConfig, codebook: Codebook | None, *, codebook_name: str = "") -> Description:
    """`describe` with the codebook's part. Raises `UserError`, naming the difference, if the two do not fit."""
    entry = require_tokenizer(config.tokenizer)
    described = describe(config)
    if not entry.needs_codebook:
        if codebook is not None:
            raise UserError(f"Tokenizer {config.tokenizer} has codebooks of its own: leave out {codebook_name!r}.")
        return described
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
    config: TokenizerConfig, codebook: Codebook | None = None, *, codebook_name: str = "", device: str = "cpu"
) -> Tokenizer:
    """The tokenizer that `config` names, with `codebook` where it needs one. Raises `UserError` as `describe` does."""
    described = describe_tokenizer(config, codebook, codebook_name=codebook_name)
    opened = require_tokenizer(config.tokenizer).open(described, device)
    return opened if codebook is None else CodebookTokenizer(opened, codebook, described, device=device)


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
        codes = [self.quantizer.encode(piece_TD).cpu() for piece_TD in self.features.pieces(waveform_N)]
        return torch.cat(codes, dim=1) if codes else torch.empty(self.spec.num_codebooks, 0, dtype=torch.int64)

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
