"""Times DAC's quantizer against transformers'.

`make bench-dac-rvq`. The shape of dac_44khz: 20,000 latents of 1,024 dimensions, 9 codebooks of 1,024 codes in 8
dimensions, one thread. Latents are log-mel speech, eight neighbours each; projections are random, codebooks fitted. The
peer is `DacResidualVectorQuantizer` as `DacModel.encode` calls it: it gives the quantized latents and losses too, and
forms what is left by projecting back. "codes-only" is the same of its parts that codes need and no more. Repeats are
interleaved; ratios are medians over them. A frame mismatches if its first differing code is no near-tie (a relative gap
of 1e-5 or more by `FactorizedQuantizer.gaps`). Prints a table and, last, one JSON object.
"""

import argparse
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from interleaved import compared, interleaved, print_report
from latents import speech_frames
from torch import Tensor
from transformers import DacConfig
from transformers.models.dac.modeling_dac import DacResidualVectorQuantizer

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
from wavemill.tokenizers.compare import NEAR_TIE
from wavemill.tokenizers.factorized import FactorizedQuantizer
from weights_dac import fit_stages

FRAMES, TARGET = 20_000, 7.5


def codes_only(stages: Any, latents_1DT: Tensor) -> Tensor:
    """Codes `[Q, T]` by the stages' own layers, one after the other."""
    residual_1DT, codes = latents_1DT, []
    for stage in stages:
        quantized_1ET, codes_1T = stage.decode_latents(stage.in_proj(residual_1DT))
        residual_1DT = residual_1DT - stage.out_proj(quantized_1ET)
        codes.append(codes_1T[0])
    return torch.stack(codes)


def differing(ours: FactorizedQuantizer, latents_TD: Tensor, codes_QT: Tensor) -> dict[str, int]:
    """Frames that differ from ours, by whether the first code that does is a near-tie."""
    different_QT = ours.encode(latents_TD) != codes_QT
    frames_F = different_QT.any(dim=0).nonzero()[:, 0]
    first_F = different_QT[:, frames_F].int().argmax(dim=0)
    near_ties = int((ours.gaps(latents_TD)[first_F, frames_F] < NEAR_TIE).sum())
    return {"near_ties": near_ties, "mismatches": len(frames_F) - near_ties}


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--corpus", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = DacConfig()
    latents_TD = speech_frames(FRAMES, config.hidden_size, arguments.corpus)
    theirs = DacResidualVectorQuantizer(config).eval().requires_grad_(False)
    fit_stages(theirs.quantizers, latents_TD)
    ours = FactorizedQuantizer(list(theirs.quantizers))
    latents_1DT = latents_TD.t()[None].contiguous()
    runs = {
        "wavemill": lambda: ours.encode(latents_TD),
        "transformers": lambda: theirs(latents_1DT),
        "codes-only": lambda: codes_only(theirs.quantizers, latents_1DT),
    }
    figures = compared(interleaved(runs, arguments.repeats))
    figures["transformers"] |= {"target": TARGET, **differing(ours, latents_TD, theirs(latents_1DT)[1][0])}
    peer = f"transformers {version('transformers')} DAC"
    print_report("dac-rvq", figures, against="transformers", peer=peer, n=FRAMES)


if __name__ == "__main__":
    main()
