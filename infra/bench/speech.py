"""Speech for benchmarks: the shipped samples, or recordings of the user's."""

from pathlib import Path

import soundfile
import torch
from torch import Tensor
from torchaudio.functional import resample

SAMPLES = Path(__file__).resolve().parents[2] / "jobs" / "samples" / "speech"
_KINDS = {".wav", ".flac", ".ogg"}
_MIN_S = 2.0
_RECORDINGS = 20  # of many, this is about how many are taken


def read_recordings(corpus: Path | None, sample_rate: int, *, duration_s: float, each_s: float) -> list[Tensor]:
    """The first `each_s` seconds of recordings of two seconds or more, mono at `sample_rate`, until they are
    `duration_s` long together; every N-th in the order of their names, so that all folders have a part.
    """
    recordings: list[Tensor] = []
    left = int(duration_s * sample_rate)
    paths = [path for path in sorted((corpus or SAMPLES).rglob("*")) if _is_speech(path)]
    step = max(1, len(paths) // _RECORDINGS)
    for path in [path for start in range(step) for path in paths[start::step]]:
        if left <= 0:
            break
        rate = soundfile.info(path).samplerate
        sound_NC, rate = soundfile.read(path, frames=int(each_s * rate), dtype="float32", always_2d=True)
        waveform_N = resample(torch.from_numpy(sound_NC.mean(axis=1)), rate, sample_rate)
        recordings.append(waveform_N)
        left -= len(waveform_N)
    if not recordings:
        raise SystemExit(f"There is no audio ({', '.join(sorted(_KINDS))}) in {corpus or SAMPLES}.")
    return recordings


def _is_speech(path: Path) -> bool:
    if path.suffix.lower() not in _KINDS or "odd" in path.parts:
        return False
    return soundfile.info(path).duration >= _MIN_S


def read_speech(corpus: Path | None, sample_rate: int, *, duration_s: float) -> Tensor:
    """`duration_s` seconds of speech, recordings one after the other and, if they are too few, again."""
    joined_N = torch.cat(read_recordings(corpus, sample_rate, duration_s=duration_s, each_s=15.0))
    wanted = int(duration_s * sample_rate)
    return joined_N.repeat(-(-wanted // len(joined_N)))[:wanted].contiguous()
