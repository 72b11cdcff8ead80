"""The job that trains a language model on a dataset's tokens: begins a run or goes on with it, says how it went."""

import json
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ..storage.root import Root
from ..storage.stores import has_scheme
from ..tokenizers.spec import UserError
from .lm.bigram import Baseline
from .lm.checkpoints import LOCK, checkpoint_of, locked, newest_checkpoint, write_whole
from .lm.data import held_out_batches, new_record, one_epoch, training_part
from .lm.model import num_parameters
from .lm.objectives import Objective
from .lm.reports import TrainProgress, draw_loss, read_log
from .lm.settings import RECORD, Record, TrainSettings, begun_or, placed, read_record, require_same_settings
from .lm.train import Means, evaluation_draws, train

BASELINE, REPORT = "baseline.json", "report.json"
_LEFT = {f".{RECORD}", LOCK}  # by a start that was killed before it had written its record
_COUNTED = 50_000_000  # steps of the training part that a baseline is counted on, at most


def train_lm(
    settings: TrainSettings, to: str, means: Means, *, ray_workers: int | None = None, address: str | None = None
) -> dict[str, Any]:
    """Train in this process, or with `ray_workers` of Ray Train (at `address`); the run's report, finished or stopped.

    The run's folder `to` says what was begun: the same settings go on, others are refused. Raises `UserError`.
    """
    folder = run_folder(to)
    with ExitStack() as held:
        record = _begun(folder, placed(settings), held)
        training_part(record, rank=0, world_size=ray_workers or 1)  # which says what does not fit
        baseline = _baseline(folder, record)
        progress = held.enter_context(TrainProgress(record.settings.steps))
        if ray_workers is None:
            reached = train(record, folder, _shown(means, progress))
        else:
            from .lm.ray_train import train_on_ray

            reached = train_on_ray(
                record, folder, means, num_workers=ray_workers, address=address, on_step=progress.advance
            )
        return _report(folder, record, baseline, reached)


def run_folder(to: str) -> Path:
    """Raises `UserError` for a folder in an object store."""
    if has_scheme(to):
        raise UserError(f"--to {to}: a run is written to a folder of this machine, or one that is mounted; name one.")
    return Path(to).expanduser().absolute()


def load_run(to: str, *, step: int | None = None) -> tuple[Record, Objective]:
    """What a run was begun with, and its objective with the weights of a step: the best evaluated one by default.

    Raises `UserError` if there is no such run, or none of its checkpoints is whole.
    """
    folder = run_folder(to)
    record, newest = read_record(folder), newest_checkpoint(folder)
    if record is None or newest is None:
        raise UserError(
            f"There is no trained model in {folder}. Train one: wavemill train lm ROOT --layout ... --to {to}"
        )
    best = newest.told["best"]
    wanted = step if step is not None else newest.step if best is None else int(best["step"])
    checkpoint = checkpoint_of(folder, wanted) or (newest if step is None else None)
    if checkpoint is None:
        raise UserError(f"There is no checkpoint of step {wanted:,} in {folder}; the newest is of {newest.step:,}.")
    objective = record.build().objective
    checkpoint.load_weights(objective)
    return record, objective.eval()


def _begun(folder: Path, asked: TrainSettings, held: ExitStack) -> Record:
    """The record of a run, made where there is none, and its folder locked.

    Raises `UserError` for other settings, another's folder, and one that another process trains in.
    """
    record = read_record(folder)
    if record is not None:
        settings = begun_or(asked, record)
        require_same_settings(folder, record.settings, settings)
        held.enter_context(locked(folder))
        return replace(record, settings=settings)
    if folder.exists() and (not folder.is_dir() or {path.name for path in folder.iterdir()} - _LEFT):
        raise UserError(f"--to {folder} is not empty, and no training run. Name another folder.")
    record = new_record(asked)
    objective = record.build().objective  # what does not fit is said before anything is written
    objective.prepare(Root(asked.root), record.versions)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        if not (folder / RECORD).exists():
            write_whole(folder / RECORD, json.dumps(record.to_json(), indent=1))
    return _begun(folder, asked, held)


def _baseline(folder: Path, record: Record) -> Baseline:
    """What predicts the held-out targets without a model, counted once for a run."""
    path = folder / BASELINE
    try:
        return Baseline(**json.loads(path.read_text()))
    except (FileNotFoundError, ValueError, TypeError):
        pass  # counted again
    held_out = held_out_batches(record)
    objective = record.build().objective
    objective.prepare(Root(record.settings.root), record.versions)
    with evaluation_draws(record.settings.seed) as generator:
        baseline = objective.baseline(one_epoch(record, max_steps=_COUNTED), held_out, generator)
    write_whole(path, json.dumps(asdict(baseline)))
    return baseline


def _report(folder: Path, record: Record, baseline: Baseline, reached: int) -> dict[str, Any]:
    lines = read_log(folder)
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    held_out = [line for line in lines if "held_out/loss" in line]
    best = min(held_out, key=lambda line: line["held_out/loss"])
    report = {
        "steps": reached,
        "of": record.settings.steps,
        "layout": record.settings.layout,
        "objective": record.objective,
        "parameters": num_parameters(record.build().objective),
        "targets": int(sum(line.get("train/targets", 0) for line in lines)),
        "train_loss": sum(losses[-50:]) / max(1, len(losses[-50:])),
        "held_out_loss": held_out[-1]["held_out/loss"],
        "best_held_out_loss": best["held_out/loss"],
        "best_step": best["step"],
        "parts": best.get("parts", {}),
        "baseline": baseline.name,
        "baseline_loss": baseline.nats,
        "baseline_targets": baseline.num_targets,
        "baseline_steps_at_most": _COUNTED,
    }
    write_whole(folder / REPORT, json.dumps(report, indent=1))
    draw_loss(folder, f"{record.settings.layout}, objective {record.objective}", (baseline.name, baseline.nats))
    return report


def _shown(means: Means, progress: TrainProgress) -> Means:
    def on_step(step: int, loss: float, num_tokens: int) -> None:
        progress.advance(step, loss, num_tokens)
        means.on_step(step, loss, num_tokens)

    return replace(means, on_step=on_step)
