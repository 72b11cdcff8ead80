"""A text language model that learns audio tokens: what it knew of text stays, and packed segments stay apart.

Axes: L steps, V tokens.
"""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
import transformers
from objectives_made import SPECS, draws, make_root, objective, packed, rows
from wavemill.jobs.lm.settings import TrainSettings
from wavemill.jobs.lm.train import Means
from wavemill.jobs.lm.unified_lm import TextModelNext
from wavemill.jobs.train_lm import load_run, train_lm
from wavemill.pipelines.layouts.flat import semantic
from wavemill.pipelines.layouts.interleaved import interleaved
from wavemill.pipelines.layouts.transcript import transcript
from wavemill.pipelines.layouts.unified import unified
from wavemill.storage.codes import open_stream
from wavemill.storage.root import Root
from wavemill.tokenizers.hub import files_sha256
from wavemill.tokenizers.spec import UserError

NUM_TEXT = SPECS["text"].codebook_size
ASR = unified(tasks=("asr",), text="text", audio="semantic", language="English")
SIZES: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 2}


def save_model(
    folder: Path, *, vocabulary: int = NUM_TEXT + 4, tied: bool = False, kind: str = "llama", width: int = 16
) -> Path:
    torch.manual_seed(0)
    sizes = SIZES | {"hidden_size": width, "intermediate_size": 2 * width}
    if kind == "llama":
        config: Any = transformers.LlamaConfig(
            vocab_size=vocabulary, tie_word_embeddings=tied, max_position_embeddings=512, **sizes
        )
        model: Any = transformers.LlamaForCausalLM(config)
    elif kind == "gpt2":
        model = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=vocabulary, n_embd=16, n_layer=2, n_head=2, n_positions=64)
        )
    elif kind == "bloom":
        model = transformers.BloomForCausalLM(
            transformers.BloomConfig(vocab_size=vocabulary, hidden_size=16, n_layer=1, n_head=2)
        )
    elif kind == "gemma2":  # caps its logits behind the head
        model = transformers.Gemma2ForCausalLM(
            transformers.Gemma2Config(
                vocab_size=vocabulary, head_dim=8, num_key_value_heads=2, final_logit_softcapping=0.01, **sizes
            )
        )
    else:
        model = transformers.T5EncoderModel(
            transformers.T5Config(vocab_size=vocabulary, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
        )
    model.save_pretrained(folder)
    return folder


def made(folder: Path, layout: Any = ASR) -> TextModelNext:
    found = objective(layout, "unified", model=str(folder))
    assert isinstance(found, TextModelNext)
    return found


def text_only(rng: np.random.Generator, length: int = 9) -> torch.Tensor:
    return torch.from_numpy(rng.integers(0, NUM_TEXT, (1, length)))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@torch.no_grad()
def test_text_alone_has_the_logits_that_it_had_among_text(kind: str, tied: bool, tmp_path: Path):
    found = made(save_model(tmp_path / "model", kind=kind, tied=tied))
    before = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    tokens_BL = text_only(np.random.default_rng(0))
    ids_BL, positions_BL = torch.ones_like(tokens_BL), torch.arange(tokens_BL.shape[1])[None]
    logits_BLV = found.model.logits(found.model(tokens_BL, ids_BL, positions_BL))
    assert logits_BLV.shape[-1] == found.vocabulary.column_sizes[0] > NUM_TEXT
    expected_BLV = before(tokens_BL).logits
    assert torch.allclose(logits_BLV[..., :NUM_TEXT], expected_BLV[..., :NUM_TEXT], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_packed_segments_give_what_each_gives_alone(tmp_path: Path):
    found = made(save_model(tmp_path / "model"))
    for parameter in found.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    segments = rows(np.random.default_rng(0), {"text": [3, 2], "semantic": [4, 6]})
    batch = packed(ASR, segments)
    hidden_LD = found.model(batch.tokens, batch.segment_ids, batch.positions)[0]
    assert torch.isfinite(hidden_LD).all()
    for segment in (1, 2):
        inside_L = batch.segment_ids[0] == segment
        tokens_1L = batch.tokens[:, inside_L[: batch.tokens.shape[1]]]
        alone = found.model(tokens_1L, torch.ones_like(tokens_1L), torch.arange(tokens_1L.shape[1])[None])
        assert torch.allclose(hidden_LD[inside_L], alone[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("layout", [interleaved("words", "semantic"), transcript("words", "semantic"), ASR])
def test_only_ids_of_words_have_rows_of_the_text_model(layout: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Not those of times, of which a stream such as `word-tokens` has 1,502."""
    timed = dataclasses.replace(SPECS["text"], tokenizer="word-tokens", codebook_size=NUM_TEXT + 1_502, hop_length=320)
    monkeypatch.setitem(SPECS, "words", timed)
    found = made(save_model(tmp_path / "model", vocabulary=NUM_TEXT), layout)
    before = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").get_input_embeddings().weight
    weight_VD = found.model.language_model.get_input_embeddings().weight
    assert torch.equal(weight_VD[:NUM_TEXT], before)
    assert weight_VD.shape[0] == found.vocabulary.column_sizes[0]


@pytest.mark.parametrize("tied", [True, False])
def test_new_rows_are_like_the_old_ones_and_unlike_each_other(tied: bool, tmp_path: Path):
    wide = unified(tasks=("asr",), text="text", audio="acoustic", codebooks=3)
    save_model(tmp_path / "model", tied=tied)
    before = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        before.get_input_embeddings().weight += 0.5  # a mean that is none of chance
        before.get_input_embeddings().weight[:, 0] *= 30
    before.save_pretrained(tmp_path / "model")
    found = made(tmp_path / "model", wide)
    embedding, head = (getattr(found.model.language_model, f"get_{end}_embeddings")() for end in ("input", "output"))
    assert (head.weight is embedding.weight) == tied
    for module, old in ((embedding, before.get_input_embeddings()), (head, before.get_output_embeddings())):
        rows_VD, old_VD = module.weight.detach(), old.weight.detach()[:NUM_TEXT]
        assert torch.equal(rows_VD[:NUM_TEXT], old_VD)
        new_ND = rows_VD[NUM_TEXT:]
        assert len(new_ND) == 30 + 3
        away_D = (new_ND.mean(dim=0) - old_VD.mean(dim=0)) / old_VD.std(dim=0)
        assert away_D.abs().max() < 1
        assert ((new_ND.std(dim=0) / old_VD.std(dim=0)).log().abs() < 0.7).all()
        assert len(torch.unique(new_ND, dim=0)) == len(new_ND)


def test_the_source_is_given_and_the_target_asked_for(tmp_path: Path):
    found = made(save_model(tmp_path / "model"))
    batch = packed(ASR, rows(np.random.default_rng(0), {"text": [3, 2], "semantic": [4, 6]}))
    loss = found.loss(batch, draws())
    assert {name: num for name, (_, num) in loss.parts.items()} == {"text.0": 5, "special": 2}
    loss.total.backward()
    assert all(parameter.grad is not None for parameter in found.parameters())
    baseline = found.baseline([batch], [batch], draws())
    assert baseline.num_targets == loss.num_targets == 7


@pytest.mark.parametrize(
    ("layout", "options", "told"),
    [
        (ASR, {}, "name its folder, as in --objective unified,model=FOLDER"),
        (semantic("semantic"), {"model": "x"}, "whose text ids come first"),
        (unified(tasks=("s2st",), audio="semantic", spoken_translation="other"), {"model": "x"}, "text ids come first"),
        (ASR, {"model": "x", "depth": "3"}, "has no option 'depth'"),
    ],
)
def test_layouts_and_options_that_do_not_fit_are_told(
    layout: Any, options: dict[str, str], told: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(SPECS, "other", SPECS["semantic"])
    with pytest.raises(UserError, match=told):
        objective(layout, "unified", **options)


@pytest.mark.parametrize(
    ("kind", "vocabulary", "told"),
    [
        ("llama", NUM_TEXT - 1, "has 12 ids, and the model in .* has 11"),
        ("bloom", NUM_TEXT, "does not take position_ids"),
        ("gemma2", NUM_TEXT, "changes logits behind its head"),
        ("t5", NUM_TEXT, "no causal language model"),
    ],
)
def test_models_that_cannot_learn_from_packed_sequences_are_told(kind: str, vocabulary: int, told: str, tmp_path: Path):
    with pytest.raises(UserError, match=told):
        made(save_model(tmp_path / "model", kind=kind, vocabulary=vocabulary))


def test_a_run_trains_the_model_of_the_texts_own_tokenizer_and_refuses_another(tmp_path: Path):
    model = save_model(tmp_path / "model", tied=True)
    (model / "tokenizer.json").write_text("{}")
    make_root(Root(tmp_path / "root"), words=files_sha256([model / "tokenizer.json"]))
    settings = TrainSettings(
        root=str(tmp_path / "root"),
        layout="unified:tasks=tts,text=text,audio=semantic",
        objective="unified",
        options={"model": str(model)},
        steps=3,
        batch_size=2,
        length=64,
        save_every=1,
    )
    report = train_lm(settings, str(tmp_path / "run"), Means())
    assert (report["objective"], report["steps"]) == ("unified", 3)
    before = transformers.AutoModelForCausalLM.from_pretrained(model).get_input_embeddings().weight
    _, found = load_run(str(tmp_path / "run"), step=3)
    assert isinstance(found, TextModelNext)
    assert not torch.allclose(found.model.language_model.get_input_embeddings().weight[:NUM_TEXT], before[:NUM_TEXT])
    (model / "tokenizer.json").write_text("{ }")
    with pytest.raises(UserError, match="are of another text tokenizer than the one in"):
        train_lm(settings, str(tmp_path / "other"), Means())
    (model / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="holds no text tokenizer"):
        train_lm(settings, str(tmp_path / "other"), Means())
    assert not (tmp_path / "other").exists()


def test_a_model_of_the_hub_comes_with_its_text_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Of the hub only the files that are asked for are there."""
    model = save_model(tmp_path / "model")
    (model / "tokenizer.json").write_text("{}")

    def snapshot_download(repo_id: str, *, allow_patterns: list[str], **_: Any) -> str:
        folder = tmp_path / "hub" / repo_id
        folder.mkdir(parents=True, exist_ok=True)
        for file in model.iterdir():
            if any(file.match(pattern) for pattern in allow_patterns):
                shutil.copy(file, folder)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    found = objective(ASR, "unified", model="org/model")
    assert isinstance(found, TextModelNext)
    versions: dict[str, int] = {}
    for words, matches in ((files_sha256([model / "tokenizer.json"]), True), ("others", False)):
        root = Root(tmp_path / words)
        make_root(root, num_shards=1, words=words)
        versions["text"] = open_stream(root, "text").version
        if matches:
            found.prepare(root, versions)
        else:
            with pytest.raises(UserError, match="are of another text tokenizer than the one in org/model"):
                found.prepare(root, versions)
