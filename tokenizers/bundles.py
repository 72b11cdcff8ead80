"""torchaudio's bundles as a second source of weights: `torchaudio:HUBERT_BASE`.

Their files lie in torch.hub's cache and are opened as tensors only (`weights_only`). A bundle's parameters and names
are turned into transformers', so that the same pass runs them. Layer L is the L-th of torchaudio's `extract_features`,
which like ours has no norm after the last layer of models that norm first.
"""

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .hub import build_model, files_sha256
from .spec import UserError, did_you_mean

PREFIX = "torchaudio:"
_BUNDLES = {
    "hubert": ("HUBERT_BASE", "HUBERT_LARGE", "HUBERT_XLARGE"),
    "wavlm": ("WAVLM_BASE", "WAVLM_BASE_PLUS", "WAVLM_LARGE"),
    "wav2vec2": ("WAV2VEC2_BASE", "WAV2VEC2_LARGE", "WAV2VEC2_LARGE_LV60K"),
}
_URL = "https://download.pytorch.org/torchaudio/models/"


@dataclass(frozen=True, slots=True)
class BundleWeights:
    """A bundle whose file was found, but not opened."""

    name: str  # torchaudio:NAME
    file: Path
    sha256: str
    config: dict[str, Any]  # as transformers' config.json has it
    do_normalize: bool  # the waveform, as torch's layer norm does: epsilon 1e-5


def find_bundle(
    source: str, *, tokenizer: str, architecture: str, revision: str | None, local_files_only: bool
) -> BundleWeights:
    """The bundle `source`, downloaded if need be and allowed.

    Raises `UserError` for bundles that are unknown or of another architecture, and files that cannot be had.
    """
    name = source.removeprefix(PREFIX)
    there = _BUNDLES[architecture]
    if name not in there:
        every = [bundle for bundles in _BUNDLES.values() for bundle in bundles]
        what = "holds another model" if name in every else "is no bundle that is known here"
        raise UserError(
            f"{source} {what}; {tokenizer} takes {', '.join(PREFIX + bundle for bundle in there)}."
            f"{'' if name in every else did_you_mean(name, there)}"
        )
    if revision is not None:
        raise UserError(f"torchaudio's bundles have no revisions; leave out revision={revision}.")
    from torchaudio import pipelines

    bundle = getattr(pipelines, name)
    file = _fetch(bundle._path, source, local_files_only)
    return BundleWeights(
        source, file, files_sha256([file]), _config(bundle._params, architecture), bundle._normalize_waveform
    )


def load_bundle(model: str, weights: BundleWeights, *, num_hidden_layers: int) -> nn.Module:
    """transformers' `model` with the bundle's parameters of so many layers, float32, on the CPU."""
    try:
        state = torch.load(weights.file, map_location="cpu", weights_only=True, mmap=True)
        renamed = _rename(state, num_hidden_layers)
        return build_model(model, {**weights.config, "num_hidden_layers": num_hidden_layers}, renamed)
    except (RuntimeError, OSError, EOFError, AttributeError, pickle.UnpicklingError) as error:
        raise UserError(
            f"{weights.file} is not the file of {weights.name} ({' '.join(str(error).split())[:200]}). Delete it, so "
            "that it is fetched again."
        ) from error


def _fetch(path: str, source: str, local_files_only: bool) -> Path:
    file = Path(torch.hub.get_dir()) / "checkpoints" / Path(path).name
    if file.exists():
        return file
    why = "the network must not be asked"
    if not local_files_only:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(_URL + path, str(file), progress=False)
            return file
        except OSError as error:  # urllib's errors are
            why = f"it cannot be fetched ({error})"
    raise UserError(
        f"The weights {source} are not on this machine, and {why}. Fetch {_URL}{path} where there is a network, "
        f"and put it into {file.parent}."
    )


def _config(params: dict[str, Any], architecture: str) -> dict[str, Any]:
    """A factory's parameters in transformers' words (torchaudio.models.wav2vec2.utils has the way back)."""
    dims, kernels, strides = zip(*params["extractor_conv_layer_config"], strict=True)
    config = {
        "model_type": architecture,
        "feat_extract_norm": params["extractor_mode"].removesuffix("_norm"),
        "conv_dim": list(dims),
        "conv_kernel": list(kernels),
        "conv_stride": list(strides),
        "conv_bias": params["extractor_conv_bias"],
        "hidden_size": params["encoder_embed_dim"],
        "num_conv_pos_embeddings": params["encoder_pos_conv_kernel"],
        "num_conv_pos_embedding_groups": params["encoder_pos_conv_groups"],
        "num_hidden_layers": params["encoder_num_layers"],
        "num_attention_heads": params["encoder_num_heads"],
        "intermediate_size": params["encoder_ff_interm_features"],
        "do_stable_layer_norm": params["encoder_layer_norm_first"],
        "hidden_act": "gelu",
        "feat_extract_activation": "gelu",
        "layer_norm_eps": 1e-5,
        "mask_time_prob": 0.0,  # without the embedding that only training needs
        "mask_feature_prob": 0.0,
    }
    if architecture == "wavlm":
        config |= {"num_buckets": params["encoder_num_buckets"], "max_bucket_distance": params["encoder_max_distance"]}
    return config


def _rename(state: dict[str, Tensor], num_layers: int) -> dict[str, Tensor]:
    renamed = {}
    for name, tensor in state.items():
        name = name.removeprefix("encoder.") if name.startswith("encoder.feature_projection.") else name
        name = name.replace("encoder.transformer.", "encoder.").replace("attention.attention.", "attention.")
        if name.startswith("encoder.layers.") and int(name.split(".")[2]) >= num_layers:
            continue
        stem, _, kind = name.rpartition(".in_proj_")
        if stem:  # torch.nn.MultiheadAttention keeps the three together
            for part, third in zip("qkv", tensor.chunk(3), strict=True):
                renamed[f"{stem}.{part}_proj.{kind}"] = third
        elif not name.startswith("aux."):
            renamed[name] = tensor
    return renamed
