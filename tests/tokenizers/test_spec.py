"""The clock and alphabet of a stream: frames counted one by one, exact rates, a round trip through JSON."""

import json
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from wavemill.tokenizers.spec import (
    FrameRule,
    Sound,
    StreamSpec,
    chunk_frames,
    decoded_samples,
    frames_by_chunk,
    num_frames,
)


def make_spec(
    frame_rule: FrameRule, *, hop_length: int = 320, window_length: int = 400, sample_rate: int = 16_000
) -> StreamSpec:
    return StreamSpec(
        tokenizer="toy",
        sample_rate=sample_rate,
        decode_sample_rate=24_000,
        hop_length=hop_length,
        window_length=window_length,
        frame_rule=frame_rule,
        num_codebooks=8,
        codebook_size=1024,
    )


def count_whole_windows(num_samples: int, hop_length: int, window_length: int) -> int:
    """Slide the window a hop at a time for as long as it lies inside the samples."""
    count = begin = 0
    while begin + window_length <= num_samples:
        count += 1
        begin += hop_length
    return count


def count_begun_hops(num_samples: int, hop_length: int) -> int:
    """Take hops until no sample is left; the last one may be short."""
    count = 0
    while num_samples > 0:
        count += 1
        num_samples -= hop_length
    return count


hops = st.integers(1, 700)
windows = st.integers(1, 900)
lengths = st.integers(0, 5_000)


@given(lengths, hops, windows)
def test_the_floor_rule_counts_whole_windows(num_samples: int, hop_length: int, window_length: int) -> None:
    spec = make_spec(FrameRule.FLOOR, hop_length=hop_length, window_length=window_length)
    assert num_frames(num_samples, spec) == count_whole_windows(num_samples, hop_length, window_length)


@given(lengths, hops, windows)
def test_the_ceil_rule_counts_every_hop_that_has_a_sample(
    num_samples: int, hop_length: int, window_length: int
) -> None:
    spec = make_spec(FrameRule.CEIL, hop_length=hop_length, window_length=window_length)
    assert num_frames(num_samples, spec) == count_begun_hops(num_samples, hop_length)


@pytest.mark.parametrize(
    ("num_samples", "floor", "ceil"),
    [
        (0, 0, 0),
        (1, 0, 1),
        (320, 0, 1),
        (321, 0, 2),
        (399, 0, 2),
        (400, 1, 2),
        (719, 1, 3),
        (720, 2, 3),
        (16_000, 49, 50),
    ],
)
def test_frames_at_the_edges_are_those_of_hubert_and_of_the_codecs(num_samples: int, floor: int, ceil: int) -> None:
    assert num_frames(num_samples, make_spec(FrameRule.FLOOR)) == floor
    assert num_frames(num_samples, make_spec(FrameRule.CEIL)) == ceil


@given(st.integers(2**53, 2**62))
def test_frames_are_exact_where_a_float_of_seconds_is_not(num_samples: int) -> None:
    frames = num_frames(num_samples, make_spec(FrameRule.CEIL))
    assert (frames - 1) * 320 < num_samples <= frames * 320
    frames = num_frames(num_samples, make_spec(FrameRule.FLOOR))
    assert (frames - 1) * 320 + 400 <= num_samples < frames * 320 + 400


def test_the_frame_rate_is_an_exact_fraction() -> None:
    assert make_spec(FrameRule.FLOOR).frame_rate == 50
    dac = make_spec(FrameRule.CEIL, hop_length=512, sample_rate=44_100)
    assert dac.frame_rate == Fraction(44_100, 512)
    assert dac.frame_rate * 512 == 44_100
    third = make_spec(FrameRule.CEIL, hop_length=3, sample_rate=1)
    assert third.frame_rate * 3 == 1


@given(st.sampled_from(FrameRule), st.integers(1, 2**31), st.integers(1, 2**31))
def test_a_spec_survives_json(frame_rule: FrameRule, hop_length: int, window_length: int) -> None:
    spec = make_spec(frame_rule, hop_length=hop_length, window_length=window_length)
    again = StreamSpec.from_json(json.loads(json.dumps(spec.to_json())))
    assert again == spec
    assert again.frame_rule is frame_rule  # an enum member again, so that `num_frames` takes the same branch
    if spec.has_clock:
        assert num_frames(10_000, again) == num_frames(10_000, spec)


def test_a_stream_of_embeddings_has_one_frame_of_each_segment_that_has_a_window() -> None:
    spec = make_spec(FrameRule.ONE, hop_length=320, window_length=400)
    assert [num_frames(n, spec) for n in (0, 399, 400, 10**9)] == [0, 0, 1, 1]


def test_a_stream_without_a_clock_says_so_instead_of_a_number() -> None:
    spec = make_spec(FrameRule.FREE)
    assert not spec.has_clock
    with pytest.raises(ValueError, match="no clock"):
        num_frames(10_000, spec)


def test_what_a_plain_stream_does_not_have_is_not_in_its_json() -> None:
    assert not {"dim", "durations", "text"} & make_spec(FrameRule.CEIL).to_json().keys()


def test_a_spec_with_an_unknown_rule_or_field_is_refused() -> None:
    fields = make_spec(FrameRule.CEIL).to_json()
    with pytest.raises(ValueError, match="round"):
        StreamSpec.from_json({**fields, "frame_rule": "round"})
    with pytest.raises(TypeError, match="frame_rate"):
        StreamSpec.from_json({**fields, "frame_rate": 50})


def chunked_spec() -> StreamSpec:
    """EnCodec at 48 kHz: 1 s every 0.99 s (Defossez et al. 2022)."""
    spec = make_spec(FrameRule.CEIL, hop_length=320, window_length=1, sample_rate=48_000)
    return replace(spec, chunk_length=48_000, chunk_stride=47_520)


@pytest.mark.parametrize("num_samples", [1, 320, 321, 47_520, 47_521, 48_000, 48_001, 143_999])
def test_chunks_have_the_frames_that_encodec_gives_at_48_khz(num_samples: int):
    sizes = {"num_filters": 4, "hidden_size": 4, "codebook_dim": 4, "num_lstm_layers": 1, "audio_channels": 2}
    config = transformers.EncodecConfig(
        sampling_rate=48_000,
        normalize=True,
        chunk_length_s=1.0,
        overlap=0.01,
        use_causal_conv=False,
        norm_type="time_group_norm",
        target_bandwidths=[3.0],
        codebook_size=4,
        **sizes,
    )
    with torch.inference_mode():
        encoded = transformers.EncodecModel(config).eval().encode(torch.randn(1, 2, num_samples))
    chunks, _, _, frames = encoded.audio_codes.shape
    expected = [frames] * (chunks - 1) + [frames - encoded.last_frame_pad_length]
    assert chunk_frames(num_samples, chunked_spec()) == expected
    assert num_frames(num_samples, chunked_spec()) == sum(expected)


@given(st.integers(0, 200_000))
def test_as_many_frames_lie_in_the_same_chunks_whatever_the_samples(num_samples: int):
    spec = chunked_spec()
    assert frames_by_chunk(num_frames(num_samples, spec), spec) == chunk_frames(num_samples, spec)


@given(st.integers(0, 60), st.integers(1, 9), st.integers(1, 9), st.integers(0, 9))
def test_chunks_are_told_from_frames_whatever_their_length(num_samples: int, hop: int, stride: int, overlap: int):
    spec = replace(chunked_spec(), hop_length=hop, chunk_stride=stride, chunk_length=stride + overlap)
    assert frames_by_chunk(num_frames(num_samples, spec), spec) == chunk_frames(num_samples, spec)


def test_a_number_of_frames_that_no_segment_has_is_refused():
    spec = replace(chunked_spec(), hop_length=4, chunk_stride=4, chunk_length=8)
    assert [num_frames(length, spec) for length in (4, 5)] == [1, 3]
    with pytest.raises(ValueError, match="no segment has 2 frames of toy"):
        frames_by_chunk(2, spec)


def test_sound_of_chunks_ends_with_the_last_of_them():
    spec = replace(chunked_spec(), decode_sample_rate=48_000)
    assert decoded_samples(0, spec) == 0
    assert decoded_samples(10, spec) == 3_200
    assert decoded_samples(num_frames(47_521, spec), spec) == 47_520 + 320
    assert decoded_samples(num_frames(100_007, spec), spec) == 2 * 47_520 + 16 * 320


def test_frames_of_overlaps_count_in_the_mean_rate():
    spec = chunked_spec()
    assert (spec.frame_rate, spec.mean_frame_rate) == (150, Fraction(150 * 100, 99))
    assert 990 * spec.mean_frame_rate == 150 * 1_000
    assert num_frames(990 * 48_000, spec) == 150 * 1_000 - 1  # the last chunk ends with the samples
    without_overlaps = replace(spec, chunk_length=0, chunk_stride=0).bits_per_second
    assert spec.bits_per_second * 99 == pytest.approx(without_overlaps * 100)
    assert make_spec(FrameRule.CEIL).mean_frame_rate == make_spec(FrameRule.CEIL).frame_rate


def test_channels_are_told_where_there_is_more_than_one():
    mono = make_spec(FrameRule.CEIL)
    assert "channels" not in mono.to_json()
    assert mono.sound == Sound(16_000)
    stereo = replace(mono, channels=2)
    assert StreamSpec.from_json(stereo.to_json()).sound == Sound(16_000, 2)


def test_no_samples_are_no_chunks():
    assert chunk_frames(0, chunked_spec()) == []
    assert num_frames(0, chunked_spec()) == 0


def test_decoded_samples_are_whole_hops_less_what_the_decoder_lacks():
    spec = make_spec(FrameRule.CEIL, hop_length=640, sample_rate=16_000)  # 16 kHz in, 24 kHz out
    assert decoded_samples(10, spec) == 9_600
    assert decoded_samples(10, replace(spec, decode_trim=8)) == 9_592
    assert decoded_samples(0, replace(spec, decode_trim=8)) == 0


def test_bits_per_second_are_those_of_the_paper():
    spec = replace(make_spec(FrameRule.CEIL, hop_length=320, sample_rate=24_000), num_codebooks=8)
    assert spec.bits_per_second == 6_000
