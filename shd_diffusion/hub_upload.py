"""`push`: a run's pipeline, with its model card, to the hub."""

from __future__ import annotations

from huggingface_hub import HfApi

from shd_diffusion.errors import UserError, one_line
from shd_diffusion.model_card import card
from shd_diffusion.run_folder import RunFolder

NOT_THE_PIPELINE = ["samples/*", "evaluation/*", ".lock", "README.md"]
"""What stands beside a pipeline that `compress` made, and is no part of it; and the card, which names a folder here."""


def push(run: RunFolder, name: str, private: bool = False) -> str:
    """Upload the pipeline of a finished run; the files that the hub has already are not sent again.

    Args:
        name: `owner/name` on the hub.
        private: for a repository that is made now.

    Returns:
        Its address.

    Raises:
        UserError: the run is not finished, or the hub refuses.
    """
    run.read_summary()
    api = HfApi()
    try:
        address = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=name,
            folder_path=run.pipeline,
            ignore_patterns=NOT_THE_PIPELINE,
            commit_message=f"The pipeline of {run.path.name}",
        )
        api.upload_file(repo_id=name, path_or_fileobj=card(run, name).encode(), path_in_repo="README.md")
    except Exception as error:  # the hub's client raises errors of any kind
        raise UserError(
            f"{name}: the hub does not take it ({one_line(error)}); is `hf auth login` done?"
        ) from error
    return str(address)
