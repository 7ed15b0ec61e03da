"""The weights of a narrow student from those of its teacher, without training (docs/method.md section 8)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from diffusers import ModelMixin
from torch import Tensor, nn

from shd_diffusion.compression.attention import HeadOptions, check_can_be_squeezed
from shd_diffusion.compression.compress import compress
from shd_diffusion.compression.feed_forward import channels_last
from shd_diffusion.compression.lockstep import Lockstep
from shd_diffusion.compression.rows import choose_places, features, input_rows, output_rows
from shd_diffusion.compression.walk import (
    CalibrationBatch,
    Predict,
    count_runs,
    further_calls,
    passes,
    relative_change,
)
from shd_diffusion.models.layouts import HeadLayout, feed_forwards, head_layout
from shd_diffusion.models.squeezed import (
    PREFIX,
    cut_heads,
    cut_neurons,
    first_heads,
    shape,
    widen_heads,
)
from shd_diffusion.models.widths import OWN, STREAM, Axis, axes, fixed_positions, space_sizes
from shd_diffusion.squeezing.channels import Reader, choose_channels, place_channels, refit_layer
from shd_diffusion.squeezing.moments import Moments
from shd_diffusion.squeezing.plan import Round
from shd_diffusion.squeezing.shared_keys import key_value_counts

Choose = Callable[[Sequence[Reader], int, int], Tensor]
Kept = Mapping[str, Tensor]
"""The teacher's channels of each space by the student's."""

_EQUAL = "make all else in their configs equal, or set it to `random`"


@torch.no_grad()
def squeeze_into(
    student: ModelMixin,
    teacher: ModelMixin,
    batches: Iterable[CalibrationBatch],
    predict: Predict,
    origins: Mapping[str, str],
    choose: Choose = choose_channels,
    refit: bool = True,
) -> tuple[float, dict[str, Round]]:
    """Write into a student what least squares makes of its teacher's weights, in place.

    Blocks are those of the layer map. Heads and neurons leave in the teacher's own width, by `compress`. Then the
    channels of each space that is narrower leave, and every linear layer and convolution, in the order in which they
    run, is fitted to what the teacher's puts out, on what the student gives it.

    Args:
        student: see `check_can_be_squeezed_into`.
        teacher: it is put in evaluation mode and otherwise left as it is.
        batches: calibration data, noised as in training, on the models' device.
        predict: runs a model on a batch.
        origins: of every block of the student the teacher's, by module path.
        choose: the channels that stay, of so many groups equally many each.
        refit: False leaves the layers as they are cut.

    Returns:
        |teacher's prediction - the student's|² / |teacher's prediction|² on the calibration batches; and by module
        path the teacher's heads behind each head of an attention block that has fewer.

    Raises:
        ValueError: the student cannot be cut from such a teacher.
    """
    check_can_be_squeezed_into(student, teacher, origins)
    held = list(batches)
    training = student.training
    student.eval()
    model = _shallower(teacher.eval(), student, origins)
    _refit_last_condition(model, teacher, held, predict, origins)
    neurons, have, options = feed_forwards(student), shape(model), _head_options(student, model)
    fewer = {name: count for name, count in shape(student).items() if count < have[name]}
    groups: dict[str, Round] = {}
    if fewer:
        heads = {name: count for name, count in fewer.items() if name not in neurons}
        of_layers = {name: count for name, count in fewer.items() if name in neurons}
        smaller = compress(model, held, predict, heads or None, of_layers or None, options=options)
        model, groups = smaller.model, dict(smaller.groups)
        _cut_first(model, fewer, options)  # what runs in masked passes only, and with no calibration batch
    _narrow(student, model, held, predict, choose, refit)
    found, wanted = ([predict(each, *batch) for batch in held] for each in (student, teacher))
    student.train(training)
    return relative_change(found, wanted), groups


def check_can_be_squeezed_into(student: ModelMixin, teacher: ModelMixin, origins: Mapping[str, str]) -> None:
    """See that all of a student's weights can be cut from its teacher's; without computing.

    Args:
        student: of the teacher's class.
        teacher: at least as wide and deep.
        origins: as for `squeeze_into`.

    Raises:
        ValueError: of another class, one without a table in models/widths.py, or a shape that cannot be cut out.
    """
    kinds = [type(model).__name__.removeprefix(PREFIX) for model in (student, teacher)]
    if kinds[0] != kinds[1]:
        raise ValueError(f"a {kinds[0]} cannot be cut from a {kinds[1]}; take the teacher's class")
    axes(student)  # refuses a class that has no table, before anything else
    for key, own in student.config.items():
        theirs = teacher.config.get(key)
        if (
            own != theirs
            and not key.startswith("_")
            and any(isinstance(x, str | bool) for x in (own, theirs))
        ):
            raise ValueError(
                f"`{key}` is {own!r}, the teacher's {theirs!r}: not a smaller model but another; make them equal"
            )
    with torch.device("meta"):
        twin = _shallower(type(teacher).from_config(teacher.config), student, origins)
    have, neurons = shape(twin), feed_forwards(student)
    for name, count in shape(student).items():
        what = "neurons" if name in neurons else "heads"
        if name not in have:
            raise ValueError(
                f"the block that the student's `{name}` learns from has no such layer; set the key of its config that "
                "says which blocks have one by the student's own blocks"
            )
        if count > have[name]:
            raise ValueError(
                f"`{name}` has {count} {what}, the teacher's {have[name]}; give it at most those"
            )
        if name not in neurons:
            _check_keys(name, head_layout(student, name), head_layout(twin, name))
    options = _head_options(student, twin)
    for name in shape(student) if options.head_dim is not None else ():
        if name not in neurons:
            check_can_be_squeezed(twin, name, options)
    _cut_first(twin, shape(student), options)
    sizes, wanted = space_sizes(twin), space_sizes(student)
    for space in sorted(sizes.keys() ^ wanted.keys()):
        whose = "student's" if space in wanted else "teacher's"
        raise ValueError(f"the {whose} `{space}` is not in the other; {_EQUAL}")
    for space, size in wanted.items():
        if size > sizes[space] and space != OWN:
            raise ValueError(
                f"the student is {size} channels wide ({space}), the teacher {sizes[space]}; make it narrower"
            )
    kept = {space: torch.arange(size, device="meta") for space, size in wanted.items()}
    source, spaces = twin.state_dict(), axes(twin)
    for name, tensor in student.state_dict().items():
        shapes = [tuple(tensor.shape)]
        if name in source:
            shapes.append(tuple(_cut(source[name], spaces.get(name, ()), kept, sizes, tensor.shape).shape))
        if len(set(shapes)) > 1 or name not in source:
            raise ValueError(f"`{name}` {shapes[0]} cannot be cut from the teacher's; {_EQUAL}")


def _check_keys(name: str, own: HeadLayout, theirs: HeadLayout) -> None:
    """Raise ValueError unless a student's heads share as many keys as those that are left of its teacher's."""
    counts = key_value_counts(theirs.heads, theirs.key_value_heads)
    if own.heads not in counts:
        raise ValueError(
            f"`{name}` has {own.heads} heads, which {theirs.heads} that share {theirs.key_value_heads} keys cannot "
            f"become; take one of {', '.join(map(str, counts))}"
        )
    if own.key_value_heads != counts[own.heads]:
        raise ValueError(
            f"`{name}` has {own.key_value_heads} keys for its {own.heads} heads; so many of the teacher's "
            f"{theirs.heads} have {counts[own.heads]}: set it so"
        )


# --- blocks, heads and neurons --------------------------------------------------------------------------------


def _shallower(teacher: ModelMixin, student: ModelMixin, origins: Mapping[str, str]) -> ModelMixin:
    """The teacher with those of its blocks that the student's come from, copied where they differ in number."""

    def taken(theirs: nn.Module, own: nn.Module, path: str) -> nn.Module:
        """A module of the teacher's; itself where nothing in it differs."""
        changed: dict[str, nn.Module | None] = {}
        for name, child in own.named_children():
            by, there = getattr(theirs, name, None), f"{path}.{name}".lstrip(".")
            if not isinstance(by, nn.Module):
                continue
            blocks = _blocks(teacher, by, child, there, origins)
            found = taken(by, child, there) if blocks is None else blocks
            if found is not by:
                changed[name] = found
        if not changed:
            return theirs
        module = copy.copy(theirs)
        module._modules = theirs._modules | changed
        return module

    model: Any = taken(teacher, student, "")
    return model


def _blocks(
    teacher: ModelMixin, theirs: nn.Module, own: nn.Module, path: str, origins: Mapping[str, str]
) -> nn.Module | None:
    """A list of the blocks that the student's come from; None where it is no list, or they are the teacher's."""
    if not isinstance(own, nn.ModuleList) or not isinstance(theirs, nn.ModuleList):
        return None
    paths = [f"{path}.{index}" for index in range(len(own))]
    if missing := [block for block in paths if block not in origins and len(own) != len(theirs)]:
        raise ValueError(
            f"block `{missing[0]}` learns from none of the teacher's; give it one in `losses.shd.layer_map`, or "
            f"keep all {len(theirs)} of `{path}`"
        )
    sources = [origins.get(block, block) for block in paths]
    if sources == [f"{path}.{index}" for index in range(len(theirs))]:
        return None
    if hasattr(teacher, "distilled_guidance_layer"):  # Chroma's, told the number of each block
        raise ValueError(
            f"a {type(teacher).__name__} tells its blocks apart by their numbers, so none can leave; "
            f"keep all {len(theirs)} of `{path}`"
        )
    return nn.ModuleList(copy.deepcopy(teacher.get_submodule(source)) for source in sources)


def _refit_last_condition(
    model: Any,
    teacher: ModelMixin,
    batches: Sequence[CalibrationBatch],
    predict: Predict,
    origins: Mapping[str, str],
) -> None:
    """DiT's last layer is told the condition as its first block embeds it; where that is another block, refit it."""
    first = "transformer_blocks.0"
    if not hasattr(model, "proj_out_1") or origins.get(first, first) == first:
        return
    model.proj_out_1 = copy.deepcopy(model.proj_out_1)
    _refit(model, teacher, {"proj_out_1": None}, batches, predict)


def _head_options(student: ModelMixin, model: ModelMixin) -> HeadOptions:
    """Queries and keys are selected; heads of another width have them factored.

    Raises:
        ValueError: widths are others in some of the blocks only, or where the student has as many heads.
    """
    counts, neurons = (shape(student), shape(model)), feed_forwards(student)
    heads = [name for name in counts[0] if name not in neurons]
    widths = {name: (head_layout(student, name).width, head_layout(model, name).width) for name in heads}
    others = [name for name, (own, theirs) in widths.items() if own != theirs]
    if not others:
        return HeadOptions()
    if len(set(widths.values())) > 1 or any(counts[0][name] == counts[1][name] for name in others):
        own, theirs = widths[others[0]]
        raise ValueError(
            f"`{others[0]}` has heads of width {own}, the teacher's {theirs}, as only fewer heads may; "
            "make `attention_head_dim` equal, or the heads of a UNet fewer"
        )
    return HeadOptions(queries="factor", head_dim=widths[others[0]][0])


def _cut_first(model: nn.Module, counts: Mapping[str, int], options: HeadOptions) -> None:
    """Leave attention blocks and feed-forward layers that have more their first heads and neurons, in place."""
    neurons, have = feed_forwards(model), shape(model)
    for name, count in counts.items():
        if name in neurons:
            if have[name] != count:
                cut_neurons(model, name, torch.arange(count, device="cpu"))
            continue
        layout = head_layout(model, name)
        if have[name] != count:
            cut_heads(model, name, first_heads(layout, count))
        if options.head_dim not in (None, layout.width):
            widen_heads(model, name, options.head_dim or layout.width)


# --- channels -------------------------------------------------------------------------------------------------


def _narrow(
    student: ModelMixin,
    model: ModelMixin,
    batches: Sequence[CalibrationBatch],
    predict: Predict,
    choose: Choose,
    refit: bool,
) -> None:
    """Write into the student the weights of a model of as many blocks, heads and neurons."""
    spaces, sizes, wanted = axes(model), space_sizes(model), space_sizes(student)
    fewer = {space: count for space, count in wanted.items() if count < sizes[space] and space != OWN}
    kept = {space: torch.arange(size, device=model.device) for space, size in sizes.items()}
    kept |= _choose_all(model, fewer, batches, predict, choose)
    theirs, own = fixed_positions(model), fixed_positions(student)
    if theirs is not None and own is not None and STREAM in fewer:
        kept[STREAM] = place_channels(kept[STREAM], theirs, own)
    source, state = model.state_dict(), student.state_dict()
    for name, tensor in state.items():
        tensor.copy_(_cut(source[name], spaces.get(name, ()), kept, sizes, tensor.shape))
    if theirs is not None and own is not None and STREAM in fewer:
        state["pos_embed.proj.bias"].add_((theirs[:, kept[STREAM]] - own).mean(0))
    if refit and (fewer or (OWN in wanted and wanted[OWN] != sizes[OWN])):
        layers = _layers(model, spaces)
        rows = {
            name: None if its[0] is None else _indices(its[0], kept, sizes) for name, its in layers.items()
        }
        _refit(student, model, rows, batches, predict)


def _layers(
    model: nn.Module, spaces: Mapping[str, tuple[Axis | None, ...]]
) -> dict[str, tuple[Axis | None, ...]]:
    """The linear layers and convolutions that read or write in a space, by path."""
    names = {
        name.removesuffix(".weight"): its
        for name, its in spaces.items()
        if name.endswith(".weight") and len(its) == 2
    }
    return {
        name: its
        for name, its in names.items()
        if isinstance(model.get_submodule(name), nn.Linear | nn.Conv2d)
    }


def _indices(axis: Axis, kept: Kept, sizes: Mapping[str, int]) -> Tensor:
    """Where the kept channels lie along an axis, space after space."""
    starts = accumulate((sizes[space] for space in axis.spaces), initial=0)
    return torch.cat([start + kept[space] for start, space in zip(starts, axis.spaces, strict=False)])


def _cut(
    tensor: Tensor, its: tuple[Axis | None, ...], kept: Kept, sizes: Mapping[str, int], shape: torch.Size
) -> Tensor:
    """What stays of a tensor. Weights of features that each model computes for itself are 0 where these differ."""
    for dim, axis in enumerate(its):
        if axis is None:
            continue
        if axis.spaces != (OWN,):
            tensor = tensor.index_select(dim, _indices(axis, kept, sizes))
        elif tensor.shape[dim] != shape[dim]:
            tensor = tensor.new_zeros([*tensor.shape[:dim], shape[dim], *tensor.shape[dim + 1 :]])
    return tensor


def _choose_all(
    model: ModelMixin,
    fewer: Mapping[str, int],
    batches: Sequence[CalibrationBatch],
    predict: Predict,
    choose: Choose,
) -> dict[str, Tensor]:
    """The channels that stay of every space that has fewer in the student."""
    spaces, sizes = axes(model), space_sizes(model)
    layers = {
        name: axis
        for name, (_, axis) in _layers(model, spaces).items()
        if axis is not None and not fewer.keys().isdisjoint(axis.spaces)
    }
    moments, groups = _inputs(model, layers, batches, predict)
    readers: dict[str, list[Reader]] = {space: [] for space in fewer}
    for first, names in groups.items():
        # each tap of a convolution's kernel reads the channels as an output of its own
        weights = [model.get_parameter(f"{name}.weight").transpose(0, 1).flatten(1) for name in names]
        weight, gram, start = torch.cat(weights, 1), moments[first].centred().gram, 0
        for space in layers[first].spaces:
            part = slice(start, start := start + sizes[space])
            if space in fewer:
                readers[space].append(Reader(gram[part, part], weight[part]))
    normed = _norm_groups(model, spaces)
    found = {}
    for space, keep in fewer.items():
        number = normed.get(space, 1)
        # what no plain pass reads (MDTv2's side block alone, say) keeps its first channels
        found[space] = (
            choose(readers[space], keep, 1 if keep % number else number)
            if readers[space]
            else torch.arange(keep, device=model.device)
        )
    return found


def _norm_groups(model: nn.Module, spaces: Mapping[str, tuple[Axis | None, ...]]) -> dict[str, int]:
    """The groups in which a norm takes the channels of a space."""
    modules = dict(model.named_modules())
    return {
        its[0].spaces[0]: norm.num_groups
        for name, its in spaces.items()
        if isinstance(norm := modules.get(name.removesuffix(".weight")), nn.GroupNorm)
        and its[0] is not None
        and len(its[0].spaces) == 1
    }


def _inputs(
    model: nn.Module, layers: Iterable[str], batches: Sequence[CalibrationBatch], predict: Predict
) -> tuple[dict[str, Moments], dict[str, list[str]]]:
    """Moments of what layers read; layers that read the same one after the other share those of the first."""
    moments: dict[str, Moments] = {}
    groups: dict[str, list[str]] = {}
    last: tuple[Tensor | None, str] = None, ""

    def look(name: str, _: nn.Module, args: tuple[Any, ...]) -> None:
        nonlocal last
        x: Tensor = args[0]
        if x is last[0]:
            if name not in groups[last[1]]:
                groups[last[1]].append(name)
            return
        last = x, name
        groups.setdefault(name, [name])
        rows = channels_last(model.get_submodule(name), x).flatten(0, -2)
        moments.setdefault(name, Moments.zeros(rows.shape[1], 1, x.device)).add(rows, rows[:, :1])

    with ExitStack() as stack:
        for name in layers:
            stack.enter_context(model.get_submodule(name).register_forward_pre_hook(partial(look, name)))
        for batch in batches:
            predict(model, *batch)
    return moments, groups


def _refit(
    student: ModelMixin,
    model: ModelMixin,
    layers: Mapping[str, Tensor | None],
    batches: Sequence[CalibrationBatch],
    predict: Predict,
) -> None:
    """Fit layers of a student, in the order in which they run, to what the model's put out, in place.

    One that runs several times in a pass, as CogView4's of image and text, is fitted on all its runs.

    Args:
        layers: by path, the rows of the model's that the student's has; None for all.
    """
    done: set[str] = set()
    own, of_model = (passes(each, batches, predict) for each in (student, model))
    runs = count_runs(student, layers, own[0])
    with Lockstep(model, layers, of_model) as model_walk, Lockstep(student, layers, own) as walk:
        while calls := walk.advance():
            theirs, name = model_walk.advance(), calls[0].name
            if name in done:
                continue
            done.add(name)
            if runs[name] > 1:
                calls = [*calls, *further_calls(student, name, own, runs[name])]
                theirs = [*theirs, *further_calls(model, name, of_model, runs[name])]
            layer: Any = student.get_submodule(name)
            moments = Moments.zeros(features(layer), len(layer.weight), layer.weight.device)
            for number, (call, their) in enumerate(zip(calls, theirs, strict=True)):
                output = model.get_submodule(name)(their.args[0])
                places = choose_places(layer, output, number, len(calls))
                target, rows = output_rows(layer, output, places), layers[name]
                target = target if rows is None else target[:, rows]
                moments.add(input_rows(layer, call.args[0], places), target)
            fitted = moments if layer.bias is None else moments.centred()
            weight = refit_layer(fitted, layer.weight.flatten(1).T)
            layer.weight.copy_(weight.T.view_as(layer.weight))
            if layer.bias is not None:
                layer.bias.copy_(moments.constant(weight))
        model_walk.advance()
