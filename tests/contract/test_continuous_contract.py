"""What every stream of numbers must keep: the same frames for the same samples, on its clock, in bounded memory.

Small published architectures with random weights. Frames are float16: of two ways to the same number, rounding may
choose neighbours.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import weights_xvector
from random_weights import make_weights, oracle
from torch import Tensor
from wavemill.tokenizers.reduction import parse_reduction, reduce_frames
from wavemill.tokenizers.registry import REGISTRY, load_tokenizer
from wavemill.tokenizers.spec import decoded_samples, num_frames
from wavemill.tokenizers.tokenizer import BatchRowTokenizer, Output, RowTokenizer, TokenizerConfig, Tokens

FEATURES, EMBEDDING = Output.FEATURES, Output.EMBEDDING


@dataclass(frozen=True)
class Stream:
    tokenizer: str
    output: Output | None = None
    reduce: str | None = None

    def __str__(self) -> str:
        return "-".join(part for part in (self.tokenizer, self.output, self.reduce) if part)


STREAMS = [
    Stream("mel-rvq", FEATURES),
    Stream("mel-rvq", FEATURES, "mean:4"),
    Stream("mfcc-kmeans", FEATURES, "stack:3"),
    Stream("mfcc-kmeans", EMBEDDING),
    Stream("hubert-base", FEATURES, "stride:2"),
    Stream("hubert-base", FEATURES, "ctc"),
    Stream("encodec-24khz-latents"),
    Stream("mimi-latents", EMBEDDING),
    Stream("dac-16khz-latents"),
    Stream("pocket-tts-latents"),
    Stream("pocket-tts-latents", FEATURES, "stack:2"),
    Stream("vibevoice-latents"),
    Stream("wavlm-sv"),
    # their walk to the latents is that of their codes, which are compared all the time
    *(
        pytest.param(Stream(name), marks=pytest.mark.slow)
        for name in (
            *("xcodec-latents", "higgs-audio-v2-latents", "xcodec2-latents", "neucodec-latents"),
            *("speechtokenizer-latents", "snac-24khz-latents", "encodec-48khz-latents", "lyra-latents"),
        )
    ),
]


@dataclass(frozen=True)
class Case:
    stream: Stream
    tokenizer: RowTokenizer
    folder: Path | None  # of the weights

    def samples(self, seconds: float, seed: int = 0) -> Tensor:
        return speech(int(seconds * self.tokenizer.spec.sample_rate), seed)


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    base = tmp_path_factory.mktemp("weights")

    def folder(name: str) -> Path:
        if not (base / name).exists():
            if name == "ctc":
                weights_xvector.make_ctc("hubert-base", base / name)
            else:
                make_weights(name, base / name, small=True)
        return base / name

    return folder


@pytest.fixture(scope="module", params=STREAMS, ids=str)
def case(request: pytest.FixtureRequest, folder_of: Callable[[str], Path]) -> Case:
    stream: Stream = request.param
    folder = folder_of(stream.tokenizer) if REGISTRY[stream.tokenizer].weights else None
    return Case(stream, opened(stream, folder_of), folder)


def opened(stream: Stream, folder_of: Callable[[str], Path]) -> RowTokenizer:
    weights = str(folder_of(stream.tokenizer)) if REGISTRY[stream.tokenizer].weights else None
    reduce = f"ctc:{folder_of('ctc')}" if stream.reduce == "ctc" else stream.reduce
    output = None if stream.output is None else Output(stream.output)
    return load_tokenizer(TokenizerConfig(tokenizer=stream.tokenizer, weights=weights, output=output, reduce=reduce))


def speech(num_samples: int, seed: int = 0) -> Tensor:
    """Noise under a slow envelope: loud and soft, never periodic."""
    generator = torch.Generator().manual_seed(seed)
    envelope = torch.linspace(0, num_samples / 4_000, num_samples).sin().abs()
    return torch.randn(num_samples, generator=generator) * envelope * 0.1


def tokens_of(case: Case, waveform_N: Tensor) -> Tokens:
    with torch.inference_mode():
        return case.tokenizer.tokens(waveform_N)


def frames_of(tokens: Tokens) -> Tensor:
    assert tokens.frames_TD is not None
    return tokens.frames_TD


def require_shape(case: Case, tokens: Tokens, num_samples: int) -> None:
    spec, frames_TD = case.tokenizer.spec, frames_of(tokens)
    expected = num_frames(num_samples, spec) if spec.has_clock else tokens.num_frames
    assert frames_TD.shape == (expected, spec.dim), num_samples
    assert tokens.num_frames == expected
    assert (frames_TD.dtype, frames_TD.device.type) == (torch.float16, "cpu")
    assert frames_TD.isfinite().all()
    assert (tokens.durations_T is not None) == spec.durations
    if tokens.durations_T is not None:
        assert tokens.durations_T.shape == (expected,)
        assert (tokens.durations_T > 0).all()


def require_near(ours: Tokens, theirs: Tokens) -> None:
    torch.testing.assert_close(frames_of(ours), frames_of(theirs), rtol=2e-3, atol=2e-3)
    assert (ours.durations_T is None) == (theirs.durations_T is None)
    if ours.durations_T is not None and theirs.durations_T is not None:
        assert torch.equal(ours.durations_T, theirs.durations_T)


def require_equal(ours: Tokens, theirs: Tokens) -> None:
    assert torch.equal(frames_of(ours), frames_of(theirs))


def test_the_frame_rule_holds_for_all_kinds_of_lengths(case: Case):
    spec = case.tokenizer.spec
    edges = {spec.window_length, *(hops * spec.hop_length for hops in range(4)), spec.window_length + spec.hop_length}
    lengths = {length + off for length in edges for off in (-1, 0, 1) if length + off >= 0} | {1, 2, 7, 18_123}
    for length in sorted(lengths):
        require_shape(case, tokens_of(case, speech(length, length)), length)


def test_frames_are_those_of_the_published_implementation(case: Case):
    if case.folder is None:
        pytest.skip("a baseline of wavemill's own: its features are held to torchaudio's elsewhere")
    if case.stream.reduce == "ctc":
        pytest.skip("labels of random weights are near each other: see tests/tokenizers/test_continuous.py")
    spec = REGISTRY[case.stream.tokenizer].spec
    for length in (spec.window_length + 5 * spec.hop_length + 3, 2 * spec.sample_rate + 77):
        waveform_N = speech(length, length)
        with torch.inference_mode():
            expected_TD = oracle(case.stream.tokenizer, case.folder, waveform_N)
        if case.stream.output is EMBEDDING:
            expected_TD = expected_TD.double().mean(dim=0, keepdim=True).float()
        if case.stream.reduce:
            expected_TD = reduce_frames(expected_TD, parse_reduction(case.stream.reduce), spec.frame_rule)
        found_TD = frames_of(tokens_of(case, waveform_N)).float()
        torch.testing.assert_close(found_TD, expected_TD, rtol=2e-3, atol=2e-3)


def test_a_segment_has_the_same_frames_in_a_batch_as_alone(case: Case):
    tokenizer = case.tokenizer
    assert isinstance(tokenizer, BatchRowTokenizer)
    spec = tokenizer.spec
    most = 2 * spec.sample_rate
    lengths = [0, 1, spec.window_length, 3 * spec.hop_length - 1, 3 * spec.hop_length, 17_001, most]
    waveforms = [speech(min(length, most), length) for length in lengths]
    alone = [tokens_of(case, waveform_N) for waveform_N in waveforms]
    for padded_length in (most, most + 1_234):
        with torch.inference_mode():
            together = tokenizer.tokens_batch(waveforms, padded_length)
        for ours, theirs in zip(together, alone, strict=True):
            require_near(ours, theirs)


def test_the_same_samples_give_the_same_frames_again_and_wherever_they_lie(case: Case):
    waveform_N = case.samples(1.2)
    before_N, expected = waveform_N.clone(), tokens_of(case, waveform_N)
    require_equal(tokens_of(case, waveform_N), expected)
    assert torch.equal(waveform_N, before_N)
    for offset in (1, 3, 13):
        room = torch.zeros(len(waveform_N) + offset)
        room[offset:] = waveform_N
        require_equal(tokens_of(case, room[offset:]), expected)
    interleaved = torch.stack([waveform_N, waveform_N * 2], dim=1)
    require_equal(tokens_of(case, interleaved[:, 0]), expected)


def test_silence_and_long_audio_have_the_frames_of_their_length(case: Case):
    for waveform_N in (torch.zeros(16_000), case.samples(31)):
        require_shape(case, tokens_of(case, waveform_N), len(waveform_N))


def test_decoded_sound_has_the_samples_that_the_spec_says(case: Case):
    tokenizer: Any = case.tokenizer
    if not tokenizer.spec.decode_sample_rate:
        pytest.skip("these frames know no way back to sound")
    tokens = tokens_of(case, speech(20_001))
    sound_N = tokenizer.decode_tokens(tokens)
    channels = (tokenizer.spec.channels,) if tokenizer.spec.channels > 1 else ()
    assert sound_N.shape == (*channels, decoded_samples(tokens.num_frames, tokenizer.spec))
    assert sound_N.dtype == torch.float32
    assert sound_N.isfinite().all()
    assert sound_N.std() > 0


_MEMORY = """
import sys
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[1])
from test_continuous_contract import Stream, opened
from wavemill.tokenizers.numerics import use_one_thread

def peak_mib():
    [line] = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024

use_one_thread()
tokenizer, base = None, Path(sys.argv[2])
tokenizer = opened(Stream(*(part or None for part in sys.argv[3:])), lambda name: base / name)
for quarters in (1, 4):
    waveform_N = torch.empty(quarters * 900 * tokenizer.spec.sample_rate + 7).uniform_(-0.1, 0.1)
    open("/proc/self/clear_refs", "w").write("5")  # the peak so far is forgotten
    before = peak_mib()
    with torch.inference_mode():
        tokens = tokenizer.tokens(waveform_N)
    print(round(peak_mib() - before), round(2 * tokens.frames_TD.numel() / 2**20, 1), flush=True)
    del waveform_N, tokens
"""


@pytest.mark.slow
@pytest.mark.timeout(1_800)
@pytest.mark.parametrize(
    "stream",
    [
        Stream("hubert-base", FEATURES, "stack:2"),
        Stream("hubert-base", FEATURES, "ctc"),
        Stream("pocket-tts-latents"),
        Stream("vibevoice-latents"),
        Stream("wavlm-sv"),
    ],
    ids=str,
)
def test_memory_beyond_the_waveform_and_the_frames_does_not_grow(
    stream: Stream, folder_of: Callable[[str], Path], tmp_path: Path
):
    names = [name for name in (stream.tokenizer, stream.reduce) if name and name[:5] != "stack"]
    base = {folder_of(name).parent for name in names}.pop()
    parts = [stream.tokenizer, stream.output or "", stream.reduce or ""]
    command = [sys.executable, "-c", _MEMORY, str(Path(__file__).parents[1]), str(base), *parts]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent, env=_with_tests()
    )
    assert done.returncode == 0, done.stderr
    quarter, hour = ([float(figure) for figure in line.split()] for line in done.stdout.splitlines()[-2:])
    assert hour[0] < quarter[0] + 2 * hour[1] + 60, (quarter, hour)


def _with_tests() -> dict[str, str]:
    folders = (Path(__file__).parent, Path(__file__).parents[1])
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders))}
