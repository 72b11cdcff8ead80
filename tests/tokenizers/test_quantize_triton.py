"""The GPU's residual search against the CPU's. Without a GPU Triton interprets it, in a process of its own: this file.

Axes: N frames, D dimensions, C centroids, Q stages.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from wavemill.tokenizers import quantize_triton
from wavemill.tokenizers.quantize import ResidualQuantizer

Case = tuple[Tensor, Tensor]  # frames [N, D], centroids [Q, C, D]
Found = dict[str, dict[str, Tensor]]

SHAPES = [  # N, Q, C, D
    (0, 2, 5, 4),
    (1, 1, 5, 3),
    (65, 1, 1, 1),
    (70, 3, 2, 16),
    (64, 2, 100, 39),
    (3, 8, 128, 128),
    (70, 2, 130, 160),
    (9, 1, 257, 256),
    (70, 3, 130, 257),
    (33, 1, 50, 768),
]


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def of_shape(num_frames: int, stages: int, size: int, dim: int) -> Case:
    finer_Q11 = 0.6 ** torch.arange(stages)[:, None, None]
    return normal(num_frames, dim, seed=num_frames), normal(stages, size, dim, seed=dim) * finer_Q11


def near_ties(dim: int) -> Case:
    """At the first of two stages frames are halfway between two centroids, but for 1e-9 to 1e-4 of their distance.

    The pairs lie anywhere in the codebook, in one block of the kernel or in two; the other centroids are far.
    """
    size, num_frames = 150, 256
    centroids_QCD = normal(2, size, dim, seed=1)
    generator = torch.Generator().manual_seed(2)
    pairs_N2 = torch.stack([torch.randperm(size, generator=generator)[:2] for _ in range(num_frames)])
    first_ND, second_ND = centroids_QCD[0, pairs_N2[:, 0]], centroids_QCD[0, pairs_N2[:, 1]]
    nearer_N1 = 10 ** torch.linspace(-9, -4, num_frames)[:, None]
    return (first_ND + second_ND) / 2 + (second_ND - first_ND) * nearer_N1, centroids_QCD


def twins() -> Case:
    """Every centroid twice."""
    frames_ND, centroids_QCD = of_shape(40, 2, 30, 20)
    return frames_ND, torch.cat([centroids_QCD, centroids_QCD], dim=1)


def frames_like_no_other() -> Case:
    """Not numbers, past float32's squares, so far that float64 is coarse; the last is none of these."""
    frames_ND, centroids_QCD = of_shape(7, 2, 30, 20)
    frames_ND[0, 3] = torch.nan
    frames_ND[1, 3] = torch.inf
    frames_ND[2, 3] = -torch.inf
    frames_ND[3] *= 1e30
    frames_ND[4] *= 3e38
    frames_ND[5] *= 1e16
    return frames_ND, centroids_QCD


def scaled(by: float, *, offset: float = 0.0) -> Case:
    frames_ND, centroids_QCD = of_shape(40, 1, 60, 20)
    return frames_ND * by + offset, centroids_QCD * by + offset


CASES: dict[str, Callable[[], Case]] = {
    **{f"shape {shape}": lambda shape=shape: of_shape(*shape) for shape in SHAPES},
    "near ties": lambda: near_ties(64),
    "near ties, streamed": lambda: near_ties(300),
    "twins": twins,
    "one centroid many times": lambda: (normal(5, 8, seed=0), normal(1, 1, 8, seed=1).expand(2, 20, 8)),
    "zeros": lambda: (torch.zeros(3, 8), normal(1, 20, 8, seed=1)),
    "frames like no other": frames_like_no_other,
    "far from zero": lambda: scaled(1.0, offset=3_000.0),
    "large": lambda: scaled(1e12),
    "small": lambda: scaled(1e-12),
    "tiny": lambda: scaled(1e-17),
    "not contiguous": lambda: (normal(50, 40, seed=3)[::2, 10:30], normal(2, 40, 20, seed=4)),
}


def search_all(path: str) -> None:
    """What a process whose Triton interprets finds: of all cases, and of near ties when nothing is called unsure."""
    frames_ND, centroids_QCD = twins()
    ResidualQuantizer(centroids_QCD).encode(frames_ND)
    found: Found = {"on the CPU": {"imported": torch.tensor("triton" in sys.modules)}}
    for name, make in CASES.items():
        frames_ND, centroids_QCD = make()
        tables = ResidualQuantizer(centroids_QCD)
        codes_QN, unsure_N = quantize_triton.encode_residual(frames_ND, tables)
        some_QN = tables.encode(frames_ND)[: 1 + len(centroids_QCD) // 2]
        found[name] = {"codes": codes_QN, "unsure": unsure_N, "sums": quantize_triton.decode_sum(some_QN, tables)}
    quantize_triton._slack = lambda dim, block: (0.0, 0.0)
    for name in ("near ties", "near ties, streamed"):
        codes_QN, unsure_N = quantize_triton.encode_residual(CASES[name]()[0], ResidualQuantizer(CASES[name]()[1]))
        found[f"{name}, no slack"] = {"codes": codes_QN, "unsure": unsure_N}
    torch.save(found, path)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    pytest.importorskip("triton")
    path = tmp_path_factory.mktemp("triton") / "found.pt"
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, __file__, str(path)], env=env, check=True, timeout=240)
    return torch.load(path, weights_only=True)


def wrong_but_sure(found: dict[str, Tensor], case: Case) -> Tensor:
    frames_ND, centroids_QCD = case
    differs_N = (found["codes"] != ResidualQuantizer(centroids_QCD).encode(frames_ND)).any(dim=0)
    return (differs_N & ~found["unsure"]).nonzero()[:, 0]


@pytest.mark.parametrize("name", CASES)
def test_codes_that_the_gpu_is_sure_of_are_those_of_the_cpu(found: Found, name: str):
    assert wrong_but_sure(found[name], CASES[name]()).tolist() == []


@pytest.mark.parametrize("name", [*(f"shape {shape}" for shape in SHAPES), "zeros", "large", "small", "not contiguous"])
def test_the_gpu_is_sure_of_nearly_all_ordinary_frames(found: Found, name: str):
    assert int(found[name]["unsure"].sum()) <= 0.05 * len(found[name]["unsure"])


def test_far_from_zero_the_gpu_is_as_sure_as_near_it(found: Found):
    assert not found["far from zero"]["unsure"].any()


@pytest.mark.parametrize("name", ["near ties", "near ties, streamed"])
def test_unsure_are_frames_whose_best_score_leads_by_no_more_than_rounding_may_hide(found: Found, name: str):
    """The bound is that of the module's docstring, for 64 dimensions at a time; the scores are those of float64."""
    frames_ND, centroids_QCD = CASES[name]()
    dim = frames_ND.shape[1]
    room_QN = []
    left_ND = frames_ND.double()
    for centroids_CD in centroids_QCD.double():
        centred_CD = centroids_CD - centroids_CD.mean(dim=0)
        centred_ND = left_ND - centroids_CD.mean(dim=0)
        scores_NC = centred_ND @ centred_CD.t() - centred_CD.square().sum(dim=1) / 2
        lengths_C = centred_CD.norm(dim=1)
        lengths_C = lengths_C + lengths_C.max() / 1024
        off_NC = lengths_C * (centred_ND.norm(dim=1, keepdim=True) + lengths_C) * (2.25 * 64 + dim / 64 + 24) / 2**24
        best_N2, codes_N2 = (scores_NC + off_NC).topk(2, dim=1)
        room_QN.append((best_N2[:, 0] - best_N2[:, 1]) / (2 * off_NC.gather(1, codes_N2[:, :1])[:, 0]))
        left_ND = left_ND - centroids_CD[codes_N2[:, 0]]
    room_N = torch.stack(room_QN).amin(dim=0)
    unsure_N = found[name]["unsure"]
    assert unsure_N[room_N < 0.97].all()
    assert not unsure_N[room_N > 1.03].any()
    assert int((room_N < 0.97).sum()) > 50
    assert int((room_N > 1.03).sum()) > 10


@pytest.mark.parametrize("name", ["near ties", "near ties, streamed"])
def test_near_ties_would_be_wrong_if_none_were_unsure(found: Found, name: str):
    assert len(wrong_but_sure(found[f"{name}, no slack"], CASES[name]()))


@pytest.mark.parametrize("name", ["twins", "one centroid many times", "tiny"])
def test_frames_of_equal_distances_or_of_underflowing_scores_are_unsure(found: Found, name: str):
    assert found[name]["unsure"].all()


def test_frames_that_are_not_numbers_or_too_far_are_unsure_and_their_codes_lie_in_the_codebook(found: Found):
    odd = found["frames like no other"]
    assert odd["unsure"].tolist() == [True] * 6 + [False]
    assert int(odd["codes"].min()) >= 0
    assert int(odd["codes"].max()) < 30


@pytest.mark.parametrize("name", CASES)
def test_sums_of_some_stages_are_those_of_the_cpu_bit_for_bit(found: Found, name: str):
    frames_ND, centroids_QCD = CASES[name]()
    tables = ResidualQuantizer(centroids_QCD)
    some_QN = tables.encode(frames_ND)[: 1 + len(centroids_QCD) // 2]
    sums_ND = sum(centroids_CD[codes_N] for centroids_CD, codes_N in zip(centroids_QCD, some_QN, strict=False))
    assert torch.equal(found[name]["sums"], sums_ND)
    assert torch.equal(found[name]["sums"], tables.decode(some_QN))


def test_frames_of_another_length_or_precision_are_refused():
    tables = ResidualQuantizer(normal(1, 4, 8, seed=0))
    with pytest.raises(ValueError, match=r"expected \[N, 8\]"):
        quantize_triton.encode_residual(torch.zeros(3, 9), tables)
    with pytest.raises(ValueError, match="float64"):
        quantize_triton.encode_residual(torch.zeros(3, 8, dtype=torch.float64), tables)


def test_a_search_on_a_cpu_imports_no_triton(found: Found):
    assert not found["on the CPU"]["imported"]


def test_a_cpu_has_not_what_the_kernels_need():
    assert not quantize_triton.is_available(torch.device("cpu"))


@pytest.mark.slow
@pytest.mark.parametrize(("capability", "instruction", "room"), [(80, "mma.sync", 163), (90, "wgmma.mma_async", 227)])
def test_all_kernels_compile_for_tensor_cores_and_one_of_each_fits(
    tmp_path: Path, capability: int, instruction: str, room: int
):
    pytest.importorskip("triton")
    env = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, __file__, "compile", str(capability), instruction]
    said = subprocess.run(command, env=env, capture_output=True, text=True, check=True, timeout=270).stdout
    found = [line.split() for line in said.splitlines()]
    assert len(found) == 9
    for kind in ("128", "256", "streamed"):
        assert any(int(used) for used, of, _ in found if of == kind)
        assert min(int(bytes_) for _, of, bytes_ in found if of == kind) < room * 1024
        assert next(int(bytes_) for _, of, bytes_ in found if of == kind) < 99 * 1024


def compile_all(capability: int, instruction: str) -> None:
    """Without a GPU: how often each configuration has the instruction, its kind, the shared memory it takes."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from wavemill.tokenizers import quantize_kernels as kernels

    types = {"codes_ptr": "*i64", "unsure_ptr": "*i8", "high_ptr": "*fp16", "low_ptr": "*fp16"}
    types |= {"near": "fp32", "far": "fp32", "num_frames": "i32", "size": "i32", "dim": "i32"}
    for name, configs in kernels._CONFIGS.items():
        kernel = kernels.search_stage if name == "streamed" else kernels.search_stages
        kind = name.removeprefix("up to ").removesuffix(" dimensions")
        shape = {"padded_size": 1024, "stages": 8, "padded_dim": 768}
        shape["BLOCK_D"] = 64 if kind == "streamed" else int(kind)
        for config in configs:
            constants = {each: value for each, value in {**shape, **config.kwargs}.items() if each in kernel.arg_names}
            signature = {
                each: "constexpr" if each in constants else types.get(each, "*fp32") for each in kernel.arg_names
            }
            divisible = [each for each in kernel.arg_names if each.endswith("_ptr") or each == "dim"]
            built = triton.compile(
                ASTSource(
                    kernel,
                    signature,
                    constexprs=constants,
                    attrs={(kernel.arg_names.index(each),): [["tt.divisibility", 16]] for each in divisible},
                ),
                target=GPUTarget("cuda", capability, 32),
                options={"num_warps": config.num_warps, "num_stages": config.num_stages},
            )
            print(built.asm["ptx"].count(instruction), kind, built.metadata.shared)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    ("num_frames", "stages", "size", "dim"), [(200_000, 8, 1024, 128), (20_001, 4, 2048, 256), (100_000, 2, 500, 768)]
)
def test_on_a_gpu_sure_codes_are_those_of_the_cpu(num_frames: int, stages: int, size: int, dim: int):
    frames_ND, centroids_QCD = of_shape(num_frames, stages, size, dim)
    tables = ResidualQuantizer(centroids_QCD, device="cuda")
    assert quantize_triton.is_available(tables.centroids_QCD.device)
    codes_QN, unsure_N = quantize_triton.encode_residual(frames_ND.cuda(), tables)
    assert (
        wrong_but_sure({"codes": codes_QN.cpu(), "unsure": unsure_N.cpu()}, (frames_ND, centroids_QCD)).tolist() == []
    )
    assert float(unsure_N.float().mean()) < 0.2
    sums_ND = ResidualQuantizer(centroids_QCD).decode(codes_QN.cpu())
    assert torch.equal(quantize_triton.decode_sum(codes_QN, tables).cpu(), sums_ND)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", CASES)
def test_on_a_gpu_every_case_is_as_on_the_cpu(name: str):
    frames_ND, centroids_QCD = CASES[name]()
    codes_QN = ResidualQuantizer(centroids_QCD, device="cuda").encode(frames_ND.cuda())
    finite_N = frames_ND.isfinite().all(dim=1)
    assert torch.equal(codes_QN.cpu()[:, finite_N], ResidualQuantizer(centroids_QCD).encode(frames_ND)[:, finite_N])


if __name__ == "__main__":
    if sys.argv[1] == "compile":
        compile_all(int(sys.argv[2]), sys.argv[3])
    else:
        search_all(sys.argv[1])
