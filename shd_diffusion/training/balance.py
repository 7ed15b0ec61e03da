"""Term balancing: weights that count how hard a term pulls at the model, not how large it is."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from shd_diffusion.config import DistillConfig
from shd_diffusion.training.methods import Batch, Method

DECAY = 0.9  # of the running mean of squared norms, a batch
LARGEST = 1e4  # factor on a weight, and the smallest is its inverse
UNBALANCED = ("denoise", "variance")  # the yardstick, and what trains outputs of its own


class Balanced:
    """A method whose weights are multiples of the denoising term: a term of weight 2 has, on the model's last
    block, a gradient twice as long as the weighted denoising term's.

    The lengths are running means over the batches before, so all batches of a step are weighed alike. A term that
    does not reach the last block keeps its plain weight.
    """

    def __init__(self, method: Method, model: nn.Module, accelerator: Accelerator) -> None:
        self.method, self.accelerator = method, accelerator
        self.block = [parameter for parameter in last_block(model).parameters() if parameter.requires_grad]
        self.squares: dict[str, Tensor] = {}

    def __call__(self, model: nn.Module, batch: Batch, step: int) -> dict[str, Tensor]:
        terms = self.method(model, batch, step)
        for name, term in terms.items():
            square = self._gradient(term).square().sum()
            if square.isfinite():
                self.squares[name] = torch.lerp(square, self.squares.get(name, square), DECAY)
        return terms

    def weights(self, step: int) -> dict[str, float]:
        weights = self.method.weights(step)
        return {name: weight * self._factor(name, weights["denoise"]) for name, weight in weights.items()}

    def divergences(self, step: int) -> dict[str, Tensor]:
        return self.method.divergences(step)

    def parameters(self) -> list[nn.Parameter]:
        return self.method.parameters()

    def state_dict(self) -> dict[str, Tensor]:
        return self.method.state_dict() | {f"balance/{name}": square for name, square in self.squares.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        mine = {name for name in state if name.startswith("balance/")}
        self.squares = {
            name.removeprefix("balance/"): state[name].to(self.accelerator.device) for name in mine
        }
        self.method.load_state_dict({name: value for name, value in state.items() if name not in mine})

    def _gradient(self, term: Tensor) -> Tensor:
        """Of a term by the last block's parameters, over all processes, (P,)."""
        parts = torch.autograd.grad(
            term, self.block, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        return self.accelerator.reduce(torch.cat([part.flatten().float() for part in parts]), "mean")

    def _factor(self, name: str, yardstick: float) -> float:
        if name.startswith(UNBALANCED) or not self.squares.get(name, 0):
            return 1.0
        factor = yardstick * float((self.squares["denoise"] / self.squares[name]).sqrt())
        return min(max(factor, 1 / LARGEST), LARGEST)


def check_balance(config: DistillConfig, model: nn.Module) -> None:
    """See that the terms of a config can be balanced, if they are to be.

    Raises:
        ValueError: they cannot.
    """
    if config.losses.balance:
        last_block(model)
        if not config.losses.denoise.weight:
            raise ValueError("there is no denoising term to compare with; set losses.denoise.weight")
        for key in ("shard", "compile"):  # their backward passes cannot be taken a term at a time
            if getattr(config.train, key):
                raise ValueError(f"cannot be had with train.{key}; set one of them to false")


def last_block(model: nn.Module) -> nn.Module:
    """The last block of the last block list of a model.

    Raises:
        ValueError: the model has no block list.
    """
    lists = [child for child in model.children() if isinstance(child, nn.ModuleList) and len(child)]
    if not lists:
        raise ValueError(f"{type(model).__name__} has no list of blocks")
    return lists[-1][-1]
