"""Training runs: the same however they are interrupted and shared, held apart from what they are judged by."""

import dataclasses
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from toy_stream import make_roots
from wavemill.jobs.lm.checkpoints import newest_checkpoint
from wavemill.jobs.lm.data import endless, held_out_batches, new_record, training_part
from wavemill.jobs.lm.model import ModelConfig
from wavemill.jobs.lm.objectives import Loss
from wavemill.jobs.lm.settings import Record, TrainSettings, placed, read_record
from wavemill.jobs.lm.train import Learner, Means, World, learning_rate, train
from wavemill.jobs.train_lm import load_run, train_lm
from wavemill.storage.batches import PackedBatch
from wavemill.tokenizers.spec import UserError

MakeOnce = Callable[[str, Callable[[Path], None]], Path]
MODEL = ModelConfig(dim=16, num_layers=1, num_heads=2, dropout=0.2)


@pytest.fixture(scope="module")
def root(made_once: MakeOnce) -> str:
    return make_roots(made_once)[0]


@pytest.fixture(scope="module")
def settings(root: str) -> TrainSettings:
    """Of twenty steps over more than one epoch, whose evaluations have no say in when weights are kept."""
    return TrainSettings(
        root=root,
        layout="flatten:stream=toy",
        model=MODEL,
        steps=20,
        batch_size=16,
        length=64,
        warmup=5,
        held_out_batches=2,
        evaluate_every=20,
        save_every=5,
    )


def stopped_after(steps: int) -> Means:
    """Minutes that are over after so many steps."""
    times: Iterator[float] = iter([0.0] * steps + [1e9])
    return Means(minutes=1.0, clock=lambda: next(times))


def weights(run: Path, step: int) -> dict[str, Tensor]:
    folder = run / "checkpoints" / f"step-{step:08d}"
    return {
        f"{file}/{name}": tensor
        for file in ("model", "optimizer")
        for name, tensor in load_file(folder / f"{file}.safetensors").items()
    }


def losses(run: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [(line["step"], line["train/loss"]) for line in lines if "train/loss" in line]


def require_same_runs(one: Path, other: Path, step: int = 20) -> None:
    assert losses(one) == losses(other)
    assert [each for each, _ in losses(one)] == list(range(1, step + 1))
    assert (one / "log.jsonl").read_bytes() == (other / "log.jsonl").read_bytes()  # evaluations, too
    best, of_other = ((run / f"checkpoints/step-{step:08d}/state.json").read_text() for run in (one, other))
    assert json.loads(best)["best"] == json.loads(of_other)["best"]
    ours, theirs = weights(one, step), weights(other, step)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture(scope="module")
def undisturbed(settings: TrainSettings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "undisturbed"
    train_lm(settings, str(run), Means())
    return run


class Halted(Exception):
    """Somebody pulls the plug."""


def halt_in_step_13(step: int, loss: float, num_tokens: int) -> None:
    if step == 13:
        raise Halted


def test_a_run_that_was_stopped_goes_on_bit_for_bit(settings: TrainSettings, undisturbed: Path, tmp_path: Path):
    report = train_lm(settings, str(tmp_path / "run"), stopped_after(7))  # neither evaluated nor kept then
    assert (report["steps"], report["of"]) == (7, 20)
    assert train_lm(settings, str(tmp_path / "run"), Means(num_workers=1))["steps"] == 20
    require_same_runs(tmp_path / "run", undisturbed)


def test_a_run_that_ends_between_checkpoints_goes_on_bit_for_bit(
    settings: TrainSettings, undisturbed: Path, tmp_path: Path
):
    with pytest.raises(Halted):
        train_lm(settings, str(tmp_path / "run"), Means(on_step=halt_in_step_13))
    assert losses(tmp_path / "run")[-1][0] == 13  # the checkpoint is of step 10
    train_lm(settings, str(tmp_path / "run"), Means())
    require_same_runs(tmp_path / "run", undisturbed)


@pytest.mark.slow
def test_a_run_that_is_killed_anywhere_goes_on_bit_for_bit(settings: TrainSettings, undisturbed: Path, tmp_path: Path):
    run = tmp_path / "run"
    for failpoint in ("lm-step-done=kill@13", "checkpoint-half-written=kill@1", "lm-step-done=kill@1"):
        asked = f"TrainSettings.from_json({settings.to_json()!r})"
        done = in_a_process(
            f"from test_train import *; train_lm({asked}, {str(run)!r}, Means())", WAVEMILL_FAILPOINTS=failpoint
        )
        assert done.returncode == -signal.SIGKILL, done.stderr
    train_lm(settings, str(run), Means())
    require_same_runs(run, undisturbed)


def in_a_process(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    paths = f"{Path(__file__).parent}:{Path(__file__).parents[2]}"
    settings = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([sys.executable, "-c", code], env=settings, capture_output=True, text=True, check=False)


def test_a_run_says_how_it_went_and_running_it_again_changes_nothing(settings: TrainSettings, undisturbed: Path):
    report = json.loads((undisturbed / "report.json").read_text())
    assert report["steps"] == 20
    assert report["best_held_out_loss"] <= report["held_out_loss"]
    assert report["baseline_targets"] == sum(
        int(((batch.segment_ids[:, 1:] == batch.segment_ids[:, :-1]) & batch.loss_mask[:, 1:]).sum())
        for batch in held_out_batches(new_record(settings))
    )
    names = {path.name for path in undisturbed.iterdir() if not path.name.startswith(("events.out.tfevents", "."))}
    assert names == {"run.json", "log.jsonl", "baseline.json", "report.json", "loss.png", "checkpoints"}
    assert (undisturbed / "loss.png").read_bytes().startswith(b"\x89PNG")
    before = {path: path.read_bytes() for path in undisturbed.rglob("*") if path.is_file()}
    assert train_lm(settings, str(undisturbed), Means()) == report
    assert {path: path.read_bytes() for path in undisturbed.rglob("*") if path.is_file()} == before


def test_a_trained_model_is_read_back_without_its_dataset(settings: TrainSettings, undisturbed: Path):
    batch = held_out_batches(new_record(settings))[0]
    record, objective = load_run(str(undisturbed))
    assert record.settings.layout == settings.layout
    assert not objective.training
    loss = objective.loss(batch, torch.Generator())
    state = weights(undisturbed, 20)
    for name, tensor in objective.state_dict().items():
        assert torch.equal(tensor, state[f"model/{name}"])
    assert loss.num_targets > 0
    with pytest.raises(UserError, match=r"no checkpoint of step 7 in .*; the newest is of 20"):
        load_run(str(undisturbed), step=7)
    with pytest.raises(UserError, match="no trained model"):
        load_run(str(undisturbed / "nowhere"))


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"seed": 1}, "--seed 0, now it is 1"),
        ({"model": dataclasses.replace(MODEL, num_layers=2)}, "--layers 1, now it is 2"),
        ({"steps": 40}, "--steps 20, now it is 40"),
        ({"options": {"depth": "3"}}, "--objective next, now it is next,depth=3"),
        ({"model": dataclasses.replace(MODEL, tied=False)}, "--tied, now it is --no-tied"),
        ({"layout": "flatten:stream=toy,ends=true"}, "--layout"),
    ],
)
def test_other_settings_are_refused(settings: TrainSettings, undisturbed: Path, changed: dict[str, Any], told: str):
    with pytest.raises(UserError, match=told):
        train_lm(dataclasses.replace(settings, **changed), str(undisturbed), Means())


def test_the_default_objective_may_be_named_or_left_out(settings: TrainSettings, undisturbed: Path):
    named = dataclasses.replace(settings, objective="next")
    assert train_lm(named, str(undisturbed), Means())["objective"] == "next"


def test_root_and_models_folder_are_kept_as_they_are_from_anywhere(
    settings: TrainSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    given = dataclasses.replace(settings, root="dataset", options={"model": "model"})
    told = placed(given)
    assert (told.root, told.options) == (str(tmp_path / "dataset"), {"model": str(tmp_path / "model")})
    assert placed(dataclasses.replace(given, options={"model": "org/model"})).options == {"model": "org/model"}
    assert placed(dataclasses.replace(given, options={})).options == {}
    assert placed(told) == told


def test_a_run_with_a_relative_root_goes_on_from_another_folder(
    settings: TrainSettings, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(Path(settings.root).parent)
    relative = dataclasses.replace(settings, root=Path(settings.root).name)
    train_lm(relative, str(tmp_path / "run"), stopped_after(7))
    monkeypatch.chdir(tmp_path)
    record = read_record(tmp_path / "run")
    assert record is not None
    train(record, tmp_path / "run", Means())  # as a worker elsewhere does
    require_same_runs(tmp_path / "run", undisturbed)


def test_a_run_that_was_killed_as_it_began_begins_again(settings: TrainSettings, undisturbed: Path, tmp_path: Path):
    run, short = tmp_path / "run", dataclasses.replace(settings, steps=1)
    run.mkdir()
    (run / ".run.json").write_text('{"form')
    (run / ".lock").touch()
    train_lm(short, str(run), Means())
    counted = (run / "baseline.json").read_text()
    for torn in ('{"nats": 1', "", "{}"):
        (run / "baseline.json").write_text(torn)
        train_lm(short, str(run), Means())
        assert (run / "baseline.json").read_text() == counted


def test_a_second_start_in_the_same_folder_is_refused(settings: TrainSettings, tmp_path: Path):
    started = []

    def start_again(step: int, loss: float, num_tokens: int) -> None:
        if step == 2:
            code = f"from test_train import *; train_lm(TrainSettings.from_json({settings.to_json()!r}), "
            started.append(in_a_process(f"{code}{str(tmp_path / 'run')!r}, Means())"))

    half = tmp_path / "run" / "checkpoints" / ".step-00000001.7"
    half.mkdir(parents=True)
    (tmp_path / "run" / "run.json").write_text(json.dumps(new_record(settings).to_json()))
    train_lm(settings, str(tmp_path / "run"), dataclasses.replace(stopped_after(3), on_step=start_again))
    assert started[0].returncode == 1
    assert "Another process is training in" in started[0].stderr
    assert not half.exists()


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_what_is_not_finite_is_told_before_it_gets_into_the_weights(
    what: str, settings: TrainSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    learner = Learner(new_record(settings), Means())
    before = {name: each.clone() for name, each in learner.objective.state_dict().items()}
    honest = learner.objective.loss

    def loss(batch: PackedBatch, generator: torch.Generator) -> Loss:
        found = honest(batch, generator)
        nats = float("nan") if what == "loss" else found.nats
        return dataclasses.replace(found, total=found.total * float("inf"), nats=nats)

    monkeypatch.setattr(learner.objective, "loss", loss)
    batch = next(endless(training_part(new_record(settings))))
    told = "The loss is nan in step 1" if what == "loss" else "The norm of the gradient is (nan|inf) in step 1"
    with pytest.raises(UserError, match=told):
        learner.learn(batch)
    assert all(torch.equal(each, before[name]) for name, each in learner.objective.state_dict().items())


def test_a_checkpoint_whose_held_out_loss_is_not_finite_is_not_kept(
    settings: TrainSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    honest = Learner.evaluate

    def evaluate(self: Learner, batches: Any) -> Loss:
        found = honest(self, batches)
        return dataclasses.replace(found, nats=float("nan")) if self.step == 4 else found

    monkeypatch.setattr(Learner, "evaluate", evaluate)
    often = dataclasses.replace(settings, evaluate_every=2, save_every=1)
    with pytest.raises(UserError, match="The held-out loss is nan in step 4"):
        train_lm(often, str(tmp_path / "run"), Means())
    newest = newest_checkpoint(tmp_path / "run")
    assert newest is not None
    assert newest.step == 3
    assert newest.told["best"]["step"] in (0, 2)


def test_no_clipping_is_clipping_at_0(settings: TrainSettings, tmp_path: Path):
    runs = {}
    for clip in (0.0, 1e9):
        train_lm(dataclasses.replace(settings, steps=2, clip=clip), str(tmp_path / str(clip)), Means())
        runs[clip] = weights(tmp_path / str(clip), 2)
    assert all(torch.equal(tensor, runs[1e9][name]) for name, tensor in runs[0.0].items())


def test_a_folder_of_something_else_is_left_alone(settings: TrainSettings, tmp_path: Path):
    (tmp_path / "letter.txt").write_text("Dear")
    with pytest.raises(UserError, match="is not empty, and no training run"):
        train_lm(settings, str(tmp_path), Means())
    with pytest.raises(UserError, match="a folder of this machine"):
        train_lm(settings, "s3://bucket/run", Means())
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


def ids(batches: Iterator[PackedBatch] | list[PackedBatch]) -> set[str]:
    return {id_ for batch in batches for sequence in batch.ids for id_ in sequence}


def test_no_held_out_segment_is_learnt_from_and_a_tenth_is_held_out(settings: TrainSettings):
    record = new_record(dataclasses.replace(settings, held_out_batches=1_000))
    held_out, learnt = ids(held_out_batches(record)), ids(list(training_part(record)))  # type: ignore[arg-type]
    assert not held_out & learnt
    assert len(held_out) == pytest.approx((len(held_out) + len(learnt)) / 10, abs=1)


def test_epochs_follow_one_another_in_other_orders(settings: TrainSettings):
    record = new_record(settings)
    part = training_part(record)
    num_batches = -(-part.count_sequences() // settings.batch_size)
    batches = list(islice(endless(part), 2 * num_batches))
    first, second = batches[:num_batches], batches[num_batches:]
    assert ids(first) == ids(second)
    assert not torch.equal(first[0].tokens, second[0].tokens)


def test_the_learning_rate_rises_and_falls_to_a_tenth(settings: TrainSettings):
    rates = [learning_rate(step, settings) for step in range(20)]
    assert rates[:5] == sorted(rates[:5])
    assert rates[4] == rates[5] == settings.learning_rate
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert learning_rate(20, settings) == pytest.approx(settings.learning_rate / 10)


def learn_as_one_of(rank: int, size: int, record: Record, run: Path) -> None:
    store = torch.distributed.FileStore(str(run / "store"), size)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=size)
    train(record, run, Means(world=World(rank=rank, size=size)))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_learn_what_one_does(settings: TrainSettings, tmp_path: Path):
    settings = dataclasses.replace(settings, model=dataclasses.replace(MODEL, dropout=0.0), batch_size=2, steps=4)
    record, runs = new_record(settings), (tmp_path / "one", tmp_path / "two")
    for run in runs:
        run.mkdir()
    train(record, runs[0], Means())
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=learn_as_one_of, args=(rank, 2, record, runs[1])) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    require_near(runs[0], runs[1], 4)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_workers_of_ray_train_learn_what_one_process_does(
    settings: TrainSettings, tmp_path: Path, ray_alone: None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(Path(settings.root).parent)  # workers have a working directory of their own
    settings = dataclasses.replace(settings, root=Path(settings.root).name)
    settings = dataclasses.replace(settings, model=dataclasses.replace(MODEL, dropout=0.0), batch_size=2, steps=4)
    train_lm(settings, str(tmp_path / "one"), Means())
    report = train_lm(settings, str(tmp_path / "two"), Means(), ray_workers=2)
    assert report["steps"] == 4
    require_near(tmp_path / "one", tmp_path / "two", 4)


def require_near(one: Path, other: Path, step: int) -> None:
    for (_, ours), (_, theirs) in zip(losses(one), losses(other), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    found = weights(other, step)
    for name, tensor in weights(one, step).items():
        if name.startswith("model/"):
            assert torch.allclose(tensor, found[name], rtol=1e-3, atol=1e-4), name


def test_batches_that_cannot_be_shared_are_told(settings: TrainSettings):
    with pytest.raises(UserError, match=r"--batch-size 16 cannot be shared by 3 workers"):
        training_part(new_record(settings), rank=0, world_size=3)
