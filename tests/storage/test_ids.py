"""Ids of segments: the same for the same place in a source, on every machine, and no other."""

import subprocess
import sys
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from wavemill.storage.schema import segment_id

PARTS: dict[str, Any] = {
    "source": "librivox",
    "path": "austen/emma/01.flac",
    "member": "",
    "channel": "mix",
    "start_sample": 480_000,
    "num_samples": 160_000,
}
PINNED = "ilovefn2xg7xpkptn4qxsalhk2"


def identify(parts: dict[str, Any]) -> str:
    return segment_id(
        parts["source"],
        parts["path"],
        member=parts["member"],
        channel=parts["channel"],
        start_sample=parts["start_sample"],
        num_samples=parts["num_samples"],
    )


words = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
counts = st.integers(0, 2**63 - 1)
places = st.fixed_dictionaries(
    {"source": words, "path": words, "member": words, "channel": words, "start_sample": counts, "num_samples": counts}
)
# few letters and digits, so that parts that run together alike are met often
close_words = st.text("ab1", max_size=3)
close_counts = st.integers(0, 12)
close_places = st.fixed_dictionaries(
    {
        "source": close_words,
        "path": close_words,
        "member": close_words,
        "channel": close_words,
        "start_sample": close_counts,
        "num_samples": close_counts,
    }
)


@given(places)
def test_an_id_is_26_small_base32_characters(parts: dict[str, Any]) -> None:
    name = identify(parts)
    assert len(name) == 26
    assert set(name) <= set("abcdefghijklmnopqrstuvwxyz234567")


@given(places)
def test_the_same_parts_give_the_same_id(parts: dict[str, Any]) -> None:
    assert identify(parts) == identify(dict(parts))


@given(close_places, close_places)
def test_ids_are_equal_only_if_all_parts_are(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert (identify(one) == identify(other)) == (one == other)


@given(places, st.sampled_from(sorted(PARTS)), places)
def test_changing_any_one_part_changes_the_id(parts: dict[str, Any], part: str, other: dict[str, Any]) -> None:
    changed = {**parts, part: other[part]}
    assert (identify(changed) == identify(parts)) == (changed == parts)


def test_parts_that_run_together_alike_are_told_apart() -> None:
    alike = [
        {**PARTS, "source": "ab", "path": "c"},
        {**PARTS, "source": "a", "path": "bc"},
        {**PARTS, "source": "abc", "path": ""},
        {**PARTS, "source": "", "path": "abc"},
        {**PARTS, "source": "a", "path": "b", "member": "c"},
        {**PARTS, "source": "a", "path": "b", "channel": "cmix"},
        {**PARTS, "start_sample": 1, "num_samples": 12},
        {**PARTS, "start_sample": 11, "num_samples": 2},
        {**PARTS, "channel": "mix1", "start_sample": 1, "num_samples": 2},
    ]
    assert len({identify(parts) for parts in alike}) == len(alike)


def test_names_in_other_unicode_forms_are_other_recordings() -> None:
    composed, decomposed = "caf\u00e9.wav", "cafe\u0301.wav"
    assert identify({**PARTS, "path": composed}) != identify({**PARTS, "path": decomposed})


def test_ids_are_the_ones_that_tables_hold_already() -> None:
    assert identify(PARTS) == PINNED


def test_another_process_gives_the_same_id() -> None:
    script = (
        "from wavemill.storage.schema import segment_id\n"
        f"parts = {PARTS!r}\n"
        "print(segment_id(parts.pop('source'), parts.pop('path'), **parts))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env={"PYTHONHASHSEED": "7", "PATH": ""},
    )
    assert done.stdout.strip() == PINNED
