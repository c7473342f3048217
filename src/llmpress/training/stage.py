"""Finetune an artifact on disk end to end into another one: what stage and command share."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmpress.core.artifacts import (
    artifact_folder,
    fingerprint,
    read_json,
    read_provenance,
    write_json,
)
from llmpress.core.errors import ArtifactError, ConfigError
from llmpress.core.resume import SCRATCH, BlockStore
from llmpress.deltas.applying import load_finetuned
from llmpress.models.adapters import STORED_DTYPE, add_adapters, open_base, save_adapter, save_base
from llmpress.models.checkpoints.compressed import is_compressed
from llmpress.models.checkpoints.delta_files import DeltaFolder, DeltaWriter
from llmpress.models.checkpoints.files import Checkpoint, CheckpointWriter, copy_companions
from llmpress.models.loading import load_model, load_tokenizer
from llmpress.training.data import TrainingData
from llmpress.training.loop import TrainingRecord, train
from llmpress.training.settings import (
    ADAPTERS,
    FinetuningSettings,
    Trains,
    check_settings,
    with_precision,
)
from llmpress.training.trainables import (
    Parameters,
    compressed_parameters,
    delta_parameters,
    training,
)

RECORD = "training.json"
Data = Callable[[PreTrainedTokenizerBase], TrainingData]
Fit = Callable[..., tuple[dict[str, Tensor], TrainingRecord]]


def finetune_artifact(
    start: Path,
    original: Path,
    out: Path,
    *,
    trains: Trains,
    settings: FinetuningSettings,
    data: Data,
    inputs: Mapping[str, Path],
    described: Mapping[str, object],
    seed: int,
    device: torch.device,
    base: Path | None = None,
    scratch: Path = SCRATCH,
) -> None:
    """Train a few parameters of a model on the loss of the whole model.

    A killed call continues from its last checkpoint when it is repeated, and gives the same bytes.

    Args:
        start: A compressed model for ``compressed``; a compressed delta for ``delta``; the original
            itself for adapters.
        original: The model that ``start`` was made from, the fine-tuned one of a delta: the teacher
            of distillation.
        out: The artifact to write: a compressed model or delta like ``start``, or an adapter.
        trains: What trains.
        settings: How.
        data: Makes the examples with the model's tokenizer.
        inputs: Artifacts that the examples come from, by role.
        described: What the examples are, for the provenance.
        seed: Same seed, same bytes.
        device: Where to compute.
        base: The base of a delta.
        scratch: Folder for the checkpoints of an unfinished call.

    Raises:
        ArtifactError: A damaged folder, or a start that was made from another model.
        ConfigError: Nothing in the start may train, or a delta comes without its base.
        NumericalError: A loss that is not finite.
        ModuleNotFoundError: A package that adapters need is not installed.
    """
    check_settings(trains, settings)
    settings = with_precision(trains, settings)
    _check_start(start, original, trains)
    roles = {"start": start, "model": original, **inputs}
    if trains == "delta":
        roles["base"] = _delta_base(start, original, base)
    method = trains if trains in ADAPTERS else read_provenance(start)["settings"].get("method")
    recorded = {"method": method, "trains": trains, **asdict(settings), **described, "seed": seed}
    prints = {role: fingerprint(path) for role, path in roles.items()}
    store = BlockStore(f"train-{out.name}", {**recorded, **prints}, scratch)
    with (
        store,  # kept until the artifact is complete
        artifact_folder(out, stage="train", settings=recorded, inputs=roles) as folder,
    ):
        examples = data(load_tokenizer(original))
        teacher = None
        if settings.objective == "distillation":
            dtype = getattr(torch, str(settings.precision))
            teacher = load_model(original, dtype=dtype, device=str(device))
        run = _train_adapters if trains in ADAPTERS else _train_compressed
        if trains == "delta":
            run = partial(_train_delta, roles["base"])
        fit = partial(
            train, data=examples, settings=settings, seed=seed, folder=store.folder, teacher=teacher
        )
        record, trained, weights = run(start, folder, trains, settings, seed, device, fit)
        write_json(
            folder / RECORD,
            {
                "trains": trains,
                "settings": {**asdict(settings), **described},
                "seed": seed,
                "trainable_parameters": trained,
                "model_parameters": weights,
                "trainable_share": trained / weights,
                **asdict(record),
            },
        )


def _train_compressed(
    start: Path,
    folder: Path,
    trains: Trains,
    settings: FinetuningSettings,
    seed: int,
    device: torch.device,
    fit: Fit,
) -> tuple[TrainingRecord, int, int]:
    del trains, seed  # the codebooks start where they are
    checkpoint = Checkpoint(start)
    model = load_model(start, dtype=torch.float32, device=str(device))
    parameters = compressed_parameters(model, norms=settings.norms)
    best, record = _fit_stored(model, parameters, checkpoint, fit)
    writer = CheckpointWriter(folder)
    for name in checkpoint.names():
        writer.add(name, best[name] if name in best else checkpoint.tensor(name))
    writer.close()
    shutil.copyfile(start / "config.json", folder / "config.json")
    copy_companions(start, folder)
    layers = read_json(start / "layers.json")
    write_json(folder / "layers.json", _without_errors(layers))
    trained = sum(parameter.numel() for parameter in parameters.values())
    return record, trained, int(layers["totals"]["model_weights"])


def _train_delta(
    base: Path,
    start: Path,
    folder: Path,
    trains: Trains,
    settings: FinetuningSettings,
    seed: int,
    device: torch.device,
    fit: Fit,
) -> tuple[TrainingRecord, int, int]:
    del trains, settings, seed
    stored = DeltaFolder(start, "compressed_delta")
    model = load_finetuned(base, start, dtype=torch.float32, device=str(device))
    parameters = delta_parameters(model)
    best, record = _fit_stored(model, parameters, stored, fit)
    writer = DeltaWriter(folder)
    for name in chain.from_iterable(stored.header["files"].values()):  # in the start's order
        writer.add(name, best[name] if name in best else stored.tensor(name))
    own = ("format_version", "kind", "files")  # the writer's
    header = {key: value for key, value in stored.header.items() if key not in own}
    writer.close("compressed_delta", header)
    write_json(folder / "layers.json", _without_errors(read_json(start / "layers.json")))
    trained = sum(parameter.numel() for parameter in parameters.values())
    return record, trained, int(stored.header["model_weights"])


def _fit_stored(
    model: PreTrainedModel, parameters: Parameters, stored: Checkpoint | DeltaFolder, fit: Fit
) -> tuple[dict[str, Tensor], TrainingRecord]:
    """Train parameters; the best ones come back in the dtypes they are stored in."""
    dtypes = {name: stored.tensor(name).dtype for name in parameters}
    with training(model, parameters):
        # One rate for stored values of whole numbers and for their scales.
        return fit(model, parameters, dtypes, relative_rate=True)


def _without_errors(layers: Mapping[str, Any]) -> dict[str, Any]:
    """Return layers.json for other values of the same layers: their errors are unknown."""
    unknown = {"relative_weight_error": None, "relative_output_error": None}
    entries = [{**layer, **unknown} for layer in layers["layers"]]
    return {"layers": entries, "totals": layers["totals"]}


def _train_adapters(
    start: Path,
    folder: Path,
    trains: Trains,
    settings: FinetuningSettings,
    seed: int,
    device: torch.device,
    fit: Fit,
) -> tuple[TrainingRecord, int, int]:
    model = open_base(start, quantize=trains == "qlora", device=device)
    if trains == "qlora":
        save_base(model, start, folder)
    parameters = add_adapters(model, rank=settings.rank, alpha=settings.alpha, seed=seed)
    for parameter in parameters.values():
        parameter.data = parameter.data.float()
    best, record = fit(model, parameters, dict.fromkeys(parameters, STORED_DTYPE))
    save_adapter(best, folder, model=start.name, rank=settings.rank, alpha=settings.alpha)
    copy_companions(start, folder)
    original = Checkpoint(start)
    weights = sum(torch.Size(original.shape(name)).numel() for name in original.names())
    return record, sum(parameter.numel() for parameter in parameters.values()), weights


def _delta_base(start: Path, original: Path, base: Path | None) -> Path:
    """Return the base of a delta that was made of these two models.

    Raises:
        ArtifactError: It was made of others.
        ConfigError: No base.
    """
    if base is None:
        raise ConfigError(f"{start}: a delta trains on its base: give that too, as `base`")
    header = DeltaFolder(start, "compressed_delta").header
    for role, folder in (("base", base), ("finetuned", original)):
        if header[role]["fingerprint"] != fingerprint(folder):
            raise ArtifactError(f"{start}: its {role} model is another one than {folder}")
    return base


def _check_start(start: Path, original: Path, trains: Trains) -> None:
    if trains == "delta":
        return  # its header says what it was made of
    compressed = is_compressed(Checkpoint(start))
    if trains in ADAPTERS:
        if compressed or start.resolve() != original.resolve():
            raise ArtifactError(f"{start}: {trains} starts from the original model, {original}")
        return
    if not compressed:
        raise ArtifactError(f"{start}: is not compressed; compress it first, or train adapters")
    made_from = (read_provenance(start).get("inputs") or {}).get("model")
    if made_from not in (None, fingerprint(original)):
        raise ArtifactError(f"{start}: was made from another model than {original}")
