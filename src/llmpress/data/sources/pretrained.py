"""Bring a fetched model into the pipeline's form: a Hugging Face folder of safetensors.

A GGUF file is dequantized to fp32. A folder of safetensors is copied as it is, each tensor in its
own dtype. Nothing is unpickled, and no code that comes with a model is run.
"""

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from llmpress.core.artifacts import WEIGHTS_INDEX, read_json, sha256
from llmpress.core.companions import COMPANIONS
from llmpress.core.errors import ArtifactError, SourceError
from llmpress.data.sources.source import REPOSITORY, Opened, Source, opened

FOLDER_FILES = ("model*.safetensors", "pytorch_model*.safetensors", "*.json", "*.txt", *COMPANIONS)


@dataclass(frozen=True)
class ModelSource(Source):
    """One entry of ``models`` in params.yaml.

    Attributes:
        file: A GGUF file inside the source; without it the source is a Hugging Face folder.
        sha256: Digest that ``file`` must have, 64 hex digits.
    """

    file: str | None = None
    sha256: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.package and not self.file:
            raise ValueError("a `package:` model needs `file:`, the path of a GGUF in its wheel")
        if self.file and not self.file.endswith(".gguf"):
            raise ValueError(f"file {self.file!r} is no GGUF file")
        if self.sha256 and (len(self.sha256) != 64 or not self.file):
            raise ValueError("sha256 is the full digest (64 hex digits) of `file:`")

    def patterns(self) -> list[str]:
        """Globs of the files to fetch: never a pickle, never Python code."""
        return [self.file] if self.file else list(FOLDER_FILES)


def refuse_early(source: ModelSource) -> None:
    """Look at a hub model's configuration before gigabytes of weights are fetched.

    Raises:
        SourceError: No configuration, or an architecture that needs its own code.
    """
    if source.hub and not source.file:
        with opened(source, ["config.json"]) as first:
            _check_architecture(first.folder, source.hub)


def fetch_model(model: Path | str) -> Path:
    """Return the folder of a model, downloaded first when it is named on the hub.

    Args:
        model: A folder, or ``owner/name@revision`` on the hub.

    Returns:
        The folder; of a downloaded model inside the hub's cache, to be read only.

    Raises:
        ArtifactError: No such folder, and no name on the hub.
        SourceError: It cannot be reached, holds no safetensors, or needs its own code.
    """
    name = str(model)
    if Path(model).is_dir():
        return Path(model)
    if not re.fullmatch(REPOSITORY.pattern, name):
        hub = f"; for the hub write {name}@main or another revision" if name.count("/") == 1 else ""
        raise ArtifactError(f"{name}: no such folder{hub}")
    source = ModelSource(license="unknown", hub=name)
    refuse_early(source)
    with opened(source, source.patterns()) as fetched:
        _check_folder(fetched, name)
        return fetched.folder


def write_model(source: ModelSource, opened: Opened, out: Path) -> None:
    """Write the model into ``out``.

    Raises:
        SourceError: A wrong digest, no safetensors, or an architecture that needs its own code.
    """
    if source.file:
        _check_digest(opened.files[0], source.sha256)
        _convert_gguf(opened.files[0], out)
        return
    _check_folder(opened, next(iter(opened.origin.values())))
    for file in opened.files:
        copy = out / file.relative_to(opened.folder)
        copy.parent.mkdir(exist_ok=True)
        shutil.copy(file, copy)


def _check_digest(file: Path, expected: str | None) -> None:
    if expected and (found := sha256(file)) != expected.lower():
        raise SourceError(
            f"{file.name}: its SHA-256 is {found}, params.yaml expects {expected}: "
            "the file has changed; check its origin before changing `sha256:`"
        )


def _check_folder(opened: Opened, name: str) -> None:
    names = {file.name for file in opened.files}
    if "config.json" not in names:
        raise SourceError(f"{name}: no config.json, so it is no Hugging Face model folder")
    if not any(file.endswith(".safetensors") for file in names):
        raise SourceError(
            f"{name}: no model*.safetensors (pickled weights run code when they are read): name a "
            "revision that has them, or save_pretrained() it where you trust it and use `path:`"
        )
    if WEIGHTS_INDEX in names and "model.safetensors" not in names:  # else it is not read
        shards = set(read_json(opened.folder / WEIGHTS_INDEX)["weight_map"].values())
        if missing := sorted(shards - names):
            raise SourceError(
                f"{name}: {len(missing)} weight files are missing, first {missing[0]}"
            )
    _check_architecture(opened.folder, name)


def _check_architecture(folder: Path, name: str) -> None:
    from transformers import AutoConfig

    try:
        AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, KeyError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise SourceError(
            f"{name}: transformers has no such architecture of its own, and code that comes with a "
            f"model is never run ({reason})"
        ) from None


def _convert_gguf(file: Path, out: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        file.parent,
        gguf_file=file.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(out)
