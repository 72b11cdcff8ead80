"""Things that could be executed: weights, codebooks, centroids, separators, Arrow types, WebDataset members."""

import io
import json
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.numpy
import torch
import transformers
import weights_text
from hostile_runs import run
from hostile_teller import Teller
from hostile_tools import World, pickled, sound
from wavemill.pipelines.centroids import read_centroids
from wavemill.storage.parquet import read_parquet, shard_file_name
from wavemill.storage.root import Root
from wavemill.storage.schema import CORPUS_SCHEMA
from wavemill.tokenizers.codebook import Codebook
from wavemill.tokenizers.hub import find_weights, load_model
from wavemill.tokenizers.registry import describe, load_features, load_tokenizer
from wavemill.tokenizers.separate import Separator
from wavemill.tokenizers.spec import RunFailed, UserError
from wavemill.tokenizers.tokenizer import TokenizerConfig

pytest_plugins = ["hostile_table"]
pytestmark = pytest.mark.timeout(200)

PICKLES = {f"a pickle of protocol {protocol}": protocol for protocol in (0, 2, 4)}
SMALL = {
    "num_hidden_layers": 1,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "conv_dim": [8] * 7,
    "num_conv_pos_embedding_groups": 2,
    "vocab_size": 4,
}


def torch_zip(payload: bytes) -> bytes:
    """What `torch.save` writes, with other pickled bytes in it."""
    content = io.BytesIO()
    torch.save({"a": torch.zeros(2)}, content)
    changed = io.BytesIO()
    with zipfile.ZipFile(content) as old, zipfile.ZipFile(changed, "w") as new:
        for name in old.namelist():
            new.writestr(name, payload if name.endswith("data.pkl") else old.read(name))
    return changed.getvalue()


def forms(world: World) -> dict[str, bytes]:
    """A payload in every form that a file of weights may have."""
    found = {name: pickled(world.touched, protocol=protocol) for name, protocol in PICKLES.items()}
    return found | {"a file of torch.save with a payload": torch_zip(pickled(world.touched, protocol=2))}


@pytest.fixture(scope="module")
def hubert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small HuBERT as `save_pretrained` writes it."""
    place = tmp_path_factory.mktemp("weights") / "hubert"
    transformers.HubertModel(transformers.HubertConfig(**SMALL)).save_pretrained(place)
    transformers.Wav2Vec2FeatureExtractor(do_normalize=False).save_pretrained(place)
    return place


@pytest.fixture
def weights(hubert: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(hubert, tmp_path / "hubert"))


def load(folder: Path) -> object:
    found = find_weights(str(folder), tokenizer="hubert-base", architecture="hubert")
    return load_model("HubertModel", found)


def test_weights_that_are_pickles_are_refused_and_not_unpickled(world: World, tell: Teller, weights: Path) -> None:
    assert load(weights) is not None
    for form, content in forms(world).items():
        (weights / "model.safetensors").write_bytes(content)
        with pytest.raises(UserError, match="no whole safetensors file") as refusal:
            load(weights)
        tell.case(f"{form} as model.safetensors", str(refusal.value).partition("model.safetensors")[2])
    (weights / "model.safetensors").unlink()
    for name in ("pytorch_model.bin", "model.pt", "model.ckpt"):
        (weights / name).write_bytes(forms(world)["a file of torch.save with a payload"])
    with pytest.raises(UserError, match="only pickled weights") as refusal:
        load(weights)
    tell.case("weights as pytorch_model.bin alone", str(refusal.value).partition("hubert holds ")[2])


def test_an_index_of_weights_leads_to_no_file_outside_of_its_folder(world: World, tell: Teller, weights: Path) -> None:
    (weights / "model.safetensors").rename(world.outside / "canary.safetensors")
    (weights / "pytorch_model.bin").write_bytes(forms(world)["a file of torch.save with a payload"])
    names = safetensors.numpy.load_file(world.outside / "canary.safetensors").keys()
    safetensors.numpy.save_file({"x": np.zeros(1, np.float32)}, weights / "model-00001-of-00002.safetensors")
    for target in (
        "../world/outside/canary.safetensors",
        str(world.outside / "canary.safetensors"),
        "pytorch_model.bin",
    ):
        index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, target)}
        (weights / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(UserError, match="no weights file beside it") as refusal:
            load(weights)
        tell.case(f"an index of weights that names ...{target[-25:]}", str(refusal.value).partition("hubert")[2])
    (world.outside / "canary.safetensors").unlink()


def test_a_model_that_brings_code_is_loaded_without_it(world: World, tell: Teller, weights: Path) -> None:
    (weights / "modeling_evil.py").write_text(f"open({str(world.touched)!r}, 'w')\n")
    config = json.loads((weights / "config.json").read_text())
    code = {"AutoConfig": "modeling_evil.Config", "AutoModel": "modeling_evil.Model"}
    (weights / "config.json").write_text(json.dumps({**config, "auto_map": code, "custom_pipelines": {"x": code}}))
    load(weights)
    tell.case("a model with code of its own (auto_map, modeling_evil.py)", "loaded by transformers' own class")


AFAR = {"AutoTokenizer": [None, "evil/evil--evil.Evil"]}
CODE = {"AutoTokenizer": [None, "evil.Evil"], "AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"}


@pytest.mark.parametrize(
    ("form", "file", "fields"),
    [
        ("a class of its own", "tokenizer_config.json", {"tokenizer_class": "Evil", "auto_map": CODE}),
        ("code beside a class of transformers", "tokenizer_config.json", {"auto_map": CODE}),
        ("code that config.json names", "config.json", {"model_type": "evil", "auto_map": CODE}),
        ("code of another repository", "tokenizer_config.json", {"tokenizer_class": "Evil", "auto_map": AFAR}),
    ],
)
@pytest.mark.parametrize("name", ["text-tokens", "text-embedding"])
def test_a_text_tokenizer_that_brings_code_is_loaded_without_it_or_refused(
    world: World, tell: Teller, tmp_path: Path, name: str, form: str, file: str, fields: dict[str, Any]
) -> None:
    folder = weights_text.make_text_encoder(tmp_path / "w")
    config = TokenizerConfig(tokenizer=name, weights=str(folder))
    expected = load_tokenizer(config).tokens_of_text("the dog")
    (folder / "evil.py").write_text(f"open({str(world.touched)!r}, 'w')\n")
    if file == "config.json":  # which is asked where tokenizer_config.json names no class
        own = json.loads((folder / "tokenizer_config.json").read_text())
        del own["tokenizer_class"]
        (folder / "tokenizer_config.json").write_text(json.dumps(own))
    (folder / file).write_text(json.dumps({**json.loads((folder / file).read_text()), **fields}))
    offered = f"a text tokenizer with {form} (auto_map), for {name}"
    try:
        found = load_tokenizer(config).tokens_of_text("the dog")
    except UserError as error:
        refusal = str(error).replace(str(tmp_path), "")
        assert re.search("code of its own|a model of type 'evil'", refusal)
        tell.case(offered, refusal)
        return
    assert found.num_frames
    assert torch.equal(found.codes_KT, expected.codes_KT)
    assert name == "text-tokens" or torch.equal(found.frames_TD, expected.frames_TD)
    tell.case(offered, "loaded by transformers' own class: the words of tokenizer.json")


def test_a_configuration_of_any_shape_is_a_sentence(world: World, tell: Teller, weights: Path) -> None:
    deep = '{"model_type": "hubert", "a": ' + '{"a":' * 100_000
    for text in ("[" * 100_000, deep, "\ud800", "nul\0l", '{"model_type": "hubert", "num_hidden_layers": "x"}'):
        (weights / "config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
        with pytest.raises(UserError) as refusal:
            load(weights)
        tell.case(f"a config.json that begins with {text[:50]!r}", str(refusal.value).partition("hubert/")[2])


def test_a_bundle_of_torchaudio_that_is_a_pickle_is_refused_and_not_unpickled(
    world: World, tell: Teller, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(world.folder / "home"))
    cache = world.folder / "home" / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    config = TokenizerConfig(tokenizer="hubert-base", weights="torchaudio:HUBERT_BASE", local_files_only=True)
    for form, content in {**forms(world), "a list": torch_zip(b"\x80\x02].")}.items():
        (cache / "hubert_fairseq_base_ls960.pth").write_bytes(content)
        with pytest.raises(UserError) as refusal:
            load_features(config)
        tell.case(f"{form} as a bundle of torchaudio", str(refusal.value).rpartition("checkpoints/")[2])


@pytest.mark.slow
def test_a_codebook_that_is_a_pickle_is_refused_and_not_unpickled(
    world: World, tell: Teller, copy_root: Callable[[Path], Path], fitted_root: Path
) -> None:
    root = copy_root(fitted_root)
    (root / "codebooks" / "mfcc-kmeans.safetensors").write_bytes(pickled(world.touched))
    done = run(world, "tokenize", root, "--engine", "inline")
    assert done.status != 0
    assert "mfcc-kmeans" in done.err
    assert "Traceback" not in done.err
    tell.case("a pickle as a dataset's codebook", done.err.strip().rpartition("Error: ")[2])


@pytest.mark.parametrize("size", [2**63 - 1, 2**40, 10**8, 0])
def test_a_codebook_whose_header_claims_to_be_enormous_is_refused(tell: Teller, size: int) -> None:
    with pytest.raises(UserError) as refusal:
        Codebook.from_bytes(struct.pack("<Q", size) + b"{}", name="x")
    tell.case(f"a codebook whose header claims {size:,} bytes", str(refusal.value))


def test_a_codebook_with_anything_as_metadata_is_refused_and_not_unpickled(world: World, tell: Teller) -> None:
    texts = {
        "a pickle": pickled(world.touched, protocol=0).decode("latin-1"),
        "100,000 brackets": "[" * 100_000,
        "a list": "[]",
    }
    for form, text in texts.items():
        content = safetensors.numpy.save({"centroids": np.zeros((1, 4, 3), np.float32)}, metadata={"wavemill": text})
        with pytest.raises(UserError) as refusal:
            Codebook.from_bytes(content, name="x")
        tell.case(f"a codebook with {form} as its metadata", str(refusal.value))


def test_centroids_that_are_pickles_are_refused_and_not_unpickled(world: World, tell: Teller) -> None:
    header = b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }".ljust(117) + b"\n"
    objects = b"\x93NUMPY\x01\0" + struct.pack("<H", len(header)) + header + pickled(world.touched)
    code = b"{'descr': __import__('os').system('touch x'), 'fortran_order': False, 'shape': (1,), }".ljust(117) + b"\n"
    archive = io.BytesIO()
    np.savez(archive, a=np.zeros(2))
    for form, content in {
        **forms(world),
        "an object array": objects,
        "a header that is code": b"\x93NUMPY\x01\0" + struct.pack("<H", len(code)) + code,
        "a header of 4 GiB": b"\x93NUMPY\x02\0" + struct.pack("<I", 2**32 - 1) + b"{",
        "a .npz": archive.getvalue(),
    }.items():
        path = world.folder / "desk" / "centroids.npy"
        path.write_bytes(content)
        with pytest.raises(UserError) as refusal:
            read_centroids(str(path), describe(TokenizerConfig(tokenizer="mfcc-kmeans")))
        tell.case(f"{form} as centroids to import", str(refusal.value).partition("centroids.npy ")[2])


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors", "a.pkl"])
def test_a_separator_that_is_a_pickle_is_refused_and_not_unpickled(world: World, tell: Teller, name: str) -> None:
    for form, content in forms(world).items():
        (world.folder / "desk" / name).write_bytes(content)
        with pytest.raises(UserError, match="never unpickled") as refusal:
            Separator.from_file(world.folder / "desk" / name)
        tell.case(f"{form} as the separator {name}", str(refusal.value).partition(f"{name} ")[2])


# Arrow

EXTENSIONS = [
    "arrow.py_extension_type",
    "ray.data.arrow_tensor",
    "ray.data.arrow_tensor_v2",
    "ray.data.arrow_variable_shaped_tensor",
    "ray.data.arrow_pickled_object",
    "datasets.features.features.Array2DExtensionType",
    "pandas.period",
    "arrow.opaque",
]


@pytest.mark.parametrize("name", EXTENSIONS)
def test_an_extension_type_in_a_shard_of_a_dataset_is_refused_or_plain_and_never_unpickled(
    world: World, tell: Teller, copy_root: Callable[[Path], Path], finished_root: Path, name: str
) -> None:
    """In a process that has imported what registers such types: Ray and Hugging Face's datasets."""
    import datasets  # noqa: F401
    import ray  # noqa: F401

    root = copy_root(finished_root)
    shard = next((root / "corpus").glob("*.parquet"))
    table = pq.read_table(shard)
    metadata = {b"ARROW:extension:name": name.encode(), b"ARROW:extension:metadata": pickled(world.touched)}
    fields = [pa.field(field.name, field.type, metadata=metadata) for field in table.schema]
    content = _parquet(pa.table(table.columns, schema=pa.schema(fields)))
    forged = shard_file_name(0, content)  # the hash in its name is right
    (root / "corpus" / forged).write_bytes(content)
    with pytest.raises(RunFailed) as refusal:
        read_parquet(Root(root), f"corpus/{forged}", schema=CORPUS_SCHEMA)
    tell.case(f"columns of the type {name} in a shard", str(refusal.value).rpartition(forged)[2])


def _parquet(table: pa.Table) -> bytes:
    content = io.BytesIO()
    pq.write_table(table, content)
    return content.getvalue()


# WebDataset


@pytest.mark.slow
def test_webdataset_is_told_to_be_careful_wherever_wavemill_imports_it(world: World, tell: Teller) -> None:
    """Its own defaults run a shell for `pipe:` and unpickle members. We write with it, and read tars by tarfile."""
    code = """
import os, sys
os.environ.pop("WDS_SECURE", None)
import wavemill.pipelines.export
import webdataset, webdataset.utils
assert webdataset.utils.enforce_security
for place in sys.argv[1:]:
    try:
        list(webdataset.WebDataset(place, shardshuffle=False))
    except ValueError as error:
        print(error)
"""
    places = [f"pipe:touch {world.touched}", f"pipe:cat {world.outside / 'canary.tar'}"]
    asked = [sys.executable, "-P", "-c", code, *places]
    done = subprocess.run(asked, capture_output=True, text=True, cwd=world.folder / "desk", env=world.env, timeout=120)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == len(places)
    tell.case("pipe: URLs to webdataset, once wavemill has imported it", done.stdout.splitlines()[0])


@pytest.mark.slow
def test_a_run_on_ray_imports_nothing_from_the_folder_it_is_started_in(
    tell: Teller, tmp_path: Path, fitted_root: Path
) -> None:
    """A dataset that somebody is in may hold a numpy.py, as the world's desk does."""
    with tempfile.TemporaryDirectory(prefix="wm") as short:  # Ray's sockets have long names below it
        world = World.make(Path(short) / "w")
        (world.source / "good.wav").write_bytes(sound())
        shutil.copytree(fitted_root / "codebooks", tmp_path / "root" / "codebooks")
        assert run(world, "corpus", "build", f"x={world.source}", "--to", tmp_path / "root").status == 0
        done = run(world, "tokenize", tmp_path / "root", "--workers", "1")
        world.listener.close()
        assert done.status == 0, done.err
        assert not world.touched.exists()
        tell.figure("peak_bytes", done.peak_bytes)
    tell.case("numpy.py, torch.py and others in the folder that a run on Ray is started in", "not imported")
