"""Speech for benchmarks: the shipped samples, or recordings of the user's."""

from pathlib import Path

import soundfile
import torch
from torch import Tensor
from torchaudio.functional import resample

SAMPLES = Path(__file__).resolve().parents[2] / "jobs" / "samples" / "speech"
_KINDS = {".wav", ".flac", ".mp3", ".ogg"}


def read_recordings(corpus: Path | None, sample_rate: int, *, duration_s: float) -> list[Tensor]:
    """Recordings in the order of their names, mono at `sample_rate`, until they are `duration_s` long together."""
    recordings: list[Tensor] = []
    left = int(duration_s * sample_rate)
    for path in sorted((corpus or SAMPLES).rglob("*")):
        if left <= 0:
            break
        if path.suffix.lower() not in _KINDS:
            continue
        sound_NC, rate = soundfile.read(path, dtype="float32", always_2d=True)
        waveform_N = resample(torch.from_numpy(sound_NC.mean(axis=1)), rate, sample_rate)
        recordings.append(waveform_N)
        left -= len(waveform_N)
    if not recordings:
        raise SystemExit(f"There is no audio ({', '.join(sorted(_KINDS))}) in {corpus}.")
    return recordings


def read_speech(corpus: Path | None, sample_rate: int, *, duration_s: float) -> Tensor:
    """`duration_s` seconds of speech, recordings one after the other and, if they are too few, again."""
    joined_N = torch.cat(read_recordings(corpus, sample_rate, duration_s=duration_s))
    wanted = int(duration_s * sample_rate)
    return joined_N.repeat(-(-wanted // len(joined_N)))[:wanted].contiguous()
