"""DAC's quantizer against its published form, worked out in float64 and by transformers.

Axes: T frames, D dimensions of a latent, Q stages, S codes of one, E dimensions of one.
"""

from typing import Any

import pytest
import torch
import weights_dac
from torch import Tensor
from torch.nn import functional
from transformers import DacConfig
from transformers.models.dac.modeling_dac import DacResidualVectorQuantizer
from wavemill.tokenizers.compare import NEAR_TIE
from wavemill.tokenizers.factorized import FactorizedQuantizer

DIM, STAGES, SIZE = 96, 5, 64


@pytest.fixture(scope="module")
def latents_TD() -> Tensor:
    mixing_DD = torch.randn(DIM, DIM, generator=torch.Generator().manual_seed(1)) / DIM**0.5
    return torch.randn(1_500, DIM, generator=torch.Generator().manual_seed(2)) @ mixing_DD


@pytest.fixture(scope="module")
def published(latents_TD: Tensor) -> Any:
    torch.manual_seed(3)
    config = DacConfig(hidden_size=DIM, n_codebooks=STAGES, codebook_size=SIZE, codebook_dim=8)
    quantizer = DacResidualVectorQuantizer(config).eval().requires_grad_(False)
    weights_dac.fit_stages(quantizer.quantizers, latents_TD)
    return quantizer


@pytest.fixture(scope="module")
def ours(published: Any) -> FactorizedQuantizer:
    return FactorizedQuantizer(list(published.quantizers))


def codes_in_float64(published: Any, latents_TD: Tensor) -> Tensor:
    """Each stage projects what is left, compares cosines, and takes the vector projected back from what is left."""
    residual_TD, codes = latents_TD.double(), []
    for stage in published.quantizers:
        into_ED, back_DE = stage.in_proj.weight[..., 0].double(), stage.out_proj.weight[..., 0].double()
        codebook_SE = stage.codebook.weight.double()
        projected_TE = residual_TD @ into_ED.t() + stage.in_proj.bias.double()
        codes_T = (functional.normalize(projected_TE) @ functional.normalize(codebook_SE).t()).argmax(dim=1)
        residual_TD = residual_TD - (codebook_SE[codes_T] @ back_DE.t() + stage.out_proj.bias.double())
        codes.append(codes_T)
    return torch.stack(codes)


def require_same(ours: FactorizedQuantizer, latents_TD: Tensor, theirs_QT: Tensor) -> None:
    """Frames may differ from a near-tie on, and few do."""
    different_QT = ours.encode(latents_TD) != theirs_QT
    frames_F = different_QT.any(dim=0).nonzero()[:, 0]
    first_F = different_QT[:, frames_F].int().argmax(dim=0)
    assert (ours.gaps(latents_TD)[first_F, frames_F] < NEAR_TIE).all()
    assert len(frames_F) <= 2


def test_codes_are_those_of_what_is_left_projected_stage_by_stage(
    ours: FactorizedQuantizer, published: Any, latents_TD: Tensor
) -> None:
    codes_QT = ours.encode(latents_TD)
    assert codes_QT.shape == (STAGES, len(latents_TD))
    assert codes_QT.dtype == torch.int64
    assert min(len(codes_T.unique()) for codes_T in codes_QT) > SIZE // 2
    require_same(ours, latents_TD, codes_in_float64(published, latents_TD))
    require_same(ours, latents_TD, published(latents_TD.t()[None])[1][0])


def test_latents_far_from_nought_have_the_codes_of_float64_too(
    ours: FactorizedQuantizer, published: Any, latents_TD: Tensor
) -> None:
    for changed_TD in (latents_TD * 1e-3, latents_TD * 30, latents_TD + 1.0):
        require_same(ours, changed_TD, codes_in_float64(published, changed_TD))


def test_fewer_stages_give_the_first_codes(ours: FactorizedQuantizer, published: Any, latents_TD: Tensor) -> None:
    codes_QT = ours.encode(latents_TD)
    for num_stages in (1, 2):
        few = FactorizedQuantizer(list(published.quantizers[:num_stages]))
        require_same(few, latents_TD, codes_QT[:num_stages])


def test_latents_of_codes_are_those_of_transformers(
    ours: FactorizedQuantizer, published: Any, latents_TD: Tensor
) -> None:
    codes_QT = ours.encode(latents_TD)
    for num_stages in (1, 3, STAGES):
        theirs_TD = published.from_codes(codes_QT[None, :num_stages])[0][0].t()
        torch.testing.assert_close(ours.decode(codes_QT[:num_stages]), theirs_TD, atol=1e-5, rtol=1e-5)


def test_encoding_leaves_the_latents_as_they_were(ours: FactorizedQuantizer, latents_TD: Tensor) -> None:
    before_TD = latents_TD.clone()
    ours.encode(latents_TD)
    ours.gaps(latents_TD)
    assert torch.equal(latents_TD, before_TD)


def test_no_latents_have_no_codes(ours: FactorizedQuantizer, latents_TD: Tensor) -> None:
    assert ours.encode(latents_TD[:0]).shape == (STAGES, 0)
    assert ours.gaps(latents_TD[:0]).shape == (STAGES, 0)
    assert ours.decode(ours.encode(latents_TD[:0])).shape == (0, DIM)
