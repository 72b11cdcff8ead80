"""Useful share of padded audio: our ladder with 10,000 segments in flight against batches of 32, on three corpora.

`make bench-padding`. Lengths are synthetic and seeded: read sentences of up to 17 s (as LibriSpeech train-clean: mean
12.5 s), podcasts (30 % windows of 30 s, else pieces between pauses, median 5 s) and prompts (as Common Voice: mean 5 s,
whole MP3 frames of 24 ms). Dummies of `fast` mode count as waste. The peers pad a batch to its longest segment: batches
of 32 in the corpus's order, and of 32 sorted by length, whose padding depends on the neighbours. Prints a table and,
last, one JSON object.
"""

import json

import numpy as np
from wavemill.tokenizers.ladder import BATCH_SECONDS, RUNGS, UNITS_PER_S, batches, rung_of, useful_share
from wavemill.tokenizers.tokenizer import Mode

IN_FLIGHT, PEER_BATCH, RATE = 10_000, 32, 16_000
TARGETS = {Mode.EXACT: 0.98, Mode.FAST: 0.95}


def lengths_s(kind: str, count: int, seed: int) -> np.ndarray:
    """Seconds of `count` segments."""
    rng = np.random.default_rng(seed)
    if kind == "librispeech":
        long, short = rng.normal(14.6, 1.2, count), rng.uniform(1.5, 13.5, count)
        return np.where(rng.random(count) < 0.7, long, short).clip(1.4, 30)
    if kind == "podcast":
        return np.where(rng.random(count) < 0.3, 30.0, rng.lognormal(np.log(5), 0.8, count).clip(0.5, 30))
    return (np.round(rng.lognormal(np.log(4.8), 0.35, count) / 0.024) * 0.024).clip(1.1, 10.6)


def peer_share(durations_s: np.ndarray) -> float:
    """Batches of 32 as they come, padded to their longest."""
    groups = [durations_s[begin : begin + PEER_BATCH] for begin in range(0, len(durations_s), PEER_BATCH)]
    return float(durations_s.sum() / sum(len(group) * group.max() for group in groups))


def bench(kind: str, seed: int) -> dict[str, float]:
    """Shares of one corpus, and how much audio a batch of ours has."""
    samples = np.round(lengths_s(kind, IN_FLIGHT, seed) * RATE).astype(int)
    durations_s = samples / RATE
    rungs = [rung for n in samples.tolist() if (rung := rung_of(n, RATE)) is not None]
    assert len(rungs) == IN_FLIGHT, "a segment passes the top of the ladder"
    figures = {
        "rungs": len(set(rungs)),
        "random_32": peer_share(durations_s),
        "sorted_32": peer_share(np.sort(durations_s)),
    }
    for mode in Mode:
        planned = batches(rungs, int(BATCH_SECONDS[mode] * UNITS_PER_S), mode)
        figures[mode.value] = useful_share(durations_s.tolist(), planned)
        figures[f"{mode.value}_batch_s"] = float(durations_s.sum() / len(planned))
    return figures


def main() -> None:
    print(
        f"ladder: {len(RUNGS)} rungs from {RUNGS[0] / UNITS_PER_S} to {RUNGS[-1] / UNITS_PER_S:g} s; budget in padded "
        f"seconds: {', '.join(f'{mode.value} {BATCH_SECONDS[mode]:g}' for mode in Mode)}; {IN_FLIGHT:,} segments"
    )
    kinds = ("librispeech", "podcast", "common voice")
    found = {kind: [bench(kind, seed) for seed in range(5)] for kind in kinds}
    worst = {kind: {name: min(each[name] for each in runs) for name in runs[0]} for kind, runs in found.items()}
    columns = ("rungs", "exact", "fast", "random_32", "sorted_32", "exact_batch_s", "fast_batch_s")
    print(f"{'least of 5 seeds':16}" + "".join(f"{name:>15}" for name in columns))
    for kind, figures in worst.items():
        digits = {"rungs": 0, "exact_batch_s": 1, "fast_batch_s": 1}
        print(f"{kind:16}" + "".join(f"{figures[name]:15.{digits.get(name, 3)}f}" for name in columns))
    least = {mode.value: min(figures[mode.value] for figures in worst.values()) for mode in Mode}
    peer = [figures["random_32"] for figures in worst.values()]
    print(
        json.dumps(
            {
                "name": "padding",
                "share": {name: round(share, 4) for name, share in least.items()},
                "target": {mode.value: share for mode, share in TARGETS.items()},
                "met": all(least[mode.value] >= share for mode, share in TARGETS.items()),
                "peer": "batches of 32 in the corpus's order, padded to the longest",
                "peer_share": [round(min(peer), 3), round(max(peer), 3)],
                "budget_s": {mode.value: seconds for mode, seconds in BATCH_SECONDS.items()},
                "rungs": len(RUNGS),
                "n": IN_FLIGHT,
            }
        )
    )


if __name__ == "__main__":
    main()
