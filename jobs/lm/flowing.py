"""Streams of numbers continued frame by frame, each drawn by the flow head of its model.

Axes: T frames, D numbers of a frame, S steps, H width of the model.
"""

import torch
from torch import Tensor

from ...pipelines.layouts.continuous import ContinuousPlan
from ...tokenizers.spec import UserError
from .continuing import windows
from .drawing import Drawer
from .latent_head import NextFrame
from .model import Cache

_LARGEST = torch.finfo(torch.float16).max  # that a stream can hold


@torch.inference_mode()
def continue_frames(
    objective: NextFrame, plan: ContinuousPlan, frames_TD: Tensor, total: int, drawer: Drawer, *, length: int
) -> Tensor:
    """The frames `[T, D]` float16 of a prompt, and those that the model draws after them, `total` in all.

    `length` are the steps that the model was trained on: what does not fit is continued window by window. Temperature
    scales the noise's variance, as in CALM (Rouard et al. 2025). Raises `UserError` if there is no room.
    """
    size = length - int(plan.ends)
    if size < 2 < total:
        raise UserError(
            f"The continuous run was trained on sequences of {length} steps: too few to go on from. Train with a "
            "larger --length."
        )
    device, frame = objective.mean_D.device, objective.frame_token
    first = [plan.vocabulary.token("<bos>")] if plan.ends else []
    begun = len(frames_TD)
    for window in windows(begun, total, size):
        cache = Cache() if drawer.cached else None
        seen_TD = frames_TD[window.begin :].to(device)
        tokens = torch.tensor([first + [frame] * len(seen_TD)], device=device)
        for done in range(window.known + 1, window.end + 1):
            before = 0 if cache is None else cache.num_steps
            positions_1S = before + torch.arange(tokens.shape[1], device=device)[None]
            named = {objective.stream: seen_TD}
            hidden_1SH = objective(tokens, torch.ones_like(positions_1S), positions_1S, named, cache)
            next_1D = objective.sample(
                hidden_1SH[:, -1], drawer.generator, temperature=drawer.sampling.temperature
            ).clamp(-_LARGEST, _LARGEST)
            next_1D = next_1D.to(torch.float16)
            frames_TD = torch.cat([frames_TD, next_1D.cpu()])
            seen_TD = next_1D if cache is not None else torch.cat([seen_TD, next_1D])
            one = torch.full((1, 1), frame, device=device)
            tokens = one if cache is not None else torch.cat([tokens, one], dim=1)
            drawer.on_draw("continuous", done - begun, total - begun)
    return frames_TD
