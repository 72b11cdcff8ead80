"""CSV, TSV, Common Voice, LJSpeech and Hugging Face's audio folders, and how the kind of a source is found out."""

import csv
import gzip
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
from wavemill.pipelines.entries import Entry, Source
from wavemill.pipelines.sources import SOURCE_KINDS, kind_of, open_source
from wavemill.tokenizers.spec import UserError

NOWHERE = "/nowhere/at/all"
Write = Callable[[str, str | bytes], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a file below the test's folder, making its folder."""

    def make(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return make


def opened(path: Path | str, **options: str) -> Source:
    return open_source(str(path), exclude=NOWHERE, **options)  # pyright: ignore[reportArgumentType]


def listed(path: Path | str, **options: str) -> list[Entry]:
    return list(opened(path, **options).entries)


# CSV and TSV


def test_a_csv_says_where_when_who_and_what(write: Write, tmp_path: Path) -> None:
    path = write(
        "list.csv",
        "Path,Text,Speaker,language,START,end,channel,other\r\n"
        'a.wav,"Hello, ""you""",anna,en,0.5,1.25,1,x\r\n'
        "\r\n"
        f"{tmp_path}/sub/../b.wav,,,,,,,\r\n"
        '/far/c.wav,"two\nlines",,,2,,0,\r\n',
    )
    source = opened(path)
    assert (source.name, source.root) == ("list", str(tmp_path))
    assert list(source.entries) == [
        Entry(
            path="a.wav", text='Hello, "you"', speaker="anna", language="en", offset_s=0.5, duration_s=0.75, channel=1
        ),
        Entry(path="b.wav"),
        Entry(path="/far/c.wav", text="two\nlines", offset_s=2, channel=0),
    ]


@pytest.mark.parametrize(
    "column", ["path", "audio_filepath", "file", "filename", "audio", "wav", "file_name", "PATH", "Wav"]
)
def test_paths_go_by_many_names(column: str, write: Write) -> None:
    assert listed(write("list.csv", f"x,{column}\n1,a.wav\n")) == [Entry(path="a.wav")]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.tsv", "path\tsentence\tclient_id\tlocale\na.wav\tone, two\ts1\ten\n"),
        ("a.csv", "path;transcript;speaker_id;lang\na.wav;one, two;s1;en\n"),
        ("a.csv", "\ufeffpath|text|speaker|language\r\na.wav|one, two|s1|en"),
        ("a.csv.gz", gzip.compress(b'path,text,speaker,language\na.wav,"one, two",s1,en\n', mtime=0)),
    ],
)
def test_cells_are_divided_by_what_the_header_is_divided_by(name: str, content: str | bytes, write: Write) -> None:
    expected = [Entry(path="a.wav", text="one, two", speaker="s1", language="en")]
    source = opened(write(name, content))
    assert list(source.entries) == expected
    assert source.name == "a"


def test_files_that_the_csv_module_writes_come_back(tmp_path: Path) -> None:
    texts = ['"', "a,b", "a\tb", "a\nb", "=1+1", "<b>x</b>", "\x1b[31m", "\u202eabc", "'", "🎵", " space "]
    for dialect, name in (("excel", "a.csv"), ("excel-tab", "a.tsv")):
        with open(tmp_path / name, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, dialect)
            writer.writerow(["file", "text"])
            writer.writerows((f"{number}.wav", text) for number, text in enumerate(texts))
        assert [entry.text for entry in listed(tmp_path / name)] == texts


MISTAKES = {
    "a cell too few": ("b.wav,x", "there are 2 cells under 5 columns"),
    "a cell too many": ("b.wav,x,0,1,2,3", "there are 6 cells under 5 columns"),
    "no path": (",x,0,1,", "is missing"),
    "a word for a time": ("b.wav,x,soon,1,", "'start' is 'soon'"),
    "not a number": ("b.wav,x,nan,1,", "must not be negative"),
    "an end before the start": ("b.wav,x,2,1,", "must not be negative"),
    "a channel that is none": ("b.wav,x,0,1,left", "'channel' is 'left'"),
    "a negative channel": ("b.wav,x,0,1,-1", "'channel' is '-1'"),
    "a URL": ("https://example.org/b.wav,x,0,1,", "is a URL or a command"),
    "a store that is none of ours": ("ais://bucket/b.wav,x,0,1,", "is a URL or a command"),
    "an object without a bucket": ("s3:///b.wav,x,0,1,", "names no bucket"),
    "an object whose URI holds a key": ("s3://key:secret@bucket/b.wav,x,0,1,", "'s3://***bucket/b.wav' names"),
    "an object with a signature": ("s3://bucket/b.wav?X-Amz-Signature=abc,x,0,1,", "comes with a signature"),
    "an object above its folder": ("s3://bucket/a/../b.wav,x,0,1,", "or a '.' or '..' in it"),
    "a command": ("pipe:cat b.wav,x,0,1,", "is a URL or a command"),
    "a NUL": ("b\0.wav,x,0,1,", "NUL"),
    "no UTF-8": (b"b\xff.wav,x,0,1,", "not UTF-8"),
    "an open quote": ('b.wav,"x,0,1,', "unexpected end of data"),
    "an endless cell": ("b.wav," + "x" * 200_000 + ",0,1,", "field larger than field limit"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_a_csv_is_told_with_file_and_line_before_anything_is_done(name: str, write: Write) -> None:
    line, words = MISTAKES[name]
    encoded = line if isinstance(line, bytes) else line.encode()
    path = write("list.csv", b'path,text,start,end,channel\na.wav,"two\nlines",0,1,\n\n' + encoded + b"\n")
    with pytest.raises(UserError) as caught:
        opened(path)
    assert f"{path}, line 5" in str(caught.value)
    assert words in str(caught.value)
    assert len(str(caught.value)) < 1_000


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "is empty"),
        ("\n\n", "is empty"),
        ("name,text\na.wav,x\n", "no column of paths: its first line is 'name', 'text'"),
        ("path,path\na.wav,b.wav\n", "two columns called 'path'"),
        ("Path,path\na.wav,b.wav\n", "two columns called 'path'"),
    ],
)
def test_a_csv_without_one_column_of_paths_is_told(content: str, words: str, write: Write) -> None:
    with pytest.raises(UserError, match=words):
        opened(write("list.csv", content))


def test_a_column_of_texts_may_have_any_name(write: Write) -> None:
    path = write("list.csv", "path,text,Orthography\na.wav,wrong,right\n")
    assert [entry.text for entry in listed(path, text_column="Orthography")] == ["right"]
    with pytest.raises(UserError, match="no column 'nothing'; it has 'path', 'text', 'Orthography'"):
        opened(path, text_column="nothing")
    path = write("list.jsonl", '{"audio_filepath": "a.wav", "raw": "right"}')
    assert [entry.text for entry in listed(path, text_column="raw")] == ["right"]


@pytest.mark.slow
def test_a_long_manifest_takes_little_memory(write: Write) -> None:
    row = "folder/some_recording_with_a_long_name.wav,a transcript of some length that nobody reads,anna\n"
    path = write("list.csv", "path,text,speaker\n" + row * 60_000)
    tracemalloc.start()
    try:
        count = sum(1 for _ in opened(path).entries)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == 60_000
    assert peak < 1 << 20


# Hugging Face's audio folders, gzipped JSON lines


def test_an_audio_folder_of_hugging_face_is_read_by_its_metadata(write: Write, tmp_path: Path) -> None:
    write("a/metadata.csv", "file_name,transcription\nclips/x.wav,hello\n")
    source = opened(tmp_path / "a")
    assert (source.name, source.root) == ("a", str(tmp_path / "a"))
    assert list(source.entries) == [Entry(path="clips/x.wav", text="hello")]
    write("b/metadata.jsonl", '{"file_name": "x.wav", "text": "hello", "channel_selector": 1}\n')
    assert listed(tmp_path / "b") == [Entry(path="x.wav", text="hello", channel=1)]


def test_gzipped_json_lines_are_read_and_torn_ones_told(write: Write) -> None:
    lines = gzip.compress(b"".join(b'{"audio_filepath": "%d.wav"}\n' % number for number in range(500)))
    path = write("list.jsonl.gz", lines)
    source = opened(path)
    assert source.name == "list"
    assert [entry.path for entry in source.entries] == [f"{number}.wav" for number in range(500)]
    for torn in (lines[:-30], lines[:15], b"no gzip"):
        with pytest.raises(UserError, match="Cannot read"):
            opened(write("list.jsonl.gz", torn))


@pytest.mark.parametrize("path", ["http://x/a.wav", "s3a://b/a.wav", "pipe:cat a.wav", "file:///a.wav", "ais://b/a"])
def test_urls_and_commands_are_refused_wherever_they_stand(path: str, write: Write) -> None:
    manifest = write("list.jsonl", json.dumps({"audio_filepath": "a.wav"}) + "\n" + json.dumps({"path": path}))
    with pytest.raises(UserError, match=r"line 2: .* is a URL or a command"):
        opened(manifest)
    with pytest.raises(UserError, match="is a URL, and wavemill opens only files"):
        opened(f"name={path}")


# Common Voice and LJSpeech


@pytest.fixture
def common_voice(write: Write, tmp_path: Path) -> Path:
    header = "client_id\tpath\tsentence\tup_votes\tlocale\n"
    write("cv/en/validated.tsv", header + 's1\tone.mp3\t"Quoted" he said\t2\ten\ns2\ttwo\t"Open\t2\ten\n')
    write("cv/en/train.tsv", header + "s3\tthree.mp3\tthree\t2\ten\n")
    write("cv/en/test.tsv", header + "s4\tfour.mp3\tfour\t2\ten\n")
    write("cv/en/clip_durations.tsv", "clip\tduration[ms]\none.mp3\t100\n")
    write("cv/en/clips/one.mp3", b"")
    return tmp_path / "cv" / "en"


def test_common_voice_is_its_validated_clips_with_text_speaker_and_language(common_voice: Path) -> None:
    source = opened(common_voice)
    assert (source.name, source.root) == ("en", str(common_voice))
    assert list(source.entries) == [
        Entry(path="clips/one.mp3", text='"Quoted" he said', speaker="s1", language="en"),
        Entry(path="clips/two.mp3", text='"Open', speaker="s2", language="en"),
    ]


def test_common_voice_is_the_list_named_or_all_where_none_is_validated(common_voice: Path) -> None:
    [entry] = listed(common_voice / "train.tsv")
    assert (entry.path, entry.text) == ("clips/three.mp3", "three")
    assert opened(common_voice / "train.tsv").root == str(common_voice)
    (common_voice / "validated.tsv").unlink()
    assert [entry.text for entry in listed(common_voice)] == ["three", "four"]
    (common_voice / "train.tsv").write_text("client_id\tpath\tsentence\n\t\tx\n")
    with pytest.raises(UserError, match=r"train\.tsv, line 2: the path is missing"):
        opened(common_voice)
    with pytest.raises(UserError, match="none of Common Voice's lists"):
        opened(common_voice / "clips", kind="common-voice")


def test_ljspeech_gives_the_normalised_text(write: Write, tmp_path: Path) -> None:
    manifest = write("lj/metadata.csv", 'LJ1|"Dr. X|"Doctor X\nLJ2|plain\nLJ3|raw|\n')
    write("lj/wavs/LJ2.flac", b"")
    expected = [
        Entry(path="wavs/LJ1.wav", text='"Doctor X'),
        Entry(path="wavs/LJ2.flac", text="plain"),
        Entry(path="wavs/LJ3.wav", text="raw"),
    ]
    assert listed(tmp_path / "lj") == listed(manifest) == expected
    assert opened(manifest).name == "lj"
    manifest.write_text("LJ1|a|b\nLJ2\n")
    with pytest.raises(UserError, match=r"metadata\.csv, line 2: there are 1 cells"):
        opened(manifest)


# Which kind it is


def test_the_kind_is_found_out_or_said(write: Write, tmp_path: Path, common_voice: Path) -> None:
    write("lj/metadata.csv", "LJ1|a|b\n")
    write("lj/wavs/LJ1.wav", b"")
    write("kaldi/wav.scp", "a a.wav\n")
    expected = {
        write("list.csv", "path\na.wav\n"): "csv",
        write("list.tsv", "path\na.wav\n"): "csv",
        write("list.json", '{"audio_filepath": "a.wav"}'): "jsonl",
        write("bad.jsonl", "no json"): "jsonl",
        write("a.wav", b"RIFF"): "file",
        write("plain/b.wav", b"RIFF").parent: "folder",
        common_voice: "common-voice",
        common_voice / "test.tsv": "common-voice",
        tmp_path / "lj": "ljspeech",
        tmp_path / "lj" / "metadata.csv": "ljspeech",
        tmp_path / "kaldi": "kaldi",
        tmp_path / "kaldi" / "wav.scp": "kaldi",
    }
    assert {path: kind_of(str(path)) for path in expected} == expected
    assert set(expected.values()) < set(SOURCE_KINDS)
    soundfile.write(tmp_path / "kaldi" / "other.wav", np.zeros(160), 16_000)
    assert [entry.path for entry in listed(tmp_path / "kaldi", kind="folder")] == ["other.wav"]
    assert [entry.path for entry in listed(tmp_path / "list.csv", kind="file")] == ["list.csv"]


@pytest.mark.parametrize("kind", [kind for kind in SOURCE_KINDS if kind not in ("folder", "file")])
def test_a_kind_that_is_said_and_not_there_is_told(kind: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError):
        opened(tmp_path / "empty", kind=kind)


def test_an_unknown_kind_is_told_with_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no kind of source 'hdf5'; there are: auto, folder, glob"):
        opened(tmp_path, kind="hdf5")
