"""Conditions of prompts against what each family's pipeline does with them."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline
from tiny_pipelines import ARGUMENTS, PIPELINES, SIZE, TEXT
from torch import Tensor

from shd_diffusion.errors import UserError
from shd_diffusion.models.denoiser import pad, predict, prepare
from shd_diffusion.models.families import TEXT_MASK, pack
from shd_diffusion.models.pipeline_call import call_defaults
from shd_diffusion.models.prompts import PromptEncoder, _NotingTokenizer, denoiser_name, load_for_prompts

SHORT, LONG = "a cat", "a red fox jumps"
ALL = list(PIPELINES)
UNGUIDED = {"z-image": {"guidance_scale": 0.0}, "qwen-image": {"true_cfg_scale": 1.0}}
TRUE = {"true_cfg_scale": 3.0, "negative_prompt": ""}
GUIDED = {  # by w = 3; most by `guidance_scale`
    "flux-dev": {"guidance_scale": 1.0, **TRUE},
    "flux-schnell": TRUE,
    "qwen-image": TRUE,
    "lumina2": {"guidance_scale": 3.0, "cfg_normalization": False},
    "z-image": {"guidance_scale": 2.0},
}


def encoder(name: str, **arguments: Any) -> PromptEncoder:
    return PromptEncoder(PIPELINES[name](), SIZE, ARGUMENTS.get(name, {}) | arguments)


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    shapes = [{name: entry.shape for name, entry in condition.items()} for condition in (one, other)]
    return shapes[0] == shapes[1] and all(torch.allclose(one[n], other[n], atol=1e-6) for n in one)


def spy(pipeline: DiffusionPipeline, **arguments: Any) -> list[dict[str, Any]]:
    """What a pipeline's call gives its scheduler at each step: the prediction, the timestep and the sample."""
    steps, step = [], pipeline.scheduler.step

    def noting(model_output: Tensor, timestep: Tensor, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        steps.append({"prediction": model_output, "timestep": timestep, "sample": sample})
        return step(model_output, timestep, sample, *args, **kwargs)

    pipeline.scheduler.step = noting
    pipeline(height=SIZE[0], width=SIZE[1], num_inference_steps=2, output_type="latent", **arguments)
    return steps


def as_latents(pipeline: DiffusionPipeline, x: Tensor) -> Tensor:
    """Packed tokens as the pipeline itself unpacks them to decode; anything else as it is."""
    if x.ndim != 3:
        return x
    if hasattr(pipeline, "_unpack_latents"):
        return pipeline._unpack_latents(x, *SIZE, pipeline.vae_scale_factor)
    return x.mT.unflatten(2, (8, 8))  # Flux.2: rows of columns


@pytest.mark.parametrize("name", ALL)
def test_predictions_are_those_that_the_scheduler_gets(name: str) -> None:
    pipeline, arguments = PIPELINES[name](), ARGUMENTS.get(name, {})
    model = getattr(pipeline, denoiser_name(pipeline))
    conditions = PromptEncoder(pipeline, SIZE, arguments).encode([LONG])
    unguided = UNGUIDED.get(name, {"guidance_scale": 1.0})
    steps = spy(pipeline, prompt=LONG, generator=torch.manual_seed(0), **arguments, **unguided)
    assert len(steps) == 2
    for step in steps:
        sample, expected = (as_latents(pipeline, step[key]) for key in ("sample", "prediction"))
        with torch.no_grad():
            found = predict(model, sample, step["timestep"].expand(1), pad(conditions))
        torch.testing.assert_close(found[:, : expected.shape[1]], expected, rtol=1e-5, atol=1e-5)
        assert expected.std() > 0.01


@pytest.mark.parametrize("name", ALL)
def test_a_prompt_is_the_same_beside_any_other(name: str) -> None:
    prompts = encoder(name)
    alone, beside = prompts.encode([SHORT]), prompts.encode([LONG, SHORT])
    assert same(alone[0], beside[1]) and not same(alone[0], beside[0])


@pytest.mark.parametrize(("noise", "calls"), [(0.005, 1), (0.2, 3)])
def test_prompts_go_together_where_a_batch_changes_rounding_alone(
    noise: float, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, record, batches = encoder("pixart-sigma"), PromptEncoder._record, []

    def rounded(
        self: PromptEncoder, texts: list[str], *args: Any, **guidance: Any
    ) -> list[dict[str, Tensor]]:
        batches.append(texts)
        states = "encoder_hidden_states"
        off = noise * (len(texts) > 1)  # as kernels do that differ by batch size
        return [
            entries | {states: entries[states] * (1 + off * torch.randn(entries[states].shape))}
            for entries in record(self, texts, *args, **guidance)
        ]

    monkeypatch.setattr(PromptEncoder, "_record", rounded)
    assert prompts.same_in_any_batch == (calls == 1)
    batches.clear()
    prompts.encode(["a cat", "a dog", "a red fox"])
    assert len(batches) == calls


@pytest.mark.parametrize("name", [name for name in ALL if name != "flux2"])
def test_the_null_condition_is_that_of_the_unconditional_pass(name: str) -> None:
    """Guidance mixes the predictions of both."""
    pipeline, arguments = PIPELINES[name](), ARGUMENTS.get(name, {})
    model = getattr(pipeline, denoiser_name(pipeline))
    prompts = PromptEncoder(pipeline, SIZE, arguments)
    conditions = [*prompts.encode([SHORT]), prompts.null()]
    guided = GUIDED.get(name, {"guidance_scale": 3.0})
    step = spy(pipeline, prompt=SHORT, generator=torch.manual_seed(0), **arguments, **guided)[0]
    sample, expected = (as_latents(pipeline, step[key]) for key in ("sample", "prediction"))
    with torch.no_grad():
        both = predict(prepare(model), torch.cat([sample] * 2), step["timestep"].expand(2), pad(conditions))
    conditional, unconditional = both[:, : expected.shape[1]].chunk(2)
    found = unconditional + 3 * (conditional - unconditional)
    if name == "qwen-image":  # each token as long as without guidance
        tokens, found = (pack(x.squeeze(2), 2) for x in (conditional, found))
        found = as_latents(
            pipeline, found * tokens.norm(dim=-1, keepdim=True) / found.norm(dim=-1, keepdim=True)
        )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)  # differences of 1e-5, threefold
    assert (conditional - unconditional).abs().max() > 1e-3


def test_without_an_unconditional_pass_null_is_the_empty_prompt() -> None:
    prompts = encoder("flux2")
    assert same(prompts.null(), prompts.encode([""])[0])


@pytest.mark.parametrize("name", ALL)
def test_no_denoiser_is_needed(name: str, tmp_path: Path) -> None:
    whole = encoder(name)
    denoiser = denoiser_name(whole.pipeline)
    whole.pipeline.save_pretrained(tmp_path)
    for weights in (tmp_path / denoiser).glob("*.safetensors"):
        weights.unlink()
    loaded = load_for_prompts(str(tmp_path))
    assert {p.device.type for p in getattr(loaded, denoiser).parameters()} == {"meta"}
    without = PromptEncoder(loaded, SIZE, whole.arguments)
    assert same(whole.encode([SHORT])[0], without.encode([SHORT])[0])
    assert same(whole.null(), without.null())


@pytest.mark.parametrize(
    ("name", "tokenizers", "registers"),
    [
        ("sd3", ("tokenizer", "tokenizer_3"), 0),
        ("flux-dev", ("tokenizer_2",), 0),
        ("auraflow", ("tokenizer",), 8),
    ],
)
def test_padding_that_the_denoiser_is_not_told_is_known(
    name: str, tokenizers: tuple[str, ...], registers: int
) -> None:
    prompts = encoder(name)
    conditions = {prompt: prompts.encode([prompt])[0] for prompt in (SHORT, "")} | {None: prompts.null()}
    for prompt, condition in conditions.items():
        ids = [getattr(prompts.pipeline, each)(prompt or "").input_ids for each in tokenizers]
        expected = [True] * registers
        for each in ids:
            expected += [True] * len(each) + [False] * (TEXT - len(each))
        assert condition[TEXT_MASK].tolist() == expected
        assert len(expected) == len(condition["encoder_hidden_states"]) + registers


def test_encoding_leaves_the_pipeline_as_it_is() -> None:
    prompts = encoder("flux-dev")
    before = {**prompts.pipeline.__dict__}
    scheduler = {**prompts.pipeline.scheduler.__dict__}
    prompts.encode([SHORT]), prompts.null()
    assert prompts.pipeline.__dict__ == before and prompts.pipeline.scheduler.__dict__ == scheduler


def test_embedded_guidance_is_that_of_scale_1() -> None:
    dev, schnell = encoder("flux-dev"), encoder("flux-schnell")
    assert dev.encode([SHORT])[0]["guidance"].item() == dev.null()["guidance"].item() == 1
    assert "guidance" not in schnell.null()


def test_what_cannot_be_encoded_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="FluxPipeline takes no argument `crops`; leave it out"):
        encoder("flux-dev", crops=(0, 0))
    with pytest.raises(UserError, match=r"nowhere: .*neither here nor on the hub.*give a folder or hub name"):
        load_for_prompts(str(tmp_path / "nowhere"))
    (tmp_path / "model_index.json").write_text('{"_class_name": "DDPMPipeline"}')
    with pytest.raises(UserError, match="a DDPMPipeline has none of transformer, unet"):
        load_for_prompts(str(tmp_path))


def test_a_pipeline_denoises_the_size_that_is_asked_for() -> None:
    defaults = call_defaults(diffusers.PixArtSigmaPipeline)
    assert defaults["use_resolution_binning"] is False
    cleaning = find_spec("bs4") and find_spec("ftfy")  # else the call warns, and does the same
    assert ("clean_caption" in defaults) is not bool(cleaning)
    assert call_defaults(diffusers.StableDiffusionPipeline) == {}
    pipeline = PIPELINES["pixart-sigma"]()  # of a size for which it has no bins
    assert PromptEncoder(pipeline, SIZE, {"max_sequence_length": TEXT}).encode(["a"])


def test_probing_a_pipeline_warns_of_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    encoder("sd1.5").null()
    assert "truncated" not in capfd.readouterr().err


def test_a_tokenizer_that_is_called_prompt_by_prompt_tells_all_their_padding() -> None:
    """FLUX.2-klein's is; a second call for the same prompts, such as SD3's for another encoder, adds none."""
    masks: dict[str, torch.Tensor] = {}
    by_prompt = iter(torch.tensor([[[1, 1, 0]], [[1, 0, 0]], [[1, 1, 1]]]))
    noting = _NotingTokenizer(lambda _: {"attention_mask": next(by_prompt)}, masks, "tokenizer", 2)
    for prompt in ("two words", "one", "two words"):
        noting(prompt)
    assert masks["tokenizer"].tolist() == [[1, 1, 0], [1, 0, 0]]
    whole = _NotingTokenizer(lambda _: {"attention_mask": torch.ones(2, 3)}, masks, "tokenizer_2", 2)
    for _ in range(2):
        whole(["two words", "one"])
    assert masks["tokenizer_2"].shape == (2, 3)
