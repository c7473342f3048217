"""Whether a folder holds a model, said before anything else is done with it."""

from pathlib import Path

from llmpress.core.errors import ArtifactError
from llmpress.models.checkpoints.delta_files import HEADER


def model_folder(folder: Path | str) -> Path:
    """Return the folder of a model, after looking whether there is one.

    Raises:
        ArtifactError: No such folder, or something else in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ArtifactError(f"{folder}: no such folder")
    if (folder / HEADER).is_file():
        raise ArtifactError(
            f"{folder}: is a delta, and a model is needed here: name its base, and this as the "
            "delta: --base, --delta"
        )
    if not (folder / "config.json").is_file():
        raise ArtifactError(f"{folder}: no model here (config.json is missing)")
    return folder
