"""Transcripts as tokens and as vectors: what transformers gives for each text alone."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import weights_text
from torch import Tensor
from wavemill.tokenizers.registry import describe, load_tokenizer
from wavemill.tokenizers.spec import FrameRule, UserError
from wavemill.tokenizers.tokenizer import TextTokenizer, TokenizerConfig

import tokenizers

MadeOnce = Callable[[str, Callable[[Path], None]], Path]
TEXTS = ("the quick brown fox", "", "Ünïcödé 日本 \N{GRINNING FACE}", "the dog " * 40, " two  spaces ")


@pytest.fixture(scope="module")
def folder(made_once: MadeOnce) -> Path:
    return made_once("text-tokenizer", lambda path: weights_text.make_text_tokenizer(path) and None)


@pytest.fixture(scope="module", params=["t5", "bert"])
def encoder(request: pytest.FixtureRequest, made_once: MadeOnce) -> Path:
    kind: str = request.param
    return made_once(f"text-{kind}", lambda path: weights_text.make_text_encoder(path, kind=kind) and None)


def open_tokens(folder: Path) -> Any:
    return load_tokenizer(TokenizerConfig(tokenizer="text-tokens", weights=str(folder)))


def test_ids_are_those_of_transformers_without_special_ones(folder: Path) -> None:
    tokenizer = open_tokens(folder)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert isinstance(tokenizer, TextTokenizer)
    for text in TEXTS:
        tokens = tokenizer.tokens_of_text(text)
        assert tokens.codes_KT.tolist() == [theirs(text, add_special_tokens=False).input_ids]
        assert tokens.text == text
        assert theirs.decode(tokens.codes_KT[0]) == text
    assert theirs(TEXTS[0]).input_ids[1:-1] == tokenizer.tokens_of_text(TEXTS[0]).codes_KT[0].tolist()


def test_what_looks_like_a_special_token_in_a_transcript_is_none(folder: Path) -> None:
    theirs, text = transformers.AutoTokenizer.from_pretrained(folder), "the </s> dog<pad>"
    assert set(theirs(text, add_special_tokens=False).input_ids) & set(theirs.all_special_ids)
    ids = open_tokens(folder).tokens_of_text(text).codes_KT[0]
    assert not set(ids.tolist()) & set(theirs.all_special_ids)
    assert theirs.decode(ids) == text


def test_special_tokens_among_the_words_of_a_model_are_letters_too(tmp_path: Path) -> None:
    """T5's Unigram has its special tokens among its words, where no splitting takes them out."""
    pieces = [("<unk>", 0.0), ("</s>", 0.0), *((letter, -3.0) for letter in "\N{LOWER ONE EIGHTH BLOCK}ab</s>"[:6])]
    words = tokenizers.Tokenizer(tokenizers.models.Unigram([*pieces, (">", -3.0)], unk_id=0))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    words.decoder = tokenizers.decoders.Metaspace()
    words.add_special_tokens(["<unk>", "</s>"])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="</s>")
    fast.save_pretrained(tmp_path)
    tokenizer = open_tokens(tmp_path)
    ids = tokenizer.tokens_of_text("a </s> b").codes_KT[0].tolist()
    assert fast.convert_ids_to_tokens(ids)[3:-2] == ["<", "/", "s", ">"]
    assert fast.decode(ids) == "a </s> b"
    assert 0 in tokenizer.tokens_of_text("a c").codes_KT[0].tolist()  # a letter that it does not know


def test_a_tokenizer_json_alone_is_enough(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    alone, whole = open_tokens(tmp_path), open_tokens(folder)
    bare = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in TEXTS:
        ids = alone.tokens_of_text(text).codes_KT.tolist()
        assert ids == whole.tokens_of_text(text).codes_KT.tolist()
        assert ids == [bare.encode(text, add_special_tokens=False).ids]


def test_what_has_no_transcript_has_no_tokens(folder: Path) -> None:
    tokens = open_tokens(folder).tokens_of_text(None)
    assert tuple(tokens.codes_KT.shape) == (1, 0)
    assert tokens.text is None


def test_the_codebook_is_the_whole_vocabulary_and_the_fingerprint_its_files(folder: Path, tmp_path: Path) -> None:
    described = describe(TokenizerConfig(tokenizer="text-tokens", weights=str(folder)))
    assert described.spec.codebook_size == len(transformers.AutoTokenizer.from_pretrained(folder))
    assert described.spec.frame_rule is FrameRule.FREE
    weights_text.make_text_tokenizer(tmp_path / "same")
    weights_text.make_text_tokenizer(tmp_path / "other", size=10)
    same, other = (
        describe(TokenizerConfig(tokenizer="text-tokens", weights=str(tmp_path / name))) for name in ("same", "other")
    )
    assert same.fingerprint == described.fingerprint
    assert other.fingerprint != described.fingerprint


def test_a_vector_is_the_mean_of_the_encoders_last_states(encoder: Path) -> None:
    tokenizer = load_tokenizer(TokenizerConfig(tokenizer="text-embedding", weights=str(encoder)))
    assert (tokenizer.spec.dim, tokenizer.spec.frame_rule) == (24, FrameRule.ONE)
    for text in TEXTS:
        found = tokenizer.tokens_of_text(text).frames_TD
        assert found.dtype == torch.float16
        assert tuple(found.shape) == (1, 24)
        assert torch.equal(found[0], _mean(encoder, text).half())
    first, second = (tokenizer.tokens_of_text(text).frames_TD for text in TEXTS[:2])
    assert not torch.equal(first, second)


def test_a_transcript_that_spells_a_special_token_has_the_vector_of_its_letters(encoder: Path) -> None:
    tokenizer = load_tokenizer(TokenizerConfig(tokenizer="text-embedding", weights=str(encoder)))
    words, text = transformers.AutoTokenizer.from_pretrained(encoder), "the </s> dog<pad>"
    assert len(set(words(text).input_ids) & set(words.all_special_ids)) > len(words("").input_ids)
    ids = [*words("").input_ids[:1], *words(text, add_special_tokens=False, split_special_tokens=True).input_ids, 1]
    assert not set(ids[1:-1]) & set(words.all_special_ids)
    found = tokenizer.tokens_of_text(text).frames_TD
    assert torch.equal(found[0], _mean_of_ids(encoder, torch.tensor([ids])).half())
    assert not torch.equal(found[0], _mean(encoder, text).half())


def test_what_has_no_transcript_has_a_vector_of_zeros_and_no_text(encoder: Path) -> None:
    tokens = load_tokenizer(TokenizerConfig(tokenizer="text-embedding", weights=str(encoder))).tokens_of_text(None)
    assert tokens.frames_TD is not None
    assert tuple(tokens.frames_TD.shape) == (1, 24)
    assert not tokens.frames_TD.any()
    assert tokens.text is None


def test_folders_that_hold_no_tokenizer_are_refused(folder: Path, tmp_path: Path) -> None:
    def refusal(name: str = "text-tokens", **options: Any) -> str:
        with pytest.raises(UserError) as refused:
            describe(TokenizerConfig(tokenizer=name, weights=str(tmp_path), **options))
        return str(refused.value)

    assert "holds no tokenizer.json" in refusal()
    (tmp_path / "tokenizer.json").write_text("no json")
    assert "tokenizer.json cannot be read as JSON" in refusal()
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"type": "Riddle"}}))
    assert "cannot be loaded" in refusal()
    assert "has no codebooks to choose from" in refusal(num_codebooks=1)
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    assert "a model of type 'gpt2'" in refusal("text-embedding")


def test_a_tokenizer_of_code_in_its_folder_is_refused_and_nobody_asked(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run code"))
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    (tmp_path / "odd.py").write_text("raise SystemExit('it ran')")
    own = {"tokenizer_class": "OddTokenizer", "auto_map": {"AutoTokenizer": [None, "odd.OddTokenizer"]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(own))
    with pytest.raises(UserError, match=r"code of its own .* which wavemill never runs"):
        open_tokens(tmp_path)


def test_an_encoder_that_does_not_say_how_wide_it_is_is_refused(encoder: Path, tmp_path: Path) -> None:
    shutil.copytree(encoder, tmp_path / "w")
    config = json.loads((tmp_path / "w" / "config.json").read_text())
    changed = {name: 0 for name in ("d_model", "hidden_size") if name in config}
    (tmp_path / "w" / "config.json").write_text(json.dumps({**config, **changed}))
    with pytest.raises(UserError, match="does not say how many numbers a vector has"):
        describe(TokenizerConfig(tokenizer="text-embedding", weights=str(tmp_path / "w")))


def _mean(folder: Path, text: str) -> Tensor:
    words = transformers.AutoTokenizer.from_pretrained(folder)
    places = json.loads((folder / "config.json").read_text()).get("max_position_embeddings", 40)
    return _mean_of_ids(folder, words(text, return_tensors="pt", truncation=True, max_length=places).input_ids)


def _mean_of_ids(folder: Path, ids_1T: Tensor) -> Tensor:
    model = transformers.AutoModel.from_pretrained(folder).eval()
    model = getattr(model, "encoder", model) if model.config.model_type == "t5" else model
    with torch.inference_mode():
        return model(ids_1T).last_hidden_state[0].double().mean(dim=0).float()
