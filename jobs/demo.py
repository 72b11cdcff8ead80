"""The demo: the speech that ships with wavemill, through every step a user takes."""

import sys
from pathlib import Path

from rich.console import Console
from torch.utils.data import DataLoader

from ..pipelines.corpus import CorpusPolicy
from ..pipelines.entries import AudioError
from ..pipelines.inspection import describe_corpus, describe_streams
from ..pipelines.listen import decode_segments
from ..pipelines.reading import Row, open_reader
from ..pipelines.streams import StreamConfig, open_stream_tokenizer
from ..pipelines.verify import verify
from ..storage.codes import open_corpus, open_stream
from ..storage.dataset import TokenDataset
from ..storage.parquet import read_parquet
from ..storage.root import Root
from ..storage.schema import CORPUS_SCHEMA
from ..storage.table import Snapshot
from ..tokenizers.mel import MelFeatures
from ..tokenizers.spec import RunFailed, UserError
from ..tokenizers.tokenizer import TokenizerConfig
from .codebook import FitOptions, fit_codebook
from .corpus import build_corpus
from .engine import Engine, InlineEngine
from .progress import Progress
from .show import show_dataset
from .tokenize import TokenizeOptions, tokenize

SAMPLES = Path(__file__).parent / "samples"
LEFT_OUT = frozenset({"de_frieda", "en_grace", "es_mateo"})  # not in the fit: what the decoded sound is judged on
_SHARD_HOURS = 0.01
_MEL_SIZE = 256  # five minutes are too little for the usual 1,024 centroids


def run_demo(to: str, *, engine: str) -> None:
    """Build, fit, tokenize, inspect, verify, read back and decode below `to`; everything is printed as it happens."""
    if engine not in ("ray", "inline"):
        raise UserError(f"--engine {engine!r} is unknown; there are: ray, inline.")
    if not (SAMPLES / "manifest.jsonl").exists():
        raise UserError(
            f"The samples are missing at {SAMPLES}: install wavemill again, or use a clone of its repository."
        )
    root = Root(to)
    console = Console()

    console.rule("1. corpus: 108 clips of speech in seven formats, and four broken files")
    sources = [f"speech={SAMPLES / 'manifest.jsonl'}", f"broken={SAMPLES / 'broken'}"]
    result = build_corpus(root, sources, CorpusPolicy(), shard_hours=_SHARD_HOURS)
    console.print(f"{result.counts.new} new segments, {result.counts.known} known already")

    console.rule("2. codebooks: k-means on six of the nine speakers")
    for name, size in (("mfcc-kmeans", None), ("mel-rvq", _MEL_SIZE)):
        if root.exists(f"codebooks/{name}.safetensors"):
            console.print(f"{name}: fitted already")
            continue
        with Progress(f"sampling for {name}") as progress:
            header = fit_codebook(
                root,
                TokenizerConfig(tokenizer=name),
                FitOptions(size=size, leave_out_speakers=LEFT_OUT),
                on_report=lambda report, to=progress: to.advance(
                    segments=report.segments + report.errors, audio_s=report.duration_s, errors=report.errors
                ),
            )
        console.print(f"{name}: {header['num_codebooks']} x {header['size']} centroids, {header['fit_s']} s")

    console.rule(f"3. tokenize: semantic and acoustic tokens ({engine})")
    streams = [
        StreamConfig(name=name, tokenizer=TokenizerConfig(tokenizer=tokenizer)) for name, tokenizer in _STREAMS.items()
    ]
    with Progress("tokenize") as progress:
        summary = tokenize(
            root,
            streams,
            lambda: _engine(engine),
            TokenizeOptions(),
            on_start=progress.expect,
            on_report=lambda report: progress.advance(
                segments=report.num_segments, audio_s=report.duration_s, errors=report.num_errors
            ),
        )
    console.print(f"{summary.segments} segments tokenized" if summary.shards else "nothing to do: all is tokenized")

    console.rule("4. the dataset")
    corpus = open_corpus(root)
    show_dataset({"corpus": describe_corpus(root, corpus), "streams": describe_streams(root, corpus)})

    console.rule("5. verify: every page read back, 20 segments tokenized again alone")
    verdict = verify(root, corpus, sample=20, seed=0, source_roots={})
    if verdict.num_problems:
        raise RunFailed(f"The dataset is not whole: {verdict.problems[0]}")
    console.print(f"whole; {verdict.codes_different} of {verdict.codes_compared:,} codes differ")

    console.rule("6. a training batch")
    dataset = TokenDataset(root.uri, {"semantic": None, "acoustic": 4}, batch_size=8)
    batch = next(iter(DataLoader(dataset, batch_size=None)))
    for name, codes_BKT in batch.codes.items():
        console.print(f"{name}: codes {list(codes_BKT.shape)}, frames {batch.num_frames[name].tolist()}")

    console.rule("7. sound: segments of speakers that the codebooks never heard, decoded")
    spoken = _first_of_each(root, corpus, LEFT_OUT)
    for num_codebooks in (1, 8):
        for sound in decode_segments(
            root,
            corpus,
            "acoustic",
            ids=frozenset(row["id"] for row in spoken),
            limit=0,
            num_codebooks=num_codebooks,
            folder=root.join(f"decoded/{num_codebooks}-codebooks"),
        ):
            console.print(f'{sound.path}: "{sound.text}"')
    for num_codebooks, distance in _distances(root, corpus, spoken).items():
        console.print(f"{num_codebooks} codebook(s): mean log-mel distance to the original {distance:.2f}")
    print(
        f"Done. Next: wavemill corpus build YOUR_FOLDER --to YOUR_TOKENS  (this demo's dataset: {root})",
        file=sys.stderr,
    )


_STREAMS = {"semantic": "mfcc-kmeans", "acoustic": "mel-rvq"}


def _engine(name: str) -> Engine:
    if name == "inline":
        return InlineEngine()
    from .ray_engine import RayEngine

    return RayEngine(address=None, num_workers=None)


def _first_of_each(root: Root, corpus: Snapshot, speakers: frozenset[str]) -> list[Row]:
    """The first good segment of each speaker."""
    first: dict[str, Row] = {}
    for shard in corpus.files:
        for row in read_parquet(root, corpus.path(shard), schema=CORPUS_SCHEMA).to_pylist():
            if row["speaker"] in speakers and row["error"] is None:
                first.setdefault(row["speaker"], row)
    return list(first.values())


def _distances(root: Root, corpus: Snapshot, rows: list[Row]) -> dict[int, float]:
    """How far the decoded sound is from the original, by number of codebooks: mean absolute log-mel difference."""
    features = MelFeatures()
    tokenizer = open_stream_tokenizer(root, "acoustic", open_stream(root, "acoustic"), corpus)
    totals: dict[int, float] = dict.fromkeys((1, 2, 4, 8), 0.0)
    with open_reader(root, corpus.metadata) as reader:
        heard = list(reader.read(rows, [features.spec.sound]))
    for waveforms in heard:
        assert not isinstance(waveforms, AudioError), "they were tokenized"
        original_N = waveforms[features.spec.sound]
        codes_KT = tokenizer.encode(original_N)
        for num_codebooks in totals:
            decoded_N = tokenizer.decode(codes_KT[:num_codebooks])[: original_N.shape[0]]
            difference_TD = features.extract(original_N) - features.extract(decoded_N)
            totals[num_codebooks] += float(difference_TD.abs().mean()) / len(rows)
    return totals
