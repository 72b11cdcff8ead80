"""Pictures, looked at pixel by pixel: what is drawn lies at its true time, whatever the words beside it are."""

import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.image
import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
from wavemill.jobs.canvas import hues, picture_text, require_picture
from wavemill.jobs.charts import draw_phones, draw_use
from wavemill.jobs.pictures import draw_segment
from wavemill.pipelines.closeup import Segment, StreamCodes, read_segment, read_sound
from wavemill.pipelines.inspection import corpus_durations, describe_corpus, describe_streams, stream_usage
from wavemill.pipelines.phones import PhoneCounts, describe_phones
from wavemill.storage.codes import open_corpus
from wavemill.storage.root import Root
from wavemill.storage.schema import CORPUS_SCHEMA
from wavemill.tokenizers.spec import FrameRule, StreamSpec, UserError

WIDTH = 1_600
LEFT, RIGHT = 155, 1_565  # pixels, the edges of all panels of a segment's picture
DARK, BRIGHT = (68, 1, 84), (253, 231, 36)  # ends of matplotlib's viridis
GREYS = (236, 239, 241), (215, 223, 227)
CLI = Callable[..., subprocess.CompletedProcess[str]]

HOSTILE = [
    "$\\frac{1}{$ \\notacommand{ $",
    "nul \0 bell \a escape \x1b[31m red",
    "lines\nand\ttabs\r\n" * 50,
    "语音合成 音声合成 음성 합성",
    "हिन्दी العربية עברית ภาษาไทย 🎙️👩‍👩‍👧",
    "a\u0301\u0302\u0303" * 100,
    "\u202eleft to right\u202c \ud800 lone",
    "x" * 100_000,
    "%s {0} <b> &amp; _^~#",
]


def spec(num_codebooks: int, *, sample_rate: int = 16_000, hop_length: int = 320) -> StreamSpec:
    return StreamSpec(
        tokenizer="made-up",
        sample_rate=sample_rate,
        decode_sample_rate=0,
        hop_length=hop_length,
        window_length=400,
        frame_rule=FrameRule.CEIL,
        num_codebooks=num_codebooks,
        codebook_size=64,
    )


def row(**fields: Any) -> dict[str, Any]:
    made = dict.fromkeys(CORPUS_SCHEMA.names) | {"id": "a" * 26, "shard": 0, "source": "s", "source_root": "/"}
    made |= {"path": "one.wav", "member": "", "channel": "mix", "sample_rate": 8_000, "start_sample": 0}
    return made | {"num_samples": 16_000, "duration_s": 2.0, "text": "words", "speaker": "anna"} | fields


def pixels(path: Path) -> np.ndarray:
    """The picture as integers `[rows, columns, 3]`."""
    return np.rint(matplotlib.image.imread(path)[..., :3] * 255).astype(int)


def column_of(seconds: float, *, end_s: float) -> float:
    return LEFT + (RIGHT - LEFT) * seconds / end_s


def edge(picture: np.ndarray, before: tuple[int, ...], behind: tuple[int, ...]) -> int:
    """The column at which the colour changes, in the rows that have both."""
    has = [(picture == colour).all(axis=2) for colour in (before, behind)]
    rows = has[0].sum(axis=1) * has[1].sum(axis=1)
    line = int(np.argmax(rows))
    last, first = np.flatnonzero(has[0][line])[-1], np.flatnonzero(has[1][line])[0]
    assert 0 < first - last <= 3
    return int(first)


@pytest.mark.parametrize(
    ("sample_rate", "hop_length", "frame"), [(16_000, 320, 30), (24_000, 1_920, 7), (44_100, 512, 101)]
)
def test_frames_are_drawn_at_their_true_times(sample_rate: int, hop_length: int, frame: int, tmp_path: Path) -> None:
    made = spec(4, sample_rate=sample_rate, hop_length=hop_length)
    num_frames = 9 * sample_rate // (5 * hop_length)  # up to 1.8 s of 2 s
    codes_KT = np.where(np.arange(num_frames) < frame, 0, 63)[None].repeat(4, axis=0)
    segment = Segment(row(), [StreamCodes("acoustic", made, codes_KT, None)])
    draw_segment(segment, np.zeros(32_000, np.float32), str(tmp_path / "a.png"))
    at = column_of(frame * hop_length / sample_rate, end_s=2.0)
    assert abs(edge(pixels(tmp_path / "a.png"), DARK, BRIGHT) - at) <= 1.5
    one = StreamCodes("semantic", spec(1, sample_rate=sample_rate, hop_length=hop_length), codes_KT[:1], None)
    draw_segment(Segment(row(), [one]), np.zeros(32_000, np.float32), str(tmp_path / "b.png"))
    colours = np.rint(hues(np.array([0, 63])) * 255).astype(int)
    assert abs(edge(pixels(tmp_path / "b.png"), *map(tuple, colours)) - at) <= 1.5


def test_labels_and_sound_are_drawn_at_their_true_times(tmp_path: Path) -> None:
    labels = [{"start_sample": start, "num_samples": 5_000, "label": ""} for start in (2_000, 7_000)]
    sound_N = np.zeros(32_000, np.float32)
    sound_N[12_800:] = np.tile([0.5, -0.5], 9_600)  # from 0.8 s
    draw_segment(Segment(row(words=labels), []), sound_N, str(tmp_path / "a.png"))
    picture = pixels(tmp_path / "a.png")
    assert abs(edge(picture, *GREYS) - column_of(7_000 / 8_000, end_s=2.0)) <= 1.5
    dark = (picture[120, LEFT + 5 : RIGHT].sum(axis=1) < 400).argmax() + LEFT + 5  # a row above the middle
    assert abs(dark - column_of(0.8, end_s=2.0)) <= 2


def test_each_row_of_an_acoustic_raster_is_a_codebook_and_the_first_is_on_top(tmp_path: Path) -> None:
    codes_KT = np.zeros((8, 100), int)
    codes_KT[0] = 63
    segment = Segment(row(), [StreamCodes("acoustic", spec(8), codes_KT, None)])
    draw_segment(segment, np.zeros(32_000, np.float32), str(tmp_path / "a.png"))
    middle = pixels(tmp_path / "a.png")[:, (LEFT + RIGHT) // 2]
    bright, dark = (np.flatnonzero((middle == colour).all(axis=1)) for colour in (BRIGHT, DARK))
    assert len(bright) > 10
    assert bright.max() < dark.min()
    assert len(dark) == pytest.approx(7 * len(bright), rel=0.15)


def test_a_picture_is_1600_pixels_wide_and_the_same_whatever_is_set_on_the_machine(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    streams = [
        StreamCodes("semantic", spec(1), random.integers(0, 64, (1, 99)), None),
        StreamCodes("acoustic", spec(8), random.integers(0, 64, (8, 100)), None),
        StreamCodes("later", spec(8), None, "not done yet"),
    ]
    segment = Segment(row(), streams)
    sound_N = random.normal(0, 0.1, 32_000).astype(np.float32)
    draw_segment(segment, sound_N, str(tmp_path / "a.png"))
    odd = {"text.usetex": True, "savefig.dpi": 30, "savefig.bbox": "tight", "font.size": 30, "axes.titlesize": 3}
    with matplotlib.rc_context(odd):
        draw_segment(segment, sound_N, str(tmp_path / "b.png"))
        assert matplotlib.rcParams["savefig.dpi"] == 30  # and what is set stays set
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert pixels(tmp_path / "a.png").shape[1] == WIDTH


@pytest.mark.parametrize("words", HOSTILE, ids=range(len(HOSTILE)))
def test_words_in_any_script_and_of_any_kind_are_drawn_without_a_complaint(words: str, tmp_path: Path) -> None:
    label = {"start_sample": 0, "num_samples": 16_000, "label": words}
    made = row(path=words, member=words, text=words, speaker=words, language=words, words=[label], phones=[label])
    segment = Segment(made, [StreamCodes("later", spec(1), None, words)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_segment(segment, np.zeros(32_000, np.float32), str(tmp_path / "a.png"))
        counts = PhoneCounts(np.array([[3, 1], [1, 3]]), phones=[words, "B"], segments=1)
        draw_phones(describe_phones(counts, stream="s", codebook=None, seed=0), counts, str(tmp_path / "b.png"))
    assert pixels(tmp_path / "a.png").shape[1] == pixels(tmp_path / "b.png").shape[1] == WIDTH
    assert picture_text(words, 80).isprintable()
    assert len(picture_text(words, 80)) <= 80


@pytest.mark.parametrize("num_samples", [0, 1, 399, 401])
def test_a_segment_too_short_for_a_frame_is_drawn(num_samples: int, tmp_path: Path) -> None:
    streams = [StreamCodes(name, spec(books), np.zeros((books, 0), int), None) for name, books in (("a", 1), ("b", 8))]
    made = row(num_samples=num_samples, duration_s=num_samples / 16_000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_segment(Segment(made, streams), np.zeros(num_samples, np.float32), str(tmp_path / "a.png"))
    assert pixels(tmp_path / "a.png").shape[1] == WIDTH


def test_of_a_long_segment_the_beginning_is_drawn(tmp_path: Path) -> None:
    codes_KT = np.where(np.arange(12 * 3_600 * 50) < 75, 0, 63)[None].repeat(2, axis=0)  # 12 hours
    made = row(duration_s=43_200.0, num_samples=43_200 * 8_000)
    segment = Segment(made, [StreamCodes("acoustic", spec(2), codes_KT, None)])
    draw_segment(segment, np.zeros(3 * 16_000, np.float32), str(tmp_path / "a.png"))
    assert abs(edge(pixels(tmp_path / "a.png"), DARK, BRIGHT) - column_of(1.5, end_s=3.0)) <= 1.5


def test_each_unit_is_a_column_of_the_phones_that_it_is(tmp_path: Path) -> None:
    counts = PhoneCounts(np.array([[0, 8, 0, 8], [4, 0, 0, 0]]), phones=["AA", "B"], segments=1)
    draw_phones(describe_phones(counts, stream="s", codebook=None, seed=0), counts, str(tmp_path / "a.png"))
    picture = pixels(tmp_path / "a.png")
    full, none = (8, 48, 107), (247, 251, 255)  # ends of matplotlib's Blues
    line = picture[150]  # in the first phone's row: both of its units, then the other's
    at = [tuple(line[LEFT + int(1_330 * share)]) for share in (1 / 6, 1 / 2, 5 / 6)]
    assert at == [full, full, none]


# A dataset


def good_rows(folder: Path) -> list[dict[str, Any]]:
    rows = [made for path in sorted(folder.glob("*.parquet")) for made in pq.read_table(path).to_pylist()]
    return [made for made in rows if made["error"] is None]


def test_durations_and_the_use_of_codes_are_as_a_naive_reader_counts_them(finished_root: Path) -> None:
    root = Root(finished_root)
    counts_B, edges_s = corpus_durations(root, open_corpus(root))
    rows = good_rows(finished_root / "corpus")
    assert counts_B.sum() == len(rows)
    for bin_, count in enumerate(counts_B):
        assert count == sum(edges_s[bin_] <= made["duration_s"] < edges_s[bin_ + 1] for made in rows)
    usage_KC = stream_usage(root, "acoustic")
    assert usage_KC.shape == (8, 64)
    codes = [code for made in good_rows(finished_root / "streams" / "acoustic") for code in made["codes_03"]]
    assert usage_KC[3].tolist() == np.bincount(codes, minlength=64).tolist()


def test_the_use_of_a_dataset_is_drawn_with_and_without_streams(
    fitted_root: Path, finished_root: Path, tmp_path: Path
) -> None:
    for folder in (fitted_root, finished_root):
        root = Root(folder)
        corpus = open_corpus(root)
        described = {"corpus": describe_corpus(root, corpus), "streams": describe_streams(root, corpus)}
        usage = {stream["stream"]: stream_usage(root, stream["stream"]) for stream in described["streams"]}
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            draw_use(described, usage, corpus_durations(root, corpus), str(tmp_path / "a.png"))
        assert pixels(tmp_path / "a.png").shape[1] == WIDTH


def test_the_sound_of_a_segment_is_its_part_of_the_recording(finished_root: Path, samples: Path) -> None:
    root = Root(finished_root)
    corpus = open_corpus(root)
    place = next(made for made in good_rows(finished_root / "corpus") if made["sample_rate"] == 16_000)
    segment = read_segment(root, corpus, place["id"])
    assert segment.row == place
    sound_N = read_sound(root, corpus, segment.row, {}, max_s=1)
    whole_N, _ = soundfile.read(samples / place["path"], dtype="float32")
    assert sound_N == pytest.approx(whole_N[:16_000], abs=1e-6)
    semantic = next(stream for stream in segment.streams if stream.name == "semantic")
    [made] = [made for made in good_rows(finished_root / "streams" / "semantic") if made["id"] == place["id"]]
    assert semantic.codes_KT is not None
    assert semantic.codes_KT.tolist() == [made["codes_00"]]


# The command


def test_a_segment_is_shown_as_words_as_json_and_as_a_picture(
    finished_root: Path, wavemill: CLI, tmp_path: Path
) -> None:
    place = good_rows(finished_root / "corpus")[0]
    [made] = [made for made in good_rows(finished_root / "streams" / "semantic") if made["id"] == place["id"]]
    shown = wavemill("inspect", finished_root, "--segment", place["id"])
    assert shown.returncode == 0
    assert place["path"] in shown.stdout
    assert f"{made['num_frames']:,} frames" in shown.stdout
    assert " ".join(f"{code:>2}" for code in made["codes_00"][:20]) in shown.stdout
    drawn = wavemill("inspect", finished_root, "--segment", place["id"], "--json", "--png", tmp_path / "a.png")
    facts = json.loads(drawn.stdout)
    assert facts["corpus"] == place
    semantic = next(stream for stream in facts["streams"] if stream["stream"] == "semantic")
    assert (semantic["frames"], semantic["first_codes"]) == (made["num_frames"], [made["codes_00"][:20]])
    assert pixels(tmp_path / "a.png").shape[1] == WIDTH


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--segment", "nobody"], "There is no segment 'nobody'"),
        (["--segment", "BROKEN", "--png", "FOLDER/a.png"], "has no sound: truncated"),
        (["--png", "FOLDER/none/a.png"], "there is no folder"),
        (["--png", "FOLDER"], "is a PNG file; name it"),
        (["--png", "FOLDER/a.wav"], "is a PNG file; name it"),
        (["--png", "/proc/a.png"], "Cannot write the picture /proc/a.png"),
    ],
)
def test_a_mistake_is_one_sentence(
    arguments: list[str], said: str, finished_root: Path, wavemill: CLI, tmp_path: Path
) -> None:
    rows = [made for path in (finished_root / "corpus").glob("*.parquet") for made in pq.read_table(path).to_pylist()]
    broken = next(made["id"] for made in rows if made["error"] == "truncated")
    names = [argument.replace("FOLDER", str(tmp_path)).replace("BROKEN", broken) for argument in arguments]
    failed = wavemill("inspect", finished_root, *names)
    assert failed.returncode == 2
    assert said in failed.stderr
    assert failed.stderr.startswith("Error: ")
    assert failed.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_without_matplotlib_only_pictures_fail_and_say_what_to_install(finished_root: Path, tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['matplotlib'] = None; from wavemill.jobs.cli import main; "
        f"sys.argv = ['wavemill', 'inspect', {str(finished_root)!r}] + sys.argv[1:]; main()"
    )
    plain = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert plain.returncode == 0
    picture = [sys.executable, "-c", code, "--png", str(tmp_path / "a.png")]
    failed = subprocess.run(picture, capture_output=True, text=True, check=False)
    assert (failed.returncode, failed.stderr) == (
        2,
        "Error: A picture needs matplotlib: pip install 'wavemill[plots]'.\n",
    )


def test_a_recording_is_never_overwritten_by_a_picture(tmp_path: Path) -> None:
    (tmp_path / "one.wav").write_bytes(b"sound")
    with pytest.raises(UserError, match=r"name it SOMETHING\.png"):
        require_picture(str(tmp_path / "one.wav"))
