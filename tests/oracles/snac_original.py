"""Codes and sound by the snac package, in .venv-oracles: FOLDER of weights, REQUEST and ANSWER in safetensors.

A request holds `waveform.N`, each `[samples]`, and `codes` `[K, T]`; the answer `codes.N` of each, and `sound` of the
codes. The weights are in the package's own layout. Codes are those of the first level, then of the second in their
order, and so on. The noise that the decoder draws is drawn as wavemill does: a tape for each place that adds some.
"""

import sys
from pathlib import Path
from unittest.mock import patch

import torch
from safetensors.torch import load_file, save_file
from snac import SNAC
from snac.layers import NoiseBlock
from torch import Tensor

_TAPE = 65_536  # positions


def main(folder: Path, request: Path, answer: Path) -> None:
    model = SNAC.from_pretrained(str(folder))
    asked, found = load_file(request), {}
    with torch.inference_mode():
        for name, waveform_N in asked.items():
            if name.startswith("waveform."):
                levels = [codes_1M[0] for codes_1M in model.encode(waveform_N[None, None])]
                num_frames = levels[0].shape[0]
                flat = [codes_M.view(num_frames, -1).t() for codes_M in levels]
                found[name.replace("waveform", "codes")] = torch.cat(flat)
        counts = [model.vq_strides[0] // stride for stride in model.vq_strides]
        levels = [part_CT.t().reshape(1, -1) for part_CT in asked["codes"].split(counts)]
        with patch("torch.randn", drawn(sum(isinstance(module, NoiseBlock) for module in model.modules()))):
            found["sound"] = model.decode(levels)[0, 0]
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, answer)


def drawn(num_tapes: int):
    """In the place of `torch.randn`: one tape after the other, each from its beginning, and over again at its end."""
    generator = torch.Generator().manual_seed(0)
    tapes = iter([torch.randn(_TAPE, generator=generator) for _ in range(num_tapes)])

    def randn(shape: tuple[int, int, int], **_: object) -> Tensor:
        return next(tapes)[torch.arange(shape[2]) % _TAPE].expand(shape)

    return randn


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*(Path(argument) for argument in sys.argv[1:4]))
