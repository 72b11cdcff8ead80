"""Codecs against the original implementations, which cannot be installed beside transformers' newest.

`make oracles` makes .venv-oracles, where they run as processes of their own with the same random weights.

Axes: N samples, T frames, K codebooks.
"""

import os
import subprocess
from pathlib import Path

import pytest
import torch
import weights_dac
from random_weights import make_weights
from safetensors.torch import load_file, save_file
from torch import Tensor
from wavemill.tokenizers.compare import Comparison, compare_codes
from wavemill.tokenizers.registry import REGISTRY, load_tokenizer
from wavemill.tokenizers.tokenizer import TokenizerConfig

REPO = Path(__file__).resolve().parents[2]
PYTHON = REPO / ".venv-oracles" / "bin" / "python"
SCRIPTS = Path(__file__).resolve().parents[1] / "oracles"
PACKAGES = {
    "dac": "descript-audio-codec",
    "encodec": "encodec",
    "speechtokenizer": "speechtokenizer",
    "snac": "snac",
}

pytestmark = [
    pytest.mark.oracles,
    pytest.mark.skipif(not PYTHON.exists(), reason="needs the original implementations: make oracles"),
]


def original(name: str, folder: Path, waveforms: list[Tensor], codes_KT: Tensor) -> tuple[list[Tensor], Tensor]:
    """Codes of each waveform, and the sound of `codes_KT`, by the package that its authors published."""
    request, answer = folder / "request.safetensors", folder / "answer.safetensors"
    asked = {f"waveform.{place:03}": waveform_N.clone() for place, waveform_N in enumerate(waveforms)}
    save_file({**asked, "codes": codes_KT.contiguous()}, request)
    script = SCRIPTS / f"{name.partition('-')[0]}_original.py"
    done = subprocess.run(
        [PYTHON, "-W", "ignore", script, folder / "weights", request, answer],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""},
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2_000:]
    found = load_file(answer)
    return [found[f"codes.{place:03}"] for place in range(len(waveforms))], found["sound"]


@pytest.mark.parametrize(
    ("name", "small"),
    [
        ("dac-16khz", True),
        ("dac-24khz", True),
        ("dac-44khz", True),
        ("encodec-24khz", True),
        ("encodec-48khz", True),
        ("speechtokenizer", True),
        ("snac-24khz", True),
        ("dac-44khz", False),
        ("encodec-24khz", False),
        ("encodec-48khz", False),
        ("speechtokenizer", False),
        ("snac-24khz", False),
    ],
)
def test_codes_and_sound_of_speech_are_those_of_the_original_implementation(name: str, small: bool, tmp_path: Path):
    folder = make_weights(name, tmp_path / "weights", small=small)
    tokenizer = load_tokenizer(TokenizerConfig(tokenizer=name, weights=str(folder)))
    rate, hop = REGISTRY[name].spec.sample_rate, REGISTRY[name].spec.hop_length
    speech_N = weights_dac.speech(6 * rate, rate)
    lengths = [1, hop - 1, hop, hop + 1, 3 * hop + 7, rate + 1, 5 * rate + 11]
    waveforms = [speech_N[-length:] for length in lengths]
    ours = [tokenizer.encode(waveform_N) for waveform_N in waveforms]
    theirs, sound_N = original(name, tmp_path, waveforms, ours[-2])
    num_codebooks = tokenizer.spec.num_codebooks
    found = sum(
        (
            compare_codes(tokenizer, waveform_N, ours_KT, theirs_KT[:num_codebooks])
            for waveform_N, ours_KT, theirs_KT in zip(waveforms, ours, theirs, strict=True)
        ),
        start=Comparison(),
    )
    print(f"{name} {'small' if small else 'published size'}, against {PACKAGES[name.partition('-')[0]]}: {found}")
    assert found.mismatches == 0, found
    assert found.near_ties <= 1 + 1e-4 * found.num_codes, found
    torch.testing.assert_close(tokenizer.decode(ours[-2]), sound_N, atol=1e-3, rtol=0)
    assert sound_N.abs().max() > 0.01
