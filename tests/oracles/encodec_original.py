"""Codes and sound by the encodec package, in .venv-oracles: FOLDER of weights, REQUEST and ANSWER in safetensors.

A request holds `waveform.N`, each `[samples]`, and `codes` `[K, T]`; the answer `codes.N` of each, and `sound` of the
codes. Where the codec takes chunks, codes are those of all chunks, which sound as if all were as loud as the decoder
makes them. The weights are those of transformers' layout, renamed.
"""

import json
import re
import sys
from pathlib import Path

import torch
from encodec import EncodecModel
from encodec.modules import SEANetDecoder, SEANetEncoder
from encodec.quantization import ResidualVectorQuantizer
from safetensors.torch import load_file, save_file

_RENAMED = (
    (r"\.layers\.(\d+)\.codebook\.", r".vq.layers.\1._codebook."),
    (r"^(encoder|decoder)\.layers\.", r"\1.model."),
    (r"\.conv\.parametrizations\.weight\.original0$", ".conv.conv.weight_g"),
    (r"\.conv\.parametrizations\.weight\.original1$", ".conv.conv.weight_v"),
    (r"\.conv\.(weight|bias)$", r".conv.conv.\1"),
    (r"\.norm\.(weight|bias)$", r".conv.norm.\1"),
)


def main(folder: Path, request: Path, answer: Path) -> None:
    model = load(folder)
    asked, found = load_file(request), {}
    with torch.inference_mode():
        for name, waveform_N in asked.items():
            if name.startswith("waveform."):
                chunks = model.encode(waveform_N.expand(1, model.channels, -1))
                found[name.replace("waveform", "codes")] = torch.cat([codes_1KT[0] for codes_1KT, _ in chunks], dim=1)
        if model.segment is None:
            found["sound"] = model.decode([(asked["codes"][None], None)])[0, 0]
        else:
            chunks = asked["codes"].split(int(model.segment_length // model.encoder.hop_length), dim=1)
            found["sound"] = model.decode([(codes_KT[None], torch.ones(1, 1)) for codes_KT in chunks])[0]
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, answer)


def load(folder: Path) -> EncodecModel:
    settings = json.loads((folder / "config.json").read_text())
    sizes = {
        "dimension": settings["hidden_size"],
        "n_filters": settings["num_filters"],
        "ratios": list(settings["upsampling_ratios"]),
    }
    channels = settings["audio_channels"]
    norms = {"channels": channels, "norm": settings["norm_type"], "causal": settings["use_causal_conv"]}
    given = load_file(folder / "model.safetensors")
    num_codebooks = sum(name.endswith(".codebook.embed") for name in given)
    model = EncodecModel(
        SEANetEncoder(**sizes, **norms),
        SEANetDecoder(**sizes, **norms),
        ResidualVectorQuantizer(
            dimension=settings["hidden_size"], n_q=num_codebooks, bins=settings["codebook_size"], kmeans_init=False
        ),
        settings["target_bandwidths"],
        settings["sampling_rate"],
        channels,
        normalize=settings["normalize"],
        segment=settings["chunk_length_s"],
        overlap=settings["overlap"] or 0.01,
    )
    names = set(model.state_dict())
    model.load_state_dict({_renamed(name, names): tensor for name, tensor in given.items()}, strict=True)
    model.set_target_bandwidth(settings["target_bandwidths"][-1])
    return model.eval()


def _renamed(name: str, there: set[str]) -> str:
    for pattern, replacement in _RENAMED:
        name = re.sub(pattern, replacement, name)
    return (
        name
        if name in there
        else name.replace(".conv.conv.", ".convtr.convtr.").replace(".conv.norm.", ".convtr.norm.")
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*(Path(argument) for argument in sys.argv[1:4]))
