"""The 2,196 real clips: built, tokenized on Ray, verified and read back."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from torch.utils.data import DataLoader
from wavemill.storage.dataset import TokenDataset


@pytest.mark.slow
def test_the_real_clips_build_tokenize_on_ray_verify_and_read_back(
    wavemill: Callable[..., CompletedProcess[str]], dev_recordings: Path, tmp_path: Path
):
    with (dev_recordings / "MANIFEST.csv").open() as file:
        clips = {row["file"]: row for row in csv.DictReader(file) if row["kind"] == "ordinary"}
    manifest = tmp_path / "clips.jsonl"
    manifest.write_text(
        "".join(
            json.dumps({"audio_filepath": str(dev_recordings / name), "speaker": row["speaker"] or None}) + "\n"
            for name, row in clips.items()
        )
    )
    root = tmp_path / "root"
    built = wavemill("corpus", "build", manifest, "--to", root, "--shard-hours", "0.1", "--json")
    counts = json.loads(built.stdout)
    assert counts["new"] == len(clips) == 2_196
    assert counts["errors"] == 0
    assert abs(counts["duration_s"] - sum(float(row["duration_s"]) for row in clips.values())) < 2
    assert wavemill("codebook", "fit", root, "mfcc-kmeans", "--budget", "8MB").returncode == 0
    assert wavemill("codebook", "fit", root, "mel-rvq", "--size", "64", "--budget", "4MB").returncode == 0
    done = wavemill("tokenize", root)
    assert done.returncode == 0, done.stderr
    print(done.stderr.splitlines()[-1])
    verified = json.loads(wavemill("verify", root, "--sample", "50", "--json").stdout)
    assert verified["num_problems"] == verified["codes_different"] == 0
    assert verified["stream_rows"] == 2 * len(clips)
    dataset = TokenDataset(str(root), {"semantic": None, "acoustic": 3}, batch_size=61, seed=5)
    seen: list[str] = []
    for batch in DataLoader(dataset, batch_size=None, num_workers=2):
        seen += batch.ids
        assert batch.codes["acoustic"].shape[1] == 3
    assert len(seen) == len(set(seen)) == len(clips)
