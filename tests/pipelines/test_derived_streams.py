"""Streams of texts and of other streams' codes beside those of audio: one run, its end, its checks and its mistakes."""

import json
import pickle
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import weights_text
from wavemill.jobs.arguments import parse_streams
from wavemill.jobs.engine import InlineEngine
from wavemill.jobs.repair import look, mend
from wavemill.jobs.tokenize import Summary, TokenizeOptions, tokenize
from wavemill.jobs.units import fit_units
from wavemill.pipelines import tokenize as pipeline
from wavemill.pipelines.export import export_webdataset
from wavemill.pipelines.inspection import describe_streams
from wavemill.pipelines.streams import describe_stream, open_stream_tokenizer, sources_first
from wavemill.pipelines.tokenize import ShardTask
from wavemill.pipelines.verify import Verdict, verify
from wavemill.storage.codes import list_streams, open_corpus, open_stream, read_codes, stream_spec
from wavemill.storage.parquet import read_parquet
from wavemill.storage.root import Root
from wavemill.storage.schema import CORPUS_SCHEMA, stream_schema
from wavemill.storage.table import create_table, write_shard
from wavemill.storage.writer import TableWriter
from wavemill.tokenizers.registry import REGISTRY, CodebookTokenizer
from wavemill.tokenizers.spec import FrameRule, UserError
from wavemill.tokenizers.tokenizer import Output

Copy = Callable[[Path], Path]
MadeOnce = Callable[[str, Callable[[Path], None]], Path]
NAMES = ("units", "runs", "pairs", "words")


def streams(place: Path, *names: str) -> list[Any]:
    made_with = {
        "units": "units=mfcc-kmeans",
        "runs": "runs=deduplicate,of=units",
        "pairs": "pairs=bpe:joined,of=runs",
        "words": f"words=text-tokens,weights={place / 'words'}",
    }
    return parse_streams([made_with[name] for name in names])


@pytest.fixture(scope="module")
def made(fitted_root: Path, made_once: MadeOnce) -> Path:
    """A root with units and their runs, made in two steps, a model of the runs' pairs, and a text tokenizer."""

    def make(path: Path) -> None:
        shutil.copytree(fitted_root, path)
        weights_text.make_text_tokenizer(path / "words")
        run(path, "runs", "units")
        fit_units(Root(path), "runs", name="joined", size=160, budget_units=4_000, seed=0)

    return made_once("derived", make)


@pytest.fixture(scope="module")
def whole(made: Path, made_once: MadeOnce) -> Path:
    """`made` with all streams, those that it lacked from one run."""

    def make(path: Path) -> None:
        shutil.copytree(made, path)
        run(path, "pairs", "words", "runs", "units")

    return made_once("derived-whole", make)


def run(place: Path, *names: str, **options: Any) -> Summary:
    return tokenize(Root(place), streams(place, *names), InlineEngine, TokenizeOptions(**options))


def check(place: Path, sample: int = 2) -> Verdict:
    return verify(Root(place), open_corpus(Root(place)), sample=sample, seed=0, source_roots={})


def rows_of(place: Path, name: str) -> list[dict[str, Any]]:
    root = Root(place)
    snapshot = open_stream(root, name)
    rows = []
    for shard in snapshot.files:
        codes = read_codes(root, snapshot, shard, more=True)
        for row, segment in enumerate(codes.ids):
            found: dict[str, Any] = {"id": segment, "error": codes.errors[row], "codes": codes.codes(row)}
            found |= {column: values[row] for column, values in codes.more.items()}
            rows.append(found)
    return rows


def corpus_rows(place: Path) -> list[dict[str, Any]]:
    root = Root(place)
    corpus = open_corpus(root)
    tables = [read_parquet(root, corpus.path(shard), schema=CORPUS_SCHEMA) for shard in corpus.files]
    return pa.concat_tables(tables).to_pylist()


def files_of(place: Path) -> dict[str, list[str]]:
    root = Root(place)
    return {name: [each.file_name for each in open_stream(root, name).files.values()] for name in list_streams(root)}


def test_runs_are_those_of_the_units_and_pairs_give_the_runs_back(whole: Path) -> None:
    units, runs, pairs = (rows_of(whole, name) for name in ("units", "runs", "pairs"))
    root = Root(whole)
    joined = open_stream_tokenizer(root, "pairs", open_stream(root, "pairs"), open_corpus(root))
    shorter = 0
    for unit, one, pair in zip(units, runs, pairs, strict=True):
        assert unit["id"] == one["id"] == pair["id"]
        assert unit["error"] == one["error"] == pair["error"]
        if unit["error"] is None:
            assert np.array_equal(np.repeat(one["codes"], one["durations"], axis=1), unit["codes"])
            assert not (one["codes"][0, 1:] == one["codes"][0, :-1]).any()
            assert sum(pair["durations"]) == unit["codes"].shape[1]
            parts = [joined._parts[token] for token in pair["codes"][0]]
            assert np.array_equal(np.concatenate([*parts, []]), one["codes"][0])
            shorter += pair["codes"].shape[1] < one["codes"].shape[1]
    assert shorter > 50
    assert stream_spec(open_stream(root, "pairs")).frame_rule is FrameRule.FREE


def test_words_are_there_wherever_the_corpus_has_no_error(whole: Path) -> None:
    words, units = rows_of(whole, "words"), rows_of(whole, "units")
    with_text = 0
    for word, row in zip(words, corpus_rows(whole), strict=True):
        assert word["id"] == row["id"]
        assert word["error"] == row["error"]
        if row["error"] is None:
            assert word["text"] == row["text"]
            assert (word["codes"].shape[1] > 0) == bool(row["text"])
            with_text += bool(row["text"])
    assert with_text > 50
    # a file that only decoding finds broken
    assert any(word["error"] is None and unit["error"] is not None for word, unit in zip(words, units, strict=True))


def test_a_whole_dataset_is_whole(whole: Path) -> None:
    verdict = check(whole, 12)
    assert verdict.problems == []
    assert verdict.tokenized_again == 12


def test_what_lacks_derived_streams_alone_decodes_nothing_and_gives_the_same_bytes(
    whole: Path, copy_root: Copy, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = copy_root(whole)

    def none_is_decoded(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("a reader was opened")

    for name in ("runs", "pairs", "words"):
        shutil.rmtree(root / "streams" / name)
    monkeypatch.setattr(pipeline.Work, "open_readers", none_is_decoded)
    again = run(root, *NAMES)
    assert again.decode_s == 0
    assert again.segments == 112
    assert files_of(root) == files_of(whole)
    assert run(root, *NAMES).segments == 0


def test_a_run_that_is_killed_between_the_streams_commits_goes_on(
    made: Path, whole: Path, copy_root: Copy, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = copy_root(made)
    for name in ("units", "runs"):
        shutil.rmtree(root / "streams" / name)

    class Killed(BaseException):
        pass

    def dies(name: str) -> None:
        if name == "before-commit-runs":
            raise Killed

    with monkeypatch.context() as patched:
        patched.setattr("wavemill.jobs.tokenize.failpoint", dies)
        with pytest.raises(Killed):
            run(root, *NAMES)
    assert len(open_stream(Root(root), "units").files) > 0
    assert len(open_stream(Root(root), "runs").files) == 0
    for name in NAMES:  # written, not committed: made in one pass
        written = {path.name for path in (root / "streams" / name).glob("*.parquet")}
        assert set() < written <= set(files_of(whole)[name])
    run(root, *NAMES)
    assert files_of(root) == files_of(whole)


def test_an_error_of_the_audio_is_one_of_what_is_made_of_it_alone(whole: Path) -> None:
    by_name = {name: {row["id"] for row in rows_of(whole, name) if row["error"]} for name in NAMES}
    assert by_name["units"] == by_name["runs"] == by_name["pairs"] > by_name["words"]
    for name in NAMES:
        assert open_stream(Root(whole), name).num_errors == len(by_name[name])


def test_verification_finds_derived_tokens_that_are_not_their_sources(whole: Path, copy_root: Copy) -> None:
    root = copy_root(whole)
    shutil.rmtree(root / "streams" / "runs")
    shutil.copytree(root / "streams" / "pairs", root / "streams" / "other")
    problems = check(root, 0).problems
    assert any("stream pairs cannot be tokenized again: There is no stream 'runs'" in problem for problem in problems)
    root = copy_root(whole)
    (root / "streams" / "units").rename(root / "streams" / "old")
    units = parse_streams([f"units=text-tokens,weights={root / 'words'}"])
    tokenize(Root(root), units, InlineEngine, TokenizeOptions())
    assert any("stream runs cannot be tokenized again: " in problem for problem in check(root, 0).problems)


def test_a_damaged_file_of_a_derived_stream_is_made_again_from_its_source(whole: Path, copy_root: Copy) -> None:
    root = copy_root(whole)
    place = Root(root)
    for name, shard in (("runs", 1), ("pairs", 1), ("pairs", 2), ("words", 3), ("units", 2)):
        Path(place.join(open_stream(place, name).path(shard))).write_bytes(b"rotten")
    found = look(place)
    assert len(found.damaged) == 5
    repaired = mend(place, found, InlineEngine, TokenizeOptions())
    assert (repaired.restored, repaired.problems) == (5, [])
    assert files_of(root) == files_of(whole)
    assert check(root).problems == []


def test_accepting_other_codes_makes_again_what_is_made_of_them(
    whole: Path, copy_root: Copy, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Root(copy_root(whole))
    written = {name: open_stream(place, name).files[1].file_name for name in NAMES}
    Path(place.join(open_stream(place, "units").path(1))).write_bytes(b"rotten")
    encode = CodebookTokenizer.encode
    monkeypatch.setattr(CodebookTokenizer, "encode", lambda self, waveform_N: encode(self, waveform_N).clamp(max=60))
    kept = mend(place, look(place), InlineEngine, TokenizeOptions())
    assert (kept.replaced, len(kept.problems)) == (0, 1)
    repaired = mend(place, look(place), InlineEngine, TokenizeOptions(), accept=True)
    assert (repaired.replaced, repaired.problems) == (3, [])
    now = {name: open_stream(place, name).files[1].file_name for name in NAMES}
    assert {name for name in NAMES if now[name] != written[name]} == {"units", "runs", "pairs"}
    assert verify_shards_agree(place)


def test_a_repair_that_is_killed_between_a_stream_and_what_is_made_of_it_is_done_by_the_next(
    whole: Path, copy_root: Copy, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Root(copy_root(whole))
    Path(place.join(open_stream(place, "units").path(1))).write_bytes(b"rotten")
    encode = CodebookTokenizer.encode
    monkeypatch.setattr(CodebookTokenizer, "encode", lambda self, waveform_N: encode(self, waveform_N).clamp(max=60))

    class Killed(BaseException):
        pass

    for _ in range(2):
        with monkeypatch.context() as patched:
            replace, done = TableWriter.replace, []

            def dies(writer: TableWriter, *arguments: Any, **options: Any) -> None:
                if done:  # noqa: B023
                    raise Killed
                done.append(writer)  # noqa: B023
                replace(writer, *arguments, **options)  # noqa: B023

            patched.setattr(TableWriter, "replace", dies)
            with pytest.raises(Killed):
                mend(place, look(place), InlineEngine, TokenizeOptions(), accept=True)
    mend(place, look(place), InlineEngine, TokenizeOptions(), accept=True)
    assert look(place).tasks() == []
    assert verify_shards_agree(place)


def spoil(root: Path, name: str, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Write a stream anew, with each row that has no error changed."""
    place = Root(root)
    old = open_stream(place, name)
    schema = stream_schema(stream_spec(old))
    tables = {shard: read_parquet(place, old.path(shard), schema=schema) for shard in old.files}
    shutil.rmtree(root / old.folder)
    create_table(place, old.folder, schema=schema, metadata=dict(old.metadata))
    receipts = []
    for shard, table in tables.items():
        rows = [row if row["error"] else row | change(row) for row in table.to_pylist()]
        receipts.append(write_shard(place, old.folder, shard, pa.Table.from_pylist(rows, schema=schema)))
    TableWriter(place, old.folder).commit(receipts)


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("runs", lambda row: {"durations": [-each for each in row["durations"]]}, "negative durations"),
        ("runs", lambda row: {"codes_00": [each + 1_000 for each in row["codes_00"]]}, "codes outside 0 to 99"),
        ("pairs", lambda row: {"codes_00": [each + 1_000 for each in row["codes_00"]]}, "codes outside 0 to 159"),
    ],
)
def test_a_row_that_is_blamed_is_a_sentence_and_compared_with_nothing(
    name: str, change: Callable[[dict[str, Any]], dict[str, Any]], said: str, whole: Path, copy_root: Copy
) -> None:
    root = copy_root(whole)
    spoil(root, name, change)
    verdict = check(root, 12)
    assert verdict.num_problems > 12
    assert all(f"stream {name}" in problem and said in problem for problem in verdict.problems)


def test_what_is_made_of_codes_does_not_ask_where_its_source_was_made(whole: Path, copy_root: Copy) -> None:
    root = copy_root(whole)
    log = root / "streams" / "units" / "_delta_log" / "00000000000000000000.json"
    log.write_text(log.read_text().replace('\\"instructions\\": \\"', '\\"instructions\\": \\"NEON or '))
    assert "NEON" in open_stream(Root(root), "units").metadata["numerics"]["instructions"]
    shutil.rmtree(root / "streams" / "runs")
    run(root, "runs", "units")
    assert files_of(root) == files_of(whole)
    for name in ("runs", "pairs", "words"):
        assert open_stream(Root(root), name).metadata["numerics"] == {"device": "any"}


def verify_shards_agree(root: Root) -> bool:
    units, runs = (read_codes(root, open_stream(root, name), 1, more=True) for name in ("units", "runs"))
    pairs = [(units.codes(row), runs.codes(row), runs.durations(row)) for row in range(len(units.ids))]
    return all(np.array_equal(np.repeat(one, each, axis=1), unit) for unit, one, each in pairs if unit is not None)


def test_derived_streams_are_shown_and_exported(whole: Path, copy_root: Copy) -> None:
    root = Root(copy_root(whole))
    corpus = open_corpus(root)
    shown = {stream["stream"]: stream for stream in describe_streams(root, corpus)}
    assert shown["runs"]["frames"] < shown["units"]["frames"]
    assert shown["words"]["hours"] is None
    index = export_webdataset(root, corpus, {name: open_stream(root, name) for name in NAMES}, view="all")
    assert index["samples"] == 108


def test_the_same_sample_gives_the_same_model(made: Path, copy_root: Copy) -> None:
    root = Root(copy_root(made))
    told = [
        fit_units(root, "runs", name=name, size=160, budget_units=budget, seed=0)
        for name, budget in (("again", 4_000), ("less", 1_000), ("all", 10**9))
    ]
    files = [root.read_bytes(f"codebooks/{name}.json") for name in ("joined", "again", "less")]
    assert files[0].replace(b'"joined"', b'"again"') == files[1]
    assert files[1] != files[2]
    assert told[1]["units"] < told[0]["units"] <= 8_000 < told[2]["units"]


def test_a_budget_that_takes_no_segment_is_refused_with_one_that_does(made: Path, copy_root: Copy) -> None:
    root = Root(copy_root(made))
    with pytest.raises(UserError, match=r"fits a --budget of 4 bytes") as refused:
        fit_units(root, "runs", name="none", size=160, budget_units=1, seed=0)
    assert not root.exists("codebooks/none.json")
    [enough] = re.findall(r"([\d,]+) takes all", str(refused.value))
    budget = int(enough.replace(",", "")) // 4
    assert fit_units(root, "runs", name="all", size=160, budget_units=budget, seed=0)["units"] == budget


def test_what_is_made_of_latents_is_described_before_their_codebook_is_there(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Latents that a codebook is named for are codes, whatever they are without one."""
    monkeypatch.setitem(REGISTRY, "mel-rvq", replace(REGISTRY["mel-rvq"], output=Output.FEATURES))
    beside = parse_streams(["mel=mel-rvq:later", "more=deduplicate,of=mel"])
    described = describe_stream(Root(made), beside[1], beside, made_later={"later"})
    assert (described.spec.num_codebooks, described.spec.dim) == (8, 0)
    kept = parse_streams(["mel=mel-rvq:later,output=features"])
    with pytest.raises(UserError, match="later"):
        describe_stream(Root(made), kept[0], made_later={"later"})


def test_units_of_a_run_come_before_those_of_the_root(made: Path, copy_root: Copy) -> None:
    """The stream that is named is what the run makes: here another than the root has, which is refused."""
    root = copy_root(made)
    other = parse_streams(["units=mel-rvq", "more=deduplicate,of=units"])
    with pytest.raises(UserError, match=r'Stream "units" .* was written with mfcc-kmeans'):
        tokenize(Root(root), other, InlineEngine, TokenizeOptions())
    assert not (root / "streams" / "more").exists()


@pytest.mark.slow
def test_a_source_that_is_not_whole_is_refused_unless_the_run_makes_it(
    fitted_root: Path, copy_root: Copy, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = copy_root(fitted_root)

    class Killed(BaseException):
        pass

    commits = []

    def dies(name: str) -> None:
        commits.append(name)
        if commits.count("receipt-received") == 3:
            raise Killed

    with monkeypatch.context() as patched:
        patched.setattr("wavemill.jobs.tokenize.failpoint", dies)
        patched.setattr("wavemill.jobs.tokenize._COMMIT_EVERY_S", 0.0)
        with pytest.raises(Killed):
            run(root, "units")
    done = len(open_stream(Root(root), "units").files)
    assert 0 < done < 10
    with pytest.raises(UserError, match=rf"'units', which 'runs' is made of, lacks {10 - done} shard"):
        run(root, "runs")
    run(root, "runs", "units")
    assert check(root).problems == []


def test_a_recipe_and_commands_make_and_join_units(
    samples: Path, tmp_path: Path, in_process: Callable[..., CompletedProcess[str]]
) -> None:
    (tmp_path / "recordings").mkdir()
    for path in sorted((samples / "speech").glob("*.flac"))[:6]:
        shutil.copy(path, tmp_path / "recordings")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "corpus:\n  sources: [recordings]\n"
        "codebooks:\n  - {tokenizer: mfcc-kmeans, size: 20}\n"
        "streams:\n  runs: {tokenizer: deduplicate, of: units}\n  units: {tokenizer: mfcc-kmeans}\n"
        "tokenize: {engine: inline}\n"
    )
    checked = in_process("recipe", "check", recipe)
    assert "stream runs: deduplicate of units" in checked.stdout, checked.stderr
    misspelt = in_process("recipe", "check", recipe, "--set", "streams.runs.of=unit")
    assert "streams.runs: There is no stream 'unit' to make 'runs' of" in misspelt.stderr
    assert in_process("run", recipe).returncode == 0
    root = tmp_path / "tokens"
    fitted = in_process("units", "fit", root, "runs", "--name", "joined", "--size", "40", "--json")
    assert json.loads(fitted.stdout)["size"] == 40, fitted.stderr
    pairs = ("--stream", "pairs=bpe:joined,of=runs")
    assert in_process("tokenize", root, *pairs, "--engine", "inline").returncode == 0
    assert in_process("verify", root).returncode == 0
    refused = in_process("units", "fit", root, "runs", "--name", "joined", "--size", "30")
    assert "There is a model of units 'joined'" in refused.stderr
    assert in_process("units", "fit", root, "runs", "--name", "joined", "--size", "30", "--replace").returncode == 0
    changed = in_process("tokenize", root, *pairs, "--engine", "inline")
    assert (changed.returncode, 'Stream "pairs"' in changed.stderr) == (2, True)
    assert "model differs" in changed.stderr


def test_work_travels_to_other_machines(whole: Path) -> None:
    root = Root(whole)
    sources = {name: open_stream(root, name) for name in ("units", "runs")}
    made = sources_first(streams(whole, *NAMES[::-1]))
    assert [stream.name for stream in made].index("units") < [stream.name for stream in made].index("runs")
    tasks = [ShardTask(shard=1, streams=("words", "pairs"))]
    work = TokenizeOptions().work(root, open_corpus(root), made, sources, tasks)
    again = pickle.loads(pickle.dumps(work))
    assert again == work
    assert again.idle == {"units", "runs"}
    [report] = again.worker().run(tasks)
    assert {name: receipt.file_name for name, receipt in report.receipts.items()} == {
        name: open_stream(root, name).files[1].file_name for name in ("words", "pairs")
    }
