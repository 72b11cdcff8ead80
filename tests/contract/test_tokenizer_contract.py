"""What every tokenizer must keep, whatever it is made of: the same codes for the same samples, on its clock.

Published architectures run small, with random weights; those of published sizes behind the marker `published`.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import STREAMS
from random_weights import CODED, PUBLISHED, make_weights, open_published, oracle, published_name
from safetensors.torch import save_file
from torch import Tensor
from wavemill.pipelines.streams import load_stream_tokenizer
from wavemill.storage.root import Root
from wavemill.tokenizers.compare import compare_all
from wavemill.tokenizers.registry import REGISTRY, CodebookTokenizer, describe
from wavemill.tokenizers.spec import decoded_samples, num_frames
from wavemill.tokenizers.tokenizer import BatchFeatures, Tokenizer, TokenizerConfig

CONFIGURATIONS = Path(__file__).resolve().parents[1] / "published"
BASELINES = {stream.tokenizer.tokenizer: stream for stream in STREAMS}
# of models that differ in size alone, one is enough most of the time
EACH_KIND = {
    *("hubert-base", "wavlm-large", "data2vec-base", "w2v-bert-2-25hz", "whisper-tiny", "wav2vec2-codes"),
    *("encodec-24khz", "encodec-48khz", "mimi", "dac-16khz"),
    *("xcodec", "higgs-audio-v2"),
    "xcodec2",
    *("speechtokenizer", "snac-24khz", "lyra"),
    *("pocket-tts-latents", "vibevoice-latents"),
}
COMPILED = {"lyra", "lyra-latents"}  # networks in files that are what they are: of one size, without a configuration
CASES = [
    *((name, True) for name in BASELINES),
    *(pytest.param((name, True), marks=() if name in EACH_KIND else pytest.mark.slow) for name in CODED),
    *(pytest.param((name, False), marks=pytest.mark.published) for name in CODED if name not in COMPILED),
]


@dataclass(frozen=True)
class Case:
    name: str
    small: bool
    tokenizer: Any
    folder: Path | None  # of the weights

    def samples(self, seconds: float, seed: int = 0) -> Tensor:
        return speech(int(seconds * self.tokenizer.spec.sample_rate), seed)

    def published(self, waveform_N: Tensor) -> Tensor:
        """Codes by the published implementation; features are quantized by the tokenizer's own codebook."""
        assert self.folder is not None
        with torch.inference_mode():
            found = oracle(self.name, self.folder, waveform_N)
        return (
            found[: self.tokenizer.spec.num_codebooks]
            if found.dtype == torch.int64
            else self.tokenizer.quantizer.encode(found)
        )


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}{'' if case[1] else '-published'}")
def case(request: pytest.FixtureRequest, fitted_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    name, small = request.param
    if name in BASELINES:
        yield Case(name, small, load_stream_tokenizer(Root(str(fitted_root)), BASELINES[name], device="cpu"), None)
        return
    folder = make_weights(name, tmp_path_factory.mktemp("weights") / name, small=small)
    drawn_from = speech(REGISTRY[name].spec.sample_rate * (4 if small else 20), seed=99)
    yield Case(name, small, open_published(name, folder, small=small, speech_N=drawn_from), folder)
    shutil.rmtree(folder)  # gigabytes, at published sizes


@pytest.fixture
def tokenizer(case: Case) -> Tokenizer:
    return case.tokenizer


def speech(num_samples: int, seed: int = 0) -> Tensor:
    """Noise under a slow envelope: loud and soft, never periodic."""
    generator = torch.Generator().manual_seed(seed)
    envelope = torch.linspace(0, num_samples / 4_000, num_samples).sin().abs()
    return torch.randn(num_samples, generator=generator) * envelope * 0.1


def encode(tokenizer: Tokenizer, waveform_N: Tensor) -> Tensor:
    with torch.inference_mode():
        return tokenizer.encode(waveform_N)


def batch_encoder(tokenizer: Any) -> Callable[[list[Tensor], int], list[Tensor]]:
    """The tokenizer's `encode_batch`. The test is skipped if it encodes one segment at a time only."""
    features = tokenizer.features if isinstance(tokenizer, CodebookTokenizer) else None
    if features is not None and not isinstance(features, BatchFeatures):
        pytest.skip("this tokenizer encodes one segment at a time")

    def encode(waveforms: list[Tensor], padded_length: int) -> list[Tensor]:
        with torch.inference_mode():
            return tokenizer.encode_batch(waveforms, padded_length)

    return encode


def require_shape(tokenizer: Tokenizer, codes_KT: Tensor, num_samples: int) -> None:
    spec = tokenizer.spec
    assert tuple(codes_KT.shape) == (spec.num_codebooks, num_frames(num_samples, spec)), num_samples
    assert codes_KT.dtype == torch.int64
    assert codes_KT.device.type == "cpu"
    assert ((codes_KT >= 0) & (codes_KT < spec.codebook_size)).all()


def require_same(tokenizer: Tokenizer, waveforms: list[Tensor], ours: list[Tensor], theirs: list[Tensor]) -> None:
    """No code may differ, but for near-ties, and of these there are few."""
    found = compare_all(tokenizer, waveforms, ours, theirs)
    assert found.mismatches == 0, found
    assert found.near_ties <= 2 + 1e-4 * found.num_codes, found


@pytest.mark.slow
def test_the_frame_rule_holds_around_every_hop_and_for_some_more_lengths(tokenizer: Tokenizer, case: Case):
    spec = tokenizer.spec
    edges = {spec.window_length, *(hops * spec.hop_length for hops in range(4)), spec.window_length + spec.hop_length}
    lengths = {length + off for length in edges for off in (-1, 0, 1) if length + off >= 0} | {1, 2, 7, 48_123}
    for length in sorted(lengths):
        require_shape(tokenizer, encode(tokenizer, speech(length, length)), length)


def test_the_frame_rule_holds_for_every_length_up_to_three_hops(tokenizer: Tokenizer, case: Case):
    hop = tokenizer.spec.hop_length
    slow = case.name.startswith(("whisper", "encodec-48khz", "lyra"))  # 30 s each; one after the other
    every = 1 if case.small and hop <= 512 and not slow else 17
    lengths = list(range(0, 3 * hop + 2, every))
    if case.folder is None:
        codes = [encode(tokenizer, speech(length, length)) for length in lengths]
    else:
        together = batch_encoder(tokenizer)
        codes = []
        for begin in range(0, len(lengths), 64):
            batch = [speech(length, length) for length in lengths[begin : begin + 64]]
            codes += together(batch, 3 * hop + 101)
    for length, codes_KT in zip(lengths, codes, strict=True):
        require_shape(tokenizer, codes_KT, length)


def test_codes_are_those_of_the_published_implementation(tokenizer: Tokenizer, case: Case):
    if case.folder is None:
        pytest.skip("a baseline of wavemill's own: its features are held to torchaudio's elsewhere")
    spec = tokenizer.spec
    lengths = [spec.window_length, 2 * spec.hop_length + 1, 3 * spec.hop_length + 700, spec.sample_rate + 77]
    waveforms = [speech(length, length) for length in [*lengths, *([] if case.small else [8 * spec.sample_rate + 5])]]
    ours = [encode(tokenizer, waveform_N) for waveform_N in waveforms]
    require_same(tokenizer, waveforms, ours, [case.published(waveform_N) for waveform_N in waveforms])


def test_a_segment_has_the_same_codes_in_a_batch_as_alone(tokenizer: Tokenizer, case: Case):
    together = batch_encoder(tokenizer)
    spec = tokenizer.spec
    seconds = 2 if case.small else 6
    generator = torch.Generator().manual_seed(3)
    most = seconds * spec.sample_rate
    lengths = [0, 1, spec.window_length, spec.hop_length - 1, 5 * spec.hop_length, 5 * spec.hop_length + 1]
    lengths += [*torch.randint(1, most, (6,), generator=generator).tolist(), most]
    waveforms = [speech(length, length) for length in lengths]
    alone = [encode(tokenizer, waveform_N) for waveform_N in waveforms]
    for padded_length in (most, most + 160, most + 1_234):
        require_same(tokenizer, waveforms, alone, together(waveforms, padded_length))
    one_by_one = [together([waveform_N], most)[0] for waveform_N in waveforms]
    require_same(tokenizer, waveforms, alone, one_by_one)
    backward = together(waveforms[::-1], most)[::-1]
    require_same(tokenizer, waveforms, alone, backward)


def test_neighbours_that_are_loud_or_silent_change_nothing(tokenizer: Tokenizer, case: Case):
    together = batch_encoder(tokenizer)
    waveform_N = case.samples(0.7)
    alone_KT = encode(tokenizer, waveform_N)
    for neighbour_N in (case.samples(0.9) * 9, torch.zeros(20_000), torch.ones(16_000)):
        batched_KT, _ = together([waveform_N, neighbour_N], 2 * tokenizer.spec.sample_rate)
        require_same(tokenizer, [waveform_N], [alone_KT], [batched_KT])


def test_the_same_samples_give_the_same_codes_wherever_they_lie_in_memory(tokenizer: Tokenizer, case: Case):
    waveform_N = case.samples(1.5)
    expected_KT = encode(tokenizer, waveform_N)
    for offset in (1, 3, 13):
        room = torch.zeros(len(waveform_N) + offset)
        room[offset:] = waveform_N
        assert torch.equal(encode(tokenizer, room[offset:]), expected_KT)
    interleaved = torch.stack([waveform_N, waveform_N * 2], dim=1)
    assert torch.equal(encode(tokenizer, interleaved[:, 0]), expected_KT)


def test_encoding_leaves_the_waveform_as_it_was(tokenizer: Tokenizer, case: Case):
    waveform_N = case.samples(0.5)
    before_N = waveform_N.clone()
    encode(tokenizer, waveform_N)
    assert torch.equal(waveform_N, before_N)


def test_the_order_of_segments_changes_nothing(tokenizer: Tokenizer, case: Case):
    segments = [speech(length, seed=length) for length in (100, 700, 16_000, 33_333)]
    forward = [encode(tokenizer, segment) for segment in segments]
    backward = [encode(tokenizer, segment) for segment in reversed(segments)]
    assert all(torch.equal(a, b) for a, b in zip(forward, reversed(backward), strict=True))


def test_silence_is_nothing_special(tokenizer: Tokenizer):
    for num_samples in (1, 399, 16_000):
        require_shape(tokenizer, encode(tokenizer, torch.zeros(num_samples)), num_samples)


def test_long_audio_has_the_frames_of_its_length(tokenizer: Tokenizer, case: Case):
    for seconds in (29.99, 31.0) if case.small else (29.99, 31.0, 64.2):
        waveform_N = case.samples(seconds)
        require_shape(tokenizer, encode(tokenizer, waveform_N), len(waveform_N))


def test_long_audio_begins_with_the_codes_of_its_beginning(tokenizer: Tokenizer, case: Case):
    in_windows = case.folder is not None and "not exact" in REGISTRY[case.name].long_audio
    if in_windows or (case.folder is not None and case.tokenizer.spec.frame_rule == "floor"):
        pytest.skip("networks that see both ways take long audio in windows: see their own tests")
    if case.folder is not None and "loudness of the whole" in REGISTRY[case.name].long_audio:
        pytest.skip("a beginning has another loudness than the whole")
    long_N = case.samples(65)
    whole_KT = encode(tokenizer, long_N)
    begin_KT = encode(tokenizer, long_N[: 45 * tokenizer.spec.sample_rate])
    # frames at the end of the shorter one see nothing where the longer one goes on
    spec = tokenizer.spec
    inside = begin_KT.shape[1] - max(25, spec.chunk_length // spec.hop_length)
    different = (whole_KT[:, :inside] != begin_KT[:, :inside]).sum()
    # another length is another batch for BLAS in the last block: near-ties may fall the other way, nothing else
    assert different <= 1e-4 * whole_KT[:, :inside].numel()


def test_decoded_sound_has_the_samples_that_the_spec_says(tokenizer: Tokenizer, case: Case):
    if not tokenizer.spec.decode_sample_rate:
        pytest.skip("this tokenizer has no decoder")
    channels = (tokenizer.spec.channels,) if tokenizer.spec.channels > 1 else ()
    with torch.inference_mode():
        codes_KT = tokenizer.encode(speech(20_001))
        for books in (1, tokenizer.spec.num_codebooks):
            sound_N = tokenizer.decode(codes_KT[:books])
            assert sound_N.shape == (*channels, decoded_samples(codes_KT.shape[1], tokenizer.spec))
            assert sound_N.dtype == torch.float32
            assert sound_N.isfinite().all()
        assert torch.equal(tokenizer.decode(codes_KT), tokenizer.decode(codes_KT))
        others_KT = codes_KT[:1] if len(codes_KT) > 1 else codes_KT.flip(1)
        assert not torch.equal(tokenizer.decode(codes_KT), tokenizer.decode(others_KT))
        assert tokenizer.decode(codes_KT[:, :0]).shape == (*channels, 0)


def test_gaps_are_one_for_each_code(tokenizer: Tokenizer, case: Case):
    waveform_N = case.samples(0.4)
    with torch.inference_mode():
        gaps_KT = tokenizer.gaps(waveform_N)
    assert gaps_KT.shape == encode(tokenizer, waveform_N).shape
    assert gaps_KT.dtype == torch.float64
    assert ((gaps_KT >= 0) & (gaps_KT <= 1)).all()
    assert gaps_KT.max() > 0


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name not in COMPILED])
def test_the_registry_says_what_the_published_configuration_gives(name: str, tmp_path: Path):
    published = json.loads((CONFIGURATIONS / f"{published_name(name)}.json").read_text())
    assert published["source"]
    (tmp_path / "config.json").write_text(json.dumps(published["model"]))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(published["preprocessor"]))
    save_file({"nothing": torch.zeros(1)}, tmp_path / "model.safetensors")  # describing looks at its hash alone
    entry = REGISTRY[name]
    described = describe(TokenizerConfig(tokenizer=name, weights=str(tmp_path)))
    assert described.spec == entry.spec
    if entry.layer is not None:
        assert published["model"]["num_hidden_layers"] == entry.num_layers
        assert described.fingerprint["layer"] == str(entry.layer)
    assert entry.licence
    assert entry.last_frame
    assert entry.long_audio
