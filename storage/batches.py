"""What a `TokenDataset` yields: dataclasses of tensors that a DataLoader can pin.

Axes: B segments or sequences, K codebooks, T frames, L tokens of a sequence.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from .stepping import Source
from .windows import LaneTokens, segment_codes


@dataclass(frozen=True, slots=True, kw_only=True)
class _Batch:
    state: dict[str, Any]
    """Where the epoch stands after this step, the same on all ranks: for `load_state_dict`."""

    def to(self, device: str | torch.device, *, non_blocking: bool = False) -> Self:
        """The batch with its tensors on a device."""
        return self._with(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """The batch in page-locked memory; what a DataLoader with `pin_memory` calls."""
        return self._with(Tensor.pin_memory)

    def _with(self, change: Callable[[Tensor], Tensor]) -> Self:
        changed: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                changed[field.name] = change(value)
            elif isinstance(value, dict) and field.name != "state":
                changed[field.name] = {name: change(tensor) for name, tensor in value.items()}
        return replace(self, **changed)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenBatch(_Batch):
    """B segments: codes `[B, K, T]` int64 by stream, -1 behind `num_frames` `[B]` int64.

    Rows that fill up an epoch's last step have the id "" and no frames.
    """

    ids: list[str]
    codes: dict[str, Tensor]
    num_frames: dict[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedBatch(_Batch):
    """B sequences of L tokens.

    `tokens` `[B, L]` int64, 0 where there is padding; `segment_ids` `[B, L]` int32, from 1 in each sequence, 0 where
    there is padding; `positions` `[B, L]` int32, from 0 at each segment's first token in the sequence; `loss_mask`
    `[B, L]` bool, false where there is padding. `ids` names each sequence's segments. Sequences that fill up an
    epoch's last step are all padding.
    """

    tokens: Tensor
    segment_ids: Tensor
    positions: Tensor
    loss_mask: Tensor
    ids: list[list[str]]


def token_batch(
    sources: Sequence[Source], batch_size: int, num_codebooks: Mapping[str, int], state: dict[str, Any]
) -> TokenBatch:
    segments = [segment_codes(lane, place) for lane, place in sources]  # pyright: ignore[reportArgumentType]
    ids = [lane.ids[place] for lane, place in sources] + [""] * (batch_size - len(sources))
    codes, num_frames = {}, {}
    for name, books in num_codebooks.items():
        counts_B = torch.zeros(batch_size, dtype=torch.int64)
        counts_B[: len(segments)] = torch.tensor([segment[name].shape[1] for segment in segments], dtype=torch.int64)
        codes_BKT = torch.full((batch_size, books, int(counts_B.max())), -1)
        for row_KT, segment in zip(codes_BKT, segments, strict=False):
            row_KT[:, : segment[name].shape[1]] = segment[name]
        codes[name], num_frames[name] = codes_BKT, counts_B
    return TokenBatch(ids=ids, codes=codes, num_frames=num_frames, state=state)


def packed_batch(
    sources: Sequence[tuple[Any, int]], batch_size: int, length: int, state: dict[str, Any]
) -> PackedBatch:
    tokens_BL = torch.empty(batch_size, length, dtype=torch.int64)
    tokens_BL[len(sources) :] = 0
    numbers, sizes, ids, padding = [], [], [], batch_size - len(sources)
    for row_L, (lane, place) in zip(tokens_BL.numpy(), sources, strict=False):
        assert isinstance(lane, LaneTokens)
        row_L[:] = lane.tokens_NL[place]
        first, last = int(lane.first_piece[place]), int(lane.first_piece[place + 1])
        pieces, segments = lane.packed.size_P[first:last], lane.packed.segment_P[first:last]
        sizes.append(pieces)
        numbers.append(np.arange(1, last - first + 1, dtype=np.int32))
        if (left := length - int(pieces.sum())) > 0:
            sizes.append(np.array([left]))
            numbers.append(np.zeros(1, dtype=np.int32))
            padding += 1
        ids.append([lane.ids[segment] for segment in segments.tolist()])
    missing = batch_size - len(sources)
    numbers_P = np.concatenate([*numbers, np.zeros(missing, dtype=np.int32)])
    sizes_P = np.concatenate([*sizes, np.full(missing, length)])
    segment_ids = np.repeat(numbers_P, sizes_P)
    positions = np.arange(len(segment_ids), dtype=np.int32)
    positions -= np.repeat((np.cumsum(sizes_P) - sizes_P).astype(np.int32), sizes_P)
    loss_mask = segment_ids > 0
    if padding:
        positions *= loss_mask
    shape = (batch_size, length)
    return PackedBatch(
        tokens=tokens_BL,
        segment_ids=torch.from_numpy(segment_ids).view(shape),
        positions=torch.from_numpy(positions).view(shape),
        loss_mask=torch.from_numpy(loss_mask).view(shape),
        ids=ids + [[] for _ in range(missing)],
        state=state,
    )
