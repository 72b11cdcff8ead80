"""Counters that tests write while they run, for the table that `make test-faults` prints (see faults/report.py)."""

import json
import os

PLACE = "WAVEMILL_TALLY"  # names the file; without it nothing is counted


def tally(suite: str, **figures: float) -> None:
    """Add these figures to a suite's. Those called `most_...` are not added up: the largest counts."""
    if path := os.environ.get(PLACE):
        with open(path, "a") as file:
            file.write(json.dumps({"suite": suite, **figures}) + "\n")
