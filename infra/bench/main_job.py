"""Times the main job step by step: build, fit, tokenize on Ray and inline, verify, read back.

`make bench-main` uses the shipped samples; `make bench-main CORPUS=FOLDER` your own. Prints a table and, last, one JSON
object. Peak memory is that of the largest single process. No peer does the same work: two streams, exactly once.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SAMPLES = Path(__file__).resolve().parents[2] / "jobs" / "samples" / "speech"


def step(name: str, *arguments: str) -> dict[str, object]:
    """Run one command; its wall time in seconds and what it printed as JSON."""
    started = time.monotonic()
    command = [sys.executable, "-m", "wavemill.jobs.cli", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wall_s = time.monotonic() - started
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stderr}")
    peak_mib = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    said = done.stderr.strip().splitlines()[-1:] or [""]
    print(f"{name:28} {wall_s:8.2f} s   largest process so far {peak_mib:7,.0f} MiB   {said[0]}", flush=True)
    found = json.loads(done.stdout) if done.stdout.strip() else {}
    return {"wall_s": round(wall_s, 2), **(found if isinstance(found, dict) else {})}


def tiny_files(folder: Path, count: int) -> None:
    """`count` WAV files of 0.2 s."""
    import numpy as np
    import soundfile

    noise = (np.random.default_rng(0).standard_normal(3_200) * 3_000).astype(np.int16)
    for number in range(count):
        target = folder / f"{number // 1000:03d}" / f"{number:06d}.wav"
        target.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(target, noise, 16_000)


def main() -> None:
    source = sys.argv[1] if len(sys.argv) > 1 else str(SAMPLES)
    with tempfile.TemporaryDirectory() as folder:
        root = f"{folder}/root"
        figures: dict[str, object] = {"name": "main", "cores": os.cpu_count(), "source": Path(source).name}
        built = step("corpus build", "corpus", "build", source, "--to", root, "--shard-hours", "0.1", "--json")
        hours = float(str(built["duration_s"])) / 3600
        step("codebook fit mfcc-kmeans", "codebook", "fit", root, "mfcc-kmeans")
        step("codebook fit mel-rvq", "codebook", "fit", root, "mel-rvq", "--budget", "16MB")
        for engine in ("inline", "ray"):
            options = ["--engine", engine, "--max-error-share", "1", "--json"]
            streams = [f"--stream=semantic-{engine}=mfcc-kmeans", f"--stream=acoustic-{engine}=mel-rvq"]
            done = step(f"tokenize, {engine}", "tokenize", root, *options, *streams)
            figures[f"{engine}_x_realtime_with_start"] = round(hours * 3600 / float(str(done["wall_s"])))
            figures[engine] = {name: done[name] for name in ("wall_s", "decode_s", "encode_s", "write_s", "commit_s")}
        step("verify", "verify", root)
        step("inspect", "inspect", root, "--json")
        tiny_files(Path(folder) / "tiny", 10_000)
        tiny = step("corpus build, 10,000 files", "corpus", "build", f"{folder}/tiny", "--to", f"{folder}/t", "--json")
        figures["build_10000_files_s"] = tiny["wall_s"]
        figures["hours"] = round(hours, 3)
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
