"""Train an artifact on disk end to end into another one: what stage, command and Python share."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmpress.calibration.texts import read_texts, text_artifacts
from llmpress.core.artifacts import TRAINING, fingerprint, free_place, read_provenance, write_json
from llmpress.core.devices import pick_device
from llmpress.core.errors import ArtifactError, ConfigError
from llmpress.core.params import build
from llmpress.core.records import read_records, write_records
from llmpress.core.resume import scratch_folder
from llmpress.data.corpora import Text, text_paths
from llmpress.data.tasks.files import TRAIN_FILE, read_items
from llmpress.deltas.applying import load_finetuned
from llmpress.models.checkpoints.compressed import compressed_layers, is_compressed
from llmpress.models.checkpoints.delta_files import DeltaFolder, DeltaWriter
from llmpress.models.checkpoints.dense_view import layer_records
from llmpress.models.checkpoints.files import Checkpoint, CheckpointWriter, copy_companions
from llmpress.models.folders import model_folder
from llmpress.models.loading import check_complete, load_model, load_tokenizer
from llmpress.training.adapters import (
    STORED_DTYPE,
    add_adapters,
    open_base,
    save_adapter,
    save_base,
)
from llmpress.training.data import TrainingData, task_data, text_data
from llmpress.training.loop import train
from llmpress.training.objectives import model_loss
from llmpress.training.processes import Written, trained_artifact
from llmpress.training.settings import (
    ADAPTERS,
    TRAINS,
    FinetuningSettings,
    Trains,
    check_settings,
    with_precision,
)
from llmpress.training.trainables import Parameters, compressed_parameters, delta_parameters

Data = Callable[[PreTrainedTokenizerBase], TrainingData]
Items = Path | str | Sequence[Mapping[str, Any]]
SHORT = 128
"""Tokens; up to here plain matrix products beat the fused attention's backward pass on a CPU."""


def train_model(
    start: Path | str,
    *,
    out: Path | str,
    steps: int,
    learning_rate: float,
    trains: str = "compressed",
    original: Path | str | None = None,
    base: Path | str | None = None,
    text: Text | None = None,
    items: Items | None = None,
    record: Mapping[str, object] | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    scratch: Path | str | None = None,
    force: bool = False,
    **settings: Any,
) -> Path:
    """Train a few parameters of a model on the loss of the whole model, end to end.

    The best state on held-out text or items is kept, never a worse one than the start. A killed
    call continues from its last checkpoint when it is repeated, and gives the same bytes.

    Args:
        start: A compressed model for ``compressed``; a compressed delta for ``delta``; the original
            itself for adapters.
        out: Folder to write: a compressed model or delta like ``start``, or an adapter.
        steps: Optimizer steps.
        learning_rate: Its peak.
        trains: ``compressed``: codebooks or factors; ``delta``: scales or factors of a delta on its
            base; ``lora``: adapters beside a dense model; ``qlora``: the same, its linears in 4-bit
            NF4.
        original: The model that ``start`` was made from, the fine-tuned one of a delta: the teacher
            of distillation. Adapters need none.
        base: The base of a delta.
        text: What to follow or to learn; see `read_texts`.
        items: What to learn instead: mappings with ``query`` and ``target``, a file of such JSON
            lines, or a task.
        record: What the provenance says of the data; by default their names.
        seed: Same seed, same bytes.
        device: ``cpu``, ``cuda`` or ``cuda:1``; by default the first GPU, or the CPU without one.
        scratch: Folder for the checkpoints of an unfinished call; by default beside ``out``.
        force: Replace ``out`` where it exists.
        **settings: The others of `FinetuningSettings`.

    Returns:
        ``out``; of several processes that train together the first one writes it.

    Raises:
        ArtifactError: A damaged folder, a start that was made from another model, or ``out``
            exists.
        ConfigError: An unknown setting, text and items or neither, nothing in the start may train,
            a delta comes without its base, or a batch that the processes cannot share evenly.
        SourceError: Too little text, or too few items.
        NumericalError: A loss that is not finite.
        ModuleNotFoundError: A package that adapters need is not installed.
    """
    kind = next((known for known in TRAINS if known == trains), None)
    if kind is None:
        raise ConfigError(f"trains={trains!r}: allowed are {', '.join(TRAINS)}")
    if bool(text) == bool(items):
        raise ConfigError("give either `text` or `items` to train on (--text, --items)")
    if original is None and trains not in ADAPTERS:
        raise ConfigError("original: name the model that the start was made from (--original)")
    given = {"steps": steps, "learning_rate": learning_rate, **settings}
    how = build(FinetuningSettings, given, "train")
    check_settings(kind, how)
    items = Path(items) if isinstance(items, str) else items
    read = (start, original, base, items if isinstance(items, Path) else None, *text_paths(text))
    out, place = free_place(out, force=force, inputs=read), pick_device(device)
    start = Path(start)
    if trains != "delta":
        model_folder(start)
    original = start if original is None else model_folder(original)
    names, inputs, data = _data(text, items, how, seed, original)
    _train(
        start,
        original,
        out,
        trains=kind,
        settings=how,
        data=data,
        inputs=inputs,
        described={"data": sorted(names)} if record is None else record,
        seed=seed,
        device=place,
        base=None if base is None else model_folder(base),
        scratch=Path(scratch or scratch_folder(out)),
        force=force,
    )
    return out


def _data(
    text: Text | None,
    items: Items | None,
    settings: FinetuningSettings,
    seed: int,
    original: Path,
) -> tuple[list[str], dict[str, Path], Data]:
    """Return the names of the data, those that are artifacts by role, and what makes examples."""
    if items is None:
        texts = read_texts(text or (), load_tokenizer(original))
        inputs = text_artifacts(text or ())
        return list(texts), inputs, lambda tokenizer: text_data(texts, tokenizer, settings, seed)
    if isinstance(items, Path | str):
        place = Path(items)
        records = read_items(place / TRAIN_FILE if place.is_dir() else place)
        names, inputs = [place.name], {"task": place} if place.is_dir() else {}
    else:
        records = [dict(item) for item in items]
        names, inputs = ["items"], {}
    return names, inputs, lambda tokenizer: task_data(records, tokenizer, settings, seed)


def _train(
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
    base: Path | None,
    scratch: Path,
    force: bool,
) -> None:
    settings = with_precision(trains, settings)
    _check_start(start, original, trains)
    roles = {"start": start, "model": original, **inputs}
    if trains == "delta":
        roles["base"] = _delta_base(start, original, base)
    method = trains if trains in ADAPTERS else read_provenance(start)["settings"].get("method")
    recorded = {"method": method, "trains": trains, **asdict(settings), **described, "seed": seed}
    with trained_artifact(
        out,
        stage="train",
        settings=recorded,
        inputs=roles,
        device=device,
        scratch=scratch,
        force=force,
    ) as made:
        examples = data(load_tokenizer(original))
        teacher = None
        if settings.objective == "distillation":
            dtype = getattr(torch, str(settings.precision))
            teacher = load_model(original, dtype=dtype, device=str(made.device))
        if trains in ADAPTERS:
            begun = _begin_adapters(start, trains, settings, seed, made)
        elif trains == "delta":
            begun = _begin_delta(roles["base"], start, made.device)
        else:
            begun = _begin_compressed(start, settings, made.device)
        if max(len(example.tokens) for example in (*examples.train, *examples.held_out)) <= SHORT:
            begun.model.set_attn_implementation("eager")
        best, record = train(
            begun.model,
            begun.parameters,
            partial(model_loss, begun.model, teacher=teacher),
            examples,
            settings,
            seed=seed,
            dtypes=begun.dtypes,
            relative_rate=trains not in ADAPTERS,
            store=made.store,
        )
        if made.folder is None:
            return
        begun.save(best, made.folder)
        trained = sum(parameter.numel() for parameter in begun.parameters.values())
        best_step, loss = record.best
        write_json(
            made.folder / TRAINING,
            {
                "trains": trains,
                "settings": {**asdict(settings), **described},
                "seed": seed,
                "trainable_parameters": trained,
                "model_parameters": begun.num_weights,
                "trainable_share": trained / begun.num_weights,
                "loss_before": record.held_out[0][1],
                "loss_after": loss,
                "best_step": best_step,
                **asdict(record),
            },
        )


@dataclass
class _Begun:
    """A start that is loaded.

    Attributes:
        model: What computes the loss.
        parameters: What trains, by the name it is stored under.
        dtypes: What each is stored in.
        num_weights: Of the whole model.
        save: Writes the artifact with other values into a folder.
    """

    model: PreTrainedModel
    parameters: Parameters
    dtypes: Mapping[str, torch.dtype]
    num_weights: int
    save: Callable[[Mapping[str, Tensor], Path], None]


def _begin_compressed(start: Path, settings: FinetuningSettings, device: torch.device) -> _Begun:
    checkpoint = Checkpoint(start)
    model = load_model(start, dtype=torch.float32, device=str(device))
    parameters = compressed_parameters(model, norms=settings.norms)
    records = layer_records(start)
    if records is None:
        raise ArtifactError(f"{start}: holds no compressed model; compress makes one")
    finetuned = records.finetuned()

    def save(best: Mapping[str, Tensor], folder: Path) -> None:
        writer = CheckpointWriter(folder)
        for name in checkpoint.names():
            writer.add(name, best[name] if name in best else checkpoint.tensor(name))
        writer.close(checkpoint.guard(compressed_layers(checkpoint)))
        shutil.copyfile(start / "config.json", folder / "config.json")
        copy_companions(start, folder)
        write_records(folder, finetuned)
        check_complete(Checkpoint(folder))

    dtypes = {name: checkpoint.tensor(name).dtype for name in parameters}
    return _Begun(model, parameters, dtypes, records.totals.model_weights, save)


def _begin_delta(base: Path, start: Path, device: torch.device) -> _Begun:
    stored = DeltaFolder(start, "compressed_delta")
    model = load_finetuned(base, start, dtype=torch.float32, device=str(device))
    parameters = delta_parameters(model)

    def save(best: Mapping[str, Tensor], folder: Path) -> None:
        writer = DeltaWriter(folder)
        for name in chain.from_iterable(stored.header["files"].values()):  # in the start's order
            writer.add(name, best[name] if name in best else stored.tensor(name))
        own = ("format_version", "kind", "files")  # the writer's
        header = {key: value for key, value in stored.header.items() if key not in own}
        writer.close("compressed_delta", header)
        write_records(folder, read_records(start).finetuned())

    dtypes = {name: stored.tensor(name).dtype for name in parameters}
    return _Begun(model, parameters, dtypes, int(stored.header["model_weights"]), save)


def _begin_adapters(
    start: Path, trains: Trains, settings: FinetuningSettings, seed: int, made: Written
) -> _Begun:
    model = open_base(start, quantize=trains == "qlora", device=made.device)
    if trains == "qlora" and made.folder is not None:
        save_base(model, start, made.folder)
    parameters = add_adapters(model, rank=settings.rank, alpha=settings.alpha, seed=seed)
    original = Checkpoint(start)
    num_weights = sum(torch.Size(original.shape(name)).numel() for name in original.names())

    def save(best: Mapping[str, Tensor], folder: Path) -> None:
        save_adapter(best, folder, model=start.name, rank=settings.rank, alpha=settings.alpha)
        copy_companions(start, folder)

    dtypes = dict.fromkeys(parameters, STORED_DTYPE)
    return _Begun(model, parameters, dtypes, num_weights, save)


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
