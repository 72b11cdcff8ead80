"""What the fault suites reached, beside their targets, from the counters that the tests wrote (see ../tally.py).

    python report.py TALLY

Exit status 0 if every target is met.
"""

import json
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

Figures = dict[str, float]

ROWS: list[tuple[str, str, str, str, Callable[[Figures], bool]]] = [
    (
        "matrix",
        "failpoints x {kill, raise, stand still} on a disk and in Swift",
        "60 cells or more, 20 of them in Swift: nothing lost or doubled, every version whole",
        "{cells:.0f} of {tried:.0f} cells held, {cells_store:.0f} in Swift; {versions:,.0f} versions of tables whole",
        lambda found: found["cells"] == found["tried"] >= 60 and found["cells_store"] >= 20,
    ),
    (
        "storm",
        "random kill -9 in Swift with 8 % faulty answers, 3 drivers at a time",
        "300 kills, 20 jobs, 0 lost, 0 doubled, byte for byte",
        "{kills:.0f} kills, {jobs:.0f} jobs, {lost:.0f} lost, {doubled:.0f} doubled, {different:.0f} bytes-different; "
        "{faulty:,.0f} of {answers:,.0f} answers faulty",
        lambda found: found["kills"] >= 300 and found["jobs"] >= 20 and not (found["lost"] or found["doubled"]),
    ),
    (
        "ray",
        "Ray worker, raylet, GCS, node, driver",
        "12 runs, no hang over 60 s",
        "{runs:.0f} runs, the longest from fault to end {most_s:.0f} s",
        lambda found: found["runs"] >= 12 and found["most_s"] <= 60,
    ),
    (
        "poison",
        "poisoned recordings",
        "200 files of 25 kinds, each accounted for, under 1 GiB",
        "{files:.0f} files of {most_kinds:.0f} kinds, {accounted:.0f} accounted for, {most_mib:,.0f} MiB at most",
        lambda found: (
            found["files"] >= 200
            and found["accounted"] == found["files"]
            and found["most_kinds"] >= 25
            and found["most_mib"] < 1024
        ),
    ),
    (
        "flips",
        "bits flipped in stored files",
        "600, 0 silent",
        "{flips:.0f}, {silent:.0f} silent; {repaired:.0f} shards repaired to the same bytes",
        lambda found: found["flips"] >= 600 and found["silent"] == 0,
    ),
    (
        "resume",
        "trainer stopped and resumed on other ranks and workers",
        "500 random cases, 0 repeats, 0 skips",
        "{cases:.0f} cases, {repeats:.0f} repeats, {skips:.0f} skips",
        lambda found: found["cases"] >= 500 and not (found["repeats"] or found["skips"]),
    ),
    (
        "drivers",
        "two runs at a time in Swift, with and without atomic creation",
        "the second refused or the first stopped; on two streams both complete",
        "{runs:.0f} runs, {refused:.0f} refused or stopped as they had to be",
        lambda found: found["runs"] >= 12 and found["refused"] >= 3,
    ),
    (
        "space",
        "disks that fill up at another step each",
        "a sentence, nothing torn, the next run completes",
        "{runs:.0f} runs",
        lambda found: found["runs"] >= 17,
    ),
    (
        "memory",
        "device out of memory; host memory of a decoder (see poison)",
        "batches halved, the same codes",
        "{runs:.0f} runs",
        lambda found: found["runs"] >= 1,
    ),
    (
        "under",
        "recordings replaced, deleted, added; code or codebook changed under a job",
        "changed, missing, wait for the next build; refused by name",
        "{changed:.0f} changed, {missing:.0f} missing, {added:.0f} added later; {refused:.0f} refused",
        lambda found: found["changed"] >= 4 and found["missing"] >= 2 and found["added"] >= 2 and found["refused"] >= 3,
    ),
    (
        "vacuum",
        "vacuum in a loop beside running jobs",
        "nothing live removed",
        "{passes:,.0f} passes beside {runs:.0f} runs removed {removed:,.0f} leftovers, and {live:.0f} files in use",
        lambda found: found["runs"] >= 4 and found["removed"] > 0 and found["live"] == 0,
    ),
    (
        "junk",
        "nothing but bad input",
        "stops past the limit, exit status 1",
        "{runs:.0f} runs",
        lambda found: found["runs"] >= 1,
    ),
    (
        "buffers",
        "slow consumer",
        "what is decoded ahead stays under its budget",
        "{most_percent:.0f} % of it at most",
        lambda found: 0 < found["most_percent"] <= 100,
    ),
    (
        "straggler",
        "10,000 snippets and one recording of ten hours",
        "no shard over half an hour and a window, twice the same",
        "{files:,.0f} files in {shards:.0f} shards, the longest {most_shard_s:,.0f} s",
        lambda found: found["files"] >= 10_001 and found["most_shard_s"] <= 1_830,
    ),
]
LATER = [
    ("metrics sink down", "there is none: jobs send no metrics anywhere"),
    ("hostile input", "make test-hostile prints its own table"),
]


def read(path: Path) -> dict[str, Figures]:
    """Figures by suite: sums, but of those called `most_...` the largest."""
    found: dict[str, Figures] = defaultdict(lambda: defaultdict(float))
    for line in path.read_text().splitlines() if path.exists() else ():
        counted = json.loads(line)
        suite = found[counted.pop("suite")]
        for name, value in counted.items():
            suite[name] = max(suite[name], value) if name.startswith("most_") else suite[name] + value
    return found


def main(path: Path) -> int:
    found = read(path)
    missed = 0
    print("\n| suite | target | reached | |\n|---|---|---|---|")
    for suite, title, target, words, is_met in ROWS:
        figures = found[suite]
        met = is_met(figures)
        missed += not met
        reached = words.format_map(figures) if figures else "nothing was counted"
        print(f"| {title} | {target} | {reached} | {'met' if met else 'NOT MET'} |")
    for title, why in LATER:
        print(f"| {title} | | {why} | |")
    print(f"\n{len(ROWS) - missed} of {len(ROWS)} targets met.")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
