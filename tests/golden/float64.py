"""All of a computation in float64, in code that asks for float32 by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class InFloat64(TorchFunctionMode):
    """Whatever asks for float32 gets float64: tables of timesteps and of noise, casts of a loss.

    Models, inputs and floating point timesteps are to be float64 already.
    """

    def __torch_function__(
        self,
        function: Callable[..., object],
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        function = Tensor.double if function is Tensor.float else function
        args = [torch.float64 if value is torch.float32 else value for value in args]
        kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()}
        return function(*args, **kwargs)
