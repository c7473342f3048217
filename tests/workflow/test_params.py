"""params.yaml, its schema, dvc.yaml and the rules say the same of the pipeline."""

import copy
import dataclasses
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from llmpress.calibration.settings import CalibrationSettings
from llmpress.compression.settings import Run
from llmpress.data.documents import CorpusSource
from llmpress.data.sources.pretrained import ModelSource
from llmpress.data.tasks.source import TaskSource
from llmpress.deltas.settings import DeltaRun, DeltaSource
from llmpress.evaluation.settings import EvaluationSettings
from llmpress.training.full import TrainingSettings
from llmpress.training.settings import FinetuningSettings, Training
from llmpress.tuning.settings import Finetune, TuningSettings

ROOT = Path(__file__).parents[2]
SCHEMA = yaml.safe_load((ROOT / "workflow/schemas/params.schema.yaml").read_text(encoding="utf-8"))
PARAMS = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
SECTIONS = {
    "models": ModelSource,
    "corpora": CorpusSource,
    "tasks": TaskSource,
    "finetuned_models": TrainingSettings,
    "deltas": DeltaSource,
    "calibrations": CalibrationSettings,
    "runs": Run,
    "delta_runs": DeltaRun,
    "finetunes": Finetune,
    "trainings": Training,
}


def entries(section: str) -> dict[str, Any]:
    """Return the schema of one entry of a section."""
    return SCHEMA["properties"][section]["additionalProperties"]


def refusals(params: Any) -> list[str]:
    """Return what the schema says against some params."""
    found = jsonschema.Draft202012Validator(SCHEMA).iter_errors(params)
    return [f"{error.json_path}: {error.message}" for error in found]


def fields(cls: type, *, required: bool = False) -> set[str]:
    """Return the names of a dataclass's fields, or of those without a default."""
    return {
        field.name
        for field in dataclasses.fields(cls)
        if not required
        or (field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING)
    }


def objects(schema: dict[str, Any], where: str = "$") -> list[tuple[str, dict[str, Any]]]:
    """Return every object with fixed keys that a schema describes."""
    found = [(where, schema)] if "properties" in schema else []
    for key, child in schema.get("properties", {}).items():
        found += objects(child, f"{where}.{key}")
    if isinstance(schema.get("additionalProperties"), dict):
        found += objects(schema["additionalProperties"], f"{where}.*")
    return found


def resolve(text: str, key: str, item: Any) -> str:
    """Fill in ${key}, ${item} and ${item.x} as DVC does."""
    text = text.replace("${key}", key)
    if isinstance(item, dict):
        return re.sub(r"\$\{item\.(\w+)\}", lambda match: item[match[1]], text)
    return text.replace("${item}", str(item))


def resolved_stages() -> dict[str, dict[str, Any]]:
    """Return the stages of dvc.yaml with foreach expanded: deps, params and outputs."""
    found = {}
    for name, definition in STAGES.items():
        items: Any = {"": None}
        if "foreach" in definition:
            items = PARAMS
            for part in definition["foreach"].strip("${}").split("."):
                items = items[part]
            items = {i: i for i in items} if isinstance(items, list) else items
        template = definition.get("do", definition)
        for key, item in items.items():
            outs = [
                next(iter(entry)) if isinstance(entry, dict) else entry
                for kind in ("outs", "metrics", "plots")
                for entry in template.get(kind, [])
            ]
            found[f"{name}@{key}" if key else name] = {
                kind: [resolve(text, key, item) for text in texts]
                for kind, texts in (
                    ("deps", template["deps"]),
                    ("params", template["params"]),
                    ("outs", outs),
                )
            }
    return found


def test_params_are_valid() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert refusals(PARAMS) == []


@pytest.mark.parametrize("section", sorted(SCHEMA["properties"]))
def test_unknown_key_is_refused_by_name(section: str) -> None:
    params = copy.deepcopy(PARAMS)
    if section == "seed":
        params["sede"] = 1
    elif section == "evaluation":
        params["evaluation"]["sede"] = 1
    else:
        next(iter(params[section].values()))["sede"] = 1
    [refusal] = refusals(params)
    assert "'sede' was unexpected" in refusal
    assert section in refusal or section == "seed"


def test_wrong_values_and_names_are_refused() -> None:
    params = copy.deepcopy(PARAMS)
    params["evaluation"]["windows"] = 0
    del next(iter(params["runs"].values()))["method"]
    params["runs"]["With Space"] = {"model": "smollm2", "method": "rtn"}
    found = "\n".join(refusals(params))
    assert "$.evaluation.windows: 0 is less than the minimum of 1" in found
    assert "'With Space' does not match" in found
    assert "'method' is a required property" in found


@pytest.mark.parametrize(("where", "schema"), objects(SCHEMA), ids=lambda v: str(v)[:40])
def test_objects_are_closed_and_keys_described(where: str, schema: dict[str, Any]) -> None:
    assert schema["additionalProperties"] is False, where
    for key, child in schema["properties"].items():
        if "$ref" in child and "description" not in child:
            child = SCHEMA["$defs"][child["$ref"].rpartition("/")[2]]
        assert child.get("description"), f"{where}.{key} has no description"


@pytest.mark.parametrize("section", SECTIONS)
def test_schema_has_the_keys_of_the_code(section: str) -> None:
    schema = entries(section)
    assert set(schema["properties"]) == fields(SECTIONS[section])
    assert set(schema["required"]) == fields(SECTIONS[section], required=True)


def test_schema_has_the_keys_of_the_code_in_nested_sections() -> None:
    tuning = entries("finetunes")["properties"]["settings"]
    assert set(tuning["properties"]) == fields(TuningSettings)
    assert set(tuning["required"]) == fields(TuningSettings, required=True)
    training = entries("trainings")["properties"]["settings"]
    assert set(training["properties"]) == fields(FinetuningSettings)
    assert set(training["required"]) == fields(FinetuningSettings, required=True)
    evaluation = set(SCHEMA["properties"]["evaluation"]["properties"])
    assert evaluation == fields(EvaluationSettings) | {"models"}


@pytest.mark.parametrize("group", [name for name in STAGES if name.startswith("evaluate")])
def test_evaluations_depend_on_all_settings_but_the_list_of_models(group: str) -> None:
    tracked = {p.partition(".")[2] for p in STAGES[group]["do"]["params"]}
    assert tracked == fields(EvaluationSettings)


def computes(stage: str) -> bool:
    """Tell whether a stage's script picks the device that it computes on."""
    command = STAGES[stage].get("do", STAGES[stage])["cmd"]
    return "pick_device" in (ROOT / command.split()[1]).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["default", "slurm"])
def test_profiles_give_a_gpu_to_the_stages_that_compute(name: str) -> None:
    profile = yaml.safe_load((ROOT / f"profiles/{name}/config.yaml").read_text(encoding="utf-8"))
    resources = profile["set-resources"]
    assert {*resources, *profile["set-threads"]} <= {*STAGES, "ablations"}
    assert profile["default-resources"]["gpu"] != 0
    without = {rule for rule, asked in resources.items() if asked.get("gpu") == 0}
    assert without == {stage for stage in STAGES if not computes(stage)} | {"ablations"}


def test_dependencies_exist_or_are_made_by_a_stage() -> None:
    stages = resolved_stages()
    outs = [out for stage in stages.values() for out in stage["outs"]]
    assert len(outs) == len(set(outs))
    for name, stage in stages.items():
        for path in stage["deps"]:
            made = any(out == path or out.startswith(f"{path}/") for out in outs)
            assert made or (ROOT / path).exists(), f"{name} depends on {path}"


def test_tracked_parameters_exist() -> None:
    for name, stage in resolved_stages().items():
        for path in stage["params"]:
            value = PARAMS
            for part in path.split("."):
                assert part in value, f"{name} tracks {path}"
                value = value[part]
