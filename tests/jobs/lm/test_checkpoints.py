"""Checkpoints are whole or not there, and give back the very same weights and optimizer."""

import multiprocessing
import shutil
import signal
from pathlib import Path

import pytest
import torch
from torch import nn
from wavemill.jobs.lm.checkpoints import (
    checkpoint_of,
    newest_checkpoint,
    remove_half_written,
    save_checkpoint,
    weights_of,
)
from wavemill.storage import failpoints
from wavemill.tokenizers.spec import UserError


class Tied(nn.Module):
    """Two layers of one matrix, a buffer, and a parameter that never learns."""

    def __init__(self, seed: int = 0, width: int = 4) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)
        self.second.weight = self.first.weight
        self.register_buffer("seen", torch.zeros(1))
        self.idle = nn.Parameter(torch.randn(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += 1
        return self.second(self.first(x).tanh())


def learn(module: Tied, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        module(torch.ones(3, 4)).square().sum().backward()
        optimizer.step()


def adam(module: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(module.parameters(), lr=0.01)


def save(run: Path, step: int, best: int | None = None) -> None:
    module = Tied()
    save_checkpoint(run, step, module, adam(module), {"said": step}, best=best)


def steps(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_what_goes_on_from_a_checkpoint_goes_where_it_would_have(tmp_path: Path):
    module = Tied()
    optimizer = adam(module)
    learn(module, optimizer, 3)
    save_checkpoint(tmp_path, 3, module, optimizer, {"loader": {"slot": 7}}, best=None)
    learn(module, optimizer, 2)
    again = Tied(seed=1)
    other = adam(again)
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert found.told["loader"] == {"slot": 7}
    found.load_weights(again)
    found.load_optimizer(other, again)
    assert again.second.weight is again.first.weight
    learn(again, other, 2)
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_the_last_two_are_kept_and_the_best(tmp_path: Path):
    for step in (10, 20, 30, 40, 50):
        save(tmp_path, step, best=20)
    assert steps(tmp_path) == ["step-00000020", "step-00000040", "step-00000050"]
    save(tmp_path, 60, best=60)
    assert steps(tmp_path) == ["step-00000050", "step-00000060"]


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["gone", "cut", "flipped"])
def test_a_torn_one_is_passed_over(tmp_path: Path, file: str, damage: str):
    save(tmp_path, 10)
    save(tmp_path, 20)
    path = tmp_path / "checkpoints" / "step-00000020" / file
    content = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(content[:-1])
    else:
        content[len(content) // 2] ^= 255
        path.write_bytes(content)
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 10
    assert checkpoint_of(tmp_path, 20) is None
    save(tmp_path, 15)  # the run goes on: what was torn is gone, what is whole has stayed
    assert steps(tmp_path) == ["step-00000010", "step-00000015"]


def test_a_process_that_dies_while_it_writes_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save(tmp_path, 10)
    monkeypatch.setitem(failpoints._SPEC, "checkpoint-half-written", "kill")
    process = multiprocessing.get_context("fork").Process(target=save, args=(tmp_path, 20))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 10
    monkeypatch.delitem(failpoints._SPEC, "checkpoint-half-written")
    save(tmp_path, 20)
    remove_half_written(tmp_path)
    assert steps(tmp_path) == ["step-00000010", "step-00000020"]


def test_weights_of_another_model_are_refused(tmp_path: Path):
    save(tmp_path, 10)
    found = newest_checkpoint(tmp_path)
    assert found is not None
    with pytest.raises(UserError, match="those of another model"):
        found.load_weights(Tied(width=5))
    assert set(weights_of(Tied())) == {"idle", "seen", "first.weight", "first.bias", "second.bias"}


def test_a_run_without_checkpoints_has_none(tmp_path: Path):
    assert newest_checkpoint(tmp_path) is None
    save(tmp_path, 10)
    shutil.rmtree(tmp_path / "checkpoints" / "step-00000010")
    assert newest_checkpoint(tmp_path) is None
