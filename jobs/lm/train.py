"""The training loop: steps from a checkpoint on, evaluated, logged and kept, the same whoever interrupts it.

All that is random in step s comes from (seed, s, rank), and checkpoints have the loader's state: a run that was stopped
and goes on has the weights and losses of one that was not, bit for bit on the CPU of one machine.
"""

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ...storage.batches import PackedBatch
from ...storage.failpoints import failpoint
from ...storage.root import Root
from ...tokenizers.spec import UserError
from .checkpoints import Checkpoint, locked, newest_checkpoint, remove_half_written, save_checkpoint
from .data import endless, held_out_batches, training_part
from .objectives import Loss, Objective
from .reports import RunLog
from .settings import Record, TrainSettings

_LAST_SHARE = 0.1  # of the learning rate, at the end of its cosine
_EVALUATION = -1  # in the place of a step's number
_STEPS_LOCK = ".lock-steps"  # held by who takes them: on Ray not the process that was started


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """This process's place among those that train together; torch.distributed joins them."""

    rank: int = 0
    size: int = 1

    def sums(self, values: Sequence[float]) -> list[float]:
        """Of each value the sum over all processes."""
        if self.size == 1:
            return list(values)
        given = torch.tensor(values, dtype=torch.float64)
        torch.distributed.all_reduce(given)
        return given.tolist()

    def ends(self, value: int) -> tuple[int, int]:
        """The least and the greatest of all processes' values."""
        if self.size == 1:
            return value, value
        least, greatest = torch.tensor(value), torch.tensor(value)
        torch.distributed.all_reduce(least, torch.distributed.ReduceOp.MIN)
        torch.distributed.all_reduce(greatest, torch.distributed.ReduceOp.MAX)
        return int(least), int(greatest)


@dataclass(frozen=True, slots=True, kw_only=True)
class Means:
    """What a run is done with, which does not change its weights."""

    world: World = World()
    device: str = "cpu"
    num_workers: int = 0  # of the loader, for each process
    minutes: float | None = None  # after which it stops, to be gone on with
    clock: Callable[[], float] = time.monotonic  # seconds
    on_step: Callable[[int, float, int], None] = lambda step, loss, num_tokens: None  # on the first process


class _Step(nn.Module):
    """An objective as DistributedDataParallel wants it: called for the loss to go back from."""

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.objective = objective
        self.loss: Loss | None = None

    def forward(self, batch: PackedBatch, generator: torch.Generator) -> Tensor:
        self.loss = self.objective.loss(batch, generator)
        return self.loss.total


class Learner:
    """An objective that learns: its weights, the optimizer, and the best evaluation so far."""

    def __init__(self, record: Record, means: Means) -> None:
        self.settings, self.world, self.device = record.settings, means.world, torch.device(means.device)
        with _seeded(record.settings.seed, 0, 0):  # the same weights on all ranks
            built = record.build()
        self.objective, self.vocabulary = built.objective.to(self.device), built.plan.vocabulary
        self.optimizer = _optimizer(self.objective, record.settings)
        self.step = 0
        self.best: dict[str, float] | None = None
        self._module: nn.Module = _Step(self.objective)
        self._distributed: nn.Module | None = None

    def load(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint. Raises `UserError` for one of another model."""
        checkpoint.load_weights(self.objective)
        checkpoint.load_optimizer(self.optimizer, self.objective)
        self.step, self.best = checkpoint.step, checkpoint.told["best"]

    def learn(self, batch: PackedBatch) -> dict[str, float]:
        """One step; its figures, over all processes."""
        if self._distributed is None:
            self._distributed = (
                self._module
                if self.world.size == 1
                else DistributedDataParallel(self._module, find_unused_parameters=True)
            )
        self.objective.train()
        rate = learning_rate(self.step, self.settings)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        with _seeded(self.settings.seed, self.step + 1, self.world.rank) as generator:
            with self._autocast():
                total = self._distributed(batch.to(self.device, non_blocking=True), generator)
        loss = self._module.loss
        assert isinstance(loss, Loss)
        nats, num_targets = self.world.sums([loss.nats, float(loss.num_targets)])
        # gradients are averaged over processes: each counts by its targets, not as one
        (total * (loss.num_targets * self.world.size / max(num_targets, 1.0))).backward()
        norm = nn.utils.clip_grad_norm_(self.objective.parameters(), self.settings.clip or math.inf)
        mean = nats / max(num_targets, 1.0)
        _require_finite(mean, "The loss", self.step + 1)
        _require_finite(float(norm), "The norm of the gradient", self.step + 1)
        self.optimizer.step()
        self.step += 1
        return {"train/loss": mean, "train/targets": num_targets, "learning_rate": rate, "gradient_norm": float(norm)}

    @torch.no_grad()
    def evaluate(self, batches: Sequence[PackedBatch]) -> Loss:
        """The loss over held-out batches, with the same draws each time. Raises `UserError` without targets."""
        self.objective.eval()
        nats, num_targets = 0.0, 0
        parts: dict[str, tuple[float, int]] = {}
        with evaluation_draws(self.settings.seed) as generator, self._autocast():
            for batch in batches:
                loss = self.objective.loss(batch.to(self.device), generator)
                nats, num_targets = nats + loss.nats, num_targets + loss.num_targets
                for name, (more, count) in loss.parts.items():
                    before, counted = parts.get(name, (0.0, 0))
                    parts[name] = before + more, counted + count
        if not num_targets:
            raise UserError(
                "The held-out part holds nothing to predict: its segments have at most one step, or sequences of "
                f"--length {self.settings.length} hold none but steps that are given, as the coarser codes of layout "
                "fine without piece. Tokenize more recordings, or take a greater --length or pieces."
            )
        return Loss(torch.tensor(nats / num_targets), nats, num_targets, parts)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")


def train(record: Record, folder: Path, means: Means) -> int:
    """Train until all steps are done, or the minutes are over; the step that was reached.

    On every process of a run: the first one evaluates and writes. Raises `UserError` for settings that do not fit.
    """
    with ExitStack() as held:
        if means.world.rank == 0:
            held.enter_context(locked(folder, _STEPS_LOCK))
            remove_half_written(folder)
        return _train(record, folder, means)


def _train(record: Record, folder: Path, means: Means) -> int:
    settings, is_first = record.settings, means.world.rank == 0
    learner = Learner(record, means)
    dataset = training_part(record, rank=means.world.rank, world_size=means.world.size)
    held_out = held_out_batches(record) if is_first else []
    checkpoint = _same_checkpoint(folder, means.world)
    if checkpoint is not None:
        learner.load(checkpoint)
        dataset.load_state_dict(checkpoint.told["loader"])
    else:
        learner.objective.prepare(Root(settings.root), record.versions)
    until = None if means.minutes is None else means.clock() + 60 * means.minutes
    if learner.step >= settings.steps:
        return learner.step
    with ExitStack() as stack:
        log = stack.enter_context(RunLog(folder, from_step=learner.step)) if is_first else None
        if log is not None and learner.step == 0:
            _evaluate(learner, held_out, log)
        for batch in endless(dataset, means.num_workers):
            figures = learner.learn(batch)
            # the first process's clock decides for all
            stop = means.world.sums([float(is_first and until is not None and means.clock() >= until)])[0] > 0
            last = stop or learner.step >= settings.steps
            if log is not None:
                log.add(learner.step, figures)
                means.on_step(learner.step, figures["train/loss"], int(figures["train/targets"]))
                # stopped, it only saves: evaluations, and so the best, are those of a run that was not
                due = learner.step % settings.evaluate_every == 0 or learner.step >= settings.steps
                better = due and _evaluate(learner, held_out, log)
                if better or last or learner.step % settings.save_every == 0:
                    _save(learner, folder, batch.state, record)
            failpoint("lm-step-done")
            if last:
                break
    return learner.step


def learning_rate(step: int, settings: TrainSettings) -> float:
    """That of the step after `step`: rising through the warmup, then a cosine down to a tenth."""
    if step < settings.warmup:
        return settings.learning_rate * (step + 1) / settings.warmup
    through = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    return settings.learning_rate * (
        _LAST_SHARE + (1 - _LAST_SHARE) * 0.5 * (1 + math.cos(math.pi * min(1.0, through)))
    )


def _same_checkpoint(folder: Path, world: World) -> Checkpoint | None:
    """The checkpoint that all processes go on from. Raises `UserError` on all of them if they see others."""
    checkpoint = newest_checkpoint(folder)
    least, greatest = world.ends(0 if checkpoint is None else checkpoint.step)
    if least != greatest:
        raise UserError(
            f"The processes of this run see different checkpoints in {folder}: the newest is of step {greatest:,} for "
            f"one, and {f'of step {least:,}' if least else 'not there'} for another. Name a folder with --to that all "
            "machines see, and where each can read all files."
        )
    return checkpoint


def _require_finite(value: float, what: str, step: int) -> None:
    if not math.isfinite(value):
        raise UserError(
            f"{what} is {value} in step {step:,}: the training has come apart. Begin again in another folder with a "
            "lower --learning-rate; the checkpoints that are there stay."
        )


def _evaluate(learner: Learner, held_out: Sequence[PackedBatch], log: RunLog) -> bool:
    """Evaluate and log it; whether it is the best so far. Raises `UserError` for a loss that is none."""
    loss = learner.evaluate(held_out)
    mean = loss.nats / loss.num_targets
    _require_finite(mean, "The held-out loss", learner.step)
    parts = {name: nats / count for name, (nats, count) in loss.parts.items()}
    log.add(learner.step, {"held_out/loss": mean}, parts if len(parts) > 1 else None)
    if learner.best is not None and mean >= learner.best["loss"]:
        return False
    learner.best = {"step": learner.step, "loss": mean}
    return True


def _save(learner: Learner, folder: Path, loader: dict[str, Any], record: Record) -> None:
    best = learner.best
    vocabulary = learner.vocabulary.to_json()
    told = {"loader": loader, "best": best, "run": record.to_json(), "vocabulary": vocabulary}
    kept = None if best is None else int(best["step"])
    save_checkpoint(folder, learner.step, learner.objective, learner.optimizer, told, best=kept)


def _optimizer(objective: Objective, settings: TrainSettings) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019); matrices decay, what scales does not."""
    parameters = [each for each in objective.parameters() if each.requires_grad]
    groups = [
        {"params": [each for each in parameters if each.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [each for each in parameters if each.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=settings.learning_rate, betas=(0.9, 0.95)
    )


def evaluation_draws(seed: int) -> AbstractContextManager[torch.Generator]:
    """The generator of every evaluation of a run."""
    return _seeded(seed, _EVALUATION, 0)


@contextmanager
def _seeded(seed: int, step: int, rank: int) -> Iterator[torch.Generator]:
    """A generator on the CPU for a step of a process; PyTorch's own, for dropout, is set to the same and put back."""
    digest = hashlib.blake2b(f"{seed}/{step}/{rank}".encode(), digest_size=7).digest()
    number = int.from_bytes(digest)
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(number)
        yield torch.Generator().manual_seed(number)
