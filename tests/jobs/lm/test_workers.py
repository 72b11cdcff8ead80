"""Workers of one run agree on where it stands, and their first one's log is followed."""

import json
import multiprocessing
import threading
from pathlib import Path

import pytest
import torch
from test_checkpoints import save
from wavemill.jobs.lm import ray_train
from wavemill.jobs.lm.checkpoints import write_whole
from wavemill.jobs.lm.train import World, _same_checkpoint
from wavemill.tokenizers.spec import UserError


def look_as_one_of(rank: int, folders: list[Path], told: Path) -> None:
    store = torch.distributed.FileStore(str(told / "store"), 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    try:
        checkpoint = _same_checkpoint(folders[rank], World(rank=rank, size=2))
        (told / str(rank)).write_text(f"step {checkpoint.step if checkpoint else 0}")
    except UserError as error:
        (told / str(rank)).write_text(str(error))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("other", ["same", "behind", "empty"])
def test_processes_that_see_other_checkpoints_do_not_go_on(other: str, tmp_path: Path):
    folders = [tmp_path / "same", tmp_path / other]
    save(folders[0], 10)
    save(folders[0], 20)
    if other == "behind":
        save(folders[1], 10)
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=look_as_one_of, args=(rank, folders, tmp_path)) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    told = [(tmp_path / str(rank)).read_text() for rank in (0, 1)]
    expected = {
        "same": "step 20",
        "behind": "step 20 for one, and of step 10 for another",
        "empty": "step 20 for one, and not there for another",
    }
    assert all(expected[other] in each for each in told), told


def test_the_live_line_shows_no_steps_of_before_and_passes_over_what_is_torn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(ray_train, "_LOOK_S", 0.01)
    lines = [json.dumps({"step": step, "train/loss": 1.0, "train/targets": 3.0}) + "\n" for step in range(1, 9)]
    (tmp_path / "log.jsonl").write_text("".join(lines))  # of a run that was killed before its first checkpoint
    shown, is_new = list[int](), threading.Event()

    def on_step(step: int, loss: float, num_tokens: int) -> None:
        shown.append(step)
        if step == 2:
            is_new.set()

    with ray_train._followed(tmp_path, on_step):
        assert not is_new.wait(0.2)
        assert not shown
        write_whole(tmp_path / "log.jsonl", "".join([lines[0], '{"step": 2, "tra\n', lines[1]]))
        assert is_new.wait(20)
    assert shown == [1, 2]
