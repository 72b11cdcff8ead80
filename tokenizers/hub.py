"""Published weights in Hugging Face layout, from a folder or the hub: the only file that knows transformers.

A folder in that layout holds `config.json`, weights in `*.safetensors` and, of models that have one, the feature
extractor's `preprocessor_config.json`. Pickles are never opened; where a package publishes nothing but a pickled state
dict, it is read as tensors only (package_weights.py, bundles.py).
"""

import hashlib
import json
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from .spec import UserError

_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack")
MODEL_PATTERNS = ("config.json", "preprocessor_config.json", "*.safetensors", "*.safetensors.index.json")
TEXT_PATTERNS = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_COMMIT = re.compile(r"[0-9a-f]{40}")
# of config.json: who wrote it, not what the model is
_NOT_OF_THE_MODEL = {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version"}
_HERE = {"local_files_only": True, "trust_remote_code": False}  # else it asks on the terminal whether to run code
_INSTALL = "Install it: pip install 'wavemill[models]'."


@dataclass(frozen=True, slots=True)
class Weights:
    """A folder of weights that was looked at, but not loaded."""

    name: str  # as the person gave it
    folder: Path
    revision: str  # the commit they are of, or "local"
    sha256: str  # of all weight files, in the order of their names
    config_sha256: str  # of what config.json says of the model
    config: dict[str, Any]  # config.json with the defaults of its model type
    preprocessor: dict[str, Any]  # preprocessor_config.json, or nothing


def find_weights(
    source: str, *, tokenizer: str, architecture: str, revision: str | None = None, local_files_only: bool = False
) -> Weights:
    """Weights of model type `architecture` at `source`, a folder or a hub id, downloaded if need be and allowed.

    Raises `UserError` for folders that are missing or hold no safetensors, another architecture, and a hub that cannot
    be reached.
    """
    folder, revision = find_folder(source, revision=revision, local_files_only=local_files_only)
    given = read_json(folder / "config.json", source)
    found = given.get("model_type")
    if found != architecture:
        raise UserError(
            f"{source} holds a model of type {found!r} (its config.json says so); {tokenizer} takes {architecture!r}. "
            "Name other weights, or the tokenizer that takes these."
        )
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(_no_safetensors(source, folder))
    for file in files:
        require_whole(file, source)
    _require_own(folder, files, source)
    preprocessor = folder / "preprocessor_config.json"
    return Weights(
        name=source,
        folder=folder,
        revision=revision,
        sha256=files_sha256(files),
        config_sha256=config_sha256(given),
        config=_with_defaults(given, source),
        preprocessor=read_json(preprocessor, source) if preprocessor.exists() else {},
    )


def find_folder(
    source: str, *, revision: str | None, local_files_only: bool, patterns: tuple[str, ...] = MODEL_PATTERNS
) -> tuple[Path, str]:
    """The folder at `source`, of a hub id a download of the files that `patterns` name, and its revision.

    Raises `UserError` as `find_weights` does; whether there are weights in it is looked at for the default alone.
    """
    folder = Path(source).expanduser()
    if not folder.is_dir():
        folder = _from_hub(source, revision, local_files_only, patterns)
    elif revision is not None:
        raise UserError(f"{source} is a folder, which has no revisions; leave out revision={revision}.")
    folder = folder.resolve()
    return folder, _revision_of(folder)


def fingerprint_of(weights: Weights) -> dict[str, str]:
    """What decides the codes. The revision is told beside it: the same weights may also lie in a folder."""
    return {"weights": weights.sha256, "config": weights.config_sha256, "revision": weights.revision}


def load_model(model: str, weights: Weights, *, may_lack: tuple[str, ...] = (), **overrides: Any) -> nn.Module:
    """transformers' `model` with these weights, float32, on the CPU, in evaluation mode.

    `overrides` change its configuration: with fewer layers, only those are read. Parameters whose names end in one of
    `may_lack` may be absent. Raises `UserError` for weights that are torn, lack parameters or have other shapes.
    """
    transformers = _transformers()
    kind = getattr(transformers, model)
    try:
        with quiet():
            config = kind.config_class.from_dict({**weights.config, **overrides})
            loaded, report = kind.from_pretrained(
                weights.folder,
                config=config,
                **_HERE,
                use_safetensors=True,
                dtype=torch.float32,
                output_loading_info=True,
            )
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        told = " ".join(str(error).split())[:300].rstrip(".")
        raise UserError(
            f"The weights in {weights.name} cannot be loaded as {model}: {told}. "
            "Fetch them again, or see that config.json belongs to them."
        ) from error
    missing = sorted(name for name in report["missing_keys"] if not name.endswith(may_lack or ("\0",)))
    if missing:
        raise UserError(
            f"The weights in {weights.name} lack {len(missing)} of the parameters of {model} ({missing[0]} for one). "
            "Fetch them again, or see that config.json belongs to them."
        )
    return loaded.eval().requires_grad_(False)


def load_language_model(source: str) -> tuple[Any, Path]:
    """transformers' causal language model at `source`, as `load_model` loads it, and the folder that holds it.

    Its text tokenizer is there, too, if it has one.

    Raises `UserError` as `find_weights` and `load_model` do, and for models of another kind.
    """
    patterns = (*MODEL_PATTERNS, *TEXT_PATTERNS)
    folder, _ = find_folder(source, revision=None, local_files_only=False, patterns=patterns)
    kind = str(read_json(folder / "config.json", source).get("model_type"))
    name = _transformers().models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind)
    if name is None:
        raise UserError(
            f"{source} holds a model of type {kind!r} (its config.json says so), which is no causal language model. "
            "Name one that is, such as one of Llama's kind."
        )
    return load_model(name, find_weights(source, tokenizer=name, architecture=kind)), folder


def load_published(model: str, weights: Weights) -> tuple[Any, Any]:
    """transformers' `model` and its feature extractor as `from_pretrained` gives them, to compare with."""
    transformers = _transformers()
    with quiet():
        loaded = getattr(transformers, model).from_pretrained(weights.folder, **_HERE)
    return loaded.float().eval(), load_extractor(weights)


def load_extractor(weights: Weights) -> Any:
    """transformers' feature extractor, as the folder's preprocessor_config.json has it.

    Raises `UserError` if there is none, or one of code in the folder.
    """
    transformers = _transformers()
    try:
        with quiet():
            return transformers.AutoFeatureExtractor.from_pretrained(weights.folder, **_HERE)
    except (OSError, ValueError) as error:
        raise _not_loaded("feature extractor", weights.name, error) from error


def load_text_tokenizer(folder: Path, source: str) -> Any:
    """transformers' tokenizer of the tokenizer.json in a folder, which the person named as `source`.

    Raises `UserError` for files that are none of a tokenizer, and for one of code in the folder.
    """
    transformers = _transformers()
    try:
        with quiet():
            if (folder / "tokenizer_config.json").exists():
                return transformers.AutoTokenizer.from_pretrained(folder, **_HERE)
            return transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    except Exception as error:  # the Rust below raises no narrower one for a file that it cannot take
        raise _not_loaded("text tokenizer", source, error) from error


def _not_loaded(what: str, source: str, error: Exception) -> UserError:
    told = " ".join(str(error).split())
    if "trust_remote_code" in told:  # it names the option that would let it run the folder's code
        return UserError(
            f"The {what} in {source} is made by code of its own (auto_map names it), which wavemill never runs. "
            "Name one that transformers has."
        )
    return UserError(f"The {what} in {source} cannot be loaded: {told[:300].rstrip('.')}. Fetch it again.")


def build_model(model: str, config: dict[str, Any], state: dict[str, torch.Tensor]) -> nn.Module:
    """transformers' `model` from parameters at hand, float32, for evaluation. Raises `RuntimeError` if any lacks."""
    kind = getattr(_transformers(), model)
    with quiet():
        built = kind(kind.config_class.from_dict(config))
    built.load_state_dict(state, strict=True)
    return built.float().eval().requires_grad_(False)


def remove_weight_norm(model: nn.Module) -> nn.Module:
    """Multiply out weight normalization (Salimans and Kingma 2016), which only training needs."""
    for module in model.modules():
        if torch.nn.utils.parametrize.is_parametrized(module, "weight"):
            torch.nn.utils.parametrize.remove_parametrizations(module, "weight")
    return model


def _with_defaults(given: dict[str, Any], source: str) -> dict[str, Any]:
    """A configuration with what its file leaves to the class."""
    transformers = _transformers()
    from huggingface_hub.errors import StrictDataclassError

    try:
        with quiet():
            return transformers.AutoConfig.for_model(**given).to_dict()
    except (ValueError, TypeError, StrictDataclassError) as error:
        told = " ".join(str(error).split())
        raise UserError(f"{source}/config.json is no configuration that transformers takes: {told}") from error


def config_sha256(given: dict[str, Any]) -> str:
    told = {key: value for key, value in given.items() if key not in _NOT_OF_THE_MODEL}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def require_whole(file: Path, source: str) -> None:
    """Raise `UserError` for a file that is torn: its header says how long it must be."""
    try:
        with safe_open(file, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise UserError(f"{source}/{file.name} is no whole safetensors file ({error}). Fetch it again.") from error


def _require_own(folder: Path, files: list[Path], source: str) -> None:
    """Raise `UserError` for an index of parts that names other files than the weights that lie in the folder."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return
    parts = read_json(index, source).get("weight_map")
    named = set(map(str, parts.values())) if isinstance(parts, dict) else {"nothing"}
    stray = sorted(named - {file.name for file in files})
    if stray:
        raise UserError(
            f"{source}/{index.name} names {stray[0]!r}, which is no weights file beside it. Fetch it again."
        )


def read_json(path: Path, source: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
        if not isinstance(content, dict):
            raise ValueError("it is no object")
    except FileNotFoundError as error:
        raise UserError(
            f"{source} holds no {path.name}: expected a folder in Hugging Face layout, as `save_pretrained` writes it."
        ) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source}/{path.name} cannot be read as JSON ({error}). Fetch it again.") from error
    return content


def _no_safetensors(source: str, folder: Path, there: tuple[str, ...] = ()) -> str:
    names = there or tuple(sorted(path.name for path in folder.iterdir()))
    pickled = [name for name in names if name.endswith(_PICKLED)]
    if not pickled:
        return f"{source} holds no weights: expected model.safetensors beside config.json."
    return (
        f"{source} holds only pickled weights ({pickled[0]}), which can run code when they are opened: expected "
        "model.safetensors. Name a revision that has it (on the hub often a pull request: revision=refs/pr/N), or "
        'convert them where you trust them: python -c "from transformers import AutoModel as M; '
        f"M.from_pretrained('{source}').save_pretrained('FOLDER')\""
    )


def _from_hub(source: str, revision: str | None, local_files_only: bool, patterns: tuple[str, ...]) -> Path:
    """The folder of a snapshot, downloaded unless it is in the cache or must not be."""
    if source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise UserError(f"There is no folder {source}; give one in Hugging Face layout, or a hub id such as org/model.")
    try:
        import huggingface_hub as hub
        from huggingface_hub import errors
    except ModuleNotFoundError as error:
        raise UserError(f"Weights from the hub need the package huggingface_hub. {_INSTALL}") from error
    try:
        with quiet(bars=sys.stderr.isatty()):  # gigabytes may come: that is worth a bar
            folder = Path(
                hub.snapshot_download(
                    source, revision=revision, local_files_only=local_files_only, allow_patterns=list(patterns)
                )
            )
            if patterns == MODEL_PATTERNS and not any(folder.glob("*.safetensors")) and not local_files_only:
                there = tuple(hub.list_repo_files(source, revision=revision))
                raise UserError(_no_safetensors(source, folder, there))
    except errors.GatedRepoError as error:
        raise UserError(
            f"{source} is gated on the hub: accept its terms there, then log in with `hf auth login`."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"{source} has no revision {revision!r} on the hub.") from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"There is neither a folder {source} here nor a model of that name on the hub (or it is private: log in "
            "with `hf auth login`)."
        ) from error
    except errors.HFValidationError as error:
        raise UserError(f"There is no folder {source}, and it is no hub id either: expected org/model.") from error
    except (errors.LocalEntryNotFoundError, errors.HfHubHTTPError, OSError) as error:
        why = "the network must not be asked" if _offline(local_files_only) else "the hub cannot be reached"
        raise UserError(
            f"The weights {source}{f' at revision {revision}' if revision else ''} are not on this machine, and {why}. "
            f"Fetch them where there is a network (`hf download {source}`), or name a folder that holds them."
        ) from error
    return folder


def _offline(local_files_only: bool) -> bool:
    from huggingface_hub import is_offline_mode

    return local_files_only or is_offline_mode()


def _revision_of(folder: Path) -> str:
    """The commit that a folder is of, where the hub's tools have noted it; else "local"."""
    if folder.parent.name == "snapshots" and _COMMIT.fullmatch(folder.name):
        return folder.name
    noted = folder / ".cache" / "huggingface" / "download" / "config.json.metadata"  # `hf download --local-dir`
    if noted.exists():
        first = noted.read_text(errors="replace").partition("\n")[0].strip()
        if _COMMIT.fullmatch(first):
            return first
    return "local"


def files_sha256(files: Iterable[Path]) -> str:
    """Hash of files' bytes, read once in a process."""
    return _sha256(tuple((file, file.stat().st_size, file.stat().st_mtime_ns) for file in files))


@cache
def _sha256(files: tuple[tuple[Path, int, int], ...]) -> str:
    """Hash of files' bytes; their sizes and times only say when to read them again."""
    digest = hashlib.sha256()
    for path, _, _ in files:
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _transformers() -> Any:
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise UserError(f"Published tokenizers need the package transformers. {_INSTALL}") from error
    return transformers


@contextmanager
def quiet(*, bars: bool = False) -> Iterator[None]:
    """transformers and the hub tell of every unused tensor and draw bars of their own: not while this is entered.

    With `bars`, those of the hub stay.
    """
    import huggingface_hub.utils as hub
    import transformers.utils.logging as transformers

    level, hub_level = transformers.get_verbosity(), hub.logging.get_verbosity()
    drawn, hub_drawn = transformers.is_progress_bar_enabled(), not hub.are_progress_bars_disabled()
    transformers.set_verbosity_error()
    hub.logging.set_verbosity_error()
    transformers.disable_progress_bar()
    if bars:
        hub.enable_progress_bars()
    else:
        hub.disable_progress_bars()
    try:
        yield
    finally:
        transformers.set_verbosity(level)
        hub.logging.set_verbosity(hub_level)
        if drawn:
            transformers.enable_progress_bar()
        if hub_drawn:
            hub.enable_progress_bars()
