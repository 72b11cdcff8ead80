"""Kaldi data folders: what is read, and what is refused because it would have to be run."""

from collections.abc import Callable
from pathlib import Path

import pytest
from wavemill.pipelines.entries import Entry
from wavemill.pipelines.sources import open_source
from wavemill.tokenizers.spec import UserError

NOWHERE = "/nowhere/at/all"


@pytest.fixture
def kaldi(tmp_path: Path) -> Callable[..., Path]:
    """A data folder of the files given."""

    def write(**files: str | bytes) -> Path:
        folder = tmp_path / "data"
        folder.mkdir(exist_ok=True)
        for name, content in files.items():
            path = folder / name.replace("wav_scp", "wav.scp")
            path.write_bytes(content.encode() if isinstance(content, str) else content)
        return folder

    return write


def listed(path: Path | str) -> list[Entry]:
    return list(open_source(str(path), exclude=NOWHERE).entries)


def test_recordings_have_text_speaker_and_language(kaldi: Callable[..., Path]) -> None:
    folder = kaldi(
        wav_scp="a /far/a b.wav\nb sub/b.wav\n\n",
        text="a hello  you\nb\nc not here\n",
        utt2spk="a s1\nb s2\n",
        utt2lang="a en\n",
        spk2utt="s1 a\ns2 b\n",
    )
    expected = [
        Entry(path="/far/a b.wav", text="hello  you", speaker="s1", language="en"),
        Entry(path="sub/b.wav", speaker="s2"),
    ]
    assert listed(folder) == listed(folder / "wav.scp") == expected
    source = open_source(str(folder / "wav.scp"), exclude=NOWHERE)
    assert (source.name, source.root) == ("data", str(folder))


def test_segments_are_spans_of_recordings(kaldi: Callable[..., Path]) -> None:
    folder = kaldi(
        wav_scp="r1 a.wav\nr2 b.wav\n",
        segments="r1-1 r1 0.5 1.75\nr1-2 r1 2 -1\nr2-1 r2 0 3\n",
        text="r1-1 one\nr2-1 three\nr1 not this\n",
        utt2spk="r1-1 s\nr1-2 s\nr2-1 t\n",
        reco2file_and_channel="r1 a A\nr2 b B\n",
    )
    assert listed(folder) == [
        Entry(path="a.wav", offset_s=0.5, duration_s=1.25, text="one", speaker="s", channel=0),
        Entry(path="a.wav", offset_s=2.0, speaker="s", channel=0),
        Entry(path="b.wav", offset_s=0.0, duration_s=3.0, text="three", speaker="t", channel=1),
    ]


def test_paths_count_from_the_folder_and_then_from_here(
    kaldi: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = kaldi(wav_scp="a a.wav\nb b.wav\nc c.wav\nd data/d.wav\n", **{"a.wav": "", "d.wav": ""})
    (tmp_path / "a.wav").touch()
    (tmp_path / "b.wav").touch()
    monkeypatch.chdir(tmp_path)
    assert [entry.path for entry in listed(folder)] == ["a.wav", str(tmp_path / "b.wav"), "c.wav", "d.wav"]


REFUSED: dict[str, tuple[dict[str, str | bytes], str]] = {
    "a command": ({"wav_scp": "a x.wav\nb sph2pipe -f wav b.sph |\n"}, r"wav\.scp, line 2: .*runs none"),
    "an archive": ({"wav_scp": "a x.wav\nb /far/raw.ark:1234\n"}, r"wav\.scp, line 2: .*Kaldi archive"),
    "a range": ({"wav_scp": "a /far/raw.ark:1234[0:10]\n"}, r"wav\.scp, line 1: .*Kaldi archive"),
    "standard input": ({"wav_scp": "a -\n"}, r"wav\.scp, line 1: .*Kaldi archive"),
    "a URL": ({"wav_scp": "a https://example.org/a.wav\n"}, r"wav\.scp, line 1: .*URL"),
    "no path": ({"wav_scp": "a\n"}, r"wav\.scp, line 1: the path is missing"),
    "no UTF-8": ({"wav_scp": b"a a\xff.wav\n"}, r"wav\.scp, line 1: this is not UTF-8"),
    "an unknown recording": ({"segments": "u1 a 0 1\nu2 z 0 1\n"}, r"segments, line 2: .*'z' is not in wav\.scp"),
    "a segment cut short": ({"segments": "u1 a 0\n"}, "segments, line 1"),
    "a word for a time": ({"segments": "u1 a 0 end\n"}, "segments, line 1"),
    "an end before the start": ({"segments": "u1 a 2 1\n"}, "segments, line 1"),
    "a channel that is none": ({"reco2file_and_channel": "a a C\n"}, "reco2file_and_channel, line 1: .*'C'"),
    "text that is not UTF-8": ({"text": b"a ok\na \xff\n"}, "text, line 2: this is not UTF-8"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_taken_is_told_with_file_and_line_and_nothing_is_run(
    name: str, kaldi: Callable[..., Path]
) -> None:
    files, words = REFUSED[name]
    folder = kaldi(**{"wav_scp": "a a.wav\n", **files})
    with pytest.raises(UserError, match=words):
        open_source(str(folder), exclude=NOWHERE)


def test_a_command_is_not_run(kaldi: Callable[..., Path], tmp_path: Path) -> None:
    folder = kaldi(wav_scp=f"a touch {tmp_path}/ran |\n")
    with pytest.raises(UserError):
        open_source(str(folder), exclude=NOWHERE)
    assert not (tmp_path / "ran").exists()
