"""Whether a denoiser is told here what its pipeline tells it: the same arguments, the timestep in the same unit, and a
prediction of the same sign.

Classes differ in all of them, and `FAMILIES` says how. One that is missing there would answer, and teach, nonsense
without a word. So before any prompt is encoded, a pipeline's call and `predict` are run side by side up to the
scheduler's first step, both with made-up numbers for a prediction.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from shd_diffusion.errors import UserError, one_line
from shd_diffusion.models.denoiser import pad, predict
from shd_diffusion.models.families import family_of, pack
from shd_diffusion.models.prompts import PromptEncoder, denoiser_name, first_step
from shd_diffusion.models.trace import trace

NEAR = 0.01
"""A share in which two may differ, as bfloat16 rounds them by 0.004; other conventions differ by 1 and more."""


def check_convention(encoder: PromptEncoder, shape: Sequence[int]) -> None:
    """See that `predict` tells a pipeline's denoiser, and its scheduler, what the pipeline's own call tells them.

    Args:
        encoder: of the pipeline, whose denoiser may be on the meta device.
        shape: of a sample, (C, H, W) or of a video (C, F, H, W).

    Raises:
        UserError: it does not, the denoiser cannot be called or traced so, or is a latent consistency model.
    """
    pipeline = encoder.pipeline
    model: Any = getattr(pipeline, denoiser_name(pipeline))
    family, kind = family_of(model), type(model).__name__
    own = first_step(pipeline, ["a"], **encoder.call(**encoder.without_guidance))
    if own.calls[-1].get("timestep_cond") is not None:
        raise UserError(
            f"{kind} is told its guidance scale as `timestep_cond`, as latent consistency models are; these are not "
            "known here, so take the model that they were made of"
        )
    predicted, timestep, *_ = own.told
    condition = pad(encoder.encode(["a"]))
    timesteps = torch.as_tensor(timestep, device="cpu").reshape(1)
    try:
        with torch.no_grad(), _predicting(model, own.predicted) as seen:
            found = predict(model, torch.zeros(1, *shape), timesteps, condition)
    except Exception as error:  # a class that wants other arguments, in whatever way it says so
        raise UserError(f"{kind} is not called here as its pipeline calls it ({one_line(error)})") from error
    told = {name for name, value in own.calls[-1].items() if isinstance(value, Tensor)}
    if missing := sorted(name for name in told if seen.get(name) is None):
        raise UserError(
            f"{kind}: {type(pipeline).__name__} tells it `{missing[0]}`, which is no condition of a prompt; its class "
            "has a convention of its own, which is not known here"
        )
    found = found if family.patch is None else pack(found, family.patch)
    theirs, ours = own.calls[-1].get(family.timestep), seen.get(family.timestep)
    if not _near(theirs, ours):
        raise UserError(
            f"{kind}: {type(pipeline).__name__} tells it a timestep of {_told(theirs)}, here it would be "
            f"{_told(ours)}; its class has a convention of its own, which is not known here"
        )
    channels = min(len(found[0]), len(predicted[0]))  # a scheduler may be given no variance
    if not _near(predicted[:, :channels].cpu(), found[:, :channels]):
        raise UserError(
            f"{kind}: {type(pipeline).__name__} gives its scheduler another prediction than is learned here; its class "
            "has a convention of its own, which is not known here"
        )
    try:
        trace(model, tuple(shape), condition)  # as training will, before hours of encoding
    except ValueError as error:
        raise UserError(f"{error}; its class is not known here") from error


@contextmanager
def _predicting(model: nn.Module, prediction: Any) -> Iterator[dict[str, Any]]:
    """The model predicts this, whatever it is called with, which is noted by name."""
    signature, seen = inspect.signature(model.forward), dict[str, Any]()

    def forward(*args: Any, **kwargs: Any) -> tuple[Any]:
        seen.update(signature.bind(*args, **kwargs).arguments)
        return (prediction,)

    model.__dict__["forward"] = forward
    try:
        yield seen
    finally:
        del model.__dict__["forward"]


def _near(one: Any, other: Any) -> bool:
    """Whether both are the same numbers; one number stands for as many equal ones."""
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return one is other
    first, second = one.double().cpu(), other.double().cpu()
    if first.shape != second.shape and 1 in (first.unique().numel(), second.unique().numel()):
        first, second = first.flatten()[:1], second.flatten()[:1]
    if first.shape != second.shape:
        return False
    largest = torch.maximum(first.abs(), second.abs()).max()
    return bool((first - second).abs().max() <= NEAR * largest)


def _told(timestep: Any) -> str:
    return (
        f"{timestep.flatten()[0].item():g}"
        if isinstance(timestep, Tensor) and timestep.numel()
        else "nothing"
    )
