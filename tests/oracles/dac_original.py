"""Codes and sound by descript-audio-codec, in .venv-oracles: FOLDER of weights, REQUEST and ANSWER in safetensors.

A request holds `waveform.N`, each `[samples]`, and `codes` `[K, T]`; the answer `codes.N` of each, and `sound` of the
codes. The weights are those of transformers' layout, renamed, with weight normalization (gain and direction) put back.
"""

import json
import re
import sys
from pathlib import Path

import dac
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

_MODULE = re.compile(r"(encoder|decoder)\.(?:block|model)\.(\d+)(?:\.block\.(.*))?")
_UNIT = {"0": "snake1", "1": "conv1", "2": "snake2", "3": "conv2"}


def main(folder: Path, request: Path, answer: Path) -> None:
    model = load(folder)
    asked, found = load_file(request), {}
    with torch.inference_mode():
        for name, waveform_N in asked.items():
            if name.startswith("waveform."):
                padded_11N = model.preprocess(waveform_N[None, None], model.sample_rate)
                found[name.replace("waveform", "codes")] = model.encode(padded_11N)[1][0]
        latents_1DT = model.quantizer.from_codes(asked["codes"][None])[0]
        found["sound"] = model.decode(latents_1DT)[0, 0]
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, answer)


def load(folder: Path) -> dac.DAC:
    settings = json.loads((folder / "config.json").read_text())
    strides = list(settings["downsampling_ratios"])
    model = dac.DAC(
        encoder_dim=settings["encoder_hidden_size"],
        encoder_rates=strides,
        decoder_dim=settings["decoder_hidden_size"],
        decoder_rates=strides[::-1],
        n_codebooks=settings["n_codebooks"],
        codebook_size=settings["codebook_size"],
        codebook_dim=settings["codebook_dim"],
        sample_rate=settings["sampling_rate"],
    )
    given = load_file(folder / "model.safetensors")
    state = dict(model.state_dict())
    for name in state:
        module, _, parameter = name.rpartition(".")
        theirs = transformers_name(module, num_blocks=len(strides))
        if parameter in ("weight_g", "weight_v"):
            state[name] = _normed(given[f"{theirs}.weight"], parameter)
        else:
            state[name] = given[f"{theirs}.{parameter}"]
    model.load_state_dict(state, strict=True)
    return model.eval()


def _normed(weight: Tensor, parameter: str) -> Tensor:
    """A direction that is longer in some rows than the weight, or the gain that goes with it."""
    longer = torch.linspace(0.5, 2.0, weight.shape[0])[:, None, None]
    return weight * longer if parameter == "weight_v" else weight.norm(dim=(1, 2), keepdim=True)


def transformers_name(module: str, *, num_blocks: int) -> str:
    """transformers' name of a module of `dac.DAC`."""
    if module.startswith("quantizer."):
        return module
    network, block, inner = _MODULE.fullmatch(module).groups()
    if inner is None:
        outer = {0: "conv1", num_blocks + 1: "snake1", num_blocks + 2: "conv2"}
        return f"{network}.{outer[int(block)]}"
    layer, _, inside = inner.partition(".block.")
    ends = {"3": "snake1", "4": "conv1"} if network == "encoder" else {"0": "snake1", "1": "conv_t1"}
    first_unit = 0 if network == "encoder" else 2
    path = ends[layer] if layer in ends and not inside else f"res_unit{int(layer) - first_unit + 1}.{_UNIT[inside]}"
    return f"{network}.block.{int(block) - 1}.{path}"


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*(Path(argument) for argument in sys.argv[1:4]))
