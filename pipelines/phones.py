"""How well units and phones agree: PNMI and purities of a semantic stream against when its phones are said.

The measures of HuBERT (Hsu et al. 2021, arXiv 2106.07447, section IV.C), from the joint counts of phone and unit over
frames. Axes: P phones, C codes of the codebook, T frames, L labels.
"""

import math
import re
from array import array
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ..storage.codes import open_stream, read_codes, stream_spec
from ..storage.parquet import read_parquet
from ..storage.root import Root
from ..storage.schema import CORPUS_SCHEMA
from ..storage.table import Snapshot
from ..tokenizers.spec import FrameRule, StreamSpec, UserError, frames_by_chunk

MAX_PHONES = 500  # no language has as many; words do
_SHUFFLE_FRAMES = 900_000_000  # numpy draws hypergeometric numbers below 10^9
_COLUMNS = ["id", "path", "member", "sample_rate", "start_sample", "phones"]
_POSITION = re.compile(r"_[BIES]$")  # Kaldi's place of a phone in its word
_STRESS = re.compile(r"(?i)(A[AEHOWY]|E[HRY]|I[HY]|O[WY]|U[HW])[0-2]")  # CMU's vowels, all of them two letters
_SILENCES = frozenset({"sil", "silence", "sp", "spn", "nsn", "pau", "h#", "epi", "#", "<eps>", "<sil>", "<s>", "</s>"})
SILENCE = "SIL"


@dataclass(frozen=True, slots=True)
class Agreement:
    """How much units say about phones; `pnmi` is None where there is one phone only."""

    pnmi: float | None  # I(phone; unit) / H(phone): the share of the phone's uncertainty that the unit takes away
    phone_purity: float  # accuracy of phones, each unit being named by its most likely phone
    cluster_purity: float  # the counterpart: accuracy of units, each phone being named by its most likely unit
    mutual_information_bits: float
    phone_entropy_bits: float
    unit_entropy_bits: float


@dataclass(slots=True)
class PhoneCounts:
    """Frames by phone and unit, and what could not be counted."""

    joint_PC: NDArray[np.int64]
    phones: list[str] = field(default_factory=list)  # names of the rows
    segments: int = 0  # with phones and codes
    segments_without_labels: int = 0
    segments_without_codes: int = 0
    frames_outside: int = 0  # of labelled segments, at whose centre no phone is said
    shards_missing: int = 0  # in the corpus, not in the stream


@dataclass(frozen=True, slots=True)
class LabelFile:
    """Phones by recording, in seconds from its start, as a CSV file gave them."""

    path: str
    names: list[str]
    recordings: dict[str, tuple["array[float]", "array[float]", "array[int]"]]  # starts, ends, place in `names`


@dataclass(frozen=True, slots=True)
class _Labels:
    """Labels of one segment, in samples of its recording from the segment's first; `phones_L` are rows of the joint."""

    starts_L: NDArray[np.int64]
    ends_L: NDArray[np.int64]
    phones_L: NDArray[np.int64]


def fold_phone(label: str) -> str:
    """A phone without stress (AA1 is AA) and word position (AA1_B is AA); every name of silence or noise is SIL."""
    label = _POSITION.sub("", label.strip())
    if not label or label.lower() in _SILENCES:
        return SILENCE
    return label[:-1] if _STRESS.fullmatch(label) else label


def paint_frames(labels: _Labels, num_frames: int, spec: StreamSpec, sample_rate: int) -> NDArray[np.int64]:
    """The phone of each frame `[T]`, -1 outside all phones; where phones overlap, the one that begins last.

    A frame's phone is the one said at its centre: sample `t * hop_length + window_length / 2` of the stream's clock,
    and, where frames are padded hops (the `ceil` rule) or windows shorter than hops, `t * hop_length + hop_length / 2`.
    Exact: no rounding. In a chunked stream t counts from the first sample of the frame's chunk.
    """
    if not spec.chunk_length:
        return _paint(labels, num_frames, spec, sample_rate, begin=0)
    chunks = enumerate(frames_by_chunk(num_frames, spec))
    parts = [_paint(labels, num, spec, sample_rate, begin=place * spec.chunk_stride) for place, num in chunks]
    return np.concatenate([np.empty(0, dtype=np.int64), *parts])


def _paint(labels: _Labels, num_frames: int, spec: StreamSpec, sample_rate: int, *, begin: int) -> NDArray[np.int64]:
    """`paint_frames` of frames the first of which begins at sample `begin` of the stream's clock."""
    width = spec.hop_length if spec.frame_rule is FrameRule.CEIL else max(spec.window_length, spec.hop_length)
    # frame t is in [start, end) of the recording's clock if
    # 2 * start * rate <= (2 * (begin + t * hop) + width) * sample_rate
    step, offset = 2 * spec.hop_length * sample_rate, (2 * begin + width) * sample_rate
    order_L = np.argsort(labels.starts_L, kind="stable")
    firsts_L, lasts_L = (
        np.clip(-((offset - 2 * spec.sample_rate * edges_L[order_L]) // step), 0, num_frames)
        for edges_L in (labels.starts_L, labels.ends_L)
    )
    phones_T = np.full(num_frames, -1, dtype=np.int64)
    for first, last, phone in zip(firsts_L, lasts_L, labels.phones_L[order_L], strict=True):
        phones_T[first:last] = phone
    return phones_T


def paint_row(row: dict[str, Any], num_frames: int, spec: StreamSpec, rows: dict[str, int]) -> NDArray[np.int64]:
    """The phone of each frame `[T]` of a segment as the corpus has it, folded; -1 where there is none.

    `rows` says which number a phone has, and grows by those that it lacks.
    """
    spans = row["phones"] or ()
    labels = _Labels(
        np.array([span["start_sample"] for span in spans], dtype=np.int64),
        np.array([span["start_sample"] + span["num_samples"] for span in spans], dtype=np.int64),
        np.array([rows.setdefault(fold_phone(span["label"]), len(rows)) for span in spans], dtype=np.int64),
    )
    return paint_frames(labels, num_frames, spec, row["sample_rate"])


def agreement(joint_PC: NDArray[np.int64]) -> Agreement:
    """The measures over joint counts of phones and units, of which at least one is not zero."""
    joint = joint_PC[joint_PC.sum(axis=1) > 0][:, joint_PC.sum(axis=0) > 0].astype(np.float64)
    joint /= joint.sum()
    phone_entropy, unit_entropy = _entropy_bits(joint.sum(axis=1)), _entropy_bits(joint.sum(axis=0))
    mutual = max(0.0, phone_entropy + unit_entropy - _entropy_bits(joint.ravel()))
    return Agreement(
        pnmi=mutual / phone_entropy if joint.shape[0] > 1 else None,
        phone_purity=float(joint.max(axis=0).sum()),
        cluster_purity=float(joint.max(axis=1).sum()),
        mutual_information_bits=mutual,
        phone_entropy_bits=phone_entropy,
        unit_entropy_bits=unit_entropy,
    )


def shuffled(joint_PC: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
    """Joint counts after a random shuffle of the phones over all frames of all segments.

    Drawn from the margins, which is the same in distribution as shuffling the frames: phone by phone, its frames are
    taken from the units that are left (multivariate hypergeometric). Above 9 * 10^8 frames, of a share of them.
    """
    joint_PC = joint_PC // (int(joint_PC.sum()) // _SHUFFLE_FRAMES + 1)
    random = np.random.default_rng(seed)
    left_C = joint_PC.sum(axis=0)
    drawn_PC = np.zeros_like(joint_PC)
    for phone, num_frames in enumerate(joint_PC.sum(axis=1)):
        drawn_PC[phone] = random.multivariate_hypergeometric(left_C, num_frames, method="marginals")
        left_C -= drawn_PC[phone]
    return drawn_PC


def count_phones(
    root: Root, corpus: Snapshot, stream: str, *, codebook: int | None, label_file: LabelFile | None, fold: bool
) -> PhoneCounts:
    """Count phones and units over the frames of a stream, shard by shard.

    Phones come from the corpus, or from `label_file`. Raises `UserError` for a codebook the stream does not have, for
    more labels than there are phones, for a stream that has no codes on a clock, and where no frame has a phone.
    """
    snapshot = open_stream(root, stream)
    spec = stream_spec(snapshot)
    _require_codes_on_a_clock(stream, spec)
    codebook = _require_codebook(stream, spec, codebook)
    counts = PhoneCounts(np.zeros((0, spec.codebook_size), dtype=np.int64))
    numbers = _Numbers(fold)
    for shard in corpus.files:
        if shard not in snapshot.files:
            counts.shards_missing += 1
            continue
        table = read_parquet(root, corpus.path(shard), schema=CORPUS_SCHEMA, columns=_COLUMNS)
        codes = read_codes(root, snapshot, shard, num_codebooks=codebook + 1)
        if codes.ids != table["id"].to_pylist():
            raise UserError(
                f"Stream {stream!r} does not hold the corpus's segments in shard {shard}; run `wavemill verify`."
            )
        values, offsets = codes.books[codebook]
        labels = _from_file(table, label_file, numbers) if label_file else _from_corpus(table, numbers)
        phones, units = [], []
        for row, (found, sample_rate) in enumerate(labels):
            if codes.errors[row] is not None:
                counts.segments_without_codes += 1
            elif found is None:
                counts.segments_without_labels += 1
            else:
                units_T = values[offsets[row] : offsets[row + 1]].astype(np.int64)
                phones_T = paint_frames(found, len(units_T), spec, sample_rate)
                inside_T = phones_T >= 0
                counts.segments += 1
                counts.frames_outside += int((~inside_T).sum())
                phones.append(phones_T[inside_T])
                units.append(units_T[inside_T])
        counts.joint_PC = _added(counts.joint_PC, phones, units, len(numbers.names))
    order = sorted(range(len(numbers.names)), key=numbers.names.__getitem__)  # not the one in which they were met
    counts.phones, counts.joint_PC = sorted(numbers.names), counts.joint_PC[order]
    _require_frames(root, counts, label_file)
    return counts


def describe_phones(counts: PhoneCounts, *, stream: str, codebook: int | None, seed: int) -> dict[str, Any]:
    """The figures of `wavemill phones`, as JSON takes them."""
    frames_P = counts.joint_PC.sum(axis=1)
    order = [int(phone) for phone in np.argsort(-frames_P, kind="stable") if frames_P[phone]]
    return {
        "stream": stream,
        "codebook": codebook or 0,
        **asdict(agreement(counts.joint_PC)),
        "shuffled": asdict(agreement(shuffled(counts.joint_PC, seed))),
        "seed": seed,
        "frames": int(frames_P.sum()),
        "frames_outside": counts.frames_outside,
        "segments": counts.segments,
        "segments_without_labels": counts.segments_without_labels,
        "segments_without_codes": counts.segments_without_codes,
        "shards_missing": counts.shards_missing,
        "used_units": int((counts.joint_PC.sum(axis=0) > 0).sum()),
        "codebook_size": counts.joint_PC.shape[1],
        "phones": [
            {
                "phone": counts.phones[phone],
                "frames": int(frames_P[phone]),
                "unit": int(counts.joint_PC[phone].argmax()),
                "purity": float(counts.joint_PC[phone].max() / frames_P[phone]),
            }
            for phone in order
        ],
    }


def read_label_file(path: str) -> LabelFile:
    """Phones of a CSV file with the columns file, start_s, end_s and phone. Raises `UserError`, naming the line."""
    import csv

    names: dict[str, int] = {}
    recordings: dict[str, tuple[array[float], array[float], array[int]]] = {}
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            lines = csv.DictReader(file, strict=True)
            missing = {"file", "start_s", "end_s", "phone"} - set(lines.fieldnames or ())
            if missing:
                raise UserError(
                    f"{path} has no column {', '.join(sorted(missing))}; its first line names the columns, which must "
                    "have file,start_s,end_s,phone among them."
                )
            for line in lines:
                start_s, end_s = (_seconds(path, lines.line_num, line[name]) for name in ("start_s", "end_s"))
                if not 0 <= start_s <= end_s < math.inf or line["phone"] is None:
                    raise UserError(f"{path}, line {lines.line_num}: a phone from {start_s:g} s to {end_s:g} s.")
                starts, ends, phones = recordings.setdefault(line["file"], (array("d"), array("d"), array("i")))
                starts.append(start_s)
                ends.append(end_s)
                phones.append(names.setdefault(line["phone"], len(names)))
    except OSError as error:
        raise UserError(f"Cannot read the labels {path}: {error.strerror}.") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is no CSV file in UTF-8: {error}.") from error
    if not recordings:
        raise UserError(f"{path} holds no labels: expected lines of file,start_s,end_s,phone.")
    return LabelFile(path, list(names), recordings)


class _Numbers:
    """Rows of the joint counts by label, in the order in which labels are met."""

    def __init__(self, fold: bool) -> None:
        self._fold = fold
        self._rows: dict[str, int] = {}

    @property
    def names(self) -> list[str]:
        return list(self._rows)

    def rows(self, labels: list[str]) -> NDArray[np.int64]:
        named = [fold_phone(label) if self._fold else label for label in labels]
        rows = np.array([self._rows.setdefault(label, len(self._rows)) for label in named], dtype=np.int64)
        if len(self._rows) > MAX_PHONES:
            raise UserError(
                f"There are over {MAX_PHONES} different labels, such as {', '.join(map(repr, self.names[-3:]))}: "
                "these are hardly phones. Give labels of phones."
            )
        return rows


def _from_corpus(table: pa.Table, numbers: _Numbers) -> Iterator[tuple[_Labels | None, int]]:
    """The labels and the sample rate of each row of a corpus shard."""
    lists = table["phones"].combine_chunks()
    spans = lists.values
    starts, lengths = (spans.field(name).to_numpy(zero_copy_only=False) for name in ("start_sample", "num_samples"))
    labels = spans.field("label").dictionary_encode()
    rows = numbers.rows(labels.dictionary.to_pylist())[labels.indices.to_numpy(zero_copy_only=False)]
    offsets, valid = lists.offsets.to_numpy(), lists.is_valid().to_numpy(zero_copy_only=False)
    for row, sample_rate in enumerate(table["sample_rate"].to_pylist()):
        part = slice(offsets[row], offsets[row + 1])
        found = _Labels(starts[part], starts[part] + lengths[part], rows[part]) if valid[row] else None
        yield found, sample_rate or 0


def _from_file(table: pa.Table, label_file: LabelFile, numbers: _Numbers) -> Iterator[tuple[_Labels | None, int]]:
    """The same from a label file: a recording's name there is its path in the corpus, with /MEMBER inside a tar."""
    rows_of = numbers.rows(label_file.names)
    columns = (table[name].to_pylist() for name in ("path", "member", "sample_rate", "start_sample"))
    for path, member, sample_rate, start_sample in zip(*columns, strict=True):
        known = label_file.recordings.get(f"{path}/{member}" if member else path)
        if known is None or sample_rate is None:
            yield None, 0
            continue
        starts_L, ends_L = (
            np.rint(np.frombuffer(times) * sample_rate).astype(np.int64) - start_sample for times in known[:2]
        )
        yield _Labels(starts_L, ends_L, rows_of[np.frombuffer(known[2], dtype=np.int32)]), sample_rate


def _added(
    joint_PC: NDArray[np.int64], phones: list[NDArray[np.int64]], units: list[NDArray[np.int64]], num_phones: int
) -> NDArray[np.int64]:
    size = joint_PC.shape[1]
    grown_PC = np.zeros((num_phones, size), dtype=np.int64)
    grown_PC[: joint_PC.shape[0]] = joint_PC
    if phones:
        places = np.concatenate(phones) * size + np.concatenate(units)
        grown_PC += np.bincount(places, minlength=grown_PC.size).reshape(grown_PC.shape)
    return grown_PC


def _require_codes_on_a_clock(stream: str, spec: StreamSpec) -> None:
    if spec.frame_rule not in (FrameRule.FLOOR, FrameRule.CEIL):
        has = "one frame a segment" if spec.frame_rule is FrameRule.ONE else "no clock"
    elif spec.dim:
        has = "numbers, not codes"
    else:
        return
    raise UserError(
        f"Stream {stream!r} ({spec.tokenizer}) has {has}, and phones are compared with codes at their times: name a "
        "stream of codes that follow a clock, --stream NAME."
    )


def _require_codebook(stream: str, spec: StreamSpec, codebook: int | None) -> int:
    if codebook is None and spec.num_codebooks > 1:
        raise UserError(
            f"Stream {stream!r} has {spec.num_codebooks} codebooks, and phones are compared with one: name it, "
            "--codebook 0 for the coarsest, or name a semantic stream."
        )
    if not 0 <= (codebook or 0) < spec.num_codebooks:
        raise UserError(f"Stream {stream!r} has no codebook {codebook}: they count from 0 to {spec.num_codebooks - 1}.")
    return codebook or 0


def _require_frames(root: Root, counts: PhoneCounts, label_file: LabelFile | None) -> None:
    if counts.joint_PC.any():
        return
    if label_file is not None and not counts.segments:
        name = next(iter(label_file.recordings))
        raise UserError(
            f"No segment with codes is named in {label_file.path}, whose first recording is {name!r}: names there "
            "must be those of the corpus, relative to its source."
        )
    if not counts.segments:
        raise UserError(
            f"The corpus in {root} has no phones for any segment with codes. Put alignments (TextGrid, .lab, .phn) "
            "beside the recordings when a corpus is built, or give --labels FILE.csv."
        )
    raise UserError(f"No frame lies inside a phone, in {counts.segments:,} segments: the labels are empty.")


def _seconds(path: str, line: int, text: str | None) -> float:
    try:
        return float(text or "")
    except ValueError:
        raise UserError(f"{path}, line {line}: {text!r} stands where a time in seconds belongs.") from None


def _entropy_bits(shares: NDArray[np.float64]) -> float:
    positive = shares[shares > 0]
    return float(abs(-(positive * np.log2(positive)).sum()))
