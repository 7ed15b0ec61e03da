"""The share of images that a classifier of the data set recognises as the class that was asked for."""

from __future__ import annotations

from torch import Tensor

from shd_diffusion.evaluation.metric import Column, Metric, Need


def label_accuracy(logits: Tensor, labels: Tensor) -> float:
    """The share of logits (N, classes) that are largest at their label (N,)."""
    return (logits.argmax(dim=1) == labels).double().mean().item()


LABEL_ACCURACY = Metric(
    "accuracy",
    lambda inputs: label_accuracy(inputs.class_logits, inputs.labels),
    (Column("label_accuracy", "Class accuracy", "Acc", "higher", ".1%"),),
    needs=(Need.OWN_CLASSES, Need.LABELS),
    usual=True,
)
