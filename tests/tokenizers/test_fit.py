"""Codebooks fitted: one, in stages, in groups, jointly refined; what is refused; bounded memory."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import wavemill.tokenizers.fit as fit_module
from numpy.typing import NDArray
from wavemill.tokenizers import kmeans
from wavemill.tokenizers.fit import FitPlan, fit
from wavemill.tokenizers.quantize import open_quantizer
from wavemill.tokenizers.spec import RunFailed, UserError

BACKENDS = ["torch", "faiss"]


def clusters(*, seed: int = 0, num: int = 2_000, dim: int = 8) -> NDArray[np.float32]:
    """Frames around sixteen far places."""
    rng = np.random.default_rng(seed)
    places_CD = 10 * rng.standard_normal((16, dim))
    return (places_CD[rng.integers(0, 16, num)] + rng.standard_normal((num, dim))).astype(np.float32)


def require_sentence(error: BaseException, *words: str) -> None:
    message = str(error)
    assert "\n" not in message
    assert message.endswith(".")
    for word in words:
        assert word in message


def nearest_errors(frames_ND: NDArray[np.float64], centroids_QCD: torch.Tensor) -> list[float]:
    """The mean squared error that each stage leaves, by brute force in float64."""
    errors = []
    for centroids_CD in centroids_QCD.double().numpy():
        nearest_N = np.square(frames_ND[:, None] - centroids_CD).sum(axis=2).argmin(axis=1)
        frames_ND = frames_ND - centroids_CD[nearest_N]
        errors.append(np.square(frames_ND).sum(axis=1).mean())
    return errors


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_same_seed_gives_the_same_centroids_and_another_seed_others(backend: str) -> None:
    frames_ND = clusters()
    before = frames_ND.copy()
    first, second, other = (
        fit(frames_ND, FitPlan(size=16, num_stages=3, seed=seed, backend=backend)) for seed in (1, 1, 2)
    )
    assert first.centroids_KCE.shape == (3, 16, 8)
    assert torch.equal(first.centroids_KCE, second.centroids_KCE)
    assert (first.errors, first.curves, first.cluster_sizes) == (second.errors, second.curves, second.cluster_sizes)
    assert not torch.equal(first.centroids_KCE, other.centroids_KCE)
    assert np.array_equal(frames_ND, before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_centroids_are_the_same_on_any_number_of_cores(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    frames_ND = np.random.default_rng(0).standard_normal((6_000, 260)).astype(np.float32)
    plan = FitPlan(size=30, num_stages=2, groups=2, refine=backend == "torch", backend=backend)
    fitted = []
    for cores in (1, 3):
        monkeypatch.setattr(kmeans, "num_cores", lambda cores=cores: cores)
        monkeypatch.setattr(fit_module, "num_cores", lambda cores=cores: cores)
        monkeypatch.setattr(kmeans, "_BLOCK_BYTES", 1 << 20)  # several for each core
        fitted.append(fit(frames_ND, plan).centroids_KCE)
    assert torch.equal(*fitted)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("refine", [False, True])
def test_the_errors_told_are_what_each_stage_leaves(backend: str, refine: bool) -> None:
    frames_ND = clusters()
    told: list[tuple[int, int]] = []
    plan = FitPlan(size=16, num_stages=3, refine=refine, backend=backend)
    fitted = fit(frames_ND, plan, on_progress=lambda done, total: told.append((done, total)))
    assert fitted.errors == pytest.approx(nearest_errors(frames_ND.astype(np.float64), fitted.centroids_KCE), rel=1e-4)
    assert fitted.errors == sorted(fitted.errors, reverse=True)
    assert told == [(1, 3), (2, 3), (3, 3)]
    assert [sum(sizes) for sizes in fitted.cluster_sizes] == [2_000] * 3
    codes_KN = open_quantizer(fitted.centroids_KCE).encode(torch.from_numpy(frames_ND))
    assert [codes_N.bincount(minlength=16).tolist() for codes_N in codes_KN] == fitted.cluster_sizes


@pytest.mark.parametrize("backend", BACKENDS)
def test_k_means_finds_each_of_far_clusters(backend: str) -> None:
    [error] = fit(clusters(), FitPlan(size=16, backend=backend)).errors
    assert error < 8.2  # the spread within a cluster: variance 1 in each of 8 dimensions


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_curve_falls_to_the_error(backend: str) -> None:
    fitted = fit(
        np.random.default_rng(0).standard_normal((3_000, 8)).astype(np.float32), FitPlan(size=40, backend=backend)
    )
    [curve] = fitted.curves
    assert len(curve) > 2
    assert curve == sorted(curve, reverse=True)
    assert fitted.errors[0] == pytest.approx(curve[-1], rel=0.01)


def test_groups_are_fitted_each_for_itself() -> None:
    frames_ND = np.concatenate([clusters(seed=1), 3 * clusters(seed=2)], axis=1)
    fitted = fit(frames_ND, FitPlan(size=16, num_stages=2, groups=2))
    assert fitted.centroids_KCE.shape == (4, 16, 8)
    for group, columns in enumerate((slice(0, 8), slice(8, 16))):
        own = nearest_errors(frames_ND[:, columns].astype(np.float64), fitted.centroids_KCE[2 * group : 2 * group + 2])
        assert fitted.errors[2 * group : 2 * group + 2] == pytest.approx(own, rel=1e-4)
    quantizer = open_quantizer(fitted.centroids_KCE, groups=2)
    frames = torch.from_numpy(frames_ND)
    left = (frames - quantizer.decode(quantizer.encode(frames))).square().sum(dim=1).mean()
    assert float(left) == pytest.approx(fitted.errors[1] + fitted.errors[3], rel=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_spherical_centroids_are_directions_however_long_the_frames_are(backend: str) -> None:
    frames_ND = clusters()
    lengths_N = np.random.default_rng(3).uniform(0.1, 50, len(frames_ND)).astype(np.float32)
    fitted = fit(frames_ND * lengths_N[:, None], FitPlan(size=16, spherical=True, backend=backend))
    assert torch.allclose(fitted.centroids_KCE.norm(dim=2), torch.ones(1, 16), atol=1e-5)
    directions_ND = frames_ND / np.linalg.norm(frames_ND, axis=1, keepdims=True)
    cosines_N = (directions_ND @ fitted.centroids_KCE[0].numpy().T).max(axis=1)
    assert fitted.errors[0] == pytest.approx(float((1 - cosines_N).mean()), rel=1e-3)
    assert fitted.curves[0][-1] == pytest.approx(fitted.errors[0], rel=0.02)


def test_refined_stages_leave_less_than_the_stages_alone() -> None:
    frames_ND = np.random.default_rng(0).standard_normal((4_000, 6)).astype(np.float32)
    plain, refined = (fit(frames_ND, FitPlan(size=16, num_stages=4, refine=refine)) for refine in (False, True))
    [told] = refined.refinements
    assert told.before == plain.errors[-1]
    assert told.kept
    assert refined.errors[-1] == told.after < plain.errors[-1]


def test_a_refinement_that_does_not_help_is_not_kept() -> None:
    frames_ND = clusters()[:16]  # their own centroids: nothing is left to gain
    fitted = fit(frames_ND, FitPlan(size=16, num_stages=2, refine=True))
    [told] = fitted.refinements
    assert not told.kept
    assert torch.equal(fitted.centroids_KCE, fit(frames_ND, FitPlan(size=16, num_stages=2)).centroids_KCE)


@pytest.mark.parametrize("backend", BACKENDS)
def test_as_many_frames_as_centroids_are_their_own_centroids(backend: str) -> None:
    frames_ND = clusters()[:16]
    fitted = fit(frames_ND, FitPlan(size=16, num_stages=3, backend=backend))
    assert fitted.errors[0] == pytest.approx(0, abs=1e-6)
    found_CD = fitted.centroids_KCE[0].numpy()
    assert np.allclose(found_CD[np.lexsort(found_CD.T)], frames_ND[np.lexsort(frames_ND.T)], atol=1e-5)
    assert fitted.centroids_KCE.isfinite().all()


def test_frames_that_are_rare_are_found_among_many_that_are_alike() -> None:
    frames_ND = np.zeros((40_000, 8), dtype=np.float32)
    frames_ND[::4_000] = 10 * np.random.default_rng(0).standard_normal((10, 8))
    fitted = fit(frames_ND, FitPlan(size=11))
    assert fitted.errors[0] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("num_frames", [0, 1, 15])
def test_fewer_frames_than_centroids_are_refused_with_both_numbers(num_frames: int) -> None:
    with pytest.raises(UserError) as caught:
        fit(clusters()[:num_frames], FitPlan(size=16))
    require_sentence(caught.value, f"{num_frames} frames", "16 centroids", "--size")


@pytest.mark.parametrize("value", [0.0, 1.0, -11.513])
def test_identical_frames_are_refused_by_what_was_found(value: float) -> None:
    with pytest.raises(UserError) as caught:
        fit(np.full((300, 8), value, dtype=np.float32), FitPlan(size=2))
    require_sentence(caught.value, "1 distinct", "300", "2 centroids")


def test_distinct_frames_are_counted_in_each_group_and_by_direction() -> None:
    frames_ND = clusters()
    with pytest.raises(UserError) as caught:
        fit(np.concatenate([frames_ND, np.tile(frames_ND[:7], (286, 1))[:2_000]], axis=1), FitPlan(size=8, groups=2))
    require_sentence(caught.value, "7 distinct", "group 2 of 2")
    scaled_ND = np.outer(2.0 ** np.arange(20), frames_ND[0]).astype(np.float32)
    with pytest.raises(UserError) as caught:
        fit(scaled_ND, FitPlan(size=2, spherical=True))
    require_sentence(caught.value, "1 distinct directions")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30])
def test_frames_that_are_not_numbers_are_refused_by_how_many(value: float) -> None:
    frames_ND = clusters()
    frames_ND[[7, 1_500, 1_999], [0, 3, 7]] = value
    with pytest.raises(UserError) as caught:
        fit(frames_ND, FitPlan(size=16))
    require_sentence(caught.value, "3 of 2,000 frames", "frame 7")


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (FitPlan(size=16, groups=3), ("8 dimensions", "3", "--groups")),
        (FitPlan(size=0), ("--size", "0")),
        (FitPlan(size=16, num_stages=0), ("--num-codebooks", "0")),
        (FitPlan(size=16, groups=-1), ("--groups", "-1")),
        (FitPlan(size=16, num_stages=2, spherical=True), ("--spherical", "2 stages")),
        (FitPlan(size=16, backend="numpy"), ("'numpy'", "faiss", "torch")),
    ],
)
def test_a_plan_that_nothing_fits_is_refused(plan: FitPlan, words: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as caught:
        fit(clusters(), plan)
    require_sentence(caught.value, *words)


@pytest.fixture
def mapped(tmp_path: Path) -> Callable[[NDArray[np.float32]], np.memmap]:
    """Writes frames to a file, and maps it."""

    def write(frames_ND: NDArray[np.float32]) -> np.memmap:
        np.save(tmp_path / "frames.npy", frames_ND)
        return np.load(tmp_path / "frames.npy", mmap_mode="r")

    return write


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_memory_map_gives_what_the_array_gives_and_leaves_nothing_beside_it(
    mapped: Callable[[NDArray[np.float32]], np.memmap], tmp_path: Path, backend: str
) -> None:
    frames_ND = clusters()
    plan = FitPlan(size=16, num_stages=2, groups=2, refine=True, backend=backend)
    assert torch.equal(fit(mapped(frames_ND), plan).centroids_KCE, fit(frames_ND, plan).centroids_KCE)
    assert [path.name for path in tmp_path.iterdir()] == ["frames.npy"]


@pytest.mark.slow
def test_a_fit_holds_a_part_of_a_memory_map_at_a_time(tmp_path: Path) -> None:
    """1.2 GB of frames with 400 MB more memory than the imports take, mapped files not counted."""
    num, dim = 300_000, 1_024
    frames_ND = np.lib.format.open_memmap(tmp_path / "frames.npy", "w+", np.float32, (num, dim))
    rng = np.random.default_rng(0)
    for begin in range(0, num, 10_000):
        frames_ND[begin : begin + 10_000] = rng.standard_normal((10_000, dim), dtype=np.float32)
    frames_ND.flush()
    code = (
        "import resource, sys, numpy as np, torch\n"
        "from wavemill.tokenizers.fit import FitPlan, fit\n"
        "torch.randn(2_000, 2_000) @ torch.randn(2_000, 2_000)\n"
        "def private(): return next(int(line.split()[1]) for line in open('/proc/self/status') if 'RssAnon' in line)\n"
        "import threading, time\n"
        "before, most, done = private(), [0], threading.Event()\n"
        "def watch():\n"
        "    while not done.wait(0.02): most[0] = max(most[0], private())\n"
        "thread = threading.Thread(target=watch); thread.start()\n"
        "fitted = fit(np.load(sys.argv[1], mmap_mode='r'), FitPlan(size=32, num_stages=2))\n"
        "done.set(); thread.join()\n"
        "print((most[0] - before) // 1024)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "frames.npy")],
        capture_output=True,
        text=True,
        check=True,
        timeout=900,
    )
    assert int(done.stdout) < 400


def test_a_full_disk_is_told_before_a_fit_writes_to_the_map(
    mapped: Callable[[NDArray[np.float32]], np.memmap], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: int, start: int, size: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(RunFailed) as caught:  # no mistake, so what was sampled is kept
        fit(mapped(clusters()), FitPlan(size=16, num_stages=2))
    require_sentence(caught.value, "no room", str(tmp_path), "No space left", "--budget")
    assert [path.name for path in tmp_path.iterdir()] == ["frames.npy"]


@pytest.mark.slow
def test_without_faiss_a_sentence_names_what_to_install_and_torch_fits() -> None:
    code = (
        "import sys; sys.modules['faiss'] = None\n"
        "import numpy as np\n"
        "from wavemill.tokenizers.fit import FitPlan, fit\n"
        "from wavemill.tokenizers.spec import UserError\n"
        "frames = np.arange(27, dtype=np.float32).reshape(9, 3)\n"
        "print(fit(frames, FitPlan(size=2)).backend)\n"
        "try:\n"
        "    fit(frames, FitPlan(size=2, backend='faiss'))\n"
        "except UserError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    backend, sentence = done.stdout.splitlines()
    assert backend == "torch"
    assert "wavemill[cpu]" in sentence
    assert "wavemill[gpu]" in sentence
