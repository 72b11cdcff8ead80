"""Random weights of EnCodec 24 kHz and Mimi in the layout of the published ones, and their codes by transformers.

A fresh random codec says little: its features hardly move and its codebooks are zeros. Here every convolution is scaled
to give features of deviation 1 on speech, and each codebook is drawn from what the ones before leave of those features.
"""

import json
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
import torchaudio
import transformers
from torch import Tensor, nn

_PUBLISHED = Path(__file__).parent / "published"
_SPEECH = Path(__file__).parents[1] / "jobs" / "samples" / "speech"
_MODELS = {"encodec-24khz": "EncodecModel", "mimi": "MimiModel"}
_SMALL = {
    "encodec-24khz": {
        "num_filters": 4,
        "hidden_size": 16,
        "codebook_dim": 16,
        "codebook_size": 64,
        "target_bandwidths": [0.9, 5.4],  # 2 and 12 codebooks
    },
    "mimi": {
        "num_filters": 4,
        "hidden_size": 32,
        "codebook_dim": 12,
        "vector_quantization_hidden_dimension": 12,
        "codebook_size": 32,
        "num_quantizers": 10,
        "upsample_groups": 32,
        "num_hidden_layers": 2,
        "intermediate_size": 48,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
    },
}


def make(name: str, folder: Path, *, small: bool, seed: int = 0, **changes: Any) -> Path:
    """Write weights of `name` to `folder`; `changes` are made to its configuration."""
    published = json.loads((_PUBLISHED / f"{name}.json").read_text())
    fields = {**published["model"], **(_SMALL[name] if small else {}), **changes}
    torch.manual_seed(seed)
    kind = getattr(transformers, _MODELS[name])
    model = kind(kind.config_class.from_dict(fields)).eval().requires_grad_(False)
    speech_N = speech(20 if small else 60, noise_share=0.25)
    frames_TD = _spread_encoder(name, model, speech_N)
    latents_DT = _fit_codebooks(name, model, frames_TD)
    _spread_decoder(name, model, latents_DT[:, :50])
    model.save_pretrained(folder)
    # save_pretrained would write the fields of today's class, not those of the published file
    (folder / "config.json").write_text(json.dumps({**fields, "architectures": [_MODELS[name]]}))
    transformers.EncodecFeatureExtractor(**_without_type(published["preprocessor"])).save_pretrained(folder)
    return folder


def small(factory: pytest.TempPathFactory, name: str, **changes: Any) -> Path:
    """Small weights, made once in a run of tests."""
    folder = factory.getbasetemp() / "-".join(["small", name, *(f"{key}={changes[key]}" for key in changes)])
    return folder if folder.exists() else make(name, folder, small=True, **changes)


def oracle(folder: Path, waveform_N: Tensor) -> Tensor:
    """Codes `[K, T]` of all codebooks by transformers' own feature extractor and model."""
    model, extractor = _loaded(folder)
    taken = extractor(waveform_N.numpy(), sampling_rate=24_000, return_tensors="pt")
    with torch.inference_mode():
        if model.config.model_type == "mimi":
            return model.encode(taken["input_values"], taken["padding_mask"]).audio_codes[0]
        bandwidth = model.config.target_bandwidths[-1]
        return model.encode(taken["input_values"], taken["padding_mask"], bandwidth).audio_codes[0, 0]


def oracle_latents(folder: Path, waveform_N: Tensor) -> Tensor:
    """What is quantized, `[T, D]`, by transformers' own feature extractor and model."""
    model, extractor = _loaded(folder)
    taken = extractor(waveform_N.numpy(), sampling_rate=24_000, return_tensors="pt")
    with torch.inference_mode():
        out = model.encoder(taken["input_values"])
    return (out.latents if model.config.model_type == "mimi" else out)[0].t()


def oracle_sound(folder: Path, codes_KT: Tensor) -> Tensor:
    """Samples by transformers' own decoder."""
    model, _ = _loaded(folder)
    with torch.inference_mode():
        if model.config.model_type == "mimi":
            return model.decode(codes_KT[None]).audio_values[0, 0]
        return model.decode(codes_KT[None, None], [None]).audio_values[0, 0]


def num_differing(folder: Path, waveform_N: Tensor, ours_KT: Tensor, theirs_KT: Tensor) -> int:
    """How many frames differ. Each must begin to at a near-tie.

    That is squared float64 distances less than 1e-5 apart, or by no more than what transformers' EnCodec rounds off
    where it takes them as differences of larger numbers, |x|^2 - 2 x.c + |c|^2 in float32.
    """
    assert ours_KT.shape == theirs_KT.shape
    frames_M = (ours_KT != theirs_KT).any(dim=0).nonzero()[:, 0].tolist()
    latents_TD = _latents(folder, waveform_N) if frames_M else torch.empty(0)
    for frame in frames_M:
        stage = int((ours_KT[:, frame] != theirs_KT[:, frame]).nonzero()[0, 0])
        residual_D, centroids_CD = latents_TD[frame], torch.empty(0)
        for before in range(stage + 1):
            projection, centroids_CD = _stage(folder, before)
            if before in (0, 1) and projection is not None:  # a split of Mimi's begins
                residual_D = latents_TD[frame] @ projection.T
            if before < stage:
                residual_D = residual_D - centroids_CD[ours_KT[before, frame]]
        pair = centroids_CD[[int(ours_KT[stage, frame]), int(theirs_KT[stage, frame])]]
        near, far = sorted((residual_D - pair).square().sum(dim=1).tolist())
        rounding = 4 * torch.finfo(torch.float32).eps * float(residual_D.square().sum() + pair[0].square().sum())
        assert far - near <= max(1e-5 * far, rounding), f"frame {frame}, stage {stage}: {near} and {far} are no tie"
    return len(frames_M)


def _latents(folder: Path, waveform_N: Tensor) -> Tensor:
    model, _ = _loaded(folder)
    with torch.inference_mode():
        out = model.encoder(waveform_N[None, None])
    return (out.latents if model.config.model_type == "mimi" else out)[0].t().double()


def _stage(folder: Path, number: int) -> tuple[Tensor | None, Tensor]:
    """The projection before a stage, if any, and its centroids."""
    quantizer = _loaded(folder)[0].quantizer
    if not hasattr(quantizer, "semantic_residual_vector_quantizer"):
        return None, quantizer.layers[number].codebook.embed.double()
    split = (
        quantizer.semantic_residual_vector_quantizer if number == 0 else quantizer.acoustic_residual_vector_quantizer
    )
    centroids_CD = split.layers[max(0, number - 1)].codebook.embed.double()
    return split.input_proj.weight[..., 0].double(), centroids_CD


@cache
def speech(seconds: int, *, noise_share: float = 0.0, seed: int = 0) -> Tensor:
    """So much of the shipped speech at 24 kHz, its end overlaid with loud noise."""
    parts, length = [], 0
    files = sorted(path for path in _SPEECH.iterdir() if path.suffix in {".flac", ".wav", ".ogg", ".mp3"})
    while length < seconds * 24_000:
        for path in files:
            samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
            parts.append(torchaudio.functional.resample(torch.from_numpy(samples[:, 0].copy()), rate, 24_000))
            length += parts[-1].shape[0]
            if length >= seconds * 24_000:
                break
    waveform_N = torch.cat(parts)[: seconds * 24_000].clone()
    num_noisy = int(noise_share * waveform_N.shape[0])
    if num_noisy:
        generator = torch.Generator().manual_seed(seed)
        envelope = torch.linspace(0.0, 0.3, num_noisy)
        waveform_N[-num_noisy:] += envelope * torch.randn(num_noisy, generator=generator)
    return waveform_N


@lru_cache(maxsize=2)  # the largest published models take 4 GB each
def _loaded(folder: Path) -> tuple[Any, Any]:
    config = transformers.AutoConfig.from_pretrained(folder)
    kind = transformers.MimiModel if config.model_type == "mimi" else transformers.EncodecModel
    model = kind.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
    return model, transformers.AutoFeatureExtractor.from_pretrained(folder)


def _without_type(preprocessor: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in preprocessor.items() if key != "feature_extractor_type"}


@torch.no_grad()
def _spread_encoder(name: str, model: Any, speech_N: Tensor) -> Tensor:
    """Scale the encoder's layers; features `[T, D]` of the speech."""
    _spread_transformers(model)
    some, whole = speech_N[None, None, -10 * 24_000 :], speech_N[None, None]
    with _scaled(model.encoder):
        model.encoder(some)
    parts = []
    for part in whole.split(20 * 24_000, dim=2):
        out = model.encoder(part)
        parts.append((out.latents if name == "mimi" else out)[0].t())
    frames_TD = torch.cat(parts)
    if name != "mimi":  # whose last layer has no bias
        mean_D = frames_TD.mean(dim=0)
        model.encoder.layers[-1].conv.bias -= mean_D
        frames_TD -= mean_D
    return frames_TD


@torch.no_grad()
def _spread_decoder(name: str, model: Any, latents_DT: Tensor) -> None:
    with _scaled(model.decoder):
        out = model.decoder(latents_DT[None])
    layers = model.decoder.decoder_seanet.layers if name == "mimi" else model.decoder.layers
    _scale(layers[-1].conv, 0.1 / float((out.audio_values if name == "mimi" else out).std()))


def _spread_transformers(model: Any) -> None:
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=1.5 * module.in_features**-0.5)
        elif type(module).__name__ == "MimiLayerScale":
            nn.init.uniform_(module.scale, 0.2, 0.6)


class _scaled:
    """While entered, each convolution is rescaled, when it is first used, to give outputs of deviation 1."""

    def __init__(self, model: nn.Module) -> None:
        self._convolutions = [m for m in model.modules() if isinstance(m, nn.Conv1d | nn.ConvTranspose1d)]

    def __enter__(self) -> None:
        def rescale(conv: Any, _: Any, out: Tensor) -> Tensor:
            factor = 1.0 / float(out.std())
            _scale(conv, factor)
            return out * factor

        self._hooks = [conv.register_forward_hook(rescale) for conv in self._convolutions]

    def __exit__(self, *_: Any) -> None:
        for hook in self._hooks:
            hook.remove()


def _scale(conv: Any, factor: float) -> None:
    normed = nn.utils.parametrize.is_parametrized(conv, "weight")
    magnitude = conv.parametrizations.weight.original0 if normed else conv.weight
    magnitude.data.mul_(factor)
    if conv.bias is not None:
        conv.bias.data.mul_(factor)


def _fit_codebooks(name: str, model: Any, frames_TD: Tensor) -> Tensor:
    """Write codebooks into the model's quantizers; the quantized latents `[D, T]`."""
    generator = torch.Generator().manual_seed(1)
    if name != "mimi":
        return _fit_stages(model.quantizer.layers, frames_TD, generator).t()
    total_DT = torch.zeros(())
    splits = (model.quantizer.semantic_residual_vector_quantizer, model.quantizer.acoustic_residual_vector_quantizer)
    for split in splits:
        projected_TD = split.input_proj(frames_TD.t()[None])[0].t()
        quantized_TD = _fit_stages(split.layers, projected_TD, generator)
        total_DT = total_DT + split.output_proj(quantized_TD.t()[None])[0]
    return total_DT


def _fit_stages(stages: Any, frames_TD: Tensor, generator: torch.Generator) -> Tensor:
    residual_TD = frames_TD.clone()
    for stage in stages:
        codebook = stage.codebook
        centroids_CD = _codebook(residual_TD, codebook.codebook_size, generator)
        if hasattr(codebook, "embed_sum"):  # Mimi's are stored as sums and how often each was used
            usage_C = torch.rand(centroids_CD.shape[0], generator=generator) * 9 + 1
            codebook.cluster_usage.copy_(usage_C)
            codebook.embed_sum.copy_(centroids_CD * usage_C[:, None])
        else:
            codebook.embed.copy_(centroids_CD)
            codebook.embed_avg.copy_(centroids_CD)
        residual_TD -= centroids_CD[torch.cdist(residual_TD, centroids_CD).argmin(dim=1)]
    return frames_TD - residual_TD


def _codebook(frames_TD: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Directions of frames from their mean, a quarter as long as is usual: 32 stages then leave more than rounding."""
    mean_D = frames_TD.mean(dim=0)
    away_TD = frames_TD - mean_D
    away_CD = away_TD.repeat(-(-size // away_TD.shape[0]), 1)
    away_CD = away_CD[torch.randperm(away_CD.shape[0], generator=generator)[:size]]
    away_CD = away_CD + 0.05 * away_TD.std() * torch.randn(away_CD.shape, generator=generator)  # no two are the same
    length = 0.25 * away_TD.square().sum(dim=1).mean().sqrt()
    return mean_D + length * torch.nn.functional.normalize(away_CD)
