"""A smaller model from a trained one, without training: fewer heads, neurons and blocks."""

from shd_diffusion.compression.compress import CompressedModel, compress

__all__ = ["CompressedModel", "compress"]
