"""EnCodec 24 kHz and Mimi give the codes of the published implementation, in batches and chunks as alone and whole."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
import weights_causal
from torch import Tensor
from wavemill.tokenizers import encodec, mimi
from wavemill.tokenizers.causal import CausalCodec, Walk
from wavemill.tokenizers.spec import UserError, num_frames
from wavemill.tokenizers.tokenizer import Mode, TokenizerConfig
from weights_causal import num_differing, oracle, oracle_sound, speech

FAMILIES = {
    "encodec-24khz": (encodec.ENTRIES[0], encodec.open_encodec),
    "mimi": (mimi.ENTRIES[0], mimi.open_mimi),
}


@dataclass(frozen=True)
class Codec:
    """Small weights of one of the two."""

    name: str
    folder: Path

    def open(self, *, chunk_frames: int = 0, num_codebooks: int | None = 8, mode: Mode = Mode.EXACT) -> CausalCodec:
        return opened(self.name, self.folder, chunk_frames, num_codebooks, mode)

    def check(self, waveform_N: Tensor, ours_KT: Tensor, theirs_KT: Tensor) -> None:
        """Equal, but for near-ties, of which there are next to none."""
        assert num_differing(self.folder, waveform_N, ours_KT, theirs_KT) <= 1 + ours_KT.numel() // 2000


@cache
def opened(name: str, folder: Path, chunk_frames: int, num_codebooks: int | None, mode: Mode) -> CausalCodec:
    entry, open_family = FAMILIES[name]
    config = TokenizerConfig(tokenizer=name, weights=str(folder), num_codebooks=num_codebooks, mode=mode)
    return open_family(entry.describe(config), "cpu", chunk_frames=chunk_frames)


@pytest.fixture(scope="module", params=FAMILIES)
def codec(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Codec:
    return Codec(request.param, weights_causal.small(tmp_path_factory, request.param))


def excerpt(length: int, seed: int = 0) -> Tensor:
    begin = (24_000 + 7_919 * seed) % (20 * 24_000 - length)
    return speech(20)[begin : begin + length]


def test_codes_are_the_published_ones_at_the_edges_of_hops_and_at_any_other_length(codec: Codec):
    tokenizer = codec.open()
    hop = tokenizer.spec.hop_length
    lengths = [1, 2, 7, *(near for hops in (1, 2, 3, 7, 8) for near in (hops * hop - 1, hops * hop, hops * hop + 1))]
    lengths += [10_007, 24_000, 77_777, 100_003]
    for length in lengths:
        waveform_N = excerpt(length, seed=length % 17)
        codes_KT = tokenizer.encode(waveform_N)
        assert codes_KT.shape == (8, num_frames(length, tokenizer.spec))
        codec.check(waveform_N, codes_KT, oracle(codec.folder, waveform_N)[:8])


def test_chunks_of_any_size_give_the_codes_of_the_whole(codec: Codec):
    waveform_N = excerpt(150_001)
    expected_KT = oracle(codec.folder, waveform_N)[:8]
    for chunk_frames in (8, 13, 31):
        codec.check(waveform_N, codec.open(chunk_frames=chunk_frames).encode(waveform_N), expected_KT)


def test_a_last_chunk_of_a_few_samples_looks_back_into_the_chunk_before(codec: Codec):
    tokenizer = codec.open(chunk_frames=8)
    for extra in (1, 2, 3, 5, 8, 39, 41, 321):
        waveform_N = excerpt(16 * tokenizer.spec.hop_length + extra, seed=extra)
        codec.check(waveform_N, tokenizer.encode(waveform_N), oracle(codec.folder, waveform_N)[:8])


@pytest.mark.parametrize("chunk_frames", [8, 1000], ids=["in several chunks", "in one chunk"])
def test_a_segment_in_a_batch_has_the_codes_that_it_has_alone(codec: Codec, chunk_frames: int):
    tokenizer = codec.open(chunk_frames=chunk_frames)
    hop = tokenizer.spec.hop_length
    lengths = [
        20 * hop - 3,
        1,
        0,
        7,
        hop - 1,
        hop,
        hop + 1,
        2 * hop + hop // 2,
        6 * hop,
        7 * hop + 1,
        8 * hop,
        9 * hop - 1,
    ]
    waveforms = [excerpt(length, seed=seed) for seed, length in enumerate(lengths)]
    for padded_length in (20 * hop - 3, 20 * hop, 23 * hop + 77):
        batch = tokenizer.encode_batch(waveforms, padded_length)
        for waveform_N, codes_KT in zip(waveforms, batch, strict=True):
            codec.check(waveform_N, codes_KT, tokenizer.encode(waveform_N))


def test_a_segment_lengthened_with_silence_has_another_last_frame(codec: Codec):
    """So the right edges that batches are mended at matter: with plain zero padding the tests above would fail."""
    tokenizer = codec.open()
    hop = tokenizer.spec.hop_length
    lengths = range(9 * hop + 1, 10 * hop, hop // 24)
    different = 0
    for length in lengths:
        waveform_N = excerpt(length, seed=length)
        silence_N = torch.nn.functional.pad(waveform_N, (0, 10 * hop - length))
        codes_KT, lengthened_KT = tokenizer.encode(waveform_N), tokenizer.encode(silence_N)
        codec.check(waveform_N[: 9 * hop], codes_KT[:, :9], lengthened_KT[:, :9])
        different += not torch.equal(codes_KT, lengthened_KT)
    assert different > len(lengths) // 2


def test_the_first_codebooks_are_those_of_more_codebooks(codec: Codec):
    waveform_N = excerpt(60_000)
    codes_KT = codec.open(num_codebooks=10).encode(waveform_N)
    for num_codebooks in (1, 2, 3, 7, None):
        tokenizer = codec.open(num_codebooks=num_codebooks)
        assert tokenizer.spec.num_codebooks == (num_codebooks or 8)
        assert torch.equal(tokenizer.encode(waveform_N), codes_KT[: num_codebooks or 8])


def test_sound_is_the_published_decoders_from_any_number_of_codebooks(codec: Codec):
    tokenizer = codec.open()
    hop = tokenizer.spec.hop_length
    codes_KT = tokenizer.encode(excerpt(100_003))
    for num_codebooks, num in ((8, codes_KT.shape[1]), (8, 1), (8, 2), (3, 6), (1, 7), (1, 8)):
        sound_N = tokenizer.decode(codes_KT[:num_codebooks, :num])
        assert sound_N.shape == (num * hop,)
        torch.testing.assert_close(
            sound_N, oracle_sound(codec.folder, codes_KT[:num_codebooks, :num]), rtol=0, atol=1e-4
        )
    assert float(sound_N.std()) > 1e-3
    assert tokenizer.decode(codes_KT[:, :0]).shape == (0,)


def test_sound_decoded_in_chunks_is_that_of_the_whole(codec: Codec):
    codes_KT = codec.open().encode(excerpt(200_000))
    expected_N = oracle_sound(codec.folder, codes_KT)
    for chunk_frames in (8, 11, 25):
        sound_N = codec.open(chunk_frames=chunk_frames).decode(codes_KT)
        torch.testing.assert_close(sound_N, expected_N, rtol=0, atol=1e-5)


def test_what_is_kept_from_chunk_to_chunk_does_not_grow(codec: Codec):
    tokenizer = codec.open()
    walk, sizes = Walk(), []
    with torch.inference_mode():
        chunk_B1N = excerpt(25 * 1_920)[None, None]
        for _ in range(8):
            tokenizer._model.latents(walk, chunk_B1N, [chunk_B1N.shape[2]])
            sizes.append(sum(kept.numel() for part in walk.kept.values() for kept in _tensors(part)))
    assert sizes[-1] == sizes[-2]
    assert sizes[-1] < 100_000


def _tensors(kept: object) -> list[Tensor]:
    if isinstance(kept, Tensor):
        return [kept]
    return [tensor for part in kept for tensor in _tensors(part)] if isinstance(kept, tuple) else []


def test_silence_and_nothing_have_codes_of_the_right_shape(codec: Codec):
    tokenizer = codec.open()
    assert tokenizer.encode(torch.zeros(0)).shape == (8, 0)
    waveform_N = torch.zeros(20_000)
    codes_KT = tokenizer.encode(waveform_N)
    assert codes_KT.shape == (8, num_frames(20_000, tokenizer.spec))
    codec.check(waveform_N, codes_KT, oracle(codec.folder, waveform_N)[:8])
    assert tokenizer.decode(codes_KT).isfinite().all()


def test_where_samples_lie_in_memory_changes_nothing(codec: Codec):
    tokenizer = codec.open()
    waveform_N = excerpt(50_000)
    strided_N = torch.stack([waveform_N, -waveform_N], dim=1)[:, 0]
    room = torch.zeros(50_003)
    room[3:] = waveform_N
    assert torch.equal(tokenizer.encode(strided_N), tokenizer.encode(waveform_N))
    assert torch.equal(tokenizer.encode(room[3:]), tokenizer.encode(waveform_N))


def test_nearly_all_codes_of_every_codebook_are_used(codec: Codec):
    codes_KT = codec.open().encode(speech(20, noise_share=0.25))
    for codes_T in codes_KT:
        assert len(codes_T.unique()) >= 0.9 * codec.open().spec.codebook_size


def test_the_fast_mode_gives_mostly_the_same_codes_in_the_first_codebook(codec: Codec):
    waveform_N = excerpt(100_000)
    exact_KT, fast_KT = codec.open().encode(waveform_N), codec.open(mode=Mode.FAST).encode(waveform_N)
    same = (exact_KT[0] == fast_KT[0]).float().mean()
    assert 0.7 < same <= 1.0
    assert not torch.equal(exact_KT, fast_KT)


def test_what_decides_the_codes_is_in_the_fingerprint(codec: Codec):
    tokenizer = codec.open(num_codebooks=3)
    assert tokenizer.fingerprint["tokenizer"] == codec.name
    assert tokenizer.fingerprint["codebooks"] == "3"
    assert tokenizer.fingerprint["precision"] == "float32"
    assert len(tokenizer.fingerprint["weights"]) == 64
    assert codec.open(mode=Mode.FAST).fingerprint["precision"] == "bfloat16"


@pytest.mark.parametrize("asked", [0, -1, 40])
def test_codebooks_that_are_not_there_are_refused(codec: Codec, asked: int):
    there = 12 if codec.name == "encodec-24khz" else 10
    with pytest.raises(UserError, match=f"^{codec.name} has 1 to {there} codebooks; {asked} were asked for.$"):
        codec.open(num_codebooks=asked)


@pytest.mark.published
@pytest.mark.parametrize("name", FAMILIES)
def test_models_of_published_size_give_the_published_codes(name: str, tmp_path: Path):
    codec = Codec(name, weights_causal.make(name, tmp_path / "weights", small=False))
    tokenizer = codec.open(num_codebooks=32)
    hop = tokenizer.spec.hop_length
    waveforms = [excerpt(length, seed=length) for length in (15 * 24_000 + 1, 7, hop + 1, 99_999)]
    batch = tokenizer.encode_batch(waveforms, 16 * 24_000)
    for waveform_N, batched_KT in zip(waveforms, batch, strict=True):
        codes_KT = tokenizer.encode(waveform_N)
        codec.check(waveform_N, codes_KT, oracle(codec.folder, waveform_N))
        codec.check(waveform_N, batched_KT, codes_KT)
    codes_KT = batch[0][:8, :100]
    torch.testing.assert_close(tokenizer.decode(codes_KT), oracle_sound(codec.folder, codes_KT), rtol=0, atol=1e-4)
