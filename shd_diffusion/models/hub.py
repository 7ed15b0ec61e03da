"""What may be asked of the Hugging Face hub, and a hub that does not answer."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

from huggingface_hub import constants
from huggingface_hub.utils import get_session

from shd_diffusion.progress import announce

PATIENCE = 10.0  # seconds


def is_hub_name(name: str) -> bool:
    """Whether this may be asked of the hub: `owner/name`, and not a path into a folder that is here. Asks nothing."""
    parent = Path(name).parent
    return (
        re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None
        and not parent.is_dir()
        and str(parent) not in (".", "..")
    )


def try_hub(name: str) -> bool:
    """As `is_hub_name`, for who asks the hub next: of such a name it is tried first, see `go_offline_without_hub`."""
    if not is_hub_name(name):
        return False
    go_offline_without_hub()
    return True


@cache
def go_offline_without_hub() -> None:
    """Let this process do with what has been downloaded before if the hub does not answer within `PATIENCE`.

    Its client tries each file again and again, for minutes.
    """
    if constants.HF_HUB_OFFLINE:
        return
    try:
        get_session().head(constants.ENDPOINT, timeout=PATIENCE)
    except Exception as error:  # of whichever client the hub's library has
        announce(
            f"{constants.ENDPOINT}: does not answer ({error}); only what has been downloaded before is used"
        )
        constants.HF_HUB_OFFLINE = True
