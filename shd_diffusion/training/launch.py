"""The accelerator of a run: what was launched must be what the config asks for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedType, DynamoBackend, ProjectConfiguration, TorchDynamoPlugin

from shd_diffusion.config import RunConfig, TrainConfig
from shd_diffusion.errors import UserError
from shd_diffusion.files import json_sha256
from shd_diffusion.losses.term import Term, TermConfig
from shd_diffusion.processes import processes
from shd_diffusion.protocol import flatten
from shd_diffusion.run_folder import RunFolder, run_name

LAYOUTS = {DistributedType.NO, *(kind for kind in DistributedType if kind.name.startswith("MULTI_"))}


def make_accelerator(config: TrainConfig, folder: Path) -> Accelerator:
    """The accelerator of a run. The learning rate follows the optimiser's steps, however many processes there are.

    Raises:
        UserError: other than the wanted number of processes was launched, the machine cannot compute in the wanted
            precision, or a tracker is not installed.
    """
    for tracker in config.trackers:
        if tracker not in map(str, get_available_trackers()):
            raise UserError(f"key `train.trackers`: {tracker} is not installed; `pip install {tracker}`")
    processes()
    AcceleratorState._reset_state()  # one process may train several runs, in different precisions
    torch.set_float32_matmul_precision("high" if config.allow_tf32 else "highest")
    try:
        accelerator = Accelerator(
            mixed_precision=config.mixed_precision,
            dynamo_plugin=TorchDynamoPlugin(
                backend=DynamoBackend.NO
            ),  # `train.compile` says, not the environment
            step_scheduler_with_optimizer=False,
            log_with=config.trackers or None,
            project_config=ProjectConfiguration(str(folder), logging_dir=str(folder / "trackers")),
        )
    except ValueError as error:
        raise UserError(f"key `train.mixed_precision`: {error}") from error
    accelerator.gradient_accumulation_steps = 1  # the loop accumulates; the environment may say otherwise
    if config.mixed_precision != "no" and not accelerator.native_amp:
        raise UserError(
            f"key `train.mixed_precision`: {config.mixed_precision} needs an accelerator, and this is a "
            f"{accelerator.device.type}; use bf16 or no"
        )
    if accelerator.distributed_type not in LAYOUTS:
        raise UserError(
            f"key `train.shard`: accelerate was launched for {accelerator.distributed_type.value}; launch plain "
            "processes and set train.shard=true, which shards models by PyTorch's own FSDP2"
        )
    if config.num_processes not in (None, accelerator.num_processes):
        raise UserError(
            f"key `train.num_processes` asks for {config.num_processes}, but {accelerator.num_processes} were "
            "launched; on CPUs `accelerate launch --cpu` starts one whatever it is told, `torchrun` does not"
        )
    if config.shard and accelerator.num_processes == 1:
        raise UserError(
            "key `train.shard`: one process has nobody to share with; launch several, or remove it"
        )
    return accelerator


def describe_launch(accelerator: Accelerator, config: TrainConfig) -> str:
    """How many processes train, where, and on how many images a step; `tell_launch` says what a launcher did."""
    count, device = accelerator.num_processes, accelerator.device.type
    return f"{count} process{'es' if count > 1 else ''} on {device}, {config.batch_size} images a step"


def describe_losses(terms: Mapping[str, Term]) -> str:
    """What counts and how much, such as one that a config gave an option and no weight, which is 1 then."""

    def one(name: str, config: TermConfig) -> str:
        decay = "" if config.decay == "constant" else f" with {config.decay} decay"
        during = "" if config.during is None else f" from {config.during[0]:.0%} to {config.during[1]:.0%}"
        return f"{name} {config.weight:g}{decay}{during}"

    return "losses: " + ", ".join(one(name, term.config) for name, term in terms.items())


def start_trackers(accelerator: Accelerator, config: RunConfig, folder: RunFolder) -> None:
    """Start the trackers with what the run is defined by; a value that is no plain one is told as text.

    On Weights & Biases a run that goes on is the one that it was, by how and when its folder was begun.
    """
    values = flatten(config.model_dump(mode="json", by_alias=True))
    plain = {
        key: value if isinstance(value, int | float | str) else str(value) for key, value in values.items()
    }
    began = {k: v for k, v in folder.read_environment().items() if k != "resumed"}
    wandb = {
        "name": run_name(folder.path),
        "id": json_sha256(began)[:16],
        "resume": "allow",
        "dir": str(folder.path),
    }
    accelerator.init_trackers("shd-diffusion", plain, {"wandb": wandb})
