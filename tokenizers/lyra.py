"""Lyra v2's SoundStream at 16 kHz, from its published TensorFlow Lite files (https://github.com/google/lyra).

Zeghidour et al. 2021, "SoundStream: An End-to-End Neural Audio Codec": causal convolutions, residual VQ.

Axes: N samples, T frames, D dimensions of a latent, Q codebooks there are, C codes of one, K codebooks of a stream.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .codec import Chunks, codes_of_chunks, gaps_of_chunks, num_codebooks_of, padded_span
from .latents import with_latents
from .quantize import ResidualQuantizer
from .spec import FrameRule, StreamSpec, UserError
from .tokenizer import Description, TokenizerConfig, TokenizerEntry

_NAME = "lyra"
_PUBLISHED_AT = "https://github.com/google/lyra/tree/v1.3.2/lyra/model_coeffs"
_ENCODER, _QUANTIZER, _DECODER = "soundstream_encoder.tflite", "quantizer.tflite", "lyragan.tflite"
# Size and SHA-256 of each: the interpreter is C++ that trusts what it is given, so it is given nothing else.
_PUBLISHED = {
    _ENCODER: (1_779_200, "237da0b16226fb0a68d49551c81bebf614e42142af72764448359f68581e88f1"),
    _QUANTIZER: (329_012, "841ee05989687d32d1f616a8ad1419fc7eda37599d3c05c7cf5a0d60ccf8ac5c"),
    _DECODER: (1_475_160, "50e7839cda4f30599a3a34cfaddcd9c98449b049eee884e1a74295780448ad06"),
}
_SPEC = StreamSpec(
    tokenizer=_NAME,
    sample_rate=16_000,
    decode_sample_rate=16_000,
    hop_length=320,
    window_length=1,
    frame_rule=FrameRule.CEIL,
    num_codebooks=46,
    codebook_size=16,
)
_DIM = 64  # of a latent
_CHUNK_FRAMES = 500  # of latents that are in memory at once


class Lyra:
    """A `Tokenizer` of Lyra's three networks.

    Encoder and decoder take one hop at a time and keep what came before it inside: every segment begins with new ones,
    and one of any length is exact in constant memory. Its last hop is filled up with zeros. The quantizer's codebooks
    are read out through its own decoder; the search in them is `ResidualQuantizer`'s.
    """

    def __init__(self, files: dict[str, bytes], spec: StreamSpec, fingerprint: dict[str, str]) -> None:
        """`files` are the published ones."""
        self.spec = spec
        self.fingerprint = fingerprint
        self.longest = None
        self._files = files
        self._quantizer = ResidualQuantizer(_centroids(files[_QUANTIZER])[: spec.num_codebooks])

    def encode(self, waveform_N: Tensor) -> Tensor:
        num_frames = -(-waveform_N.shape[0] // self.spec.hop_length)
        latents = self.latents([waveform_N], waveform_N.shape[0])
        return codes_of_chunks(latents, self._quantizer.encode, [num_frames], self.spec.num_codebooks)[0]

    def encode_batch(self, waveforms: Sequence[Tensor], padded_length: int) -> list[Tensor]:
        """One after the other: the networks take one segment."""
        return [self.encode(waveform_N) for waveform_N in waveforms]

    def gaps(self, waveform_N: Tensor) -> Tensor:
        latents = self.latents([waveform_N], waveform_N.shape[0])
        return gaps_of_chunks(latents, self._quantizer.gaps, self.spec.num_codebooks)

    def decode(self, codes_KT: Tensor) -> Tensor:
        return self._sound(codes_KT.shape[1], lambda span: self._quantizer.decode(codes_KT[:, span]))

    def synthesize(self, latents_TD: Tensor) -> Tensor:
        return self._sound(len(latents_TD), lambda span: latents_TD[span])

    def _sound(self, num_frames: int, latents: Callable[[slice], Tensor]) -> Tensor:
        network = _Network(self._files[_DECODER])
        sound_TN = torch.empty(num_frames, self.spec.hop_length)
        for begin in range(0, num_frames, _CHUNK_FRAMES):
            span = slice(begin, begin + _CHUNK_FRAMES)
            sound_TN[span] = network.through(latents(span))
        return sound_TN.flatten()

    def latents(self, waveforms: Sequence[Tensor], padded_length: int) -> Chunks:
        """Latents of several segments, each through a network of its own."""
        del padded_length
        hop = self.spec.hop_length
        networks = [_Network(self._files[_ENCODER]) for _ in waveforms]
        frames = [-(-waveform_N.shape[0] // hop) for waveform_N in waveforms]
        for begin in range(0, max(frames, default=0), _CHUNK_FRAMES):
            valid = [min(max(num - begin, 0), _CHUNK_FRAMES) for num in frames]
            latents_BTD = torch.zeros(len(waveforms), max(valid), _DIM)
            for row, num in enumerate(valid):
                if num:
                    samples_N = padded_span(waveforms[row], begin * hop, (begin + num) * hop)
                    latents_BTD[row, :num] = networks[row].through(samples_N.view(num, hop))
            yield latents_BTD, valid


class _Network:
    """One of the networks at the beginning of a segment.

    Its state is never reset (`Interpreter.reset_all_variables` leaves it as it is): the next segment takes another.
    """

    def __init__(self, content: bytes) -> None:
        self._interpreter = _open(content)
        self._interpreter.allocate_tensors()
        self._takes = self._interpreter.get_input_details()[0]
        self._gives = self._interpreter.get_output_details()[0]

    def through(self, steps_TN: Tensor) -> Tensor:
        """What the next steps give, one after the other, `[T, D]`."""
        given = []
        for step_N in steps_TN.numpy():
            self._interpreter.set_tensor(self._takes["index"], step_N.reshape(self._takes["shape"]))
            self._interpreter.invoke()
            given.append(self._interpreter.get_tensor(self._gives["index"]).reshape(-1))
        return torch.from_numpy(np.stack(given))


def _centroids(quantizer: bytes) -> Tensor:
    """Codebooks `[Q, C, D]`: what each code decodes to where no other codebook has one (-1)."""
    decode = _open(quantizer).get_signature_runner("decode")
    shape = _SPEC.num_codebooks, _SPEC.codebook_size
    centroids_QC = []
    for book, code in np.ndindex(*shape):
        codes_Q = np.full((_SPEC.num_codebooks, 1, 1), -1, dtype=np.int32)
        codes_Q[book] = code
        centroids_QC.append(decode(encoding_indices=codes_Q)["output_0"].reshape(-1))
    return torch.from_numpy(np.stack(centroids_QC)).unflatten(0, shape)


def _open(content: bytes) -> Any:
    from ai_edge_litert.interpreter import Interpreter

    return Interpreter(model_content=content, num_threads=1)


def _describe(config: TokenizerConfig) -> Description:
    if config.weights is None:
        raise UserError(
            f"Tokenizer {_NAME} finds no weights by itself, they are not on the hub: fetch {_named(_PUBLISHED)} from "
            f"{_PUBLISHED_AT}, and name the folder that they are in: weights=FOLDER."
        )
    if config.revision is not None:
        raise UserError(f"The weights of {_NAME} have no revisions; leave out revision={config.revision}.")
    folder = Path(config.weights).expanduser()
    if not folder.is_dir():
        raise UserError(
            f"There is no folder {config.weights}; {_NAME} takes one that holds {_named(_PUBLISHED)} from "
            f"{_PUBLISHED_AT}."
        )
    num_codebooks = num_codebooks_of(config, _SPEC.num_codebooks, _SPEC.num_codebooks)
    hashes = [hashlib.sha256(_read(folder, name)).hexdigest() for name in _PUBLISHED]
    fingerprint = {
        "tokenizer": _NAME,
        "codec": f"{_NAME}/1",
        "weights": hashlib.sha256("".join(hashes).encode()).hexdigest(),
        "runtime": _runtime(),
        "codebooks": str(num_codebooks),
        "precision": config.mode.precision,
    }
    return Description(config, replace(_SPEC, num_codebooks=num_codebooks), fingerprint, weights=folder.resolve())


def _runtime() -> str:
    """The interpreter and its version: its kernels decide how integers are rounded. Raises `UserError` without it."""
    try:
        return f"ai-edge-litert {version('ai-edge-litert')}"
    except PackageNotFoundError as error:
        raise UserError(f"Tokenizer {_NAME} needs the package ai-edge-litert: pip install 'wavemill[lyra]'.") from error


def _read(folder: Path, name: str) -> bytes:
    """A published file, byte by byte. Raises `UserError` for any other."""
    size, sha256 = _PUBLISHED[name]
    path = folder / name
    if not path.is_file():
        raise UserError(f"{folder} holds no {name}; {_NAME} takes {_named(_PUBLISHED)} from {_PUBLISHED_AT}.")
    found = path.stat().st_size
    if found != size:
        raise UserError(
            f"{path} has {found:,} bytes, the {name} of Lyra 1.3 has {size:,}: it is torn or another one. Fetch it "
            f"again from {_PUBLISHED_AT}."
        )
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != sha256:
        raise UserError(
            f"{path} is damaged or another file than the {name} of Lyra 1.3 (its SHA-256 is not {sha256[:12]}...). "
            f"Fetch it again from {_PUBLISHED_AT}."
        )
    return content


def _named(names: Iterable[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} and {last}"


def open_lyra(description: Description, device: str) -> Lyra:
    """The tokenizer that is described. It runs on the CPU, whatever the device."""
    files = {name: _read(description.weights, name) for name in _PUBLISHED}
    return Lyra(files, description.spec, description.fingerprint)


ENTRIES = with_latents(
    TokenizerEntry(
        spec=_SPEC,
        kind="acoustic",
        about=(
            "Lyra v2's SoundStream (Zeghidour et al. 2021): causal convolutions in 8-bit integers, residual VQ; the "
            "first 16, 30 and all 46 codebooks are Lyra's 3.2, 6.0 and 9.2 kbit/s"
        ),
        needs_codebook=False,
        last_frame="zeros after the end",
        long_audio="whole, hop by hop, all state carried over; exact",
        weights="github.com/google/lyra",
        licence="Apache-2.0",
        describe=_describe,
        open=open_lyra,
    ),
    lambda _: _DIM,
)
