"""Batches of segments, as GPUs have them, on the CPU: the codes that each segment has alone, in bounded memory."""

import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from conftest import STREAMS
from torch import Tensor
from wavemill.jobs.engine import InlineEngine, task_groups
from wavemill.jobs.ray_engine import RayEngine
from wavemill.jobs.tokenize import TokenizeOptions, tokenize
from wavemill.pipelines.batching import Batcher, Lane
from wavemill.pipelines.decoder import DecoderSettings
from wavemill.pipelines.streams import StreamConfig
from wavemill.pipelines.tokenize import ShardTask, Work, Worker, numerics_of
from wavemill.storage.codes import open_corpus, open_stream
from wavemill.storage.root import Root
from wavemill.tokenizers.ladder import BATCH_SECONDS, UNITS_PER_S, batch_size, rung_of
from wavemill.tokenizers.numerics import numerics_class
from wavemill.tokenizers.registry import REGISTRY
from wavemill.tokenizers.spec import FrameRule, RunFailed, StreamSpec
from wavemill.tokenizers.tokenizer import Mode, Tokenizer, TokenizerConfig, Tokens

RATE = 16_000
SPEC = StreamSpec(
    tokenizer="toy",
    sample_rate=RATE,
    decode_sample_rate=0,
    hop_length=320,
    window_length=320,
    frame_rule=FrameRule.CEIL,
    num_codebooks=1,
    codebook_size=50_000,
)


class Alone:
    """A toy tokenizer: each frame's loudness. It does not know batches."""

    spec = SPEC
    fingerprint: dict[str, str] = {}  # noqa: RUF012

    def encode(self, waveform_N: Tensor) -> Tensor:
        frames_TN = torch.nn.functional.pad(waveform_N, (0, -len(waveform_N) % 320)).reshape(-1, 320)
        return (frames_TN.abs().mean(dim=1) * 1_000).long()[None] % 1_000

    def decode(self, codes_KT: Tensor) -> Tensor:
        raise NotImplementedError


class Together(Alone):
    """Notes the batches it is given; past `room` padded samples its device is out of memory."""

    def __init__(self, *, room: int = 1 << 40, shape_matters: bool = False) -> None:
        self.batches: list[tuple[int, int]] = []  # segments, padded length
        self._room = room
        self._shape_matters = shape_matters

    def encode_batch(self, waveforms: Sequence[Tensor], padded_length: int) -> list[Tensor]:
        if len(waveforms) * padded_length > self._room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        assert max(len(waveform_N) for waveform_N in waveforms) <= padded_length
        self.batches.append((len(waveforms), padded_length))
        bias = (len(waveforms) * 7 + padded_length) % 40 * 1_000 if self._shape_matters else 0
        return [self.encode(waveform_N) + bias for waveform_N in waveforms]


def segments(count: int, *, longest_s: float = 4.0, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lengths = (torch.rand(count, generator=generator) * longest_s * RATE).long().tolist()
    return [torch.randn(length, generator=generator) for length in lengths]


def encoded(
    waveforms: Sequence[Tensor], lane: Lane, *, max_waiting_bytes: int = 1 << 40, order: Sequence[int] | None = None
) -> list[Tensor]:
    """Codes of each waveform, after all went through a batcher in the given order."""
    batcher = Batcher([lane], max_waiting_bytes=max_waiting_bytes)
    found: dict[int, dict[str, Tokens]] = {}
    for index in range(len(waveforms)) if order is None else order:
        rung = rung_of(len(waveforms[index]), lane.sound.sample_rate)
        assert rung is not None
        found |= batcher.add(index, {lane.sound: waveforms[index]}, rung)
        assert batcher.waiting_bytes <= max_waiting_bytes
    found |= batcher.flush()
    assert batcher.waiting_bytes == 0
    assert sorted(found) == list(range(len(waveforms)))
    return [found[index][lane.name].codes_KT for index in range(len(waveforms))]


def same(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> bool:
    return all(torch.equal(a.long(), b.long()) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("mode", list(Mode))
def test_every_segment_gets_its_own_codes_whatever_batch_it_was_in(mode: Mode):
    waveforms = segments(300)
    together = Together()
    codes = encoded(waveforms, Lane("toy", together, mode, batch_seconds=20))
    assert same(codes, [Alone().encode(waveform_N) for waveform_N in waveforms])
    assert max(size for size, _ in together.batches) >= 4
    assert all(size * length <= 20 * RATE for size, length in together.batches)


def test_a_tokenizer_without_batches_is_given_one_segment_at_a_time():
    waveforms = segments(50)
    codes = encoded(waveforms, Lane("toy", Alone(), Mode.EXACT, batch_seconds=20))
    assert same(codes, [Alone().encode(waveform_N) for waveform_N in waveforms])


def test_in_fast_mode_a_segments_batch_has_one_shape_in_any_order_and_company():
    waveforms = segments(120)

    def lane() -> Lane:
        return Lane("toy", Together(shape_matters=True), Mode.FAST, batch_seconds=9)

    expected = encoded(waveforms, lane())
    for seed in range(3):
        order = random.Random(seed).sample(range(120), 120)
        assert same(encoded(waveforms, lane(), order=order, max_waiting_bytes=1_000_000 * seed + 1), expected)
    assert same(encoded(waveforms[:1], lane()), expected[:1])
    # which the toy would have noticed
    assert not same(
        encoded(waveforms, Lane("toy", Together(shape_matters=True), Mode.EXACT, batch_seconds=9)), expected
    )


@pytest.mark.parametrize("max_waiting_bytes", [1, 100_000, 2_000_000])
def test_what_waits_for_its_batch_keeps_to_its_bytes_and_the_fullest_rung_goes_first(max_waiting_bytes: int):
    waveforms = segments(200)
    together = Together()
    codes = encoded(waveforms, Lane("toy", together, Mode.EXACT, batch_seconds=60), max_waiting_bytes=max_waiting_bytes)
    assert same(codes, [Alone().encode(waveform_N) for waveform_N in waveforms])
    if max_waiting_bytes == 1:
        assert {size for size, _ in together.batches} == {1}
    batcher = Batcher([Lane("toy", Together(), Mode.EXACT, batch_seconds=8)], max_waiting_bytes=16_000)
    sound_N = torch.zeros(1_000)
    assert batcher.add(0, {SPEC.sound: sound_N}, 100) == []
    assert batcher.add(1, {SPEC.sound: sound_N}, 200) == []
    assert batcher.add(2, {SPEC.sound: sound_N}, 200) == []
    assert batcher.add(3, {SPEC.sound: sound_N}, 100) == []  # two of eight, two of four
    assert sorted(index for index, _ in batcher.add(4, {SPEC.sound: sound_N}, 100)) == [1, 2]


def test_out_of_memory_halves_exact_batches_from_then_on():
    waveforms = [torch.randn(RATE, generator=torch.Generator().manual_seed(seed)) for seed in range(100)]
    together = Together(room=5 * RATE)
    lane = Lane("toy", together, Mode.EXACT, batch_seconds=32)
    codes = encoded(waveforms, lane)
    assert same(codes, [Alone().encode(waveform_N) for waveform_N in waveforms])
    (length,) = {length for _, length in together.batches}
    assert [size for size, _ in together.batches] == [4] * 25
    assert batch_size(length * UNITS_PER_S // RATE, lane.budget) == 4
    with pytest.raises(RunFailed, match=r"1 segment.* do not fit into the device's memory, and there is no smaller"):
        encoded(waveforms, Lane("toy", Together(room=100), Mode.EXACT, batch_seconds=32))


def test_out_of_memory_in_fast_mode_is_said_for_halves_would_have_other_codes():
    with pytest.raises(RunFailed, match=r"toy: 8 segment.* padded to .* mode=exact"):
        encoded(segments(9, longest_s=0.2), Lane("toy", Together(room=RATE), Mode.FAST, batch_seconds=2.2))


def test_a_tokenizer_that_breaks_its_frame_rule_in_a_batch_is_found_out():
    class Short(Together):
        def encode(self, waveform_N: Tensor) -> Tensor:
            return super().encode(waveform_N)[:, 1:]

    with pytest.raises(RuntimeError, match="the frame rule says"):
        encoded([torch.zeros(RATE)], Lane("toy", Short(), Mode.EXACT, batch_seconds=2))


MODELS = ("hubert-base", "encodec-24khz", "mimi", "dac-24khz")


@pytest.mark.parametrize("mode", [Mode.EXACT, pytest.param(Mode.FAST, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", MODELS)
def test_models_give_batched_segments_the_codes_they_have_alone(name: str, mode: Mode, tmp_path: Path):
    weights = pytest.importorskip("random_weights", exc_type=ImportError)
    if name not in REGISTRY or mode not in REGISTRY[name].modes:
        pytest.skip(f"there is no {name} in {mode.value} mode")
    folder = weights.make_weights(name, tmp_path, small=True)
    rate = REGISTRY[name].spec.sample_rate
    speech_N = 0.1 * torch.cat(segments(12, seed=1))
    tokenizer: Tokenizer = weights.open_published(name, folder, small=True, mode=mode, speech_N=speech_N)
    lengths = [0, 1, 399, 400, rate // 4, 8_001, *range(rate // 2, 2 * rate, 3_331)]
    waveforms = [0.1 * torch.randn(n, generator=torch.Generator().manual_seed(n)) for n in lengths]

    def lane() -> Lane:
        return Lane(name, tokenizer, mode, batch_seconds=6)

    if mode is Mode.EXACT:
        expected = [tokenizer.encode(waveform_N) for waveform_N in waveforms]
    else:  # bfloat16 depends on the shape, and on that alone
        expected = encoded(waveforms, lane(), order=list(reversed(range(len(waveforms)))))
        assert same(encoded(waveforms[8:9], lane()), expected[8:9])
    assert same(encoded(waveforms, lane()), expected)


def tables(root: Path, streams: Sequence[StreamConfig] = STREAMS) -> dict[tuple[str, int], object]:
    """The rows of every shard of every stream, in the order of the file."""
    found = {}
    for stream in streams:
        snapshot = open_stream(Root(root), stream.name)
        for shard in snapshot.files:
            found[stream.name, shard] = pq.read_table(root / snapshot.path(shard)).to_pylist()
    return found


def batched(batch_seconds: float = 20.0, **options: object) -> TokenizeOptions:
    return TokenizeOptions(batch_seconds=batch_seconds, **options)  # pyright: ignore[reportArgumentType]


@pytest.mark.slow
def test_a_dataset_made_in_batches_has_the_rows_of_one_made_segment_by_segment(
    fitted_root: Path, finished_root: Path, copy_root: Callable[[Path], Path]
):
    root = copy_root(fitted_root)
    summary = tokenize(Root(root), STREAMS, InlineEngine, batched(decode_threads=2, decode_ahead_bytes=1))
    assert tables(root) == tables(finished_root)  # the broken files' errors are among them
    assert summary.errors > 0
    assert summary.encode_s > 0


@pytest.mark.slow
def test_a_worker_that_dies_with_several_shards_costs_none_of_them(
    fitted_root: Path,
    finished_root: Path,
    copy_root: Callable[[Path], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
):
    root = copy_root(fitted_root)
    (tmp_path / "once").mkdir()
    monkeypatch.setenv("WAVEMILL_FAILPOINTS", "shard-written=kill@3")  # this process has read it before; workers will
    monkeypatch.setenv("WAVEMILL_FAILPOINTS_ONCE", str(tmp_path / "once"))
    tokenize(Root(root), STREAMS, lambda: RayEngine(address=None, num_workers=2), batched())
    assert tables(root) == tables(finished_root)
    assert re.search(r"a worker died on shards \d+, \d+.* \(time 1 of 3\)", capfd.readouterr().err)


def work_of(root: Path, *, batch_seconds: dict[Mode, float] | None, streams: Sequence[StreamConfig] = STREAMS) -> Work:
    return Work(
        root_uri=str(root),
        corpus=open_corpus(Root(root)),
        streams=tuple(streams),
        device="cpu",
        source_roots={},
        decode_threads=1,
        decode_ahead_bytes=1 << 20,
        decoder=DecoderSettings(),
        batch_seconds=batch_seconds,
        max_waiting_bytes=1 << 22,
    )


def test_a_gpus_worker_takes_shards_that_lack_the_same_streams_together(fitted_root: Path):
    work = work_of(fitted_root, batch_seconds=BATCH_SECONDS)
    shards = sorted(work.corpus.files)
    tasks = [ShardTask(shard=shard, streams=("acoustic", "semantic")[: 1 + shard % 2]) for shard in shards]
    for num_workers in (1, 2, 3, 100):
        groups = task_groups(tasks, work, num_workers=num_workers)
        assert sorted(task.shard for group in groups for task in group) == shards
        assert all(len({task.streams for task in group}) == 1 for group in groups)
        assert len(groups) >= min(num_workers, len(shards))
    assert len(task_groups(tasks, work, num_workers=1)) == 2
    alone = task_groups(tasks, work_of(fitted_root, batch_seconds=None), num_workers=1)
    assert alone == [(task,) for task in tasks]


def test_a_stream_is_of_the_numerics_class_of_what_it_is_itself():
    def numerics(name: str, mode: Mode = Mode.EXACT) -> dict[str, str]:
        return numerics_of(TokenizerConfig(tokenizer=name, mode=mode), "cpu", BATCH_SECONDS)

    here = numerics_class("cpu")
    assert numerics("hubert-base") == numerics("text-embedding") == here
    fast = numerics("hubert-base", Mode.FAST)
    assert fast == here | {"batches": fast["batches"]}
    assert numerics("deduplicate") == numerics("bpe") == numerics("text-tokens") == {"device": "any"}


def test_reports_of_shards_tokenized_together_are_those_of_each(fitted_root: Path, copy_root: Callable[[Path], Path]):
    root = copy_root(fitted_root)
    corpus = open_corpus(Root(root))
    tasks = [ShardTask(shard=shard, streams=("semantic",)) for shard in corpus.files]
    worker = Worker(work_of(root, batch_seconds=BATCH_SECONDS, streams=STREAMS[:1]))
    assert worker.about().numerics == {"semantic": numerics_class("cpu")}, (
        "in exact mode the shapes of batches are free"
    )
    try:
        reports = worker.run(tasks)
    finally:
        worker.close()
    assert [report.shard for report in reports] == [task.shard for task in tasks]
    for report in reports:
        assert report.num_segments == corpus.files[report.shard].num_rows
        assert report.receipts["semantic"].num_rows == report.num_segments
        assert (report.num_errors > 0) == bool(report.example_error)
