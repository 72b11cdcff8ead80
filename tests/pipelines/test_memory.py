"""A long recording costs the memory of what is asked of it."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

_SCRIPT = """
import resource, sys
import torch
from wavemill.pipelines.reading import Reader
from wavemill.pipelines.tokenize import encode_rows
from wavemill.storage.root import Root
from wavemill.tokenizers.codebook import Codebook
from wavemill.tokenizers.numerics import use_one_thread
from wavemill.tokenizers.registry import load_tokenizer
from wavemill.tokenizers.spec import Sound
from wavemill.tokenizers.tokenizer import TokenizerConfig

def grown():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - imported

folder, size, use, imported = sys.argv[1], int(sys.argv[2]), use_one_thread(), 0
imported = grown()
hour = 3600 * 16000
plain = dict(source="s", source_root=folder, path="hour.flac", member="", member_offset=None, channel="mix",
             separated=None, gain_db=None, format="flac", size_bytes=size, version=None, sample_rate=16000,
             error=None, error_message=None)
def row(start, num):
    return {**plain, "start_sample": start, "num_samples": num}
reader = Reader(Root("/nonexistent"))
windows = [row(start, 480000) for start in range(0, hour, 480000)]
assert sum(len(found[Sound(16000)]) for found in reader.read(windows, [Sound(16000), Sound(24000)])) == hour
print(grown())
[whole] = reader.read([row(0, hour)], [Sound(16000)])
assert len(whole[Sound(16000)]) == hour and not whole[Sound(16000)].any()
del whole
print(grown())
tokenizers = {}
for name in ("mfcc-kmeans", "mel-rvq"):
    books, dim = {"mfcc-kmeans": (1, 39), "mel-rvq": (8, 160)}[name]
    codebook = Codebook(torch.randn(books, 8, dim), {"tokenizer": name, "features": f"{name}/1"})
    tokenizers[name] = load_tokenizer(TokenizerConfig(tokenizer=name), codebook)
[codes], _, _ = encode_rows([row(0, hour)], tokenizers, [reader], ahead_bytes=1 << 20)
assert codes["mfcc-kmeans"].codes_KT.shape == (1, 179999) and codes["mel-rvq"].codes_KT.shape == (8, 180000)
print(grown())
with open(f"/proc/{reader._decoder._process.pid}/status") as status:
    print(next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM")))
reader.close()
"""


@pytest.mark.slow
def test_an_hour_is_read_and_encoded_in_bounded_memory(tmp_path: Path) -> None:
    """Windows of an hour need one window's memory; the hour as one segment needs a few times its waveform (230 MB)."""
    path = tmp_path / "hour.flac"
    with soundfile.SoundFile(path, "w", 16_000, 1, subtype="PCM_16") as file:
        for _ in range(60):
            file.write(np.zeros(60 * 16_000, dtype=np.int16))
    command = [sys.executable, "-c", _SCRIPT, str(tmp_path), str(path.stat().st_size)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2_000:]
    windows_mb, whole_mb, encoded_mb, decoder_mb = map(float, done.stdout.split())
    print(f"windows {windows_mb:.0f} MB, whole {whole_mb:.0f}, encoded {encoded_mb:.0f}, decoder {decoder_mb:.0f}")
    assert windows_mb < 100
    assert whole_mb < 700
    assert encoded_mb < 1_600  # 750 as a rule; how well the allocator fits blocks into holes varies
    assert decoder_mb < 200
