"""The capture as a context: what it keeps, what it restores, what it refuses."""

from __future__ import annotations

import copy
import gc
import inspect
import io
import weakref
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers import HiDreamImageTransformer2DModel
from diffusers.models import attention_processor
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    attention_backend,
)
from diffusers.models.attention_processor import (
    AttnProcessor,
    AttnProcessor2_0,
    CustomDiffusionAttnProcessor,
    IPAdapterAttnProcessor2_0,
    SlicedAttnProcessor,
)
from families import FAMILIES, output
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from shd_diffusion.attention import AttentionCapture, attention_blocks
from shd_diffusion.attention.processors import NotingProcessor

DIT = FAMILIES["dit"]
FIRST, SECOND = "transformer_blocks.0.attn1", "transformer_blocks.1.attn1"


def run(model: nn.Module, seed: int = 1) -> Tensor:
    return output(model(**DIT.draw(seed)))


def processors(model: nn.Module) -> list[Any]:
    return [module.processor for module in model.modules() if hasattr(module, "processor")]


# --- what it keeps ------------------------------------------------------------------------------------------


def test_records_are_references_to_what_the_kernel_was_given() -> None:
    model = DIT.build()
    made = []
    model.transformer_blocks[0].attn1.to_k.register_forward_hook(lambda m, a, out: made.append(out))
    with AttentionCapture(model) as capture:
        run(model)
        record = capture.records[FIRST]
        assert capture.records[FIRST].query is record.query
    assert record.key.data_ptr() == made[0].data_ptr()
    assert record.output_weight is model.transformer_blocks[0].attn1.to_out[0].weight
    assert record.scale == 8**-0.5 and record.mask is None


def test_each_forward_replaces_the_records_of_the_last() -> None:
    model = DIT.build()
    with AttentionCapture(model) as capture:
        assert capture.records == {}
        run(model, seed=1)
        first = capture.records
        run(model, seed=2)
        second = capture.records
        assert not torch.equal(first[SECOND].query, second[SECOND].query)
        old = weakref.ref(first[SECOND].query)
        del first
        gc.collect()
        assert old() is None  # nothing keeps the graph of a forward pass that is over


def test_a_teacher_without_gradients_is_captured_without_graph() -> None:
    model = DIT.build()
    with torch.no_grad(), AttentionCapture(model) as capture:
        run(model)
    assert not capture.records[FIRST].query.requires_grad


def test_only_the_named_blocks_are_captured() -> None:
    model = DIT.build()
    with AttentionCapture(model, [SECOND]) as capture:
        run(model)
        assert list(capture.records) == [SECOND]
        assert type(model.transformer_blocks[0].attn1.processor) is AttnProcessor2_0


def test_half_precision_maps_are_computed_in_float32() -> None:
    model = DIT.build()
    with torch.autocast("cpu", dtype=torch.bfloat16), AttentionCapture(model) as capture:
        run(model)
    record = capture.records[FIRST]
    assert record.query.dtype == torch.bfloat16 and record.maps().dtype == torch.float32


def test_a_block_that_a_pass_skips_leaves_no_record() -> None:
    plain, masked = FAMILIES["mdtv2"], FAMILIES["mdtv2 masked"]
    model = plain.build()
    with AttentionCapture(model) as capture:
        model(**masked.draw())
        assert "side_block.attn" in capture.records
        model(**plain.draw())
        assert "side_block.attn" not in capture.records
    with AttentionCapture(model, ["side_block.attn"]) as capture:
        model(**plain.draw())
        assert capture.records == {}


def test_a_named_block_that_does_not_run_is_an_error() -> None:
    family = FAMILIES["mdtv2"]
    model = family.build()
    with AttentionCapture(model, ["in_blocks.0.attn", "side_block.attn"]) as capture:
        model(**family.draw())
        with pytest.raises(RuntimeError, match=r"`side_block\.attn` did not run"):
            capture.records  # noqa: B018


# --- what it restores ---------------------------------------------------------------------------------------


def test_an_exception_inside_restores_the_model() -> None:
    model = DIT.build()
    with pytest.raises(TypeError), AttentionCapture(model):
        model(nonsense=1)
    with pytest.raises(RuntimeError, match="mat1 and mat2"), AttentionCapture(model):
        model.transformer_blocks[0].attn1(torch.randn(1, 4, 7))  # fails while the kernel is watched
    assert not model._forward_pre_hooks
    assert type(model.transformer_blocks[0].attn1.processor) is AttnProcessor2_0
    assert torch._C._len_torch_function_stack() == 0


@pytest.mark.parametrize("first_out", ["inner", "outer"])
def test_captures_nest_and_may_leave_in_any_order(first_out: str) -> None:
    model = DIT.build()
    expected = run(model)
    outer, inner = AttentionCapture(model), AttentionCapture(model, [SECOND])
    outer.__enter__()
    inner.__enter__()
    assert torch.equal(run(model), expected)
    assert list(outer.records) == [FIRST, SECOND] and list(inner.records) == [SECOND]
    leaving = [inner, outer] if first_out == "inner" else [outer, inner]
    leaving[0].__exit__()
    run(model, seed=2)
    assert list(leaving[1].records)[-1] == SECOND
    leaving[1].__exit__()
    assert type(model.transformer_blocks[1].attn1.processor) is AttnProcessor2_0
    assert torch.equal(run(model), expected)


def test_a_deep_copy_runs_on_its_own_weights_and_notes_nothing() -> None:
    model = DIT.build()
    with AttentionCapture(model) as capture:
        run(model)
        twin = copy.deepcopy(model)
        nn.init.zeros_(twin.transformer_blocks[1].attn1.to_out[0].weight)
        before = capture.records[SECOND].query
        assert not torch.equal(run(twin), run(model))
        run(twin, seed=2)
        assert torch.equal(capture.records[SECOND].query, before)
        assert not any(isinstance(p, NotingProcessor) for p in processors(twin))
    with AttentionCapture(twin) as capture:
        run(twin)
        assert list(capture.records) == [FIRST, SECOND]


def test_a_captured_model_can_be_pickled() -> None:
    model = DIT.build()
    buffer = io.BytesIO()
    with AttentionCapture(model):
        expected = run(model)
        torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)  # our own, just made
    assert torch.equal(run(loaded), expected)
    assert not any(isinstance(p, NotingProcessor) for p in processors(loaded))
    with AttentionCapture(loaded) as capture:
        run(loaded)
        assert list(capture.records) == [FIRST, SECOND]


def test_weights_of_a_processor_stay_visible() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0))

        def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return self.scale * AttnProcessor2_0()(attn, hidden_states)

    model = DIT.build()
    processor = Scaled()
    for block in model.transformer_blocks:  # one object serves both
        block.attn1.set_processor(processor)
    names, expected = set(model.state_dict()), run(model)
    with AttentionCapture(model) as capture:
        assert set(model.state_dict()) == names and "transformer_blocks.1.attn1.processor.scale" in names
        assert torch.equal(run(model), expected)
        assert not torch.equal(capture.records[FIRST].query, capture.records[SECOND].query)
    assert model.transformer_blocks[0].attn1.processor is processor


def test_processors_show_the_capture_and_are_restored() -> None:
    family = FAMILIES["unet2d-condition"]
    model = family.build()
    before = model.attn_processors
    with AttentionCapture(model) as capture:
        shown = model.attn_processors
        assert shown.keys() == before.keys()
        for path, processor in shown.items():
            assert isinstance(processor, NotingProcessor) and isinstance(processor, type(before[path]))
            assert inspect.signature(processor.__call__) == inspect.signature(before[path].__call__)
        model(**family.draw())
        assert len(capture.records) == len(before)
    after = model.attn_processors
    assert all(after[path] is processor for path, processor in before.items())


def test_a_backend_set_inside_stays_with_the_processor() -> None:
    family = FAMILIES["flux"]
    model = family.build()
    own = model.transformer_blocks[0].attn.processor
    with torch.no_grad(), AttentionCapture(model) as capture, attention_backend("native"):
        model.set_attention_backend("_native_math")
        model(**family.draw())
        assert len(capture.records) == 3
    assert model.transformer_blocks[0].attn.processor is own
    assert own._attention_backend == AttentionBackendName._NATIVE_MATH


def test_forwards_that_hooks_have_replaced_stay() -> None:
    model = DIT.build()
    attention = model.transformer_blocks[0].attn1
    add_hook_to_module(attention, ModelHook())
    replaced, expected = attention.forward, run(model)
    with AttentionCapture(model) as capture:
        assert torch.equal(run(model), expected) and FIRST in capture.records
    assert attention.forward is replaced


def test_a_processor_replaced_inside_is_an_error_and_stays() -> None:
    model = DIT.build()
    attention, other = model.transformer_blocks[0].attn1, AttnProcessor2_0()
    with AttentionCapture(model) as capture:
        attention.set_processor(other)
        run(model)
        with pytest.raises(RuntimeError, match=rf"processor of `{FIRST}` was replaced inside the capture"):
            capture.records  # noqa: B018
    assert attention.processor is other
    with AttentionCapture(model) as capture:
        run(model)
        assert list(capture.records) == [FIRST, SECOND]


def test_a_plain_function_as_processor_is_seen_through_the_forward() -> None:
    def processor(attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return AttnProcessor2_0()(attn, hidden_states)

    model = DIT.build()
    attention = model.transformer_blocks[0].attn1
    attention.set_processor(processor)
    expected = run(model)
    with AttentionCapture(model) as capture:
        assert torch.equal(run(model), expected) and list(capture.records) == [FIRST, SECOND]
    assert attention.processor is processor and "forward" not in attention.__dict__


# --- what it refuses ----------------------------------------------------------------------------------------


def test_an_unknown_block_is_named() -> None:
    with pytest.raises(ValueError, match=r"no attention block `attn9`; it has transformer_blocks\.0\.attn1"):
        AttentionCapture(DIT.build(), ["attn9"])


def test_a_model_without_attention_is_refused() -> None:
    with pytest.raises(ValueError, match="Linear has no attention block that can be captured"):
        AttentionCapture(nn.Linear(2, 2))


@pytest.mark.parametrize("processor", [AttnProcessor(), SlicedAttnProcessor(1)])
def test_a_processor_without_kernel_is_refused_with_the_remedy(processor: Any) -> None:
    model = DIT.build()
    model.transformer_blocks[1].attn1.set_processor(processor)
    name = type(processor).__name__
    with pytest.raises(
        ValueError, match=rf"`{SECOND}` .* {name} calls no .* set_processor\(AttnProcessor2_0"
    ):
        AttentionCapture(model)
    assert not attention_blocks(model)[SECOND].capturable
    AttentionCapture(model, [FIRST])


@pytest.mark.parametrize(
    "processor", [IPAdapterAttnProcessor2_0(16, 16), CustomDiffusionAttnProcessor(hidden_size=16)]
)
def test_a_processor_with_weights_of_its_own_is_refused(processor: Any) -> None:
    model = DIT.build()
    model.transformer_blocks[1].attn1.set_processor(processor)
    with pytest.raises(ValueError, match="attends by weights of its own; unload the adapter"):
        AttentionCapture(model)


def test_an_output_projection_that_is_more_than_its_weight_is_refused() -> None:
    class LoRA(nn.Linear):
        base_layer = None

    for projection, remedy in ((LoRA(16, 16), "fuse the LoRA"), (nn.Linear(16, 16), "in floating point")):
        model = DIT.build()
        if type(projection) is nn.Linear:  # codes, which bitsandbytes scales row by row
            codes = torch.zeros(16, 16, dtype=torch.int8)
            projection.weight = nn.Parameter(codes, requires_grad=False)
        model.transformer_blocks[1].attn1.to_out[0] = projection
        with pytest.raises(ValueError, match=rf"`{SECOND}` .* cannot be captured: .*{remedy}"):
            AttentionCapture(model)


def test_so_is_that_of_the_text() -> None:
    model = FAMILIES["sd3"].build()
    text = model.transformer_blocks[0].attn.to_add_out
    text.weight = nn.Parameter(torch.zeros_like(text.weight, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"`transformer_blocks\.0\.attn` .* quantised to torch\.int8"):
        AttentionCapture(model)


def test_what_was_noted_is_let_go() -> None:
    model = DIT.build()
    with AttentionCapture(model) as capture:
        run(model)
    query = weakref.ref(capture.records[FIRST].query)
    capture.forget()
    assert query() is None and not capture.records


def test_linear_attention_is_left_out_and_refused_by_name() -> None:
    model = FAMILIES["sana"].build()
    name = "transformer_blocks.0.attn1"
    assert name not in AttentionCapture(model)._blocks
    with pytest.raises(ValueError, match="linear attention has no softmax"):
        AttentionCapture(model, [name])


def test_an_unknown_processor_that_calls_no_kernel_is_an_error_that_names_it() -> None:
    class Mine(AttnProcessor):
        pass

    model = DIT.build()
    model.transformer_blocks[0].attn1.set_processor(Mine())
    with AttentionCapture(model) as capture:
        run(model)
        with pytest.raises(RuntimeError, match=rf"`{FIRST}` made 0 kernel calls .* processor Mine"):
            capture.records  # noqa: B018


def test_an_order_of_two_streams_that_a_trial_run_does_not_tell_is_refused() -> None:
    class Interleaved(attention_processor.JointAttnProcessor2_0):
        def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor) -> Any:
            query = torch.cat([attn.to_q(hidden_states), attn.add_q_proj(encoder_hidden_states)], dim=1)
            query = query.roll(1, dims=1).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            F.scaled_dot_product_attention(query, query, query)
            return hidden_states, encoder_hidden_states

    model = FAMILIES["sd3"].build()
    model.transformer_blocks[0].attn.set_processor(Interleaved())
    with pytest.raises(
        ValueError, match=r"Interleaved joins image and text .* 5 query rows are not one stream"
    ):
        AttentionCapture(model)


@pytest.mark.parametrize("text_first", [True, False])
def test_the_order_of_streams_of_an_unknown_processor_is_found(text_first: bool) -> None:
    class Joint:
        def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Any, **_: Any) -> Any:
            image, text = attn.to_q(hidden_states), attn.add_q_proj(encoder_hidden_states)
            query = torch.cat([text, image] if text_first else [image, text], dim=1)
            query = query.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            F.scaled_dot_product_attention(query, query, query)
            return hidden_states, encoder_hidden_states

    family = FAMILIES["sd3"]
    model = family.build()
    name = "transformer_blocks.0.attn"
    attention = model.get_submodule(name)
    attention.set_processor(Joint())
    made: dict[str, Tensor] = {}
    attention.to_q.register_forward_hook(lambda m, a, out: made.update(image=out))
    attention.add_q_proj.register_forward_hook(lambda m, a, out: made.update(text=out))
    with AttentionCapture(model, [name]) as capture:
        model(**family.draw())
        records = capture.records
    for path, stream in ((name, "image"), (f"{name}:context", "text")):
        assert torch.equal(records[path].query.transpose(1, 2).flatten(2), made[stream])


def test_reentrant_checkpointing_is_refused() -> None:
    model = DIT.build().train()
    model.enable_gradient_checkpointing(
        lambda function, *args: torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=True)
    )
    with AttentionCapture(model), pytest.raises(RuntimeError, match="use_reentrant=False"):
        run(model)
    with torch.no_grad(), AttentionCapture(model) as capture:  # a teacher's forward needs no checkpoints
        run(model)
        assert len(capture.records) == 2


# --- other kernels ------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("name", ["flux", "prx"])
def test_a_backend_other_than_sdpa_serves_the_forward_and_is_seen(name: str) -> None:
    family = FAMILIES[name]
    model = family.build()
    kernel = _AttentionBackendRegistry._backends[AttentionBackendName.FLEX]
    with torch.no_grad(), AttentionCapture(model) as capture:
        model(**family.draw())
        expected = capture.records
        with attention_backend("flex"):
            uncaptured = output(family.build()(**family.draw()))
            assert torch.equal(output(model(**family.draw())), uncaptured)
        records = capture.records
    assert _AttentionBackendRegistry._backends[AttentionBackendName.FLEX] is kernel
    for path, record in records.items():
        torch.testing.assert_close(record.maps(), expected[path].maps())


def _plain_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Tensor | None = None,
    scale: float = 1.0,
    op: Any = None,
) -> Tensor:
    """xformers' memory_efficient_attention as documented for (B·H, N, d), multiplied out."""
    logits = query @ key.transpose(1, 2) * scale
    return (logits if attn_bias is None else logits + attn_bias).softmax(dim=-1) @ value


def test_xformers_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    family = FAMILIES["pixart"]
    model = family.build()
    ops = SimpleNamespace(memory_efficient_attention=_plain_attention)
    monkeypatch.setattr(attention_processor, "xformers", SimpleNamespace(ops=ops))
    monkeypatch.setattr("shd_diffusion.attention.blocks.is_xformers_available", lambda: True)
    with AttentionCapture(model) as capture:
        model(**family.draw())
        expected = capture.records
    model.set_attn_processor(attention_processor.XFormersAttnProcessor())
    with AttentionCapture(model) as capture:
        model(**family.draw())
        records = capture.records
    assert ops.memory_efficient_attention is _plain_attention
    for path, record in records.items():
        torch.testing.assert_close(record.maps(), expected[path].maps())
        torch.testing.assert_close(record.value, expected[path].value)


def test_xformers_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shd_diffusion.attention.blocks.is_xformers_available", lambda: False)
    model = DIT.build()
    model.transformer_blocks[0].attn1.set_processor(attention_processor.XFormersAttnProcessor())
    with pytest.raises(ValueError, match=r"needs xformers; pip install 'shd-diffusion\[xformers\]'"):
        AttentionCapture(model)


# --- wrapped models -----------------------------------------------------------------------------------------


@pytest.fixture
def process_group(tmp_path: Any) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_inside_distributed_data_parallel(process_group: None) -> None:
    model, reference = DIT.build(), DIT.build()
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    gradients = []
    for called, inner in ((wrapped, model), (reference, reference)):
        with AttentionCapture(called) as capture:
            for _ in range(2):  # DistributedDataParallel fails in the second step if it fails
                inner.zero_grad()
                prediction = run(called)
                records = capture.records
                (prediction.square().mean() + records[SECOND].maps().square().sum()).backward()
        gradients.append(inner.transformer_blocks[0].attn1.to_q.weight.grad)
    torch.testing.assert_close(gradients[0], gradients[1])


def test_with_fully_sharded_blocks_the_output_weight_is_whole(process_group: None) -> None:
    model, reference = DIT.build(), DIT.build()
    mesh = init_device_mesh("cpu", (1,))
    for index, block in enumerate(model.transformer_blocks):
        fully_shard(block, mesh=mesh, reshard_after_forward=index > 0)  # DiT reads block 0's embedding again
    fully_shard(model, mesh=mesh)
    gradients = []
    for trained in (model, reference):
        with AttentionCapture(trained) as capture:
            prediction = run(trained)
            records = capture.records
        assert type(records[SECOND].output_weight) is not DTensor
        expected = reference.get_submodule(SECOND).to_out[0].weight
        torch.testing.assert_close(records[SECOND].output_weight, expected, check_device=False)
        (prediction.square().mean() + records[SECOND].maps().square().sum()).backward()
        gradient = trained.transformer_blocks[0].attn1.to_q.weight.grad
        gradients.append(gradient.full_tensor() if isinstance(gradient, DTensor) else gradient)
    torch.testing.assert_close(gradients[0], gradients[1])


def test_a_compiled_model_is_captured_though_it_was_compiled_before() -> None:
    torch._dynamo.reset()
    model = DIT.build()
    expected = run(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    uncaptured = run(compiled)
    for seed in (1, 2):
        with AttentionCapture(compiled) as capture:
            prediction = run(compiled, seed)
            records = capture.records
        with AttentionCapture(model) as capture:
            run(model, seed)
            eager = capture.records
        assert list(records) == [FIRST, SECOND]
        for path, record in records.items():
            torch.testing.assert_close(record.maps(), eager[path].maps())
        if seed == 1:
            assert torch.equal(prediction, uncaptured)
    records[SECOND].maps().square().sum().backward()
    gradient = model.transformer_blocks[0].attn1.to_q.weight.grad.clone()
    model.zero_grad()
    eager[SECOND].maps().square().sum().backward()
    torch.testing.assert_close(model.transformer_blocks[0].attn1.to_q.weight.grad, gradient)
    assert torch.equal(run(compiled), uncaptured)
    torch.testing.assert_close(uncaptured, expected)


def test_repeated_blocks_compile_once() -> None:
    """diffusers' regional compilation; more blocks than torch lets one function be compiled for."""
    torch._dynamo.reset()
    family = FAMILIES["flux"]
    arguments = {**family.arguments, "num_single_layers": torch._dynamo.config.recompile_limit + 1}
    family = replace(family, arguments=arguments)
    model = family.build()
    expected = output(model(**family.draw()))
    model.compile_repeated_blocks(backend="eager", fullgraph=True)
    with AttentionCapture(model) as capture:
        assert torch.equal(output(model(**family.draw())), expected)
        assert len(capture.records) == 2 + arguments["num_single_layers"]


def test_text_with_projections_of_another_layout_is_not_taken_for_the_images() -> None:
    """HiDream's double blocks; its single ones are plain self-attention."""
    model = HiDreamImageTransformer2DModel(
        patch_size=2, in_channels=4, out_channels=4, num_layers=1, num_single_layers=1, num_attention_heads=3,
        attention_head_dim=8, caption_channels=[6, 6], text_emb_dim=6, num_routed_experts=2, num_activated_experts=1,
        axes_dims_rope=(4, 2, 2), max_resolution=(8, 8), llama_layers=[0, 0], force_inference_output=True,
    )  # fmt: skip
    double, single = attention_blocks(model).values()
    assert not double.capturable and "projections of a layout that is not known" in str(double.reason)
    assert single.capturable and single.kind == "self"
