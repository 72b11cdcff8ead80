"""Recordings of hours: the frames of their length, in memory that does not grow with it.

Five families have ten hours, where a number kept of each frame would show. The others have as many as take a minute of
one core: more samples than a float32 counts, and a second waveform would show.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import weights_lyra

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

HOURS = {
    **dict.fromkeys(("hubert-base", "wav2vec2-codes", "encodec-24khz", "mimi", "dac-16khz", "whisper-tiny"), 10),
    "lyra": 2,
    "pocket-tts-latents": 2,
    "vibevoice-latents": 1,
    "data2vec-base": 1,
    "w2v-bert-2-25hz": 0.5,
    "xcodec": 1,
    "higgs-audio-v2": 1,
    "xcodec2": 0.5,
    "neucodec": 0.5,
    "speechtokenizer": 1,
    "snac-24khz": 1,
    "encodec-48khz": 0.5,
}
_MORE_MIB = 60  # that the longest may take: half of half an hour's samples

# float32 counts samples exactly up to 2^24: eleven minutes at 24 kHz
_CODE = """
import resource, sys, time
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[1])
from random_weights import make_weights, open_published
from wavemill.tokenizers.numerics import use_one_thread
from wavemill.tokenizers.registry import REGISTRY
from wavemill.tokenizers.spec import num_frames

def peak_mib():
    [line] = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024

use_one_thread()
name, folder = sys.argv[2], Path(sys.argv[3])
make_weights(name, folder, small=True)
rate = REGISTRY[name].spec.sample_rate
tokenizer = open_published(name, folder, small=True, speech_N=torch.randn(4 * rate))
for hours in (float(sys.argv[4]) / 10, float(sys.argv[4])):
    waveform_N = torch.empty(int(hours * 3600) * rate + 7).uniform_(-0.1, 0.1)
    open("/proc/self/clear_refs", "w").write("5")  # the peak so far is forgotten
    before, started = peak_mib(), time.perf_counter()
    codes_KT = tokenizer.encode(waveform_N)
    spec = tokenizer.spec
    assert codes_KT.shape == (spec.num_codebooks, num_frames(len(waveform_N), spec)), codes_KT.shape
    own = codes_KT.numel() * 8 / 2**20
    print(hours, round(peak_mib() - before), round(own), round(time.perf_counter() - started, 1), flush=True)
    del waveform_N, codes_KT
"""


@pytest.mark.parametrize("name", HOURS)
def test_hours_have_their_frames_in_memory_that_does_not_grow(name: str, tmp_path: Path):
    if name == "lyra":
        weights_lyra.require()
    code = [sys.executable, "-c", _CODE, str(Path(__file__).resolve().parents[1])]
    done = subprocess.run(
        [*code, name, str(tmp_path / "weights"), str(HOURS[name])], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line[0].isdigit()]
    short, long = ([float(figure) for figure in line.split()] for line in lines)
    print(f"{name}: hours, MiB over the waveform, MiB of codes, s: {short}, {long}")
    assert long[1] < short[1] + long[2] + _MORE_MIB
