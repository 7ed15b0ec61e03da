"""One feed-forward layer with fewer neurons, fitted on the activations that a walk through the model has brought."""

from __future__ import annotations

from collections.abc import Sequence

from diffusers.models.attention import FeedForward
from torch import Tensor

from shd_diffusion.compression.lockstep import Call
from shd_diffusion.models.squeezed import cut_neurons, neurons
from shd_diffusion.squeezing.moments import Moments
from shd_diffusion.squeezing.neurons import remove_neurons


def squeeze_feed_forward(
    layer: FeedForward, keep: int, calls: Sequence[Call], targets: Sequence[Tensor]
) -> tuple[float, float]:
    """Leave a feed-forward layer so many neurons, as close to the targets as least squares brings them, in place.

    Args:
        layer: plain or gated.
        keep: neurons that stay, fewer than there are.
        calls: calls of its last linear layer `net.2` with the calibration batches; their activations are cut too.
        targets: what that layer should put out in each call, (..., C).

    Returns:
        |error|² / |target|², about the means, of the layer as it is and of the one with fewer neurons.
    """
    last = layer.net[2]
    moments = Moments.zeros(neurons(layer), last.out_features, targets[0].device)
    for call, target in zip(calls, targets, strict=True):
        moments.add(call.args[0].flatten(0, -2), target.flatten(0, -2))
    fitted = moments if last.bias is None else moments.centred()
    before = last.weight.detach().T.double()
    kept, weight, _ = remove_neurons(fitted, before, keep)

    whole = weight.new_zeros(before.shape).index_copy(0, kept, weight)
    cut_neurons(layer, kept)
    last.weight.data.copy_(weight.T)
    if last.bias is not None:
        last.bias.data.copy_(moments.constant(whole))
    for call in calls:
        call.args = (call.args[0][..., kept], *call.args[1:])
    energy = float(fitted.energy)
    return fitted.loss(before) / energy, fitted.loss(whole) / energy
