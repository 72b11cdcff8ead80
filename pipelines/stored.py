"""A row of a stream as its tokenizer gave it."""

import torch

from ..storage.codes import ShardCodes
from ..tokenizers.tokenizer import Tokens


def stored_tokens(codes: ShardCodes, row: int) -> Tokens | None:
    """The tokens of a row that was read with `more`, or None where it has an error."""
    codes_KT = codes.codes(row)
    if codes_KT is None:
        return None
    frames_TD = codes.frames(row) if "frames" in codes.more else None
    durations_T = codes.durations(row) if "durations" in codes.more else None
    scales_C = codes.scales(row) if "chunk_scales" in codes.more else None
    return Tokens(
        codes_KT=torch.from_numpy(codes_KT.astype("int64")),
        frames_TD=None if frames_TD is None else torch.from_numpy(frames_TD.copy()),
        durations_T=None if durations_T is None else torch.from_numpy(durations_T),
        scales_C=None if scales_C is None else torch.from_numpy(scales_C),
        text=codes.text(row) if "text" in codes.more else None,
    )
