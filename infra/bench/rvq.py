"""Times residual quantization against transformers' EnCodec and vector-quantize-pytorch.

`make bench-rvq`. 20,000 frames of 128 dimensions, 8 codebooks of 1,024, one thread; frames are log-mel speech, eight
neighbours each, and codebooks are fitted to others. The peers are `EncodecResidualVectorQuantizer.encode` and
`ResidualVQ` in evaluation mode (it gives the quantized frames and a loss too), with the same codebooks. Repeats are
interleaved; ratios are medians over them. Flipped are frames whose codes differ from a search in float64; the gap is
the widest at a first flip. Extra memory is what the resident set of a fresh process gains at its highest while it
encodes 100,000 frames, codes included. Prints a table and, last, one JSON object.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from interleaved import compared, interleaved, print_report
from latents import fitted_codebooks, flips, speech_frames
from torch import Tensor
from wavemill.tokenizers.quantize import ResidualQuantizer

STAGES, SIZE, DIM, FRAMES, FRAMES_FOR_MEMORY = 8, 1_024, 128, 20_000, 100_000
TARGETS = {"encodec": 3.0, "vector-quantize-pytorch": 7.0}
MEMORY_TARGET_MB = 16.0
KBIT_S = 6.0  # of EnCodec at 24 kHz: 8 codebooks

Encode = Callable[[Tensor], Tensor]


def ours(centroids_QCD: Tensor) -> Encode:
    return ResidualQuantizer(centroids_QCD).encode


def encodec(centroids_QCD: Tensor) -> Encode:
    from transformers import EncodecConfig
    from transformers.models.encodec.modeling_encodec import EncodecResidualVectorQuantizer

    quantizer = EncodecResidualVectorQuantizer(EncodecConfig()).eval()
    for layer, centroids_CD in zip(quantizer.layers, centroids_QCD, strict=False):
        layer.codebook.embed = centroids_CD.clone()
    return lambda frames_ND: quantizer.encode(frames_ND.t()[None], bandwidth=KBIT_S)[:, 0]


def vector_quantize_pytorch(centroids_QCD: Tensor) -> Encode:
    from vector_quantize_pytorch import ResidualVQ

    quantizer = ResidualVQ(dim=DIM, num_quantizers=STAGES, codebook_size=SIZE).eval()
    for layer, centroids_CD in zip(quantizer.layers, centroids_QCD, strict=True):
        layer._codebook.embed.copy_(centroids_CD[None])
    return lambda frames_ND: quantizer(frames_ND[None])[1][0].t()


QUANTIZERS = {"wavemill": ours, "encodec": encodec, "vector-quantize-pytorch": vector_quantize_pytorch}


def memory_mb(field: str) -> float:
    """Of this process: VmRSS is what it holds, VmHWM the most that it held since it was reset."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024 / 1e6


@torch.inference_mode()
def print_extra_memory(name: str) -> None:
    """What encoding many frames takes beside them, in this process; they may be noise."""
    generator = torch.Generator().manual_seed(0)
    encode = QUANTIZERS[name](torch.randn(STAGES, SIZE, DIM, generator=generator))
    frames_ND = torch.randn(FRAMES_FOR_MEMORY, DIM, generator=generator)
    encode(frames_ND[:64].clone())  # what libraries keep from their first call on
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM (man 5 proc)
    before_mb = memory_mb("VmRSS")
    codes_QN = encode(frames_ND)
    print(json.dumps({"extra_mb": memory_mb("VmHWM") - before_mb, "codes_mb": codes_QN.nbytes / 1e6}))


def extra_memory(name: str) -> dict[str, float]:
    output = subprocess.run([sys.executable, __file__, "--memory", name], capture_output=True, check=True).stdout
    return json.loads(output)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--corpus", type=Path)
    parser.add_argument("--memory", choices=list(QUANTIZERS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.memory:
        print_extra_memory(arguments.memory)
        return
    frames_ND, fitted_on_ND = speech_frames(4 * FRAMES, DIM, arguments.corpus).split([FRAMES, 3 * FRAMES])
    centroids_QCD = fitted_codebooks(fitted_on_ND, num_stages=STAGES, size=SIZE)
    encoders = {name: make(centroids_QCD) for name, make in QUANTIZERS.items()}
    runs = {name: (lambda encode=encode: encode(frames_ND)) for name, encode in encoders.items()}
    figures = compared(interleaved(runs, arguments.repeats))
    for name, encode in encoders.items():
        flipped, gap = flips(frames_ND, centroids_QCD, encode(frames_ND))
        extra_mb = round(extra_memory(name)["extra_mb"], 1)
        figures[name] |= {"target": TARGETS.get(name), "flipped": flipped, "gap": gap, "extra_mb": extra_mb}
    print_report(
        "rvq",
        figures,
        against="encodec",
        peer=f"transformers {version('transformers')} EnCodec",
        n=FRAMES,
        ours_extra_mb=figures["wavemill"]["extra_mb"],
        extra_mb_target=MEMORY_TARGET_MB,
        versions={name: version(name) for name in ("torch", "transformers", "vector-quantize-pytorch")},
    )


if __name__ == "__main__":
    main()
