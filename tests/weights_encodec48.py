"""Random weights of EnCodec 48 kHz in the layout of the published ones, and what transformers gives with them.

A fresh random codec says little: its norms do nothing and its codebooks are zeros. Here norms are drawn, and each
codebook is made of what the ones before leave of the features of speech.

Axes: C channels, N samples, T frames, D dimensions of a latent, K codebooks, S chunks of a segment.
"""

import json
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import weights_causal
import weights_dac
from torch import Tensor, nn

NAME = "encodec-48khz"
RATE = 48_000
_PUBLISHED = Path(__file__).parent / "published" / f"{NAME}.json"
_SMALL = {
    "num_filters": 4,
    "hidden_size": 16,
    "codebook_dim": 16,
    "codebook_size": 64,
    "target_bandwidths": [1.8, 5.4],  # 2 and 6 codebooks
}


def make(name: str, folder: Path, *, small: bool, seed: int = 0, **changes: Any) -> Path:
    """Write weights to `folder`; `changes` are made to the configuration."""
    assert name == NAME
    published = json.loads(_PUBLISHED.read_text())
    fields = {**published["model"], **(_SMALL if small else {}), **changes}
    torch.manual_seed(seed)
    model = transformers.EncodecModel(transformers.EncodecConfig.from_dict(fields)).eval().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, nn.GroupNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
    parts = stereo(RATE * (4 if small else 10), noise_share=0.25).split(RATE, dim=1)
    with torch.no_grad():
        latents = [model.encoder(part_CN[None] / part_CN.square().mean().sqrt()) for part_CN in parts]
        frames_TD = torch.cat([latents_1DT[0].t() for latents_1DT in latents])
        model.encoder.layers[-1].norm.bias -= frames_TD.mean(dim=0)
        frames_TD -= frames_TD.mean(dim=0)
        weights_causal._fit_stages(model.quantizer.layers, frames_TD, torch.Generator().manual_seed(1))
    model.save_pretrained(folder)
    # save_pretrained would write the fields of today's class, not those of the published file
    (folder / "config.json").write_text(json.dumps({**fields, "architectures": ["EncodecModel"]}))
    extractor = {key: value for key, value in published["preprocessor"].items() if key != "feature_extractor_type"}
    transformers.EncodecFeatureExtractor(**extractor).save_pretrained(folder)
    return folder


def small(factory: pytest.TempPathFactory, **changes: Any) -> Path:
    """Small weights, made once in a run of tests."""
    folder = factory.getbasetemp() / "-".join(["small", NAME, *(f"{key}={changes[key]}" for key in changes)])
    return folder if folder.exists() else make(NAME, folder, small=True, **changes)


@cache
def stereo(num_samples: int, *, noise_share: float = 0.0) -> Tensor:
    """`[2, N]`: the shipped speech on the left, other speech and some of the left on the right."""
    left_N = weights_dac.speech(num_samples, RATE, noise_share=noise_share)
    right_N = weights_dac.speech(2 * num_samples, RATE)[num_samples:]
    return torch.stack([left_N, 0.3 * left_N + 0.7 * right_N])


def oracle(folder: Path, waveform: Tensor) -> Tensor:
    """Codes `[K, T]` of all codebooks, of `[2, N]` or of `[N]` on both channels."""
    return oracle_chunks(folder, waveform)[0]


def oracle_chunks(folder: Path, waveform: Tensor) -> tuple[Tensor, Tensor]:
    """Codes `[K, T]` and scales `[S]` by transformers' own model, of the samples as they are.

    Its feature extractor is left out: it would fill the last chunk up with zeros, as the authors' package does not.
    """
    model = _loaded(folder)
    with torch.inference_mode():
        given_1CN = waveform.expand(2, -1)[None].contiguous()
        found = model.encode(given_1CN, bandwidth=model.config.target_bandwidths[-1])
    joined_KT = torch.cat(list(found.audio_codes[:, 0]), dim=1)
    return joined_KT[:, : joined_KT.shape[1] - found.last_frame_pad_length], torch.cat(found.audio_scales)[:, 0]


def oracle_latents(folder: Path, waveform: Tensor) -> Tensor:
    """What is quantized, `[T, D]`, chunk after chunk, by transformers' own model: see `oracle_chunks`."""
    seen: list[Tensor] = []
    handle = _loaded(folder).encoder.register_forward_hook(lambda _, __, given_BDT: seen.append(given_BDT[0].t()))
    num_frames = oracle_chunks(folder, waveform)[0].shape[1]
    handle.remove()
    return torch.cat(seen)[:num_frames]


def oracle_sound(folder: Path, waveform: Tensor, num_codebooks: int) -> Tensor:
    """Sound `[2, N]` of a waveform's first codebooks, through transformers' own encoder and decoder."""
    model = _loaded(folder)
    with torch.inference_mode():
        found = model.encode(waveform[None], bandwidth=model.config.target_bandwidths[-1])
        codes = found.audio_codes[:, :, :num_codebooks]
        return model.decode(codes, found.audio_scales, last_frame_pad_length=found.last_frame_pad_length).audio_values[
            0
        ]


@lru_cache(maxsize=2)
def _loaded(folder: Path) -> Any:
    return transformers.EncodecModel.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
