"""Features kept as numbers: what each reduction gives, on which clock, and sound from the frames."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import weights_ssl
import weights_xvector
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from wavemill.tokenizers.continuous import ContinuousTokenizer
from wavemill.tokenizers.ctc import CtcLabels, find_ctc
from wavemill.tokenizers.reduction import merge_runs, parse_reduction, reduce_frames, reduce_pieces, reduced_spec
from wavemill.tokenizers.registry import REGISTRY, describe_tokenizer, load_features, load_tokenizer
from wavemill.tokenizers.spec import FrameRule, StreamSpec, UserError, num_frames
from wavemill.tokenizers.tokenizer import Output, TokenizerConfig

WAYS = ("stack", "stride", "mean")


@pytest.fixture(scope="module")
def hubert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return weights_ssl.make("hubert-base", tmp_path_factory.mktemp("hubert") / "w", small=True, num_hidden_layers=2)


@pytest.fixture(scope="module")
def guides(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Small CTC models that norm last and first, with a gated bias and without."""
    base = tmp_path_factory.mktemp("ctc")
    names = ("hubert-base", "wavlm-large", "wav2vec2-large-lv60")
    return {name: weights_xvector.make_ctc(name, base / name) for name in names}


def config(folder: Path, **asked) -> TokenizerConfig:
    return TokenizerConfig(tokenizer="hubert-base", weights=str(folder), layer=2, **asked)


def frames(num: int, dim: int, seed: int = 0) -> Tensor:
    return torch.randn(num, dim, generator=torch.Generator().manual_seed(seed))


def by_hand(frames_TD: np.ndarray, way: str, by: int, rule: FrameRule) -> np.ndarray:
    """Group by group, as the words of `reduce_frames` say."""
    groups = [frames_TD[begin : begin + by] for begin in range(0, len(frames_TD), by)]
    if rule is FrameRule.FLOOR:
        groups = [group_KD for group_KD in groups if len(group_KD) == by]
    made = []
    for group_KD in groups:
        if way == "stack":
            row = np.zeros(by * frames_TD.shape[1], dtype=np.float32)
            row[: group_KD.size] = group_KD.ravel()
        else:
            row = group_KD[0] if way == "stride" else group_KD.astype(np.float64).mean(axis=0)
        made.append(row)
    width = frames_TD.shape[1] * (by if way == "stack" else 1)
    return np.array(made, dtype=np.float32).reshape(-1, width)


@pytest.mark.parametrize("rule", [FrameRule.FLOOR, FrameRule.CEIL])
@pytest.mark.parametrize("way", WAYS)
def test_reductions_are_what_they_say_for_whole_and_short_groups(way: str, rule: FrameRule):
    for num in (0, 1, 2, 3, 4, 5, 7, 8, 23, 24):
        for by in (2, 3, 5, 24):
            frames_TD = frames(num, 3, num)
            expected = by_hand(frames_TD.numpy(), way, by, rule)
            reduction = parse_reduction(f"{way}:{by}")
            found = reduce_frames(frames_TD, reduction, rule)
            np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-6)
            for sizes in ((num,), (1, num - 1), (5, 0, num - 5), (1,) * num):
                if min(sizes, default=0) >= 0:
                    pieces = reduce_pieces(frames_TD.split(list(sizes)), reduction, rule)
                    joined = torch.cat([frames(0, expected.shape[1]), *pieces])
                    np.testing.assert_allclose(joined.numpy(), expected, rtol=0, atol=1e-6)


@given(st.integers(0, 60_000), st.integers(1, 400), st.integers(1, 900), st.integers(2, 64), st.sampled_from(FrameRule))
def test_the_reduced_clock_counts_the_groups_of_every_length(
    num_samples: int, hop: int, window: int, by: int, rule: FrameRule
):
    if rule not in (FrameRule.FLOOR, FrameRule.CEIL):
        return
    spec = StreamSpec(
        tokenizer="any",
        sample_rate=16_000,
        decode_sample_rate=0,
        hop_length=hop,
        window_length=window if rule is FrameRule.FLOOR else 1,
        frame_rule=rule,
        num_codebooks=0,
        codebook_size=1,
        dim=2,
    )
    num = num_frames(num_samples, spec)
    kept = reduce_frames(torch.zeros(num, 2), parse_reduction(f"stride:{by}"), rule).shape[0]
    assert num_frames(num_samples, reduced_spec(spec, by)) == kept


@given(st.lists(st.integers(0, 3), max_size=40), st.lists(st.integers(0, 7), max_size=6))
def test_runs_of_labels_are_merged_whatever_the_pieces(labels: list[int], sizes: list[int]):
    frames_TD = frames(len(labels), 2, len(labels))
    expected, durations = [], []
    for place, label in enumerate(labels):
        if place and label == labels[place - 1]:
            expected[-1].append(place)
        else:
            expected.append([place])
    runs = [run for run in expected if labels[run[0]] != 0]
    means = np.array([frames_TD[run].double().mean(dim=0).numpy() for run in runs]).reshape(-1, 2)
    durations = [len(run) for run in runs]
    ends = [min(sum(sizes[: i + 1]), len(labels)) for i in range(len(sizes))]
    pieces = [frames_TD[begin:end] for begin, end in zip([0, *ends], [*ends, len(labels)], strict=True)]
    merged = list(merge_runs(pieces, torch.tensor(labels, dtype=torch.int64), (0,)))
    found_RD = torch.cat([frames(0, 2), *(frames_RD for frames_RD, _ in merged)])
    assert [size for _, sizes_R in merged for size in sizes_R.tolist()] == durations
    np.testing.assert_allclose(found_RD.numpy(), means, rtol=0, atol=1e-6)


def test_a_stack_is_the_features_side_by_side_and_an_embedding_their_mean(hubert: Path):
    waveform_N = weights_ssl.speech(3)
    features_TD = weights_ssl.oracle(hubert, waveform_N, layer=2)
    whole = load_tokenizer(config(hubert, output=Output.FEATURES)).tokens(waveform_N)
    assert whole.frames_TD.dtype == torch.float16
    torch.testing.assert_close(whole.frames_TD.float(), features_TD, rtol=1e-3, atol=1e-3)
    stacked = load_tokenizer(config(hubert, output=Output.FEATURES, reduce="stack:2"))
    tokens = stacked.tokens(waveform_N)
    assert stacked.spec.dim == 2 * features_TD.shape[1]
    assert stacked.spec.frame_rate == 25
    assert tokens.num_frames == num_frames(len(waveform_N), stacked.spec) == features_TD.shape[0] // 2
    assert torch.equal(tokens.frames_TD[5], whole.frames_TD[10:12].flatten())
    embedding = load_tokenizer(config(hubert, output=Output.EMBEDDING))
    mean_1D = embedding.tokens(waveform_N).frames_TD
    torch.testing.assert_close(mean_1D[0].float(), features_TD.mean(dim=0), rtol=1e-3, atol=1e-3)
    for num_samples, vectors in ((0, 0), (399, 0), (400, 1), (720, 1)):
        tokens = embedding.tokens(waveform_N[:num_samples])
        assert tokens.frames_TD.shape == (vectors, embedding.spec.dim)
        assert tokens.num_frames == vectors == num_frames(num_samples, embedding.spec)


def test_numbers_beyond_float16_are_its_largest_and_no_infinity():
    class Loud:
        spec, dim, fingerprint, precision = REGISTRY["mel-rvq"].spec, 2, {}, "float32"

        def extract(self, waveform_N: Tensor) -> Tensor:
            return torch.tensor([[1e9, -1e9], [65_504.0, 1.5]])

    described = describe_tokenizer(TokenizerConfig(tokenizer="mel-rvq", output=Output.FEATURES), None)
    described = replace(described, spec=replace(described.spec, dim=2))
    tokens = ContinuousTokenizer(Loud(), described).tokens(torch.zeros(640))  # pyright: ignore[reportArgumentType]
    assert tokens.frames_TD is not None
    assert tokens.frames_TD.tolist() == [[65_504.0, -65_504.0], [65_504.0, 1.5]]


def test_frames_of_mel_are_sound_again_and_reduced_ones_are_not():
    waveform_N = weights_ssl.speech(2)
    whole = load_tokenizer(TokenizerConfig(tokenizer="mel-rvq", output=Output.FEATURES))
    assert whole.spec.decode_sample_rate == 16_000
    tokens = whole.tokens(waveform_N)
    sound_N = whole.decode_tokens(tokens)
    features = load_features(TokenizerConfig(tokenizer="mel-rvq"))
    again_TD = features.extract(sound_N)
    assert (again_TD - tokens.frames_TD.float()).abs().mean() < 0.35
    halved = load_tokenizer(TokenizerConfig(tokenizer="mel-rvq", output=Output.FEATURES, reduce="mean:2"))
    assert halved.spec.decode_sample_rate == 0
    with pytest.raises(UserError, match="mel-rvq has no decoder for these frames"):
        halved.decode_tokens(halved.tokens(waveform_N))


def test_labels_are_those_of_transformers_ctc_models(guides: dict[str, Path]):
    waveform_N = weights_ssl.speech(5)
    for name, folder in guides.items():
        labels_T = CtcLabels(find_ctc(str(folder), TokenizerConfig(tokenizer="hubert-base"))).labels(waveform_N)
        expected_T = weights_xvector.oracle(folder, waveform_N)
        assert (labels_T == expected_T).float().mean() > 0.99, name  # scores of random weights are near each other
        assert len(set(expected_T.tolist())) > 5, "labels that are all alike prove nothing"


def test_ctc_merges_the_runs_of_its_labels_and_drops_blanks(hubert: Path, guides: dict[str, Path]):
    tokenizer = load_tokenizer(config(hubert, output=Output.FEATURES, reduce=f"ctc:{guides['hubert-base']}"))
    spec = tokenizer.spec
    assert (spec.frame_rule, spec.durations, spec.hop_length, spec.bits_per_second) == (FrameRule.FREE, True, 320, 0)
    waveforms = [weights_ssl.speech(4), weights_ssl.speech(3)[8_000:], torch.zeros(0), torch.zeros(399)]
    alone = [tokenizer.tokens(waveform_N) for waveform_N in waveforms]
    labels_T = weights_xvector.oracle(guides["hubert-base"], waveforms[0])
    features_TD = weights_ssl.oracle(hubert, waveforms[0], layer=2)
    expected_RD = torch.cat([frames_RD for frames_RD, _ in merge_runs([features_TD], labels_T, (0,))])
    torch.testing.assert_close(alone[0].frames_TD.float(), expected_RD, rtol=1e-3, atol=2e-3)
    assert 0 < alone[0].num_frames < len(labels_T)
    assert int(alone[0].durations_T.sum()) == int((labels_T != 0).sum())
    assert [tokens.num_frames for tokens in alone[2:]] == [0, 0]
    for tokens, other in zip(tokenizer.tokens_batch(waveforms, 70_000), alone, strict=True):
        assert torch.equal(tokens.durations_T, other.durations_T)
        torch.testing.assert_close(tokens.frames_TD, other.frames_TD, rtol=2e-3, atol=2e-3)


def test_the_fingerprint_of_merged_frames_names_the_ctc_weights_and_not_their_place(
    hubert: Path, guides: dict[str, Path], tmp_path: Path
):
    def fingerprint(folder: Path) -> dict[str, str]:
        asked = config(hubert, output=Output.FEATURES, reduce=f"ctc:{folder}")
        return describe_tokenizer(asked, None).fingerprint

    moved = tmp_path / "moved"
    moved.symlink_to(guides["hubert-base"])
    assert fingerprint(moved) == fingerprint(guides["hubert-base"])
    other = fingerprint(guides["wavlm-large"])
    assert other["ctc_weights"] != fingerprint(moved)["ctc_weights"]


def test_what_cannot_be_reduced_is_a_mistake_with_a_way_out(hubert: Path, guides: dict[str, Path], tmp_path: Path):
    def describe(tokenizer: str = "hubert-base", output: Output | None = Output.FEATURES, **asked) -> None:
        weights = None if tokenizer in ("mel-rvq", "mfcc-kmeans") else str(hubert)
        describe_tokenizer(TokenizerConfig(tokenizer=tokenizer, weights=weights, output=output, **asked), None)

    for text in ("stack", "stack:1", "stack:65", "fold:2", "ctc:", "mean:x", "stack:2:3"):
        with pytest.raises(UserError, match="expected stack:K, stride:K or mean:K with K from 2 to 64, or ctc:"):
            describe(layer=2, reduce=text)
    with pytest.raises(UserError, match="it needs output=features"):
        describe_tokenizer(TokenizerConfig(tokenizer="mel-rvq", output=Output.EMBEDDING, reduce="mean:2"), None)
    with pytest.raises(UserError, match=r"mel-rvq has frames of 1 samples every 320 at 16,000 Hz .ceil.; reduce=ctc"):
        describe("mel-rvq", reduce=f"ctc:{guides['hubert-base']}")
    with pytest.raises(UserError, match=r"holds HubertModel of type 'hubert'.*takes one of: HubertForCTC"):
        describe(layer=2, reduce=f"ctc:{hubert}")
    with pytest.raises(UserError, match=r"There is neither a folder|There is no folder"):
        describe(layer=2, reduce=f"ctc:{tmp_path / 'none'}")
    without = tmp_path / "blank"
    without.mkdir()
    for file in guides["hubert-base"].iterdir():
        (without / file.name).symlink_to(file)
    (without / "config.json").unlink()
    fields = json.loads((guides["hubert-base"] / "config.json").read_text())
    (without / "config.json").write_text(json.dumps({**fields, "pad_token_id": 99}))
    with pytest.raises(UserError, match="its blank is label 99 of 12"):
        describe(layer=2, reduce=f"ctc:{without}")
