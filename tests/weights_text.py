"""Text tokenizers, text encoders and Whisper with words, small and random, in the layout of the published ones."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers
import weights_whisper
from wavemill.tokenizers.whisper_text import NUM_TIMES

import tokenizers

TEXTS = ("the quick brown fox", "jumps over the lazy dog", "the dog and the fox are over it", "two things")
WORDS = 24  # of Whisper's vocabulary here
_SPECIAL = ("<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|translate|>", "<|transcribe|>", "<|notimestamps|>")


def make_text_tokenizer(folder: Path, *, size: int = 60, special: bool = True) -> Path:
    """A byte-level BPE tokenizer, which puts a mark before and one behind a text when it is asked for special ones."""
    words = tokenizers.Tokenizer(tokenizers.models.BPE())
    words.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = tokenizers.decoders.ByteLevel()
    marks = ["<s>", "</s>", "<pad>"]
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=len(alphabet) + len(marks) + size,
        special_tokens=marks,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    words.train_from_iterator(TEXTS, trainer)
    if special:
        words.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
        )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=40
    )
    fast.save_pretrained(folder)
    return folder


def make_text_encoder(folder: Path, *, kind: str = "t5", seed: int = 0) -> Path:
    """A text encoder with its tokenizer."""
    make_text_tokenizer(folder)
    vocabulary = len(transformers.AutoTokenizer.from_pretrained(folder))
    torch.manual_seed(seed)
    if kind == "t5":
        config: Any = transformers.T5Config(
            vocab_size=vocabulary, d_model=24, d_kv=8, d_ff=48, num_layers=2, num_heads=2, decoder_start_token_id=0
        )
        model: Any = transformers.T5EncoderModel(config)
    else:
        config = transformers.BertConfig(
            vocab_size=vocabulary,
            hidden_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=48,
            max_position_embeddings=32,
        )
        model = transformers.BertModel(config)
    model.save_pretrained(folder)
    return folder


def make_whisper(folder: Path, *, seed: int = 0, generation: dict[str, Any] | None = None) -> Path:
    """A small Whisper that says a few words between timestamps, and ends; which ones follows from what it hears."""
    first = WORDS + len(_SPECIAL)
    end = WORDS
    weights_whisper.make(
        "whisper-tiny",
        folder,
        small=True,
        seed=seed,
        vocab_size=first + NUM_TIMES,
        max_target_positions=48,
        decoder_layers=1,
        pad_token_id=end,
        bos_token_id=end,
        eos_token_id=end,
        decoder_start_token_id=end + 1,
    )
    model = transformers.WhisperForConditionalGeneration.from_pretrained(folder)
    torch.manual_seed(seed)
    with torch.no_grad():
        _let_it_hear(model, first, end)
    model.generation_config = transformers.GenerationConfig(
        **{
            "no_timestamps_token_id": first - 1,
            "eos_token_id": end,
            "pad_token_id": end,
            "bos_token_id": end,
            "decoder_start_token_id": end + 1,
            "is_multilingual": True,
            "lang_to_id": {"<|en|>": end + 2},
            "task_to_id": {"translate": end + 3, "transcribe": end + 4},
            "language": "<|en|>",
            "task": "transcribe",
            "max_initial_timestamp_index": 50,
            "max_length": 48,
            "return_timestamps": False,
            "suppress_tokens": list(range(end + 1, first)),
            **(generation or {}),
        }
    )
    model.save_pretrained(folder)
    _save_words(folder, first)
    return folder


def _let_it_hear(model: Any, first: int, end: int) -> None:
    """Spread the decoder, so that what it says follows from the encoder; let ends and times be likely enough."""
    decoder = model.model.decoder
    for layer in decoder.layers:
        for attention in (layer.self_attn, layer.encoder_attn):
            for linear in (attention.q_proj, attention.k_proj, attention.v_proj, attention.out_proj):
                linear.weight.normal_(0, 2 * linear.in_features**-0.5)
    decoder.embed_positions.weight.normal_(0, 1)
    decoder.embed_tokens.weight.normal_(0, 1)
    decoder.embed_tokens.weight[first:] *= 0.7  # there are sixty times as many of them as of words


def _save_words(folder: Path, first: int) -> None:
    """A tokenizer whose words are letters, then Whisper's special ones, then its timestamps."""
    letters = [f" {chr(ord('a') + place)}" for place in range(WORDS)]
    times = [f"<|{place * 0.02:.2f}|>" for place in range(NUM_TIMES)]
    vocabulary = {text: place for place, text in enumerate([*letters, *_SPECIAL, *times])}
    assert vocabulary[times[0]] == first
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=letters[0]))
    words.decoder = tokenizers.decoders.Fuse()
    words.add_special_tokens(list(_SPECIAL))
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<|endoftext|>").save_pretrained(folder)
    assert json.loads((folder / "tokenizer.json").read_text())
