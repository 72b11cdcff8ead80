"""The separator against torchaudio's own module, from every kind of file, and the files it refuses."""

import io
import pickle
from pathlib import Path
from random import Random

import pytest
import safetensors.torch
import torch
from torch import Tensor
from torchaudio.models import ConvTasNet
from wavemill.tokenizers.separate import MAX_SECONDS, Separator
from wavemill.tokenizers.spec import UserError

SIZES = {"enc_num_feats": 32, "msk_num_feats": 12, "msk_num_hidden_feats": 20, "msk_activate": "relu"}


def network(*, seed: int = 0, num_sources: int = 2, msk_num_stacks: int = 2, **sizes: int | str) -> ConvTasNet:
    torch.manual_seed(seed)
    return ConvTasNet(num_sources=num_sources, msk_num_stacks=msk_num_stacks, **{**SIZES, **sizes}).eval()


def theirs(model: ConvTasNet, waveform_N: Tensor) -> Tensor:
    with torch.inference_mode():
        return model(waveform_N[None, None])[0]


@pytest.fixture
def waveform_N() -> Tensor:
    return torch.randn(8_003, generator=torch.Generator().manual_seed(1)) * 0.1


@pytest.mark.parametrize("kind", ["safetensors", "pt", "old pt"])
def test_sources_are_those_of_torchaudio_whatever_file_the_weights_come_from(
    tmp_path: Path, waveform_N: Tensor, kind: str
):
    model = network()
    path = tmp_path / "weights"
    if kind == "safetensors":
        safetensors.torch.save_file(model.state_dict(), path)
    else:
        torch.save(model.state_dict(), path, _use_new_zipfile_serialization=kind == "pt")
    separator = Separator.from_file(path)
    assert separator.num_sources == 2
    sources_SN = separator.separate(waveform_N)
    assert sources_SN.shape == (2, 8_003)
    assert sources_SN.dtype == torch.float32
    assert torch.equal(sources_SN, theirs(model, waveform_N))
    assert torch.equal(sources_SN, separator.separate(waveform_N))


@pytest.mark.parametrize(
    "sizes",
    [
        {"num_sources": 3},
        {"msk_num_stacks": 1, "enc_num_feats": 24},
        {"enc_kernel_size": 20, "msk_num_hidden_feats": 16, "msk_num_feats": 8},
    ],
)
def test_sizes_are_read_off_the_weights(sizes: dict[str, int], waveform_N: Tensor):
    model = network(**sizes)
    separator = Separator(model.state_dict(), name="toy")
    assert separator.num_sources == sizes.get("num_sources", 2)
    assert torch.equal(separator.separate(waveform_N), theirs(model, waveform_N))


@pytest.mark.parametrize("num_samples", [1, 7, 8, 9])
def test_the_shortest_waveforms_keep_their_length(num_samples: int):
    separator = Separator(network().state_dict(), name="toy")
    assert separator.separate(torch.ones(num_samples)).shape == (2, num_samples)


def test_a_copy_through_bytes_is_the_same_separator(waveform_N: Tensor):
    separator = Separator(network().state_dict(), name="toy")
    copy = Separator.from_bytes(separator.to_bytes(), name="copy")
    assert copy.sha256 == separator.sha256
    assert torch.equal(copy.separate(waveform_N), separator.separate(waveform_N))


def test_the_hash_is_of_the_numbers_and_not_of_their_order():
    weights = network().state_dict()
    sha256 = Separator(weights, name="toy").sha256
    assert Separator(dict(reversed(weights.items())), name="toy").sha256 == sha256
    assert Separator(network(seed=1).state_dict(), name="toy").sha256 != sha256


def test_other_networks_and_broken_weights_are_refused():
    weights = network().state_dict()
    last = "mask_generator.output_prelu.weight"
    wrong = {
        "another network": {"conv.weight": torch.ones(3, 3, 3)},
        "another network than": {name: weight for name, weight in weights.items() if name != last},
        "the weights of another": {**weights, "extra.weight": torch.ones(1)},
        "weights of another network": network(msk_num_layers=5).state_dict(),
        "weights of another network than ConvTasNet": network(msk_kernel_size=5).state_dict(),
        "gives 1 source": network(num_sources=1).state_dict(),
        "NaN or infinite": {**weights, last: torch.tensor([float("nan")])},
        "named tensors of floats": {**weights, last: torch.tensor([1])},
    }
    for said, found in wrong.items():
        with pytest.raises(UserError, match=f"Separator toy .*{said}"):
            Separator(found, name="toy")


class Evil:
    def __reduce__(self):
        return exec, ("raise SystemExit('unpickled')",)


def test_files_that_hold_no_plain_tensors_are_refused_and_never_unpickled(tmp_path: Path):
    saved = io.BytesIO()
    torch.save(network().state_dict(), saved)
    bad = {
        "model.pt": None,
        "evil.pkl": pickle.dumps(Evil()),
        "torn.pt": saved.getvalue()[: len(saved.getvalue()) // 2],
        "torn.safetensors": safetensors.torch.save(network().state_dict())[:-100],
        "empty.pt": b"",
        "page.html": b"<html>404 Not Found</html>",
        "zeros.pt": bytes(1_000),
    }
    torch.save(network(), tmp_path / "model.pt")
    torch.save(Evil(), tmp_path / "evil.pt")
    torch.save([torch.ones(3)], tmp_path / "list.pt")
    for name, content in bad.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
    for path in sorted(tmp_path.iterdir()):
        with pytest.raises(UserError, match=r"conv_tasnet_base_libri2mix\.pt") as refusal:
            Separator.from_file(path)
        assert str(path) in str(refusal.value)
    with pytest.raises(UserError, match="No such file"):
        Separator.from_file(tmp_path / "missing.pt")
    with pytest.raises(UserError, match="directory"):
        Separator.from_file(tmp_path)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("zipped", [True, False])
def test_a_damaged_file_is_refused_in_one_sentence(tmp_path: Path, zipped: bool):
    saved = io.BytesIO()
    torch.save({"a": torch.ones(2, 3), "b": torch.ones(5)}, saved, _use_new_zipfile_serialization=zipped)
    random = Random(0)
    path = tmp_path / "damaged.pt"
    for _ in range(150):
        content = bytearray(saved.getvalue())
        for _ in range(random.choice([1, 3, 20])):
            content[random.randrange(len(content))] = random.randrange(256)
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"Separator .*damaged\.pt"):
            Separator.from_file(path)


def test_a_waveform_past_the_limit_is_no_separation_of_ours():
    separator = Separator(network().state_dict(), name="toy")
    with pytest.raises(ValueError, match="cannot be separated"):
        separator.separate(torch.zeros(MAX_SECONDS * separator.sample_rate + 1))
    with pytest.raises(ValueError, match="cannot be separated"):
        separator.separate(torch.zeros(0))
