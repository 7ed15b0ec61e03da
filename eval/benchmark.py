"""Launch file of the benchmarks: every figure is a ratio of things measured side by side in one run; `text-step` and
`compress` alone tell seconds.

    python eval/benchmark.py squeeze --threads 2 --output docs/results/benchmark-squeeze.json
    python eval/benchmark.py step --threads 2 --output docs/results/benchmark-step.json
    python eval/benchmark.py lengths --output docs/results/benchmark-lengths.json
    python eval/benchmark.py features --threads 2 --output docs/results/benchmark-features.json
    python eval/benchmark.py loop --threads 2 --output docs/results/benchmark-loop.json
    python eval/benchmark.py text-step --threads 2 --output docs/results/benchmark-text-step.json
    python eval/benchmark.py compress --threads 2 --output docs/results/benchmark-compress.json

The candidates take turns, round after round; a ratio is the median over the rounds of the two times of one round,
so that whatever else the machine does weighs on both alike.
"""

from __future__ import annotations

import json
import math
import resource
import time
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Annotated, Any
from unittest.mock import patch

import torch
import typer
from diffusers import DDPMScheduler, DiTTransformer2DModel
from diffusers.optimization import get_cosine_schedule_with_warmup
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch_fidelity import feature_extractor_inceptionv3
from torch_fidelity.datasets import ImagesPathDataset
from torch_fidelity.utils import get_featuresdict_from_dataset

from shd_diffusion.attention import AttentionCapture, AttentionRecord
from shd_diffusion.benchmark.turns import Clock, ratio, take_turns
from shd_diffusion.compression import compress as compress_model
from shd_diffusion.compression.compress import CompressedPart
from shd_diffusion.config import DistillConfig, read_config
from shd_diffusion.data import build_source
from shd_diffusion.environment import describe_environment
from shd_diffusion.evaluation.extractors import load_extractor
from shd_diffusion.evaluation.features import extract_features
from shd_diffusion.evaluation.images import FolderImages
from shd_diffusion.losses import SHDConfig, SHDLoss
from shd_diffusion.losses.term import Batch
from shd_diffusion.models.denoiser import count_parameters, freeze, predict
from shd_diffusion.models.factory import ModelConfig, build_model
from shd_diffusion.models.teacher import Teacher
from shd_diffusion.operations import Meter
from shd_diffusion.run_folder import RunFolder
from shd_diffusion.squeezing import plan_merges, prepare_squeezer, squeeze_heads
from shd_diffusion.training.batches import BatchLayout
from shd_diffusion.training.build import build
from shd_diffusion.training.count import materialised, training_loss
from shd_diffusion.training.dry_run import build_empty
from shd_diffusion.training.launch import make_accelerator
from shd_diffusion.training.loop import fit, take_step
from shd_diffusion.training.objectives import TrainingLoss
from shd_diffusion.training.train_state import TrainState

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)

Output = Annotated[Path | None, typer.Option(help="JSON file to write the figures to.")]
Threads = Annotated[int, typer.Option(min=1, help="Threads of torch.")]
ClockOption = Annotated[
    Clock, typer.Option(help="Time that passed, or that the process computed (shared machines).")
]
Rounds = Annotated[int, typer.Option(min=3, help="How often every candidate takes its turn.")]

# --- measuring -----------------------------------------------------------------------------------------------


def compare(seconds: dict[str, list[float]], numerator: str, denominator: str) -> dict[str, Any]:
    """Median and quartiles over the rounds of how many times longer the first candidate takes."""
    found = ratio(seconds[numerator], seconds[denominator])
    return {"ratio": round(found.median, 4), "quartiles": [round(each, 4) for each in found.quartiles]}


def shares(run: Callable[[], object], repeats: int = 5) -> dict[str, float]:
    """The share of each operation in the time of a function, the largest eight."""
    run()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(repeats):
            run()
    times = {event.key: event.self_cpu_time_total for event in profiler.key_averages()}
    largest = sorted(times, key=times.__getitem__, reverse=True)[:8]
    return {name: round(times[name] / sum(times.values()), 3) for name in largest}


def publish(name: str, figures: dict[str, Any], output: Path | None) -> None:
    """Print the figures, and write them with what they depend on."""
    text = json.dumps(
        {"benchmark": name, "figures": figures, "environment": describe_environment()}, indent=1
    )
    print(json.dumps(figures, indent=1))
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        temporary = output.with_suffix(".tmp")
        temporary.write_text(text + "\n", encoding="utf-8")
        temporary.replace(output)


# --- what is measured ----------------------------------------------------------------------------------------


def random_record(batch: int, heads: int, tokens: int, learns: bool) -> AttentionRecord:
    """A block of heads of width 64, its tensors laid out as a model's projections leave them."""
    query, key, value = (
        torch.randn(batch, tokens, heads, 64).transpose(1, 2).requires_grad_(learns) for _ in range(3)
    )
    return AttentionRecord("block", "self", query, key, value, torch.randn(heads * 64, heads * 64), 1 / 8)


def loss_and_gradient(shd: SHDLoss, batch: int, tokens: int) -> Callable[[], None]:
    """The SHD loss of one block, 12 heads to 6, and its backward pass."""
    teacher = {"block": random_record(batch, 12, tokens, False)}
    student = {"block": random_record(batch, 6, tokens, True)}
    return lambda: shd(teacher, student).backward()


# --- squeeze -------------------------------------------------------------------------------------------------


def literal_squeeze(maps: Tensor, values: Tensor, output_weight: Tensor, num_heads: int) -> Tensor:
    """docs/method.md sections 3 and 4 as they are written, every contribution as wide as the output."""
    weights = output_weight.T.unflatten(0, (maps.shape[1], -1))  # (M, d, C)
    contributions = values @ weights  # X, (B, M, K, C)
    while maps.shape[1] > num_heads:
        merges = min(maps.shape[1] // 2, maps.shape[1] - num_heads)
        a, x, rest, others = (
            t[:, part] for part in (slice(2 * merges), slice(2 * merges, None)) for t in (maps, contributions)
        )
        difference, total = a[:, ::2] - a[:, 1::2], x[:, ::2] + x[:, 1::2]
        of_first, of_total = difference @ x[:, ::2], difference @ total
        alpha = (of_first * of_total).sum((-2, -1), keepdim=True) / of_total.square().sum(
            (-2, -1), keepdim=True
        )
        alpha = alpha.nan_to_num(0.5).clamp(0, 1)
        maps = torch.cat([alpha * a[:, ::2] + (1 - alpha) * a[:, 1::2], rest], 1)
        contributions = torch.cat([total, others], 1)
    return maps


@app.command()
def squeeze(
    threads: Threads = 2,
    rounds: Rounds = 15,
    batch: int = 4,
    tokens: int = 256,
    clock: ClockOption = "wall",
    output: Output = None,
) -> None:
    """The squeeze in value space against the literal form, Gram matrices computed beforehand and within."""
    torch.set_num_threads(threads)
    figures: dict[str, Any] = {}
    for heads, target, head_dim in ((16, 6, 72), (12, 6, 64), (12, 5, 64)):
        torch.manual_seed(0)
        width = heads * head_dim
        maps = (2 * torch.randn(batch, heads, tokens, tokens)).softmax(-1)
        values = torch.randn(batch, tokens, heads, head_dim).transpose(1, 2)
        weight = torch.randn(width, width) / width**0.5
        squeezer = prepare_squeezer(plan_merges(heads, target), weight, heads)
        candidates: dict[str, Callable[[], Tensor]] = {
            "literal": lambda m=maps, v=values, w=weight, n=target: literal_squeeze(m, v, w, n),  # type: ignore[misc]
            "value space": lambda m=maps, v=values, w=weight, n=target, s=squeezer: squeeze_heads(
                m, v, w, n, squeezer=s
            ),  # type: ignore[misc]
            "value space, Gram matrices anew": lambda m=maps, v=values, w=weight, n=target: squeeze_heads(
                m, v, w, n
            ),  # type: ignore[misc]
        }
        torch.testing.assert_close(candidates["literal"](), candidates["value space"](), atol=1e-5, rtol=1e-3)
        seconds = take_turns(candidates, rounds, clock)
        figures[f"{heads} -> {target}, d {head_dim}, C {width}, N {tokens}, batch {batch}"] = {
            "milliseconds": {name: round(1e3 * median(taken), 2) for name, taken in seconds.items()},
            "speed-up": compare(seconds, "literal", "value space"),
            "speed-up, Gram matrices anew": compare(seconds, "literal", "value space, Gram matrices anew"),
        }
    publish("squeeze", {"clock": clock, "threads": threads} | figures, output)


# --- step ----------------------------------------------------------------------------------------------------


def dit(heads: int, blocks: int = 12, tokens: int = 256) -> DiTTransformer2DModel:
    """A DiT of patch 2 on square latents of so many tokens, no parameter left at zero."""
    model = DiTTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=64,
        in_channels=4,
        num_layers=blocks,
        sample_size=2 * math.isqrt(tokens),
        patch_size=2,
    )
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)
    return model


class LeastWork:
    """What the loss of one sample and block and its gradient cannot do without, 12 heads to 6: seven matrix products
    and two softmaxes, each in one call and into memory that is there already and small enough for the caches. A
    bound for any implementation by operations of PyTorch that computes in float32.
    """

    def __init__(self, tokens: int) -> None:
        self.query, self.key = torch.randn(2, 12, tokens, 64)
        self.own_query, self.own_key = torch.randn(2, 6, tokens, 64)
        self.values = torch.randn(6, tokens, 128)
        self.logits, self.maps = torch.empty(2, 12, tokens, tokens)
        self.own_logits, self.own_maps = torch.empty(2, 6, tokens, tokens)
        self.moved = torch.empty(6, tokens, 128)
        self.of_query, self.of_key = torch.empty_like(self.own_query), torch.empty_like(self.own_key)
        self.gram = torch.empty(6, 64, 128), torch.empty(6, 64, 64)

    @torch.no_grad()
    def __call__(self) -> None:
        torch.softmax(torch.bmm(self.query, self.key.mT, out=self.logits), -1, out=self.maps)
        torch.bmm(self.maps[::2], self.values, out=self.moved)  # in place of D V: any map costs the same
        first, second = self.moved.chunk(2, -1)
        torch.bmm(first.mT, self.moved, out=self.gram[0])
        torch.bmm(second.mT, second, out=self.gram[1])
        torch.softmax(torch.bmm(self.own_query, self.own_key.mT, out=self.own_logits), -1, out=self.own_maps)
        torch.bmm(self.own_maps, self.own_key, out=self.of_query)
        torch.bmm(self.own_maps.mT, self.own_query, out=self.of_key)


class FeatureDistillation:
    """The baseline: a linear projector a block from the student's hidden states to the teacher's, MSE."""

    def __init__(
        self, teacher: DiTTransformer2DModel, student: DiTTransformer2DModel, widths: tuple[int, int]
    ) -> None:
        self.blocks = [list(model.transformer_blocks) for model in (teacher, student)]
        self.projectors = nn.ModuleList(nn.Linear(*widths) for _ in self.blocks[1])
        self.hidden: tuple[list[Tensor], list[Tensor]] = [], []

    def __enter__(self) -> FeatureDistillation:
        self.handles = [
            block.register_forward_hook(lambda _module, _inputs, result, into=into: into.append(result))
            for blocks, into in zip(self.blocks, self.hidden, strict=True)
            for block in blocks
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def loss(self) -> Tensor:
        terms = [
            F.mse_loss(project(ours), theirs)
            for project, theirs, ours in zip(self.projectors, *self.hidden, strict=True)
        ]
        for hidden in self.hidden:
            hidden.clear()
        return torch.stack(terms).mean()


def train_step(
    teacher: DiTTransformer2DModel,
    student: DiTTransformer2DModel,
    optimizer: torch.optim.Optimizer,
    inputs: Tensor,
    conditions: dict[str, Tensor],
    term: Callable[[], Tensor] | None = None,
) -> None:
    """A step of output KD, and of another term where there is one."""
    with torch.no_grad():
        taught = teacher(inputs, **conditions).sample
    loss = F.mse_loss(student(inputs, **conditions).sample, taught)
    if term is not None:
        loss = loss + term()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def shd_step(
    train: Callable[[Callable[[], Tensor]], None], teacher: nn.Module, student: nn.Module, shd: SHDLoss
) -> Callable[[], None]:
    """The same step with SHD."""

    def run() -> None:
        with AttentionCapture(teacher) as of_teacher, AttentionCapture(student) as of_student:
            train(lambda: shd(of_teacher.records, of_student.records))

    return run


@app.command()
def step(
    threads: Threads = 2,
    rounds: Rounds = 11,
    batch: int = 4,
    clock: ClockOption = "wall",
    output: Output = None,
) -> None:
    """A training step DiT-B/2 -> DiT-S/2 with output KD, alone and with SHD on all 12 blocks or 6, or FD on all."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    teacher, student = dit(12).requires_grad_(False).eval(), dit(6)
    inputs = torch.randn(batch, 4, 32, 32)
    conditions = {"timestep": torch.randint(1000, (batch,)), "class_labels": torch.randint(1000, (batch,))}
    distiller = FeatureDistillation(teacher, student, (6 * 64, 12 * 64))
    optimizer = torch.optim.AdamW([*student.parameters(), *distiller.projectors.parameters()], lr=1e-5)

    train = partial(train_step, teacher, student, optimizer, inputs, conditions)
    with_shd = partial(shd_step, train, teacher, student)

    def with_features() -> None:
        with distiller:
            train(distiller.loss)

    def with_least_work(blocks: int) -> Callable[[], None]:
        least = LeastWork(256)

        def term() -> Tensor:
            for _ in range(blocks * batch):
                least()
            return torch.zeros(())

        return lambda: train(term)

    candidates: dict[str, Callable[[], None]] = {
        "SHD, all rows": with_shd(SHDLoss()),
        "SHD, all rows, compiled": with_shd(SHDLoss(SHDConfig(compile=True))),
        "SHD, all rows, products and softmaxes alone": with_least_work(12),
        "SHD, later half of the blocks": with_shd(SHDLoss(SHDConfig(after=0.5))),
        "SHD, later half of the blocks, compiled": with_shd(SHDLoss(SHDConfig(after=0.5, compile=True))),
        "SHD, later half of the blocks, products and softmaxes alone": with_least_work(6),
        "SHD, later half of the blocks, half of the rows": with_shd(SHDLoss(SHDConfig(after=0.5, rows=0.5))),
        "FD": with_features,
    }
    seconds = take_turns({"output KD": train, **candidates}, rounds, clock)
    figures = {
        "milliseconds": {name: round(1e3 * median(taken), 1) for name, taken in seconds.items()},
        "against output KD alone": {name: compare(seconds, name, "output KD") for name in candidates},
        "against FD": {name: compare(seconds, name, "FD") for name in candidates if "all rows" in name},
        "SHD by operation": shares(loss_and_gradient(SHDLoss(), batch, 256)),
    }
    publish("step", {"clock": clock, "threads": threads} | figures, output)


@app.command()
def lengths(
    threads: Threads = 1,
    rounds: Rounds = 21,
    blocks: Annotated[int, typer.Option(min=2, help="Blocks of both models.")] = 2,
    tokens: Annotated[list[int], typer.Option(help="Tokens of an image, once for each length.")] = [  # noqa: B006
        256,
        1024,
        4096,
    ],
    clock: ClockOption = "cpu",
    output: Output = None,
) -> None:
    """A training step of the same width with output KD, alone and with SHD, by number of tokens; batch 1."""
    torch.set_num_threads(threads)
    by_length: dict[int, Any] = {}
    for length in tokens:
        torch.manual_seed(0)
        teacher, student = dit(12, blocks, length).requires_grad_(False).eval(), dit(6, blocks, length)
        optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5)
        inputs = torch.randn(1, 4, *[2 * math.isqrt(length)] * 2)
        conditions = {"timestep": torch.tensor([500]), "class_labels": torch.tensor([1])}
        few = (
            128 / length
        )  # the work on maps is then in proportion to the tokens, as that of all else but attention
        settings = {
            "SHD, all rows": SHDConfig(),
            "SHD, half of the rows of the later half of the blocks": SHDConfig(rows=0.5, after=0.5),
            "SHD, 128 rows of the later half of the blocks": SHDConfig(
                rows=few, coefficient_rows="sampled", after=0.5
            ),
        }

        train = partial(train_step, teacher, student, optimizer, inputs, conditions)
        candidates: dict[str, Callable[[], object]] = {"output KD": train}
        candidates |= {name: shd_step(train, teacher, student, SHDLoss(c)) for name, c in settings.items()}
        peaks = {}
        for name, run in candidates.items():
            run()
            states = [state for states in optimizer.state.values() for state in states.values()]
            with Meter([*teacher.parameters(), *student.parameters(), *states]) as seen:
                run()
            peaks[name] = round(seen.peak / 2**20, 1)
        seconds = take_turns(candidates, rounds, clock)
        by_length[length] = {
            "milliseconds": {name: round(1e3 * median(taken), 1) for name, taken in seconds.items()},
            "against output KD alone": {name: compare(seconds, name, "output KD") for name in settings},
            "megabytes above the weights": peaks,
        }
        print(length, json.dumps(by_length[length]), flush=True)
    measured = {str(length): found for length, found in by_length.items()}
    about = {"clock": clock, "threads": threads, "rounds": rounds, "blocks": blocks}
    publish("lengths", about | measured, output)


# --- features ------------------------------------------------------------------------------------------------


def random_inception(path: Path) -> Path:
    """A file of Inception's network with random weights, which cost the same time as the published ones."""
    kind = feature_extractor_inceptionv3.FeatureExtractorInceptionV3
    with (
        patch.object(feature_extractor_inceptionv3, "load_state_dict_from_url", return_value={}),
        patch.object(kind, "load_state_dict"),
    ):
        torch.save(kind("inception-v3-compat", ["2048"]).state_dict(), path)
    return path


@app.command()
def features(
    threads: Threads = 2,
    rounds: Rounds = 5,
    images: Annotated[int, typer.Option(min=2, help="PNG files to take features of.")] = 32,
    size: Annotated[int, typer.Option(min=1, help="Width and height of the images.")] = 256,
    extractor: Annotated[
        str, typer.Option(help="inception-v3-compat or digits-classifier.")
    ] = "inception-v3-compat",
    clock: ClockOption = "wall",
    output: Output = None,
) -> None:
    """Features of a folder of PNG files: ours, spatial ones included, against torch-fidelity's own extraction."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    with TemporaryDirectory() as name:
        folder = Path(name) / "images"
        folder.mkdir()
        for index in range(images):
            pixels = torch.randint(0, 256, (size, size, 3), dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(folder / f"{index:06d}.png")
        random = extractor == "inception-v3-compat"
        network = load_extractor(extractor, random_inception(Path(name) / "weights.pth") if random else None)
        files = FolderImages(folder)
        their_files = ImagesPathDataset([str(path) for path in files.paths])
        seconds = take_turns(
            {
                "ours": lambda: extract_features(files, network, 16, "images"),
                "torch-fidelity": lambda: get_featuresdict_from_dataset(
                    their_files, network.network, 16, cuda=False, save_cpu_ram=False, verbose=False
                ),
            },
            rounds,
            clock,
        )
    figures = {
        "images a second": {kind: round(images / median(taken), 2) for kind, taken in seconds.items()},
        "torch-fidelity against ours": compare(seconds, "torch-fidelity", "ours"),
    }
    settings = {"extractor": extractor, "images": images, "size": size, "clock": clock, "threads": threads}
    publish("features", settings | figures, output)


# --- memory --------------------------------------------------------------------------------------------------


@app.command()
def memory(chunk_rows: int = 64, output: Output = None) -> None:
    """Peak extra memory of the map loss and its gradient, 12 heads to 6, one sample, by number of tokens."""
    figures: dict[str, Any] = {"chunk_rows": chunk_rows, "megabytes": {}, "megabytes of all maps": {}}
    for tokens in (256, 512, 1024, 2048, 4096):
        run = loss_and_gradient(SHDLoss(SHDConfig(chunk_rows=chunk_rows)), 1, tokens)
        with Meter() as seen:
            run()
        figures["megabytes"][tokens] = round(seen.peak / 2**20, 2)
        figures["megabytes of all maps"][tokens] = 18 * tokens**2 * 4 / 2**20
    least, most = figures["megabytes"][256], figures["megabytes"][4096]
    figures["from 256 to 4096 tokens, 16 times as many"] = round(most / least, 2)
    publish("memory", figures, output)


# --- loop ----------------------------------------------------------------------------------------------------

DISTILL_CONFIG = Path(__file__).parents[1] / "configs" / "digits" / "distill.yaml"


class ByHand:
    """The distillation of a config as one would write it in plain PyTorch, with no thought of anything else."""

    def __init__(self, config: DistillConfig, teacher: nn.Module, student: nn.Module) -> None:
        train, self.config = config.train, config
        self.teacher, self.student = teacher, student.train()
        self.average = deepcopy(student).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            student.parameters(), lr=train.learning_rate, weight_decay=train.weight_decay
        )
        self.lr_scheduler = get_cosine_schedule_with_warmup(
            self.optimizer, train.warmup_steps, train.max_steps
        )
        self.scheduler = DDPMScheduler(1000)
        data = build_source(config.data)
        self.images, condition = data.first(len(data))
        self.labels = condition["class_labels"]
        self.shd, self.captures = None, [AttentionCapture(model) for model in (teacher, student)]
        self.weight = config.losses["shd"].weight
        if self.weight:
            self.shd = SHDLoss()
            for capture in self.captures:
                capture.__enter__()

    def step(self) -> None:
        train = self.config.train
        chosen = torch.randint(len(self.images), (train.batch_size,))
        clean, labels = self.images[chosen], self.labels[chosen]
        labels = torch.where(torch.rand(len(labels)) < train.condition_dropout, 10, labels)
        noise, timesteps = torch.randn_like(clean), torch.randint(1000, (len(clean),))
        noised = self.scheduler.add_noise(clean, noise, timesteps)
        with torch.no_grad():
            target = self.teacher(noised, timestep=timesteps, class_labels=labels).sample
        prediction = self.student(noised, timestep=timesteps, class_labels=labels).sample
        loss = F.mse_loss(prediction, noise) + F.mse_loss(prediction, target)
        if self.shd is not None:
            loss = loss + self.weight * self.shd(*(capture.records for capture in self.captures))
        loss.backward()
        nn.utils.clip_grad_norm_(self.student.parameters(), train.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.lr_scheduler.step()
        with torch.no_grad():
            averages, weights = tuple(self.average.parameters()), tuple(self.student.parameters())
            torch._foreach_lerp_(averages, weights, 1 - train.ema_decay)


class TakingTurns:
    """A loss that, whenever the loop begins a step, first lets another step be taken, and times both."""

    def __init__(self, loss: TrainingLoss, other: Callable[[], None], clock: Clock) -> None:
        self.loss, self.other = loss, other
        self.read = {"wall": time.perf_counter, "cpu": time.process_time}[clock]
        self.seconds: dict[str, list[float]] = {"loop": [], "by hand": []}
        self.began: float | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loss, name)

    def __call__(self, model: nn.Module, batch: Batch, step: int) -> dict[str, Tensor]:
        return self.loss(model, batch, step)

    def weights(self, step: int) -> dict[str, float]:
        now = self.read()
        if self.began is not None:
            self.seconds["loop"].append(now - self.began)
        started = self.read()
        self.other()
        self.began = self.read()
        self.seconds["by hand"].append(self.began - started)
        return self.loss.weights(step)


@app.command()
def loop(threads: Threads = 2, steps: int = 60, clock: ClockOption = "wall", output: Output = None) -> None:
    """A step of the training loop, logging and all, against the same step by hand: the distillation of digits."""
    torch.set_num_threads(threads)
    figures: dict[str, Any] = {"clock": clock, "threads": threads, "steps": steps}
    for name, weight in (("output KD", 0), ("output KD and SHD", 5)):
        overrides = [f"train.max_steps={steps}", f"losses.shd.weight={weight}"]
        config = read_config(DISTILL_CONFIG, DistillConfig, overrides)
        arguments = config.student.arguments
        torch.manual_seed(0)
        student = build_model(config.student)
        teacher = build_model(ModelConfig(arguments={**arguments, "num_attention_heads": 12}))
        by_hand = ByHand(config, deepcopy(freeze(teacher)), deepcopy(student))
        parts = build(config, str(DISTILL_CONFIG), build_source(config.data), Teacher(teacher))
        with TemporaryDirectory() as folder:
            run = RunFolder(Path(folder) / "run")
            run.create(config, {})
            accelerator = make_accelerator(config.train, run.path)
            loss = TrainingLoss(parts.process, parts.terms, parts.model, teacher, steps)
            turns: Any = TakingTurns(loss, by_hand.step, clock)
            with loss:
                fit(parts.model, turns, parts.loader(accelerator.device), run, config, accelerator)
        seconds = {candidate: taken[5 : steps - 1] for candidate, taken in turns.seconds.items()}
        figures[name] = {
            "milliseconds": {which: round(1e3 * median(taken), 2) for which, taken in seconds.items()},
            "loop against by hand": compare(seconds, "loop", "by hand"),
        }
    publish("loop", figures, output)


# --- a full-size text-to-image step ------------------------------------------------------------------------------

PIXART_CONFIG = DISTILL_CONFIG.parents[1] / "text-to-image" / "pixart-sigma.yaml"


class Laps:
    """Seconds between marks, by the name of the mark at their end."""

    def begin(self) -> None:
        self.seconds: dict[str, float] = {}
        self.last = time.perf_counter()

    def end(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = round(self.seconds.get(name, 0) + now - self.last, 2)
        self.last = now


class MarkedLoss:
    """A loss that marks where its terms are computed."""

    def __init__(self, loss: TrainingLoss, end: Callable[[str], None]) -> None:
        self.loss, self.end = loss, end

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loss, name)

    def __call__(self, model: nn.Module, batch: Batch, step: int) -> dict[str, Tensor]:
        terms = self.loss(model, batch, step)
        self.end("terms of the loss")
        return terms


@app.command()
def text_step(
    threads: Threads = 2,
    image_size: Annotated[
        int, typer.Option(min=64, help="Width and height of the images, in pixels.")
    ] = 1024,
    output: Output = None,
) -> None:
    """Two optimiser steps of the distillation of PixArt-Sigma at its full size, by the trainer's own code: seconds by
    part, and the most memory in use. Random weights, made-up latents and prompts, one image, float32."""
    torch.set_num_threads(threads)
    settings = [f"data.image_size={image_size}", "train.batch_size=1", "train.micro_batch_size=1"]
    settings += ["train.num_processes=1", "train.mixed_precision=no", "teacher.dtype=float32"]
    settings += [f"teacher.path={PIXART_CONFIG.parent / 'teachers' / 'pixart-sigma'}"]
    config = read_config(PIXART_CONFIG, DistillConfig, settings)
    accelerator = make_accelerator(config.train, Path())
    parts = materialised(build_empty(config, str(PIXART_CONFIG)), accelerator.device)
    assert parts.teacher is not None
    parts.model.enable_gradient_checkpointing()
    loss = training_loss(parts)
    state: Any = TrainState.prepare(parts.model, loss.parameters(), config.train, accelerator)
    state.wrapped.train()
    loader = parts.loader(accelerator.device)(BatchLayout(1), 0)
    laps = Laps()
    parts.teacher.model.register_forward_hook(lambda *_: laps.end("teacher's forward pass"))
    parts.model.register_forward_hook(lambda *_: laps.end("student's forward pass"))
    state.optimizer.optimizer.register_step_pre_hook(lambda *_: laps.end("backward pass"))
    state.optimizer.optimizer.register_step_post_hook(lambda *_: laps.end("optimiser"))
    steps = []
    marked: Any = MarkedLoss(loss, laps.end)
    with loss:
        for step in range(2):
            batches = loader.step(step)
            laps.begin()
            terms, norm = take_step(state, marked, batches, 1, step, config.train, accelerator)
            laps.end("average")
            assert bool(norm.isfinite())
            steps.append(
                {"seconds": laps.seconds, "terms": {name: float(term) for name, term in terms.items()}}
            )
    figures = {
        "threads": threads,
        "sample": list(parts.data.shape),
        "parameters": {
            "teacher": count_parameters(parts.teacher.model),
            "student": count_parameters(parts.model),
        },
        "steps": steps,
        "gigabytes at most": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 2),
    }
    publish("text-step", figures, output)


# --- compress ------------------------------------------------------------------------------------------------


@app.command()
def compress(
    threads: Threads = 2,
    images: Annotated[int, typer.Option(min=1, help="Calibration images.")] = 256,
    blocks: Annotated[int, typer.Option(min=1, help="Blocks of the model.")] = 28,
    heads: Annotated[int, typer.Option(min=1, help="Heads that stay, of 16.")] = 8,
    neurons: Annotated[float, typer.Option(help="Share of the neurons that stays.")] = 0.5,
    output: Output = None,
) -> None:
    """Compress a model of DiT-XL/2's size: seconds by part, and the most memory in use. Random weights and latents."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = DiTTransformer2DModel(num_layers=blocks, out_channels=8)  # whose other defaults are DiT-XL/2's
    batches = [
        (torch.randn(16, 4, 32, 32), torch.randint(1000, (16,)), {"class_labels": torch.randint(1000, (16,))})
        for _ in range(max(1, images // 16))
    ]
    seconds: dict[str, list[float]] = {}
    last = began = time.perf_counter()
    began_processor = time.process_time()

    def tell(part: CompressedPart) -> None:
        nonlocal last
        now = time.perf_counter()
        seconds.setdefault(part.what, []).append(round(now - last, 2))
        print(f"{part.name}: {part.before} to {part.after} {part.what}, {now - last:.1f} s", flush=True)
        last = now

    found = compress_model(model, batches, predict, heads=heads, neurons=neurons, report=tell)
    total = time.perf_counter() - began
    figures = {
        "threads": threads,
        "images": 16 * len(batches),
        "parameters": {"before": count_parameters(model), "after": count_parameters(found.model)},
        "minutes": round(total / 60, 2),
        "processor minutes": round((time.process_time() - began_processor) / 60, 2),
        "seconds of a block": {what: round(median(each), 2) for what, each in seconds.items()},
        "seconds after the last": round(total - (last - began), 2),
        "gigabytes at most": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 2),
    }
    publish("compress", figures, output)


if __name__ == "__main__":
    app()
