"""Times ways to do the same by turns, and tells how many times slower than ours the others are."""

import json
import statistics
import time
from collections.abc import Callable
from typing import Any


def interleaved(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each run in each repeat. A first round, not counted, warms up."""
    took: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            if repeat:
                took[name].append(time.perf_counter() - started)
    return took


def compared(took: dict[str, list[float]]) -> dict[str, dict[str, Any]]:
    """Median milliseconds of each, and how many times those of "wavemill" they are: the median and the range."""
    figures = {}
    for name, each in took.items():
        ratios = [theirs / ours for theirs, ours in zip(each, took["wavemill"], strict=True)]
        figures[name] = {
            "ms": round(1_000 * statistics.median(each), 1),
            "ratio": round(statistics.median(ratios), 2),
            "spread": [round(min(ratios), 2), round(max(ratios), 2)],
        }
    return figures


def print_table(figures: dict[str, dict[str, Any]]) -> None:
    for name, row in figures.items():
        print(f"{name:24}" + "  ".join(f"{key} {value}" for key, value in row.items()), flush=True)


def print_report(
    name: str, figures: dict[str, dict[str, Any]], *, against: str, peer: str, n: int, **more: Any
) -> None:
    """A table and, last, one JSON object: the figures of one peer, and all."""
    print_table(figures)
    one = {key: value for key, value in figures[against].items() if key != "ms"}
    print(json.dumps({"name": name, **one, "peer": peer, "n": n, "threads": 1, **more, "all": figures}))
