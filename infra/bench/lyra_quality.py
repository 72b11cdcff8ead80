"""What sound is worth that Lyra's SoundStream decodes from 16, 30 and 46 codebooks, beside its bit rate.

`make bench-lyra WEIGHTS=FOLDER`, CORPUS=FOLDER for recordings of your own. Of each recording the first ten seconds, one
after the other as `wavemill decode` gives them. STOI (Taal et al. 2011, by pystoi) is 1 for the recording itself; the
log-mel distance is the mean difference of 80 log-mel bands every 10 ms (`MelFeatures`, natural logarithm), 0 for the
recording itself. Neither is an ear: Lyra's decoder was trained to please listeners, not to keep the waveform. Prints a
table and, last, one JSON object.
"""

import argparse
import json
import time
from pathlib import Path
from statistics import fmean

import torch
from pystoi import stoi
from speech import read_recordings
from torch import Tensor
from wavemill.tokenizers.mel import MelFeatures
from wavemill.tokenizers.registry import load_tokenizer
from wavemill.tokenizers.spec import num_frames
from wavemill.tokenizers.tokenizer import Tokenizer, TokenizerConfig

BOOKS, EACH_S = (16, 30, 46), 10.0


def quality(
    tokenizer: Tokenizer, recordings: list[Tensor], codes: list[Tensor], num_codebooks: int
) -> dict[str, float]:
    """Mean STOI and log-mel distance of recordings, decoded from the first so many codebooks."""
    mel, rate = MelFeatures(), tokenizer.spec.sample_rate
    scores, distances, took_s = [], [], 0.0
    for waveform_N, codes_QT in zip(recordings, codes, strict=True):
        started = time.perf_counter()
        sound_N = tokenizer.decode(codes_QT[:num_codebooks])[: len(waveform_N)]
        took_s += time.perf_counter() - started
        scores.append(float(stoi(waveform_N.numpy(), sound_N.numpy(), rate)))
        distances.append(float((mel.extract(waveform_N) - mel.extract(sound_N)).abs().mean()))
    bits = tokenizer.spec.bits_per_second * num_codebooks / tokenizer.spec.num_codebooks
    return {
        "kbit_s": bits / 1_000,
        "stoi": round(fmean(scores), 3),
        "stoi_lowest": round(min(scores), 3),
        "log_mel_distance": round(fmean(distances), 3),
        "decode_x_realtime": round(sum(map(len, recordings)) / rate / took_s, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("weights", type=Path, help="the folder with Lyra's three files")
    parser.add_argument("--corpus", type=Path)
    parser.add_argument("--seconds", type=float, default=200.0, help="of recordings, all together")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = load_tokenizer(TokenizerConfig(tokenizer="lyra", weights=str(arguments.weights)))
    rate = tokenizer.spec.sample_rate
    recordings = read_recordings(arguments.corpus, rate, duration_s=arguments.seconds, each_s=EACH_S)
    started = time.perf_counter()
    codes = [tokenizer.encode(waveform_N) for waveform_N in recordings]
    took_s = time.perf_counter() - started
    total_s = sum(map(len, recordings)) / rate
    assert all(
        codes_QT.shape[1] == num_frames(len(waveform_N), tokenizer.spec)
        for codes_QT, waveform_N in zip(codes, recordings, strict=True)
    )
    figures = {}
    for num_codebooks in BOOKS:
        figures[str(num_codebooks)] = row = quality(tokenizer, recordings, codes, num_codebooks)
        print(f"{num_codebooks} codebooks  " + "  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    told = {"recordings": len(recordings), "seconds": round(total_s, 1), "threads": 1}
    print(json.dumps({"name": "lyra_quality", **told, "encode_x_realtime": round(total_s / took_s, 1), "all": figures}))


if __name__ == "__main__":
    main()
