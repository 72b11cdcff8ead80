"""Lhotse manifests that Lhotse itself wrote, read without it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from lhotse import CutSet, MonoCut, MultiCut, Recording, RecordingSet, SupervisionSegment, SupervisionSet
from lhotse.audio import AudioSource
from lhotse.supervision import AlignmentItem
from wavemill.pipelines.entries import Entry, Label
from wavemill.pipelines.sources import kind_of, open_source
from wavemill.tokenizers.spec import UserError

NOWHERE = "/nowhere/at/all"


def listed(path: Path | str) -> list[Entry]:
    return list(open_source(str(path), exclude=NOWHERE).entries)


@pytest.fixture
def mono(tmp_path: Path) -> Recording:
    soundfile.write(tmp_path / "a.wav", np.zeros(64_000), 16_000)
    return Recording.from_file(tmp_path / "a.wav", recording_id="a")


@pytest.fixture
def stereo(tmp_path: Path) -> Recording:
    soundfile.write(tmp_path / "st.wav", np.zeros((32_000, 2)), 16_000)
    return Recording.from_file(tmp_path / "st.wav", recording_id="st")


def said(start: float, text: str, speaker: str = "anna", **fields: Any) -> SupervisionSegment:
    word = AlignmentItem(text, start, 0.25)
    return SupervisionSegment(
        id=f"s-{start}",
        recording_id=fields.pop("recording_id", "a"),
        start=start,
        duration=0.5,
        text=text,
        speaker=speaker,
        language="en",
        alignment={"word": [word], "phone": [word._replace(symbol="p")]},
        **fields,
    )


@pytest.mark.parametrize("name", ["cuts.jsonl", "cuts.jsonl.gz", "librispeech_cuts_dev-clean.jsonl.gz"])
def test_cuts_give_their_spans_texts_and_times(tmp_path: Path, mono: Recording, stereo: Recording, name: str) -> None:
    cuts = [
        MonoCut(id="one", start=1.0, duration=0.75, channel=0, recording=mono, supervisions=[said(1.0, "hi")]),
        MonoCut(id="two", start=0, duration=4, channel=0, recording=mono, supervisions=[said(2, "b"), said(1, "a")]),
        MonoCut(id="x", start=0, duration=4, channel=0, recording=mono, supervisions=[said(1, "a"), said(2, "b", "x")]),
        MonoCut(id="right", start=0.5, duration=1, channel=1, recording=stereo),
        MultiCut(id="both", start=0.5, duration=1, channel=[0, 1], recording=stereo, supervisions=[]),
    ]  # fmt: skip
    CutSet.from_cuts(cuts).to_file(tmp_path / name)
    one, two, talk, right, both = listed(tmp_path / name)
    assert (one.path, one.offset_s, one.duration_s, one.channel) == ("a.wav", 1.0, 0.75, None)
    assert (one.text, one.speaker, one.language) == ("hi", "anna", "en")
    # https://lhotse.readthedocs.io: alignments count from the start of the recording
    assert one.words == (Label(1.0, 1.25, "hi"),)
    assert one.phones == (Label(1.0, 1.25, "p"),)
    assert (two.text, two.speaker) == ("a b", "anna")
    assert two.words == (Label(1, 1.25, "a"), Label(2, 2.25, "b"))
    assert (talk.text, talk.speaker, talk.language) == ("a b", None, "en")
    assert right == Entry(path="st.wav", channel=1, offset_s=0.5, duration_s=1)
    assert both == Entry(path="st.wav", offset_s=0.5, duration_s=1)
    assert listed(tmp_path) == [one, two, talk, right, both]


@pytest.mark.parametrize(
    ("recordings", "supervisions"),
    [
        ("recordings.jsonl", "supervisions.jsonl"),
        ("recordings.jsonl.gz", "supervisions.jsonl"),
        ("libri_recordings_dev.jsonl.gz", "libri_supervisions_dev.jsonl.gz"),
    ],
)
def test_recordings_are_joined_with_the_supervisions_beside_them(
    tmp_path: Path, mono: Recording, stereo: Recording, recordings: str, supervisions: str
) -> None:
    RecordingSet.from_recordings([mono, stereo]).to_file(tmp_path / recordings)
    SupervisionSet.from_segments([said(1, "one"), said(2, "two", channel=0)]).to_file(tmp_path / supervisions)
    entries = listed(tmp_path / recordings)
    assert [(e.path, e.offset_s, e.duration_s, e.text, e.channel) for e in entries] == [
        ("a.wav", 1, 0.5, "one", None),
        ("a.wav", 2, 0.5, "two", None),
        ("st.wav", 0, None, None, None),
    ]
    assert entries[1].words == (Label(2, 2.25, "two"),)
    assert listed(tmp_path) == entries
    with pytest.raises(UserError, match="line 1: supervisions do not say where the audio is"):
        listed(tmp_path / supervisions)


def test_a_recording_of_several_files_is_all_of_them(tmp_path: Path, mono: Recording) -> None:
    sources = [AudioSource("file", [channel], f"{tmp_path}/{channel}.wav") for channel in (0, 1)]
    recording = Recording(id="m", sources=sources, sampling_rate=16_000, num_samples=1_600, duration=0.1)
    RecordingSet.from_recordings([recording]).to_file(tmp_path / "recordings.jsonl")
    assert listed(tmp_path) == [Entry(path="0.wav"), Entry(path="1.wav")]
    segment = said(0, "x", recording_id="m", channel=1)
    SupervisionSet.from_segments([segment]).to_file(tmp_path / "supervisions.jsonl")
    assert [(entry.path, entry.channel) for entry in listed(tmp_path)] == [("1.wav", None)]


def cut_of(recording: Recording) -> MonoCut:
    return MonoCut(id="c", start=0, duration=1, channel=0, recording=recording, supervisions=[])


def test_what_would_have_to_be_computed_or_fetched_is_refused_in_words(tmp_path: Path, mono: Recording) -> None:
    def refused(cut: Any) -> str:
        CutSet.from_cuts([cut_of(mono), cut]).to_file(tmp_path / "cuts.jsonl")
        with pytest.raises(UserError) as caught:
            listed(tmp_path / "cuts.jsonl")
        assert "cuts.jsonl, line 2: " in str(caught.value)
        return str(caught.value)

    def elsewhere(kind: str, source: str) -> Any:
        return cut_of(Recording("u", [AudioSource(kind, [0], source)], 16_000, 16_000, 1.0))

    assert "MixedCut" in refused(cut_of(mono).pad(2))
    assert "Resample" in refused(cut_of(mono.resample(8_000)))
    assert "Speed" in refused(cut_of(mono).perturb_speed(1.1))
    assert "Volume" in refused(cut_of(mono.perturb_volume(2.0)))
    assert "'command'" in refused(elsewhere("command", f"touch {tmp_path}/ran"))
    assert "'url'" in refused(elsewhere("url", "https://example.org/a.wav"))
    assert "URL" in refused(elsewhere("file", "https://example.org/a.wav"))
    assert "features but no recording" in refused(MonoCut(id="c", start=0, duration=1, channel=0, supervisions=[]))
    assert not (tmp_path / "ran").exists()


def test_lines_that_are_none_of_lhotses_are_told(tmp_path: Path, mono: Recording) -> None:
    for line in (
        "[1]",
        "{",
        '{"id": 1}',
        json.dumps(cut_of(mono).to_dict() | {"start": "soon"}),
        '{"type": "MonoCut"}',
    ):
        (tmp_path / "cuts.jsonl").write_text(json.dumps(cut_of(mono).to_dict()) + "\n\n" + line + "\n")
        with pytest.raises(UserError, match=r"cuts\.jsonl, line 3: "):
            listed(tmp_path / "cuts.jsonl")


def test_a_manifest_is_lhotses_by_its_content_whatever_its_name(tmp_path: Path, mono: Recording) -> None:
    CutSet.from_cuts([cut_of(mono)]).to_file(tmp_path / "train.jsonl")
    assert kind_of(str(tmp_path / "train.jsonl")) == "lhotse"
    assert listed(tmp_path / "train.jsonl") == [Entry(path="a.wav", duration_s=1)]
    RecordingSet.from_recordings([mono]).to_file(tmp_path / "x.jsonl.gz")
    assert kind_of(str(tmp_path / "x.jsonl.gz")) == "lhotse"
    assert listed(tmp_path / "x.jsonl.gz") == [Entry(path="a.wav")]
