"""Images and texts as features of one space: a CLIP model of transformers (Radford et al. 2021, arXiv 2103.00020)."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from torch import Tensor, nn

from shd_diffusion.errors import UserError, one_line
from shd_diffusion.hashing import hash_model
from shd_diffusion.models.hub import is_hub_name, try_hub
from shd_diffusion.processes import processes
from shd_diffusion.progress import announce, progress_bar

KEY = "evaluate.clip_model"


class ImageTextEncoder(nn.Module):
    """A CLIP model with its own image processor and tokenizer.

    Attributes:
        source: the folder or hub name that it comes from.
        revision: the commit, of a model of the hub.
        tokens: of a text, at most; what is longer is cut.
        sha256: of all that its features follow from: config, weights, image processor and tokenizer.
    """

    def __init__(self, source: str, model: Any, processor: Any) -> None:
        super().__init__()
        self.source, self.revision = source, getattr(model.config, "_commit_hash", None)
        self.model, self.processor = model.eval().requires_grad_(False), processor
        self.tokens = min(
            processor.tokenizer.model_max_length, model.config.text_config.max_position_embeddings
        )
        tokenizer = json.loads(processor.tokenizer.backend_tokenizer.to_str())
        tokenizer |= {"padding": None, "truncation": None}  # of its last call
        parts = [hash_model(model), processor.image_processor.to_dict(), tokenizer]
        self.sha256 = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    @torch.no_grad()
    def images(self, images: Tensor) -> Tensor:
        """8-bit images (B, 3, H, W) to features (B, D)."""
        inputs = self.processor.image_processor(list(images.cpu()), return_tensors="pt")
        return self.model.get_image_features(**inputs.to(self.model.device)).pooler_output

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """B texts to features (B, D); of one that is too long, the beginning.

        The tokenizer cuts, which keeps the token of the end, whose state is the feature.
        """
        inputs = self.processor.tokenizer(
            list(texts), return_tensors="pt", padding=True, truncation=True, max_length=self.tokens
        )
        return self.model.get_text_features(**inputs.to(self.model.device)).pooler_output

    def is_cut(self, text: str) -> bool:
        """Whether a text is longer than the model takes."""
        return len(self.processor.tokenizer(text, verbose=False).input_ids) > self.tokens

    def forward(self, images: Tensor) -> tuple[Tensor]:
        """The features of images alone, as an extractor gives them."""
        return (self.images(images),)

    def protocol(self) -> dict[str, Any]:
        """What features of it depend on."""
        return {
            "name": self.source,
            "revision": self.revision,
            "sha256": self.sha256,
            "transformers": importlib.metadata.version("transformers"),
        }


def encode_texts(encoder: ImageTextEncoder, texts: Sequence[str], batch_size: int) -> Tensor:
    """The features of all texts, (P, D), on the CPU."""
    encoder = encoder.to(processes().device)
    parts = []
    with progress_bar(
        len(texts), "features of prompts", "prompt", visible=processes().is_main_process
    ) as bar:
        for start in range(0, len(texts), batch_size):
            parts.append(encoder.texts(texts[start : start + batch_size]).cpu())
            bar.update(len(parts[-1]))
    return torch.cat(parts)


def check_image_text_encoder(source: str) -> None:
    """See that a CLIP model is there, or can be asked for, without loading it.

    Weights that would have to be downloaded are no error: a line on standard error says so.

    Raises:
        UserError: it is neither a folder of a model nor a hub name, or `transformers` is missing.
    """
    try:
        import transformers  # noqa: F401
    except ModuleNotFoundError:
        raise UserError(
            f"{KEY}: a CLIP model needs the library `transformers`; pip install 'shd-diffusion[text]'"
        ) from None
    if is_hub_name(source):
        if not isinstance(try_to_load_from_cache(source, "config.json"), str):
            announce(
                f"{KEY}: {source} is not on this machine and will be downloaded to evaluate; where there is no "
                "network, give the folder of a CLIP model"
            )
    elif not (Path(source) / "config.json").is_file():
        raise UserError(f"{KEY}: {source} is no folder of a CLIP model; give one, or its hub name")


def load_image_text_encoder(source: str) -> ImageTextEncoder:
    """A CLIP model by its folder or hub name, in float32, on the CPU; pickled code is never run.

    Raises:
        UserError: there is none, it cannot be downloaded, or weights of it are missing.
    """
    check_image_text_encoder(source)
    try_hub(source)  # which transformers asks next
    from transformers import AutoConfig, CLIPModel, CLIPProcessor

    try:
        with processes().local_main_process_first():
            config = AutoConfig.from_pretrained(source)
            if config.model_type != "clip":  # from which CLIPModel would be made with random weights
                raise ValueError(f"a model of type `{config.model_type}`, not `clip`")
            model, report = CLIPModel.from_pretrained(
                source, config=config, dtype=torch.float32, output_loading_info=True
            )
            processor = CLIPProcessor.from_pretrained(source)
        if missing := report["missing_keys"]:
            raise ValueError(f"weights are missing: {min(missing)}")
        return ImageTextEncoder(source, model, processor)
    except Exception as error:  # transformers and safetensors raise errors of any kind on damaged files
        raise UserError(
            f"{KEY}: {source} cannot be loaded ({one_line(error)[:200]}); give the folder or hub name of a CLIP model "
            "of transformers"
        ) from error
