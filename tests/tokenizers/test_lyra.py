"""Lyra: the codes and the sound of its own program, its codebooks read out, no file opened but the published ones."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
import weights_lyra
from audio_at import whole_at
from conftest import SAMPLES
from torch import Tensor
from wavemill.tokenizers import lyra
from wavemill.tokenizers.compare import compare_all
from wavemill.tokenizers.lyra import ENTRIES, Lyra
from wavemill.tokenizers.quantize import ResidualQuantizer
from wavemill.tokenizers.registry import describe, load_tokenizer
from wavemill.tokenizers.spec import UserError
from wavemill.tokenizers.tokenizer import TokenizerConfig
from weights_lyra import FILES, oracle, oracle_sound, quantized_latents

RATE, HOP, BOOKS = 16_000, 320, 46


def config(folder: Path, num_codebooks: int | None = None) -> TokenizerConfig:
    return TokenizerConfig(tokenizer="lyra", weights=str(folder), num_codebooks=num_codebooks)


@cache
def opened(folder: Path, num_codebooks: int | None = None) -> Lyra:
    return load_tokenizer(config(folder, num_codebooks))


@cache
def speech() -> Tensor:
    """Four people, one after the other."""
    paths = sorted((SAMPLES / "speech").glob("*_01.mp3"))[:4]
    return torch.cat([whole_at(path, RATE) for path in paths])


def stand_ins(folder: Path) -> Path:
    """Files of the published sizes that begin as TensorFlow Lite's do."""
    folder.mkdir()
    for name in FILES:
        size, _ = lyra._PUBLISHED[name]
        (folder / name).write_bytes(b"\x20\0\0\0TFL3".ljust(size, b"\0"))
    return folder


@pytest.fixture
def nothing_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(content: bytes) -> None:
        raise AssertionError("the interpreter was given a file")

    monkeypatch.setattr(lyra, "_open", refuse)


def test_codes_of_speech_are_those_of_lyras_own_program(lyra_weights: Path):
    tokenizer = opened(lyra_weights)
    waveforms = [speech()[begin:][:length] for begin, length in ((0, 6 * RATE + 77), (90_001, 1), (70_000, 3 * HOP))]
    ours = [tokenizer.encode(waveform_N) for waveform_N in waveforms]
    found = compare_all(tokenizer, waveforms, ours, [oracle(lyra_weights, waveform_N) for waveform_N in waveforms])
    assert found.mismatches == 0, found
    assert found.near_ties <= 1, found
    assert all(codes_T.unique().numel() > 4 for codes_T in ours[0])


@pytest.mark.parametrize("num_codebooks", [1, 16, 30, 46])
def test_sound_is_that_of_lyras_own_program_with_any_number_of_codebooks(lyra_weights: Path, num_codebooks: int):
    codes_KT = opened(lyra_weights).encode(speech()[: 2 * RATE])[:num_codebooks]
    sound_N = opened(lyra_weights).decode(codes_KT)
    torch.testing.assert_close(sound_N, oracle_sound(lyra_weights, codes_KT), rtol=0, atol=1e-4)
    assert sound_N.abs().max() > 0.05


def test_fewer_codebooks_are_the_first_of_all_in_lyras_own_program_too(lyra_weights: Path):
    waveform_N = speech()[RATE : 2 * RATE]
    all_KT = opened(lyra_weights).encode(waveform_N)
    for num_codebooks in (1, 16, 30):
        codes_KT = opened(lyra_weights, num_codebooks).encode(waveform_N)
        assert torch.equal(codes_KT, all_KT[:num_codebooks])
        assert torch.equal(oracle(lyra_weights, waveform_N, num_codebooks), codes_KT)


def test_the_codebooks_that_are_read_out_add_up_to_what_the_published_quantizer_decodes(lyra_weights: Path):
    codebooks_QCD = lyra._centroids((lyra_weights / FILES[1]).read_bytes())
    assert codebooks_QCD.shape == (BOOKS, 16, 64)
    codes_QN = torch.randint(0, 16, (BOOKS, 50), generator=torch.Generator().manual_seed(0))
    for num_codebooks in (1, 17, BOOKS):
        latents_ND = ResidualQuantizer(codebooks_QCD).decode(codes_QN[:num_codebooks])
        expected_ND = quantized_latents(lyra_weights, codes_QN[:num_codebooks])
        torch.testing.assert_close(latents_ND, expected_ND, rtol=0, atol=2e-5)
        assert expected_ND.std() > 1


def test_chunks_of_any_size_give_the_codes_and_the_sound_of_the_whole(
    lyra_weights: Path, monkeypatch: pytest.MonkeyPatch
):
    tokenizer, waveform_N = opened(lyra_weights), speech()[: RATE + 5]
    codes_KT, sound_N = tokenizer.encode(waveform_N), tokenizer.decode(tokenizer.encode(waveform_N))
    for chunk_frames in (1, 7, 50):
        monkeypatch.setattr(lyra, "_CHUNK_FRAMES", chunk_frames)
        assert torch.equal(tokenizer.encode(waveform_N), codes_KT)
        assert torch.equal(tokenizer.decode(codes_KT), sound_N)


def test_a_segment_knows_nothing_of_the_one_before(lyra_weights: Path):
    """In Lyra's own program it would: the state that the networks keep is never reset."""
    tokenizer, (first_N, second_N) = opened(lyra_weights), speech()[: 2 * RATE].split(RATE)
    alone_KT = load_tokenizer(config(lyra_weights)).encode(second_N)
    tokenizer.encode(first_N)
    assert torch.equal(tokenizer.encode(second_N), alone_KT)
    assert not torch.equal(oracle(lyra_weights, torch.cat([first_N, second_N]))[:, 50:], alone_KT)


def test_the_networks_start_no_threads(lyra_weights: Path):
    before = len(list(Path("/proc/self/task").iterdir()))
    for name, length in ((FILES[0], HOP), (FILES[2], 64)):
        network = lyra._Network((lyra_weights / name).read_bytes())
        network.through(torch.randn(3, length))
        assert len(list(Path("/proc/self/task").iterdir())) == before


def test_the_registry_says_what_can_be_had_without_weights():
    spec = ENTRIES[0].spec
    assert (float(spec.frame_rate), spec.num_codebooks, spec.bits_per_second) == (50, BOOKS, 9_200)
    assert [50 * 4 * books for books in (16, 30, 46)] == [3_200, 6_000, 9_200]


def test_codebooks_that_there_are_not_are_refused(tmp_path: Path):
    for num_codebooks in (0, 47):
        with pytest.raises(UserError, match=f"lyra has 1 to 46 codebooks; {num_codebooks} were asked for"):
            describe(config(tmp_path, num_codebooks))


def test_without_weights_it_is_said_where_they_are_published():
    with pytest.raises(UserError, match=r"fetch .*encoder.tflite.* from https://github.com/google/lyra/tree/v1.3.2/"):
        describe(TokenizerConfig(tokenizer="lyra"))


def test_a_folder_without_the_files_or_with_a_revision_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match=r"holds no soundstream_encoder\.tflite"):
        describe(config(tmp_path))
    with pytest.raises(UserError, match=r"no folder .*/nowhere"):
        describe(config(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="have no revisions; leave out revision=main"):
        describe(TokenizerConfig(tokenizer="lyra", weights=str(tmp_path), revision="main"))


@pytest.mark.usefixtures("nothing_opened")
@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda content: content, "is damaged or another file than"),
        (lambda content: content[:-1], "it is torn or another one"),
        (lambda content: content[:8], "has 8 bytes"),
        (lambda content: b"", "has 0 bytes"),
        (lambda content: content + bytes(1), "it is torn or another one"),
    ],
    ids=["a foreign network of the same size", "torn", "a header alone", "nothing", "too long"],
)
def test_a_file_that_is_not_the_published_one_is_never_opened(
    damage: Callable[[bytes], bytes], says: str, tmp_path: Path
):
    folder = stand_ins(tmp_path / "weights")
    encoder = folder / FILES[0]
    encoder.write_bytes(damage(encoder.read_bytes()))
    with pytest.raises(UserError, match=says):
        describe(config(folder))


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_in_any_of_the_files_is_found(name: str, lyra_weights: Path, tmp_path: Path):
    folder = weights_lyra.make("lyra", tmp_path / "weights", small=True)
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name} is damaged or another file"):
        describe(config(folder))


@pytest.mark.usefixtures("nothing_opened")
def test_a_file_that_changes_after_it_was_looked_at_is_not_opened(lyra_weights: Path, tmp_path: Path):
    folder = weights_lyra.make("lyra", tmp_path / "weights", small=True)
    described = describe(config(folder))
    (folder / FILES[2]).write_bytes(b"\x20\0\0\0TFL3")
    with pytest.raises(UserError, match="has 8 bytes"):
        ENTRIES[0].open(described, "cpu")


def test_a_missing_interpreter_is_told_with_what_installs_it(lyra_weights: Path, monkeypatch: pytest.MonkeyPatch):
    def version(name: str) -> str:
        raise lyra.PackageNotFoundError(name)

    monkeypatch.setattr(lyra, "version", version)
    with pytest.raises(UserError, match=r"needs the package ai-edge-litert: pip install 'wavemill\[lyra\]'"):
        describe(config(lyra_weights))


def test_the_interpreters_version_is_in_the_fingerprint(lyra_weights: Path, monkeypatch: pytest.MonkeyPatch):
    before = describe(config(lyra_weights)).fingerprint
    monkeypatch.setattr(lyra, "version", lambda name: "0.1")
    after = describe(config(lyra_weights)).fingerprint
    assert {part for part in before if before[part] != after[part]} == {"runtime"}
