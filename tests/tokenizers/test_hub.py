"""Weights come from folders and from the hub, are known by their hashes, and are never pickles."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import transformers
from wavemill.tokenizers.hub import find_weights, fingerprint_of, load_extractor, load_model, remove_weight_norm
from wavemill.tokenizers.spec import UserError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SMALL = {
    "num_hidden_layers": 2,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "conv_dim": [8] * 7,
    "num_conv_pos_embedding_groups": 2,
    "vocab_size": 4,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small HuBERT as `save_pretrained` writes it."""
    place = tmp_path_factory.mktemp("hub") / "hubert"
    torch.manual_seed(0)
    transformers.HubertModel(transformers.HubertConfig(**SMALL)).save_pretrained(place)
    transformers.Wav2Vec2FeatureExtractor(do_normalize=False).save_pretrained(place)
    return place


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "weights"))


@pytest.fixture
def served(folder: Path) -> Iterator[str]:
    """The address of a hub on loopback that has one model, lab/hubert."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _hub_of(folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def find(source: Path | str, **options: object):
    return find_weights(str(source), tokenizer="hubert-base", architecture="hubert", **options)


def refused(source: Path | str, **options: object) -> str:
    with pytest.raises(UserError) as caught:
        find(source, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_folder_of_weights_is_known_by_the_hash_of_its_bytes(folder: Path, copied: Path):
    weights = find(folder)
    assert weights.sha256 == find(copied).sha256
    assert weights.revision == "local"
    assert weights.preprocessor["do_normalize"] is False
    content = bytearray((copied / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (copied / "model.safetensors").write_bytes(content)
    assert find(copied).sha256 != weights.sha256


def test_what_a_configuration_says_of_the_model_is_part_of_the_fingerprint(folder: Path, copied: Path):
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**config, "transformers_version": "4.0.0", "dtype": "float16"}))
    assert fingerprint_of(find(copied)) == fingerprint_of(find(folder))
    (copied / "config.json").write_text(json.dumps({**config, "layer_norm_eps": 1e-3}))
    changed, before = fingerprint_of(find(copied)), fingerprint_of(find(folder))
    assert {part for part in before if changed[part] != before[part]} == {"config"}


def test_only_the_layers_that_are_asked_for_are_loaded(folder: Path):
    whole = load_model("HubertModel", find(folder))
    cut = load_model("HubertModel", find(folder), num_hidden_layers=1)
    assert [len(model.encoder.layers) for model in (whole, cut)] == [2, 1]
    ours, theirs = cut.state_dict(), whole.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert not any(parameter.requires_grad for parameter in cut.parameters())


def test_multiplied_out_weight_norm_is_the_same_convolution(folder: Path):
    model = load_model("HubertModel", find(folder))
    states_BTD = torch.randn(1, 50, 16)
    before = model.encoder.pos_conv_embed(states_BTD)
    assert torch.equal(remove_weight_norm(model).encoder.pos_conv_embed(states_BTD), before)
    assert not any("parametrizations" in name for name in model.state_dict())


def test_weights_of_another_architecture_are_refused(copied: Path):
    transformers.EncodecConfig().save_pretrained(copied)
    assert "'encodec'" in refused(copied)


def test_a_folder_without_weights_or_with_pickled_ones_only_is_refused(copied: Path):
    (copied / "model.safetensors").unlink()
    assert "no weights" in refused(copied)
    (copied / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    told = refused(copied)
    assert "pickled" in told
    assert "save_pretrained('FOLDER')" in told


@pytest.mark.parametrize("content", [None, "{", "[]", '{"model_type": "hubert", "conv_dim": 7}'])
def test_a_configuration_that_is_none_is_refused(copied: Path, content: str | None):
    (copied / "config.json").unlink()
    if content is not None:
        (copied / "config.json").write_text(content)
    assert "config.json" in refused(copied)


def test_weights_that_are_torn_lack_parameters_or_have_other_shapes_are_refused(copied: Path):
    file = copied / "model.safetensors"
    whole = file.read_bytes()

    def told(**overrides: object) -> str:
        with pytest.raises(UserError) as caught:
            load_model("HubertModel", find(copied), **overrides)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "lack" in told(num_hidden_layers=3)
    assert "cannot be loaded" in told(intermediate_size=32)
    file.write_bytes(whole[: len(whole) // 2])
    assert "no whole safetensors file" in told()


def test_an_extractor_of_code_in_the_folder_or_none_is_refused_and_nobody_asked(
    copied: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run code"))
    (copied / "odd.py").write_text("raise SystemExit('it ran')")
    own = {"feature_extractor_type": "OddExtractor", "auto_map": {"AutoFeatureExtractor": "odd.OddExtractor"}}
    (copied / "preprocessor_config.json").write_text(json.dumps(own))
    with pytest.raises(UserError, match=r"code of its own .* which wavemill never runs"):
        load_extractor(find(copied))
    (copied / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match=r"feature extractor in .* cannot be loaded"):
        load_extractor(find(copied))


def test_folders_that_are_not_there_and_revisions_of_folders_are_refused(folder: Path, tmp_path: Path):
    assert "There is no folder" in refused(tmp_path / "nothing")
    assert "neither" not in refused("just-a-name")
    assert "no revisions" in refused(folder, revision="main")


def test_a_folder_that_the_hubs_tools_wrote_knows_its_commit(folder: Path, copied: Path, tmp_path: Path):
    noted = copied / ".cache" / "huggingface" / "download"
    noted.mkdir(parents=True)
    (noted / "config.json.metadata").write_text(f"{COMMIT}\nabc\n1.0\n")
    assert find(copied).revision == COMMIT
    snapshot = tmp_path / "snapshots" / COMMIT
    shutil.copytree(folder, snapshot)
    assert find(snapshot).revision == COMMIT


@pytest.mark.slow
def test_weights_come_from_the_hub_once_and_then_from_its_cache(served: str, folder: Path, tmp_path: Path):
    expected = [COMMIT, find(folder).sha256]
    by_branch, by_commit = ("lab/hubert", {}), ("lab/hubert", {"revision": COMMIT})
    assert _find_in_process(served, tmp_path, by_branch, by_commit) == [expected] * 2
    offline = ("lab/hubert", {"local_files_only": True})
    missing = ("lab/new", {})
    cached, told = _find_in_process("http://127.0.0.1:9", tmp_path, offline, missing)
    assert cached == expected
    assert "cannot be reached" in told[0]


@pytest.mark.slow
def test_what_the_hub_does_not_have_or_cannot_give_is_one_sentence(served: str, tmp_path: Path):
    told = _find_in_process(
        served,
        tmp_path,
        ("lab/hubert", {"revision": "v9"}),
        ("lab/other", {}),
        ("lab/pickled", {}),
        ("lab/new", {"local_files_only": True}),
    )
    words = [
        "has no revision 'v9'",
        "neither a folder",
        "only pickled weights (pytorch_model.bin)",
        "must not be asked",
    ]
    for [sentence], word in zip(told, words, strict=True):
        assert word in sentence


def _find_in_process(endpoint: str, home: Path, *asked: tuple[str, dict[str, object]]) -> list[list[str]]:
    """Revision and hash, or the sentence of refusal, of each, in a process with a hub and a cache of its own."""
    code = (
        "import json, sys\n"
        "from wavemill.tokenizers.hub import find_weights\n"
        "from wavemill.tokenizers.spec import UserError\n"
        "told = []\n"
        "for source, options in json.loads(sys.argv[1]):\n"
        "    try:\n"
        "        found = find_weights(source, tokenizer='hubert-base', architecture='hubert', **options)\n"
        "        told.append([found.revision, found.sha256])\n"
        "    except UserError as error:\n"
        "        told.append([str(error)])\n"
        "print(json.dumps(told))\n"
    )
    kept = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    env = {**kept, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_ETAG_TIMEOUT": "2"}
    command = [sys.executable, "-c", code, json.dumps(asked)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return json.loads(done.stdout)


def _hub_of(folder: Path) -> type[BaseHTTPRequestHandler]:
    """As much of the hub's interface as a download takes."""
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    pickled = {"config.json": files["config.json"], "pytorch_model.bin": b"\x80\x02."}
    models = {"lab/hubert": files, "lab/pickled": pickled}

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.partition("?")[0].strip("/").split("/")
            if path[:2] == ["api", "models"]:
                model, revision = "/".join(path[2:4]), path[5] if len(path) > 5 else "main"
                self._tell(model, revision, tree="tree" in path)
            else:
                model, name = "/".join(path[:2]), path[-1]
                content = models.get(model, {}).get(name)
                if content is None:
                    self._answer(404, b"", {"X-Error-Code": "EntryNotFound"})
                else:
                    etag = hashlib.sha256(content).hexdigest()
                    self._answer(200, content, {"X-Repo-Commit": COMMIT, "ETag": f'"{etag}"'})

        do_HEAD = do_GET

        def _tell(self, model: str, revision: str, *, tree: bool) -> None:
            if model not in models:
                self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            elif revision not in ("main", COMMIT):
                self._answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            elif tree:
                listed = [
                    {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                    for name, content in models[model].items()
                ]
                self._answer(200, json.dumps(listed).encode(), {"Content-Type": "application/json"})
            else:
                siblings = [{"rfilename": name} for name in models[model]]
                told = {"id": model, "sha": COMMIT, "siblings": siblings, "private": False, "tags": [], "downloads": 0}
                self._answer(200, json.dumps(told).encode(), {"Content-Type": "application/json"})

        def _answer(self, status: int, content: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    return Hub
