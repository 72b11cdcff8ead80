"""Codebook files, the refusal of those that do not fit, and fitting."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from numpy.typing import NDArray
from wavemill.tokenizers.codebook import Codebook
from wavemill.tokenizers.fit import fit_residual
from wavemill.tokenizers.registry import load_tokenizer
from wavemill.tokenizers.spec import UserError
from wavemill.tokenizers.tokenizer import TokenizerConfig

MEL = TokenizerConfig(tokenizer="mel-rvq")
MEL_HEADER = {"tokenizer": "mel-rvq", "features": "mel-rvq/1"}


def centroids(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def require_sentence(error: BaseException, *words: str) -> None:
    """One message of a line that ends in a full stop and holds the words."""
    message = str(error)
    assert "\n" not in message
    assert message.endswith(".")
    for word in words:
        assert word in message


def test_a_codebook_survives_its_file() -> None:
    header = {**MEL_HEADER, "frames": 12_345, "mean_square_error": [1.5, 0.25], "speakers_left_out": ["Ñandú", "日本"]}
    codebook = Codebook(centroids(8, 64, 160), header)
    again = Codebook.from_bytes(codebook.to_bytes(), name="mine")
    assert torch.equal(again.centroids_QCD, codebook.centroids_QCD)
    assert again.centroids_QCD.dtype == torch.float32
    assert again.header == header
    assert again.sha256 == codebook.sha256
    assert again.to_bytes() == codebook.to_bytes()


def test_a_codebook_that_is_a_view_is_written_as_it_is_read() -> None:
    view_QCD = centroids(5, 4, 3).transpose(0, 2)
    again = Codebook.from_bytes(Codebook(view_QCD, MEL_HEADER).to_bytes(), name="mine")
    assert torch.equal(again.centroids_QCD, view_QCD)
    assert again.sha256 == Codebook(view_QCD, MEL_HEADER).sha256


def test_other_tools_of_safetensors_read_a_codebook() -> None:
    codebook = Codebook(centroids(2, 5, 3), MEL_HEADER)
    tensors = safetensors.torch.load(codebook.to_bytes())
    assert list(tensors) == ["centroids"]
    assert torch.equal(tensors["centroids"], codebook.centroids_QCD)


def test_the_hash_of_a_codebook_is_that_of_its_numbers_and_shape() -> None:
    numbers = centroids(2, 6, 4)
    assert Codebook(numbers, MEL_HEADER).sha256 == Codebook(numbers.clone(), {"seed": 1}).sha256
    assert Codebook(numbers, MEL_HEADER).sha256 != Codebook(numbers.view(2, 4, 6), MEL_HEADER).sha256
    changed = numbers.clone()
    changed[1, 5, 3] = torch.nextafter(changed[1, 5, 3], torch.tensor(10.0))
    assert Codebook(numbers, MEL_HEADER).sha256 != Codebook(changed, MEL_HEADER).sha256


WHOLE = Codebook(centroids(2, 5, 3), MEL_HEADER).to_bytes()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"abc",
        bytes(range(256)) * 8,
        b"<html>" + b" " * 500,
        (20).to_bytes(8, "little") + b"\xff" * 20,
        WHOLE[:8],
        WHOLE[:-4],
        WHOLE + b"more",
        safetensors.torch.save({"weight": centroids(2, 5, 3)}),
        safetensors.torch.save({"centroids": centroids(2, 5, 3)}),
        safetensors.torch.save({"centroids": centroids(2, 5, 3)}, metadata={"format": "pt"}),
        safetensors.torch.save({"centroids": centroids(2, 5, 3)}, metadata={"wavemill": "{"}),
        safetensors.torch.save({"centroids": centroids(2, 5, 3)}, metadata={"wavemill": "[]"}),
        safetensors.torch.save({"centroids": centroids(2, 5, 3)}, metadata={"wavemill": "null"}),
    ],
    ids=[
        "empty",
        "three-bytes",
        "garbage",
        "web-page",
        "not-utf8",
        "header-missing",
        "cut-short",
        "too-long",
        "other-tensors",
        "no-metadata",
        "metadata-of-another-program",
        "broken-json",
        "header-is-a-list",
        "header-is-null",
    ],
)
def test_a_file_that_is_no_codebook_is_refused_in_a_sentence(content: bytes) -> None:
    with pytest.raises(UserError) as caught:
        Codebook.from_bytes(content, name="mine")
    require_sentence(caught.value, "mine", "wavemill codebook fit")


@pytest.mark.parametrize("shape", [(5, 3), (5,), (1, 2, 5, 3)])
def test_centroids_of_another_shape_are_refused_by_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(UserError) as caught:
        Codebook.from_bytes(Codebook(centroids(*shape), MEL_HEADER).to_bytes(), name="mine")
    require_sentence(caught.value, "mine", str(list(shape)), "[stages, size, dimensions]")


@pytest.mark.parametrize(
    ("codebook", "words"),
    [
        (
            Codebook(centroids(1, 5, 160), {"tokenizer": "mfcc-kmeans", "features": "mfcc-kmeans/1"}),
            ("mine", "'mfcc-kmeans'", "'mel-rvq'"),
        ),
        (Codebook(centroids(1, 5, 39), MEL_HEADER), ("mine", "39 dimensions", "160")),
        (Codebook(centroids(1, 5, 160), {**MEL_HEADER, "features": "mel-rvq/0"}), ("mine", "mel-rvq/0", "mel-rvq/1")),
        (Codebook(centroids(1, 5, 160), {"tokenizer": "mel-rvq"}), ("mine", "mel-rvq/1")),
        (Codebook(centroids(1, 5, 160), {}), ("mine", "'mel-rvq'")),
    ],
    ids=["other-tokenizer", "other-dimension", "other-version-of-features", "no-features-named", "no-story"],
)
def test_a_codebook_that_does_not_fit_is_refused_by_the_difference(codebook: Codebook, words: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as caught:
        load_tokenizer(MEL, codebook, codebook_name="mine")
    require_sentence(caught.value, *words, "wavemill codebook fit ROOT mel-rvq")


def test_a_tokenizer_nobody_registered_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(UserError) as caught:
        load_tokenizer(TokenizerConfig(tokenizer="xyz"), Codebook(centroids(1, 5, 160), MEL_HEADER))
    require_sentence(caught.value, "'xyz'", "mel-rvq", "mfcc-kmeans")


def test_the_fingerprint_changes_with_a_single_centroid() -> None:
    numbers = centroids(2, 5, 160)
    changed = numbers.clone()
    changed[1, 4, 159] += 1
    one, two = (
        load_tokenizer(MEL, Codebook(value, MEL_HEADER), codebook_name="mine").fingerprint
        for value in (numbers, changed)
    )
    assert {part for part in one if one[part] != two[part]} == {"codebook"}


def clusters(*, seed: int = 0) -> NDArray[np.float32]:
    """Two thousand frames around sixteen far places."""
    rng = np.random.default_rng(seed)
    places_CD = 10 * rng.standard_normal((16, 8))
    return (places_CD[rng.integers(0, 16, 2_000)] + rng.standard_normal((2_000, 8))).astype(np.float32)


def fit(frames_ND: NDArray[np.float32], **options: Any) -> tuple[torch.Tensor, list[float]]:
    pytest.importorskip("faiss")
    return fit_residual(frames_ND, **{"num_codebooks": 3, "size": 16, "seed": 1, **options})


def test_the_same_seed_gives_the_same_centroids_and_another_seed_others() -> None:
    frames_ND = clusters()
    before = frames_ND.copy()
    first_QCD, errors = fit(frames_ND)
    second_QCD, again = fit(frames_ND)
    assert first_QCD.shape == (3, 16, 8)
    assert torch.equal(first_QCD, second_QCD)
    assert errors == again
    assert not torch.equal(first_QCD, fit(frames_ND, seed=2)[0])
    assert np.array_equal(frames_ND, before)


def test_centroids_are_the_same_on_any_number_of_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    fitted = []
    for cores in (1, 3):
        monkeypatch.setattr(os, "cpu_count", lambda cores=cores: cores)
        fitted.append(fit(clusters())[0])
    assert torch.equal(*fitted)


def test_the_errors_told_are_what_each_stage_leaves() -> None:
    frames_ND = clusters()
    stages = []
    centroids_QCD, errors = fit(frames_ND, on_stage=stages.append)
    residual_ND = frames_ND.astype(np.float64)
    for centroids_CD, error in zip(centroids_QCD.numpy().astype(np.float64), errors, strict=True):
        nearest_N = np.square(residual_ND[:, None] - centroids_CD).sum(axis=2).argmin(axis=1)
        residual_ND = residual_ND - centroids_CD[nearest_N]
        assert error == pytest.approx(np.square(residual_ND).sum(axis=1).mean(), rel=1e-3)
    assert errors == sorted(errors, reverse=True)
    assert stages == [1, 2, 3]


def test_k_means_finds_a_centroid_near_each_frame_of_far_clusters() -> None:
    _, (error,) = fit(clusters(), num_codebooks=1, size=64)
    assert error < 8  # the spread within a cluster: variance 1 in each of 8 dimensions


@pytest.mark.parametrize("num_frames", [0, 1, 15])
def test_fewer_frames_than_centroids_are_refused_with_both_numbers(num_frames: int) -> None:
    with pytest.raises(UserError) as caught:
        fit(clusters()[:num_frames])
    require_sentence(caught.value, f"{num_frames} frames", "16 centroids", "--size")


def test_as_many_frames_as_centroids_are_their_own_centroids() -> None:
    frames_ND = clusters()[:16]
    centroids_QCD, errors = fit(frames_ND)
    assert errors[0] == pytest.approx(0, abs=1e-6)
    assert {tuple(row) for row in centroids_QCD[0].tolist()} == {tuple(row) for row in frames_ND.tolist()}


@pytest.mark.parametrize("value", [0.0, 1.0, -11.513])
def test_identical_frames_do_not_stop_a_fit(value: float) -> None:
    frames_ND = np.full((300, 8), value, dtype=np.float32)
    centroids_QCD, errors = fit(frames_ND)
    assert centroids_QCD.isfinite().all()
    assert max(errors) < 1e-6


@pytest.mark.parametrize("command", ["library", "command line"])
def test_without_faiss_a_sentence_names_what_to_install(command: str, fitted_root: Path) -> None:
    use = (
        "import numpy\n"
        "from wavemill.tokenizers.fit import fit_residual\n"
        "from wavemill.tokenizers.spec import UserError\n"
        "try:\n"
        "    fit_residual(numpy.zeros((9, 3), numpy.float32), num_codebooks=1, size=2, seed=0)\n"
        "except UserError as error:\n"
        "    sys.exit(str(error))\n"
        if command == "library"
        else "from wavemill.jobs.cli import main\n"
        f"sys.argv = ['wavemill', 'codebook', 'fit', {str(fitted_root)!r}, 'mel-rvq', '--name', 'new']\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\nsys.modules['faiss'] = None\n{use}"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "COLUMNS": "1000", "TERM": "dumb"},
    )
    assert done.returncode == (1 if command == "library" else 2)
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, done.stderr
    assert "wavemill[cpu]" in lines[0]
    assert "wavemill[gpu]" in lines[0]
    assert "FAISS" in lines[0]
    assert not (fitted_root / "codebooks" / "new.safetensors").exists()
