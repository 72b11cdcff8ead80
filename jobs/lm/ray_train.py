"""A training run on Ray Train: the only file that knows `ray.train`. Processes share each step's sequences."""

import contextlib
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ...tokenizers.spec import RunFailed, UserError
from ..ray_engine import connect_ray
from .checkpoints import newest_checkpoint
from .reports import LOG, read_log_from
from .settings import Record
from .train import Means, World, train

_LOOK_S = 1.0  # between looks at the log


def train_on_ray(
    record: Record,
    folder: Path,
    means: Means,
    *,
    num_workers: int,
    address: str | None,
    on_step: Callable[[int, float, int], None],
) -> int:
    """Train on so many workers; the step that was reached. The folder is one that all of them see.

    Raises `UserError` as `train` does, and `RunFailed` if workers cannot be had or die.
    """
    on_gpu = means.device.startswith("cuda")
    with contextlib.ExitStack() as cleanup:
        cleanup.enter_context(contextlib.redirect_stdout(sys.stderr))  # Ray Train tells of itself on stdout
        ray = connect_ray(address, num_cpus=num_workers + 1, cleanup=cleanup)
        cleanup.callback(ray.shutdown)
        import ray.train
        import ray.train.torch

        kept = folder / ".ray"  # Ray Train's own notes
        cleanup.callback(shutil.rmtree, kept, ignore_errors=True)
        cleanup.enter_context(_followed(folder, on_step))
        trainer = ray.train.torch.TorchTrainer(
            _worker,
            train_loop_config={
                "record": record.to_json(),
                "folder": str(folder),
                "loader_workers": means.num_workers,
                "minutes": means.minutes,
            },
            scaling_config=ray.train.ScalingConfig(num_workers=num_workers, use_gpu=on_gpu),
            run_config=ray.train.RunConfig(name="run", storage_path=str(kept)),
            torch_config=ray.train.torch.TorchConfig(backend="cpu:gloo,cuda:nccl" if on_gpu else "gloo"),
        )
        try:
            trainer.fit()
        except ray.train.TrainingFailedError as error:
            failures = getattr(error, "worker_failures", {})
            for failure in failures.values():  # what a worker raised comes wrapped
                if isinstance(cause := getattr(failure, "_base_exc", failure), UserError):
                    raise cause from error
            told = str(error).strip().splitlines()[-1][:300]
            raise RunFailed(
                f"Training on Ray has failed: {told}. Run it again: it goes on from the last checkpoint."
            ) from error
    newest = newest_checkpoint(folder)
    if newest is None:
        raise UserError(
            f"The workers are done, and there is no checkpoint in {folder} on this machine: they have written theirs "
            "elsewhere. Name a folder with --to that all machines see."
        )
    return newest.step


def _worker(config: dict[str, Any]) -> None:
    """What each of Ray Train's workers does; its process group is there already."""
    import ray.train
    import ray.train.torch

    context = ray.train.get_context()
    world = World(rank=context.get_world_rank(), size=context.get_world_size())
    device = str(ray.train.torch.get_device())
    means = Means(world=world, device=device, num_workers=config["loader_workers"], minutes=config["minutes"])
    train(Record.from_json(config["record"]), Path(config["folder"]), means)


@contextlib.contextmanager
def _followed(folder: Path, on_step: Callable[[int, float, int], None]) -> Iterator[None]:
    """Tell of steps as the first worker logs them, which puts a log of its own in the place of what was there."""
    done = threading.Event()
    newest, before = newest_checkpoint(folder), _log_file(folder)
    begin = 0 if newest is None else newest.step

    def follow() -> None:
        told, place = begin, 0
        while not done.wait(_LOOK_S):
            if _log_file(folder) == before:
                continue
            lines, place = read_log_from(folder, place)
            for line in lines:
                if line["step"] > told and "train/loss" in line:
                    told = line["step"]
                    on_step(told, line["train/loss"], int(line["train/targets"]))

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _log_file(folder: Path) -> int | None:
    """What tells a log from the one in its place before; None if there is none."""
    try:
        return (folder / LOG).stat().st_ino
    except FileNotFoundError:
        return None
