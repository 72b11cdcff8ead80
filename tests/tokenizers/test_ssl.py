"""HuBERT, WavLM, wav2vec 2.0 and data2vec: small, with random weights, against transformers one segment at a time."""

import json
from pathlib import Path

import pytest
import torch
import weights_ssl
from torch import Tensor
from wavemill.tokenizers.quantize import ResidualQuantizer
from wavemill.tokenizers.registry import REGISTRY, describe, load_features
from wavemill.tokenizers.spec import UserError, num_frames
from wavemill.tokenizers.ssl_features import SslFeatures
from wavemill.tokenizers.ssl_windows import plan_windows
from wavemill.tokenizers.tokenizer import Mode, TokenizerConfig

NAMES = [
    name
    for name, entry in REGISTRY.items()
    if name.startswith(("hubert", "wavlm", "wav2vec2", "data2vec")) and entry.layer is not None
]
# post-norm and pre-norm, group and layer norm, with a gated bias and without, one positional convolution and five
KINDS = ["hubert-base", "hubert-large", "wavlm-base", "wavlm-large", "wav2vec2-large-lv60", "data2vec-base"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory):
    """Weights by name and changes, made once."""
    base, folders = tmp_path_factory.mktemp("ssl"), {}

    def make(name: str, **changes) -> Path:
        key = json.dumps([name, changes])
        if key not in folders:
            folders[key] = weights_ssl.make(name, base / str(len(folders)), small=True, **changes)
        return folders[key]

    return make


def open_at(folder: Path, name: str, layer: int | None = None, mode: Mode = Mode.EXACT) -> SslFeatures:
    config = TokenizerConfig(tokenizer=name, weights=str(folder), layer=layer, mode=mode)
    features = load_features(config)
    assert isinstance(features, SslFeatures)
    return features


def require_close(ours_TD: Tensor, theirs_TD: Tensor, tolerance: float = 2e-5) -> None:
    assert ours_TD.shape == theirs_TD.shape
    if theirs_TD.numel():
        assert (ours_TD - theirs_TD).abs().max() <= tolerance * theirs_TD.abs().max()


def noise(length: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(length, generator=generator) * torch.linspace(0, length / 4_000, length).sin() * 0.1


@pytest.mark.parametrize("name", NAMES)
def test_the_default_layer_is_what_transformers_gives(made, name: str):
    folder = made(name)
    for waveform_N in (weights_ssl.speech(3), noise(16_123), noise(400), noise(719), noise(720)):
        require_close(open_at(folder, name).extract(waveform_N), weights_ssl.oracle(folder, waveform_N))


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("do_normalize", [True, False])
def test_every_layer_from_the_first_to_the_last_is_what_transformers_gives(made, name: str, do_normalize: bool):
    folder = made(name, num_hidden_layers=3, preprocessor={"do_normalize": do_normalize})
    waveform_N = weights_ssl.speech(2) + 0.05
    for layer in range(4):
        features = open_at(folder, name, layer)
        require_close(features.extract(waveform_N), weights_ssl.oracle(folder, waveform_N, layer=layer))


@pytest.mark.parametrize("name", KINDS)
def test_k_means_ids_are_those_of_transformers_features(made, name: str):
    folder = made(name)
    waveform_N = weights_ssl.speech(8)
    theirs_TD = weights_ssl.oracle(folder, waveform_N)
    assert theirs_TD.std(dim=0).mean() > 0.2, "frames that are all alike prove nothing"
    quantizer = ResidualQuantizer(theirs_TD[::5][None].clone())
    ours_T = quantizer.encode(open_at(folder, name).extract(waveform_N))[0]
    distances_TC = torch.cdist(theirs_TD.double(), theirs_TD[::5].double()).square()
    nearest_T2 = distances_TC.topk(2, largest=False).values
    near_tie_T = nearest_T2[:, 1] - nearest_T2[:, 0] < 1e-5 * nearest_T2[:, 1]
    differ_T = ours_T != quantizer.encode(theirs_TD)[0]
    assert not (differ_T & ~near_tie_T).any()
    assert near_tie_T.sum() <= 2


@pytest.mark.parametrize("name", [*KINDS, "wav2vec2-large"])
def test_features_in_a_batch_are_those_of_each_alone(made, name: str):
    features = open_at(made(name, num_hidden_layers=3), name, 3)
    generator = torch.Generator().manual_seed(1)
    some = torch.randint(400, 24_000, (4,), generator=generator).tolist()
    waveforms = [noise(length, length) for length in (24_000, 0, 399, 400, 401, 719, 720, *some)]
    alone = [features.extract(waveform_N) for waveform_N in waveforms]
    for padded_length in (24_000, 24_001, 25_333, 32_000):
        for ours_TD, expected_TD in zip(features.extract_batch(waveforms, padded_length), alone, strict=True):
            require_close(ours_TD, expected_TD)
    for i in range(5):
        require_close(features.extract_batch(waveforms[i : i + 1], 30_000)[0], alone[i])


def test_a_batch_keeps_its_size_whoever_is_in_it(made):
    features = open_at(made("hubert-base", num_hidden_layers=2), "hubert-base", 2, Mode.FAST)
    segment_N = noise(9_000)
    with_mates = features.extract_batch([segment_N, noise(12_000), noise(5_000)], 12_000)[0]
    with_silence = features.extract_batch([segment_N, torch.zeros(0), torch.zeros(10)], 12_000)[0]
    with_full = features.extract_batch([segment_N, noise(12_000, 1), noise(12_000, 2)], 12_000)[0]
    assert torch.equal(with_mates, with_silence)
    assert torch.equal(with_mates, with_full)


def test_bfloat16_is_near(made):
    for name in KINDS:
        folder = made(name, num_hidden_layers=3)
        waveform_N = weights_ssl.speech(2)
        theirs_TD = weights_ssl.oracle(folder, waveform_N, layer=3)
        fast = open_at(folder, name, 3, Mode.FAST)
        ours_TD = fast.extract(waveform_N)
        assert ours_TD.dtype == torch.float32
        assert fast.precision == "bfloat16"
        assert 1e-6 < (ours_TD - theirs_TD).norm() / theirs_TD.norm() < 0.06


@pytest.mark.parametrize("name", ["hubert-base", "wavlm-large"])
def test_the_number_of_frames_follows_the_frame_rule_at_every_length(made, name: str):
    features = open_at(made(name, num_hidden_layers=1), name, 1)
    generator = torch.Generator().manual_seed(2)
    lengths = [*range(962), *torch.randint(962, 40_000, (4,), generator=generator).tolist()]
    for begin in range(0, len(lengths), 64):
        waveforms = [torch.zeros(length) for length in lengths[begin : begin + 64]]
        longest = max(lengths[begin : begin + 64])
        for waveform_N, ours_TD in zip(waveforms, features.extract_batch(waveforms, longest), strict=True):
            assert ours_TD.shape == (num_frames(waveform_N.shape[0], features.spec), features.dim)
    for length in (0, 1, 399, 400, 719, 720, 1_039, 1_040):
        assert features.extract(noise(length)).shape == (num_frames(length, features.spec), features.dim)


@pytest.mark.parametrize("name", KINDS)
def test_silence_has_features_and_no_nan(made, name: str):
    folder = made(name)
    features = open_at(folder, name)
    for waveform_N in (torch.zeros(16_000), torch.full((16_000,), 0.25), torch.zeros(400)):
        assert features.extract(waveform_N).isfinite().all()
    require_close(features.extract(torch.zeros(16_000)), weights_ssl.oracle(folder, torch.zeros(16_000)))


def test_where_the_samples_lie_in_memory_does_not_matter(made):
    features = open_at(made("hubert-base", num_hidden_layers=2), "hubert-base", 2)
    waveform_N = noise(20_000)
    expected_TD = features.extract(waveform_N)
    assert torch.equal(features.extract(torch.stack([waveform_N, waveform_N], dim=1)[:, 1]), expected_TD)
    assert torch.equal(features.extract(torch.cat([torch.zeros(3), waveform_N])[3:]), expected_TD)


def test_every_frame_is_in_one_window_with_two_seconds_around_it():
    for total in [*range(4_500), 10_000, 1_800_000]:
        windows = plan_windows(total)
        kept = [(window.keep_begin, window.keep_end) for window in windows]
        assert [0, *(end for _, end in kept)] == [*(begin for begin, _ in kept), total]
        for window in windows:
            last = min(window.first + 1_499, total)
            assert window.first <= window.keep_begin < window.keep_end <= last
            assert window.first == 0 or window.keep_begin - window.first >= 99
            assert last == total or last - window.keep_end >= 99


@pytest.mark.parametrize("num_samples", [480_000, 480_080, 900_123])
@pytest.mark.parametrize("name", ["hubert-base", "hubert-large"])
def test_what_the_transformer_is_given_of_a_long_recording_is_that_of_the_whole(made, name: str, num_samples: int):
    folder = made(name, num_hidden_layers=2)
    waveform_N = noise(num_samples) * torch.linspace(0.1, 1, num_samples) + 0.01
    require_close(open_at(folder, name, 0).extract(waveform_N), weights_ssl.oracle(folder, waveform_N, layer=0))


def test_a_long_recording_comes_in_a_piece_for_each_window_near_the_whole(made):
    folder = made("hubert-base", num_hidden_layers=2)
    features = open_at(folder, "hubert-base", 2)
    waveform_N = weights_ssl.speech(60)
    pieces = list(features.pieces(waveform_N))
    windows = plan_windows(num_frames(waveform_N.shape[0], features.spec))
    assert [piece_TD.shape[0] for piece_TD in pieces] == [window.keep_end - window.keep_begin for window in windows]
    assert torch.equal(torch.cat(pieces), features.extract(waveform_N))
    whole_TD = weights_ssl.oracle(folder, waveform_N, layer=2)
    assert (torch.cat(pieces) - whole_TD).norm() < 0.05 * (whole_TD - whole_TD.mean(dim=0)).norm()


def test_a_long_recording_in_a_batch_is_run_by_itself(made):
    features = open_at(made("hubert-base", num_hidden_layers=1), "hubert-base", 1)
    waveforms = [noise(5_000), noise(500_000)]
    for waveform_N, ours_TD in zip(waveforms, features.extract_batch(waveforms, 500_000), strict=True):
        require_close(ours_TD, features.extract(waveform_N))


def test_what_is_known_without_weights_is_what_they_give(made):
    for name in NAMES:
        described = describe(TokenizerConfig(tokenizer=name, weights=str(made(name))))
        assert described.spec == REGISTRY[name].spec
        assert described.fingerprint["layer"] == str(REGISTRY[name].layer)
        published = json.loads((Path(weights_ssl.__file__).parent / "published" / f"{name}.json").read_text())["model"]
        assert REGISTRY[name].num_layers == published["num_hidden_layers"]


def test_what_cannot_be_had_is_a_mistake_with_a_way_out(made, tmp_path: Path):
    name = "hubert-base"
    folder = made(name, num_hidden_layers=3)
    for layer in (4, -1):
        with pytest.raises(UserError, match=f"hubert-base has layers 0 to 3; layer {layer} was asked for."):
            open_at(folder, name, layer)
    with pytest.raises(UserError, match=r"type 'hubert'.*wavlm-base takes 'wavlm'"):
        open_at(folder, "wavlm-base", 1)
    slow = made(name, preprocessor={"sampling_rate": 8_000})
    with pytest.raises(UserError, match="takes audio at 8000 Hz"):
        open_at(slow, name)
    other_hop = made(name, conv_stride=[5, 2, 2, 2, 2, 2, 1])
    with pytest.raises(UserError, match="frames of 400 samples every 160"):
        open_at(other_hop, name)


def test_the_fingerprint_names_what_is_done_to_the_waveform(made):
    name = "hubert-base"
    normalized = describe(TokenizerConfig(tokenizer=name, weights=str(made(name))))
    plain = describe(TokenizerConfig(tokenizer=name, weights=str(made(name, preprocessor={"do_normalize": False}))))
    assert normalized.fingerprint["weights"] == plain.fingerprint["weights"]
    assert (normalized.fingerprint["normalize"], plain.fingerprint["normalize"]) == ("1e-07", "no")


@pytest.mark.published
@pytest.mark.parametrize("name", NAMES)
def test_published_sizes_give_what_transformers_gives(name: str, tmp_path: Path):
    folder = weights_ssl.make(name, tmp_path / name, small=False)
    waveform_N = weights_ssl.speech(4)
    require_close(open_at(folder, name).extract(waveform_N), weights_ssl.oracle(folder, waveform_N))
