"""Random weights of DAC in the layout of the published ones, and their codes and sound by transformers.

A fresh random codec says little: its features hardly move and its codebooks fit nothing. Here every convolution is
scaled to give outputs of deviation 1 on speech, and each stage of the quantizer is fitted to what those before leave.

Axes: N samples, T frames, D dimensions of a latent, E dimensions of a codebook, S codes of one.
"""

import json
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import soundfile
import torch
import torchaudio
import transformers
from torch import Tensor, nn
from torch.nn import functional

_PUBLISHED = Path(__file__).parent / "published"
_SPEECH = Path(__file__).parents[1] / "jobs" / "samples" / "speech"
_SMALL = {"encoder_hidden_size": 4, "hidden_size": 64, "decoder_hidden_size": 32, "n_codebooks": 6, "codebook_size": 64}
_FRAMES_PER_CODE = 4  # that codebooks are fitted on
_ALIKE = 0.975  # cosine from which two codes count as alike
_STEP = 0.7  # how much of what it sees a stage takes away


def make(name: str, folder: Path, *, small: bool, seed: int = 0, **changes: Any) -> Path:
    """Write weights of `name` to `folder`; `changes` are made to its configuration."""
    published = json.loads((_PUBLISHED / f"{name}.json").read_text())
    fields = {**published["model"], **(_SMALL if small else {}), **changes}
    torch.manual_seed(seed)
    model = transformers.DacModel(transformers.DacConfig.from_dict(fields)).eval().requires_grad_(False)
    num_frames = max(_FRAMES_PER_CODE * fields["codebook_size"], 500)
    waveform_N = speech(num_frames * model.config.hop_length, fields["sampling_rate"], noise_share=0.25)
    with torch.no_grad():
        _spread(model.encoder, waveform_N[-50 * model.config.hop_length :][None, None])
        latents_TD = torch.cat([model.encoder(part)[0].t() for part in waveform_N[None, None].split(32_000, dim=2)])
        _centre(model.encoder.conv2, latents_TD)
        latents_TD = functional.normalize(latents_TD - latents_TD.mean(0), dim=0) * latents_TD.shape[0] ** 0.5
        quantized_TD = fit_stages(model.quantizer.quantizers, latents_TD)
        _spread(model.decoder, quantized_TD[:50].t()[None])
        _scale(model.decoder.conv2, 0.2)
    model.save_pretrained(folder)
    preprocessor = {key: value for key, value in published["preprocessor"].items() if key != "feature_extractor_type"}
    transformers.DacFeatureExtractor(**preprocessor).save_pretrained(folder)
    return folder


def oracle(folder: Path, waveform_N: Tensor) -> Tensor:
    """Codes `[K, T]` of all codebooks by transformers' own feature extractor and model."""
    model, extractor = _loaded(folder)
    taken = extractor(waveform_N.numpy(), sampling_rate=extractor.sampling_rate, return_tensors="pt")
    with torch.inference_mode():
        return model.encode(taken["input_values"]).audio_codes[0]


def oracle_latents(folder: Path, waveform_N: Tensor) -> Tensor:
    """What is quantized, `[T, D]`, by transformers' own feature extractor and model."""
    model, extractor = _loaded(folder)
    taken = extractor(waveform_N.numpy(), sampling_rate=extractor.sampling_rate, return_tensors="pt")
    with torch.inference_mode():
        return model.encoder(taken["input_values"])[0].t()


def oracle_sound(folder: Path, codes_KT: Tensor) -> Tensor:
    """Samples by transformers' own decoder."""
    model, _ = _loaded(folder)
    with torch.inference_mode():
        return model.decode(audio_codes=codes_KT[None]).audio_values[0]


@cache
def speech(num_samples: int, sample_rate: int, *, noise_share: float = 0.0, seed: int = 0) -> Tensor:
    """So much of the shipped speech, its end overlaid with noise that grows loud."""
    parts, length = [], 0
    files = sorted(path for path in _SPEECH.iterdir() if path.suffix in {".flac", ".wav", ".ogg", ".mp3"})
    while length < num_samples:
        samples, rate = soundfile.read(files[len(parts) % len(files)], dtype="float32", always_2d=True)
        mono_N = torch.from_numpy(samples[:, 0].copy())
        parts.append(torchaudio.functional.resample(mono_N, rate, sample_rate))
        length += parts[-1].shape[0]
    waveform_N = torch.cat(parts)[:num_samples].clone()
    num_noisy = int(noise_share * num_samples)
    if num_noisy:
        noise_N = torch.randn(num_noisy, generator=torch.Generator().manual_seed(seed))
        waveform_N[-num_noisy:] += torch.linspace(0.0, 0.3, num_noisy) * noise_N
    return waveform_N


@lru_cache(maxsize=2)  # the largest published models take 4 GB each
def _loaded(folder: Path) -> tuple[Any, Any]:
    model = transformers.DacModel.from_pretrained(folder, dtype=torch.float32).eval()
    return model, transformers.AutoFeatureExtractor.from_pretrained(folder)


def _spread(network: nn.Module, given: Tensor) -> None:
    """Draw each Snake's alpha, and scale each convolution, when it is first used, to outputs of deviation 1."""
    for module in network.modules():
        if hasattr(module, "alpha"):
            nn.init.uniform_(module.alpha, 0.3, 2.0)
    for conv in _convolutions(network):
        nn.init.normal_(conv.weight, std=0.05)
        nn.init.normal_(conv.bias, std=0.02)

    def rescale(conv: Any, _: Any, out: Tensor) -> Tensor:
        factor = 1.0 / float(out.std())
        _scale(conv, factor)
        return out * factor

    hooks = [conv.register_forward_hook(rescale) for conv in _convolutions(network)]
    network(given)
    for hook in hooks:
        hook.remove()


def _convolutions(network: nn.Module) -> list[Any]:
    return [module for module in network.modules() if isinstance(module, nn.Conv1d | nn.ConvTranspose1d)]


def _scale(conv: Any, factor: float) -> None:
    conv.weight.mul_(factor)
    conv.bias.mul_(factor)


def _centre(conv: nn.Conv1d, out_TD: Tensor) -> None:
    """Let each channel of what `conv` gives have mean 0 and deviation 1."""
    assert conv.bias is not None
    deviation_D = (out_TD - out_TD.mean(0)).square().mean(0).sqrt()
    conv.bias.copy_((conv.bias - out_TD.mean(0)) / deviation_D)
    conv.weight.div_(deviation_D[:, None, None])


def fit_stages(stages: Any, latents_TD: Tensor) -> Tensor:
    """Fit random projections and codebooks stage by stage; the quantized latents."""
    residual_TD = latents_TD.clone()
    for stage in stages:
        size, dim = stage.codebook.weight.shape
        into_ED = torch.randn(dim, residual_TD.shape[1]) / residual_TD.norm(dim=1).mean()
        stage.in_proj.weight.copy_(into_ED[..., None])
        stage.in_proj.bias.copy_(-(residual_TD @ into_ED.t()).mean(0))
        projected_TE = functional.linear(residual_TD, into_ED, stage.in_proj.bias)
        codebook_SE = _directions(projected_TE, size)
        stage.codebook.weight.copy_(codebook_SE)
        stage.out_proj.weight.copy_(_STEP * torch.linalg.pinv(into_ED)[..., None])
        nn.init.normal_(stage.out_proj.bias, std=0.01)
        codes_T = _nearest(projected_TE, codebook_SE)
        residual_TD -= stage.out_proj(codebook_SE[codes_T].t()[None])[0].t()
    return latents_TD - residual_TD


def _directions(frames_TE: Tensor, size: int, rounds: int = 3) -> Tensor:
    """Spherical k-means; each code is the mean of the frames that point its way.

    Frames of silence are alike, and so would be their codes, which no training leaves as they are: these are moved.
    """
    codes_SE = frames_TE[torch.randperm(frames_TE.shape[0])[:size]].clone()
    for _ in range(rounds):
        nearest_T = _nearest(frames_TE, codes_SE)
        counts_S = torch.bincount(nearest_T, minlength=size)
        sums_SE = torch.zeros_like(codes_SE).index_add_(0, nearest_T, frames_TE)
        codes_SE[counts_S > 0] = sums_SE[counts_S > 0] / counts_S[counts_S > 0, None]
    unit_SE = functional.normalize(codes_SE)
    alike_S = (unit_SE @ unit_SE.t()).tril(-1).amax(dim=1) > _ALIKE
    moved_SE = codes_SE[alike_S].norm(dim=1, keepdim=True) * torch.randn(int(alike_S.sum()), codes_SE.shape[1])
    codes_SE[alike_S] += 0.2 * moved_SE
    return codes_SE


def _nearest(frames_TE: Tensor, codes_SE: Tensor) -> Tensor:
    return (functional.normalize(frames_TE) @ functional.normalize(codes_SE).t()).argmax(dim=1)
