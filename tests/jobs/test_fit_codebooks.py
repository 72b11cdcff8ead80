"""Fitting as a job: many codebooks from one pass, the same bytes whoever samples and however often it was killed."""

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import soundfile
import torch
from random_weights import make_weights
from wavemill.jobs.codebook import FitOptions, fit_codebook, fit_codebooks
from wavemill.jobs.corpus import build_corpus
from wavemill.jobs.engine import InlineEngine
from wavemill.jobs.ray_engine import RayEngine
from wavemill.jobs.tokenize import TokenizeOptions, tokenize
from wavemill.pipelines.policy import CorpusPolicy
from wavemill.pipelines.sample import SampleReport
from wavemill.pipelines.streams import StreamConfig
from wavemill.storage.codes import open_corpus, open_stream, read_codes
from wavemill.storage.root import Root
from wavemill.storage.vacuum import vacuum
from wavemill.tokenizers.codebook import Codebook
from wavemill.tokenizers.registry import load_features
from wavemill.tokenizers.spec import UserError
from wavemill.tokenizers.ssl_features import SslFeatures
from wavemill.tokenizers.tokenizer import TokenizerConfig

Wavemill = Callable[..., CompletedProcess[str]]

MFCC = TokenizerConfig(tokenizer="mfcc-kmeans")
SMALL = FitOptions(name="mine", size=20, budget_bytes=100_000, seed=3)


@pytest.fixture(scope="session")
def small_root(samples: Path, made_once: Callable[[str, Callable[[Path], None]], Path]) -> Path:
    """The clips of one speaker, four of another and the broken files, in several shards."""

    def make(path: Path) -> None:
        lines = [line for line in (samples / "manifest.jsonl").read_text().splitlines() if '"en_anna"' in line]
        lines += [line for line in (samples / "manifest.jsonl").read_text().splitlines() if '"de_jonas"' in line][:4]
        manifest = path.parent / "small.jsonl"
        manifest.write_text("\n".join(lines).replace('"speech/', f'"{samples}/speech/'))
        build_corpus(Root(path), [f"speech={manifest}", f"b={samples / 'broken'}"], CorpusPolicy(), shard_hours=0.002)

    return made_once("to-fit", make)


@pytest.fixture
def root(small_root: Path, copy_root: Callable[[Path], Path]) -> Root:
    return Root(copy_root(small_root))


@pytest.fixture(scope="session")
def hubert(made_once: Callable[[str, Callable[[Path], None]], Path]) -> TokenizerConfig:
    folder = made_once("hubert-to-fit", lambda path: make_weights("hubert-base", path, small=True) and None)
    return TokenizerConfig(tokenizer="hubert-base", weights=str(folder))


def content(root: Root, name: str = "mine") -> bytes:
    return root.read_bytes(f"codebooks/{name}.safetensors")


def names(root: Root) -> list[str]:
    return [name.removesuffix(".safetensors") for name in root.list("codebooks")]


def test_two_fits_with_one_seed_are_the_same_file_and_leave_nothing_else(root: Root):
    fit_codebook(root, MFCC, SMALL)
    first = content(root)
    assert set(root.list("")) == {"codebooks", "corpus"}
    fit_codebook(
        root, MFCC, FitOptions(name="mine", size=20, budget_bytes=100_000, seed=3, replace=True, memory_bytes=1)
    )
    assert content(root) == first
    fit_codebook(root, MFCC, FitOptions(name="mine", size=20, budget_bytes=100_000, seed=4, replace=True))
    assert Codebook.from_bytes(content(root), name="mine").sha256 != Codebook.from_bytes(first, name="mine").sha256


def test_several_layers_and_sizes_come_from_one_pass_and_are_what_each_is_alone(root: Root, hubert: TokenizerConfig):
    heard: list[SampleReport] = []
    options = FitOptions(name="h", budget_bytes=60_000)
    headers = fit_codebooks(root, hubert, options, layers=(1, 0), sizes=(8, 4), on_report=heard.append)
    assert [header["codebook"] for header in headers] == ["h-l0-k4", "h-l0-k8", "h-l1-k4", "h-l1-k8"]
    assert sorted(report.shard for report in heard) == sorted({report.shard for report in heard})  # each shard once
    together = {
        header["codebook"]: Codebook.from_bytes(content(root, header["codebook"]), name="") for header in headers
    }
    for layer, size in ((0, 8), (1, 4)):
        config = TokenizerConfig(tokenizer="hubert-base", weights=hubert.weights, layer=layer)
        fit_codebook(root, config, FitOptions(name="alone", size=size, budget_bytes=60_000, replace=True))
        alone = Codebook.from_bytes(content(root, "alone"), name="")
        assert torch.equal(alone.centroids_QCD, together[f"h-l{layer}-k{size}"].centroids_QCD)
        assert alone.header["layer"] == str(layer)
    [k4, k8] = [each["mean_square_error"][-1] for each in headers[0]["fitted_with"][:2]]
    assert k8 < k4


def test_one_layer_of_several_adds_nothing_to_the_name_but_what_differs(root: Root):
    headers = fit_codebooks(root, MFCC, FitOptions(name="m", budget_bytes=50_000), sizes=(6, 5))
    assert [header["codebook"] for header in headers] == ["m-k5", "m-k6"]
    [header] = fit_codebooks(root, MFCC, FitOptions(name="m", budget_bytes=50_000), sizes=(6,))
    assert header["codebook"] == "m"


def test_features_of_several_layers_are_bit_for_bit_those_of_each(hubert: TokenizerConfig):
    waveform_N = torch.randn(16_000 * 33, generator=torch.Generator().manual_seed(0))  # two windows
    highest = load_features(TokenizerConfig(tokenizer="hubert-base", weights=hubert.weights, layer=2))
    assert isinstance(highest, SslFeatures)
    with torch.inference_mode():
        pieces = list(highest.layer_pieces(waveform_N, (2, 0, 1)))
        assert len(pieces) == 2
        for layer in (0, 1, 2):
            alone = load_features(TokenizerConfig(tokenizer="hubert-base", weights=hubert.weights, layer=layer))
            assert torch.equal(torch.cat([piece[layer] for piece in pieces]), alone.extract(waveform_N))


@pytest.mark.slow
def test_a_fit_that_was_killed_takes_up_the_shards_that_were_sampled(root: Root, wavemill: Wavemill):
    command = ("codebook", "fit", root.uri, "mfcc-kmeans", "--name", "mine", "--size", "20", "--budget", "100KB")
    killed = wavemill(*command, env={"WAVEMILL_FAILPOINTS": "shard-sampled=kill@4"})
    assert killed.returncode == -signal.SIGKILL
    assert "mine" not in names(root)
    [folder] = root.list("tmp")
    written = {name: root.modified(f"tmp/{folder}/{name}") for name in root.list(f"tmp/{folder}")}
    killed = wavemill(*command, env={"WAVEMILL_FAILPOINTS": "before-codebooks=kill"})
    assert killed.returncode == -signal.SIGKILL
    num = len(open_corpus(root).files)
    assert f"taking up 4 of {num} shards sampled before" in killed.stderr
    assert {name: root.modified(f"tmp/{folder}/{name}") for name in written} == written  # none was made again
    done = wavemill(*command)
    assert done.returncode == 0
    assert f"taking up {num} of {num} shards sampled before" in done.stderr
    assert not root.exists("tmp")
    resumed = content(root)
    assert wavemill(*command, "--replace").returncode == 0
    assert content(root) == resumed


@pytest.mark.slow
def test_another_seed_or_budget_takes_up_nothing(root: Root, wavemill: Wavemill):
    command = ("codebook", "fit", root.uri, "mfcc-kmeans", "--name", "mine", "--size", "20", "--budget", "100KB")
    wavemill(*command, env={"WAVEMILL_FAILPOINTS": "shard-sampled=kill@4"})
    other = wavemill(*command, "--seed", "1")
    assert other.returncode == 0
    assert "taking up" not in other.stderr
    [left] = root.list("tmp")
    leftovers = vacuum(root, older_than_h=2.0, dry_run=False)
    assert not leftovers  # the killed run may be taken up yet
    for path in Path(root.uri, "tmp", left).iterdir():
        shutil.os.utime(path, (0, 0))
    assert all(each.path.startswith(f"tmp/{left}/") for each in vacuum(root, older_than_h=2.0, dry_run=False))
    assert not root.list(f"tmp/{left}")


@pytest.mark.slow
def test_on_ray_killed_while_sampling_it_ends_in_the_bytes_of_an_undisturbed_fit(root: Root, wavemill: Wavemill):
    fit_codebook(root, MFCC, FitOptions(name="inline", size=20, budget_bytes=100_000))
    command = ("codebook", "fit", root.uri, "mfcc-kmeans", "--size", "20", "--budget", "100KB", "--name", "mine")
    on_ray = (*command, "--engine", "ray", "--workers", "2")
    killed = wavemill(*on_ray, env={"WAVEMILL_FAILPOINTS": "sample-received=kill@3"})
    assert killed.returncode == -signal.SIGKILL
    done = wavemill(*on_ray)
    assert done.returncode == 0, done.stderr
    count = int(done.stderr.split("taking up ")[1].split()[0])
    assert count >= 3
    assert _same(root, "mine", "inline")


def _same(root: Root, one: str, other: str) -> bool:
    """Whether two codebooks differ in no more than their names."""
    first, second = (Codebook.from_bytes(content(root, name), name=name) for name in (one, other))
    for codebook in (first, second):
        codebook.header["fitted_with"][0].pop("codebook")
    return first.header == second.header and torch.equal(first.centroids_QCD, second.centroids_QCD)


@pytest.mark.slow
def test_a_worker_that_dies_costs_nothing_but_time(root: Root, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    fit_codebook(root, MFCC, FitOptions(name="inline", size=20, budget_bytes=100_000))
    (tmp_path / "once").mkdir()
    monkeypatch.setenv("WAVEMILL_FAILPOINTS", "before-shard-sampled=kill")
    monkeypatch.setenv("WAVEMILL_FAILPOINTS_ONCE", str(tmp_path / "once"))
    fit_codebook(
        root,
        MFCC,
        FitOptions(name="mine", size=20, budget_bytes=100_000),
        engine=lambda: RayEngine(address=None, num_workers=2),
    )
    assert (tmp_path / "once" / "before-shard-sampled").exists()
    assert _same(root, "mine", "inline")


def test_groups_quantize_parts_of_the_frames_and_spherical_codebooks_directions(root: Root):
    fit_codebook(root, MFCC, FitOptions(name="parts", size=8, groups=3, budget_bytes=200_000))
    fit_codebook(root, MFCC, FitOptions(name="round", size=8, spherical=True, budget_bytes=200_000))
    parts, ball = (Codebook.from_bytes(content(root, name), name=name) for name in ("parts", "round"))
    assert list(parts.centroids_QCD.shape) == [3, 8, 13]
    assert parts.header["num_codebooks"] == 3
    torch.testing.assert_close(ball.centroids_QCD.norm(dim=2), torch.ones(1, 8))
    frames_ND = 100 * torch.randn(500, 39, generator=torch.Generator().manual_seed(0))
    codes_KN = parts.open().encode(frames_ND)
    for group in range(3):
        distances = torch.cdist(frames_ND[:, group * 13 : group * 13 + 13], parts.centroids_QCD[group])
        assert torch.equal(codes_KN[group], distances.argmin(dim=1))
    by_angle = (frames_ND.double() @ ball.centroids_QCD[0].double().t()).argmax(dim=1)
    assert torch.equal(ball.open().encode(frames_ND)[0], by_angle)
    streams = [StreamConfig(name=name, tokenizer=MFCC, codebook=name) for name in ("parts", "round")]
    tokenize(root, streams, InlineEngine, TokenizeOptions(max_error_share=0.5))
    stream = open_stream(root, "parts")
    assert stream.metadata["fingerprint"]["groups"] == "3"
    assert stream.metadata["spec"]["num_codebooks"] == 3
    assert len(read_codes(root, stream, next(iter(stream.files))).books) == 3
    fingerprint = open_stream(root, "round").metadata["fingerprint"]
    assert fingerprint["spherical"] == "yes"
    assert "groups" not in fingerprint


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"groups": 5}, "the 39 dimensions of mfcc-kmeans cannot be cut into 5 equal parts"),
        ({"groups": 3, "num_codebooks": 4}, "name a multiple of 3"),
        ({"spherical": True, "num_codebooks": 2}, "tokens of mfcc-kmeans would have 2 codebooks"),
        ({"backend": "cuml"}, "there are: auto, faiss, torch"),
        ({"stratify": "speakr"}, "Did you mean 'speaker'?"),
        ({"budget_bytes": 3_000}, "3,000 bytes holds 19 frames of 39 dimensions, too few to fit 20 centroids"),
        ({"size": 50_000, "budget_bytes": 1 << 30}, "frames to fit 50,000 centroids on"),
    ],
)
def test_what_cannot_be_fitted_is_told_before_anything_is_sampled(options: dict[str, Any], says: str, root: Root):
    before = names(root)
    started: list[int] = []
    with pytest.raises(UserError) as caught:
        fit_codebook(root, MFCC, FitOptions(**{"name": "b", "size": 20, **options}), on_start=started.append)
    assert says in str(caught.value)
    assert (started, names(root), root.exists("tmp")) == ([], before, False)


def _corpus_of(path: Path, waveforms: dict[str, np.ndarray]) -> Root:
    (path / "sounds").mkdir(parents=True)
    for name, waveform_N in waveforms.items():
        soundfile.write(path / "sounds" / f"{name}.wav", waveform_N, 16_000, subtype="FLOAT")
    root = Root(path / "root")
    build_corpus(root, [f"sounds={path / 'sounds'}"], CorpusPolicy(), shard_hours=0.01)
    return root


def test_silence_that_gives_one_frame_over_and_over_is_refused_and_leaves_nothing(tmp_path: Path):
    root = _corpus_of(tmp_path, {"silent": np.zeros(160_000, np.float32)})
    with pytest.raises(UserError, match=r"Only 1 distinct frames were found among 499, too few for 4 centroids\."):
        fit_codebook(root, MFCC, FitOptions(size=4))
    assert root.list("") == ["corpus"]


def test_features_that_are_nan_are_told_with_the_recording_and_leave_nothing(hubert: TokenizerConfig, tmp_path: Path):
    broken = tmp_path / "broken"
    shutil.copytree(str(hubert.weights), broken)
    tensors = safetensors.torch.load_file(broken / "model.safetensors")
    name = next(name for name in tensors if name.endswith("encoder.layers.0.final_layer_norm.weight"))
    tensors[name][:] = torch.nan
    safetensors.torch.save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    root = _corpus_of(tmp_path, {"noise": np.random.default_rng(0).standard_normal(32_000).astype(np.float32) / 10})
    config = TokenizerConfig(tokenizer="hubert-base", weights=str(broken), layer=1)
    with pytest.raises(UserError, match=r"features of hubert-base at layer 1 are NaN or infinite for noise\.wav"):
        fit_codebook(root, config, FitOptions(size=4))
    assert root.list("") == ["corpus"]


def test_phones_of_the_corpus_are_measured_on_the_sample(tmp_path: Path):
    """Two sounds and their labels: a unit that knows which sound it is takes all uncertainty away."""
    seconds = np.arange(32_000) / 16_000
    sounds = tmp_path / "labelled"
    sounds.mkdir()
    tone = np.sin(2 * np.pi * 300 * seconds)
    noise = np.random.default_rng(0).standard_normal(32_000) / 4
    soundfile.write(sounds / "a.wav", np.concatenate([tone, noise]).astype(np.float32), 16_000)
    (sounds / "a.lab").write_text("0 20000000 AA1\n20000000 40000000 S\n")
    root = Root(tmp_path / "root")
    build_corpus(root, [f"s={sounds}"], CorpusPolicy(), shard_hours=0.01)
    header = fit_codebook(root, MFCC, FitOptions(size=2))
    assert header["phones"]["frames"] > 190
    assert header["phones"]["phone_purity"] > 0.97
    assert header["phones"]["pnmi"] > 0.8


def test_the_report_has_the_figures_of_the_fit(root: Root, in_process: Wavemill, tmp_path: Path):
    fit_codebooks(root, MFCC, FitOptions(name="m", budget_bytes=100_000, stratify="speaker"), sizes=(5, 10))
    told = in_process("codebook", "report", root.uri, "m-k10")
    assert told.returncode == 0
    assert "m-k10: 1 x 10 centroids of mfcc-kmeans" in told.stdout
    assert "m-k5" in told.stdout  # fitted together: error by size
    facts = json.loads(in_process("codebook", "report", root.uri, "m-k10", "--json").stdout)
    assert sum(facts["cluster_sizes"][0]) == facts["frames"] == sum(facts["distances"]["counts"])
    assert facts["curves"][0][-1] <= facts["curves"][0][0]
    assert facts["codebooks"][0]["used"] == 10
    assert max(facts["stratify"]["frames"].values()) <= facts["frames"] / 2 + 1
    drawn = in_process("codebook", "report", root.uri, "m-k10", "--png", tmp_path / "fit.png")
    assert drawn.returncode == 0
    assert (tmp_path / "fit.png").read_bytes().startswith(b"\x89PNG")


def test_a_codebook_goes_out_and_comes_back_as_the_same_numbers(root: Root, in_process: Wavemill, tmp_path: Path):
    faiss = pytest.importorskip("faiss")
    fit_codebook(root, MFCC, SMALL)
    codebook = Codebook.from_bytes(content(root), name="mine")
    for number, file in enumerate((tmp_path / "mine.npy", tmp_path / "mine.index")):
        assert in_process("codebook", "export", root.uri, "mine", "--to", file).returncode == 0
        assert (
            in_process("codebook", "import", root.uri, file, "mfcc-kmeans", "--name", f"back{number}").returncode == 0
        )
        back = Codebook.from_bytes(content(root, f"back{number}"), name="back")
        assert torch.equal(back.centroids_QCD, codebook.centroids_QCD)
    frames_ND = 20 * np.random.default_rng(0).standard_normal((400, 39)).astype(np.float32)
    _, found_N1 = faiss.read_index(str(tmp_path / "mine.index")).search(frames_ND, 1)
    assert np.array_equal(found_N1[:, 0], codebook.open().encode(torch.from_numpy(frames_ND))[0].numpy())
