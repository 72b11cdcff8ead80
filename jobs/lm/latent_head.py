"""The objective of frames of numbers: the next one is drawn by a small network that flows from noise to it.

Axes: B sequences, L steps, M steps that hold a frame, D numbers of a frame, H width of the model, W width of the head,
K draws for a frame, V tokens.
"""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...pipelines.layouts.continuous import continuous
from ...storage.batches import PackedBatch
from ...storage.codes import open_stream
from ...storage.root import Root
from ...storage.statistics import merged_statistics
from ...tokenizers.spec import UserError
from .bigram import Baseline
from .model import Cache, TokenModel
from .objectives import Loss, Objective, ObjectiveContext

_TIMES = 32  # sines and cosines that tell the head the time


class NextFrame(Objective):
    """Each frame of a stream of numbers from the steps before it, over layout `continuous`.

    A decoder reads the frames, normalized by the stream's mean and variance; from its hidden vector a `FlowHead` gives
    the next one, as in CALM (Rouard et al. 2025), with flow matching (Lipman et al. 2023) in the place of CALM's
    consistency, and as Li et al. (2024) do for pictures. A linear head tells frames from `<eos>`.

    A flow has no likelihood that is cheap to tell. What is reported, against predicting the mean, is the squared error
    of the conditional mean that the same head gives, in variances of the stream: 1 for one who knows its mean alone. It
    is the field at time 0 in the middle of the noise, whose best value is E[frame | past]; one draw of each frame is
    trained there. Parts: `mean`, that error; `flow`, the error of the field elsewhere; `tokens`, nats of the token.

    Options: `draws` of noise for each frame (4), `layers` of the head (3). Raises `UserError`.
    """

    def __init__(self, context: ObjectiveContext) -> None:
        super().__init__()
        context.require_options("continuous", "draws", "layers")
        layout = getattr(context.layout, "layout", context.layout)  # what `conditioned` stands around
        if not isinstance(layout, continuous):
            raise UserError(
                "Objective continuous predicts frames of numbers: take layout continuous, or another objective."
            )
        plan, config = context.plan, context.model
        self.num_draws = int(context.number("draws", 4, least=2, most=64))
        self.stream, self.vocabulary = layout.stream, plan.vocabulary
        self.frame_token = plan.frame_tokens[layout.stream]
        others = {stream: token for stream, token in plan.frame_tokens.items() if stream != layout.stream}
        self.model = TokenModel(
            config, plan.column_sizes, others, {stream: context.specs[stream].dim for stream in others}
        )
        dim = context.specs[layout.stream].dim
        self.into = nn.Linear(dim, config.dim)
        num_layers = int(context.number("layers", 3, least=1, most=64))
        self.head = FlowHead(dim, config.dim, config.dim, num_layers)
        self.mean_D: Tensor
        self.deviation_D: Tensor
        self.register_buffer("mean_D", torch.zeros(dim))
        self.register_buffer("deviation_D", torch.ones(dim))

    def prepare(self, root: Root, versions: Mapping[str, int]) -> None:
        snapshot = open_stream(root, self.stream, version=versions[self.stream])
        statistics = merged_statistics(root, snapshot, list(snapshot.files))
        deviation_D = torch.tensor(statistics.variance_D).sqrt()
        self.mean_D.copy_(torch.tensor(statistics.mean_D))
        self.deviation_D.copy_(deviation_D.where(deviation_D > 0, 1.0))  # numbers that never change

    def normalized(self, frames_MD: Tensor) -> Tensor:
        return (frames_MD.float() - self.mean_D) / self.deviation_D

    def forward(
        self,
        tokens_BL: Tensor,
        segment_ids_BL: Tensor,
        positions_BL: Tensor,
        frames: Mapping[str, Tensor],
        cache: Cache | None = None,
    ) -> Tensor:
        """Hidden vectors `[B, L, H]`, each of which says what comes next; frames are those of the table."""
        x_BLH = self.model.embed(tokens_BL, frames)
        places = torch.nonzero(tokens_BL == self.frame_token, as_tuple=True)
        given_MH = self.into(self.normalized(frames[self.stream])).to(x_BLH.dtype)
        x_BLH = x_BLH.index_put(places, given_MH, accumulate=True)
        return self.model.decoder(x_BLH, segment_ids_BL, positions_BL, cache)

    def loss(self, batch: PackedBatch, generator: torch.Generator) -> Loss:
        hidden_BLH = self(batch.tokens, batch.segment_ids, batch.positions, batch.frames)[:, :-1]
        asked_BL, is_frame_BL, frames_MD = self._targets(batch)
        errors_KM = self._errors(hidden_BLH[is_frame_BL], frames_MD, generator)
        logits = self.model.logits(hidden_BLH[asked_BL]).float()
        nats = functional.cross_entropy(logits, batch.tokens[:, 1:][asked_BL], reduction="sum")
        num = frames_MD.shape[0]
        total = (errors_KM.mean(dim=0).sum() + nats) / max(num, 1)
        error = float(errors_KM[0].detach().double().sum())
        flow = float(errors_KM[1:].detach().double().mean(dim=0).sum())
        parts = {"mean": (error, num), "flow": (flow, num), "tokens": (float(nats.detach()), int(asked_BL.sum()))}
        return Loss(total, error, num, {name: part for name, part in parts.items() if part[1]})

    def baseline(
        self,
        train_batches: Iterable[PackedBatch],
        held_out_batches: Iterable[PackedBatch],
        generator: torch.Generator,
    ) -> Baseline:
        """The squared error of the training frames' mean, in the same variances."""
        sums_D, num = torch.zeros(len(self.mean_D), dtype=torch.float64), 0
        for batch in train_batches:
            frames_MD = self._targets(batch)[2].double()
            sums_D, num = sums_D + frames_MD.sum(dim=0), num + len(frames_MD)
        error, num_targets = 0.0, 0
        for batch in held_out_batches:
            frames_MD = self._targets(batch)[2].double()
            away_MD = frames_MD - sums_D / max(num, 1)
            error, num_targets = error + float(away_MD.square().mean(dim=1).sum()), num_targets + len(frames_MD)
        return Baseline(error / max(num_targets, 1), "predicting the mean", num_targets)

    @torch.no_grad()
    def sample(
        self, hidden: Tensor, generator: torch.Generator, *, num_steps: int = 16, temperature: float = 1.0
    ) -> Tensor:
        """Frames `[..., D]` float32, as the table has them, that follow hidden vectors `[..., H]`.

        From noise by `num_steps` of Euler's steps. A temperature scales the noise's variance: with 0 and one step it
        is the conditional mean.
        """
        shape = (*hidden.shape[:-1], len(self.mean_D))
        x = torch.randn(shape, generator=generator).to(hidden.device) * math.sqrt(temperature)
        for step in range(num_steps):
            time = torch.full((*shape[:-1], 1), step / num_steps, device=hidden.device)
            x = x + self.head(x, time, hidden).float() / num_steps
        return x * self.deviation_D + self.mean_D

    def _targets(self, batch: PackedBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Of steps 1 and on those asked for, those of them that hold a frame, and these frames normalized `[M, D]`."""
        ids_BL, tokens_BL = batch.segment_ids, batch.tokens
        asked_BL = (ids_BL[:, 1:] == ids_BL[:, :-1]) & (ids_BL[:, 1:] > 0) & batch.loss_mask[:, 1:]
        is_frame_BL = asked_BL & (tokens_BL[:, 1:] == self.frame_token)
        holds_BL = tokens_BL == self.frame_token
        is_target_M = functional.pad(is_frame_BL, (1, 0))[holds_BL]
        return asked_BL, is_frame_BL, self.normalized(batch.frames[self.stream][is_target_M])

    def _errors(self, hidden_MH: Tensor, frames_MD: Tensor, generator: torch.Generator) -> Tensor:
        """Mean squared errors `[K, M]` of the field; of the first draw at time 0 and without noise."""
        shape = (self.num_draws - 1, *frames_MD.shape)
        noise_KMD = torch.randn(shape, generator=generator).to(frames_MD)
        time_KM1 = torch.rand((*shape[:-1], 1), generator=generator).to(frames_MD)
        noise_KMD = torch.cat([torch.zeros_like(frames_MD)[None], noise_KMD])
        time_KM1 = torch.cat([time_KM1.new_zeros(1, len(frames_MD), 1), time_KM1])
        mixed_KMD = (1 - time_KM1) * noise_KMD + time_KM1 * frames_MD
        field_KMD = self.head(mixed_KMD, time_KM1, hidden_MH.expand(self.num_draws, -1, -1))
        return (field_KMD.float() - (frames_MD - noise_KMD)).square().mean(dim=-1)


class FlowHead(nn.Module):
    """The velocity `[..., D]` at a point `[..., D]` and time `[..., 1]` in [0, 1], under a condition `[..., C]`.

    A perceptron of residual layers, which condition and time scale and shift (Peebles and Xie 2023; Li et al. 2024).
    At first it is 0.
    """

    def __init__(self, dim: int, condition_dim: int, width: int, num_layers: int) -> None:
        super().__init__()
        self.into = nn.Linear(dim, width)
        self.time = nn.Sequential(nn.Linear(2 * _TIMES, width), nn.SiLU(), nn.Linear(width, width))
        self.condition = nn.Linear(condition_dim, width)
        self.layers = nn.ModuleList(_HeadLayer(width) for _ in range(num_layers))
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, dim)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, point: Tensor, time: Tensor, condition: Tensor) -> Tensor:
        rates = torch.exp(torch.arange(_TIMES, device=time.device) * (math.log(1_000) / (_TIMES - 1)))
        angles = time * rates
        said = functional.silu(self.condition(condition) + self.time(torch.cat([angles.cos(), angles.sin()], dim=-1)))
        x = self.into(point)
        for layer in self.layers:
            x = layer(x, said)
        return self.out(self.norm(x))


class _HeadLayer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(width, 3 * width)
        self.feed = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, x: Tensor, said: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(said).chunk(3, dim=-1)
        return x + gate * self.feed(self.norm(x) * (1 + scale) + shift)
