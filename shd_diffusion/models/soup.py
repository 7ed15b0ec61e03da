"""Several trained models as one: the mean of their weights ("Model soups", Wortsman et al. 2022, the uniform one)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from diffusers import ModelMixin

from shd_diffusion.errors import UserError


def mean_model(paths: Sequence[str], load: Callable[[str], ModelMixin]) -> ModelMixin:
    """A model whose every weight is θ = Σ θ_i / n, summed in float64.

    That works where the models were trained from the same weights, of one seed or one `pretrained` model: from others
    they learn other neurons at the same place. Nothing here can tell.

    Args:
        paths: of the models.
        load: from a path to a model.

    Raises:
        UserError: one cannot be loaded, or is of another config than the first, say of more heads in its channels.
    """
    model = load(paths[0])
    sums = {name: tensor.double() for name, tensor in model.state_dict().items()}
    shapes = {name: tensor.shape for name, tensor in sums.items()}
    for path in paths[1:]:
        other = load(path)
        tensors = other.state_dict()
        if {name: tensor.shape for name, tensor in tensors.items()} != shapes:
            raise UserError(
                f"{path}: its weights have other shapes than those of {paths[0]}; average models of one kind"
            )
        if different := [
            key for key, value in _settings(model).items() if _settings(other).get(key) != value
        ]:
            raise UserError(
                f"{path}: its `{different[0]}` is another than that of {paths[0]}; average models of one kind"
            )
        for name, tensor in tensors.items():
            sums[name] += tensor
    model.load_state_dict({name: total / len(paths) for name, total in sums.items()})
    return model


def _settings(model: ModelMixin) -> dict[str, Any]:
    """Its config, without diffusers' own notes such as where it was loaded from."""
    return {key: value for key, value in model.config.items() if not key.startswith("_")}
