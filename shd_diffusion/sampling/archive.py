"""Samples as one .npz, as the evaluator of the ADM suite reads them."""

from __future__ import annotations

from pathlib import Path
from zipfile import ZipFile, ZipInfo

import numpy as np
from PIL import Image

from shd_diffusion.errors import UserError
from shd_diffusion.files import replacing_file
from shd_diffusion.progress import progress_bar
from shd_diffusion.sample_folder import image_path, read_summary

ARCHIVE = "samples.npz"


def write_archive(folder: Path) -> Path:
    """Write the samples of a folder into its `samples.npz`: `arr_0`, 8-bit (N, H, W, 3), and labels, if any, `arr_1`.

    The images go through one by one, as 50,000 of 256×256 are 9.8 GB. The file's bytes follow from them alone: its
    members are dated 1980.

    Raises:
        UserError: there are no samples, or an image is missing or damaged.
    """
    path, summary = folder / ARCHIVE, read_summary(folder)
    if summary is None or not summary.num_images:
        raise UserError(f"{folder}: has no finished samples")
    count = summary.num_images
    header = {"descr": "|u1", "fortran_order": False, "shape": (count, *_pixels(folder, 0).shape)}
    with (
        replacing_file(path) as temporary,
        ZipFile(temporary, "w") as archive,
        progress_bar(count, f"write {path.name}", "image") as bar,
    ):
        with archive.open(ZipInfo("arr_0.npy"), "w", force_zip64=True) as member:
            np.lib.format.write_array_header_1_0(member, header)
            for index in range(count):
                member.write(_pixels(folder, index).tobytes())
                bar.update()
        if summary.labels is not None:
            with archive.open(ZipInfo("arr_1.npy"), "w") as member:
                np.lib.format.write_array(member, np.array(summary.labels, dtype=np.int64))
    return path


def _pixels(folder: Path, index: int) -> np.ndarray:
    path = image_path(folder, index)
    try:
        with Image.open(path) as image:
            return np.asarray(image)
    except (OSError, SyntaxError):
        raise UserError(f"{path}: missing or damaged; delete it and sample again") from None
