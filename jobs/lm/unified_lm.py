"""The objective that begins with a text language model: its embeddings, extended by the layout's audio tokens.

Axes: B sequences, L steps, D width, V tokens, N new tokens.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...pipelines.layouts.timed import has_times, num_text_ids
from ...storage.codes import open_stream
from ...storage.root import Root
from ...tokenizers.hub import TEXT_PATTERNS, files_sha256, load_language_model
from ...tokenizers.spec import UserError
from .objectives import NextToken, Objective, ObjectiveContext

_TAKEN = ("inputs_embeds", "attention_mask", "position_ids")


class TextModelNext(NextToken):
    """Each step from those before it by a causal language model of Hugging Face, whose vocabulary is the layout's.

    AudioPaLM (Rubenstein et al. 2023) over layout `unified`, SpiritLM (Nguyen et al. 2024) over `interleaved`: any
    layout of one column whose text ids come first. Option `model` names the folder (or a model of the hub), of which
    config, weights and tied embeddings are taken; the sizes of the reference model do not count. Raises `UserError`.
    """

    def __init__(self, context: ObjectiveContext) -> None:
        Objective.__init__(self)  # not the reference model
        context.require_options("unified", "model")
        source = context.option("model")
        if source is None:
            raise UserError(
                "Objective unified begins with a text language model: name its folder, as in "
                "--objective unified,model=FOLDER."
            )
        self.vocabulary = context.plan.vocabulary
        self.text_streams, num_text = _text(context)
        loaded, self.folder = load_language_model(source)
        self.source = source
        self.model = TextModel(loaded, source, num_text, context.plan.column_sizes[0])

    def prepare(self, root: Root, versions: Mapping[str, int]) -> None:
        """Raise `UserError` unless the text streams are of the text tokenizer that lies in the model's folder."""
        files = [self.folder / name for name in TEXT_PATTERNS if (self.folder / name).exists()]
        if not (self.folder / "tokenizer.json").exists():
            raise UserError(
                f"{self.source} holds no text tokenizer (tokenizer.json): nobody could tell whether the ids of stream "
                f"{self.text_streams[0]!r} are those that its embeddings are of. Put it there, or name another model."
            )
        for stream in self.text_streams:
            written = open_stream(root, stream, version=versions[stream]).metadata.get("fingerprint", {}).get("words")
            if written is not None and written != files_sha256(files):
                raise UserError(
                    f"The ids of stream {stream!r} are of another text tokenizer than the one in {self.source}, whose "
                    "embeddings would be those of other words. Make a stream of its ids: wavemill tokenize "
                    f"{root} --stream NAME=text-tokens,weights={self.source}"
                )


class TextModel(nn.Module):
    """A causal language model of Hugging Face, called as a `TokenModel` of one column.

    Its first `num_text` tokens keep their rows of the embedding and of the head. What else it has is dropped; further
    rows, up to `size`, are drawn from a normal distribution with the mean and the covariance of the kept ones (Hewitt
    2021): new tokens begin as likely as an average word, so that text hardly changes its probabilities, hidden vectors
    stay in the range that the layers know, and no two audio tokens begin alike.

    Raises `UserError` for a model with fewer rows than there are text ids, one that takes no positions or masks, and
    one that mixes packed segments or does more to its logits than its head says.
    """

    def __init__(self, model: Any, source: str, num_text: int, size: int) -> None:
        super().__init__()
        there = model.get_input_embeddings().weight.shape[0]
        if there < num_text:
            raise UserError(
                f"The text stream has {num_text:,} ids, and the model in {source} has {there:,}: they are of two "
                "tokenizers. Make the stream with the model's, or name another model."
            )
        if missing := [name for name in _TAKEN if name not in inspect.signature(model.base_model.forward).parameters]:
            raise UserError(
                f"The model in {source} ({type(model).__name__}) does not take {missing[0]}, which packed sequences "
                "need. Name another model."
            )
        self.language_model = model.requires_grad_(True)
        _require_apart(self, source)
        is_tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
        model.resize_token_embeddings(num_text, mean_resizing=False)
        model.resize_token_embeddings(size, mean_resizing=False)
        _draw_rows(model.get_input_embeddings(), num_text)
        if not is_tied:
            _draw_rows(model.get_output_embeddings(), num_text)

    def forward(
        self,
        tokens_BL: Tensor,
        segment_ids_BL: Tensor,
        positions_BL: Tensor,
        frames: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Hidden vectors `[B, L, D]`; a step sees those of its segment up to itself."""
        x_BLD = self.language_model.get_input_embeddings()(tokens_BL)
        num = tokens_BL.shape[1]
        seen_BLL = segment_ids_BL[:, :, None] == segment_ids_BL[:, None, :]
        seen_BLL = seen_BLL & torch.ones(num, num, dtype=torch.bool, device=x_BLD.device).tril()
        lowest = torch.finfo(torch.bfloat16).min  # of float32, too, under autocast
        mask_B1LL = torch.zeros(seen_BLL.shape, dtype=x_BLD.dtype, device=x_BLD.device).masked_fill(~seen_BLL, lowest)
        return self.language_model.base_model(
            inputs_embeds=x_BLD, attention_mask=mask_B1LL[:, None], position_ids=positions_BL.long(), use_cache=False
        ).last_hidden_state

    def logits(self, hidden: Tensor, column: int = 0) -> Tensor:
        """`[..., V]` of hidden vectors `[..., D]`."""
        return self.language_model.get_output_embeddings()(hidden)


def _text(context: ObjectiveContext) -> tuple[list[str], int]:
    """The streams of text of a layout, and how many ids they have, which are its first tokens. Raises `UserError`."""
    plan = context.plan
    roles = [getattr(context.layout, role, None) for role in ("text", "translation")]
    streams = [stream for stream in roles if stream is not None]
    names = {"text", *streams}
    first = next(block for block in plan.vocabulary.blocks if block.column == 0)
    if len(plan.column_sizes) != 1 or plan.frame_tokens or not streams or first.name not in names:
        raise UserError(
            "Objective unified begins with a text language model: take a layout of one token a step whose text ids "
            "come first, such as unified with a text stream, or interleaved."
        )
    timed = [num_text_ids(spec) for stream in streams if has_times(spec := context.specs[stream])]
    return streams, min([first.size, *timed])  # the ids of times are no words


@torch.no_grad()
def _draw_rows(module: Any, num_old: int) -> None:
    """Set the rows behind the first ones of an embedding or a head to draws from the same distribution."""
    for parameter in (module.weight, getattr(module, "bias", None)):
        if parameter is None:
            continue
        rows_VD = parameter.data.reshape(len(parameter), -1)
        old_VD = rows_VD[:num_old].double()
        away_VD = old_VD - old_VD.mean(dim=0)
        values_D, vectors_DD = torch.linalg.eigh(away_VD.T @ away_VD / num_old)
        root_DD = vectors_DD * values_D.clamp(min=0).sqrt()
        drawn_ND = torch.randn(len(rows_VD) - num_old, old_VD.shape[1], dtype=torch.float64)
        rows_VD[num_old:] = (old_VD.mean(dim=0) + drawn_ND @ root_DD.T).to(rows_VD.dtype)


@torch.no_grad()
def _require_apart(model: TextModel, source: str) -> None:
    """Raise `UserError` unless a packed segment gives what it gives alone, and the head gives the model's logits."""
    tokens_BL, ids_BL = torch.tensor([[3, 1, 2, 1, 2, 0]]), torch.tensor([[1, 1, 1, 2, 2, 0]])
    positions_BL = torch.tensor([[0, 1, 2, 0, 1, 0]])
    packed_BLV = model.logits(model(tokens_BL, ids_BL, positions_BL))
    for begin, end in ((0, 3), (3, 5)):
        alone_BLV = model.language_model(tokens_BL[:, begin:end]).logits
        if not torch.allclose(packed_BLV[:, begin:end], alone_BLV, rtol=1e-3, atol=1e-3):
            raise UserError(
                f"The model in {source} ({type(model.language_model).__name__}) cannot learn from packed sequences: "
                "it does not keep to their masks and positions, or changes logits behind its head. Name another model."
            )
