"""Word and phone times: praatio is the oracle for TextGrids, the formats' own documents for the rest."""

from pathlib import Path

import pytest
from praatio import textgrid
from praatio.utilities.constants import Interval
from wavemill.pipelines.entries import Label
from wavemill.pipelines.labels import (
    LabelError,
    Times,
    decode_text,
    is_audacity,
    parse_audacity,
    parse_ctm,
    parse_lab,
    parse_textgrid,
    parse_times,
)


def oracle(path: Path) -> dict[str, list[tuple[float, float, str]]]:
    """Interval tiers as praatio reads them, without empty intervals."""
    grid = textgrid.openTextgrid(str(path), includeEmptyIntervals=False, duplicateNamesMode="rename")
    return {
        tier.name: [(entry.start, entry.end, entry.label.strip()) for entry in tier.entries]
        for tier in grid.tiers
        if isinstance(tier, textgrid.IntervalTier)
    }


def ours(path: Path) -> dict[str, list[tuple[float, float, str]]]:
    tiers = parse_textgrid(decode_text(path.read_bytes()))
    return {name: [(label.start_s, label.end_s, label.label) for label in labels] for name, labels in tiers}


@pytest.mark.parametrize(
    "name",
    [
        "praatio/bobby_phones.TextGrid",
        "praatio/bobby_words.TextGrid",
        "praatio/mary.TextGrid",
        "mfa/acoustic_corpus.phones.TextGrid",
        "mfa/michaelandsickmichael.TextGrid",
    ],
)
def test_real_textgrids_read_as_praatio_reads_them(dev_recordings: Path, name: str) -> None:
    expected = oracle(dev_recordings / name)
    assert expected
    assert ours(dev_recordings / name) == expected


LABELS = ['say "ah"', "two words", "ə", "日本", "5", "0.5 1.5", "<exists>", "xmin = 3", "! no comment", "a\nb"]


@pytest.mark.parametrize("format", ["short_textgrid", "long_textgrid"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be"])
def test_textgrids_that_praatio_writes_come_back_in_every_format_and_encoding(
    tmp_path: Path, format: str, encoding: str
) -> None:
    grid = textgrid.Textgrid()
    entries = [Interval(0.125 * index, 0.125 * index + 0.1, label) for index, label in enumerate(LABELS)]
    grid.addTier(textgrid.IntervalTier("words", entries, 0, 5))
    grid.addTier(textgrid.PointTier("clicks", [(0.5, "click"), (0.75, "clack")], 0, 5))
    grid.addTier(textgrid.IntervalTier("phones", entries[:3], 0, 5))
    path = tmp_path / "a.TextGrid"
    grid.save(str(path), format=format, includeBlankSpaces=True)
    text = path.read_text(encoding="utf-8")
    path.write_bytes(b"\xfe\xff" + text.encode(encoding) if encoding == "utf-16-be" else text.encode(encoding))
    times = parse_times(".TextGrid", path.read_bytes())
    assert times.words == tuple(Label(entry.start, entry.end, entry.label) for entry in entries)
    assert times.phones == times.words[:3]


def test_tiers_are_known_by_their_names(tmp_path: Path) -> None:
    def times(*names: str, suffix: str = ".TextGrid") -> Times:
        grid = textgrid.Textgrid()
        for number, name in enumerate(names):
            grid.addTier(textgrid.IntervalTier(name, [Interval(number, number + 1, name)], 0, 9))
        grid.save(str(tmp_path / "a.TextGrid"), format="long_textgrid", includeBlankSpaces=True)
        return parse_times(suffix, (tmp_path / "a.TextGrid").read_bytes())

    assert times("Words", "PHONES", "notes") == Times((Label(0, 1, "Words"),), (Label(1, 2, "PHONES"),))
    assert times("word", "phone") == Times((Label(0, 1, "word"),), (Label(1, 2, "phone"),))
    assert times("segments") == Times(None, (Label(0, 1, "segments"),))
    assert times("anna - words", "ben - words", "anna - phones") == Times(
        (Label(0, 1, "anna - words"), Label(1, 2, "ben - words")), (Label(2, 3, "anna - phones"),)
    )
    assert times("notes", "sentences") == Times()
    assert times("ORT", suffix="_words.TextGrid") == Times((Label(0, 1, "ORT"),), None)
    assert times("MAU", suffix=".phones.TextGrid") == Times(None, (Label(0, 1, "MAU"),))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no grid",
        b'File type = "ooTextFile"\nObject class = "Sound"\n',
        b'File type = "ooTextFile"\nObject class = "TextGrid"\n\n0\n1\n<exists>\n2\n',
        b'"ooTextFile" "TextGrid" 0 1 <exists> 1 "IntervalTier" "words" 0 1 1 0.5 0.25 "back in time"',
        b'"ooTextFile" "TextGrid" 0 1 <exists> 1 "IntervalTier" "words" 0 1 1 -3 0.25 "before all"',
        b'"ooTextFile" "TextGrid" 0 1 <exists> 1 "IntervalTier" "words" 0 1 999999999999 0 1 "a"',
        b'"ooTextFile" "TextGrid" 0 1 <exists> 1 "IntervalTier" "words" 0 1 1.5 0 1 "a"',
        b'"ooTextFile" "TextGrid" 0 1 <exists> 1 "IntervalTier" "words" 0 1 1 0 1e999 "a"',
        b"ooBinaryFile\x08TextGrid\x00\x00",
        b"\xff\xfeu",
        b"\xe9t\xe9",
    ],
)
def test_a_textgrid_that_is_none_or_ends_early_is_refused(content: bytes) -> None:
    with pytest.raises(LabelError):
        parse_times(".TextGrid", content)


def test_full_context_labels_of_hts_give_the_phone_in_their_middle(dev_recordings: Path) -> None:
    lines = (dev_recordings / "cmu_arctic" / "arctic_a0009_phone.lab").read_text().splitlines()
    phones = parse_times("_phone.lab", "\n".join(lines).encode()).phones
    assert phones is not None
    assert len(phones) == len(lines) == 40
    assert [(phone.start_s, phone.end_s) for phone in phones[:3]] == [(0.0, 0.13), (0.13, 0.205), (0.205, 0.27)]
    assert " ".join(phone.label for phone in phones[:11]) == "sil hh iy t er n d sh aa r p"
    assert phones[-1].end_s == int(lines[-1].split()[1]) / 1e7


def test_htk_labels_count_in_hundred_nanoseconds_and_decimals_are_seconds() -> None:
    assert parse_lab("0 1300000 sil\n1300000 2050000 hh -8.5\n") == (Label(0, 0.13, "sil"), Label(0.13, 0.205, "hh"))
    assert parse_lab("0.0 0.13 sil\n0.13 0.205 hh\n") == (Label(0, 0.13, "sil"), Label(0.13, 0.205, "hh"))
    assert parse_lab("0 10000000 sil-hh+iy\n") == (Label(0, 1, "hh"),)
    assert parse_times(".words.lab", b"0 10000000 hello\n") == Times((Label(0, 1, "hello"),), None)


def test_states_of_one_phone_become_one_phone() -> None:
    states = "".join(
        f"{number * 500_000} {(number + 1) * 500_000} x^{phone}+y=z[{state}]\n"
        for number, (phone, state) in enumerate((p, s) for p in ("x-sil", "sil-a", "sil-a") for s in range(2, 7))
    )
    assert parse_lab(states) == (Label(0, 0.25, "sil"), Label(0.25, 0.5, "a"), Label(0.5, 0.75, "a"))


def test_timit_counts_samples_at_16_khz() -> None:
    assert parse_times(".phn", b"0 3050 h#\n3050 4559 sh\n").phones == (
        Label(0, 3050 / 16_000, "h#"),
        Label(3050 / 16_000, 4559 / 16_000, "sh"),
    )
    assert parse_times(".WRD", b"3050 5723 she\r\n").words == (Label(3050 / 16_000, 5723 / 16_000, "she"),)


def test_audacity_labels_are_seconds_between_tabs() -> None:
    text = "0.100000\t0.500000\thello there\n\\\t100.0\t200.0\n0,750000\t0,750000\t\n0.800000\t0.900000\tx\n"
    assert is_audacity(text)
    assert parse_audacity(text) == (Label(0.1, 0.5, "hello there"), Label(0.8, 0.9, "x"))
    assert not is_audacity("0.1 0.5 is what it costs\n")
    assert not is_audacity("")


def test_ctm_lines_give_each_recordings_words_by_time() -> None:
    text = ";; made by hand\nb 1 0.50 0.25 there 0.9\nb 1 0.10 0.30 hello\n\na A 1 2 x\n"
    found = parse_ctm(text)
    assert found["b"] == (Label(0.1, 0.4, "hello"), Label(0.5, 0.75, "there"))
    assert found["a"] == (Label(1, 3, "x"),)


@pytest.mark.parametrize(
    ("suffix", "content"),
    [
        (".lab", b"0 5 a\n5\n"),
        (".lab", b"0 x a\n"),
        (".lab", b"5 0 a\n"),
        (".lab", b"0.0 nan a\n"),
        (".phn", b"-5 0 a\n"),
        (".phn", b"0 5\n"),
        (".phn", b"0 5 \x00\n"),
    ],
)
def test_labels_without_sound_times_are_refused(suffix: str, content: bytes) -> None:
    with pytest.raises(LabelError):
        parse_times(suffix, content)


@pytest.mark.parametrize("line", ["a 1 0.5 0.5", "a 1 x 0.5 word", "a 1 0.5 -1 word", "a 1 inf 1 word"])
def test_ctm_lines_without_sound_times_are_refused(line: str) -> None:
    with pytest.raises(LabelError):
        parse_ctm(line)
