"""Codebook files, and the refusal of those that do not fit."""

import pytest
import safetensors.torch
import torch
from wavemill.tokenizers.codebook import Codebook
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
