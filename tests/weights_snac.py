"""Random weights of SNAC in the layout of the published ones, and its codes and sound by a plain reading of its code.

As weights_speech_tokenizer.py: the original package is asked in tests/oracles, in an environment of its own.

Axes: N samples or positions, C channels, T frames, L latents of one, D dimensions, E of a codebook, S codes of one, K
codes of a frame.
"""

import json
import math
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from weights_dac import fit_stages, speech

_PUBLISHED = Path(__file__).parent / "published"
_SMALL = {"encoder_dim": 4, "decoder_dim": 32, "codebook_size": 64}
_RATE = 24_000
_GAIN, _DIRECTION = "parametrizations.weight.original0", "parametrizations.weight.original1"


def make(name: str, folder: Path, *, small: bool, seed: int = 0, **changes: Any) -> Path:
    """Write weights to `folder`; `changes` are made to the configuration."""
    published = json.loads((_PUBLISHED / f"{name}.json").read_text())
    config = {**published["model"], **(_SMALL if small else {}), **changes}
    torch.manual_seed(seed)
    network = Network(config, {}, torch.Generator().manual_seed(seed))
    num_latents = max(config["codebook_size"] // 2, 500)
    speech_N = speech(num_latents * network.hop, _RATE, noise_share=0.25)
    network.latents(speech_N[-100 * network.hop :])
    latents_ND = torch.cat([network.latents(part_N).t() for part_N in speech_N.split(500 * network.hop)])
    latents_ND = network.centre(latents_ND)
    quantized_ND = network.fit_levels(latents_ND)
    network.sound(quantized_ND[:100].t(), None)
    network.state[f"decoder.model.{len(config['decoder_rates']) + 2 + config['depthwise']}.{_GAIN}"] *= 0.2
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    torch.save({name: tensor.contiguous() for name, tensor in network.state.items()}, folder / "pytorch_model.bin")
    return folder


def oracle(folder: Path, waveform_N: Tensor) -> Tensor:
    """Codes `[K, T]` of all levels: those of the first, then of the second in their order, and so on."""
    network = _loaded(folder)
    levels = network.codes(network.latents(_padded(network, waveform_N)))
    return torch.cat([codes_M.view(len(levels[0]), -1).t() for codes_M in levels])


def oracle_latents(folder: Path, waveform_N: Tensor) -> Tensor:
    """Those of a frame one after the other, `[T, L x D]`."""
    network = _loaded(folder)
    latents_ND = network.latents(_padded(network, waveform_N)).t()
    return latents_ND.unflatten(0, (-1, network.config["vq_strides"][0])).flatten(1)


def _padded(network: "Network", waveform_N: Tensor) -> Tensor:
    return functional.pad(waveform_N, (0, -waveform_N.shape[0] % (network.hop * network.config["vq_strides"][0])))


def oracle_sound(folder: Path, codes_KT: Tensor, noise: list[Tensor]) -> Tensor:
    """`noise` is what each place that adds some adds, for as many positions as there are, or for more."""
    network = _loaded(folder)
    levels, begin = [], 0
    for stride in network.config["vq_strides"]:
        count = network.config["vq_strides"][0] // stride
        if begin < len(codes_KT):
            levels.append(codes_KT[begin : begin + count].t().flatten())
        begin += count
    return network.sound(network.from_codes(levels).t(), noise)


@lru_cache(maxsize=2)
def _loaded(folder: Path) -> "Network":
    state = torch.load(folder / "pytorch_model.bin", weights_only=True)
    return Network(json.loads((folder / "config.json").read_text()), state)


class Network:
    """The published networks over a state dict; with a generator, parameters that it lacks are drawn and added."""

    def __init__(
        self, config: dict[str, Any], state: dict[str, Tensor], generator: torch.Generator | None = None
    ) -> None:
        self.config = config
        self.state = state
        self.hop = math.prod(config["encoder_rates"])
        self._generator = generator

    @torch.no_grad()
    def latents(self, waveform_N: Tensor) -> Tensor:
        """`[D, N / hop]`."""
        x_CN = self._convolve("encoder.block.0", waveform_N[None], self.config["encoder_dim"], 7)
        for place, stride in enumerate(self.config["encoder_rates"], start=1):
            name = f"encoder.block.{place}.block"
            for unit, dilation in enumerate((1, 3, 9)):
                x_CN = self._residual(f"{name}.{unit}", x_CN, dilation)
            x_CN = self._snake(f"{name}.3", x_CN)
            x_CN = self._convolve(f"{name}.4", x_CN, 2 * len(x_CN), 2 * stride, stride, math.ceil(stride / 2))
        name = f"encoder.block.{len(self.config['encoder_rates']) + 1}"
        return self._convolve(name, x_CN, len(x_CN), 7, groups=self._groups(len(x_CN)))

    @torch.no_grad()
    def sound(self, latents_DN: Tensor, noise: list[Tensor] | None) -> Tensor:
        """`[N]`."""
        x_CN, place = latents_DN, 0
        if self.config["depthwise"]:
            x_CN = self._convolve("decoder.model.0", x_CN, len(x_CN), 7, groups=len(x_CN))
            x_CN = self._convolve("decoder.model.1", x_CN, self.config["decoder_dim"], 1)
            place = 2
        else:
            x_CN = self._convolve("decoder.model.0", x_CN, self.config["decoder_dim"], 7)
            place = 1
        for number, stride in enumerate(self.config["decoder_rates"]):
            name, inner = f"decoder.model.{place + number}.block", 2
            x_CN = self._upsample(f"{name}.1", self._snake(f"{name}.0", x_CN), stride)
            if self.config["noise"]:
                noise_N = torch.zeros(x_CN.shape[1]) if noise is None else noise[number][: x_CN.shape[1]]
                x_CN = x_CN + noise_N * self._convolve(f"{name}.2.linear", x_CN, len(x_CN), 1, bias=False)
                inner = 3
            for unit, dilation in enumerate((1, 3, 9)):
                x_CN = self._residual(f"{name}.{inner + unit}", x_CN, dilation)
        place += len(self.config["decoder_rates"])
        x_CN = self._convolve(f"decoder.model.{place + 1}", self._snake(f"decoder.model.{place}", x_CN), 1, 7)
        return x_CN[0].tanh()

    @torch.no_grad()
    def codes(self, latents_DN: Tensor) -> list[Tensor]:
        """`[N / stride]` of each level."""
        left_DN, levels = latents_DN, []
        for level, stride in enumerate(self.config["vq_strides"]):
            mean_DM = functional.avg_pool1d(left_DN[None], stride, stride)[0]
            direction_EM = functional.normalize(self._project(level, "in_proj", mean_DM), dim=0)
            codebook_SE = functional.normalize(self._codebook(level))
            distances_MS = 1 - 2 * direction_EM.t() @ codebook_SE.t() + codebook_SE.square().sum(dim=1)
            levels.append(distances_MS.argmin(dim=1))
            left_DN = left_DN - self._vectors(level, levels[-1])
        return levels

    def from_codes(self, levels: list[Tensor]) -> Tensor:
        """Latents `[N, D]`."""
        return sum((self._vectors(level, codes_M) for level, codes_M in enumerate(levels)), torch.zeros(())).t()

    def _vectors(self, level: int, codes_M: Tensor) -> Tensor:
        vectors_DM = self._project(level, "out_proj", self._codebook(level)[codes_M].t())
        return vectors_DM.repeat_interleave(self.config["vq_strides"][level], dim=1)

    def _codebook(self, level: int) -> Tensor:
        return self.state[f"quantizer.quantizers.{level}.codebook.weight"]

    def _project(self, level: int, name: str, x_CN: Tensor) -> Tensor:
        return self._convolve(f"quantizer.quantizers.{level}.{name}", x_CN, 0, 1)

    def centre(self, latents_ND: Tensor) -> Tensor:
        """Let each dimension of the latents have mean 0 and deviation 1; the latents as they are then."""
        name = f"encoder.block.{len(self.config['encoder_rates']) + 1}"
        mean_D, deviation_D = latents_ND.mean(dim=0), latents_ND.std(dim=0)
        self.state[f"{name}.bias"] = (self.state[f"{name}.bias"] - mean_D) / deviation_D
        self.state[f"{name}.{_GAIN}"] = self.state[f"{name}.{_GAIN}"] / deviation_D[:, None, None]
        return (latents_ND - mean_D) / deviation_D

    def fit_levels(self, latents_ND: Tensor) -> Tensor:
        """Draw projections and codebooks, each fitted to what the levels before leave; the quantized latents."""
        size, code_dim, dim = self.config["codebook_size"], self.config["codebook_dim"], latents_ND.shape[1]
        left_ND = latents_ND.clone()
        for level, stride in enumerate(self.config["vq_strides"]):
            stage = nn.Module()
            stage.in_proj, stage.out_proj = nn.Conv1d(dim, code_dim, 1), nn.Conv1d(code_dim, dim, 1)
            stage.codebook = nn.Embedding(size, code_dim)
            stage.requires_grad_(False)
            usable = left_ND.shape[0] // stride * stride
            mean_MD = left_ND[:usable].unflatten(0, (-1, stride)).mean(dim=1)
            many_MD = mean_MD.repeat(-(-2 * size // len(mean_MD)), 1)
            fit_stages([stage], many_MD + 0.3 * mean_MD.std() * torch.randn(many_MD.shape))
            for name, tensor in stage.state_dict().items():
                name = f"quantizer.quantizers.{level}.{name}"
                self.state[name.replace(".weight", f".{_DIRECTION}") if "_proj" in name else name] = tensor
                if name.endswith("_proj.weight"):
                    self.state[name.replace(".weight", f".{_GAIN}")] = tensor.norm(dim=(1, 2), keepdim=True)
            left_ND = left_ND[:usable]
            whole = self.codes_of_level(level, left_ND.t(), stride)
            left_ND = left_ND - self._vectors(level, whole).t()
        return latents_ND[: len(left_ND)] - left_ND

    def codes_of_level(self, level: int, left_DN: Tensor, stride: int) -> Tensor:
        mean_DM = functional.avg_pool1d(left_DN[None], stride, stride)[0]
        direction_EM = functional.normalize(self._project(level, "in_proj", mean_DM), dim=0)
        return (functional.normalize(self._codebook(level)) @ direction_EM).argmax(dim=0)

    def _groups(self, num: int) -> int:
        return num if self.config["depthwise"] else 1

    def _residual(self, name: str, x_CN: Tensor, dilation: int) -> Tensor:
        inner_CN = self._snake(f"{name}.block.0", x_CN)
        groups = self._groups(len(x_CN))
        inner_CN = self._convolve(f"{name}.block.1", inner_CN, len(x_CN), 7, groups=groups, dilation=dilation)
        inner_CN = self._snake(f"{name}.block.2", inner_CN)
        return x_CN + self._convolve(f"{name}.block.3", inner_CN, len(x_CN), 1)

    def _snake(self, name: str, x_CN: Tensor) -> Tensor:
        if f"{name}.alpha" not in self.state:
            self.state[f"{name}.alpha"] = 0.3 + 1.5 * torch.rand(1, len(x_CN), 1, generator=self._generator)
        alpha_C1 = self.state[f"{name}.alpha"][0]
        return x_CN + (alpha_C1 * x_CN).sin().square() / (alpha_C1 + 1e-9)

    def _convolve(
        self,
        name: str,
        x_CN: Tensor,
        num_out: int,
        kernel: int,
        stride: int = 1,
        padding: int | None = None,
        *,
        dilation: int = 1,
        groups: int = 1,
        bias: bool = True,
    ) -> Tensor:
        padding = (kernel - 1) * dilation // 2 if padding is None else padding
        self._require(name, (num_out, len(x_CN) // groups, kernel), num_out if bias else 0)
        out_CN = functional.conv1d(
            x_CN[None], self._weight(name), self.state.get(f"{name}.bias"), stride, padding, dilation, groups
        )
        return self._spread(name, out_CN[0])

    def _upsample(self, name: str, x_CN: Tensor, stride: int) -> Tensor:
        self._require(name, (len(x_CN), len(x_CN) // 2, 2 * stride), len(x_CN) // 2)
        bias, padding = self.state[f"{name}.bias"], math.ceil(stride / 2)
        out_CN = functional.conv_transpose1d(x_CN[None], self._weight(name), bias, stride, padding, stride % 2)
        return self._spread(name, out_CN[0])

    def _require(self, name: str, shape: tuple[int, ...], num_biases: int) -> None:
        """Draw the parameters if there are none."""
        self._drawn = f"{name}.{_DIRECTION}" not in self.state
        if self._drawn:
            self.state[f"{name}.{_DIRECTION}"] = torch.randn(*shape, generator=self._generator)
            self.state[f"{name}.{_GAIN}"] = torch.linspace(0.5, 2.0, shape[0])[:, None, None]
            if num_biases:
                self.state[f"{name}.bias"] = 0.02 * torch.randn(num_biases, generator=self._generator)

    def _weight(self, name: str) -> Tensor:
        direction = self.state[f"{name}.{_DIRECTION}"]
        return self.state[f"{name}.{_GAIN}"] * direction / direction.norm(dim=(1, 2), keepdim=True)

    def _spread(self, name: str, out_CN: Tensor) -> Tensor:
        """Scale what was just drawn to give outputs of deviation 1."""
        if not self._drawn:
            return out_CN
        factor = 1 / out_CN.std()
        for part in (_GAIN, "bias"):
            if f"{name}.{part}" in self.state:
                self.state[f"{name}.{part}"] = self.state[f"{name}.{part}"] * factor
        return out_CN * factor
