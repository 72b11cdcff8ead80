"""Codes and sound by the encodec package, in .venv-oracles: FOLDER of weights, REQUEST and ANSWER in safetensors.

A request holds `waveform.N`, each `[samples]`, and `codes` `[K, T]`; the answer `codes.N` of each, and `sound` of the
codes. The weights are those of transformers' layout, renamed.
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
    (r"\.conv\.bias$", ".conv.conv.bias"),
)


def main(folder: Path, request: Path, answer: Path) -> None:
    model = load(folder)
    asked, found = load_file(request), {}
    with torch.inference_mode():
        for name, waveform_N in asked.items():
            if name.startswith("waveform."):
                ((codes_1KT, _),) = model.encode(waveform_N[None, None])
                found[name.replace("waveform", "codes")] = codes_1KT[0]
        found["sound"] = model.decode([(asked["codes"][None], None)])[0, 0]
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, answer)


def load(folder: Path) -> EncodecModel:
    settings = json.loads((folder / "config.json").read_text())
    sizes = {
        "dimension": settings["hidden_size"],
        "n_filters": settings["num_filters"],
        "ratios": list(settings["upsampling_ratios"]),
    }
    like_published = {"channels": 1, "norm": "weight_norm", "causal": True}
    given = load_file(folder / "model.safetensors")
    num_codebooks = sum(name.endswith(".codebook.embed") for name in given)
    model = EncodecModel(
        SEANetEncoder(**sizes, **like_published),
        SEANetDecoder(**sizes, **like_published),
        ResidualVectorQuantizer(
            dimension=settings["hidden_size"], n_q=num_codebooks, bins=settings["codebook_size"], kmeans_init=False
        ),
        settings["target_bandwidths"],
        settings["sampling_rate"],
        1,
    )
    names = set(model.state_dict())
    model.load_state_dict({_renamed(name, names): tensor for name, tensor in given.items()}, strict=True)
    model.set_target_bandwidth(settings["target_bandwidths"][-1])
    return model.eval()


def _renamed(name: str, there: set[str]) -> str:
    for pattern, replacement in _RENAMED:
        name = re.sub(pattern, replacement, name)
    return name if name in there else name.replace(".conv.conv.", ".convtr.convtr.")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*(Path(argument) for argument in sys.argv[1:4]))
