"""Codes and sound by the speechtokenizer package, in .venv-oracles: FOLDER of weights, files REQUEST and ANSWER.

A request holds `waveform.N`, each `[samples]`, and `codes` `[K, T]`; the answer `codes.N` of each, and `sound` of the
codes. The weights are in the package's own layout.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from speechtokenizer import SpeechTokenizer


def main(folder: Path, request: Path, answer: Path) -> None:
    model = SpeechTokenizer.load_from_checkpoint(str(folder / "config.json"), str(folder / "SpeechTokenizer.pt")).eval()
    asked, found = load_file(request), {}
    with torch.inference_mode():
        for name, waveform_N in asked.items():
            if name.startswith("waveform."):
                found[name.replace("waveform", "codes")] = model.encode(waveform_N[None, None])[:, 0]
        found["sound"] = model.decode(asked["codes"][:, None])[0, 0]
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, answer)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*(Path(argument) for argument in sys.argv[1:4]))
