"""What all neural codecs share: finding their weights, counting codebooks, chunks of latents into codes.

Axes: B segments, T frames, D dimensions of a latent, K codebooks of a stream.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .hub import Weights, find_weights, fingerprint_of
from .spec import StreamSpec, UserError
from .tokenizer import TokenizerConfig

# for each chunk, its latents [B, T, D] float32 and how many frames of each segment hold
Chunks = Iterator[tuple[Tensor, list[int]]]


def codes_of_chunks(
    chunks: Chunks, quantize: Callable[[Tensor], Tensor], num_frames: Sequence[int], num_codebooks: int
) -> list[Tensor]:
    """Codes `[K, T]` int64 of each segment, of `num_frames` frames, on the CPU.

    All frames of a chunk are quantized, the padding's too: the shape of a product may decide its last bits. Codes are
    written to their place: small tensors kept from chunk to chunk would hold the memory between them.
    """
    codes = [torch.empty(num_codebooks, num, dtype=torch.int64) for num in num_frames]
    done = [0] * len(codes)
    for latents_BTD, frames in chunks:
        codes_KBT = quantize(latents_BTD.flatten(0, 1)).unflatten(1, latents_BTD.shape[:2]).cpu()
        for row, num in enumerate(frames):
            codes[row][:, done[row] : done[row] + num] = codes_KBT[:, row, :num]
            done[row] += num
    assert done == list(num_frames)
    return codes


def up_to(
    longest: int | None,
    run: Callable[[Sequence[Tensor], int], list[Tensor]],
    waveforms: Sequence[Tensor],
    padded_length: int,
) -> list[Tensor]:
    """What `run` gives for several waveforms: those of more than `longest` samples by themselves.

    They leave an empty row with the others, so that the shape of a batch, which may decide last bits, stays.
    """
    if longest is None:
        return run(waveforms, padded_length)
    fit = [waveform_N.shape[0] <= longest for waveform_N in waveforms]
    rows = [waveform_N if fits else waveform_N[:0] for waveform_N, fits in zip(waveforms, fit, strict=True)]
    done = run(rows, min(padded_length, longest)) if any(fit) else rows
    return [
        each if fits else run([waveform_N], waveform_N.shape[0])[0]
        for each, waveform_N, fits in zip(done, waveforms, fit, strict=True)
    ]


def gaps_of_chunks(chunks: Chunks, gaps: Callable[[Tensor], Tensor], num_codebooks: int) -> Tensor:
    """Gaps `[K, T]` float64 of the one segment that the chunks are of, on the CPU."""
    parts = [torch.empty(num_codebooks, 0, dtype=torch.float64)]
    parts += [gaps(latents_BTD[0, :num]).cpu() for latents_BTD, (num,) in chunks]
    return torch.cat(parts, dim=1)


def spans_of_chunks(num_frames: int, chunk_frames: int, reach: tuple[int, int]) -> Iterator[tuple[int, int, int, int]]:
    """Begin and end of each chunk, and the first and the last frame (exclusive) that it has to see, in order."""
    for begin in range(0, num_frames, chunk_frames):
        end = min(begin + chunk_frames, num_frames)
        yield begin, end, max(0, begin - reach[0]), min(num_frames, end + reach[1])


def padded_span(waveform_N: Tensor, begin: int, end: int) -> Tensor:
    """Samples `begin` to `end` in memory of their own; zeros where the waveform has none."""
    span_N = torch.zeros(end - begin)
    inside_N = waveform_N[max(begin, 0) : max(end, 0)]
    span_N[max(-begin, 0) : max(-begin, 0) + inside_N.shape[0]] = inside_N
    return span_N


def find_codec(config: TokenizerConfig, *, default: str, architecture: str) -> Weights:
    """The weights that `config` names, or the published ones. Raises `UserError`: see `find_weights`."""
    return find_weights(
        config.weights or default,
        tokenizer=config.tokenizer,
        architecture=architecture,
        revision=config.revision,
        local_files_only=config.local_files_only,
    )


def codec_fingerprint(config: TokenizerConfig, codec: str, weights: Weights, num_codebooks: int) -> dict[str, str]:
    """What decides a codec's codes; `codec` is its name and a number that is raised with every change of a code."""
    return {
        "tokenizer": config.tokenizer,
        "codec": codec,
        **fingerprint_of(weights),
        "codebooks": str(num_codebooks),
        "precision": config.mode.precision,
    }


def require_published(weights: Weights, name: str, published: dict[str, Any]) -> None:
    """Raise `UserError` for weights whose configuration differs in one of the `published` values, naming them all."""
    differing = [
        f"{key} {weights.config.get(key)}, not {value}"
        for key, value in published.items()
        if weights.config.get(key) != value
    ]
    rate = published["sampling_rate"]
    if weights.preprocessor.get("sampling_rate", rate) != rate:
        differing.append(f"a feature extractor for {weights.preprocessor['sampling_rate']} Hz, not {rate}")
    if differing:
        raise UserError(
            f"{weights.name} holds another codec than {name}: {'; '.join(differing)}. Name other weights, or the "
            "tokenizer that takes these."
        )


def num_quantizers(weights: Weights, spec: StreamSpec) -> int:
    """How many codebooks the last of the bandwidths pays for at the spec's rate, as `num_quantizers` of transformers.

    Raises `UserError` if it pays for none.
    """
    bandwidths, size = weights.config["target_bandwidths"], weights.config["codebook_size"]
    there = 0
    if bandwidths and math.isfinite(bandwidths[-1]) and size > 1:
        there = int(1000 * bandwidths[-1] // (math.ceil(spec.frame_rate) * math.ceil(math.log2(size))))
    if there < 1:
        raise UserError(
            f"{weights.name} has no codebooks: its config.json says codebook_size {size} and target_bandwidths "
            f"{list(bandwidths)} (kbit/s), which pay for none. Fetch it again, or name other weights."
        )
    return there


def num_codebooks_of(config: TokenizerConfig, there: int, default: int) -> int:
    """How many codebooks a stream has. Raises `UserError` for more than there are, or none."""
    asked = min(default, there) if config.num_codebooks is None else config.num_codebooks
    if not 1 <= asked <= there:
        raise UserError(f"{config.tokenizer} has 1 to {there} codebooks; {asked} were asked for.")
    return asked


def product(ratios: Iterable[int]) -> int:
    return math.prod(int(ratio) for ratio in ratios)
