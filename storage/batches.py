"""What a `TokenDataset` yields: dataclasses of tensors that a DataLoader can pin.

Axes: B segments or sequences, K codebooks, T frames, D numbers of a frame, L steps of a sequence, Q columns (tokens of
a step), M steps of a batch that hold a frame of numbers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from .layouts import stream_of
from .selection import Selection
from .stepping import Source
from .windows import LaneCodes, LaneTokens


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

    Of streams of numbers there are `frames` `[B, T, D]` float16 instead, 0 behind `num_frames`; of streams with
    durations these, too, `[B, T]` int32, 0 behind. Rows that fill up an epoch's last step have the id "" and no frames.
    """

    ids: list[str]
    codes: dict[str, Tensor]
    frames: dict[str, Tensor]
    durations: dict[str, Tensor]
    num_frames: dict[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedBatch(_Batch):
    """B sequences of L steps.

    `tokens` `[B, L]` int64, or `[B, L, Q]` by layouts of several columns, 0 where there is padding; `segment_ids`
    `[B, L]` int32, from 1 in each sequence, 0 where there is padding; `positions` `[B, L]` int32, from 0 at each
    segment's first step in the sequence; `loss_mask` `[B, L]` bool, false where there is padding, or what a layout
    gives to a model without asking it. `frames` has by stream `[M, D]` float16, for the M steps of the batch that hold
    the stream's frame token (`Plan.frame_tokens`), in the order of `tokens`. `ids` names each sequence's segments.
    Sequences that fill up an epoch's last step are all padding.
    """

    tokens: Tensor
    segment_ids: Tensor
    positions: Tensor
    loss_mask: Tensor
    frames: dict[str, Tensor]
    ids: list[list[str]]


def token_batch(sources: Sequence[Source], batch_size: int, selection: Selection, state: dict[str, Any]) -> TokenBatch:
    segments = []
    for lane, place in sources:
        assert isinstance(lane, LaneCodes)
        segments.append(lane.segment(place))
    ids = [segment.id for segment in segments] + [""] * (batch_size - len(segments))
    codes, frames, durations, num_frames = {}, {}, {}, {}
    for name, spec in selection.specs.items():
        parts = [segment.frames[name] if spec.dim else segment.codes[name].t() for segment in segments]
        counts_B = torch.zeros(batch_size, dtype=torch.int64)
        counts_B[: len(parts)] = torch.tensor([len(part) for part in parts], dtype=torch.int64)
        if spec.dim:
            frames[name] = _padded(parts, batch_size, torch.zeros(1, spec.dim, dtype=torch.float16))
        else:
            fill = torch.full((1, selection.num_codebooks[name]), -1)
            codes[name] = _padded(parts, batch_size, fill).transpose(1, 2).contiguous()
        if spec.durations:
            each = [segment.durations[name] for segment in segments]
            durations[name] = _padded(each, batch_size, torch.zeros(1, dtype=torch.int32))
        num_frames[name] = counts_B
    return TokenBatch(ids=ids, codes=codes, frames=frames, durations=durations, num_frames=num_frames, state=state)


def _padded(parts: Sequence[Tensor], batch_size: int, fill_1X: Tensor) -> Tensor:
    """Parts `[T, ...]` as rows `[B, T, ...]` as long as the longest, with `fill_1X` behind them and in further rows."""
    longest = max((len(part) for part in parts), default=0)
    rows = fill_1X.expand(batch_size, longest, *fill_1X.shape[1:]).clone()
    for row, part in zip(rows, parts, strict=False):
        row[: len(part)] = part
    return rows


def packed_batch(
    sources: Sequence[Source], batch_size: int, selection: Selection, state: dict[str, Any]
) -> PackedBatch:
    assert selection.pack is not None
    length, columns = selection.pack.length, selection.columns
    tokens = torch.empty(batch_size, length, *columns, dtype=torch.int64)
    tokens[len(sources) :] = 0
    numbers, sizes, ids, padding = [], [], [], batch_size - len(sources)
    for row, (lane, place) in zip(tokens.numpy(), sources, strict=False):
        assert isinstance(lane, LaneTokens)
        row[:] = lane.tokens[place]
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
    is_token = segment_ids > 0
    if padding:
        positions *= is_token
    shape = (batch_size, length)
    loss_mask = torch.from_numpy(is_token).view(shape)
    for row_L, (lane, place) in zip(loss_mask, sources, strict=False):
        if isinstance(lane, LaneTokens) and lane.loss_NL is not None:
            row_L &= torch.from_numpy(lane.loss_NL[place])
    return PackedBatch(
        tokens=tokens,
        segment_ids=torch.from_numpy(segment_ids).view(shape),
        positions=torch.from_numpy(positions).view(shape),
        loss_mask=loss_mask,
        frames=_frames(sources, selection),
        ids=ids + [[] for _ in range(missing)],
        state=state,
    )


def _frames(sources: Sequence[Source], selection: Selection) -> dict[str, Tensor]:
    streams = selection.plan.frame_tokens if selection.plan else ()
    dims = {stream: selection.specs[stream_of(stream)].dim for stream in streams}
    frames = {stream: [np.empty((0, dim), dtype=np.float16)] for stream, dim in dims.items()}
    for lane, place in sources:
        assert isinstance(lane, LaneTokens)
        for stream, parts in frames.items():
            parts += lane.frames[stream][lane.first_piece[place] : lane.first_piece[place + 1]]
    return {stream: torch.from_numpy(np.concatenate(parts)) for stream, parts in frames.items()}
