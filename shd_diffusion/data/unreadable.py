"""Images that cannot be read, where nobody has looked through them before: one stands in for one, up to a share."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from torch import Tensor

from shd_diffusion.data.decoding import SmallImage, UnreadableImage, UnreadFile
from shd_diffusion.data.image_sets import ImageFiles, Images
from shd_diffusion.errors import UserError
from shd_diffusion.files import cache_folder, read_as, write_json
from shd_diffusion.processes import processes
from shd_diffusion.progress import announce, progress_bar

MOST_CORRUPT = 0.001
"""Of the images: so many may be unreadable, and one in any case; as `prepare.max_corrupt_share` by default."""

READERS = 4
AT_ONCE = 256  # images that a reader is given

Unreadable = dict[int, str]
"""Why an image cannot be read, by its index."""


def read_or_next(images: Images, index: int) -> tuple[dict[str, Tensor], Unreadable]:
    """Item `index`, or where its image is corrupt the next one that is not, and which are.

    What is read follows from the index and the files alone, so that an interrupted run goes on alike.

    Raises:
        UnreadableImage: the image is too small, which is nothing to pass over in silence; or too many are corrupt.
    """
    corrupt: Unreadable = {}
    while True:
        place = (index + len(corrupt)) % len(images)
        try:
            return images[place], corrupt
        except SmallImage:
            raise
        except UnreadableImage as error:
            corrupt[place] = str(error)
            check_corrupt(corrupt, len(images))


def check_corrupt(corrupt: Unreadable, count: int) -> None:
    """See that not too many of `count` images are corrupt.

    Raises:
        UnreadableImage: they are.
    """
    if len(corrupt) > max(1, MOST_CORRUPT * count) or len(corrupt) == count:
        raise UnreadableImage(
            f"{corrupt[max(corrupt)]}: with {len(corrupt) - 1} others of {count} images, more than the share of "
            f"{MOST_CORRUPT} that is passed over; remove them"
        )


class CorruptImages:
    """Those that a process has met so far; each is told once."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.met: Unreadable = {}

    def add(self, found: Iterable[Unreadable]) -> None:
        """Tell of corrupt images that are new. Raises as `check_corrupt`."""
        for corrupt in found:
            for index in corrupt.keys() - self.met.keys():
                self.met[index] = corrupt[index]
                check_corrupt(self.met, self.count)
                announce(f"{corrupt[index]}: left out, the next image stands in for it")


def find_unreadable(images: Images) -> list[int]:
    """Indices of the images that cannot be read, or are too small; all files are decoded, once for all calls.

    Raises:
        UserError: more are corrupt than `check_corrupt` allows.
    """
    if not isinstance(images, ImageFiles):
        return []
    file = cache_folder() / "unreadable" / f"{images.fingerprint()}.json"
    with processes().local_main_process_first():
        if file.exists():
            return read_as(file, list[int])
        corrupt: Unreadable = {}
        small: list[int] = []
        unread: list[int] = []

        def look(indices: range) -> int:
            for index in indices:
                try:
                    images.image(index)
                except SmallImage:
                    small.append(index)
                except UnreadableImage as error:
                    corrupt[index] = str(error)
                    if isinstance(error, UnreadFile):
                        unread.append(index)
            return len(indices)

        with (
            ThreadPoolExecutor(READERS) as readers,
            progress_bar(len(images), "look through the images", "image") as bar,
        ):
            every = range(len(images))
            for looked_at in readers.map(look, (every[i : i + AT_ONCE] for i in every[::AT_ONCE])):
                bar.update(looked_at)
        try:
            check_corrupt(corrupt, len(images))
        except UnreadableImage as error:
            raise UserError(str(error)) from None
        for reason in corrupt.values():
            announce(f"{reason}: left out")
        found = sorted([*corrupt, *small])
        if unread:  # it may be another time, so this is not kept
            return found
        try:
            write_json(file, found)
        except OSError as error:
            announce(f"{file}: cannot be kept ({error.strerror}), and is found out each time")
    return found
