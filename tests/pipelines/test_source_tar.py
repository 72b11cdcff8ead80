"""Tars of recordings: WebDataset's own, plain ones, torn ones and hostile ones. Nothing is ever written."""

import gzip
import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import webdataset
from wavemill.pipelines.entries import Entry, Label
from wavemill.pipelines.sources import open_source
from wavemill.tokenizers.spec import UserError

NOWHERE = "/nowhere/at/all"


def sound(seed: int = 0, format: str = "WAV") -> bytes:
    buffer = io.BytesIO()
    noise = 0.1 * np.random.default_rng(seed).standard_normal(1_600)
    soundfile.write(buffer, noise, 16_000, format=format)
    return buffer.getvalue()


@pytest.fixture
def tar(tmp_path: Path) -> Callable[..., Path]:
    """Writes members, bytes by name or whole headers, as a tar of the name given."""

    def write(*members: tuple[str, bytes] | tarfile.TarInfo, name: str = "a.tar", **options: Any) -> Path:
        path = tmp_path / name
        with tarfile.open(path, "w:gz" if name.endswith("gz") else "w", **options) as file:
            for member in members:
                header = member if isinstance(member, tarfile.TarInfo) else tarfile.TarInfo(member[0])
                content = b"" if isinstance(member, tarfile.TarInfo) else member[1]
                header.size = len(content)
                file.addfile(header, io.BytesIO(content))
        return path

    return write


def listed(path: Path | str) -> list[Entry]:
    return list(open_source(str(path), exclude=NOWHERE).entries)


def kinds(path: Path) -> list[tuple[str, str | None]]:
    return [(entry.member, entry.error.kind if entry.error else None) for entry in listed(path)]


@pytest.mark.parametrize("name", ["shard.tar", "shard.tar.gz"])
def test_shards_that_webdataset_writes_are_read_with_all_that_they_say(tmp_path: Path, name: str) -> None:
    sounds = {f"sample{number:03d}": sound(number, "FLAC") for number in range(5)}
    with (tmp_path / name).open("wb") as file, webdataset.TarWriter(file, compress=name.endswith(".gz")) as sink:
        for number, (key, content) in enumerate(sounds.items()):
            fields = {"speaker": f"s{number}", "language": "en", "duration": 0.1}
            sink.write({"__key__": key, "flac": content, "txt": f"text {number}", "json": fields, "cls": number})
    source = open_source(str(tmp_path / name), exclude=NOWHERE)
    entries = list(source.entries)
    assert [(e.member, e.text, e.speaker, e.language) for e in entries] == [
        (f"{key}.flac", f"text {number}", f"s{number}", "en") for number, key in enumerate(sounds)
    ]
    assert [entry.size_bytes for entry in entries] == [len(content) for content in sounds.values()]
    assert {entry.path for entry in entries} == {name}
    assert source.root == str(tmp_path)
    assert source.skipped == {".cls": 5}
    if name.endswith(".gz"):
        assert {entry.member_offset for entry in entries} == {None}
    else:
        whole = (tmp_path / name).read_bytes()
        for entry, content in zip(entries, sounds.values(), strict=True):
            assert entry.member_offset is not None
            assert whole[entry.member_offset :][: len(content)] == content


def test_members_of_one_key_belong_together_and_the_key_ends_at_the_first_dot(tar: Callable[..., Path]) -> None:
    path = tar(
        ("a.b/x.mix.wav", sound()),
        ("a.b/x.voice.wav", sound(1)),
        ("a.b/x.txt", b"hello"),
        ("a.b/x.TextGrid", b'"ooTextFile" "TextGrid" 0 1 <exists> 1 "IntervalTier" "word" 0 1 1 0 1 "hi"'),
        ("c/x.wav", sound(2)),
        ("a.b/x.json", b'{"text": "too late: its key is over"}'),
    )
    entries = listed(path)
    assert [(e.member, e.text) for e in entries] == [
        ("a.b/x.mix.wav", "hello"),
        ("a.b/x.voice.wav", "hello"),
        ("c/x.wav", None),
    ]
    assert entries[0].words == (Label(0, 1, "hi"),)


def test_audio_is_known_by_its_content_too_and_the_rest_is_counted(tar: Callable[..., Path]) -> None:
    path = tar(
        ("a.bin", sound()),
        ("b", sound(1, "OGG")),
        ("c.npy", b"\x93NUMPY"),
        ("d.mp3", b"<html>"),
        (".hidden.wav", sound(2)),
        ("e/._f.wav", b"resource fork"),
        ("./g.wav", sound(3)),
    )
    source = open_source(str(path), exclude=NOWHERE)
    assert [entry.member for entry in source.entries] == ["a.bin", "b", "d.mp3", "./g.wav"]
    assert source.skipped == {".npy": 1}


def test_real_odd_tars(dev_recordings: Path) -> None:
    odd = dev_recordings / "odd"
    names = [member for member, error in kinds(odd / "made_names.tar") if error is None]
    assert len(names) == 4
    assert names[0] == "latin1_\\udce9t\\udce9.wav"
    assert len(names[1].encode()) == 244
    assert names[2:] == ["space and 'quote\".wav", "emoji_🎤.wav"]
    assert kinds(odd / "made_traversal.tar") == [
        ("ok_0001.wav", None),
        ("../escape_0002.wav", "unsafe-name"),
        ("a/../../escape_0003.wav", "unsafe-name"),
    ]
    assert kinds(odd / "made_truncated.tar") == [("a.wav", None), ("b.wav", "truncated")]


def test_names_that_lead_out_links_and_devices_are_rows_and_nothing_is_written(
    tar: Callable[..., Path], tmp_path: Path
) -> None:
    def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
        header = tarfile.TarInfo(name)
        header.type, header.linkname = kind, target
        return header

    path = tar(
        ("/etc/passwd.wav", sound()),
        ("../x.wav", sound()),
        ("a/../../x.txt", b"text"),
        special("link.wav", tarfile.SYMTYPE, "/etc/passwd"),
        special("hard.wav", tarfile.LNKTYPE, "ok.wav"),
        special("null.wav", tarfile.CHRTYPE),
        special("pipe.wav", tarfile.FIFOTYPE),
        special("folder", tarfile.DIRTYPE),
        ("n" * 5_000 + ".wav", sound()),
        ("..hidden/ok.wav", sound()),
        ("ok.wav", sound()),
        format=tarfile.PAX_FORMAT,
    )
    before = {found: found.stat().st_mtime_ns for found in tmp_path.rglob("*")}
    found = kinds(path)
    assert [error for _, error in found] == ["unsafe-name"] * 8 + [None]
    assert found[-1] == ("ok.wav", None)
    assert all(len(member) <= 4_096 for member, _ in found)
    assert {found: found.stat().st_mtime_ns for found in tmp_path.rglob("*")} == before


def test_a_name_that_comes_twice_is_an_error_the_second_time(tar: Callable[..., Path]) -> None:
    path = tar(("a.wav", sound()), ("b.wav", sound(1)), ("a.wav", sound(2)))
    assert kinds(path) == [("a.wav", None), ("b.wav", None), ("a.wav", "duplicate-member")]


def test_sparse_members_are_refused(tar: Callable[..., Path], tmp_path: Path) -> None:
    header = tarfile.TarInfo("a.wav")
    header.pax_headers = {"GNU.sparse.major": "0", "GNU.sparse.minor": "1", "GNU.sparse.map": "0,10"}
    header.pax_headers |= {"GNU.sparse.name": "a.wav", "GNU.sparse.size": "1000000000000"}
    path = tar(header, ("b.wav", sound()), format=tarfile.PAX_FORMAT)
    assert kinds(path) == [("a.wav", "unsupported"), ("b.wav", None)]


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz"])
def test_a_tar_torn_anywhere_gives_what_came_before_and_says_so(tar: Callable[..., Path], name: str) -> None:
    content = sound()
    path = tar(("a.wav", content), ("b.txt", b"text"), ("b.wav", content), name=name)
    plain = gzip.decompress(path.read_bytes()) if name.endswith("gz") else path.read_bytes()
    data = -(-len(content) // 512) * 512
    end_of_a, end_of_b = 512 + len(content), 512 + data + 1_024 + 512 + len(content)
    for cut in (
        1_000,
        end_of_a - 1,
        end_of_a,
        512 + data,
        512 + data + 100,
        end_of_b - 1,
        end_of_b,
        512 * 4 + 2 * data,
    ):
        torn = plain[:cut]
        path.write_bytes(gzip.compress(torn) if name.endswith("gz") else torn)
        found = kinds(path)
        good = [member for member, error in found if error is None]
        assert good == ["a.wav"][: cut >= end_of_a] + ["b.wav"][: cut >= end_of_b], cut
        assert found[-1][1] == "truncated", cut
        assert len(found) == len(good) + 1
    path.write_bytes(gzip.compress(plain)[:-20] if name.endswith("gz") else plain[: end_of_b - 20])
    assert kinds(path)[-1][1] == "truncated"


def test_a_damaged_header_is_told_and_never_taken_for_the_end(tar: Callable[..., Path]) -> None:
    path = tar(("a.wav", sound()), ("b.wav", sound()), ("c.wav", sound()))
    damaged = bytearray(path.read_bytes())
    damaged[512 + -(-len(sound()) // 512) * 512 + 5] ^= 0xFF  # in b.wav's name: the checksum is wrong
    path.write_bytes(damaged)
    assert kinds(path) == [("a.wav", None), ("", "truncated")]


def test_headers_that_ask_for_gigabytes_or_less_than_nothing_are_refused(tmp_path: Path) -> None:
    for kind, size in ((b"x", 1 << 40), (b"L", 1 << 33), (b"x", -512), (b"0", -1024), (b"g", 1 << 21)):
        first = tarfile.TarInfo("a.wav")
        first.size = len(sound())
        evil = tarfile.TarInfo("evil")
        evil.type, evil.size = kind, size
        content = first.tobuf() + sound() + bytes(-len(sound()) % 512)
        (tmp_path / "a.tar").write_bytes(content + evil.tobuf(tarfile.GNU_FORMAT) + bytes(10_240))
        assert kinds(tmp_path / "a.tar") == [("a.wav", None), ("", "truncated")], (kind, size)


def test_a_thousand_long_names_in_a_row_do_not_exhaust_the_stack(tmp_path: Path) -> None:
    header = tarfile.TarInfo("././@LongLink")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, 10
    block = header.tobuf(tarfile.GNU_FORMAT) + b"long name\0".ljust(512, b"\0")
    (tmp_path / "a.tar").write_bytes(block * 20_000)
    [(_, error)] = kinds(tmp_path / "a.tar")
    assert error == "truncated"


@pytest.mark.slow
def test_listing_a_large_tar_takes_little_memory(tmp_path: Path) -> None:
    import tracemalloc

    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as file:
        for number in range(20_000):
            header = tarfile.TarInfo(f"folder/{number:08d}.wav")
            header.size = 4
            file.addfile(header, io.BytesIO(b"RIFF"))
    tracemalloc.start()
    try:
        count = sum(1 for _ in open_source(str(path), exclude=NOWHERE).entries)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == 20_000
    assert peak < 6 << 20  # tarfile alone would keep 20,000 headers, some 30 MB


def test_side_members_that_cannot_be_read_are_counted(tar: Callable[..., Path]) -> None:
    large = ("a.text", b"x" * (1 << 21))
    path = tar(("a.wav", sound()), ("a.json", b"{"), ("a.txt", b"\xe9"), large, ("b.txt", b"of nobody"))
    source = open_source(str(path), exclude=NOWHERE)
    assert [entry.text for entry in source.entries] == [None]
    unread = {f".{name} that cannot be read": 1 for name in ("json", "txt", "text")}
    assert source.skipped == {**unread, ".txt": 1}


def test_archives_of_other_kinds_and_tars_that_are_none_are_told(tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(b"PK")
    with pytest.raises(UserError, match="an archive of a kind that wavemill does not read"):
        listed(tmp_path / "a.zip")
    (tmp_path / "a.tar").write_bytes(b"")
    with pytest.raises(UserError, match="is no tar"):
        open_source(str(tmp_path / "a.tar"), exclude=NOWHERE, kind="webdataset")
    with pytest.raises(UserError, match="is a folder, not a tar"):
        open_source(str(tmp_path), exclude=NOWHERE, kind="webdataset")


def test_json_members_of_any_shape_stop_nobody(tar: Callable[..., Path]) -> None:
    for content in (b"[1]", b"null", b'"x"', b"[" * 100_000, json.dumps({"text": ["a"], "speaker": {}}).encode()):
        assert len(listed(tar(("a.wav", sound()), ("a.json", content)))) == 1


def test_a_tar_that_is_a_pipe_holds_nobody_up(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.tar")
    source = open_source(str(tmp_path), exclude=NOWHERE)
    assert list(source.entries) == []
    assert source.skipped == {".tar": 1}
