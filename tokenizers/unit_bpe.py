"""Byte-pair encoding of units: sequences of codes that are frequent become tokens of their own; nothing is lost.

Sennrich et al. 2016 over units in place of letters, as Shen et al. 2024 and Chang et al. 2023 have it. Each unit is
written as one private character for Hugging Face's `tokenizers`; the first tokens are the units themselves.

Axes: S units of a source, T tokens.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .spec import FrameRule, StreamSpec, UserError
from .tokenizer import Description, SourceStream, TokenizerConfig, TokenizerEntry, Tokens, fingerprint_hash
from .units import derived_fingerprint, derived_spec

_PLANES = ((0xF0000, 65_534), (0x100000, 65_534))  # private use; the last two of each plane are no characters
MOST_UNITS = sum(size for _, size in _PLANES)
_PIECE = 256  # units: longer sequences are cut for fitting, where each merge walks through whole ones

Merge = tuple[int, int, int]  # the tokens that are joined, and what they become


@dataclass(frozen=True)
class UnitModel:
    """Which pairs of tokens are joined, in this order; `story` says how the model was fitted."""

    num_units: int
    merges: tuple[Merge, ...]
    story: dict[str, Any] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """How many tokens there are."""
        return len(self.parts)

    @property
    def sha256(self) -> str:
        """Of what decides the tokens."""
        return hashlib.sha256(json.dumps([self.num_units, self.merges]).encode()).hexdigest()

    @cached_property
    def parts(self) -> list[tuple[int, ...]]:
        """The units of each token. Raises `ValueError` for merges that cannot be."""
        parts: list[tuple[int, ...]] = [(unit,) for unit in range(self.num_units)]
        for left, right, into in self.merges:
            joined = parts[left] + parts[right] if 0 <= min(left, right) <= max(left, right) < len(parts) else ()
            if into == len(parts) and joined:
                parts.append(joined)
            elif not joined or not 0 <= into < len(parts) or parts[into] != joined:
                raise ValueError(f"{left} and {right} cannot become {into}")
        return parts

    def to_bytes(self) -> bytes:
        content = {"kind": "bpe", "num_units": self.num_units, "merges": self.merges, "story": self.story}
        return json.dumps(content, sort_keys=True).encode()

    @classmethod
    def from_bytes(cls, content: bytes, *, name: str) -> "UnitModel":
        """Raises `UserError` for what is no model of units."""
        try:
            found = json.loads(content)
            if found["kind"] != "bpe" or not 0 < found["num_units"] <= MOST_UNITS:
                raise ValueError("it is of another kind")
            merges = tuple((int(left), int(right), int(into)) for left, right, into in found["merges"])
            model = cls(int(found["num_units"]), merges, dict(found["story"]))
            assert model.parts
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"{name} is no model of units ({error}). Fit one with `wavemill units fit`.") from error
        return model


def fit_bpe(sequences: Iterable[NDArray[np.integer]], *, num_units: int, size: int) -> tuple[Merge, ...]:
    """The merges that make `size` tokens out of `num_units`; fewer where no pair is there twice.

    Of the most frequent pairs, the lowest comes first: the same sequences give the same merges. Raises `UserError` if
    there are more units than can be written, or no room for merges.
    """
    library = _library()
    if num_units > MOST_UNITS:
        raise UserError(f"A stream of {num_units:,} codes has too many for BPE, which takes up to {MOST_UNITS:,}.")
    if size <= num_units:
        raise UserError(f"--size {size:,} leaves no room beside the {num_units:,} units themselves. Name a larger one.")
    fitted = library.Tokenizer(library.models.BPE())
    trainer = library.trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=2,
        special_tokens=[],
        initial_alphabet=[_character(unit) for unit in range(num_units)],
        show_progress=False,
    )
    fitted.train_from_iterator(_pieces(sequences), trainer)
    model = json.loads(fitted.to_str())["model"]
    tokens: dict[str, int] = model["vocab"]
    assert all(tokens[_character(unit)] == unit for unit in range(num_units)), "units are not the first tokens"
    return tuple((tokens[left], tokens[right], tokens[left + right]) for left, right in model["merges"])


class UnitBpe:
    """A `UnitTokenizer` of one codebook; the duration of a token is that of its units together."""

    def __init__(self, described: Description) -> None:
        library = _library()
        model: UnitModel = described.weights
        self.spec = described.spec
        self.fingerprint = described.fingerprint
        self._parts = [torch.tensor(part) for part in model.parts]
        self._lengths = torch.tensor([len(part) for part in model.parts])
        self._characters = np.array([_code_point(unit) for unit in range(model.num_units)], dtype="<u4")
        written = ["".join(map(_character, part)) for part in model.parts]
        merges = [(written[left], written[right]) for left, right, _ in model.merges]
        vocabulary = {text: token for token, text in enumerate(written)}
        self._model = library.Tokenizer(library.models.BPE(vocab=vocabulary, merges=merges))

    def tokens_of_tokens(self, source: Tokens) -> Tokens:
        units_S = source.codes_KT[0].numpy()
        text = self._characters[units_S].tobytes().decode("utf-32-le")
        tokens_T = torch.tensor(self._model.encode(text, add_special_tokens=False).ids, dtype=torch.int64)
        ends_T = self._lengths[tokens_T].cumsum(dim=0)
        frames_S = torch.ones(len(units_S), dtype=torch.int64)
        if source.durations_T is not None:
            frames_S = source.durations_T.long()
        until_S = torch.cat([torch.zeros(1, dtype=torch.int64), frames_S.cumsum(dim=0)])
        durations_T = until_S[ends_T].diff(prepend=torch.zeros(1, dtype=torch.int64))
        return Tokens(codes_KT=tokens_T[None], durations_T=durations_T.int())

    def source_of(self, tokens: Tokens) -> Tensor:
        parts = [self._parts[token] for token in tokens.codes_KT[0].tolist()]
        return (torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64))[None]


def _code_point(unit: int) -> int:
    for begin, size in _PLANES:
        if unit < size:
            return begin + unit
        unit -= size
    raise AssertionError("there are not so many units")


def _character(unit: int) -> str:
    return chr(_code_point(unit))


def _pieces(sequences: Iterable[NDArray[np.integer]]) -> Iterator[str]:
    for units_S in sequences:
        for begin in range(0, len(units_S), _PIECE):
            yield "".join(map(_character, units_S[begin : begin + _PIECE].tolist()))


def library_version() -> str:
    return f"tokenizers {_library().__version__}"


def _library() -> Any:
    try:
        import tokenizers
    except ModuleNotFoundError as error:
        raise UserError(
            "BPE over units needs the package tokenizers. Install it: pip install 'wavemill[models]'."
        ) from error
    return tokenizers


def _describe(config: TokenizerConfig) -> Description:
    return Description(config, ENTRIES[0].spec, {"tokenizer": config.tokenizer, "units": "bpe/1"})


def _derive(described: Description, source: SourceStream, model: UnitModel) -> Description:
    require_one_codebook(source)
    fitted_on, ours = model.story.get("source"), fingerprint_hash(source.fingerprint)
    if model.num_units != source.spec.codebook_size or fitted_on != ours:
        raise UserError(
            f"The model of units was fitted on stream {model.story.get('stream')!r} ({model.num_units:,} units, "
            f"fingerprint {fitted_on}); {source.name!r} is another one ({source.spec.codebook_size:,} units, {ours}). "
            f"Fit one on it: wavemill units fit ROOT {source.name} --name NAME"
        )
    spec = replace(derived_spec("bpe", source.spec), codebook_size=model.size)
    fingerprint = {**derived_fingerprint(described, source), "model": model.sha256}
    return replace(described, spec=spec, fingerprint=fingerprint, weights=model)


def require_one_codebook(source: SourceStream) -> None:
    """Raise `UserError` for a stream whose frames are not one unit each."""
    if source.spec.num_codebooks != 1:
        raise UserError(
            f"BPE joins the units of one codebook; stream {source.name!r} has {source.spec.num_codebooks}. Name a "
            "stream of one."
        )


ENTRIES = (
    TokenizerEntry(
        spec=StreamSpec(
            tokenizer="bpe",
            sample_rate=16_000,
            decode_sample_rate=0,
            hop_length=320,
            window_length=320,
            frame_rule=FrameRule.FREE,
            num_codebooks=1,
            codebook_size=5_000,
            durations=True,
        ),
        kind="derived",
        takes="codes",
        needs_units=True,
        about="byte pairs of the units of another stream, with durations",
        needs_codebook=False,
        last_frame="as its source's",
        long_audio="as its source",
        describe=_describe,
        derive=_derive,
        open=lambda described, device: UnitBpe(described),
    ),
)
