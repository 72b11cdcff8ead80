"""Talkers who speak at once, taken apart: Conv-TasNet (Luo and Mesgarani 2019), in torchaudio's implementation."""

import hashlib
import os
import pickle
import struct
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor
from torchaudio.models import ConvTasNet

from .spec import UserError

SAMPLE_RATE = 8_000  # Hz
MAX_SECONDS = 60  # of one separation: it takes about 1 GB of memory with the published sizes
_MAX_FILE_BYTES = 1 << 30
_LAYERS_PER_STACK = 8  # dilations 1, 2, ... 128; shapes do not tell
# what torch.load raises for files that are damaged, or hold what it does not unpickle
_DAMAGE = (
    *(pickle.UnpicklingError, struct.error, RuntimeError, EOFError, LookupError),
    *(ValueError, TypeError, AttributeError, AssertionError, OverflowError),
)
_WEIGHTS_HINT = (
    "Give the state dict of a torchaudio ConvTasNet, .safetensors or .pt, such as conv_tasnet_base_libri2mix.pt of "
    "torchaudio.pipelines.CONVTASNET_BASE_LIBRI2MIX."
)


class Separator:
    """One mono waveform to `num_sources` of the same length, one talker each, in an order of the model's choosing.

    Sources come at the scale the model gives them: Conv-TasNet is trained with a loss that does not see scale.
    """

    sample_rate = SAMPLE_RATE

    def __init__(self, weights: dict[str, Tensor], *, name: str) -> None:
        """Build the model that `weights` belong to. `name` is what errors call them. Raises `UserError`."""
        self._weights = _checked(weights, name)
        self._model = _model(self._weights, name)
        self.num_sources = int(self._model.num_sources)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> "Separator":
        """Read weights from a file, safetensors or what `torch.save` wrote of a state dict. Raises `UserError`."""
        try:
            size = os.stat(path).st_size
            if size > _MAX_FILE_BYTES:
                raise UserError(f"Separator {path} has {size:,} bytes, which no ConvTasNet has. {_WEIGHTS_HINT}")
            with Path(path).open("rb") as file:
                head = file.read(9)
            if head[8:] == b"{":
                return cls.from_bytes(Path(path).read_bytes(), name=str(path))
            weights = torch.load(path, map_location="cpu", weights_only=True)
        except OSError as error:
            raise UserError(f"Separator {path} cannot be read: {error.strerror or error}.") from error
        except _DAMAGE as error:
            raise UserError(
                f"Separator {path} is neither safetensors nor a plain state dict of tensors; objects are never "
                f"unpickled. {_WEIGHTS_HINT}"
            ) from error
        return cls(weights, name=str(path))

    @classmethod
    def from_bytes(cls, content: bytes, *, name: str) -> "Separator":
        """Read what `to_bytes` wrote, or other safetensors of a state dict. Raises `UserError`."""
        try:
            weights = safetensors.torch.load(content)
        except (SafetensorError, KeyError, ValueError) as error:
            raise UserError(f"Separator {name} is no safetensors file ({error}). {_WEIGHTS_HINT}") from error
        return cls(weights, name=name)

    def to_bytes(self) -> bytes:
        return safetensors.torch.save(self._weights)

    @property
    def sha256(self) -> str:
        """Hash of names, shapes and numbers, whatever file and order they came in."""
        digest = hashlib.sha256()
        for name, weight in sorted(self._weights.items()):
            digest.update(f"{name}:{','.join(map(str, weight.shape))};".encode())
            digest.update(weight.numpy().tobytes())
        return digest.hexdigest()

    def separate(self, waveform_N: Tensor) -> Tensor:
        """Sources `[num_sources, N]`, float32, of a waveform `[N]` at 8 kHz, of `MAX_SECONDS` at most."""
        num_samples = waveform_N.shape[0]
        if waveform_N.ndim != 1 or not 0 < num_samples <= MAX_SECONDS * SAMPLE_RATE:
            raise ValueError(f"a waveform of shape {list(waveform_N.shape)} cannot be separated")
        with torch.inference_mode():
            return self._model(waveform_N.float()[None, None])[0].clone()


def _checked(weights: Any, name: str) -> dict[str, Tensor]:
    """The tensors as contiguous float32."""
    tensors = isinstance(weights, dict) and all(
        isinstance(key, str) and isinstance(weight, Tensor) and weight.is_floating_point()
        for key, weight in weights.items()
    )
    if not tensors:
        raise UserError(f"Separator {name} holds something else than named tensors of floats. {_WEIGHTS_HINT}")
    checked = {key: weight.detach().float().contiguous().clone() for key, weight in weights.items()}
    if not all(bool(weight.isfinite().all()) for weight in checked.values()):
        raise UserError(f"Separator {name} holds numbers that are NaN or infinite; its training or its file is broken.")
    return checked


def _model(weights: dict[str, Tensor], name: str) -> ConvTasNet:
    """The network whose sizes the shapes tell; masks pass a ReLU, as in `torchaudio.models.conv_tasnet_base`."""
    blocks = "mask_generator.conv_layers"
    try:
        num_feats, _, kernel = weights["encoder.weight"].shape
        hidden, bottleneck, _ = weights[f"{blocks}.0.conv_layers.0.weight"].shape
        mask_kernel = weights[f"{blocks}.0.conv_layers.3.weight"].shape[2]
        num_masks = weights["mask_generator.output_conv.weight"].shape[0]
        num_blocks = len({key.split(".")[2] for key in weights if key.startswith(blocks + ".")})
        if kernel < 2 or mask_kernel != 3:  # torchaudio pads its masks' convolutions for 3 alone
            raise ValueError(f"kernels of {kernel} and {mask_kernel}")
        num_sources, num_stacks = num_masks // num_feats, num_blocks // _LAYERS_PER_STACK
        with torch.device("meta"):
            model = ConvTasNet(
                num_sources=num_sources,
                enc_kernel_size=kernel,
                enc_num_feats=num_feats,
                msk_kernel_size=mask_kernel,
                msk_num_feats=bottleneck,
                msk_num_hidden_feats=hidden,
                msk_num_layers=_LAYERS_PER_STACK,
                msk_num_stacks=num_stacks,
                msk_activate="relu",
            )
        model.load_state_dict(weights, assign=True)
    except (KeyError, ValueError, IndexError, RuntimeError, ZeroDivisionError) as error:
        raise UserError(
            f"Separator {name} holds the weights of another network than ConvTasNet ({_LAYERS_PER_STACK} blocks a "
            f"stack). {_WEIGHTS_HINT}"
        ) from error
    if num_sources < 2:
        raise UserError(f"Separator {name} gives {num_sources} source; expected two or more. {_WEIGHTS_HINT}")
    return model.eval()
