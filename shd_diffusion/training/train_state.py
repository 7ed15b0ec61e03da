"""What changes while a run trains."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers import ModelMixin
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from shd_diffusion.config import TrainConfig


@dataclass
class TrainState:
    """A model with its optimiser, learning rate and averaged weights.

    Attributes:
        model: as it was built; its parameters may be sharded over the processes.
        parameters: the model's.
        aux_parameters: those of the loss, and of a teacher that trains too; trained with the model, not averaged, not
            a part of it.
        wrapped: the model as it is called in training.
        optimizer: AdamW.
        lr_scheduler: counts the optimiser's steps.
        ema: the averaged weights.
    """

    model: ModelMixin
    parameters: list[nn.Parameter]
    aux_parameters: list[nn.Parameter]
    wrapped: nn.Module
    optimizer: torch.optim.Optimizer
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler
    ema: EMAModel

    @classmethod
    def prepare(
        cls,
        model: ModelMixin,
        aux_parameters: list[nn.Parameter],
        config: TrainConfig,
        accelerator: Accelerator,
        teacher: tuple[list[nn.Parameter], float | None] = ([], None),
    ) -> TrainState:
        """A model that is on its device with all that trains it; `teacher` is what trains at a rate of its own."""
        parameters = list(model.parameters())
        groups: list[dict[str, Any]] = [{"params": part} for part in (parameters, aux_parameters) if part]
        if teacher[0]:
            groups.append({"params": teacher[0], "lr": teacher[1]})
            aux_parameters = [*aux_parameters, *teacher[0]]
        optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, weight_decay=config.weight_decay)
        warm = config.lr_schedule == "constant" and config.warmup_steps  # to diffusers a schedule of its own
        lr_scheduler = get_scheduler(
            "constant_with_warmup" if warm else config.lr_schedule,
            optimizer,
            num_warmup_steps=config.warmup_steps,
            num_training_steps=config.max_steps,
        )
        ema = EMAModel(parameters, decay=config.ema_decay, foreach=not config.shard)
        optimizer, lr_scheduler = accelerator.prepare(optimizer, lr_scheduler)
        wrapped = model if config.shard else _distributed(model, accelerator)
        return cls(model, parameters, aux_parameters, wrapped, optimizer, lr_scheduler, ema)

    def is_finite(self) -> bool:
        """Whether all weights that train are numbers, in every process."""
        trained = chain(self.parameters, self.aux_parameters)
        local = (p.to_local() if isinstance(p, DTensor) else p for p in trained)
        finite = all(bool(p.detach().isfinite().all()) for p in local)
        return all(gather_object([finite]))

    @contextmanager
    def averaged(self) -> Iterator[ModelMixin]:
        """The model with its averaged weights, in evaluation mode, for as long as the context lasts."""
        self.ema.store(self.parameters)
        self.ema.copy_to(self.parameters)
        self.model.eval()
        try:
            yield self.model
        finally:
            self.model.train()
            self.ema.restore(self.parameters)
            forget_whole(self.model)

    def finish(self) -> ModelMixin:
        """The trained model with its averaged weights, sharded if it was; training is over then."""
        self.ema.copy_to(self.parameters)
        return self.model.eval()

    # --- checkpoints: whole tensors and plain values, whatever the number of processes -----------------------------

    def tensors(self, keep: bool) -> dict[str, dict[str, Tensor]]:
        """Files of tensors by their names, in a process that is to keep them; every process must call this."""
        return {
            "model": gather(_weights(self.model), keep),
            "ema": gather(self._shadow(), keep),
            "optimizer": gather(self._moments(), keep),
        }

    def values(self) -> dict[str, Any]:
        """All that is no tensor, ready for JSON."""
        return {
            "optimizer": self.optimizer.state_dict()["param_groups"],
            "lr_scheduler": self.lr_scheduler.state_dict(),
            "ema": self.ema.optimization_step,
        }

    def restore(self, tensors: dict[str, dict[str, Tensor]], values: dict[str, Any]) -> None:
        """Back to what `tensors` and `values` have told; every process must call this."""
        scatter(tensors["model"], _weights(self.model))
        scatter(tensors["ema"], self._shadow())
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors["optimizer"].items():
            index, key = name.split("/")
            state.setdefault(int(index), {})[key] = like(tensor, parameters[int(index)])
        self.optimizer.load_state_dict({"state": state, "param_groups": values["optimizer"]})
        self.lr_scheduler.load_state_dict(values["lr_scheduler"])
        schedule: Any = getattr(self.lr_scheduler, "scheduler", self.lr_scheduler)  # behind accelerate's
        # the state has the next step's rate by the schedule of its own run, which a larger `max_steps` stretches
        schedule._last_lr = [
            base * share(schedule.last_epoch)
            for base, share in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
        ]
        for group, rate in zip(self.optimizer.param_groups, schedule._last_lr, strict=True):
            group["lr"] = rate
        self.ema.optimization_step = values["ema"]

    def _shadow(self) -> dict[str, Tensor]:
        return {str(index): parameter for index, parameter in enumerate(self.ema.shadow_params)}

    def _moments(self) -> dict[str, Tensor]:
        state = self.optimizer.state_dict()["state"]
        return {f"{index}/{key}": value for index, part in state.items() for key, value in part.items()}


def _distributed(model: ModelMixin, accelerator: Accelerator) -> nn.Module:
    """The model as processes train it together.

    Not by `accelerator.prepare`, which would leave its autocast in the model's own forward: validation computes in
    float32, as sampling does afterwards.
    """
    if accelerator.num_processes == 1:
        return model
    device = accelerator.device
    devices = None if device.type == "cpu" else [device.index]
    return DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return dict(chain(model.named_parameters(), model.named_buffers()))


# --- models that outgrow one card: sharded over the processes (FSDP2) --------------------------------------------


def place(model: nn.Module, device: torch.device, sharded: bool) -> None:
    """Bring a model, in place, to where it computes: whole, or sharded over all processes."""
    if sharded:
        shard(model)
    else:
        model.to(device)


def shard(model: nn.Module) -> None:
    """Shard a model over all processes, in place: each block of its block lists by itself, then the rest.

    From the CPU no more than one block is whole on a device at a time.
    The first block of a list stays whole after its forward pass: DiT computes its last layer's condition with it.
    """
    for blocks in model.children():
        if isinstance(blocks, nn.ModuleList):
            for index, block in enumerate(blocks):
                fully_shard(block, reshard_after_forward=index > 0)
    fully_shard(model)


def forget_whole(model: nn.Module) -> None:
    """Let go of parameters that were put together for a forward pass without a backward pass, which would have done it.

    The next forward pass would compute with them, whatever was written into the shards since.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def unsharded(model: ModelMixin, keep: bool) -> ModelMixin | None:
    """A model that may be sharded, whole: then on the CPU, in a process that is to keep it, None elsewhere.

    Every process must call this.
    """
    kind: Any = next(kind for kind in type(model).__mro__ if not issubclass(kind, FSDPModule))
    if kind is type(model):
        return model
    weights = gather(_weights(model), keep)
    if not keep:
        return None
    found: ModelMixin = kind.from_config(model.config)
    scatter(weights, _weights(found))
    return found.eval()


def whole(tensor: Tensor) -> Tensor:
    """A tensor that may be sharded, put together; every process must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(tensor: Tensor, model: Tensor) -> Tensor:
    """A whole tensor, sharded as another one of its shape is."""
    if isinstance(model, DTensor) and tensor.shape == model.shape:
        return distribute_tensor(tensor.to(model.device), model.device_mesh, model.placements)
    return tensor


def gather(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """All tensors whole and on the CPU, in a process that is to keep them; every process must call this."""
    gathered = {}
    for name, tensor in tensors.items():
        full = whole(tensor.detach())
        if keep:
            gathered[name] = full.cpu().contiguous()
    return gathered


@torch.no_grad()
def scatter(tensors: Mapping[str, Tensor], into: Mapping[str, Tensor]) -> None:
    """The reverse of `gather`: values of whole tensors, written into tensors that may be sharded."""
    for name, tensor in into.items():
        tensor.copy_(like(tensors[name], tensor))
