"""Lyra's published files, where they lie beside this clone, and what a plain loop over its three networks gives.

There are no random ones: they are compiled networks, and wavemill opens no others.
"""

import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

PLACE = Path(__file__).resolve().parents[2] / "shared" / "weights" / "lyra"
FILES = ("soundstream_encoder.tflite", "quantizer.tflite", "lyragan.tflite")
HOP, BOOKS = 320, 46


def require() -> Path:
    """The folder with the published files. The test is skipped where it, or the interpreter, is not there."""
    if not all((PLACE / name).is_file() for name in FILES):
        pytest.skip("needs the weights of Lyra, which are not beside this clone")
    if find_spec("ai_edge_litert") is None:
        pytest.skip("needs the package ai-edge-litert")
    return PLACE


def make(name: str, folder: Path, *, small: bool, seed: int = 0) -> Path:
    """A copy of the published files, whatever is asked for."""
    place = require()
    folder.mkdir(parents=True)
    for file in FILES:
        shutil.copyfile(place / file, folder / file)
    return folder


def oracle(folder: Path, waveform_N: Tensor, num_codebooks: int = BOOKS) -> Tensor:
    """Codes `[K, T]` as Lyra's own program makes them (lyra/soundstream_encoder.cc, residual_vector_quantizer.cc)."""
    quantize = _interpreter(folder / FILES[1], delegate=False).get_signature_runner("encode")
    codes = []
    for latent in _latents(folder, waveform_N):
        found = quantize(input_frames=latent, num_quantizers=np.int32(num_codebooks))
        codes.append(found["output_0"].reshape(-1)[:num_codebooks])
    return torch.from_numpy(np.stack(codes, axis=1).astype(np.int64))


def oracle_latents(folder: Path, waveform_N: Tensor) -> Tensor:
    """What is quantized, `[T, D]`, by Lyra's own encoder."""
    return torch.from_numpy(np.stack([latent.reshape(-1) for latent in _latents(folder, waveform_N)]))


def _latents(folder: Path, waveform_N: Tensor) -> Iterator[np.ndarray]:
    encoder = _interpreter(folder / FILES[0])
    for begin in range(0, waveform_N.shape[0], HOP):
        samples_N = np.zeros((1, HOP), dtype=np.float32)
        samples_N[0, : waveform_N[begin : begin + HOP].shape[0]] = waveform_N[begin : begin + HOP].numpy()
        yield _step(encoder, samples_N).copy()


def quantized_latents(folder: Path, codes_KT: Tensor) -> Tensor:
    """Latents `[T, D]` by Lyra's own quantizer; codebooks that are left out are -1."""
    dequantize = _interpreter(folder / FILES[1], delegate=False).get_signature_runner("decode")
    latents = []
    for codes_K in codes_KT.t().numpy():
        codes_Q11 = np.full((BOOKS, 1, 1), -1, dtype=np.int32)
        codes_Q11[: len(codes_K), 0, 0] = codes_K
        latents.append(dequantize(encoding_indices=codes_Q11)["output_0"].reshape(-1))
    return torch.from_numpy(np.stack(latents))


def oracle_sound(folder: Path, codes_KT: Tensor) -> Tensor:
    """Sound as Lyra's own program makes it (lyra/lyra_gan_model.cc)."""
    decoder = _interpreter(folder / FILES[2])
    sound = [_step(decoder, latent_D).reshape(-1) for latent_D in quantized_latents(folder, codes_KT).numpy()]
    return torch.from_numpy(np.concatenate(sound))


def _interpreter(path: Path, *, delegate: bool = True) -> Any:
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    kind = OpResolverType.AUTO if delegate else OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    interpreter = Interpreter(model_path=str(path), num_threads=1, experimental_op_resolver_type=kind)
    interpreter.allocate_tensors()
    return interpreter


def _step(interpreter: Any, given: np.ndarray) -> np.ndarray:
    takes, gives = interpreter.get_input_details()[0], interpreter.get_output_details()[0]
    interpreter.set_tensor(takes["index"], given.reshape(takes["shape"]))
    interpreter.invoke()
    return interpreter.get_tensor(gives["index"])
