"""What changes while a run trains."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import ModelMixin
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from shd_diffusion.config import TrainConfig
from shd_diffusion.training.sharding import gather, like, scatter, shard


@dataclass
class Training:
    """A model with its optimiser, learning rate and averaged weights.

    `parameters` are the model's, `extra` the method's own: trained with the model, neither averaged nor a part of
    it. `wrapped` is the model as it is called in training; its parameters may be sharded over the processes.
    """

    kind: type[ModelMixin]
    model: ModelMixin
    parameters: list[nn.Parameter]
    extra: list[nn.Parameter]
    wrapped: nn.Module
    optimizer: torch.optim.Optimizer
    rate: torch.optim.lr_scheduler.LRScheduler
    average: EMAModel

    @classmethod
    def prepare(
        cls, model: ModelMixin, extra: list[nn.Parameter], config: TrainConfig, accelerator: Accelerator
    ) -> Training:
        """Everything on its device, ready for step 0."""
        kind = type(model)
        model.to(accelerator.device)
        if config.shard:
            shard(model)
        parameters = list(model.parameters())
        groups = [{"params": part} for part in (parameters, extra) if part]
        optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, weight_decay=config.weight_decay)
        warm = config.lr_schedule == "constant" and config.warmup_steps  # to diffusers a schedule of its own
        rate = get_scheduler(
            "constant_with_warmup" if warm else config.lr_schedule,
            optimizer,
            num_warmup_steps=config.warmup_steps,
            num_training_steps=config.max_steps,
        )
        average = EMAModel(parameters, decay=config.ema_decay, foreach=not config.shard)
        optimizer, rate = accelerator.prepare(optimizer, rate)
        wrapped = model if config.shard else accelerator.prepare(model)
        return cls(kind, model, parameters, extra, wrapped, optimizer, rate, average)

    @contextmanager
    def averaged(self) -> Iterator[ModelMixin]:
        """The model with its averaged weights, in evaluation mode, for as long as the context lasts."""
        self.average.store(self.parameters)
        self.average.copy_to(self.parameters)
        self.model.eval()
        try:
            yield self.model
        finally:
            self.model.train()
            self.average.restore(self.parameters)

    def export(self) -> ModelMixin:
        """The trained model with its averaged weights, whole in every process; training is over then."""
        self.average.copy_to(self.parameters)
        if type(self.model) is self.kind:
            return self.model.eval()
        model = self.kind.from_config(self.model.config).to(self.model.device)
        scatter(gather(_weights(self.model), keep=True), _weights(model))
        return model.eval()

    # --- checkpoints: whole tensors and plain values, whatever the number of processes -----------------------------

    def tensors(self, keep: bool) -> dict[str, dict[str, Tensor]]:
        """Files of tensors by their names, in a process that is to keep them; every process must call this."""
        return {
            "model": gather(_weights(self.model), keep),
            "average": gather(self._shadow(), keep),
            "optimizer": gather(self._moments(), keep),
        }

    def values(self) -> dict[str, Any]:
        """All that is no tensor, ready for JSON."""
        return {
            "optimizer": self.optimizer.state_dict()["param_groups"],
            "rate": self.rate.state_dict(),
            "average": self.average.optimization_step,
        }

    def restore(self, tensors: dict[str, dict[str, Tensor]], values: dict[str, Any]) -> None:
        """Back to what `tensors` and `values` have told; every process must call this."""
        scatter(tensors["model"], _weights(self.model))
        scatter(tensors["average"], self._shadow())
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors["optimizer"].items():
            index, key = name.split("/")
            state.setdefault(int(index), {})[key] = like(tensor, parameters[int(index)])
        self.optimizer.load_state_dict({"state": state, "param_groups": values["optimizer"]})
        self.rate.load_state_dict(values["rate"])
        self.average.optimization_step = values["average"]

    def _shadow(self) -> dict[str, Tensor]:
        return {str(index): parameter for index, parameter in enumerate(self.average.shadow_params)}

    def _moments(self) -> dict[str, Tensor]:
        state = self.optimizer.state_dict()["state"]
        return {f"{index}/{key}": value for index, part in state.items() for key, value in part.items()}


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return dict(chain(model.named_parameters(), model.named_buffers()))
