"""Continuing segments with models of random weights: what they are fed, what they may say, with and without a cache."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from wavemill.jobs.lm.continuing import Books, Stage, Window, continue_grid, continue_sequence, pieces, windows
from wavemill.jobs.lm.drawing import Context, Drawer, Sampling, legal_tokens
from wavemill.jobs.lm.filling import fill_finer, fill_soundstorm
from wavemill.jobs.lm.flowing import continue_frames
from wavemill.jobs.lm.latent_head import NextFrame
from wavemill.jobs.lm.model import ModelConfig, TokenModel
from wavemill.jobs.lm.objectives import ObjectiveContext
from wavemill.pipelines.layouts.registry import parse_layout
from wavemill.storage.layouts import StreamRows
from wavemill.tokenizers.spec import FrameRule, StreamSpec, UserError

CONFIG = ModelConfig(dim=16, num_layers=2, num_heads=2)
_SPEC = StreamSpec(
    tokenizer="toy",
    sample_rate=16_000,
    decode_sample_rate=16_000,
    hop_length=320,
    window_length=1,
    frame_rule=FrameRule.CEIL,
    num_codebooks=3,
    codebook_size=11,
)
SPECS = {
    "acoustic": _SPEC,
    "semantic": replace(_SPEC, hop_length=640, num_codebooks=1, codebook_size=7),
    "fast": replace(_SPEC, hop_length=128, num_codebooks=1, codebook_size=7),
    "text": replace(_SPEC, frame_rule=FrameRule.FREE, num_codebooks=1, codebook_size=30),
    "latents": replace(_SPEC, num_codebooks=0, dim=5),
}
KNOWN = {"acoustic": 9, "semantic": 5, "fast": 23, "text": 6}  # frames of a prompt
TOTALS = {"acoustic": 24, "semantic": 12, "fast": 60, "text": 6}
SEQUENCES = (
    "semantic:stream=semantic,ends=true",
    "flatten:stream=acoustic",
    "flatten:stream=acoustic,codebooks=2,ends=true",
    "coarse:semantic=semantic,acoustic=acoustic,codebooks=2",
    "coarse:semantic=fast,acoustic=acoustic,codebooks=1,ends=true",
    "fine:acoustic=acoustic,coarse=2",
    "stages:semantic=semantic,acoustic=acoustic,coarse=1,ends=true",
    "vall-e:text=text,acoustic=acoustic",
)
GRIDS = (
    "delay:stream=acoustic",
    "delay:stream=acoustic,ends=true",
    "delay:stream=acoustic,delays=2,0,5",
    "parallel:stream=acoustic",
    "parallel:stream=acoustic,codebooks=1,ends=true",
)


class Recorded(TokenModel):
    """Remembers what it is fed and says; wants what is illegal, if it is `perverse`."""

    def __init__(self, column_sizes: list[int], *, perverse: bool = False) -> None:
        torch.manual_seed(5)
        super().__init__(replace(CONFIG, tied=False), column_sizes)
        self.fed: list[Tensor] = []
        self.said: list[Tensor] = []
        self.perverse = perverse

    def forward(self, tokens: Tensor, *more: Any, **named: Any) -> Tensor:
        self.fed.append(tokens[0].clone())
        return super().forward(tokens, *more, **named)

    def logits(self, hidden: Tensor, column: int = 0) -> Tensor:
        logits = super().logits(hidden, column) * 20  # far from uniform
        if self.perverse:
            logits = logits + torch.linspace(0, 1e4, logits.shape[-1])  # the last tokens of a column, special ones
        self.said.append(logits)
        return logits


def stage_of(text: str, *, length: int = 1_000, perverse: bool = False) -> tuple[Stage, Any, Recorded]:
    plan = parse_layout(text).plan(SPECS)
    model = Recorded(list(plan.column_sizes), perverse=perverse).eval()
    return Stage(name=text.partition(":")[0], model=model, specs=SPECS, length=length), plan, model


def drawer(*, seed: int = 0, cached: bool = True, temperature: float = 1.0, top_k: int | None = None) -> Drawer:
    sampling = Sampling(temperature=temperature, top_k=top_k)
    return Drawer(sampling=sampling, generator=torch.Generator().manual_seed(seed), cached=cached)


def prompt_for(text: str) -> Books:
    """A prompt's codes; all of what a layout is given."""
    rng, layout = np.random.default_rng(0), parse_layout(text)
    books: Books = {}
    for stream, asked in layout.streams.items():
        spec = SPECS[stream]
        num = KNOWN[stream]
        if text.startswith("coarse") and stream != "acoustic":
            num = TOTALS[stream]
        books[stream] = rng.integers(spec.codebook_size, size=(asked or spec.num_codebooks, num)).tolist()
    if text.startswith("fine"):
        for book in books["acoustic"][:2]:
            book += rng.integers(SPECS["acoustic"].codebook_size, size=TOTALS["acoustic"] - KNOWN["acoustic"]).tolist()
    return books


def go_on(text: str, books: Books, stage: Stage, plan: Any, how: Drawer) -> None:
    if text in GRIDS:
        continue_grid(stage, plan, books, TOTALS["acoustic"], how)
    else:
        continue_sequence(stage, plan, books, TOTALS, how)


def require_whole(books: Books) -> None:
    for stream, each in books.items():
        for book in each:
            assert len(book) == TOTALS[stream]
            assert 0 <= min(book) <= max(book) < SPECS[stream].codebook_size


def rows(books: Mapping[str, list[list[int]]]) -> dict[str, StreamRows]:
    return {
        stream: StreamRows(np.array([len(each[0])]), [np.array(book) for book in each])
        for stream, each in books.items()
    }


@pytest.mark.parametrize("text", [*SEQUENCES, *GRIDS])
def test_a_model_is_fed_what_its_layout_makes_of_prompt_and_continuation(text: str):
    stage, plan, model = stage_of(text)
    books, before = prompt_for(text), prompt_for(text)
    go_on(text, books, stage, plan, drawer())
    require_whole(books)
    for stream, each in before.items():
        assert [book[: len(old)] for book, old in zip(books[stream], each, strict=True)] == each
    fed = torch.cat(model.fed).numpy()
    laid = plan.lay(rows(books)).tokens
    np.testing.assert_array_equal(fed, laid[: len(fed)])
    after = 1 + int(getattr(parse_layout(text), "ends", False) or text.startswith("vall-e"))  # what nobody asks further
    assert len(laid) - len(fed) <= after


@pytest.mark.parametrize("text", [*SEQUENCES, *GRIDS])
def test_a_cache_changes_nothing(text: str):
    found = []
    for cached in (True, False):
        stage, plan, model = stage_of(text, length=40 if "vall" not in text else 1_000)
        books = prompt_for(text)
        go_on(text, books, stage, plan, drawer(cached=cached))
        found.append((books, model.said))
    (books, said), (others, said_without) = found
    assert books == others
    for with_cache, without in zip(said, said_without, strict=True):
        torch.testing.assert_close(with_cache, without, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("text", [*SEQUENCES, *GRIDS])
def test_a_model_that_wants_something_else_still_says_only_what_may_stand_there(text: str):
    stage, plan, _ = stage_of(text, perverse=True)
    books = prompt_for(text)
    go_on(text, books, stage, plan, drawer())
    require_whole(books)


@pytest.mark.parametrize("text", ["flatten:stream=acoustic", "delay:stream=acoustic"])
def test_the_seed_decides_what_is_drawn_and_without_temperature_nothing_does(text: str):
    def made(**how: Any) -> Books:
        stage, plan, _ = stage_of(text)
        books = prompt_for(text)
        go_on(text, books, stage, plan, drawer(**how))
        return books

    assert made(seed=1) == made(seed=1) != made(seed=2)
    assert made(seed=1, temperature=0.0) == made(seed=2, temperature=0.0) == made(seed=3, top_k=1)


@pytest.mark.parametrize("text", [text for text in (*SEQUENCES, *GRIDS) if "vall" not in text])
def test_what_does_not_fit_into_the_models_steps_is_continued_in_windows_of_them(text: str):
    stage, plan, model = stage_of(text, length=40)
    fed: list[int] = []
    original = model.forward

    def forward(tokens: Tensor, segments: Tensor, positions: Tensor, **named: Any) -> Tensor:
        fed.append(int(positions.max()) + 1)
        return original(tokens, segments, positions, **named)

    model.forward = forward  # type: ignore[method-assign]
    books = prompt_for(text)
    go_on(text, books, stage, plan, drawer())
    require_whole(books)
    assert max(fed) <= 40


def test_windows_begin_with_half_of_what_is_known_and_leave_nothing_out():
    assert list(windows(3, 20, 30)) == [Window(0, 3, 20)]
    assert list(windows(12, 30, 10)) == [Window(7, 12, 17), Window(12, 17, 22), Window(17, 22, 27), Window(22, 27, 30)]
    assert list(windows(12, 20, 10, grain=3)) == [Window(6, 12, 16), Window(9, 16, 19), Window(12, 19, 20)]
    assert list(windows(5, 5, 10)) == []
    assert list(pieces(12, 35, 10)) == [Window(10, 12, 20), Window(20, 20, 30), Window(30, 30, 35)]


def test_fine_tokens_are_made_piece_by_piece_as_they_were_learnt():
    stage, plan, model = stage_of("fine:acoustic=acoustic,coarse=2,piece=10")
    books = prompt_for("fine:acoustic=acoustic,coarse=2")
    continue_sequence(stage, plan, books, TOTALS, drawer())
    require_whole(books)
    laid = plan.lay(rows(books)).tokens
    fed = torch.cat(model.fed).numpy()
    ends = np.array([30, 60, 72])  # of the pieces, of 10, 10 and 4 frames of 3 codebooks
    np.testing.assert_array_equal(fed, np.delete(laid, ends - 1))  # the last token of each is asked nothing


def test_a_model_may_end_what_it_says_but_not_before_its_first_frame():
    stage, plan, _ = stage_of("vall-e:text=text,acoustic=acoustic", perverse=True)  # <eos> is what it wants most
    books = prompt_for("vall-e:text=text,acoustic=acoustic")
    assert continue_sequence(stage, plan, books, TOTALS, drawer(), may_end=True)
    assert len(books["acoustic"][0]) == KNOWN["acoustic"] + 1
    stage, plan, _ = stage_of("vall-e:text=text,acoustic=acoustic")
    assert not continue_sequence(stage, plan, prompt_for("vall-e:text=text,acoustic=acoustic"), TOTALS, drawer())


def test_a_text_that_does_not_fit_and_steps_that_are_too_few_are_said():
    stage, plan, _ = stage_of("vall-e:text=text,acoustic=acoustic", length=20)
    with pytest.raises(UserError, match="sequences of 20 steps; text, prompt and what is to follow take 32"):
        continue_sequence(stage, plan, prompt_for("vall-e:text=text,acoustic=acoustic"), TOTALS, drawer())
    for text in ("flatten:stream=acoustic", "delay:stream=acoustic"):
        stage, plan, _ = stage_of(text, length=3)
        with pytest.raises(UserError, match="sequences of 3 steps, which hold 1 frame"):
            go_on(text, prompt_for(text), stage, plan, drawer())


@pytest.mark.parametrize("semantic", ["semantic", "fast"])
@pytest.mark.parametrize("length", [100, 10])
def test_soundstorm_fills_in_all_codebooks_and_leaves_what_is_given(semantic: str, length: int):
    text = f"soundstorm:semantic={semantic},acoustic=acoustic"
    stage, plan, model = stage_of(text, length=length, perverse=True)
    books = {**prompt_for(text), semantic: prompt_for(f"coarse:semantic={semantic},acoustic=acoustic")[semantic]}
    before = {stream: [list(book) for book in each] for stream, each in books.items()}
    calls: list[tuple[str, int, int]] = []
    how = drawer()
    how.on_draw = lambda *told: calls.append(told)
    fill_soundstorm(stage, plan, books, 24, how, semantic=semantic, acoustic="acoustic", iterations=4)
    require_whole(books)
    assert books[semantic] == before[semantic]
    assert [book[:9] for book in books["acoustic"]] == before["acoustic"]
    assert calls[-1][1:] == (45, 45)
    if length == 100:
        assert len(model.fed) == 4 + 1 + 1
        laid = plan.lay(rows(books)).tokens
        finest = model.fed[-1].numpy()  # when all but the last codebook is known
        np.testing.assert_array_equal(finest[:, :-1], laid[:, :-1])
        assert (finest[9:24, -1] == plan.vocabulary.token("<mask>", len(plan.columns) - 1)).all()
        np.testing.assert_array_equal(finest[:9, -1], laid[:9, -1])


def test_the_second_model_of_vall_e_fills_in_the_finer_codebooks_in_turn():
    text = "vall-e-nar:text=text,acoustic=acoustic"
    stage, plan, model = stage_of(text, perverse=True)
    books = prompt_for(text)
    books["acoustic"][0] += [3] * 15
    before = [book[:9] for book in books["acoustic"]]
    fill_finer(stage, plan, books, 9, drawer(), text="text", acoustic="acoustic")
    require_whole(books)
    assert [book[:9] for book in books["acoustic"]] == before
    laid = plan.lay(rows(books)).tokens
    second, third = (fed.numpy() for fed in model.fed)
    np.testing.assert_array_equal(third[:, :2], laid[:, :2])
    np.testing.assert_array_equal(second[:, 0], laid[:, 0])
    pads = [plan.vocabulary.token("<pad>", book) for book in (1, 2)]
    assert (second[7 + 9 :, 1:] == pads).all()
    assert (third[7 + 9 :, 2] == pads[1]).all()


def test_frames_of_numbers_are_continued_with_and_without_a_cache_alike():
    layout = parse_layout("continuous:stream=latents")
    torch.manual_seed(3)
    plan = layout.plan(SPECS)
    objective = NextFrame(ObjectiveContext(plan, SPECS, CONFIG, "", layout)).eval()
    torch.nn.init.normal_(objective.head.out.weight, std=0.2)
    frames_TD = torch.randn(9, 5).half()
    found = [
        continue_frames(objective, plan, frames_TD, 24, drawer(cached=cached), length=length)
        for cached, length in ((True, 100), (False, 100), (True, 10))
    ]
    for each in found:
        assert each.shape == (24, 5)
        assert each.dtype == torch.float16
        assert torch.equal(each[:9], frames_TD)
    torch.testing.assert_close(found[0], found[1], rtol=1e-2, atol=1e-2)
    assert not torch.equal(found[0], found[2])  # shorter windows see less
    assert len(found[0].unique(dim=0)) == 24


def test_the_likeliest_few_are_drawn_as_often_as_the_model_says():
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))
    legal = torch.tensor([True, True, True, True])

    def shares(legal_V: Tensor, **how: Any) -> list[float]:
        drawn = drawer(**how).draw(logits.expand(20_000, -1), legal_V)
        return (torch.bincount(drawn, minlength=4) / 20_000).tolist()

    assert shares(legal) == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.015)
    assert shares(legal, top_k=2) == pytest.approx([0.625, 0.375, 0, 0], abs=0.015)
    assert shares(legal, temperature=0.5) == pytest.approx([0.685, 0.247, 0.062, 0.007], abs=0.015)
    assert shares(torch.tensor([False, True, True, False]), top_k=3) == pytest.approx([0, 2 / 3, 1 / 3, 0], abs=0.015)


def test_a_context_continues_from_what_was_added_piece_by_piece():
    _, plan, model = stage_of("flatten:stream=acoustic")
    tokens = np.arange(12) % plan.column_sizes[0]
    whole, parts = Context(model), Context(model)
    whole.add(tokens)
    parts.add(tokens[:5])
    with torch.inference_mode():
        parts.hidden()
        parts.add(tokens[5:6])
        parts.add(tokens[6:])
        torch.testing.assert_close(parts.hidden(), whole.hidden(), rtol=1e-4, atol=1e-5)


def test_legal_tokens_are_those_of_the_blocks():
    plan = parse_layout("flatten:stream=acoustic,ends=true").plan(SPECS)
    block = plan.vocabulary.block("acoustic", 1)
    assert legal_tokens(plan.column_sizes[0], [block]).nonzero()[:, 0].tolist() == list(range(11, 22))
