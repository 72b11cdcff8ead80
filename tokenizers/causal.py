"""Causal codecs, EnCodec 24 kHz and Mimi: their layers walked chunk by chunk, of several segments at once.

The parameters are those of transformers' modules; the walk is ours, since theirs needs a segment in memory as a whole,
pads a batch on the right before the first layer instead of at each, and counts lengths in float32.

Axes: B segments, C channels, N positions of a layer's input, T frames, D dimensions of a latent, K codebooks,
M positions at right edges.

The right-edge rule: samples after the last whole hop are a frame of their own. Not the waveform is padded for it: every
strided layer pads its own input up to a whole stride, in its own pad mode. So a chunk is a whole number of hops, of
which each segment fills so many positions (`valid`); what lies after them is anything, and each strided layer writes
its padding over it.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from .codec import Chunks, codes_of_chunks, gaps_of_chunks
from .spec import StreamSpec

_MIN_CHUNK_FRAMES = 8  # what the first chunk reflects to its left (6 frames of EnCodec) must lie in it


class LatentModel(Protocol):
    """Waveform to latents, and latents to sound."""

    def latents(self, walk: "Walk", waveforms_B1N: Tensor, valid: list[int]) -> tuple[Tensor, list[int]]:
        """Latents `[B, D, T]` of a chunk and how many frames of each segment hold."""
        ...

    def sound(self, walk: "Walk", latents_BDT: Tensor) -> Tensor:
        """Samples `[B, 1, N]` of a chunk of latents."""
        ...


class CausalModel(LatentModel, Protocol):
    """The four quarters of a codec: waveform to latents to codes, and back."""

    def quantize(self, frames_TD: Tensor) -> Tensor:
        """Codes `[K, T]` of float32 latents."""
        ...

    def gaps(self, frames_TD: Tensor) -> Tensor:
        """How sure each of these codes is: see `ResidualQuantizer.gaps`."""
        ...

    def dequantize(self, codes_KT: Tensor) -> Tensor:
        """Latents `[T, D]` of the first K codebooks' codes."""
        ...


class CausalLatents:
    """A `LatentCodec` of a causal model, in chunks of `chunk_frames` with all state carried over.

    Each waveform is multiplied by its `gain`, if there is one.
    """

    def __init__(
        self,
        model: LatentModel,
        spec: StreamSpec,
        *,
        chunk_frames: int,
        device: str = "cpu",
        gain: Callable[[Tensor], float] | None = None,
    ) -> None:
        if chunk_frames < _MIN_CHUNK_FRAMES:
            raise ValueError(f"chunks of {chunk_frames} frames; they must have {_MIN_CHUNK_FRAMES} or more")
        self.spec = spec
        self.longest = None
        self._chunk_frames = chunk_frames
        self._device = device
        self._gain = gain
        self._latents = model.latents
        self._synthesize = model.sound

    def latents(self, waveforms: Sequence[Tensor], padded_length: int) -> Chunks:
        hop = self.spec.hop_length
        walk = Walk()
        gains = None if self._gain is None else torch.tensor([self._gain(waveform_N) for waveform_N in waveforms])
        for begin in range(0, padded_length, self._chunk_frames * hop):
            width = min(self._chunk_frames, -(-(padded_length - begin) // hop)) * hop
            valid = [min(max(waveform_N.shape[0] - begin, 0), width) for waveform_N in waveforms]
            if not any(valid):
                return
            # a copy of its own, too: convolutions' results may depend on the alignment of what they are given
            chunk_B1N = torch.zeros(len(waveforms), 1, width)
            for row_N, waveform_N, num_samples in zip(chunk_B1N[:, 0], waveforms, valid, strict=True):
                row_N[:num_samples] = waveform_N[begin : begin + num_samples]
            if gains is not None:
                chunk_B1N *= gains[:, None, None]
            latents_BDT, frames = self._latents(walk, chunk_B1N.to(self._device), valid)
            yield latents_BDT.transpose(1, 2).float().contiguous(), frames

    def synthesize(self, latents_TD: Tensor) -> Tensor:
        return self._sound(latents_TD.to(self._device).split(self._chunk_frames) if len(latents_TD) else ())

    @torch.inference_mode()
    def _sound(self, chunks: Iterable[Tensor]) -> Tensor:
        walk = Walk()
        sound = [torch.empty(0)]
        sound += [self._synthesize(walk, latents_TD.t()[None])[0, 0].cpu() for latents_TD in chunks]
        return torch.cat(sound)


class CausalCodec(CausalLatents):
    """A `Tokenizer` and `BatchTokenizer` of a causal model."""

    def __init__(
        self,
        model: CausalModel,
        spec: StreamSpec,
        fingerprint: dict[str, str],
        *,
        chunk_frames: int,
        device: str = "cpu",
    ) -> None:
        super().__init__(model, spec, chunk_frames=chunk_frames, device=device)
        self.fingerprint = fingerprint
        self._model = model

    def encode(self, waveform_N: Tensor) -> Tensor:
        return self.encode_batch([waveform_N], waveform_N.shape[0])[0]

    @torch.inference_mode()
    def encode_batch(self, waveforms: Sequence[Tensor], padded_length: int) -> list[Tensor]:
        latents = self.latents(waveforms, padded_length)
        num_frames = [-(-waveform_N.shape[0] // self.spec.hop_length) for waveform_N in waveforms]
        return codes_of_chunks(latents, self._model.quantize, num_frames, self.spec.num_codebooks)

    @torch.inference_mode()
    def gaps(self, waveform_N: Tensor) -> Tensor:
        latents = self.latents([waveform_N], waveform_N.shape[0])
        return gaps_of_chunks(latents, self._model.gaps, self.spec.num_codebooks)

    def decode(self, codes_KT: Tensor) -> Tensor:
        chunks = codes_KT.split(self._chunk_frames, dim=1) if codes_KT.shape[1] else ()
        return self._sound(self._model.dequantize(chunk_KT.to(self._device)) for chunk_KT in chunks)


class Walk:
    """One way through a stack of causal layers, chunk after chunk: `kept` has what each needs of the chunks before."""

    def __init__(self) -> None:
        self.kept: dict[nn.Module, Any] = {}

    def through(self, layers: Iterable[nn.Module], x_BCN: Tensor, valid: list[int]) -> tuple[Tensor, list[int]]:
        """What `layers` give for the next chunk, and how many positions of it hold for each segment.

        Layers are those of transformers' EncodecEncoder, EncodecDecoder, MimiEncoder and MimiDecoder, without weight
        normalization. Except in the last chunk of a segment, all of the chunk is valid.
        """
        for index, layer in enumerate(layers):
            if isinstance(layer, nn.ELU):  # in place, where no shortcut goes past it
                x_BCN = functional.elu(x_BCN, alpha=layer.alpha, inplace=index > 0)
            elif hasattr(layer, "block"):
                x_BCN = self._residual(layer, x_BCN, valid)
            elif hasattr(layer, "lstm"):
                x_BCN = self._lstm(layer, x_BCN)
            elif isinstance(layer.conv, nn.ConvTranspose1d):
                x_BCN = self.upsample(layer.conv, x_BCN)
                valid = [num * layer.conv.stride[0] for num in valid]
            else:
                x_BCN, valid = self.convolve(layer, x_BCN, valid)
        return x_BCN, valid

    def convolve(self, layer: Any, x_BCN: Tensor, valid: list[int]) -> tuple[Tensor, list[int]]:
        """A causal convolution: it looks back at `padding` positions, those of the chunk before or, first, at padding.

        Padding as in transformers' EncodecConv1d and MimiConv1d (`_pad1d`).
        """
        conv: nn.Conv1d = layer.conv
        stride = conv.stride[0]
        padding = (conv.kernel_size[0] - 1) * conv.dilation[0] + 1 - stride
        if padding == 0 and stride == 1:
            return conv(x_BCN), valid
        first = layer not in self.kept
        left_BCN = _left(x_BCN, padding, layer.pad_mode, valid) if first else self.kept[layer]
        padded_BCN = torch.cat([left_BCN, x_BCN], dim=2)
        self.kept[layer] = padded_BCN[..., padded_BCN.shape[2] - padding :].clone()
        _mend_right_edges(padded_BCN, padding, stride, layer.pad_mode, valid, first=first)
        return conv(padded_BCN), [-(-num // stride) for num in valid]

    def _residual(self, layer: Any, x_BCN: Tensor, valid: list[int]) -> Tensor:
        inner_BCN, _ = self.through(layer.block, x_BCN, valid)
        if not isinstance(layer.shortcut, nn.Identity):
            x_BCN, _ = self.convolve(layer.shortcut, x_BCN, valid)
        return inner_BCN.add_(x_BCN)

    def _lstm(self, layer: Any, x_BCN: Tensor) -> Tensor:
        """In float32 in every mode: its state runs through the whole segment."""
        x_NBC = x_BCN.permute(2, 0, 1).float()
        out_NBC, self.kept[layer] = layer.lstm(x_NBC, self.kept.get(layer))
        return (out_NBC + x_NBC).permute(1, 2, 0).to(x_BCN.dtype)

    def upsample(self, conv: nn.ConvTranspose1d, x_BCN: Tensor) -> Tensor:
        """Each position gives `stride` samples and spills into those of the next ones, so these last few are kept.

        What the end spills is cut off (trim_right_ratio 1).
        """
        stride = conv.stride[0]
        spill = -(-conv.kernel_size[0] // stride) - 1
        before_BCN = self.kept.get(conv, x_BCN[..., :0])
        joined_BCN = torch.cat([before_BCN, x_BCN], dim=2)
        self.kept[conv] = joined_BCN[..., max(0, joined_BCN.shape[2] - spill) :].clone()
        begin = before_BCN.shape[2] * stride
        return conv(joined_BCN)[..., begin : begin + x_BCN.shape[2] * stride]


def _left(x_BCN: Tensor, padding: int, mode: str, valid: list[int]) -> Tensor:
    """What stands before the first sample, `[B, C, padding]`; reflection of a shorter segment sees zeros after it."""
    if mode == "constant":
        return x_BCN.new_zeros(*x_BCN.shape[:2], padding)
    if mode == "replicate":
        return x_BCN[..., :1].expand(-1, -1, padding)
    head_BCN = x_BCN[..., 1 : padding + 1]
    head_BCN = functional.pad(head_BCN, (0, padding - head_BCN.shape[2]))
    if min(valid) <= padding:
        beyond_BN = torch.tensor([[position >= num for position in range(1, padding + 1)] for num in valid])
        head_BCN = head_BCN.masked_fill(beyond_BN[:, None].to(x_BCN.device), 0.0)
    return head_BCN.flip(2)


def _mend_right_edges(
    padded_BCN: Tensor, padding: int, stride: int, mode: str, valid: list[int], *, first: bool
) -> None:
    """Write what a segment is padded with after its `valid` positions, up to the next whole stride.

    A segment no longer than its padding is lengthened with zeros to one position more before it is reflected, and cut
    after (`_pad1d`). Reflection looks back at fewer than `stride` positions, which are at hand: kernels are 2 strides.
    """
    rows, targets, sources, holds = [], [], [], []
    for row, num in enumerate(valid):
        extra = -num % stride
        mirror = (max(num, padding + 1, extra + 1) if first else num) - 1
        for position in range(num, num + extra):
            source = position if position <= mirror else 2 * mirror - position
            source = num - 1 if mode == "replicate" else source
            rows.append(row)
            targets.append(padding + position)
            sources.append(padding + source)
            holds.append(source < num and mode != "constant")
    if not rows:
        return
    rows_M, targets_M, sources_M, holds_M = torch.tensor([rows, targets, sources, holds], device=padded_BCN.device)
    edge_MC = padded_BCN[rows_M, :, sources_M].masked_fill(holds_M[:, None] == 0, 0.0)
    padded_BCN[rows_M, :, targets_M] = edge_MC
