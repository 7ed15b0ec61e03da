"""Class folders of images and classes of the reference: matched by name, since a folder may hold a few of them."""

from __future__ import annotations

import torch
from torch import Tensor

from shd_diffusion.data.folder import tell_order
from shd_diffusion.evaluation.images import FolderImages, ImageSet
from shd_diffusion.evaluation.references import Reference

SHOWN = 4  # names in a message


def match_classes(images: ImageSet, reference: Reference) -> tuple[Tensor | None, str | None]:
    """The classes of images by the numbers that the reference has for them, (N,), or why there are none.

    Images without class folders keep their labels, which are the data set's own numbers; so do folders where the
    reference has no classes. A reference whose classes have no names is matched by their numbers as text.
    """
    if not isinstance(images, FolderImages) or images.labels is None or images.class_names is None:
        return images.labels, None
    if reference.labels is None:
        tell_order(images.folder, images.class_names)
        return images.labels, None
    known = reference.class_names or list(map(str, range(int(reference.labels.max()) + 1)))
    if unknown := [name for name in images.class_names if name not in known]:
        more = ", ..." if len(known) > SHOWN else ""
        return None, (
            f"{images.folder}: the folder `{unknown[0]}` is no class of the reference {reference.source} "
            f"({', '.join(known[:SHOWN])}{more})"
        )
    return torch.tensor([known.index(name) for name in images.class_names])[images.labels], None
