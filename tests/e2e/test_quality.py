"""What the tokens are worth on speakers the codebooks never heard: more codebooks, closer sound."""

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from audio_at import whole_at
from conftest import LEFT_OUT
from pystoi import stoi
from wavemill.storage.parquet import read_parquet
from wavemill.storage.root import Root
from wavemill.storage.schema import CORPUS_SCHEMA
from wavemill.storage.table import read_snapshot
from wavemill.tokenizers.fit import FitPlan
from wavemill.tokenizers.fit import fit as fit_codebooks
from wavemill.tokenizers.mel import MelFeatures
from wavemill.tokenizers.quantize import ResidualQuantizer

RATE = 16_000
BOOKS = (1, 2, 4, 8)


def waveform(path: Path) -> torch.Tensor:
    return whole_at(path, RATE)


def rate_quality(
    fit: Sequence[Path], heard: Sequence[Path], *, size: int, seconds: int = 10_000
) -> tuple[list[float], list[float]]:
    """Mean STOI and mean log-mel distance of `heard`, decoded with 1, 2, 4 and 8 codebooks fitted on `fit`.

    Of each file the first `seconds` are taken.
    """
    features = MelFeatures()
    frames_ND = torch.cat([features.extract(waveform(path)[: seconds * RATE]) for path in fit]).numpy()
    centroids_QCD = fit_codebooks(frames_ND, FitPlan(size=size, num_stages=8)).centroids_KCE
    quantizer = ResidualQuantizer(centroids_QCD)
    scores, distances = np.zeros((len(heard), len(BOOKS))), np.zeros((len(heard), len(BOOKS)))
    for row, path in enumerate(heard):
        original_N = waveform(path)[: min(seconds, 10) * RATE]
        mel_TD = features.extract(original_N)
        codes_QT = quantizer.encode(mel_TD)
        for column, books in enumerate(BOOKS):
            decoded_TD = quantizer.decode(codes_QT[:books])
            sound_N = features.synthesize(decoded_TD)[: original_N.shape[0]]
            scores[row, column] = stoi(original_N.numpy(), sound_N.numpy(), RATE)
            distances[row, column] = (mel_TD - decoded_TD).abs().mean()
    print(f"STOI {scores.mean(axis=0).round(3)}, log-mel distance {distances.mean(axis=0).round(3)} at {BOOKS}")
    return list(scores.mean(axis=0)), list(distances.mean(axis=0))


@pytest.mark.slow
def test_each_codebook_brings_unseen_synthetic_speakers_closer(samples: Path, fitted_root: Path):
    root = Root(fitted_root)
    corpus = read_snapshot(root, "corpus")
    assert corpus is not None
    rows = [
        row
        for shard in corpus.files
        for row in read_parquet(root, corpus.path(shard), schema=CORPUS_SCHEMA).to_pylist()
    ]
    speech = [row for row in rows if row["speaker"]]
    fit = [samples / row["path"] for row in speech if row["speaker"] not in LEFT_OUT]
    heard = [samples / row["path"] for row in speech if row["speaker"] in LEFT_OUT][::6]
    scores, distances = rate_quality(fit, heard, size=256)
    assert scores == sorted(scores)
    assert distances == sorted(distances, reverse=True)
    assert scores[-1] >= 0.80


@pytest.mark.slow
def test_each_codebook_brings_unseen_people_closer_up_to_a_stoi_of_080(dev_recordings: Path):
    with (dev_recordings / "MANIFEST.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["kind"] == "ordinary"]
    reading = [row for row in rows if row["file"].startswith("librispeech") or row["file"].startswith("vctk")]
    speakers = sorted({row["speaker"] for row in reading})
    left_out = set(speakers[::5])
    assert len(left_out) >= 5
    fit = [dev_recordings / row["file"] for row in reading if row["speaker"] not in left_out]
    heard = [dev_recordings / row["file"] for row in reading if row["speaker"] in left_out][:6]
    scores, distances = rate_quality(fit, heard, size=256, seconds=5)
    assert scores == sorted(scores)
    assert distances == sorted(distances, reverse=True)
    assert scores[-1] >= 0.80


@pytest.mark.slow
def test_the_default_codebook_reaches_a_stoi_of_080_on_unseen_people(dev_recordings: Path):
    with (dev_recordings / "MANIFEST.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["kind"] == "ordinary"]
    reading = [row for row in rows if row["file"].split("/")[0] in ("librispeech_train_clean", "vctk", "ljspeech")]
    left_out = set(sorted({row["speaker"] for row in reading})[::5])
    fit = [dev_recordings / row["file"] for row in reading if row["speaker"] not in left_out]
    heard = [dev_recordings / row["file"] for row in reading if row["speaker"] in left_out]
    scores, distances = rate_quality(fit, heard, size=1024)
    assert scores == sorted(scores)
    assert distances == sorted(distances, reverse=True)
    assert scores[-1] >= 0.80
