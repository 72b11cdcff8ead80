"""Speaker embeddings: against transformers' WavLMForXVector, one segment at a time."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import weights_ssl
import weights_xvector
from torch import Tensor
from wavemill.tokenizers.published import published_encoder
from wavemill.tokenizers.registry import REGISTRY, describe, load_features, load_tokenizer
from wavemill.tokenizers.spec import FrameRule, UserError, num_frames
from wavemill.tokenizers.tokenizer import Output, TokenizerConfig
from wavemill.tokenizers.xvector import XVector

NAME = "wavlm-sv"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return weights_xvector.make(NAME, tmp_path_factory.mktemp("xvector") / "w", small=True)


def opened(folder: Path) -> XVector:
    return load_features(TokenizerConfig(tokenizer=NAME, weights=str(folder)))


def require_close(ours_1E: Tensor, theirs_1E: Tensor) -> None:
    assert ours_1E.shape == theirs_1E.shape
    assert (ours_1E - theirs_1E).abs().max() <= 1e-5 * theirs_1E.abs().max()


@pytest.mark.parametrize(
    "changes",
    [{}, {"use_weighted_layer_sum": False}, {"use_weighted_layer_sum": False, "do_stable_layer_norm": True}],
    ids=["layers-summed", "last-layer", "last-layer-normed-first"],
)
def test_the_embedding_is_transformers_own(changes: dict, tmp_path: Path):
    weights = weights_xvector.make(NAME, tmp_path / "w", small=True, **changes)
    model, spec = opened(weights), REGISTRY[NAME].spec
    vectors = []
    for num_samples in (spec.window_length, spec.window_length + 319, 16_000, 48_123):
        waveform_N = weights_ssl.speech(4)[:num_samples]
        vectors.append(weights_xvector.oracle(weights, waveform_N))
        require_close(model.extract(waveform_N), vectors[-1])
    assert torch.cat(vectors).std(dim=0).mean() > 0.01, "vectors that are all alike prove nothing"


def test_the_shortest_segment_with_a_vector_is_the_published_models_shortest(folder: Path):
    spec = REGISTRY[NAME].spec
    shortest_N = weights_ssl.speech(1)[: spec.window_length]
    assert weights_xvector.oracle(folder, shortest_N).isfinite().all()
    assert not weights_xvector.oracle(folder, shortest_N[:-1]).isfinite().any()  # of one frame there is no deviation
    assert opened(folder).extract(shortest_N[:-1]).shape == (0, 16)
    assert num_frames(spec.window_length, spec) == 1
    assert num_frames(spec.window_length - 1, spec) == 0


def test_a_segment_has_the_same_vector_in_a_batch_as_alone(folder: Path):
    model = opened(folder)
    waveforms = [weights_ssl.speech(3)[:length] for length in (48_000, 0, 399, 5_199, 5_200, 20_001)]
    for padded_length in (48_000, 48_777):
        for ours_1E, segment_N in zip(model.extract_batch(waveforms, padded_length), waveforms, strict=True):
            alone_1E = model.extract(segment_N)
            assert ours_1E.shape == alone_1E.shape
            if len(alone_1E):
                require_close(ours_1E, alone_1E)


def test_a_long_segments_vector_is_of_all_its_frames(folder: Path):
    """Its layers are run in windows, so it is not quite the published model's; of half a segment it is far off."""
    waveform_N = weights_ssl.speech(40)
    whole_1E = weights_xvector.oracle(folder, waveform_N)
    windowed, half = opened(folder).extract(waveform_N), opened(folder).extract(waveform_N[: 20 * 16_000])
    assert (windowed - whole_1E).norm() < 0.01 * whole_1E.norm()
    assert (half - whole_1E).norm() > 3 * (windowed - whole_1E).norm()


def test_a_stream_of_embeddings_has_one_row_of_numbers_a_segment(folder: Path):
    tokenizer = load_tokenizer(TokenizerConfig(tokenizer=NAME, weights=str(folder)))
    assert tokenizer.spec.frame_rule is FrameRule.ONE
    assert tokenizer.spec.dim == 16
    waveform_N = weights_ssl.speech(2)
    tokens = tokenizer.tokens(waveform_N)
    torch.testing.assert_close(tokens.frames_TD, weights_xvector.oracle(folder, waveform_N).half())


def test_what_checks_compare_with_gives_the_same_vector(folder: Path):
    encoder = published_encoder(describe(TokenizerConfig(tokenizer=NAME, weights=str(folder))))
    assert encoder is not None
    waveform_N = weights_ssl.speech(2)
    with torch.inference_mode():
        assert torch.equal(encoder(waveform_N), weights_xvector.oracle(folder, waveform_N))


def test_the_registry_says_what_the_published_configuration_gives(folder: Path, tmp_path: Path):
    copied = Path(shutil.copytree(folder, tmp_path / "w"))
    published = json.loads((Path(weights_xvector.__file__).parent / "published" / f"{NAME}.json").read_text())
    (copied / "config.json").write_text(json.dumps(published["model"]))
    described = describe(TokenizerConfig(tokenizer=NAME, weights=str(copied)))
    assert described.spec == REGISTRY[NAME].spec
    assert described.dim == 512


def test_models_without_the_speaker_head_are_refused(tmp_path: Path):
    plain = weights_ssl.make("wavlm-base", tmp_path / "plain", small=True, num_hidden_layers=1)
    with pytest.raises(UserError, match=r"holds a WavLMModel .*; wavlm-sv takes a WavLMForXVector"):
        opened(plain)
    fields = json.loads((plain / "config.json").read_text())
    (plain / "config.json").write_text(json.dumps({**fields, "architectures": None}))
    with pytest.raises(UserError, match=r"lack [0-9]+ of the parameters of WavLMForXVector"):
        opened(plain)


def test_a_vector_of_a_segment_is_not_reduced(folder: Path):
    asked = TokenizerConfig(tokenizer=NAME, weights=str(folder), output=Output.FEATURES, reduce="mean:2")
    with pytest.raises(UserError, match="wavlm-sv gives one vector a segment: leave out reduce"):
        load_tokenizer(asked)


@pytest.mark.published
def test_published_size_gives_what_transformers_gives(tmp_path: Path):
    weights = weights_xvector.make(NAME, tmp_path / "w", small=False)
    waveform_N = weights_ssl.speech(6)
    require_close(opened(weights).extract(waveform_N), weights_xvector.oracle(weights, waveform_N))
