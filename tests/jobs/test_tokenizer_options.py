"""What a person says of a tokenizer: on the command line, in a recipe, in a file of centroids; what it becomes."""

import hashlib
import json
import signal
import sys
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from wavemill.jobs.arguments import parse_streams
from wavemill.jobs.cli import main
from wavemill.jobs.codebook_files import import_codebook
from wavemill.jobs.recipe_file import default_recipe, load_recipe
from wavemill.jobs.run_recipe import codebooks_of, streams_of
from wavemill.jobs.show import exact_rate
from wavemill.pipelines.streams import StreamConfig, load_codebook, load_stream_tokenizer
from wavemill.storage.root import Root
from wavemill.tokenizers.registry import REGISTRY, describe
from wavemill.tokenizers.spec import UserError
from wavemill.tokenizers.tokenizer import Mode, TokenizerConfig

MFCC = TokenizerConfig(tokenizer="mfcc-kmeans")


def test_a_stream_on_the_command_line_carries_all_that_is_asked_of_its_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = tmp_path / "with,comma"
    folder.mkdir()
    monkeypatch.chdir(tmp_path)
    given = [
        "units=hubert-base:km500,weights=with,comma,layer=9,mode=fast",
        "codes=encodec-24khz,num_codebooks=2,weights=org/model,revision=refs/pr/4",
        "bundle=hubert-base,weights=torchaudio:HUBERT_BASE",
        "plain=mel-rvq",
    ]
    assert parse_streams(given, local_files_only=True) == [
        StreamConfig(
            name="units",
            codebook="km500",
            tokenizer=TokenizerConfig(
                tokenizer="hubert-base", weights=str(folder), layer=9, mode=Mode.FAST, local_files_only=True
            ),
        ),
        StreamConfig(
            name="codes",
            tokenizer=TokenizerConfig(
                tokenizer="encodec-24khz",
                weights="org/model",
                revision="refs/pr/4",
                num_codebooks=2,
                local_files_only=True,
            ),
        ),
        StreamConfig(
            name="bundle",
            tokenizer=TokenizerConfig(tokenizer="hubert-base", weights="torchaudio:HUBERT_BASE", local_files_only=True),
        ),
        StreamConfig(name="plain", tokenizer=TokenizerConfig(tokenizer="mel-rvq", local_files_only=True)),
    ]


def test_a_language_and_a_task_are_keys_of_a_stream_and_of_a_recipe(tmp_path: Path):
    asked = TokenizerConfig(tokenizer="whisper-text", language="de", task="translate")
    [stream] = parse_streams(["heard=whisper-text,language=de,task=translate"])
    (tmp_path / "recipe.yaml").write_text(
        "corpus: {sources: [a]}\nstreams: {heard: {tokenizer: whisper-text, language: de, task: translate}}\n"
    )
    [in_recipe] = streams_of(load_recipe(str(tmp_path / "recipe.yaml")))
    assert stream.tokenizer == in_recipe.tokenizer == asked


def test_weights_in_a_recipe_count_from_its_folder_if_they_are_there_and_are_a_hub_id_if_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "place" / "models" / "mine").mkdir(parents=True)
    (tmp_path / "place" / "recipe.yaml").write_text(
        "corpus: {sources: [a]}\n"
        "streams:\n"
        "  here: {tokenizer: hubert-base, weights: models/mine, layer: 3, mode: fast}\n"
        "  hub: {tokenizer: encodec-24khz, weights: models/other, revision: v1, num_codebooks: 4}\n"
        "tokenize: {local_files_only: true}\n"
    )
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe("place/recipe.yaml")
    here, hub = (stream.tokenizer for stream in streams_of(recipe))
    assert here == TokenizerConfig(
        tokenizer="hubert-base",
        weights=str(tmp_path / "place" / "models" / "mine"),
        layer=3,
        mode=Mode.FAST,
        local_files_only=True,
    )
    assert (hub.weights, hub.revision, hub.num_codebooks, hub.mode) == ("models/other", "v1", 4, Mode.EXACT)


def test_a_recipe_without_codebooks_fits_those_that_its_streams_need_as_they_need_them(tmp_path: Path):
    assert codebooks_of(default_recipe()) == default_recipe().codebooks
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "corpus: {sources: [a]}\n"
        "streams:\n"
        "  units: {tokenizer: hubert-base, layer: 6, weights: org/model}\n"
        "  old: {tokenizer: mfcc-kmeans, codebook: km500}\n"
        "  sound: {tokenizer: dac-16khz}\n"
    )
    [needed] = codebooks_of(load_recipe(str(path)))
    assert (needed.codebook_name, needed.layer, needed.weights) == ("hubert-base", 6, "org/model")
    path.write_text("corpus: {sources: [a]}\ncodebooks: []\n")
    assert codebooks_of(load_recipe(str(path))) == []


@pytest.mark.parametrize(
    ("kind", "shape"), [(np.float32, (5, 39)), (np.float64, (2, 5, 39)), (np.float16, (1, 5, 39)), (">f4", (5, 39))]
)
def test_imported_centroids_are_the_numbers_of_the_file_with_the_story_of_it(
    kind: type, shape: tuple[int, ...], fitted_root: Path, tmp_path: Path, copy_root: Callable[[Path], Path]
):
    root = Root(copy_root(fitted_root))
    array = np.asfortranarray(np.random.default_rng(0).standard_normal(shape).astype(kind))
    np.save(tmp_path / "km.npy", array)
    header = import_codebook(root, str(tmp_path / "km.npy"), MFCC, name="mine")
    codebook = load_codebook(root, "mine", MFCC)
    assert torch.equal(codebook.centroids_QCD, torch.from_numpy(array.astype(np.float32).reshape(-1, *shape[-2:])))
    assert header["imported_from"] == codebook.header["imported_from"] == "km.npy"
    assert codebook.header["sha256"] == hashlib.sha256((tmp_path / "km.npy").read_bytes()).hexdigest()
    assert codebook.header["features"] == describe(MFCC).fingerprint["features"]
    tokenizer = load_stream_tokenizer(root, StreamConfig(name="s", tokenizer=MFCC, codebook="mine"), device="cpu")
    assert tokenizer.encode(torch.randn(16_000)).shape[0] == codebook.centroids_QCD.shape[0]


def test_an_imported_codebook_is_replaced_only_when_told_to(
    fitted_root: Path, tmp_path: Path, copy_root: Callable[[Path], Path]
):
    root = Root(copy_root(fitted_root))
    np.save(tmp_path / "km.npy", np.ones((3, 39), np.float32))
    before = load_codebook(root, "mfcc-kmeans", MFCC).sha256
    with pytest.raises(UserError, match="There is a codebook 'mfcc-kmeans'"):
        import_codebook(root, str(tmp_path / "km.npy"), MFCC)
    assert load_codebook(root, "mfcc-kmeans", MFCC).sha256 == before
    import_codebook(root, str(tmp_path / "km.npy"), MFCC, replace=True)
    assert load_codebook(root, "mfcc-kmeans", MFCC).sha256 != before


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., str]]:
    """What a command prints on stdout."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def command(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["wavemill", *arguments])
        with pytest.raises(SystemExit) as stopped:
            main()
        said = capsys.readouterr()
        assert not stopped.value.code, said.err
        return said.out

    yield command
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("columns", ["80", "120"])
def test_the_list_of_tokenizers_names_each_with_its_weights_and_fits_the_terminal(
    columns: str, run: Callable[..., str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", columns)
    shown = run("tokenizers")
    for name, entry in REGISTRY.items():
        assert name in shown
        assert entry.weights is None or entry.weights in shown
    assert max(len(line) for line in shown.splitlines()) <= int(columns)
    rows = {cells[0]: cells[1:] for line in shown.splitlines() if len(cells := line.split()) > 4}
    assert rows["wavlm-sv"][:4] == ["-", "numbers", "-", "one"]
    assert rows["mimi-latents"][:4] == ["12.5", "numbers", "-", "ceil"]
    assert rows["mel-rvq"][:6] == ["50", "8", "x", "1,024", "4,000", "ceil"]


def test_the_list_of_tokenizers_for_programs_holds_all_that_is_known(run: Callable[..., str]):
    listed = {entry["name"]: entry for entry in json.loads(run("tokenizers", "--json"))}
    assert set(listed) == set(REGISTRY)
    for name, entry in REGISTRY.items():
        for key in ("about", "last_frame", "long_audio", "fast_change", "licence", "weights", "layer", "num_layers"):
            assert listed[name][key] == getattr(entry, key)
        assert listed[name]["modes"] == list(entry.modes)
        assert listed[name]["spec"]["hop_length"] == entry.spec.hop_length
    assert listed["mel-rvq"]["bits_per_second"] == 4000
    assert listed["mel-rvq"]["decodes"] is True


def test_rates_are_exact_decimals_or_fractions():
    rates = [Fraction(75), Fraction(25, 2), Fraction(44_100, 512), Fraction(50, 3), Fraction(100)]
    assert [exact_rate(rate) for rate in rates] == ["75", "12.5", "86.1328125", "50/3", "100"]
