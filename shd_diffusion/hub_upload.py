"""`push`: a run's pipeline, with its model card, to the hub."""

from __future__ import annotations

from huggingface_hub import HfApi

from shd_diffusion.errors import UserError, one_line
from shd_diffusion.model_card import card
from shd_diffusion.run_folder import RunFolder

NOT_THE_PIPELINE = ["samples/*", "evaluation/*", ".lock"]
"""What stands beside a pipeline that `compress` made, and is no part of it."""


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
    pipeline = run.finished_pipeline()
    trained = pipeline != run.path  # `compress` writes other words, which name no folder of this machine
    api = HfApi()
    try:
        address = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=name,
            folder_path=pipeline,
            ignore_patterns=[*NOT_THE_PIPELINE, *(["README.md"] if trained else [])],
            commit_message=f"The pipeline of {run.path.name}",
        )
        if trained:
            api.upload_file(repo_id=name, path_or_fileobj=card(run, name).encode(), path_in_repo="README.md")
    except Exception as error:  # the hub's client raises errors of any kind
        raise UserError(
            f"{name}: the hub does not take it ({one_line(error)}); is `hf auth login` done?"
        ) from error
    return str(address)
