"""EnCodec 48 kHz: its chunks against the published model's, stereo from the file to the sound, and its weights."""

import io
import json
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import soundfile
import torch
import weights_causal
import weights_encodec48
from safetensors.torch import load_file, save_file
from torch import Tensor
from wavemill.jobs.corpus import build_corpus
from wavemill.jobs.engine import InlineEngine
from wavemill.jobs.tokenize import TokenizeOptions, tokenize
from wavemill.pipelines.check import CheckOptions, check_tokenizer
from wavemill.pipelines.export import export_webdataset
from wavemill.pipelines.layouts.flat import semantic
from wavemill.pipelines.listen import decode_segments
from wavemill.pipelines.policy import CorpusPolicy
from wavemill.pipelines.stored import stored_tokens
from wavemill.pipelines.streams import StreamConfig
from wavemill.pipelines.verify import verify
from wavemill.storage.codes import open_corpus, open_stream, read_codes, stream_spec
from wavemill.storage.dataset import Pack, TokenDataset
from wavemill.storage.layouts import Segment
from wavemill.storage.parquet import read_parquet
from wavemill.storage.root import Root
from wavemill.storage.schema import CORPUS_SCHEMA, stream_schema
from wavemill.storage.table import create_table, write_shard
from wavemill.storage.writer import TableWriter
from wavemill.tokenizers.compare import Comparison, compare_codes
from wavemill.tokenizers.encodec_48khz import ENTRIES, Encodec48, open_encodec_48khz
from wavemill.tokenizers.registry import describe as describe_any
from wavemill.tokenizers.registry import describe_features, load_tokenizer
from wavemill.tokenizers.spec import UserError, decoded_samples
from wavemill.tokenizers.tokenizer import Description, TokenizerConfig
from weights_encodec48 import NAME, RATE, oracle_chunks, oracle_sound, stereo

ENTRY, LATENTS = ENTRIES
# around a chunk of 48,000 samples and the 47,520 after which the next begins
LENGTHS = [1, 321, 47_520, 47_521, 47_681, 48_001, 100_007]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return weights_encodec48.small(tmp_path_factory)


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Encodec48:
    return opened(folder)


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "weights"))


def config(folder: Path, **fields: Any) -> TokenizerConfig:
    return TokenizerConfig(tokenizer=NAME, weights=str(folder), **fields)


def describe(folder: Path, **fields: Any) -> Description:
    return ENTRY.describe(config(folder, **fields))


def latents_config(folder: Path) -> TokenizerConfig:
    return TokenizerConfig(tokenizer=f"{NAME}-latents", weights=str(folder))


def opened(folder: Path, *, chunks_at_once: int = 0, **fields: Any) -> Encodec48:
    return open_encodec_48khz(describe(folder, **fields), "cpu", chunks_at_once=chunks_at_once)


def excerpts(*lengths: int) -> list[Tensor]:
    """Stereo speech `[2, N]`, each from another place."""
    whole_CN = stereo(4 * RATE)
    return [whole_CN[:, 997 * place : 997 * place + length] for place, length in enumerate(lengths)]


# Chunks


def test_codes_and_loudness_of_every_chunk_are_the_published_ones(folder: Path, tokenizer: Encodec48):
    found = Comparison()
    for waveform_CN in excerpts(*LENGTHS):
        ours = tokenizer.tokens(waveform_CN)
        codes_KT, scales_S = oracle_chunks(folder, waveform_CN)
        found += compare_codes(tokenizer, waveform_CN, ours.codes_KT, codes_KT[:4])
        torch.testing.assert_close(ours.scales_C, scales_S, rtol=1e-6, atol=0)
    assert found.mismatches == 0
    assert found.near_ties <= 1


@pytest.mark.parametrize("num_codebooks", [1, 4])
def test_sound_of_chunks_laid_over_one_another_is_the_published_one(
    num_codebooks: int, folder: Path, tokenizer: Encodec48
):
    for waveform_CN in excerpts(1, 47_521, 48_001, 100_007):
        tokens = tokenizer.tokens(waveform_CN)
        sound_CN = tokenizer.decode_tokens(replace(tokens, codes_KT=tokens.codes_KT[:num_codebooks]))
        expected_CN = oracle_sound(folder, waveform_CN, num_codebooks)
        torch.testing.assert_close(sound_CN, expected_CN, rtol=0, atol=1e-6)
        assert sound_CN.shape == (2, decoded_samples(tokens.num_frames, tokenizer.spec))
        assert sound_CN.shape[1] >= waveform_CN.shape[1]
    assert not torch.equal(sound_CN[0], sound_CN[1])


def test_a_chunk_that_ends_after_the_one_that_follows_is_decoded_where_the_published_model_fails(
    folder: Path, tokenizer: Encodec48
):
    (waveform_CN,) = excerpts(47_700)  # chunks of 150 frames and of one
    with pytest.raises(RuntimeError, match="must match the size"):
        oracle_sound(folder, waveform_CN, 4)
    tokens = tokenizer.tokens(waveform_CN)
    assert tokens.scales_C is not None
    sound_CN = tokenizer.decode_tokens(tokens)
    first_CN = tokenizer.decode_tokens(replace(tokens, codes_KT=tokens.codes_KT[:, :149], scales_C=tokens.scales_C[:1]))
    assert sound_CN.shape == (2, 47_520 + 320)
    assert sound_CN.isfinite().all()
    torch.testing.assert_close(sound_CN[:, :40_000], first_CN[:, :40_000], rtol=0, atol=0.05)


def test_full_chunks_together_have_the_codes_that_they_have_alone(folder: Path, tokenizer: Encodec48):
    together = opened(folder, chunks_at_once=3)
    waveforms = [torch.empty(2, 0), *excerpts(100_007, 48_000, 30_000, 150_000)]
    found = Comparison()
    for waveform_CN, tokens in zip(waveforms, together.tokens_batch(waveforms, 200_000), strict=True):
        alone = tokenizer.tokens(waveform_CN)
        found += compare_codes(tokenizer, waveform_CN, alone.codes_KT, tokens.codes_KT)
        assert tokens.scales_C is not None
        assert alone.scales_C is not None
        assert torch.equal(tokens.scales_C, alone.scales_C)
    assert found.mismatches == 0
    assert found.near_ties <= 1


def test_how_loud_a_segment_is_lies_in_the_scales_alone(tokenizer: Encodec48):
    (waveform_CN,) = excerpts(60_000)
    soft, loud = tokenizer.tokens(waveform_CN), tokenizer.tokens(4 * waveform_CN)
    assert soft.scales_C is not None
    assert loud.scales_C is not None
    torch.testing.assert_close(loud.scales_C, 4 * soft.scales_C, rtol=1e-5, atol=0)
    assert (loud.codes_KT != soft.codes_KT).sum() <= 4
    level = tokenizer.decode_tokens(loud).std() / tokenizer.decode_tokens(soft).std()
    assert float(level) == pytest.approx(4, rel=1e-3)
    assert tokenizer.decode(soft.codes_KT).std() > 2 * tokenizer.decode_tokens(soft).std()


def test_silence_keeps_a_loudness_and_stays_finite(tokenizer: Encodec48):
    tokens = tokenizer.tokens(torch.zeros(2, 50_000))
    assert tokens.scales_C is not None
    assert torch.equal(tokens.scales_C, torch.full((2,), 1e-8))
    assert tokenizer.decode_tokens(tokens).abs().max() < 1e-6


def test_both_channels_are_heard_and_one_alone_is_on_both(tokenizer: Encodec48):
    (waveform_CN,) = excerpts(50_000)
    codes_KT, left_KT = tokenizer.encode(waveform_CN), tokenizer.encode(waveform_CN[0])
    assert torch.equal(left_KT, tokenizer.encode(torch.stack([waveform_CN[0]] * 2)))
    for other_KT in (left_KT, tokenizer.encode(waveform_CN.flip(0))):
        assert (other_KT != codes_KT).float().mean() > 0.1


# Latents: the same chunks, as numbers


def test_latents_and_loudness_of_every_chunk_are_those_that_the_codec_quantizes(folder: Path, tokenizer: Encodec48):
    latents = load_tokenizer(latents_config(folder))
    waveforms = [torch.empty(2, 0), *excerpts(*LENGTHS)]
    for waveform_CN, together in zip(waveforms, latents.tokens_batch(waveforms, 200_000), strict=True):
        tokens = tokenizer.tokens(waveform_CN)
        assert together.frames_TD.shape == (tokens.num_frames, latents.spec.dim) == (together.num_frames, 16)
        assert torch.equal(together.scales_C, tokens.scales_C)
        assert torch.equal(latents.tokens(waveform_CN).frames_TD, together.frames_TD)
        if waveform_CN.shape[1]:
            expected_TD = weights_encodec48.oracle_latents(folder, waveform_CN)
            torch.testing.assert_close(together.frames_TD.float(), expected_TD, rtol=2e-3, atol=2e-3)


def test_latents_sound_as_their_codes_do_and_as_loud(tokenizer: Encodec48, folder: Path):
    latents, (waveform_CN,) = load_tokenizer(latents_config(folder)), excerpts(100_007)
    tokens, kept = tokenizer.tokens(waveform_CN), latents.tokens(waveform_CN)
    quantized_TD = tokenizer._quantizer.decode(tokens.codes_KT).half()
    sound_CN = latents.decode_tokens(replace(kept, frames_TD=quantized_TD))
    expected_CN = tokenizer.decode_tokens(tokens)
    assert (sound_CN - expected_CN).norm() < 0.01 * expected_CN.norm()
    louder_CN = latents.decode_tokens(replace(kept, scales_C=2 * kept.scales_C))
    torch.testing.assert_close(louder_CN, 2 * latents.decode_tokens(kept))


def test_latents_take_no_codebooks_and_nothing_that_other_features_do(folder: Path, root: Root):
    def refused(ask: Callable[[], Any]) -> str:
        with pytest.raises(UserError) as refusal:
            ask()
        return str(refusal.value)

    name, asked = "encodec-48khz-latents", latents_config(folder)
    assert describe_any(asked).spec == replace(LATENTS.spec, dim=16)
    assert "has no codebooks: leave out num_codebooks" in refused(lambda: describe_any(replace(asked, num_codebooks=2)))
    told = refused(lambda: describe_any(replace(asked, reduce="stack:2")))
    assert told == f"Tokenizer {name} gives numbers as they are; leave out output and reduce."
    told = refused(lambda: describe_features(asked))
    assert told == f"Tokenizer {name} gives numbers as they are: there is none to fit or to name."
    stream = StreamConfig(name="x", tokenizer=asked, codebook="some")
    told = refused(lambda: tokenize(root, [stream], InlineEngine, TokenizeOptions()))
    assert told == f"Tokenizer {name} gives numbers as they are: leave out 'some'."
    sound = str(Path(root.uri).parent / "sound")
    assert "there are no codes to compare" in refused(lambda: check_tokenizer(asked, sound, CheckOptions(limit=1)))


# From files to tokens to files


@pytest.fixture(scope="module")
def root(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Root:
    """A stereo and a mono recording, tokenized with four and with two codebooks."""
    place = tmp_path_factory.mktemp("stereo")
    (place / "sound").mkdir()
    for name, waveform_CN in (("mono", stereo(60_000)[:1]), ("stereo", stereo(100_007))):
        soundfile.write(place / "sound" / f"{name}.wav", waveform_CN.t().numpy(), RATE, subtype="FLOAT")
    root = Root(place / "root")
    build_corpus(root, [f"x={place / 'sound'}"], CorpusPolicy(), shard_hours=1.0)
    streams = (
        StreamConfig(name="wide", tokenizer=config(folder)),
        StreamConfig(name="coarse", tokenizer=config(folder, num_codebooks=2)),
        StreamConfig(name="latents", tokenizer=latents_config(folder)),
    )
    tokenize(root, streams, InlineEngine, TokenizeOptions())
    return root


def rows_and_tokens(root: Root, stream: str) -> list[tuple[dict[str, Any], Any]]:
    corpus, snapshot = open_corpus(root), open_stream(root, stream)
    found = []
    for shard in corpus.files:
        rows = read_parquet(root, corpus.path(shard), schema=CORPUS_SCHEMA).to_pylist()
        codes = read_codes(root, snapshot, shard, more=True)
        found += [(row, stored_tokens(codes, place)) for place, row in enumerate(rows)]
    return found


def test_a_recording_of_two_channels_is_tokenized_in_stereo_and_one_of_one_on_both(root: Root, tokenizer: Encodec48):
    expected = {"mono.wav": stereo(60_000)[0], "stereo.wav": stereo(100_007)}
    for row, stored in rows_and_tokens(root, "wide"):
        tokens = tokenizer.tokens(expected.pop(row["path"]))
        assert torch.equal(stored.codes_KT, tokens.codes_KT)
        assert torch.equal(stored.scales_C, tokens.scales_C)
    assert not expected
    for _, stored in rows_and_tokens(root, "coarse"):
        assert stored.codes_KT.shape[0] == 2


@pytest.mark.parametrize("stream", ["wide", "latents"])
def test_such_streams_are_verified_exported_and_decoded_in_stereo(
    stream: str, root: Root, folder: Path, tmp_path: Path
):
    corpus = open_corpus(root)
    tokenizer = load_tokenizer(config(folder) if stream == "wide" else latents_config(folder))
    found = verify(root, corpus, sample=2, seed=0, source_roots={})
    assert (found.problems, found.tokenized_again, found.codes_different) == ([], 2, 0)
    index = export_webdataset(root, corpus, {stream: open_stream(root, stream)}, view=stream)
    assert index["samples"] == 2
    rows = {row["id"]: (row, tokens) for row, tokens in rows_and_tokens(root, stream)}
    with tarfile.open(Path(root.uri) / "webdataset" / stream / index["tars"][0]["name"]) as tar:
        members = {member.name: np.load(io.BytesIO(tar.extractfile(member).read())) for member in tar if _npy(member)}
    for segment, (_, tokens) in rows.items():
        assert np.array_equal(members[f"{segment}.{stream}.scales.npy"], tokens.scales_C)
        expected = tokens.codes_KT if stream == "wide" else tokens.frames_TD
        assert np.array_equal(members[f"{segment}.{stream}.npy"], expected)
    sounds = list(
        decode_segments(root, corpus, stream, ids=frozenset(), limit=2, num_codebooks=None, folder=str(tmp_path))
    )
    assert len(sounds) == 2
    for sound in sounds:
        row, tokens = rows[sound.id]
        written_NC, rate = soundfile.read(sound.path, dtype="float32")
        assert (rate, written_NC.shape) == (RATE, (row["num_samples"], 2))
        expected_CN = tokenizer.decode_tokens(tokens)[:, : row["num_samples"]]
        torch.testing.assert_close(torch.from_numpy(written_NC).t(), expected_CN.clamp(-1, 1), rtol=0, atol=1e-4)


def _npy(member: tarfile.TarInfo) -> bool:
    return member.name.endswith(".npy")


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        (lambda scales: scales[:-1], "it has loudness scales of another number of chunks than the"),
        (lambda scales: [*scales[:-1], scales[-1] * 2], "1 codes differ when it is tokenized alone"),
    ],
)
def test_a_loudness_that_is_lost_or_changed_is_found(
    changed: Callable[[list[float]], list[float]], told: str, root: Root, tmp_path: Path
):
    copy = Root(shutil.copytree(root.uri, tmp_path / "root"))
    snapshot, spec = open_stream(copy, "wide"), stream_spec(open_stream(copy, "wide"))
    table = read_parquet(copy, snapshot.path(0), schema=stream_schema(spec))
    scales = [changed(scales) for scales in table["chunk_scales"].to_pylist()]
    place = table.schema.get_field_index("chunk_scales")
    table = table.set_column(place, table.schema.field(place), pa.array(scales, type=table.schema.field(place).type))
    shutil.rmtree(tmp_path / "root" / "streams" / "wide")
    create_table(copy, "streams/wide", schema=stream_schema(spec), metadata=snapshot.metadata)
    receipt = write_shard(copy, "streams/wide", 0, table, codebook_size=spec.codebook_size)
    TableWriter(copy, "streams/wide").commit([receipt])
    found = verify(copy, open_corpus(copy), sample=2, seed=0, source_roots={})
    assert found.num_problems >= 2
    assert all(problem.startswith("stream wide") for problem in found.problems)
    assert any(told in problem for problem in found.problems), found.problems


def test_a_layout_must_say_that_it_takes_overlapping_chunks(root: Root):
    with pytest.raises(UserError, match=r"Stream 'wide' is made of chunks that overlap: .* `takes_chunks = True`"):
        TokenDataset(root.uri, ["wide"], pack=Pack(semantic("wide"), 100))

    def first(segment: Segment) -> Tensor:
        return segment.codes["wide"][0]

    with pytest.raises(UserError, match="made of chunks that overlap"):
        TokenDataset(root.uri, ["wide"], pack=Pack(first, 100))
    first.takes_chunks = True  # pyright: ignore[reportFunctionMemberAccess]
    assert len(list(TokenDataset(root.uri, ["wide"], pack=Pack(first, 100), batch_size=1))) > 1
    assert len(list(TokenDataset(root.uri, ["wide"], batch_size=1))) == 2


def test_check_holds_it_to_its_promises_on_own_recordings(folder: Path, root: Root):
    checked = check_tokenizer(config(folder), str(Path(root.uri).parent / "sound"), CheckOptions(limit=2))
    assert checked.kept, checked.promises
    names = {promise.name for promise in checked.promises}
    assert {"same as transformers gives", "same in a batch", "length of the sound"} <= names


# Weights


def test_the_registry_says_what_the_published_configuration_gives(copied: Path):
    published = json.loads((Path(weights_causal.__file__).parent / "published" / f"{NAME}.json").read_text())
    (copied / "config.json").write_text(json.dumps(published["model"]))
    assert describe(copied).spec == ENTRY.spec
    # 6 and 24 kbit/s of each chunk of 1 s, of which one begins every 0.99 s
    assert (ENTRY.spec.frame_rate, round(ENTRY.spec.bits_per_second, 2)) == (150, 6_060.61)
    assert round(describe(copied, num_codebooks=16).spec.bits_per_second, 1) == 24_242.4
    with pytest.raises(UserError, match="has 1 to 16 codebooks; 17 were asked for"):
        describe(copied, num_codebooks=17)


def test_the_24_khz_codec_is_refused_with_all_that_differs(tmp_path_factory: pytest.TempPathFactory):
    with pytest.raises(UserError) as caught:
        describe(weights_causal.small(tmp_path_factory, "encodec-24khz"))
    told = str(caught.value)
    assert "holds another codec than encodec-48khz: sampling_rate 24000, not 48000; audio_channels 1, not 2;" in told
    for key in ("use_causal_conv True, not False", "normalize False, not True", "chunk_length_s None, not 1.0"):
        assert key in told


@pytest.mark.parametrize("changed", [{"target_bandwidths": []}, {"target_bandwidths": [0.1]}, {"codebook_size": 1}])
def test_weights_without_codebooks_are_refused(copied: Path, changed: dict[str, Any]):
    published = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**published, **changed}))
    with pytest.raises(UserError, match=r"has no codebooks: .* which pay for none"):
        describe(copied)


def test_weights_without_the_norms_are_refused(copied: Path):
    state = load_file(copied / "model.safetensors")
    kept = {name: weight for name, weight in state.items() if ".norm." not in name}
    assert len(kept) < len(state)
    save_file(kept, copied / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lack \d+ of the parameters of EncodecModel"):
        opened(copied)
