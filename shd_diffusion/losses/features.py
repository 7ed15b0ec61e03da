"""Feature distillation: the student's block outputs through a linear projector against the teacher's.

Source: Romero et al., "FitNets: Hints for Thin Deep Nets" (ICLR 2015), with the linear projector of the SHD
paper's comparison. Extra parameters: C_student · C_teacher + C_teacher for each pair of outputs.

Diffusion transformers have features that are huge in a few channels. Two remedies, each sample by itself:

- `normalise`: a sample's distance over the mean square of its target (Zhang et al., "LAPTOP-Diff", arXiv 2404.11098).
- `within_deviations`: positions (a channel of a token) where the target lies further than so many standard deviations
  from its mean, both over all tokens and channels, are left out (Fang et al., "TinyFusion", arXiv 2412.01199: 2). Their
  code also sets the student's own outliers to 0; behind a projector these are no outliers of the same channels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from shd_diffusion.attention.blocks import enclosing_block
from shd_diffusion.attention.probe import CONTEXT
from shd_diffusion.losses.attention_projector import CrossAttentionProjector
from shd_diffusion.losses.choice import Stream
from shd_diffusion.losses.term import (
    MappedTermConfig,
    StepOutputs,
    Term,
    TermConfig,
    map_modules,
    map_traces,
)
from shd_diffusion.losses.token_grid import coarsening
from shd_diffusion.models.trace import Trace

_OTHER_TOKENS = (
    "{} has {} tokens, the teacher's {} {}: features are compared token by token; choose models of one grid, or of "
    "grids of which one is a multiple of the other"
)


class FeatureTerm(Term):
    """A distance of features, averaged over the pairs of mapped blocks.

    Blocks that put out two streams, image and text, make two pairs: image tokens with image tokens, text with text.
    Padding counts in no mean. Where one model's token grid is finer (a UNet's and a DiT's, say), its tokens' means on
    the coarser grid are compared.

    Attributes:
        projectors: P by pair, in the order of `pairs`.
    """

    Config: ClassVar[type[TermConfig]] = MappedTermConfig
    captures = "outputs"

    def __init__(
        self, config: MappedTermConfig, student: Trace, teacher: Trace | None, seed: int = 0
    ) -> None:
        super().__init__(config, student, teacher, seed)
        assert teacher is not None
        records = map_traces(student, teacher, config)
        blocks = map_modules(records, self.module)
        self.pairs = pair_outputs(blocks, student, teacher, config.streams)
        attentions = {self.module(name): name.partition(":")[0] for name in reversed(records)}
        self.rows = rows_of_outputs(self.pairs, attentions, student)
        projectors = []
        for name, by in self.pairs.items():
            own, other = matched_tokens(student.outputs, name, teacher.outputs, by, student.shape[-2:])
            projectors.append(self.projector(own.shape[2], other.shape[2], own.shape[1]))
        self.projectors = nn.ModuleList(projectors)

    def module(self, attention: str) -> str:
        """The module whose output is matched, by the attention module in it."""
        return enclosing_block(attention)

    def projector(self, student_width: int, teacher_width: int, tokens: int) -> nn.Module:
        """From so many of the student's tokens to the teacher's width."""
        return nn.Linear(student_width, teacher_width)

    def distance(self, projected: Tensor, target: Tensor, counted: Tensor | None) -> Tensor:
        """Of features (B, N, C), of the tokens that count (B, N): a scalar."""
        raise NotImplementedError

    def compared(self, outputs: StepOutputs) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """Of each pair the student's features through the projector, the teacher's, and which tokens count.

        Raises:
            ValueError: a pair whose tokens cannot be matched.
        """
        size, student, teacher = outputs.batch.clean.shape[-2:], outputs.student, outputs.teacher
        for (name, by), projector in zip(self.pairs.items(), self.projectors, strict=True):
            features, target = matched_tokens(student.outputs, name, teacher.outputs, by, size)
            counted = student.records[self.rows[name]].counted if name in self.rows else None
            # where a block of a single stream puts out two, the text's rows are the first
            counted = None if counted is None else counted[:, : features.shape[1]]
            yield projector(features), target, counted

    def forward(self, outputs: StepOutputs) -> Tensor:
        return torch.stack([self.distance(*pair) for pair in self.compared(outputs)]).mean()


class FeatureConfig(MappedTermConfig):
    """Features, each sample's distance over the target's mean square, or without the target's outliers.

    The projector is `linear`, or `attention`, see `CrossAttentionProjector`: for images of one size, and not for text.
    """

    projector: Literal["linear", "attention"] = "linear"
    normalise: bool = False
    within_deviations: float | None = Field(None, ge=1, allow_inf_nan=False)


class FeatureDistillation(FeatureTerm):
    """Mean over pairs of ||P(student) - teacher||², averaged over samples, tokens and channels."""

    Config: ClassVar[type[TermConfig]] = FeatureConfig
    config: FeatureConfig

    def __init__(self, config: FeatureConfig, student: Trace, teacher: Trace | None, seed: int = 0) -> None:
        super().__init__(config, student, teacher, seed)
        any_length = student.text_outputs | student.padded_outputs
        if config.projector == "attention" and (texts := [name for name in self.pairs if name in any_length]):
            raise ValueError(
                f"`projector: attention` is for so many tokens, and {texts[0]} has those of prompts of any length; set "
                "`streams: [image]`, or `projector: linear`"
            )

    def projector(self, student_width: int, teacher_width: int, tokens: int) -> nn.Module:
        if self.config.projector == "attention":
            return CrossAttentionProjector(student_width, teacher_width, tokens)
        return super().projector(student_width, teacher_width, tokens)

    def distance(self, projected: Tensor, target: Tensor, counted: Tensor | None) -> Tensor:
        options = self.config.normalise, self.config.within_deviations
        if counted is None and options == (False, None):
            return F.mse_loss(projected, target)
        return squared_distance(projected, target, *options, counted).mean()


def squared_distance(
    projected: Tensor,
    target: Tensor,
    normalise: bool = False,
    within_deviations: float | None = None,
    counted: Tensor | None = None,
) -> Tensor:
    """Mean squared difference by sample, (B,), of features (B, N, C); see the head of this file.

    Args:
        counted: which tokens count, (B, N); None for all.
    """

    def total(values: Tensor) -> Tensor:
        return (values * weight).sum((1, 2), keepdim=True)

    weight = torch.ones_like(target) if counted is None else counted[..., None].expand_as(target).to(target)
    if within_deviations is not None:
        number = weight.sum((1, 2), keepdim=True)
        mean = total(target) / number
        variance = total((target - mean).square()) / (number - 1)
        weight = weight * ((target - mean).abs() <= within_deviations * variance.sqrt())
    scale = total(target.square()) if normalise else weight.sum((1, 2), keepdim=True)
    distance = total((projected - target).square()) / scale.clamp_min(torch.finfo(scale.dtype).tiny)
    return distance.flatten()


def pair_outputs(
    blocks: Mapping[str, str], student: Trace, teacher: Trace, streams: list[Stream] | None = None
) -> dict[str, str]:
    """The teacher's output of each of the student's that is matched, by names as `output_tensors` gives them.

    Args:
        blocks: the teacher's module of each of the student's.
        streams: of modules that put out two; None for both.

    Raises:
        ValueError: two modules have no stream in common.
    """
    pairs: dict[str, str] = {}
    for block, by in blocks.items():
        own, other = _by_stream(block, student), _by_stream(by, teacher)
        if not own.keys() & other.keys():
            raise ValueError(
                f"{block} puts out {_listed(own)}, the teacher's {by} {_listed(other)}: there are no features to match"
            )
        pairs |= {
            own[stream]: other[stream]
            for stream in own
            if stream in other and (stream is None or streams is None or stream in streams)
        }
    return pairs


def rows_of_outputs(names: Iterable[str], attentions: Mapping[str, str], trace: Trace) -> dict[str, str]:
    """The records whose query rows are the tokens of outputs, where padding may be among them.

    Args:
        names: of outputs.
        attentions: the attention module that each of the modules has its tokens in.
    """
    rows = {}
    for name in names:
        attention, is_text = attentions[name.partition(":")[0]], name in trace.text_outputs
        own = trace.records.get(f"{attention}{CONTEXT}") if is_text else None
        record = own or trace.records.get(attention)
        if record is None or name not in trace.padded_outputs:
            continue
        count, queries = tokens(trace.outputs[name]).shape[1], record.query.shape[2]
        single = is_text and own is None and record.own_keys is None
        if count == queries or (single and count < queries):
            rows[name] = record.name
    return rows


def _by_stream(module: str, trace: Trace) -> dict[Stream | None, str]:
    """The outputs of a module by what their tokens are of, the image first; None where it puts out one tensor."""
    if module in trace.outputs:
        return {None: module}
    found = [name for name in trace.outputs if name.partition(":")[0] == module]
    image = next((name for name in found if name not in trace.text_outputs), None)
    text = next((name for name in found if name in trace.text_outputs), None)
    return {**({"image": image} if image else {}), **({"text": text} if text else {})}


def _listed(outputs: Mapping[Stream | None, str]) -> str:
    return (
        " and ".join(f"tokens of the {stream}" if stream else "one stream" for stream in outputs) or "nothing"
    )


def matched_tokens(
    student: Mapping[str, Tensor],
    name: str,
    teacher: Mapping[str, Tensor],
    by: str,
    size: tuple[int, ...] | None = None,
) -> tuple[Tensor, Tensor]:
    """The tokens of a pair, (B, N, C_student) and (B, N, C_teacher), the teacher's without gradients.

    Args:
        size: height and width of what both models see; N is of the coarser grid, see `coarsening`.

    Raises:
        ValueError: one grid is no multiple of the other.
    """
    features, target = tokens(student[name]), tokens(teacher[by]).detach()
    own, other = features.shape[1], target.shape[1]
    if own == other:
        return features, target
    try:
        grids = [coarsening(count, min(own, other), size) for count in (own, other)]
        return pooled_tokens(features, grids[0]), pooled_tokens(target, grids[1])
    except ValueError as error:
        raise ValueError(_OTHER_TOKENS.format(name, own, by, other)) from error


def pooled_tokens(features: Tensor, grid: Tensor) -> Tensor:
    """The mean of features (B, N, C) over the tokens of each of a coarser grid, (coarse, ratio²): (B, coarse, C)."""
    return features if grid.shape[1] == 1 else features[:, grid.to(features.device)].mean(2)


def tokens(output: Tensor) -> Tensor:
    """An output as tokens (B, N, C) in float32 or better; images (B, C, H, W) become H·W of them."""
    flat = output.flatten(2).mT if output.ndim > 3 else output
    return flat.double() if flat.dtype.itemsize == 8 else flat.float()
