"""Sources: folders, globs, files and manifests, with every name a disk can hold."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from wavemill.jobs.corpus import BuildResult, build_corpus
from wavemill.pipelines.entries import Entry, Source
from wavemill.pipelines.policy import CorpusPolicy
from wavemill.pipelines.sources import open_source
from wavemill.storage.codes import open_corpus
from wavemill.storage.parquet import read_parquet
from wavemill.storage.root import Root
from wavemill.storage.schema import CORPUS_SCHEMA
from wavemill.tokenizers.spec import UserError

NOWHERE = "/nowhere/at/all"  # no root to leave out


def touch(path: Path | str, *, seconds: float = 0.1, format: str = "WAV") -> None:
    """Write a short recording, making its folder."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as file:
        soundfile.write(file, np.full(int(seconds * 16_000), 0.1), 16_000, format=format)


def paths(argument: str | Path, exclude: str | Path = NOWHERE) -> list[str]:
    return [entry.path for entry in open_source(str(argument), exclude=str(exclude)).entries]


def build(
    tmp_path: Path, *sources: str | Path, window_s: float | None = None
) -> tuple[BuildResult, list[dict[str, Any]]]:
    root = Root(tmp_path / "root")
    result = build_corpus(root, [str(source) for source in sources], CorpusPolicy(window_s=window_s), shard_hours=1)
    corpus = open_corpus(root)
    tables = [read_parquet(root, corpus.path(shard), schema=CORPUS_SCHEMA) for shard in corpus.files]
    return result, [row for table in tables for row in table.to_pylist()]


@pytest.fixture
def manifest(tmp_path: Path) -> Callable[..., Path]:
    """Writes lines (objects, or text as it is) as `list.jsonl` beside a recording `a.wav` of one second."""
    touch(tmp_path / "a.wav", seconds=1.0)

    def write(*lines: dict[str, Any] | str | bytes, name: str = "list.jsonl") -> Path:
        encoded = [
            line if isinstance(line, bytes) else (line if isinstance(line, str) else json.dumps(line)).encode()
            for line in lines
        ]
        (tmp_path / name).write_bytes(b"\n".join(encoded) + b"\n")
        return tmp_path / name

    return write


# Folders


def test_a_folder_gives_its_audio_at_any_depth_in_the_order_of_names(tmp_path: Path) -> None:
    for name in ("b.wav", "a/z.wav", "a/b/c.flac", "c/d.wav", "a.wav"):
        touch(tmp_path / "speech" / name, format="FLAC" if name.endswith("flac") else "WAV")
    source = open_source(str(tmp_path / "speech"), exclude=NOWHERE)
    assert (source.name, source.root) == ("speech", str(tmp_path / "speech"))
    assert [entry.path for entry in source.entries] == ["a/b/c.flac", "a/z.wav", "a.wav", "b.wav", "c/d.wav"]


def test_a_folder_is_the_same_by_whatever_path_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path / "speech" / "a.wav")
    monkeypatch.chdir(tmp_path / "speech")
    for argument in (tmp_path / "speech", f"{tmp_path}/speech/", f"{tmp_path}/x/../speech", ".", "../speech"):
        if "x/.." in str(argument):
            (tmp_path / "x").mkdir()
        source = open_source(str(argument), exclude=NOWHERE)
        assert (source.name, source.root, [entry.path for entry in source.entries]) == (
            "speech",
            str(tmp_path / "speech"),
            ["a.wav"],
        )


def test_hidden_files_and_folders_are_passed_over(tmp_path: Path) -> None:
    for name in (".a.wav", ".cache/b.wav", "c.wav", "d/.e/f.wav", "d/._g.wav"):
        touch(tmp_path / "s" / name)
    source = open_source(str(tmp_path / "s"), exclude=NOWHERE)
    assert [entry.path for entry in source.entries] == ["c.wav"]
    assert not source.skipped


def test_the_datasets_own_root_is_passed_over_wherever_it_lies_in_a_source(tmp_path: Path) -> None:
    touch(tmp_path / "s" / "a.wav")
    touch(tmp_path / "s" / "tokens" / "decoded.wav")
    touch(tmp_path / "s" / "tokens-2" / "b.wav")
    assert paths(tmp_path / "s", exclude=tmp_path / "s" / "tokens") == ["a.wav", "tokens-2/b.wav"]
    (tmp_path / "link").symlink_to(tmp_path / "s" / "tokens")
    assert paths(tmp_path / "s", exclude=tmp_path / "link") == ["a.wav", "tokens-2/b.wav"]
    root = Root(tmp_path / "s" / "root")
    for _ in range(2):  # the second time the root is there, with its files
        build_corpus(root, [str(tmp_path / "s")], CorpusPolicy(), shard_hours=1)
    assert open_corpus(root).num_rows == 3


def test_files_that_are_no_audio_by_name_and_content_are_counted_by_suffix(tmp_path: Path) -> None:
    touch(tmp_path / "s" / "a.wav")
    for name in ("notes.txt", "b.TXT", "b/c.json", "README", "d.jpg", "e.tar.gz"):
        path = tmp_path / "s" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("no audio")
    result, rows = build(tmp_path, tmp_path / "s")
    assert [row["path"] for row in rows] == ["a.wav"]
    assert result.skipped == {".txt": 2, ".gz": 1, ".jpg": 1, ".json": 1, "no suffix": 1}
    assert result.counts.errors == 0


def test_audio_under_a_strange_name_is_taken(tmp_path: Path) -> None:
    for name in ("a", "b.dat", "c.txt", "d.WAV", "e.wav.bak"):
        touch(tmp_path / "s" / name)
    touch(tmp_path / "s" / "f.bin", format="OGG")
    result, rows = build(tmp_path, tmp_path / "s")
    assert [row["path"] for row in rows] == ["a", "b.dat", "c.txt", "d.WAV", "e.wav.bak", "f.bin"]
    assert [row["error"] for row in rows] == [None] * 6
    assert result.skipped == {}


def test_a_file_with_an_audio_name_and_other_content_is_an_error_row(tmp_path: Path) -> None:
    touch(tmp_path / "s" / "a.wav")
    (tmp_path / "s" / "b.mp3").write_text("<html>")
    result, rows = build(tmp_path, tmp_path / "s")
    assert [(row["path"], row["error"]) for row in rows] == [("a.wav", None), ("b.mp3", "not-audio")]
    assert result.counts.errors == 1


def test_links_to_folders_are_not_followed_and_links_to_files_inside_are(tmp_path: Path) -> None:
    touch(tmp_path / "s" / "real" / "a.wav")
    touch(tmp_path / "elsewhere" / "b.wav")
    (tmp_path / "s" / "loop").symlink_to(tmp_path / "s")
    (tmp_path / "s" / "out").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "s" / "twin.wav").symlink_to("real/a.wav")
    assert paths(tmp_path / "s") == ["real/a.wav", "twin.wav"]


def test_a_pipe_in_a_folder_holds_nobody_up(tmp_path: Path) -> None:
    touch(tmp_path / "s" / "a.wav")
    os.mkfifo(tmp_path / "s" / "pipe")
    os.mkfifo(tmp_path / "s" / "pipe.wav")
    result, rows = build(tmp_path, tmp_path / "s")
    assert [(row["path"], row["error"]) for row in rows] == [("a.wav", None), ("pipe.wav", "not-a-file")]
    assert result.skipped == {"no suffix": 1}


def test_names_with_spaces_unicode_newlines_and_escapes_are_kept_as_they_are(tmp_path: Path) -> None:
    names = [
        "a b.wav",
        "a\nb.wav",
        "a\tb.wav",
        "\x1b[31mred\x1b[0m.wav",
        "Grüße.wav",
        "Gru\u0308ße.wav",  # the same to a person, another name to a disk
        "日本語.wav",
        "🎵.wav",
        "-rf.wav",
        "a=b.wav",
        "[x]*?.wav",
        "\u202ewav.exe.wav",
        '"quoted".wav',
        "back\\slash.wav",
    ]
    for name in names:
        touch(tmp_path / "s" / name)
    _, rows = build(tmp_path, tmp_path / "s")
    assert sorted(row["path"] for row in rows) == sorted(names)
    assert [row["error"] for row in rows] == [None] * len(names)
    assert len({row["id"] for row in rows}) == len(names)
    again = build_corpus(Root(tmp_path / "root"), [str(tmp_path / "s")], CorpusPolicy(), shard_hours=1)
    assert (again.counts.new, again.counts.known) == (0, len(names))


def test_a_name_that_is_not_utf8_becomes_one_error_row_that_says_so(tmp_path: Path) -> None:
    touch(tmp_path / "s" / "a.wav")
    touch(os.fsdecode(os.fsencode(tmp_path / "s") + b"/b\xff\xfe.wav"))
    _, rows = build(tmp_path, tmp_path / "s")
    assert [(row["path"], row["error"]) for row in rows] == [("a.wav", None), ("b\\udcff\\udcfe.wav", "bad-name")]
    assert "UTF-8" in rows[1]["error_message"]
    again = build_corpus(Root(tmp_path / "root"), [str(tmp_path / "s")], CorpusPolicy(), shard_hours=1)
    assert (again.counts.new, again.counts.known, again.counts.twice) == (0, 2, 0)


@pytest.mark.parametrize("folder", [b"s\xff", b"p\xfe/s"])
def test_a_source_below_a_folder_whose_name_is_not_utf8_is_refused_in_words(folder: bytes, tmp_path: Path) -> None:
    source = os.fsdecode(os.fsencode(tmp_path) + b"/" + folder)
    touch(f"{source}/a.wav")
    for argument in (source, f"n={source}"):
        with pytest.raises(UserError, match="UTF-8"):
            build(tmp_path, argument)
        assert not (tmp_path / "root").exists()


# Arguments


def test_name_equals_path_names_a_source(tmp_path: Path) -> None:
    touch(tmp_path / "s" / "a.wav")
    for kind in (tmp_path / "s", tmp_path / "s" / "a.wav", f"{tmp_path}/s/*.wav"):
        source = open_source(f"mine={kind}", exclude=NOWHERE)
        assert (source.name, source.root, [entry.path for entry in source.entries]) == (
            "mine",
            str(tmp_path / "s"),
            ["a.wav"],
        )


def test_an_equals_sign_in_a_path_is_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path / "x=y" / "a.wav")
    assert open_source(str(tmp_path / "x=y"), exclude=NOWHERE).name == "x=y"
    monkeypatch.chdir(tmp_path)
    assert open_source("x=y", exclude=NOWHERE).name == "x=y"
    assert open_source("n=x=y", exclude=NOWHERE).name == "n"


@pytest.mark.parametrize("argument", ["={}", "n" * 101 + "={}"])
def test_a_source_name_has_one_to_a_hundred_characters(argument: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="1 to 100 characters"):
        open_source(argument.format(tmp_path), exclude=NOWHERE)


@pytest.mark.parametrize("argument", ["{}/nothing", "{}/nothing.jsonl", "n={}/nothing.wav"])
def test_a_source_that_is_not_there_is_the_persons_mistake(argument: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="There is no file or folder"):
        build_corpus(Root(tmp_path / "root"), [argument.format(tmp_path)], CorpusPolicy(), shard_hours=1)
    assert not (tmp_path / "root").exists()


def test_a_single_file_is_a_source(tmp_path: Path) -> None:
    touch(tmp_path / "s" / "a.wav")
    source = open_source(str(tmp_path / "s" / "a.wav"), exclude=NOWHERE)
    assert (source.name, source.root, list(source.entries)) == ("s", str(tmp_path / "s"), [Entry(path="a.wav")])


def test_a_file_a_glob_and_its_folder_give_one_recording_one_id(tmp_path: Path) -> None:
    touch(tmp_path / "s" / "a.wav")
    ids = set()
    for number, source in enumerate((tmp_path / "s", tmp_path / "s" / "a.wav", f"{tmp_path}/s/*.wav")):
        (tmp_path / str(number)).mkdir()
        _, rows = build(tmp_path / str(number), source)
        ids |= {row["id"] for row in rows}
    assert len(ids) == 1


def test_a_glob_takes_what_matches_at_any_depth(tmp_path: Path) -> None:
    for name in ("a.wav", "b.flac", "c/d.wav", "c/e/f.wav", "g/.hidden.wav"):
        touch(tmp_path / "s" / name)
    assert paths(f"{tmp_path}/s/*.wav") == ["a.wav"]
    assert paths(f"{tmp_path}/s/**/*.wav") == ["a.wav", "c/d.wav", "c/e/f.wav"]
    assert paths(f"{tmp_path}/s/[ab].*") == ["a.wav", "b.flac"]
    assert paths(f"{tmp_path}/s/?/*.wav") == ["c/d.wav"]
    assert open_source(f"{tmp_path}/s/?/*.wav", exclude=NOWHERE).root == str(tmp_path / "s")
    with pytest.raises(UserError, match="matches no file"):
        open_source(f"{tmp_path}/s/*.mp3", exclude=NOWHERE)


def test_a_file_whose_name_looks_like_a_glob_is_that_file(tmp_path: Path) -> None:
    touch(tmp_path / "s" / "[a].wav")
    touch(tmp_path / "s" / "a.wav")
    assert paths(tmp_path / "s" / "[a].wav") == ["[a].wav"]


# Manifests


def test_a_manifest_says_where_how_long_who_what_and_in_which_language(
    manifest: Callable[..., Path], tmp_path: Path
) -> None:
    path = manifest(
        {"audio_filepath": "a.wav", "duration": 0.5, "text": "Grüße", "speaker": "anna", "lang": "de"},
        {"audio_filepath": "./a.wav", "offset": 0.5, "duration": 0.25, "language": "en", "lang": "xx"},
        "",
        {"audio_filepath": f"{tmp_path}/a.wav", "offset": 0.75, "speaker": 7, "label": "other keys"},
    )
    source = open_source(str(path), exclude=NOWHERE)
    assert (source.name, source.root) == ("list", str(tmp_path))
    assert list(source.entries) == [
        Entry(path="a.wav", duration_s=0.5, text="Grüße", speaker="anna", language="de"),
        Entry(path="a.wav", offset_s=0.5, duration_s=0.25, language="en"),
        Entry(path="a.wav", offset_s=0.75, speaker="7"),
    ]


def test_a_manifests_rows_hold_its_spans_in_samples(manifest: Callable[..., Path], tmp_path: Path) -> None:
    path = manifest(
        {"audio_filepath": "a.wav", "duration": 0.5, "text": "one", "speaker": "anna", "language": "en"},
        {"audio_filepath": "a.wav", "offset": 0.5, "duration": 0.1},
        {"audio_filepath": "a.wav", "offset": 0.7},
        {"audio_filepath": "a.wav", "duration": None, "offset": None},
    )
    result, rows = build(tmp_path, path)
    assert [(row["start_sample"], row["num_samples"]) for row in rows] == [
        (0, 8_000),
        (8_000, 1_600),
        (11_200, 4_800),
        (0, 16_000),
    ]
    assert [(row["text"], row["speaker"], row["language"]) for row in rows] == [("one", "anna", "en")] + [
        (None,) * 3
    ] * 3
    assert {row["recording_samples"] for row in rows} == {16_000}
    assert result.counts.duration_s == pytest.approx(0.5 + 0.1 + 0.3 + 1.0)


def test_absolute_paths_outside_a_manifests_folder_are_taken_at_their_word(tmp_path: Path) -> None:
    touch(tmp_path / "far" / "a.wav")
    (tmp_path / "near").mkdir()
    (tmp_path / "near" / "list.jsonl").write_text(json.dumps({"audio_filepath": str(tmp_path / "far" / "a.wav")}))
    _, rows = build(tmp_path, tmp_path / "near" / "list.jsonl")
    assert [(row["path"], row["error"]) for row in rows] == [(str(tmp_path / "far" / "a.wav"), None)]


def test_relative_and_absolute_paths_to_one_recording_below_give_one_id(
    manifest: Callable[..., Path], tmp_path: Path
) -> None:
    lines = [{"audio_filepath": name} for name in ("a.wav", "./a.wav", f"{tmp_path}/a.wav", f"{tmp_path}/x/../a.wav")]
    result, rows = build(tmp_path, manifest(*lines))
    assert [row["path"] for row in rows] == ["a.wav"]
    assert (result.counts.new, result.counts.twice) == (1, 3)


def test_a_manifest_may_round_a_tenth_of_a_second_and_no_more(manifest: Callable[..., Path], tmp_path: Path) -> None:
    result, rows = build(
        tmp_path,
        manifest(
            {"audio_filepath": "a.wav", "duration": 1.1},
            {"audio_filepath": "a.wav", "duration": 1.101},
            {"audio_filepath": "a.wav", "offset": 0.5, "duration": 0.55},
            {"audio_filepath": "a.wav", "offset": 0.5, "duration": 0.65},
            {"audio_filepath": "a.wav", "offset": 1.0},
            {"audio_filepath": "a.wav", "offset": 1.0, "duration": 0.05},
            {"audio_filepath": "a.wav", "offset": 5.0, "duration": 1.0},
        ),
    )
    assert [(row["start_sample"], row["num_samples"], row["error"]) for row in rows] == [
        (0, 16_000, None),
        (0, 17_616, "out-of-range"),
        (8_000, 8_000, None),
        (8_000, 10_400, "out-of-range"),
        (16_000, 0, "out-of-range"),
        (16_000, 800, "out-of-range"),
        (80_000, 16_000, "out-of-range"),
    ]
    assert all(row["duration_s"] == 0.0 for row in rows if row["error"])
    assert "16,000" in rows[1]["error_message"]
    assert result.counts.errors == 5


def test_two_parts_of_a_broken_recording_are_two_error_rows(manifest: Callable[..., Path], tmp_path: Path) -> None:
    _, rows = build(
        tmp_path,
        manifest({"audio_filepath": "no.wav"}, {"audio_filepath": "no.wav", "offset": 1.5, "duration": 1.0}),
    )
    assert [row["error"] for row in rows] == ["missing", "missing"]
    assert rows[0]["id"] != rows[1]["id"]


MISTAKES: dict[str, tuple[dict[str, Any] | str | bytes, str]] = {
    "not JSON": ("{audio_filepath: a.wav}", "not JSON"),
    "cut short": ('{"audio_filepath": "a.w', "not JSON"),
    "two objects": ('{"audio_filepath": "a.wav"} {"audio_filepath": "a.wav"}', "not JSON"),
    "a list": ('["a.wav"]', "not a JSON object"),
    "a string": ('"a.wav"', "not a JSON object"),
    "no path": ({"text": "hello"}, "'audio_filepath' is missing"),
    "a number for a path": ({"audio_filepath": 5}, "audio_filepath"),
    "null for a path": ({"audio_filepath": None}, "audio_filepath"),
    "a negative offset": ({"audio_filepath": "a.wav", "offset": -0.1}, "must not be negative"),
    "a negative duration": ({"audio_filepath": "a.wav", "duration": -1}, "must not be negative"),
    "a word for an offset": ({"audio_filepath": "a.wav", "offset": "soon"}, "soon"),
    "a list for a duration": ({"audio_filepath": "a.wav", "duration": [1]}, "list"),
    "bytes that are not UTF-8": (b'{"audio_filepath": "a\xff.wav"}', "not UTF-8"),
    "an offset that is no number": ('{"audio_filepath": "a.wav", "offset": NaN}', ""),
    "an endless offset": ('{"audio_filepath": "a.wav", "offset": Infinity}', ""),
    "a duration that is no number": ('{"audio_filepath": "a.wav", "duration": NaN}', ""),
    "an endless duration": ('{"audio_filepath": "a.wav", "duration": Infinity}', ""),
    "an offset of 400 digits": ('{"audio_filepath": "a.wav", "offset": 1' + "0" * 400 + "}", ""),
    "brackets without end": ("[" * 100_000, ""),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_the_last_line_is_told_with_file_and_line_before_anything_is_written(
    name: str, manifest: Callable[..., Path], tmp_path: Path
) -> None:
    line, words = MISTAKES[name]
    path = manifest({"audio_filepath": "a.wav"}, "", {"audio_filepath": "a.wav", "offset": 0.5}, line)
    with pytest.raises(UserError) as caught:
        build(tmp_path, path)
    assert str(path) in str(caught.value)
    assert "line 4" in str(caught.value)
    assert words in str(caught.value)
    assert len(str(caught.value)) < 2_000
    assert not (tmp_path / "root").exists()


@pytest.mark.parametrize(
    "line",
    [
        '{"audio_filepath": "a.wav", "offset": 1e300}',
        '{"audio_filepath": "a.wav", "duration": 1e300}',
        '{"audio_filepath": "a.wav", "offset": 1e16}',
        '{"audio_filepath": "a\\u0000.wav"}',
        '{"audio_filepath": "/a\\u0000.wav"}',
        '{"audio_filepath": "a\\ud800.wav"}',
        '{"audio_filepath": ""}',
        '{"audio_filepath": "%s"}' % ("a" * 5_000),
    ],
    ids=lambda line: line[:50].replace("\\", ""),
)
def test_a_line_that_no_table_or_disk_can_hold_is_told_or_becomes_an_error_row_and_never_a_crash(
    line: str, manifest: Callable[..., Path], tmp_path: Path
) -> None:
    path = manifest({"audio_filepath": "a.wav", "offset": 0.5}, line)
    try:
        _, rows = build(tmp_path, path)
    except UserError as error:
        rows, told = [], str(error)
    else:
        told = ""
    if told:
        assert "line 2" in told
        assert not (tmp_path / "root").exists()
    elif "ud800.wav" in line or "audio_filepath" not in line or line.count('"') == 4:
        assert [row["error"] is None for row in rows] == [True, False]
    else:  # half a character in a text is replaced
        assert [row["error"] for row in rows] == [None, None]
        assert "\N{REPLACEMENT CHARACTER}" in (rows[1]["text"] or rows[1]["speaker"])


def test_half_characters_in_a_text_stop_nobody(manifest: Callable[..., Path], tmp_path: Path) -> None:
    """JSON can hold them, UTF-8 and so a table cannot."""
    path = manifest(
        '{"audio_filepath": "a.wav", "text": "a\\ud800b", "speaker": "\\udfffx", "language": "\\ud83c\\udfb5"}'
    )
    _, [row] = build(tmp_path, path)
    assert row["error"] is None
    assert (row["text"], row["speaker"], row["language"]) == ("a\ufffdb", "\ufffdx", "🎵")


def test_a_manifest_with_a_byte_order_mark_and_windows_line_ends_is_read(
    manifest: Callable[..., Path], tmp_path: Path
) -> None:
    path = manifest(b'\xef\xbb\xbf{"audio_filepath": "a.wav"}\r', b'{"audio_filepath": "a.wav", "offset": 0.5}\r')
    _, rows = build(tmp_path, path)
    assert [(row["start_sample"], row["num_samples"]) for row in rows] == [(0, 16_000), (8_000, 8_000)]


def test_the_parts_that_a_manifest_names_are_cut_into_windows(manifest: Callable[..., Path], tmp_path: Path) -> None:
    path = manifest({"audio_filepath": "a.wav", "offset": 0.25, "duration": 0.5})
    _, rows = build(tmp_path, path, window_s=0.2)
    assert [(row["start_sample"], row["num_samples"]) for row in rows] == [
        (4_000, 3_200),
        (7_200, 3_200),
        (10_400, 1_600),
    ]


def test_sources_of_one_name_in_one_build_are_refused(tmp_path: Path) -> None:
    touch(tmp_path / "x" / "s" / "a.wav")
    touch(tmp_path / "y" / "s" / "a.wav")
    with pytest.raises(UserError, match="Two sources are called 's'"):
        build(tmp_path, tmp_path / "x" / "s", tmp_path / "y" / "s")
    assert not (tmp_path / "root").exists()


def test_listing_is_lazy_about_content(tmp_path: Path) -> None:
    """Opening a source names what is there; nothing is judged until its entries are taken."""
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "a.txt").write_text("no audio")
    source: Source = open_source(str(tmp_path / "s"), exclude=NOWHERE)
    assert not source.skipped
    assert list(source.entries) == []
    assert source.skipped == {".txt": 1}
