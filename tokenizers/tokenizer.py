"""The tokenizer protocol, the one class both baselines share, and the registry by name."""

import hashlib
import json
from collections.abc import Callable
from typing import Protocol, runtime_checkable

from torch import Tensor

from .codebook import Codebook
from .mel import MelFeatures
from .mfcc import MfccFeatures
from .quantize import ResidualQuantizer
from .spec import FrameRule, StreamSpec, UserError, did_you_mean


class Tokenizer(Protocol):
    """Waveforms to codes and, where `spec.decode_sample_rate` is set, back."""

    spec: StreamSpec
    fingerprint: dict[str, str]  # named parts of everything that decides the codes

    def encode(self, waveform_N: Tensor) -> Tensor:
        """Codes `[K, T]` int64 of a mono float32 waveform at `spec.sample_rate`; T is `num_frames(N, spec)`."""
        ...

    def decode(self, codes_KT: Tensor) -> Tensor:
        """Sound `[T * hop]` at `spec.decode_sample_rate` from the first K codebooks; 1 <= K <= num_codebooks."""
        ...


class Features(Protocol):
    """Frames of real numbers on a clock: what a codebook is fitted on and quantizes."""

    name: str
    version: str  # raised with every change that can move a number
    sample_rate: int
    hop_length: int
    window_length: int
    frame_rule: FrameRule
    dim: int
    default_num_codebooks: int
    default_codebook_size: int

    def extract(self, waveform_N: Tensor) -> Tensor: ...


@runtime_checkable
class Synthesizer(Protocol):
    """Features that know the way back to sound."""

    def synthesize(self, features_TD: Tensor) -> Tensor: ...


FEATURES: dict[str, Callable[..., Features]] = {
    MfccFeatures.name: MfccFeatures,
    MelFeatures.name: MelFeatures,
}


class CodebookTokenizer:
    """Features, then residual quantization by a fitted codebook; sound again where the features know the way."""

    def __init__(self, features: Features, codebook: Codebook, *, device: str = "cpu") -> None:
        num_codebooks, size, _ = codebook.centroids_QCD.shape
        self.features = features
        self._quantizer = ResidualQuantizer(codebook.centroids_QCD, device=device)
        self.spec = StreamSpec(
            tokenizer=features.name,
            sample_rate=features.sample_rate,
            decode_sample_rate=features.sample_rate if isinstance(features, Synthesizer) else 0,
            hop_length=features.hop_length,
            window_length=features.window_length,
            frame_rule=features.frame_rule,
            num_codebooks=num_codebooks,
            codebook_size=size,
        )
        self.fingerprint = {
            "tokenizer": features.name,
            "features": features_fingerprint(features),
            "codebook": codebook.sha256,
            "precision": "float32",
        }

    def encode(self, waveform_N: Tensor) -> Tensor:
        return self._quantizer.encode(self.features.extract(waveform_N)).cpu()

    def decode(self, codes_KT: Tensor) -> Tensor:
        if not isinstance(self.features, Synthesizer):
            raise UserError(
                f"Tokenizer {self.spec.tokenizer} has no decoder: semantic tokens do not say how it sounds."
            )
        return self.features.synthesize(self._quantizer.decode(codes_KT)).cpu()


def require_tokenizer(name: str) -> None:
    """Raise `UserError` for a name that nobody registered."""
    if name not in FEATURES:
        there = sorted(FEATURES)
        raise UserError(f"There is no tokenizer {name!r}; there are: {', '.join(there)}.{did_you_mean(name, there)}")


def load_features(name: str, *, device: str = "cpu") -> Features:
    """The features of tokenizer `name`. Raises `UserError` for a name that nobody registered."""
    require_tokenizer(name)
    return FEATURES[name](device=device)


def load_tokenizer(name: str, codebook: Codebook, *, codebook_name: str, device: str = "cpu") -> Tokenizer:
    """Tokenizer `name` with `codebook`. Raises `UserError`, naming the difference, if the two do not fit."""
    features = load_features(name, device=device)
    fitted_for = codebook.header.get("tokenizer")
    if fitted_for != name:
        raise UserError(
            f"Codebook {codebook_name} was fitted for tokenizer {fitted_for!r}, this stream uses {name!r}. "
            f"Fit one with `wavemill codebook fit ROOT {name}`, or name another codebook."
        )
    if codebook.centroids_QCD.shape[2] != features.dim:
        raise UserError(
            f"Codebook {codebook_name} has centroids of {codebook.centroids_QCD.shape[2]} dimensions, the features "
            f"of {name} have {features.dim}. Fit it again with `wavemill codebook fit ROOT {name}`."
        )
    if codebook.header.get("features") != features_fingerprint(features):
        raise UserError(
            f"Codebook {codebook_name} was fitted on features {codebook.header.get('features')}, this version "
            f"of wavemill computes {features_fingerprint(features)}. Fit it again with "
            f"`wavemill codebook fit ROOT {name}`."
        )
    return CodebookTokenizer(features, codebook, device=device)


def features_fingerprint(features: Features) -> str:
    return f"{features.name}/{features.version}"


def fingerprint_hash(fingerprint: dict[str, str]) -> str:
    """Twelve hexadecimal digits that stand for all parts."""
    return hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()[:12]
