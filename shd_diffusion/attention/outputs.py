"""What chosen modules of a model put out, while the model runs as it always does."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from shd_diffusion.attention.capture import unwrap
from shd_diffusion.attention.processors import in_backward


class OutputCapture:
    """Context in which every forward pass of `model` leaves the output of each named module.

    An output is kept with its graph. What a backward pass runs again (non-reentrant gradient checkpointing) is
    not kept.

        with OutputCapture(student, ["transformer_blocks.0"]) as capture:
            student(noised, timestep=timesteps, class_labels=labels)
            tokens = capture.outputs["transformer_blocks.0"]

    Args:
        model: a diffusers model, also inside DistributedDataParallel.
        modules: module paths inside the model.

    Attributes:
        outputs: of the last forward pass by module path.

    Raises:
        AttributeError: the model has no such module.
    """

    def __init__(self, model: nn.Module, modules: Iterable[str]) -> None:
        self._model = unwrap(model)
        self._modules = {name: self._model.get_submodule(name) for name in modules}
        self._hooks: list[Any] = []
        self._with_gradients = False
        self.outputs: dict[str, Tensor] = {}

    def __enter__(self) -> OutputCapture:
        self._hooks = [
            self._model.register_forward_pre_hook(self._begin),
            *(m.register_forward_hook(partial(self._keep, name)) for name, m in self._modules.items()),
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self.outputs = {}

    def _begin(self, *_: Any) -> None:
        self.outputs, self._with_gradients = {}, torch.is_grad_enabled()

    def _keep(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        if in_backward():
            return
        if self._with_gradients and not torch.is_grad_enabled():
            raise RuntimeError(
                f"`{name}` runs without gradients in a forward pass that has them, under reentrant "
                "checkpointing; checkpoint with use_reentrant=False (diffusers' default)"
            )
        if not isinstance(output, Tensor):
            raise RuntimeError(
                f"`{name}` puts out {type(output).__name__}, not one tensor: it has no features to match"
            )
        self.outputs[name] = output
