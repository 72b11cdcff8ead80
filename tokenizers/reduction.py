"""Fewer frames of features for the models that take them as they are: stacked, strided, averaged, merged.

Axes: T frames, D dimensions, k frames that become one, R runs of frames.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

import torch
from torch import Tensor

from .spec import FrameRule, StreamSpec, UserError

_EXPECTED = "expected stack:K, stride:K or mean:K with K from 2 to 64, or ctc:WEIGHTS"


class Way(StrEnum):
    """How frames become one: side by side (Speech-LLaMA, Ultravox), the first of them, their mean, by CTC's runs."""

    STACK = "stack"
    STRIDE = "stride"
    MEAN = "mean"
    CTC = "ctc"


@dataclass(frozen=True, slots=True)
class Reduction:
    """`stack:4` and the like."""

    way: Way
    by: int = 1  # k
    weights: str = ""  # of the CTC model


def parse_reduction(text: str) -> Reduction:
    """A reduction from `stack:4`, `stride:2`, `mean:8` or `ctc:FOLDER`. Raises `UserError`."""
    name, colon, value = text.partition(":")
    if name in ("stack", "stride", "mean") and value.isascii() and value.isdecimal() and 2 <= int(value) <= 64:
        return Reduction(Way(name), by=int(value))
    if name == "ctc" and colon and value:
        return Reduction(Way.CTC, weights=value)
    raise UserError(f"reduce is {text!r}; {_EXPECTED}.")


def reduced_spec(spec: StreamSpec, by: int) -> StreamSpec:
    """The clock of every `by` frames as one: of `floor` whole groups only, of `ceil` the last one may be short.

    ((n - w) // h + 1) // k = (n - (w + (k - 1) h)) // (k h) + 1, and ceil(ceil(n / h) / k) = ceil(n / (k h)).
    """
    window = spec.window_length + (by - 1) * spec.hop_length if spec.frame_rule is FrameRule.FLOOR else 1
    return replace(spec, hop_length=by * spec.hop_length, window_length=window)


def reduce_frames(frames_TD: Tensor, reduction: Reduction, rule: FrameRule) -> Tensor:
    """Groups of `k` frames as one `[T / k, D or k * D]`: what `reduced_spec` says becomes of a short last group.

    A short group is stacked with zeros after it, and averaged over the frames that it has.
    """
    by, (num, dim) = reduction.by, frames_TD.shape
    groups = num // by if rule is FrameRule.FLOOR else -(-num // by)
    frames_TD = frames_TD[: groups * by]
    if reduction.way is Way.STRIDE:
        return frames_TD[::by]
    short = groups * by - frames_TD.shape[0]
    grouped_TKD = torch.nn.functional.pad(frames_TD, (0, 0, 0, short)).reshape(groups, by, dim)
    if reduction.way is Way.STACK:
        return grouped_TKD.reshape(groups, by * dim)
    sizes_T = torch.full((groups, 1), float(by), device=frames_TD.device)
    if short:
        sizes_T[-1] = by - short
    return grouped_TKD.sum(dim=1) / sizes_T


def reduce_pieces(pieces: Iterable[Tensor], reduction: Reduction, rule: FrameRule) -> Iterator[Tensor]:
    """`reduce_frames` of all pieces end to end, a piece at a time: what is left of a group waits for the next."""
    left_TD: Tensor | None = None
    for piece_TD in pieces:
        frames_TD = piece_TD if left_TD is None else torch.cat([left_TD, piece_TD])
        whole = frames_TD.shape[0] // reduction.by * reduction.by
        yield reduce_frames(frames_TD[:whole], reduction, rule)
        left_TD = frames_TD[whole:]
    if left_TD is not None:
        yield reduce_frames(left_TD, reduction, rule)


def merge_runs(pieces: Iterable[Tensor], labels_T: Tensor, blanks: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
    """The mean of each run of equal labels `[R, D]`, and the frames in it `[R]` int32; runs of blanks are dropped.

    `labels_T` are those of the frames of all pieces end to end. CTC-guided merging of a CTC model's argmax (Gaido et
    al. 2021, "CTC-based Compression for Direct Speech Translation"). Means are taken in float64.
    """
    blanks_B = torch.tensor(blanks)
    done = 0
    open_run: tuple[Tensor, Tensor, Tensor] | None = None  # the last piece's last: it may go on
    for piece_TD in pieces:
        if piece_TD.shape[0] == 0:
            continue
        labels_R, sizes_R = torch.unique_consecutive(labels_T[done : done + piece_TD.shape[0]], return_counts=True)
        done += piece_TD.shape[0]
        runs_T = torch.arange(len(sizes_R)).repeat_interleave(sizes_R)
        sums_RD = torch.zeros(len(sizes_R), piece_TD.shape[1], dtype=torch.float64)
        sums_RD.index_add_(0, runs_T, piece_TD.double().cpu())
        if open_run is not None and open_run[0] == labels_R[0]:
            sums_RD[0] += open_run[1]
            sizes_R[0] += open_run[2]
        elif open_run is not None:
            yield _means(open_run[0][None], open_run[1][None], open_run[2][None], blanks_B)
        yield _means(labels_R[:-1], sums_RD[:-1], sizes_R[:-1], blanks_B)
        open_run = labels_R[-1], sums_RD[-1], sizes_R[-1]
    assert done == labels_T.shape[0], "labels and frames are on one clock"
    if open_run is not None:
        yield _means(open_run[0][None], open_run[1][None], open_run[2][None], blanks_B)


def _means(labels_R: Tensor, sums_RD: Tensor, sizes_R: Tensor, blanks_B: Tensor) -> tuple[Tensor, Tensor]:
    kept_R = ~torch.isin(labels_R, blanks_B)
    return (sums_RD[kept_R] / sizes_R[kept_R, None]).float(), sizes_R[kept_R].to(torch.int32)
