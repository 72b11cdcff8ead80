"""Tokens made of another stream's codes without loss: each run of equal codes as one, with its length.

Axes: K codebooks, S frames of the source, T tokens.
"""

from dataclasses import replace

import torch
from torch import Tensor

from .spec import FrameRule, StreamSpec, UserError
from .tokenizer import Description, SourceStream, TokenizerConfig, TokenizerEntry, Tokens, fingerprint_hash


class Deduplicated:
    """A `UnitTokenizer`: runs of equal frames (Lakhotia et al. 2021, section 3), equal in all codebooks."""

    def __init__(self, described: Description) -> None:
        self.spec = described.spec
        self.fingerprint = described.fingerprint

    def tokens_of_tokens(self, source: Tokens) -> Tokens:
        codes_KS = source.codes_KT.long()
        begins_S = torch.ones(codes_KS.shape[1], dtype=torch.bool)
        begins_S[1:] = (codes_KS[:, 1:] != codes_KS[:, :-1]).any(dim=0)
        starts_T = begins_S.nonzero()[:, 0]
        ends_T = torch.cat([starts_T[1:], starts_T.new_full((min(1, len(starts_T)),), codes_KS.shape[1])])
        return Tokens(codes_KT=codes_KS[:, starts_T], durations_T=(ends_T - starts_T).int())

    def source_of(self, tokens: Tokens) -> Tensor:
        assert tokens.durations_T is not None
        return tokens.codes_KT.long().repeat_interleave(tokens.durations_T.long(), dim=1)


def derived_spec(name: str, source: StreamSpec) -> StreamSpec:
    """A stream of the source's codes, on its clock as far as it still has one: each token has a duration in frames."""
    return replace(
        source,
        tokenizer=name,
        frame_rule=FrameRule.FREE,
        decode_sample_rate=0,
        decode_trim=0,
        chunk_length=0,
        chunk_stride=0,
        durations=True,
        text=False,
    )


def derived_fingerprint(described: Description, source: SourceStream) -> dict[str, str]:
    return {**described.fingerprint, "source": fingerprint_hash(source.fingerprint)}


def _describe(config: TokenizerConfig) -> Description:
    return Description(config, ENTRIES[0].spec, {"tokenizer": config.tokenizer, "units": "deduplicate/1"})


def _derive(described: Description, source: SourceStream, model: None) -> Description:
    if source.spec.durations:
        raise UserError(
            f"Stream {source.name!r} has durations already, which deduplicate would not give back. Name the stream of "
            "frames that it was made of."
        )
    spec = derived_spec("deduplicate", source.spec)
    return replace(described, spec=spec, fingerprint=derived_fingerprint(described, source))


ENTRIES = (
    TokenizerEntry(
        spec=StreamSpec(
            tokenizer="deduplicate",
            sample_rate=16_000,
            decode_sample_rate=0,
            hop_length=320,
            window_length=320,
            frame_rule=FrameRule.FREE,
            num_codebooks=1,
            codebook_size=500,
            durations=True,
        ),
        kind="derived",
        takes="codes",
        about="runs of equal codes of another stream as one, with durations",
        needs_codebook=False,
        last_frame="as its source's",
        long_audio="as its source",
        describe=_describe,
        derive=_derive,
        open=lambda described, device: Deduplicated(described),
    ),
)
