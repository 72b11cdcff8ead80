"""Random weights of SpeechTokenizer in the layout of the published ones, and its codes and sound by a plain reading.

The original package cannot be installed beside wavemill; tests/oracles asks it, in an environment of its own, for the
same weights. Here stands the published pass as its paper and code say it: over a whole segment, alone, padded at each
layer. A fresh random codec says little, so each convolution is drawn, when it is first used, to give outputs of
deviation 1 on speech, and each codebook from what the ones before leave.

Axes: N samples or positions, C channels, T frames, D dimensions of a latent, S codes of a codebook, K codebooks.
"""

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from weights_dac import speech

_PUBLISHED = Path(__file__).parent / "published"
_SMALL = {"n_filters": 4, "dimension": 32, "semantic_dimension": 24, "codebook_size": 64}
_RATE = 16_000


def make(name: str, folder: Path, *, small: bool, seed: int = 0, **changes: Any) -> Path:
    """Write weights to `folder`; `changes` are made to the configuration."""
    published = json.loads((_PUBLISHED / f"{name}.json").read_text())
    config = {**published["model"], **(_SMALL if small else {}), **changes}
    seconds = max(15, config["codebook_size"] // 20)
    speech_N = speech(seconds * _RATE, _RATE, noise_share=0.25)
    network = Network(config, {}, torch.Generator().manual_seed(seed))
    network.latents(speech_N[None, -10 * _RATE :])
    latents_TD = torch.cat([network.latents(part_1N).t() for part_1N in speech_N[None].split(20 * _RATE, dim=1)])
    network.centre(latents_TD)
    quantized_TD = network.fit_codebooks(latents_TD - latents_TD.mean(dim=0))
    network.sound(quantized_TD[:50].t())
    network.soften()
    if config["dimension"] != config["semantic_dimension"]:
        network.state["transform.weight"] = torch.randn(config["semantic_dimension"], config["dimension"])
        network.state["transform.bias"] = torch.zeros(config["semantic_dimension"])
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    torch.save({name: tensor.contiguous() for name, tensor in network.state.items()}, folder / "SpeechTokenizer.pt")
    return folder


def oracle(folder: Path, waveform_N: Tensor) -> Tensor:
    """Codes `[K, T]` of all codebooks."""
    return _loaded(folder).codes(waveform_N)


def oracle_latents(folder: Path, waveform_N: Tensor) -> Tensor:
    """What is quantized, `[T, D]`."""
    return _loaded(folder).latents(waveform_N[None]).t()


def oracle_sound(folder: Path, codes_KT: Tensor) -> Tensor:
    network = _loaded(folder)
    codebooks = [network.codebook(stage)[codes_T] for stage, codes_T in enumerate(codes_KT)]
    return network.sound(torch.stack(codebooks).sum(dim=0).t())


@lru_cache(maxsize=2)
def _loaded(folder: Path) -> "Network":
    state = torch.load(folder / "SpeechTokenizer.pt", weights_only=True)
    return Network(json.loads((folder / "config.json").read_text()), state)


class Network:
    """The published networks over a state dict; with a generator, parameters that it lacks are drawn and added."""

    def __init__(
        self, config: dict[str, Any], state: dict[str, Tensor], generator: torch.Generator | None = None
    ) -> None:
        self.config = config
        self.state = state
        self._generator = generator

    @torch.no_grad()
    def latents(self, waveform_1N: Tensor) -> Tensor:
        """`[D, T]`."""
        width = self.config["n_filters"]
        x_CN = self._convolve("encoder.model.0", waveform_1N, width, 7)
        place = 1
        for stride in reversed(self.config["strides"]):
            x_CN = self._residual(f"encoder.model.{place}", x_CN)
            x_CN = self._activate(f"encoder.model.{place + 1}", x_CN)
            x_CN = self._convolve(f"encoder.model.{place + 2}", x_CN, 2 * len(x_CN), 2 * stride, stride)
            place += 3
        x_CN = self._recur(f"encoder.model.{place}", x_CN, both_ways=True)
        x_CN = self._activate(f"encoder.model.{place + 1}", x_CN)
        return self._convolve(f"encoder.model.{place + 2}", x_CN, self.config["dimension"], 7)

    @torch.no_grad()
    def sound(self, latents_DT: Tensor) -> Tensor:
        """`[N]`."""
        width = self.config["n_filters"] * 2 ** len(self.config["strides"])
        x_CN = self._convolve("decoder.model.0", latents_DT, width, 7)
        x_CN = self._recur("decoder.model.1", x_CN, both_ways=False)
        place = 2
        for stride in self.config["strides"]:
            x_CN = self._activate(f"decoder.model.{place}", x_CN)
            x_CN = self._upsample(f"decoder.model.{place + 1}", x_CN, stride)
            x_CN = self._residual(f"decoder.model.{place + 2}", x_CN)
            place += 3
        x_CN = self._activate(f"decoder.model.{place}", x_CN)
        return self._convolve(f"decoder.model.{place + 1}", x_CN, 1, 7)[0]

    @torch.no_grad()
    def codes(self, waveform_N: Tensor) -> Tensor:
        left_TD = self.latents(waveform_N[None]).t()
        codes = []
        for stage in range(self.config["n_q"]):
            codebook_SD = self.codebook(stage)
            squares_T1, squares_S = left_TD.square().sum(dim=1, keepdim=True), codebook_SD.square().sum(dim=1)
            codes.append((squares_T1 - 2 * left_TD @ codebook_SD.t() + squares_S).argmin(dim=1))
            left_TD = left_TD - codebook_SD[codes[-1]]
        return torch.stack(codes)

    def codebook(self, stage: int) -> Tensor:
        return self.state[f"quantizer.vq.layers.{stage}._codebook.embed"]

    def centre(self, latents_TD: Tensor) -> None:
        """Let the latents have mean 0."""
        last = 3 * len(self.config["strides"]) + 3
        self.state[f"encoder.model.{last}.conv.conv.bias"] -= latents_TD.mean(dim=0)

    def soften(self) -> None:
        last = 3 * len(self.config["strides"]) + 3
        for part in ("weight_g", "bias"):
            self.state[f"decoder.model.{last}.conv.conv.{part}"] *= 0.1

    def fit_codebooks(self, latents_TD: Tensor) -> Tensor:
        """Directions of what is left, a quarter as long as is usual, so that eight stages leave more than rounding."""
        left_TD, size = latents_TD.clone(), self.config["codebook_size"]
        for stage in range(self.config["n_q"]):
            chosen_S = torch.randperm(len(left_TD), generator=self._generator)[:size]
            near_SD = left_TD[chosen_S] + 0.05 * left_TD.std() * self._draw(size, left_TD.shape[1])
            codebook_SD = functional.normalize(near_SD) * 0.25 * left_TD.norm(dim=1).mean()
            name = f"quantizer.vq.layers.{stage}._codebook"
            self.state |= {f"{name}.embed": codebook_SD, f"{name}.embed_avg": codebook_SD.clone()}
            self.state |= {f"{name}.inited": torch.ones(1), f"{name}.cluster_size": torch.ones(size)}
            left_TD = left_TD - codebook_SD[torch.cdist(left_TD, codebook_SD).argmin(dim=1)]
        return latents_TD - left_TD

    def _convolve(self, name: str, x_CN: Tensor, num_out: int, kernel: int, stride: int = 1) -> Tensor:
        around = kernel - stride
        x_CN = _reflected(x_CN, around - around // 2, around // 2 + -x_CN.shape[1] % stride)
        return self._linear(f"{name}.conv.conv", x_CN, (num_out, len(x_CN), kernel), stride, functional.conv1d)

    def _upsample(self, name: str, x_CN: Tensor, stride: int) -> Tensor:
        shape = (len(x_CN), len(x_CN) // 2, 2 * stride)
        out_CN = self._linear(f"{name}.convtr.convtr", x_CN, shape, stride, functional.conv_transpose1d)
        return out_CN[:, stride - stride // 2 : out_CN.shape[1] - stride // 2]

    def _linear(self, name: str, x_CN: Tensor, shape: tuple[int, ...], stride: int, convolve: Any) -> Tensor:
        drawn = f"{name}.weight_v" not in self.state
        if drawn:
            num_out = shape[0] if convolve is functional.conv1d else shape[1]
            self.state[f"{name}.weight_v"] = self._draw(*shape)
            self.state[f"{name}.weight_g"] = torch.linspace(0.5, 2.0, shape[0])[:, None, None]
            self.state[f"{name}.bias"] = 0.02 * self._draw(num_out)
        direction, gain = self.state[f"{name}.weight_v"], self.state[f"{name}.weight_g"]
        weight = gain * direction / direction.norm(dim=(1, 2), keepdim=True)
        out_CN = convolve(x_CN[None], weight, self.state[f"{name}.bias"], stride)[0]
        if drawn:
            factor = 1 / out_CN.std()
            self.state[f"{name}.weight_g"] *= factor
            self.state[f"{name}.bias"] *= factor
            out_CN = out_CN * factor
        return out_CN

    def _residual(self, name: str, x_CN: Tensor) -> Tensor:
        inner_CN = self._activate(f"{name}.block.0", x_CN)
        inner_CN = self._convolve(f"{name}.block.1", inner_CN, len(x_CN) // 2, 3)
        inner_CN = self._activate(f"{name}.block.2", inner_CN)
        inner_CN = self._convolve(f"{name}.block.3", inner_CN, len(x_CN), 1)
        return self._convolve(f"{name}.shortcut", x_CN, len(x_CN), 1) + inner_CN

    def _activate(self, name: str, x_CN: Tensor) -> Tensor:
        if self.config["activation"] == "ELU":
            return functional.elu(x_CN)
        if f"{name}.alpha" not in self.state:
            self.state[f"{name}.alpha"] = 0.3 + 1.5 * torch.rand(1, len(x_CN), 1, generator=self._generator)
        alpha_C1 = self.state[f"{name}.alpha"][0]
        return x_CN + (alpha_C1 * x_CN).sin().square() / (alpha_C1 + 1e-9)

    def _recur(self, name: str, x_CT: Tensor, *, both_ways: bool) -> Tensor:
        lstm = nn.LSTM(len(x_CT), len(x_CT), 2, bidirectional=both_ways)
        for part, shaped in lstm.state_dict().items():
            if f"{name}.lstm.{part}" not in self.state:
                self.state[f"{name}.lstm.{part}"] = self._draw(*shaped.shape) * len(x_CT) ** -0.5
        lstm.load_state_dict({part: self.state[f"{name}.lstm.{part}"] for part in lstm.state_dict()})
        y_TC, _ = lstm(x_CT.t())
        return (y_TC + x_CT.t().repeat(1, 1 + both_ways)).t()

    def _draw(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._generator)


def _reflected(x_CN: Tensor, before: int, after: int) -> Tensor:
    """Padded by reflection; what is too short for it gets zeros at its end first, which are cut off again."""
    zeros = max(0, max(before, after) + 1 - x_CN.shape[1])
    padded_CN = functional.pad(functional.pad(x_CN, (0, zeros))[None], (before, after), mode="reflect")[0]
    return padded_CN[:, : padded_CN.shape[1] - zeros]
