"""Recordings of ten hours: the frames of their length, in memory that does not grow with it, in linear time."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

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
for hours in (1, 10):
    waveform_N = torch.empty(hours * 3600 * rate + 7).uniform_(-0.1, 0.1)
    open("/proc/self/clear_refs", "w").write("5")  # the peak so far is forgotten
    before, started = peak_mib(), time.perf_counter()
    codes_KT = tokenizer.encode(waveform_N)
    spec = tokenizer.spec
    assert codes_KT.shape == (spec.num_codebooks, num_frames(len(waveform_N), spec)), codes_KT.shape
    own = codes_KT.numel() * 8 / 2**20
    print(hours, round(peak_mib() - before), round(own), round(time.perf_counter() - started, 1), flush=True)
    del waveform_N, codes_KT
"""


@pytest.mark.parametrize("name", ["hubert-base", "wav2vec2-codes", "encodec-24khz", "mimi", "dac-16khz"])
def test_ten_hours_have_their_frames_in_memory_that_does_not_grow(name: str, tmp_path: Path):
    command = [sys.executable, "-c", _CODE, str(Path(__file__).resolve().parents[1]), name, str(tmp_path / "weights")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line[0].isdigit()]
    one, ten = ([float(figure) for figure in line.split()] for line in lines)
    print(f"{name}: hours, MiB over the waveform, MiB of codes, s: {one}, {ten}")
    assert ten[1] < one[1] + ten[2] + 100
