"""TAEF2 as it is published: its layers written out, and a folder that `prepare.vae` takes."""

import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler
from pytest import raises
from safetensors.torch import save_file
from small_models import small_dit
from torch import nn

from shd_diffusion.data.latent_space import LatentSpace, load_vae
from shd_diffusion.errors import UserError
from shd_diffusion.models.convert import convert_taef2
from shd_diffusion.models.tiny_autoencoder import PooledAutoencoderTiny
from shd_diffusion.sampling import ClassConditionalPipeline
from shd_diffusion.sampling.pipeline import save_pipeline

ENCODER = [
    "conv",
    "block",
    *["down", "block", "block", "block"] * 2,
    "down",
    "pooled",
    "pooled",
    "pooled",
    "conv",
]
DECODER = [
    *["clamp", "conv", "relu", "pooled", "pooled", "pooled", "up", "conv"],
    *["block", "block", "block", "up", "conv", "block", "block", "block", "up", "conv", "block", "conv"],
]


def published(kinds, ends, generator):
    """A state dict with the published names; 64 channels but at the ends."""
    state = {}

    def add(name, shape, bias=True):
        state[f"{name}.weight"] = (
            torch.randn(shape, generator=generator)
            / nn.init._calculate_correct_fan(torch.empty(shape), "fan_in") ** 0.5
            if len(shape) > 1
            else torch.rand(shape, generator=generator)
        )
        if bias:
            state[f"{name}.bias"] = torch.randn(shape[0], generator=generator) / 10

    convolutions = [index for index, kind in enumerate(kinds) if kind == "conv"]
    for index, kind in enumerate(kinds):
        if kind in ("conv", "down"):
            first, last = index == convolutions[0], index == convolutions[-1]
            shape = (ends[1] if last else 64, ends[0] if first else 64, 3, 3)
            add(f"{index}", shape, bias=kind == "conv" and not (index and kinds[index - 1] == "up"))
        elif kind in ("block", "pooled"):
            for part in (0, 2, 4):
                add(f"{index}.conv.{part}", (64, 64, 3, 3))
        if kind == "pooled":
            add(f"{index}.pool.0", (256, 64, 1, 1), bias=False)
            add(f"{index}.pool.1", (256,))
            add(f"{index}.pool.3", (64, 256, 1, 1), bias=False)
    return state


def written_out(kinds, state, x):
    """Layer by layer, in float64."""
    state = {name: value.double() for name, value in state.items()}

    def conv(name, x, **arguments):
        return F.conv2d(x, state[f"{name}.weight"], state.get(f"{name}.bias"), **arguments)

    for index, kind in enumerate(kinds):
        match kind:
            case "clamp":
                x = 3 * torch.tanh(x / 3)
            case "relu":
                x = F.relu(x)
            case "up":
                x = F.interpolate(x, scale_factor=2)
            case "conv":
                x = conv(index, x, padding=1)
            case "down":
                x = conv(index, x, padding=1, stride=2)
            case _:
                if kind == "pooled":
                    wide = conv(f"{index}.pool.0", x)
                    wide = F.group_norm(
                        wide, 4, state[f"{index}.pool.1.weight"], state[f"{index}.pool.1.bias"]
                    )
                    x = x + conv(f"{index}.pool.3", F.relu(wide))
                inner = F.relu(conv(f"{index}.conv.0", x, padding=1))
                inner = F.relu(conv(f"{index}.conv.2", inner, padding=1))
                x = F.relu(x + conv(f"{index}.conv.4", inner, padding=1))
    return x


@torch.no_grad()
def test_taef2_computes_what_is_published(tmp_path):
    generator = torch.Generator().manual_seed(0)
    encoder, decoder = published(ENCODER, (3, 32), generator), published(DECODER, (32, 3), generator)
    save_file(encoder, tmp_path / "encoder.safetensors")
    save_file(decoder, tmp_path / "decoder.safetensors")
    convert_taef2(tmp_path, tmp_path / "vae")

    space = LatentSpace(load_vae(str(tmp_path / "vae")).double())
    images = torch.rand(2, 3, 16, 24, generator=generator, dtype=torch.float64) * 2 - 1
    latents = space.encode(images)
    torch.testing.assert_close(latents, written_out(ENCODER, encoder, (images + 1) / 2))
    torch.testing.assert_close(space.decode(latents), written_out(DECODER, decoder, latents) * 2 - 1)


def test_other_weights_are_refused_in_one_line(tmp_path):
    with raises(UserError, match=r"encoder\.safetensors: no such file"):
        convert_taef2(tmp_path, tmp_path / "vae")
    save_file({"0.weight": torch.zeros(64, 3, 3, 3)}, tmp_path / "encoder.safetensors")
    with raises(UserError, match="not the weights of TAEF2") as refusal:
        convert_taef2(tmp_path, tmp_path / "vae")
    assert "\n" not in str(refusal.value) and not (tmp_path / "vae").exists()


def test_it_is_part_of_a_pipeline(tmp_path):
    vae = PooledAutoencoderTiny(latent_channels=1)
    save_pipeline(small_dit(heads=2), None, FlowMatchEulerDiscreteScheduler(), vae, (1, 8, 8), tmp_path)
    pipeline = ClassConditionalPipeline.from_pretrained(tmp_path)
    assert type(pipeline.vae) is PooledAutoencoderTiny
    assert all((pipeline.vae.state_dict()[name] == value).all() for name, value in vae.state_dict().items())


def test_its_own_config_holds_nothing_that_diffusers_would_warn_of():
    vae = PooledAutoencoderTiny(latent_channels=1)
    _, unused, _ = PooledAutoencoderTiny.extract_init_dict(dict(vae.config))
    assert unused == {} and vae.config.block_out_channels  # by which pipelines know its stride
