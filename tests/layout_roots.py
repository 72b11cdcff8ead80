"""Small datasets of the samples with a stream of every kind that layouts take, for pictures and tests on real codes.

The samples have no word times: here words fill each clip, as long as they have letters. The pair are clips in two
languages that say different things. What separates talkers was never trained: it gives two colours of one talker.
"""

import json
import shutil
from pathlib import Path

import safetensors.torch
import soundfile
import torch
from torchaudio.models import ConvTasNet
from wavemill.jobs.codebook import FitOptions, fit_codebook
from wavemill.jobs.corpus import build_corpus
from wavemill.jobs.engine import InlineEngine
from wavemill.jobs.tokenize import TokenizeOptions, tokenize
from wavemill.pipelines.corpus import CorpusPolicy
from wavemill.pipelines.streams import StreamConfig
from wavemill.storage.root import Root
from wavemill.tokenizers.tokenizer import Output, TokenizerConfig
from weights_text import make_text_tokenizer

ALONE = ("en_anna_12.wav", "en_grace_12.flac")
PAIR = ("en_anna_11.flac", "de_frieda_02.flac")


def make_layout_root(path: Path, samples: Path, codebooks: Path) -> Path:
    """Streams semantic, acoustic, text, words, latents and voice of a few clips, two of them paired; one shard."""
    speech = path / "speech"
    speech.mkdir(parents=True)
    lines = []
    for name in ALONE:
        file = samples / "speech" / name
        shutil.copy(file, speech)
        text = file.with_suffix(".txt").read_text().strip()
        (speech / file.with_suffix(".txt").name).write_text(text)
        lines += _spread(file.stem, text.split(), soundfile.info(file).duration)
    (speech / "words.ctm").write_text("\n".join(lines))
    rows = [{"audio_filepath": str(samples / "speech" / name), "pair": "first"} for name in PAIR]
    manifest = path / "pairs.jsonl"
    manifest.write_text("\n".join(map(json.dumps, rows)))
    root = Root(path / "root")
    build_corpus(root, [f"speech={speech}", f"pairs={manifest}"], CorpusPolicy(), shard_hours=1)
    shutil.copytree(codebooks, path / "root" / "codebooks")
    words = str(make_text_tokenizer(path / "words", special=False))
    mfcc = {"tokenizer": "mfcc-kmeans"}
    configs = {
        "semantic": TokenizerConfig(**mfcc),
        "acoustic": TokenizerConfig(tokenizer="mel-rvq"),
        "text": TokenizerConfig(tokenizer="text-tokens", weights=words),
        "words": TokenizerConfig(tokenizer="word-tokens", weights=words),
        "latents": TokenizerConfig(**mfcc, output=Output.FEATURES),
        "voice": TokenizerConfig(**mfcc, output=Output.EMBEDDING),
    }
    _tokenize(root, configs)
    return path / "root"


def make_talkers_root(path: Path, samples: Path) -> Path:
    """Stream semantic of what a separator takes a clip apart into, with a codebook of its own: these have 8 kHz."""
    (path / "speech").mkdir(parents=True)
    for name in ALONE[:1]:
        shutil.copy(samples / "speech" / name, path / "speech")
    torch.manual_seed(0)
    sizes = {"enc_num_feats": 32, "msk_num_feats": 12, "msk_num_hidden_feats": 20, "msk_num_stacks": 2}
    separator = ConvTasNet(num_sources=2, **sizes, msk_activate="sigmoid")
    coder_FW = separator.encoder.weight[:, 0]
    halves_WF = torch.linalg.pinv(coder_FW) / 2  # windows overlap by half: without masks they give the sound back
    separator.decoder.weight.data[:, 0] = halves_WF.t()
    safetensors.torch.save_file(separator.state_dict(), path / "separator.safetensors")
    root = Root(path / "root")
    separate = str(path / "separator.safetensors")
    build_corpus(root, [f"speech={path / 'speech'}"], CorpusPolicy(), shard_hours=1, separate=separate)
    fit_codebook(root, TokenizerConfig(tokenizer="mfcc-kmeans"), FitOptions(size=32))
    _tokenize(root, {"semantic": TokenizerConfig(tokenizer="mfcc-kmeans")})
    return path / "root"


def _tokenize(root: Root, configs: dict[str, TokenizerConfig]) -> None:
    streams = [StreamConfig(name=name, tokenizer=config) for name, config in configs.items()]
    tokenize(root, streams, InlineEngine, TokenizeOptions())


def _spread(recording: str, words: list[str], duration_s: float) -> list[str]:
    """CTM lines of words, each as long as its letters."""
    each_s = duration_s / sum(map(len, words))
    lines, start_s = [], 0.0
    for word in words:
        lines.append(f"{recording} 1 {start_s:.3f} {len(word) * each_s:.3f} {word}")
        start_s += len(word) * each_s
    return lines
