"""Codebooks for codec training: moving averages, dead codes, dropout, ranks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from wavemill.tokenizers.ema import EmaCodebooks, EmaPlan
from wavemill.tokenizers.quantize import ResidualQuantizer

PLAN = EmaPlan(dim=6, size=16, num_stages=3)


def batch(seed: int, num: int = 512, *, shift: float = 0.0) -> Tensor:
    """Frames around eight places that move with `shift`."""
    places_PD = 4 * torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    near_ND = places_PD[torch.randint(8, (num,), generator=generator)]
    return near_ND + shift + 0.5 * torch.randn(num, 6, generator=generator)


def trained(plan: EmaPlan, steps: int, *, drift: float = 0.0) -> EmaCodebooks:
    codebooks = EmaCodebooks(plan).train()
    for step in range(steps):
        codebooks(batch(step, shift=drift * step))
    return codebooks


def test_the_averages_follow_the_papers_rule() -> None:
    plan = EmaPlan(dim=6, size=16, num_stages=2, replace_below=0.0)
    codebooks = trained(plan, 1)
    centroids = codebooks.centroids.double().clone()
    counts, sums = codebooks.counts.double().clone(), codebooks.sums.double().clone()
    for step in range(1, 6):
        frames_ND = batch(step)
        codebooks(frames_ND)
        residual_ND = frames_ND.double()
        for stage in range(2):
            codes_N = torch.cdist(residual_ND, centroids[stage]).argmin(dim=1)
            chosen_ND = centroids[stage][codes_N].clone()
            for code in range(16):
                mine = residual_ND[codes_N == code]
                counts[stage, code] = 0.99 * counts[stage, code] + 0.01 * len(mine)
                sums[stage, code] = 0.99 * sums[stage, code] + 0.01 * mine.sum(dim=0)
            total = counts[stage].sum()
            smoothed_C = (counts[stage] + 1e-5) / (total + 16e-5) * total
            centroids[stage] = sums[stage] / smoothed_C[:, None]
            residual_ND = residual_ND - chosen_ND
    assert torch.allclose(codebooks.centroids.double(), centroids, atol=1e-4)
    assert torch.allclose(codebooks.counts.double(), counts, rtol=1e-4)


def test_dead_codes_become_frames_of_the_batch() -> None:
    codebooks = trained(EmaPlan(dim=6, size=16, num_stages=1), 3)
    codebooks.counts[0, 5] = codebooks.counts[0, 9] = 0.1
    frames_ND = batch(99)
    codebooks(frames_ND)
    for code in (5, 9):
        assert (frames_ND == codebooks.centroids[0, code]).all(dim=1).any()
        assert codebooks.counts[0, code] == 2
    assert not torch.equal(codebooks.centroids[0, 5], codebooks.centroids[0, 9])


def test_replaced_codes_keep_up_with_a_stream_that_drifts() -> None:
    error, used = {}, {}
    for least in (2.0, 0.0):
        plan = EmaPlan(dim=6, size=16, num_stages=1, decay=0.9, replace_below=least)
        codebooks = trained(plan, 150, drift=0.3).eval()
        frames_ND = batch(1_000, num=2_000, shift=45.0)
        quantized, codes, _ = codebooks(frames_ND)
        error[least] = float((quantized - frames_ND).square().sum(dim=1).mean())
        used[least] = len(codes.unique())
    assert used[2.0] >= 8 > used[0.0]
    assert error[2.0] < 0.7 * error[0.0]


def test_gradients_pass_straight_through_and_the_commitment_pulls_towards_centroids() -> None:
    codebooks = trained(PLAN, 2)
    frames = batch(7).view(4, 128, 6).requires_grad_()
    quantized, codes, commitment = codebooks(frames)
    assert codes.shape == (3, 4, 128)
    weights = torch.randn(4, 128, 6, generator=torch.Generator().manual_seed(0))
    [gradient] = torch.autograd.grad((quantized * weights).sum(), frames, retain_graph=True)
    assert torch.equal(gradient, weights)
    [gradient] = torch.autograd.grad(commitment, frames)
    with torch.no_grad():
        nearer = EmaCodebooks(PLAN)
        nearer.load_state_dict(codebooks.state_dict())
        before, after = (nearer.eval()(each)[2] for each in (frames, frames - 50 * gradient))
    assert after < before
    assert not list(codebooks.parameters())


def test_codes_are_those_of_a_stream_of_the_same_codebooks() -> None:
    codebooks = trained(PLAN, 5).eval()
    before = codebooks.to_codebook_tensor()
    frames_ND = batch(11)
    quantized, codes_QN, _ = codebooks(frames_ND)
    quantizer = ResidualQuantizer(before)
    assert torch.equal(codes_QN, quantizer.encode(frames_ND))
    assert torch.equal(codebooks.encode(frames_ND, num_stages=2), codes_QN[:2])
    assert torch.allclose(quantized, quantizer.decode(codes_QN), atol=1e-5)
    assert torch.allclose(codebooks.decode(codes_QN), quantizer.decode(codes_QN))
    assert torch.equal(codebooks.to_codebook_tensor(), before)


def test_padding_teaches_nothing() -> None:
    frames_ND = batch(3)
    padded = torch.cat([frames_ND.view(4, 128, 6), torch.full((4, 40, 6), 1e3)], dim=1)
    valid = torch.cat([torch.ones(4, 128, dtype=torch.bool), torch.zeros(4, 40, dtype=torch.bool)], dim=1)
    alone, beside = EmaCodebooks(PLAN).train(), EmaCodebooks(PLAN).train()
    told, told_padded = alone(frames_ND), beside(padded, valid=valid)
    assert torch.allclose(alone.centroids, beside.centroids, atol=1e-5)
    assert torch.equal(told.codes.view(3, 4, 128), told_padded.codes[:, :, :128])
    assert torch.allclose(told.commitment, told_padded.commitment)


def test_dropout_draws_its_numbers_of_stages_and_leaves_the_others_alone() -> None:
    codebooks = EmaCodebooks(EmaPlan(dim=6, size=16, num_stages=4, drawn_from=(1, 3))).train()
    drawn = {len(codebooks(batch(step)).codes) for step in range(12)}
    assert drawn == {1, 3}
    assert codebooks.started.tolist() == [True, True, True, False]
    assert len(codebooks.eval()(batch(0)).codes) == 4
    assert len(codebooks.train()(batch(0), num_stages=2).codes) == 2


def test_training_that_is_resumed_goes_on_as_if_it_had_not_stopped() -> None:
    plan = EmaPlan(dim=6, size=16, num_stages=3, drawn_from=(1, 2, 3), replace_below=4.0)
    whole = trained(plan, 8)
    half = trained(plan, 4)
    resumed = EmaCodebooks(plan)
    resumed.load_state_dict(half.state_dict())
    resumed.train()
    for step in range(4, 8):
        resumed(batch(step))
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


@pytest.mark.slow
def test_ranks_keep_the_same_codebooks_and_learn_what_one_would_of_all_frames(tmp_path: Path) -> None:
    code = (
        "import sys, torch, torch.distributed as dist\n"
        "sys.path.insert(0, sys.argv[3])\n"
        "from test_ema import EmaCodebooks, EmaPlan, batch\n"
        "torch.set_num_threads(1)\n"
        "rank, folder = int(sys.argv[1]), sys.argv[2]\n"
        "dist.init_process_group('gloo', init_method=f'file://{folder}/meet', rank=rank, world_size=2)\n"
        "codebooks = EmaCodebooks(EmaPlan(dim=6, size=16, num_stages=2, replace_below=3.0)).train()\n"
        "for step in range(6): codebooks(batch(2 * step + rank, shift=0.5 * step))\n"
        "torch.save(codebooks.state_dict(), f'{folder}/{rank}.pt')\n"
        "dist.destroy_process_group()\n"
    )
    arguments = [str(tmp_path), str(Path(__file__).parent)]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [
        subprocess.Popen([sys.executable, "-c", code, str(rank), *arguments], env=environment) for rank in range(2)
    ]
    assert [rank.wait(timeout=200) for rank in ranks] == [0, 0]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    assert first["counts"].sum(dim=1).min() > 900  # of 2 x 512 frames
