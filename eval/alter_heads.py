"""Make a teacher with heads of a known kind from a trained one, to measure it with `shd-diffusion squeeze`."""

import shutil
from pathlib import Path
from typing import Annotated

import typer
from heads_of_a_kind import make_heads_alike, shuffle_heads, weaken_heads

from shd_diffusion.cli import stage
from shd_diffusion.errors import UserError
from shd_diffusion.files import replacing_folder
from shd_diffusion.models.factory import find_model_folder, load_model


@stage
def alter(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a trained teacher.")],
    output: Annotated[Path, typer.Option(metavar="DIR", help="The folder of the new one.")],
    alike: Annotated[
        float | None, typer.Option(help="Copy maps within pairs of heads, with this noise.")
    ] = None,
    weaken: Annotated[float | None, typer.Option(help="Scale what every second head contributes.")] = None,
    shuffle: Annotated[int | None, typer.Option(help="Shuffle the heads by this seed.")] = None,
) -> None:
    """Copy a run's config and pipeline, its denoiser altered."""
    if output.exists():
        raise UserError(f"{output}: exists already; give another --output, or delete it")
    if not (run / "config.yaml").is_file():
        raise UserError(f"{run}: is no run; give the folder of a trained teacher")
    model = load_model(str(run))
    try:
        if alike is not None:
            make_heads_alike(model, alike, seed=0)
        if weaken is not None:
            weaken_heads(model, weaken)
        if shuffle is not None:
            shuffle_heads(model, shuffle)
    except ValueError as error:
        raise UserError(f"{run}: {error}") from error
    with replacing_folder(output) as folder:
        shutil.copy(run / "config.yaml", folder)
        shutil.copytree(run / "pipeline", folder / "pipeline")
        place = find_model_folder(folder)
        assert place is not None
        model.save_pretrained(place)


if __name__ == "__main__":
    typer.run(alter)
