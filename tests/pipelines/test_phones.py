"""Units against phones: hand-made cases, a naive count over frames in fractions, and real speech."""

import csv
import json
import math
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from wavemill.jobs.codebook import FitOptions, fit_codebook
from wavemill.jobs.corpus import build_corpus
from wavemill.jobs.engine import InlineEngine
from wavemill.jobs.tokenize import TokenizeOptions, tokenize
from wavemill.pipelines.phones import (
    agreement,
    count_phones,
    describe_phones,
    fold_phone,
    read_label_file,
    shuffled,
)
from wavemill.pipelines.policy import CorpusPolicy
from wavemill.pipelines.streams import StreamConfig
from wavemill.storage.codes import open_corpus
from wavemill.storage.root import Root
from wavemill.storage.schema import CORPUS_SCHEMA, code_columns, stream_schema
from wavemill.storage.table import create_table, write_shard
from wavemill.storage.writer import TableWriter
from wavemill.tokenizers.spec import FrameRule, StreamSpec, UserError, chunk_frames, num_frames
from wavemill.tokenizers.tokenizer import TokenizerConfig

UNITS = 7
PHONES = ("AA", "B", "CH", "SIL")
FLOOR = StreamSpec(
    tokenizer="made-up",
    sample_rate=16_000,
    decode_sample_rate=0,
    hop_length=320,
    window_length=400,
    frame_rule=FrameRule.FLOOR,
    num_codebooks=1,
    codebook_size=UNITS,
)
CEIL = StreamSpec(
    tokenizer="made-up-too",
    sample_rate=24_000,
    decode_sample_rate=24_000,
    hop_length=1_920,
    window_length=1,
    frame_rule=FrameRule.CEIL,
    num_codebooks=3,
    codebook_size=UNITS,
)
NO_WINDOW = replace(FLOOR, window_length=0)
CHUNKED = replace(CEIL, hop_length=320, chunk_length=6_400, chunk_stride=6_240)


def write_root(
    path: Path, rows: list[dict[str, Any]], codes: list[np.ndarray | None], spec: StreamSpec = FLOOR
) -> Root:
    """A corpus and the stream `semantic`, of the rows' shards; a row without codes has an error there."""
    root = Root(path)
    create_table(root, "corpus", schema=CORPUS_SCHEMA, metadata={"policy": {}})
    create_table(root, "streams/semantic", schema=stream_schema(spec), metadata={"spec": spec.to_json()})
    corpus, stream = TableWriter(root, "corpus"), TableWriter(root, "streams/semantic")
    blank = dict.fromkeys(CORPUS_SCHEMA.names) | {"source": "s", "source_root": "/", "member": "", "channel": "mix"}
    for shard in sorted({row["shard"] for row in rows}):
        here = [place for place, row in enumerate(rows) if row["shard"] == shard]
        full = [
            blank | {"id": f"{place:026d}", "num_samples": 1, "duration_s": 1.0, "start_sample": 0} | rows[place]
            for place in here
        ]
        corpus.commit([write_shard(root, "corpus", shard, pa.Table.from_pylist(full, schema=CORPUS_SCHEMA))])
        made = []
        for place in here:
            found = codes[place]
            row = {"id": f"{place:026d}", "shard": shard, "error": "corrupt" if found is None else None}
            row |= {"num_frames": None if found is None else found.shape[1]}
            names = code_columns(spec.num_codebooks)
            made.append(row | {name: None if found is None else found[k] for k, name in enumerate(names)})
        table = pa.Table.from_pylist(made, schema=stream_schema(spec))
        stream.commit([write_shard(root, "streams/semantic", shard, table)])
    return root


def span(start_sample: int, num_samples: int, label: str) -> dict[str, Any]:
    return {"start_sample": start_sample, "num_samples": num_samples, "label": label}


def random_rows(seed: int, spec: StreamSpec, *, count: int = 30) -> tuple[list[dict[str, Any]], list[np.ndarray]]:
    """Segments at several rates with gaps between phones and phones over each other, in three shards."""
    random = np.random.default_rng(seed)
    rows, codes = [], []
    for place in range(count):
        rate = int(random.choice([8_000, 16_000, 22_050, 44_100, 48_000]))
        labels = [
            span(int(start), int(random.integers(0, rate // 3)), str(random.choice(PHONES)))
            for start in random.permutation(2 * rate)[: random.integers(0, 15)]
        ]
        rows.append({"shard": place // 12, "path": f"{place}.wav", "sample_rate": rate, "phones": labels})
        codes.append(random.integers(0, UNITS, (spec.num_codebooks, int(random.integers(0, 120)))))
    return rows, codes


def frame_begins(num: int, spec: StreamSpec) -> list[int]:
    """The first sample of each frame."""
    if not spec.chunk_length:
        return [frame * spec.hop_length for frame in range(num)]
    chunks = next(chunk_frames(length, spec) for length in range(10**6) if num_frames(length, spec) == num)
    return [
        chunk * spec.chunk_stride + frame * spec.hop_length
        for chunk, many in enumerate(chunks)
        for frame in range(many)
    ]


def naive_counts(rows: list[dict[str, Any]], codes: list[np.ndarray], spec: StreamSpec, book: int) -> Counter[Any]:
    """Frame by frame: the centre's time as a fraction of a second, the last label in time that covers it."""
    width = spec.window_length if spec.frame_rule is FrameRule.FLOOR and spec.window_length else spec.hop_length
    counts: Counter[Any] = Counter()
    for row, codes_KT in zip(rows, codes, strict=True):
        begins = frame_begins(codes_KT.shape[1], spec)
        for begin, unit in zip(begins, codes_KT[book], strict=True):
            centre_s = Fraction(2 * begin + width, 2 * spec.sample_rate)
            best = None
            for label in row["phones"]:
                start_s = Fraction(label["start_sample"], row["sample_rate"])
                end_s = start_s + Fraction(label["num_samples"], row["sample_rate"])
                if start_s <= centre_s < end_s and (best is None or start_s > best[0]):
                    best = (start_s, label["label"])
            counts[best[1] if best else None, int(unit)] += 1
    return counts


def naive_measures(counts: Counter[Any]) -> dict[str, float]:
    """The three measures as sums over a table of probabilities, in natural logarithms."""
    total = sum(counts.values())
    phones, units = {phone for phone, _ in counts}, {unit for _, unit in counts}
    joint = {(phone, unit): counts[phone, unit] / total for phone in phones for unit in units}
    phone_share = {phone: sum(joint[phone, unit] for unit in units) for phone in phones}
    unit_share = {unit: sum(joint[phone, unit] for phone in phones) for unit in units}
    mutual = sum(p * math.log(p / phone_share[y] / unit_share[z]) for (y, z), p in joint.items() if p)
    entropy = -sum(p * math.log(p) for p in phone_share.values())
    return {
        "pnmi": mutual / entropy,
        "phone_purity": sum(max(joint[phone, unit] for phone in phones) for unit in units),
        "cluster_purity": sum(max(joint[phone, unit] for unit in units) for phone in phones),
    }


def counted(root: Root, **options: Any) -> Any:
    defaults = {"codebook": None, "label_file": None, "fold": False}
    return count_phones(root, open_corpus(root), "semantic", **defaults | options)


# The measures


def test_units_that_are_phones_say_everything() -> None:
    found = agreement(np.diag([5, 3, 9]))
    assert found.pnmi == pytest.approx(1)
    assert (found.phone_purity, found.cluster_purity) == pytest.approx((1, 1))


def test_several_units_to_a_phone_cost_cluster_purity_only() -> None:
    found = agreement(np.array([[4, 6, 0], [0, 0, 10]]))
    assert found.pnmi == pytest.approx(1)
    assert (found.phone_purity, found.cluster_purity) == pytest.approx((1, 0.8))


def test_a_single_unit_says_nothing() -> None:
    found = agreement(np.array([[0, 6], [0, 3], [0, 1]]))
    assert found.pnmi == pytest.approx(0, abs=1e-12)
    assert (found.phone_purity, found.cluster_purity) == pytest.approx((0.6, 1))


def test_a_noisy_binary_channel_has_the_textbook_information() -> None:
    found = agreement(np.array([[3, 1], [1, 3]]))
    bits = 1 + 0.25 * math.log2(0.25) + 0.75 * math.log2(0.75)  # 1 - H(1/4): Cover and Thomas, section 7.1.4
    assert found.pnmi == pytest.approx(bits)
    assert found.mutual_information_bits == pytest.approx(bits)
    assert (found.phone_entropy_bits, found.unit_entropy_bits) == pytest.approx((1, 1))


def test_a_single_phone_has_no_information_to_share() -> None:
    assert agreement(np.array([[2, 3]])).pnmi is None


def test_phones_shuffled_by_their_margins_are_as_phones_shuffled_over_frames() -> None:
    random = np.random.default_rng(0)
    joint_PC = random.integers(0, 40, (6, 9)) * random.integers(0, 2, (6, 9))
    phones, units = np.repeat(np.indices(joint_PC.shape).reshape(2, -1), joint_PC.ravel(), axis=1)
    by_frames = []
    for _ in range(300):
        mixed_PC = np.zeros_like(joint_PC)
        np.add.at(mixed_PC, (random.permutation(phones), units), 1)
        by_frames.append(agreement(mixed_PC).pnmi or 0)
    drawn = [shuffled(joint_PC, seed) for seed in range(300)]
    for drawn_PC in drawn:
        assert (drawn_PC.sum(axis=0) == joint_PC.sum(axis=0)).all()
        assert (drawn_PC.sum(axis=1) == joint_PC.sum(axis=1)).all()
    by_margins = [agreement(drawn_PC).pnmi or 0 for drawn_PC in drawn]
    error = math.hypot(np.std(by_frames), np.std(by_margins)) / math.sqrt(300)
    assert abs(np.mean(by_margins) - np.mean(by_frames)) < 4 * error
    assert (shuffled(joint_PC, 5) == drawn[5]).all()


# Frames and phones


@pytest.mark.parametrize(("spec", "book"), [(FLOOR, 0), (CEIL, 0), (CEIL, 2), (CHUNKED, 1), (NO_WINDOW, 0)])
def test_frames_are_counted_as_a_naive_reader_counts_them(spec: StreamSpec, book: int, tmp_path: Path) -> None:
    rows, codes = random_rows(1, spec)
    counts = counted(write_root(tmp_path / "root", rows, codes, spec), codebook=book)
    naive = naive_counts(rows, codes, spec, book)
    ours = {
        (phone, unit): int(count)
        for phone, row_C in zip(counts.phones, counts.joint_PC, strict=True)
        for unit, count in enumerate(row_C)
        if count
    }
    assert ours == {key: count for key, count in naive.items() if key[0] is not None}
    assert counts.frames_outside == sum(count for key, count in naive.items() if key[0] is None) > 0
    assert sum(ours.values()) > 200
    facts = describe_phones(counts, stream="semantic", codebook=book, seed=0)
    expected = naive_measures(Counter(ours))
    assert {name: facts[name] for name in expected} == pytest.approx(expected)
    json.dumps(facts)


def test_a_phone_holds_the_frames_whose_centres_it_holds(tmp_path: Path) -> None:
    # at 16 kHz the centres lie on samples 200, 520, 840: a phone from 200 to 520 has the first and not the second
    rows = [{"shard": 0, "path": "a", "sample_rate": 16_000, "phones": [span(200, 320, "AA"), span(521, 320, "B")]}]
    counts = counted(write_root(tmp_path / "root", rows, [np.array([[4, 5, 6]])]))
    assert counts.phones == ["AA", "B"]
    assert counts.joint_PC.tolist() == [[0, 0, 0, 0, 1, 0, 0], [0, 0, 0, 0, 0, 0, 1]]
    assert counts.frames_outside == 1


def test_random_units_are_near_chance_and_chance_is_near_nothing(tmp_path: Path) -> None:
    rows, codes = random_rows(2, FLOOR, count=200)
    facts = describe_phones(
        counted(write_root(tmp_path / "root", rows, codes)), stream="semantic", codebook=None, seed=3
    )
    assert 0 < facts["pnmi"] < 0.01
    assert 0 < facts["shuffled"]["pnmi"] < 0.01
    assert facts["phone_purity"] == pytest.approx(facts["shuffled"]["phone_purity"], abs=0.03)


def test_figures_do_not_depend_on_the_shards_or_the_order_of_segments(tmp_path: Path) -> None:
    rows, codes = random_rows(3, FLOOR)
    other = [{**row, "shard": place % 2} for place, row in enumerate(rows[::-1])]
    facts = [
        describe_phones(counted(write_root(tmp_path / name, *made)), stream="semantic", codebook=None, seed=1)
        for name, made in {"one": (rows, codes), "two": (other, codes[::-1])}.items()
    ]
    assert facts[0] == facts[1]


def test_segments_without_phones_or_codes_and_shards_not_done_are_counted_apart(tmp_path: Path) -> None:
    labels = [span(0, 16_000, "AA"), span(16_000, 16_000, "B")]
    row = {"shard": 0, "sample_rate": 16_000}
    rows = [
        row | {"path": "a", "phones": labels},
        row | {"path": "b", "phones": None},
        row | {"path": "c", "phones": labels},
        row | {"path": "d", "sample_rate": None, "phones": None, "error": "empty"},
        row | {"path": "e", "phones": []},
    ]
    codes = [np.zeros((1, 60), int), np.zeros((1, 60), int), None, None, np.zeros((1, 9), int)]
    root = write_root(tmp_path / "root", rows, codes)
    corpus = TableWriter(root, "corpus")
    more = dict.fromkeys(CORPUS_SCHEMA.names) | {"source": "s", "source_root": "/", "member": "", "channel": "mix"}
    more |= {"id": "x", "path": "f", "shard": 1, "num_samples": 1, "duration_s": 1.0, "start_sample": 0}
    corpus.commit([write_shard(root, "corpus", 1, pa.Table.from_pylist([more], schema=CORPUS_SCHEMA))])
    counts = counted(root)
    assert (counts.segments, counts.segments_without_labels, counts.segments_without_codes) == (2, 1, 2)
    assert (counts.frames_outside, counts.shards_missing) == (9, 1)
    assert counts.joint_PC.sum() == 60


@pytest.mark.parametrize(
    ("label", "folded"),
    [
        *(("AA1", "AA"), ("AH0_B", "AH"), ("ER2", "ER"), ("S_E", "S"), ("NG", "NG"), ("aa0", "aa")),
        *(("sil", "SIL"), ("SIL", "SIL"), ("sp", "SIL"), ("SPN_S", "SIL"), ("spn", "SIL"), ("h#", "SIL"), ("", "SIL")),
        *(("a1", "a1"), ("B2", "B2"), ("ɹ", "ɹ"), ("EHH", "EHH"), ("ni3", "ni3")),  # no CMU vowels: tones stay
    ],
)
def test_stress_positions_and_silences_are_folded(label: str, folded: str) -> None:
    assert fold_phone(label) == folded


def test_folding_can_be_left_off(tmp_path: Path) -> None:
    labels = [span(0, 8_000, "AA0"), span(8_000, 8_000, "AA1"), span(16_000, 8_000, "sp"), span(24_000, 8_000, "sil")]
    rows = [{"shard": 0, "path": "a", "sample_rate": 16_000, "phones": labels}]
    root = write_root(tmp_path / "root", rows, [np.zeros((1, 100), int)])
    assert counted(root, fold=True).phones == ["AA", "SIL"]
    assert counted(root, fold=False).phones == ["AA0", "AA1", "sil", "sp"]


# Labels from a file


def test_labels_from_a_file_count_as_the_same_labels_in_the_corpus(tmp_path: Path) -> None:
    rows, codes = random_rows(4, FLOOR)
    for place, row in enumerate(rows):  # windows of recordings, some of them in a tar
        row |= {"start_sample": place * 997, "path": f"{place // 5}.tar" if place % 2 else f"{place}.wav"}
        row |= {"member": f"sub/{place}.flac" if place % 2 else ""}
    lines = ["start_s,phone,file,end_s,word"]
    for row in rows:
        for label in row["phones"]:
            start = row["start_sample"] + label["start_sample"]
            end = start + label["num_samples"]
            name = row["path"] + (f"/{row['member']}" if row["member"] else "")
            lines.append(f"{start / row['sample_rate']!r},{label['label']},{name},{end / row['sample_rate']!r},x")
    (tmp_path / "labels.csv").write_text("\n".join(lines) + "\n", encoding="utf-8-sig")
    labelled = [row for row in rows if row["phones"]]
    inside = counted(write_root(tmp_path / "one", labelled, [codes[rows.index(row)] for row in labelled]))
    bare = [{**row, "phones": None} for row in labelled]
    root = write_root(tmp_path / "two", bare, [codes[rows.index(row)] for row in labelled])
    outside = counted(root, label_file=read_label_file(str(tmp_path / "labels.csv")))
    assert outside.phones == inside.phones
    assert (outside.joint_PC == inside.joint_PC).all()
    assert (outside.segments, outside.frames_outside) == (inside.segments, inside.frames_outside)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"file,start_s,end_s\na,0,1\n", "no column phone"),
        (b"", "no column end_s, file, phone, start_s"),
        (b"file,start_s,end_s,phone\n", "holds no labels"),
        (b"file,start_s,end_s,phone\na,0,1,AA\na,one,2,B\n", "line 3: 'one'"),
        (b"file,start_s,end_s,phone\na,0\n", "line 2: None"),
        (b"file,start_s,end_s,phone\na,2,1,AA\n", "line 2: a phone from 2 s to 1 s"),
        (b"file,start_s,end_s,phone\na,nan,1,AA\n", "line 2: a phone from nan"),
        (b"file,start_s,end_s,phone\na,0,inf,AA\n", "line 2: a phone from 0 s to inf"),
        (b"file,start_s,end_s,phone\na,0,1,\xff\n", "no CSV file in UTF-8"),
        (b'file,start_s,end_s,phone\na,0,1,"AA\n', "no CSV file in UTF-8"),
    ],
)
def test_a_label_file_that_cannot_be_read_is_a_sentence(content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_bytes(content)
    with pytest.raises(UserError, match=said):
        read_label_file(str(tmp_path / "labels.csv"))


def test_labels_that_fit_nothing_are_sentences(tmp_path: Path) -> None:
    rows = [{"shard": 0, "path": "a", "sample_rate": 16_000, "phones": None}]
    root = write_root(tmp_path / "root", rows, [np.zeros((1, 10), int)])
    with pytest.raises(UserError, match="has no phones for any segment"):
        counted(root)
    (tmp_path / "labels.csv").write_text("file,start_s,end_s,phone\nb.wav,0,1,AA\n")
    with pytest.raises(UserError, match=r"whose first recording is 'b\.wav'"):
        counted(root, label_file=read_label_file(str(tmp_path / "labels.csv")))
    (tmp_path / "labels.csv").write_text("file,start_s,end_s,phone\na,7,8,AA\n")
    with pytest.raises(UserError, match="No frame lies inside a phone"):
        counted(root, label_file=read_label_file(str(tmp_path / "labels.csv")))
    words = [span(place, 1, f"word {place}") for place in range(501)]
    with pytest.raises(UserError, match="hardly phones"):
        counted(write_root(tmp_path / "words", [rows[0] | {"phones": words}], [np.zeros((1, 10), int)]))


def test_streams_with_several_codebooks_want_one_named(tmp_path: Path) -> None:
    rows, codes = random_rows(5, CEIL)
    root = write_root(tmp_path / "root", rows, codes, CEIL)
    with pytest.raises(UserError, match="--codebook 0"):
        counted(root)
    with pytest.raises(UserError, match="from 0 to 2"):
        counted(root, codebook=3)
    with pytest.raises(UserError, match="There is no stream 'none'"):
        count_phones(root, open_corpus(root), "none", codebook=None, label_file=None, fold=True)


@pytest.mark.parametrize(
    ("spec", "has"),
    [
        (replace(FLOOR, frame_rule=FrameRule.FREE), "no clock"),
        (replace(FLOOR, num_codebooks=0, dim=4), "numbers, not codes"),
        (replace(FLOOR, frame_rule=FrameRule.ONE), "one frame a segment"),
    ],
)
def test_streams_without_codes_on_a_clock_are_refused(spec: StreamSpec, has: str, tmp_path: Path) -> None:
    root = write_root(tmp_path / "root", [{"shard": 0, "path": "a", "sample_rate": 16_000, "phones": []}], [None], spec)
    with pytest.raises(UserError, match=rf"Stream 'semantic' \(made-up\) has {has}, and phones"):
        counted(root)


# The command


@pytest.mark.slow
def test_the_command_prints_figures_for_people_and_for_programs(
    tmp_path: Path, wavemill: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    rows, codes = random_rows(6, FLOOR)
    root = write_root(tmp_path / "root", rows, codes)
    facts = json.loads(wavemill("phones", root.uri, "--json", "--seed", "4").stdout)
    assert facts == describe_phones(counted(root), stream="semantic", codebook=None, seed=4)
    shown = wavemill("phones", root.uri)
    assert shown.returncode == 0
    assert f"{facts['pnmi']:.3f}" in shown.stdout
    assert f"{facts['frames']:,}" in shown.stdout
    failed = wavemill("phones", root.uri, "--labels", tmp_path / "none.csv")
    assert failed.returncode == 2
    assert failed.stderr.startswith("Error: Cannot read the labels")
    assert failed.stderr.count("\n") == 1


# Real speech


@pytest.fixture(scope="module")
def spoken(dev_recordings: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Root, Path]:
    """The labelled recordings of several readers, tokenized with 100 centroids of MFCC; the labels as a file."""
    folder = tmp_path_factory.mktemp("spoken")
    with (dev_recordings / "phones_forced.csv").open(newline="") as file:
        names = sorted({line["file"] for line in csv.DictReader(file)})
    for name in names:
        if name.startswith(("librivox_austen", "vctk", "cards", "ljspeech")):
            (folder / "audio" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(dev_recordings / name, folder / "audio" / name)
    root = Root(folder / "root")
    build_corpus(root, [str(folder / "audio")], CorpusPolicy(), shard_hours=0.02)
    fit_codebook(root, TokenizerConfig(tokenizer="mfcc-kmeans"), FitOptions())
    stream = StreamConfig(name="semantic", tokenizer=TokenizerConfig(tokenizer="mfcc-kmeans"))
    tokenize(root, [stream], InlineEngine, TokenizeOptions())
    return root, dev_recordings / "phones_forced.csv"


def test_units_of_real_speech_say_much_about_its_phones(spoken: tuple[Root, Path]) -> None:
    root, labels = spoken
    counts = counted(root, label_file=read_label_file(str(labels)), fold=True)
    facts = describe_phones(counts, stream="semantic", codebook=None, seed=0)
    assert facts["frames"] > 5_000
    assert facts["frames_outside"] < 0.05 * facts["frames"]
    assert facts["pnmi"] > 0.3
    assert facts["shuffled"]["pnmi"] < 0.12
    assert facts["phone_purity"] > facts["shuffled"]["phone_purity"] + 0.1
    assert facts["cluster_purity"] > facts["shuffled"]["cluster_purity"] + 0.05


def test_phones_moved_by_half_a_second_agree_less(spoken: tuple[Root, Path], tmp_path: Path) -> None:
    root, labels = spoken
    with labels.open(newline="") as file:
        lines = list(csv.DictReader(file))
    moved = [
        f"{line['file']},{float(line['start_s']) + 0.5},{float(line['end_s']) + 0.5},{line['phone']}" for line in lines
    ]
    (tmp_path / "moved.csv").write_text("\n".join(["file,start_s,end_s,phone", *moved]))
    right, wrong = (
        agreement(counted(root, label_file=read_label_file(str(path)), fold=True).joint_PC).pnmi
        for path in (labels, tmp_path / "moved.csv")
    )
    assert right is not None
    assert wrong is not None
    assert wrong < 0.6 * right
