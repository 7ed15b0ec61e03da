"""DINOv2 (Oquab et al. 2023, arXiv 2304.07193) from a file of its published weights, by transformers' network.

torch-fidelity, whose resize and normalisation are used, fetches the network's code from a repository at run time and
takes no file of weights.
"""

from __future__ import annotations

import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.feature_extractor_dinov2 import FeatureExtractorDinoV2

from shd_diffusion.errors import UserError

HEAD_WIDTH = 64
PATCH = 14
GRID = FeatureExtractorDinoV2.INPUT_IMAGE_SIZE // PATCH  # patches a side
INTERPOLATION_OFFSET = 0.1  # added to the grid by the published models when they resize their position table

MODELS = {"dinov2-vit-s-14": "vits14", "dinov2-vit-b-14": "vitb14", "dinov2-vit-l-14": "vitl14"}
URLS = {
    name: f"https://dl.fbaipublicfiles.com/dinov2/dinov2_{model}/dinov2_{model}_pretrain.pth"
    for name, model in MODELS.items()
}
# Parts of the names in the published files, and in transformers.
RENAMED = {
    r"^(cls_token|mask_token)": r"embeddings.\1",
    r"^pos_embed": "embeddings.position_embeddings",
    r"^patch_embed\.proj": "embeddings.patch_embeddings.projection",
    r"^blocks\.": "encoder.layer.",
    r"\battn\.proj": "attention.o_proj",
    r"\battn\.": "attention.",
    r"\bls(\d)\.gamma": r"layer_scale\1.lambda1",
    r"^norm\.": "layernorm.",
}


class DinoV2Extractor(FeatureExtractorDinoV2):
    """torch-fidelity's DINOv2 extractor, its resize and normalisation, on weights that are there already."""

    def __init__(self, name: str, state: dict[str, Tensor]) -> None:
        FeatureExtractorBase.__init__(self, name, ["dinov2"])
        self.feature_extractor_internal_dtype = torch.float32
        self.model = ClassToken(state)
        self.requires_grad_(False).eval()


class ClassToken(nn.Module):
    """Normalised images (N, 3, 224, 224) to the class token (N, width) of a network of any size.

    Args:
        state: published weights, by their names there.
    """

    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__()
        try:
            from transformers import Dinov2Config, Dinov2Model
        except ModuleNotFoundError:
            raise UserError(
                "evaluate.extractor: DINOv2 needs the library `transformers`; pip install 'shd-diffusion[dino]'"
            ) from None
        width = state["pos_embed"].shape[2]
        config = Dinov2Config(
            image_size=GRID * PATCH,
            patch_size=PATCH,
            hidden_size=width,
            num_attention_heads=width // HEAD_WIDTH,
            num_hidden_layers=len({name.split(".")[1] for name in state if name.startswith("blocks.")}),
        )
        self.network = Dinov2Model(config)
        self.network.load_state_dict(convert(state))

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images).pooler_output


def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Published weights by transformers' names; the position table for images of 224 pixels.

    The table is resized here, once, as the published models do it: transformers does it without their offset, which
    moves the features.
    """
    converted = {}
    for name, tensor in ({**state, "pos_embed": resize_positions(state["pos_embed"])}).items():
        for old, new in RENAMED.items():
            name = re.sub(old, new, name)
        if ".qkv." in name:
            for projection, part in zip(("q_proj", "k_proj", "v_proj"), tensor.chunk(3), strict=True):
                converted[name.replace("qkv", projection)] = part
        else:
            converted[name] = tensor
    return converted


def resize_positions(table: Tensor) -> Tensor:
    """A position table (1, 1 + side², width), class token first, for `GRID`² patches."""
    token, patches = table[:, :1], table[:, 1:].transpose(1, 2)
    side = round(patches.shape[2] ** 0.5)
    if side == GRID:
        return table
    scale = (GRID + INTERPOLATION_OFFSET) / side
    resized = F.interpolate(patches.unflatten(2, (side, side)), scale_factor=(scale, scale), mode="bicubic")
    return torch.cat([token, resized.flatten(2).transpose(1, 2)], dim=1)
