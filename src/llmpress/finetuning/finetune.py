"""Finetune an artifact on disk end to end into another one: what stage and command share."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from llmpress.adapters import STORED_DTYPE, add_adapters, open_base, save_adapter, save_base
from llmpress.artifacts import artifact_folder, fingerprint, read_json, read_provenance, write_json
from llmpress.checkpoints import Checkpoint, CheckpointWriter, copy_companions
from llmpress.errors import ArtifactError
from llmpress.finetuning.data import TrainingData
from llmpress.finetuning.loop import TrainingRecord, train
from llmpress.finetuning.settings import ADAPTERS, FinetuningSettings, Trains, check_norms
from llmpress.finetuning.trainables import compressed_parameters, training
from llmpress.hf import is_compressed, load_model, load_tokenizer
from llmpress.resume import SCRATCH, BlockStore

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
    scratch: Path = SCRATCH,
) -> None:
    """Train a few parameters of a model on the loss of the whole model.

    A killed call continues from its last checkpoint when it is repeated, and gives the same bytes.

    Args:
        start: A compressed model for ``compressed``; the original itself for adapters.
        original: The model that ``start`` was made from, the teacher of distillation.
        out: The artifact to write: a compressed model like ``start``, or an adapter.
        trains: What trains.
        settings: How.
        data: Makes the examples with the model's tokenizer.
        inputs: Artifacts that the examples come from, by role.
        described: What the examples are, for the provenance.
        seed: Same seed, same bytes.
        device: Where to compute.
        scratch: Folder for the checkpoints of an unfinished call.

    Raises:
        ArtifactError: A damaged folder, or a start that was made from another model.
        ConfigError: Nothing in the start may train.
        NumericalError: A loss that is not finite.
        ModuleNotFoundError: A package that adapters need is not installed.
    """
    check_norms(trains, settings)
    _check_start(start, original, trains)
    roles = {"start": start, "model": original, **inputs}
    method = read_provenance(start)["settings"].get("method") if trains == "compressed" else trains
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
            dtype = getattr(torch, settings.precision)
            teacher = load_model(original, dtype=dtype, device=str(device))
        run = _train_adapters if trains in ADAPTERS else _train_compressed
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
    dtypes = {name: checkpoint.tensor(name).dtype for name in parameters}
    with training(model, parameters):
        # One rate for codebooks of whole numbers and for their scales.
        best, record = fit(model, parameters, dtypes, relative_rate=True)
    writer = CheckpointWriter(folder)
    for name in checkpoint.names():
        writer.add(name, best[name] if name in best else checkpoint.tensor(name))
    writer.close()
    shutil.copyfile(start / "config.json", folder / "config.json")
    copy_companions(start, folder)
    layers = read_json(start / "layers.json")
    unknown = {"relative_weight_error": None, "relative_output_error": None}
    entries = [{**layer, **unknown} for layer in layers["layers"]]
    write_json(folder / "layers.json", {"layers": entries, "totals": layers["totals"]})
    trained = sum(parameter.numel() for parameter in parameters.values())
    return record, trained, int(layers["totals"]["model_weights"])


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


def _check_start(start: Path, original: Path, trains: Trains) -> None:
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
