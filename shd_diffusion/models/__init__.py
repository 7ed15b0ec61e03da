"""What can be a teacher or a student: building, loading, MDTv2, converting published checkpoints.

The project's own classes are imported here because diffusers loads a component of a pipeline only from a
module that is already imported.
"""

from shd_diffusion.models.dit import OriginalDiTTransformer2DModel
from shd_diffusion.models.mdtv2 import MDTv2Transformer2DModel
from shd_diffusion.models.squeezed import squeezed_class
from shd_diffusion.models.tiny_autoencoder import PooledAutoencoderTiny

__all__ = [
    "MDTv2Transformer2DModel",
    "OriginalDiTTransformer2DModel",
    "PooledAutoencoderTiny",
    "squeezed_class",
]
