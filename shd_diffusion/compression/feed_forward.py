"""One feed-forward layer with fewer neurons, fitted on the activations that a walk through the model has brought."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from shd_diffusion.compression.lockstep import Call
from shd_diffusion.models.layouts import feed_forwards
from shd_diffusion.models.squeezed import cut_neurons
from shd_diffusion.squeezing.moments import Moments, share
from shd_diffusion.squeezing.neurons import remove_neurons


def squeeze_feed_forward(
    model: nn.Module, name: str, keep: int, calls: Sequence[Call], targets: Sequence[Tensor]
) -> tuple[float, float]:
    """Leave a feed-forward layer so many neurons, as close to the targets as least squares brings them, in place.

    Where heads go into its output layer beside the neurons, their weights are fitted with the neurons'.

    Args:
        model: the model around the layer.
        name: its path, one of `feed_forwards`.
        keep: neurons that stay, fewer than there are.
        calls: calls of its output layer with the calibration batches; their activations are cut too.
        targets: what that layer should put out in each call, (..., C).

    Returns:
        |error|² / |target|², about the means, of the layer as it is and of the one with fewer neurons.
    """
    output = feed_forwards(model)[name].output
    last: Any = model.get_submodule(output.layer)
    before = last.weight.detach().flatten(1).T.double()
    moments = _moments(last, calls, targets)
    fitted = moments if last.bias is None else moments.centred()
    kept, weight, _ = remove_neurons(fitted, before, keep, fixed=output.start)

    whole = weight.new_zeros(before.shape).index_copy(0, kept, weight)
    cut_neurons(model, name, kept[output.start :] - output.start)
    last.weight.data.copy_(weight.T.reshape(last.weight.shape))
    if last.bias is not None:
        last.bias.data.copy_(moments.constant(whole))
    for call in calls:
        cut = channels_last(last, call.args[0])[..., kept]
        call.args = (channels_first(last, cut), *call.args[1:])
    return share(fitted.loss(before), fitted.energy), share(fitted.loss(whole), fitted.energy)


def neuron_losses(
    model: nn.Module, name: str, counts: Sequence[int], calls: Sequence[Call], targets: Sequence[Tensor]
) -> dict[int, float]:
    """What `squeeze_feed_forward` to each of several counts would lose; the layer stays as it is.

    Neurons leave one by one, so that one row of removals passes through all counts.

    Args:
        model: see `squeeze_feed_forward`.
        name: see `squeeze_feed_forward`.
        counts: neurons that stay, fewer than there are.
        calls: see `squeeze_feed_forward`; they stay as they are.
        targets: see `squeeze_feed_forward`.
    """
    layout = feed_forwards(model)[name]
    last: Any = model.get_submodule(layout.output.layer)
    moments = _moments(last, calls, targets)
    fitted = moments if last.bias is None else moments.centred()
    weight = last.weight.detach().flatten(1).T
    *_, objective = remove_neurons(fitted, weight, min(counts), fixed=layout.output.start)
    return {count: share(objective[layout.neurons - count], fitted.energy) for count in counts}


def _moments(layer: Any, calls: Sequence[Call], targets: Sequence[Tensor]) -> Moments:
    """Those of what goes into an output layer and of what it should put out."""
    moments = Moments.zeros(layer.weight.flatten(1).shape[1], targets[0].shape[-1], targets[0].device)
    for call, target in zip(calls, targets, strict=True):
        moments.add(channels_last(layer, call.args[0]).flatten(0, -2), target.flatten(0, -2))
    return moments


def channels_last(layer: nn.Module, x: Tensor) -> Tensor:
    """What a linear layer or a 1×1 convolution takes or gives, its channels last."""
    return x.movedim(1, -1) if isinstance(layer, nn.Conv2d) else x


def channels_first(layer: nn.Module, x: Tensor) -> Tensor:
    """The inverse of `channels_last`."""
    return x.movedim(-1, 1) if isinstance(layer, nn.Conv2d) else x
