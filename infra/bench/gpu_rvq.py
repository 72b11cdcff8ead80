"""Times residual search and k-means assignment on a GPU: our kernels, transformers' EnCodec, fairseq's formula.

`make bench-gpu-rvq`; without a CUDA device it says so and measures nothing. 200,000 frames of 128 dimensions, 8
codebooks of 1,024: log-mel speech and codebooks fitted to it, as in rvq.py; and a million frames of 768 dimensions, 500
and 2,000 centroids: correlated noise and centroids fitted to it. In the same run the rate of a bf16 GEMM of 8192^3 and
of a copy in memory are taken: gemm is the share of the former that 2 N Q C D operations make (three times as many are
done), memory the share of the latter that reading frames and writing codes makes. Flipped are frames whose codes are
not those of a search in float64; unsure those that were done again. Ratios are medians over interleaved repeats. Prints
a table and, last, one JSON object.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch
from interleaved import compared, interleaved, print_table
from latents import fitted_codebooks, speech_frames
from rvq import encodec
from torch import Tensor
from wavemill.tokenizers import quantize_triton
from wavemill.tokenizers.quantize import ResidualQuantizer

STAGES, SIZE, DIM, FRAMES = 8, 1_024, 128, 200_000
FEATURE_FRAMES, FEATURE_DIM, FEATURE_SIZES = 1_000_000, 768, (500, 2_000)
FITTED_ON = 20_000
GEMM, COPIED_BYTES, BLOCK = 8_192, 1 << 31, 16_384

Encode = Callable[[Tensor], Tensor]


def synchronized(run: Callable[[], object]) -> Callable[[], None]:
    def wait() -> None:
        run()
        torch.cuda.synchronize()

    return wait


def machine_rates(repeats: int) -> tuple[float, float]:
    """FLOP/s of a bf16 GEMM; bytes/s, read and written, of a copy."""
    a, b = (torch.randn(GEMM, GEMM, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    source, target = (torch.zeros(COPIED_BYTES, dtype=torch.uint8, device="cuda") for _ in range(2))
    runs = {"gemm": synchronized(lambda: a @ b), "copy": synchronized(lambda: target.copy_(source))}
    took = {name: statistics.median(each) for name, each in interleaved(runs, repeats).items()}
    return 2 * GEMM**3 / took["gemm"], 2 * COPIED_BYTES / took["copy"]


def correlated_noise(num: int, dim: int) -> Tensor:
    """Frames `[N, D]` on the GPU whose variance is in few directions, as that of features is."""
    generator = torch.Generator("cuda").manual_seed(0)
    mixing = (
        torch.randn(dim, dim, device="cuda", generator=generator) / torch.arange(1, dim + 1, device="cuda")[:, None]
    )
    return torch.randn(num, dim, device="cuda", generator=generator) @ mixing


def fairseq(centroids_QCD: Tensor) -> Encode:
    """Its ApplyKmeans, of a million frames in blocks."""
    centroids_DC = centroids_QCD[0].t().contiguous()
    squares_1C = centroids_DC.square().sum(0, keepdim=True)

    def assign(frames_ND: Tensor) -> Tensor:
        blocks = frames_ND.split(8 * BLOCK)
        distances = (x_ND.pow(2).sum(1, keepdim=True) - 2 * x_ND @ centroids_DC + squares_1C for x_ND in blocks)
        return torch.cat([distances_NC.argmin(dim=1) for distances_NC in distances])[None]

    return assign


def flipped(frames_ND: Tensor, centroids_QCD: Tensor, codes_QN: Tensor) -> int:
    """Frames whose codes are not those of a search in float64 throughout."""
    differs = 0
    for begin in range(0, len(frames_ND), BLOCK):
        left_ND = frames_ND[begin : begin + BLOCK].double()
        differs_N = torch.zeros(len(left_ND), dtype=torch.bool, device=left_ND.device)
        for centroids_CD, codes_N in zip(centroids_QCD.double(), codes_QN[:, begin : begin + BLOCK], strict=True):
            nearest_N = (left_ND @ centroids_CD.t() - centroids_CD.square().sum(dim=1) / 2).argmax(dim=1)
            differs_N |= nearest_N != codes_N
            left_ND -= centroids_CD[nearest_N]
        differs += int(differs_N.sum())
    return differs


def bench(
    frames_ND: Tensor, centroids_QCD: Tensor, peer: Callable[[Tensor], Encode], rates: tuple[float, float], repeats: int
) -> dict[str, dict[str, Any]]:
    quantizer = ResidualQuantizer(centroids_QCD, device="cuda")
    encoders = {"wavemill": quantizer.encode, "peer": peer(centroids_QCD)}
    runs: dict[str, Callable[[], object]] = {name: lambda of=of: of(frames_ND) for name, of in encoders.items()}
    runs["kernel alone"] = lambda: quantize_triton.encode_residual(frames_ND, quantizer)
    runs["plain torch"] = lambda: quantizer._encode(frames_ND)
    codes_QN = quantizer.encode(frames_ND)
    runs["decode"] = lambda: quantizer.decode(codes_QN)
    figures = compared(interleaved({name: synchronized(run) for name, run in runs.items()}, repeats))
    operations = 2 * frames_ND.numel() * centroids_QCD.shape[0] * centroids_QCD.shape[1]
    for row in figures.values():
        row["memory"] = round((frames_ND.nbytes + codes_QN.nbytes) / (row["ms"] / 1_000) / rates[1], 3)
    for name in ("wavemill", "peer", "kernel alone", "plain torch"):
        figures[name]["gemm"] = round(operations / (figures[name]["ms"] / 1_000) / rates[0], 3)
    for name, encode in encoders.items():
        figures[name]["flipped"] = flipped(frames_ND, quantizer.centroids_QCD, encode(frames_ND))
    unsure_N = quantize_triton.encode_residual(frames_ND, quantizer)[1]
    figures["kernel alone"]["unsure"] = round(float(unsure_N.float().mean()), 5)
    return figures


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench-gpu-rvq needs a CUDA device; there is none, and nothing was measured.")
        return
    rates = machine_rates(arguments.repeats)
    print(f"{torch.cuda.get_device_name()}: bf16 GEMM {rates[0] / 1e12:.0f} TFLOP/s, copy {rates[1] / 1e12:.2f} TB/s")
    results = {}
    mel_ND = speech_frames(FRAMES, DIM)
    fitted_on = torch.randperm(FRAMES, generator=torch.Generator().manual_seed(0))[:FITTED_ON]
    centroids_QCD = fitted_codebooks(mel_ND[fitted_on], num_stages=STAGES, size=SIZE).cuda()
    results["rvq"] = bench(mel_ND.cuda(), centroids_QCD, encodec, rates, arguments.repeats)
    print(f"residual: N {FRAMES:,} D {DIM} Q {STAGES} C {SIZE:,}; peer: transformers' EnCodec")
    print_table(results["rvq"])
    features_ND = correlated_noise(FEATURE_FRAMES, FEATURE_DIM)
    for size in FEATURE_SIZES:
        centroids_1CD = fitted_codebooks(features_ND[:FITTED_ON].cpu(), num_stages=1, size=size).cuda()
        results[f"assign-{size}"] = bench(features_ND, centroids_1CD, fairseq, rates, arguments.repeats)
        print(f"k-means: N {FEATURE_FRAMES:,} D {FEATURE_DIM} C {size:,}; peer: fairseq's formula")
        print_table(results[f"assign-{size}"])
    print(
        json.dumps(
            {
                "name": "gpu-rvq",
                "ratio": results["rvq"]["peer"]["ratio"],
                "target": None,
                "spread": results["rvq"]["peer"]["spread"],
                "peer": f"transformers {version('transformers')} EnCodec on {torch.cuda.get_device_name()}",
                "n": FRAMES,
                "bf16_tflop_s": round(rates[0] / 1e12, 1),
                "copy_tb_s": round(rates[1] / 1e12, 2),
                "versions": {name: version(name) for name in ("torch", "triton", "transformers")},
                "all": results,
            }
        )
    )


if __name__ == "__main__":
    main()
