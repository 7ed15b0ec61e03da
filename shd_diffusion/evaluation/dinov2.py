"""DINOv2 (Oquab et al. 2023, arXiv 2304.07193) from a file of its published weights.

torch-fidelity fetches the network's code from a repository at run time and takes no file of weights. Here is the
network itself, a plain vision transformer; the names of its parts are those of the published state dicts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.feature_extractor_dinov2 import FeatureExtractorDinoV2

HEAD_WIDTH = 64
PATCH = 14
INTERPOLATION_OFFSET = 0.1  # added to the grid by the published models when they resize their position table

MODELS = {"dinov2-vit-s-14": "vits14", "dinov2-vit-b-14": "vitb14", "dinov2-vit-l-14": "vitl14"}
URLS = {
    name: f"https://dl.fbaipublicfiles.com/dinov2/dinov2_{model}/dinov2_{model}_pretrain.pth"
    for name, model in MODELS.items()
}


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        query, key, value = self.qkv(tokens).unflatten(-1, (3, -1, HEAD_WIDTH)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


class Perceptron(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(tokens)))


class Scale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.attn, self.ls1 = nn.LayerNorm(width, eps=1e-6), Attention(width), Scale(width)
        self.norm2, self.mlp, self.ls2 = nn.LayerNorm(width, eps=1e-6), Perceptron(width), Scale(width)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.ls1.gamma * self.attn(self.norm1(tokens))
        return tokens + self.ls2.gamma * self.mlp(self.norm2(tokens))


class PatchEmbedding(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, PATCH, PATCH)


class VisionTransformer(nn.Module):
    """Images (N, 3, H, W), normalised, with sides that 14 divides, to the class token (N, width)."""

    def __init__(self, width: int, depth: int, positions: int) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.mask_token = nn.Parameter(torch.zeros(1, width))  # of pre-training; in the published files
        self.pos_embed = nn.Parameter(torch.zeros(1, positions, width))
        self.patch_embed = PatchEmbedding(width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    @classmethod
    def from_state_dict(cls, state: dict[str, Tensor]) -> VisionTransformer:
        """The network of published weights, of whatever size."""
        _, positions, width = state["pos_embed"].shape
        depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
        network = cls(width, depth, positions)
        network.load_state_dict(state)
        return network

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patch_embed.proj(images)  # (N, width, rows, columns)
        tokens = torch.cat(
            [
                (self.cls_token + self.pos_embed[:, :1]).expand(len(images), -1, -1),
                (patches + self._positions(*patches.shape[2:])).flatten(2).transpose(1, 2),
            ],
            dim=1,
        )
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)[:, 0]

    def _positions(self, rows: int, columns: int) -> Tensor:
        """The position table (1, width, rows, columns), resized if it was learnt on another grid."""
        table = self.pos_embed[:, 1:].transpose(1, 2)
        side = round(table.shape[2] ** 0.5)
        table = table.unflatten(2, (side, side))
        if (rows, columns) == (side, side):
            return table
        scale = [(length + INTERPOLATION_OFFSET) / side for length in (rows, columns)]
        return F.interpolate(table, scale_factor=scale, mode="bicubic")


class DinoV2Extractor(FeatureExtractorDinoV2):
    """torch-fidelity's DINOv2 extractor, its resize and normalisation, on weights that are there already."""

    def __init__(self, name: str, state: dict[str, Tensor]) -> None:
        FeatureExtractorBase.__init__(self, name, ["dinov2"])
        self.feature_extractor_internal_dtype = torch.float32
        self.model = VisionTransformer.from_state_dict(state)
        self.requires_grad_(False).eval()
