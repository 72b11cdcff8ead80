"""Side files in folders: transcripts and times beside recordings, LibriSpeech's lists, CTM files, tars on the way."""

import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
from wavemill.pipelines.entries import Entry, Label, Source
from wavemill.pipelines.sources import open_source
from wavemill.tokenizers.spec import UserError

NOWHERE = "/nowhere/at/all"


def touch(path: Path, *, format: str = "WAV") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        soundfile.write(file, np.full(1_600, 0.1), 16_000, format=format)


def opened(path: Path | str, kind: str = "auto") -> tuple[Source, dict[str, Entry]]:
    source = open_source(str(path), exclude=NOWHERE, kind=kind)
    return source, {entry.path: entry for entry in source.entries}


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    """A folder `s` of files: recordings where the content is None, else what is given."""

    def make(**files: str | bytes | None) -> Path:
        for name, content in files.items():
            path = tmp_path / "s" / name
            if content is None:
                touch(path)
            else:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content.encode() if isinstance(content, str) else content)
        return tmp_path / "s"

    return make


def test_a_text_file_beside_a_recording_is_its_transcript(folder: Callable[..., Path]) -> None:
    root = folder(**{"a/x.wav": None, "a/x.txt": "\ufeffGrüße aus Bonn\r\n", "a/y.wav": None, "x.txt": "elsewhere"})
    source, entries = opened(root)
    assert {path: entry.text for path, entry in entries.items()} == {"a/x.wav": "Grüße aus Bonn", "a/y.wav": None}
    assert source.skipped == {".txt": 1}


def test_the_shipped_samples_have_the_transcripts_that_their_manifest_says(samples: Path) -> None:
    _, by_manifest = opened(samples / "manifest.jsonl")
    source, by_folder = opened(samples / "speech")
    assert {f"speech/{path}": entry.text for path, entry in by_folder.items()} == {
        path: entry.text for path, entry in by_manifest.items()
    }
    assert not source.skipped


def test_the_normalised_transcript_of_libritts_comes_first(folder: Callable[..., Path]) -> None:
    root = folder(
        **{
            "1_2.wav": None,
            "1_2.normalized.txt": "twenty two",
            "1_2.original.txt": "22",
            "3.wav": None,
            "3.original.txt": "33",
        }
    )
    source, entries = opened(root)
    assert [entry.text for entry in entries.values()] == ["twenty two", "33"]
    assert not source.skipped


def test_a_json_beside_a_recording_says_text_speaker_and_language(folder: Callable[..., Path]) -> None:
    fields = {"transcript": "hello", "speaker_id": 7, "lang": "en", "other": [1, 2]}
    source, entries = opened(folder(**{"a.wav": None, "a.json": json.dumps(fields), "b.json": "{}"}))
    assert entries == {"a.wav": Entry(path="a.wav", text="hello", speaker="7", language="en")}
    assert source.skipped == {".json": 1}


def test_two_recordings_of_one_name_share_what_lies_beside_them(folder: Callable[..., Path]) -> None:
    _, entries = opened(folder(**{"a.wav": None, "a.flac": None, "a.txt": "hello"}))
    assert {entry.text for entry in entries.values()} == {"hello"}
    assert len(entries) == 2


def test_times_beside_recordings_are_read_in_every_format(folder: Callable[..., Path]) -> None:
    grid = '"ooTextFile" "TextGrid" 0 1 <exists> 1 "IntervalTier" "words" 0 1 1 0.25 0.5 "hello"'
    root = folder(
        **{
            "a.wav": None,
            "a.TextGrid": grid.encode("utf-16"),
            "a_phones.lab": "2500000 5000000 h\n",
            "b.wav": None,
            "b.PHN": "4000 8000 h\n",
            "b.WRD": "4000 8000 hello\n",
            "c.wav": None,
            "c.txt": "0.25\t0.5\thello\n",
            "d.wav": None,
            "d.lab": "hello there, says the Montreal aligner's input\n",
        }
    )
    source, entries = opened(root)
    word, phone = (Label(0.25, 0.5, "hello"),), (Label(0.25, 0.5, "h"),)
    assert entries["a.wav"] == Entry(path="a.wav", words=word, phones=phone)
    assert entries["b.wav"] == Entry(path="b.wav", words=word, phones=phone)
    assert entries["c.wav"] == Entry(path="c.wav", words=word)
    assert entries["d.wav"] == Entry(path="d.wav", text="hello there, says the Montreal aligner's input")
    assert not source.skipped


def test_a_ctm_file_gives_the_words_of_every_recording_it_names(folder: Callable[..., Path]) -> None:
    root = folder(
        **{
            "a.wav": None,
            "b.wav": None,
            "all.ctm": "b 1 0.5 0.25 there\nb 1 0.25 0.25 hello\nz 1 0 1 nobody\n",
            "phones.ctm": "a 1 0 0.5 h\n",
        }
    )
    source, entries = opened(root)
    assert entries["b.wav"].words == (Label(0.25, 0.5, "hello"), Label(0.5, 0.75, "there"))
    assert (entries["a.wav"].words, entries["a.wav"].phones) == (None, (Label(0, 0.5, "h"),))
    assert not source.skipped


def test_real_folders_bring_their_words_and_phones(dev_recordings: Path) -> None:
    _, entries = opened(dev_recordings / "praatio")
    words = entries["bobby.wav"].words
    assert words is not None
    assert [word.label for word in words] == ["BOBBY", "RIPPED", "THE", "LEDGER"]
    assert all(entry.phones for entry in entries.values())
    _, entries = opened(dev_recordings / "cmu_arctic")
    assert len(entries["arctic_a0009.wav"].phones or ()) == 40
    assert entries["arctic_a0024.wav"].phones is None


def test_side_files_that_cannot_be_read_lose_nobody_a_recording_and_are_counted(
    folder: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "secret.txt").write_text("not yours")
    root = folder(
        **{
            "a.wav": None,
            "a.TextGrid": "no grid",
            "a.json": "{",
            "b.wav": None,
            "b.txt": b"\xe9t\xe9",
            "c.wav": None,
            "bad.ctm": "one two",
        }
    )
    (root / "c.txt").symlink_to(tmp_path / "secret.txt")
    os.mkfifo(root / "c.json")
    source, entries = opened(root)
    assert list(entries.values()) == [Entry(path=f"{name}.wav") for name in "abc"]
    assert source.skipped == {
        ".ctm that cannot be read": 1,
        ".textgrid that cannot be read": 1,
        ".json that cannot be read": 2,
        ".txt that cannot be read": 2,
    }


def test_librispeech_lists_give_text_and_speaker(folder: Callable[..., Path]) -> None:
    root = folder(
        **{
            "dev/84/121123/84-121123-0000.flac": None,
            "dev/84/121123/84-121123-0001.flac": None,
            "dev/84/121123/84-121123.trans.txt": "84-121123-0000 GO DO YOU HEAR\n84-121123-0009 NOT HERE\n",
        }
    )
    for kind in ("auto", "librispeech", "folder"):
        source, entries = opened(root, kind)
        first, second = entries.values()
        assert (first.text, first.speaker) == ("GO DO YOU HEAR", "84")
        assert (second.text, second.speaker) == (None, None)
        assert not source.skipped
    (root / "dev/84/121123/84-121123.trans.txt").write_text("84-121123-0000 GO\n84-121123-0001\n")
    with pytest.raises(UserError, match=r"trans\.txt, line 2: there is no text"):
        opened(root)
    (root / "dev/84/121123/84-121123.trans.txt").unlink()
    with pytest.raises(UserError, match=r"no SPEAKER-CHAPTER\.trans\.txt"):
        opened(root, "librispeech")


def test_a_file_and_a_glob_bring_the_same_as_their_folder(folder: Callable[..., Path]) -> None:
    root = folder(**{"a/x.wav": None, "a/x.txt": "hello", "b/y.wav": None, "b/y.json": '{"text": "you"}'})
    _, entries = opened(root)
    assert opened(f"{root}/*/*.wav")[1] == entries
    assert opened(f"{root}/**/*")[1] == entries
    [entry] = opened(root / "a" / "x.wav")[1].values()
    assert (entry.path, entry.text) == ("x.wav", "hello")


def test_tars_in_a_folder_and_under_a_glob_are_opened(folder: Callable[..., Path], tmp_path: Path) -> None:
    root = folder(**{"x.wav": None, "sub/y.wav": None, "fake.tar": "no tar", "fake.parquet": "no table"})
    with tarfile.open(root / "sub" / "shard-0.tar", "w") as tar:
        tar.add(root / "x.wav", "clip.wav")
    source, _ = opened(root)
    listed = [(entry.path, entry.member) for entry in open_source(str(root), exclude=NOWHERE).entries]
    assert listed == [("sub/shard-0.tar", "clip.wav"), ("sub/y.wav", ""), ("x.wav", "")]
    assert source.skipped == {".tar": 1, ".parquet": 1}
    globbed = open_source(f"{root}/sub/*.tar", exclude=NOWHERE)
    assert [(entry.path, entry.member) for entry in globbed.entries] == [("shard-0.tar", "clip.wav")]


def test_hostile_text_is_kept_as_data(folder: Callable[..., Path]) -> None:
    text = '=cmd|"/c calc"!A1 <script>alert(1)</script> \x1b[31mred \u202egnp.exe'
    _, entries = opened(folder(**{"a.wav": None, "a.txt": text}))
    assert entries["a.wav"].text == text
