"""params.yaml, its schema, dvc.yaml and the rules say the same of the pipeline."""

import copy
import dataclasses
import re
import shutil
import sys
from inspect import signature
from operator import attrgetter
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from dvc.repo import Repo
from toy_project import Project

import llmpress
from llmpress.core.errors import ConfigError
from llmpress.core.kinds import KINDS, SECTIONS_OF_FOLDER, Kind
from llmpress.core.params import SECTIONS, read_params
from llmpress.evaluation.settings import EvaluationSettings
from llmpress.evaluation.stage import SIZES
from llmpress.methods.registry import known_methods
from llmpress.pipeline.params import Params, check_params
from llmpress.pipeline.schema import params_schema

ROOT = Path(__file__).parents[2]
SCHEMA = yaml.safe_load((ROOT / "workflow/schemas/params.schema.yaml").read_text(encoding="utf-8"))
DEFAULT = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
PARAMS = yaml.safe_load((ROOT / "examples/all-methods.yaml").read_text(encoding="utf-8"))
STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
OURS = {"PYTHONPATH": "src"}  # the code beside dvc.yaml, not what is installed
MISTAKES = {  # what is changed, and where the line says it is
    "unknown-section": ("trainigs", {}, "'trainigs': did you mean 'trainings'"),
    "missing-section": ("corpora", ..., "corpora"),
    "empty-section": ("trainings", None, "trainings"),
    "list-of-entries": ("runs", [1], "runs"),
    "seed-below-0": ("seed", -1, "seed"),
    "seed-true": ("seed", True, "seed"),
    "unknown-key": ("runs.rtn-3bit.metod", "rtn", "runs.rtn-3bit .*'method'"),
    "missing-key": ("runs.rtn-3bit.method", ..., "runs.rtn-3bit.method"),
    "unknown-method": ("runs.rtn-3bit.method", "rnt", "runs.rtn-3bit.method.*'rnt'.*'rtn'"),
    "unknown-setting": ("runs.rtn-3bit.settings.bitz", 3, "runs.rtn-3bit.settings .*'bitz'"),
    "word-for-a-number": ("runs.rtn-3bit.settings.num_bits", "x", "settings.num_bits.*'x'"),
    "refused-setting": ("runs.rtn-3bit.settings.num_bits", 99, "rtn-3bit.settings.*num_bits.*99"),
    "fraction": ("finetunes.lillama-80-tuned.settings.epochs", 1.5, "settings.epochs.*1.5"),
    "name": ("runs.With Space", {"model": "smollm2", "method": "rtn"}, "runs.*'With Space'"),
    "model": ("runs.rtn-3bit.model", "smollm", "runs.rtn-3bit.model.*'smollm'.*'smollm2'"),
    "folder": ("deltas.smollm2-calls.base", "smollm2", "deltas.smollm2-calls.base.*'smollm2'"),
    "no-such-folder": ("deltas.smollm2-calls.base", "models/x", "deltas.smollm2-calls.base.*'x'"),
    "too-few": ("evaluation.windows", 0, "evaluation.windows.*0"),
    "not-one-of": ("evaluation.dtype", "float16", "evaluation.dtype.*'float32'.*'float16'"),
    "no-such-task": ("evaluation.tasks.arc", 8, "evaluation.tasks.*'arc'"),
    "no-such-own-task": ("evaluation.own_tasks.smollm2.arc", 8, "own_tasks.*'arc'"),
    "original-not-evaluated": ("evaluation.models", ["smollm2-calls"], "smollm2"),
    "no-such-run-to-time": ("speed.runs", ["rtn-3bits"], "speed.runs.*'rtn-3bits'.*'rtn-3bit'"),
    "text-for-a-list": ("evaluation.models", "smollm2", "evaluation.models"),
    "two-sources": ("models.smollm2.path", "x", "models.smollm2.*package, path"),
    "not-pinned": ("models.smollm2.package", "x", "models.smollm2.package.*'x'"),
    "no-source": ("corpora.code.path", "x", "corpora.code.*path"),
    "another-method": (
        "finetunes.lillama-80-tuned.method",
        "svd",
        "lillama-80-tuned.method.*'svd'",
    ),
    "another-base": ("delta_runs.delta-come.base", "compressed/rtn-3bit", "delta-come.base"),
    "two-texts": ("trainings.lora-arithmetic.corpora", ["code"], "trainings.lora-arithmetic"),
    "start": ("trainings.lora-arithmetic.start", "compressed/rtn-3bit", "lora-arithmetic.start"),
    "name-twice": ("runs.delta-come", {"model": "smollm2", "method": "rtn"}, "'delta-come'"),
}
# What may be left out, and what goes with it: nothing names what stood there.
NEEDED_BY = {
    "tasks": ("finetuned_models", "deltas", "delta_runs", "trainings", "evaluation.own_tasks"),
    "finetuned_models": ("deltas", "delta_runs", "trainings", "evaluation.own_tasks"),
    "deltas": ("delta_runs", "trainings"),
    "calibrations": ("runs", "finetunes", "trainings", "deltas", "delta_runs", "peers", "speed"),
    "runs": ("finetunes", "trainings", "deltas", "delta_runs", "speed"),
    "delta_runs": ("trainings",),
    "finetunes": (),
    "trainings": (),
    "peers": (),
    "speed": (),
    "evaluation.own_tasks": (),
}
ABSENT = {name: (name, *others) for name, others in NEEDED_BY.items()} | {"all": (*NEEDED_BY,)}


def changed(place: str, value: Any) -> dict[str, Any]:
    """Return params.yaml with one value replaced, or removed for an ellipsis."""
    params = copy.deepcopy(PARAMS)
    *parents, last = place.split(".")
    container = params
    for key in parents:
        container = container.setdefault(key, {})
    container[last] = value
    if value is ...:
        del container[last]
    return params


def without(name: str) -> dict[str, Any]:
    """Return params.yaml without what may be left out: one place and what needs it, or all."""
    params = copy.deepcopy(PARAMS)
    if name in ("tasks", "finetuned_models", "calibrations", "all"):
        params["calibrations"] = {"smollm2": params["calibrations"]["smollm2"]}
        params["evaluation"] |= {"models": ["smollm2"], "tasks": {}}
    for place in ABSENT[name]:
        parent, _, last = place.rpartition(".")
        del (params[parent] if parent else params)[last]
    return params


def refusals(params: Any) -> list[str]:
    """Return what the schema says against some params."""
    found = jsonschema.Draft202012Validator(SCHEMA).iter_errors(params)
    return [f"{error.json_path}: {error.message}" for error in found]


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
                    (
                        "params",
                        [text for text in template.get("params", ()) if isinstance(text, str)],
                    ),
                    ("outs", outs),
                )
            }
    return found


@pytest.mark.parametrize("params", [DEFAULT, PARAMS], ids=["default", "example"])
def test_params_are_valid(params: dict[str, Any]) -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert refusals(params) == []
    assert check_params(params).runs["rtn-3bit"].method == "rtn"


def test_the_default_runs_every_method() -> None:
    sections = ("runs", "delta_runs")
    used = {entry["method"] for section in sections for entry in DEFAULT[section].values()}
    assert used == set(known_methods())
    assert DEFAULT["finetunes"]


def test_the_schema_is_that_of_the_classes() -> None:
    assert params_schema() == SCHEMA
    assert tuple(SECTIONS) == (*sorted(SCHEMA["properties"], key=SECTIONS.index),)
    assert {field.name for field in dataclasses.fields(Params)} == set(SECTIONS)


def test_the_schema_knows_keys_values_and_settings_of_methods() -> None:
    for name in ("unknown-section", "unknown-key", "missing-key", "unknown-method", "name"):
        assert refusals(changed(*MISTAKES[name][:2])), name
    for name in ("unknown-setting", "word-for-a-number", "too-few", "not-one-of", "not-pinned"):
        assert refusals(changed(*MISTAKES[name][:2])), name


def test_every_key_is_described() -> None:
    for name, definition in {**SCHEMA["$defs"], "params": SCHEMA}.items():
        assert definition["additionalProperties"] is False, name
        for key, child in definition.get("properties", {}).items():
            assert child.get("description"), f"{name}.{key}"


@pytest.mark.parametrize(("place", "value", "says"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line_that_names_the_key(
    place: str, value: Any, says: str, tmp_path: Path
) -> None:
    file = tmp_path / "params.yaml"
    file.write_text(yaml.safe_dump(changed(place, value)), encoding="utf-8")
    with pytest.raises(ConfigError, match=says) as caught:
        check_params(read_params(file))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("name", ABSENT)
def test_what_may_be_empty_may_be_absent(name: str) -> None:
    params = without(name)
    assert refusals(params) == []
    checked = check_params(params)
    assert all(not attrgetter(place)(checked) for place in ABSENT[name] if place != "speed")
    assert "speed" in params or not checked.speed.runs


@pytest.mark.parametrize("place", NEEDED_BY)
def test_null_for_what_may_be_absent_is_one_line(place: str, tmp_path: Path) -> None:
    file = tmp_path / "params.yaml"
    file.write_text(yaml.safe_dump(changed(place, None)), encoding="utf-8")
    with pytest.raises(ConfigError, match=f"^{place}[^\n]*None[^\n]*$"):
        check_params(read_params(file))


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The pipeline's definition in a folder of its own, with the code but without data."""
    folder = tmp_path_factory.mktemp("pipeline") / "project"
    names = ("workflow", "src", "profiles", "Snakefile", "dvc.yaml", ".dvcignore", ".dvc/config")
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        copy_ = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy_(ROOT / name, folder / name)
    project = Project(folder)
    project.run("git", "init", "--quiet", "--initial-branch=main")
    return project


def write_params(project: Project, params: Any) -> None:
    """Write a project's params.yaml."""
    text = yaml.safe_dump(params, sort_keys=False)
    (project.folder / "params.yaml").write_text(text, encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("name", ABSENT)
def test_both_engines_do_without(checkout: Project, name: str) -> None:
    params = without(name)
    write_params(checkout, params)
    (checkout.folder / "data/tasks").mkdir(parents=True, exist_ok=True)
    planned = checkout.snakemake("-n", "results/report.html", **OURS)
    jobs = {line.split()[0] for line in planned.splitlines() if re.match(r"\w+ +\d+$", line)}
    stages = checkout.dvc("stage", "list", "--name-only").split()
    expected = {"fetch_model", "evaluate_model", "speed", "report"}
    for group, definition in STAGES.items():
        section = definition.get("foreach", "").strip("${}")
        expected |= {group} if section in params or "." in section else set()
    assert {stage.partition("@")[0] for stage in stages} == expected
    assert (
        {"evaluate_model", "speed", "report"} <= jobs <= {*expected, "all", "total", "fetch_corpus"}
    )
    assert "fetch_model.py" in checkout.dvc("repro", "--dry", "fetch_model@smollm2")


@pytest.mark.parametrize(
    ("place", "value", "group"),
    [
        ("evaluation.own_tasks", {"smollm2-calls": {"calls": 7}}, "evaluate"),
        ("speed.rounds", 7, "speed"),
    ],
)
def test_what_dvc_cannot_track_as_a_parameter_is_told_by_the_command(
    place: str, value: Any, group: str, checkout: Project
) -> None:
    commands = []
    for params in (PARAMS, changed(place, value), without(place.removesuffix(".rounds"))):
        write_params(checkout, params)
        stages = Repo(str(checkout.folder)).index.stages
        commands.append({stage.name: stage.cmd for stage in stages})
    for name, command in commands[0].items():
        told = name.startswith(group)
        assert told == (command != commands[1][name]) == (command != commands[2][name])
        assert commands[2][name].endswith("# ") or not told


@pytest.mark.slow
def test_both_engines_say_a_mistake_in_one_line(checkout: Project) -> None:
    write_params(checkout, changed("corpora.code.fields", "text"))
    says = "corpora.code has no setting 'fields': did you mean 'field'?"
    printed = checkout.snakemake("-n", status=1, **OURS).splitlines()
    assert says in printed
    assert len(printed) < 8, printed
    printed = checkout.dvc("repro", "fetch_corpus@code", status=255, **OURS).splitlines()
    assert f"error: {says}" in printed
    printed = checkout.run(
        sys.executable, "workflow/scripts/fetch_corpus.py", "code", status=1, **OURS
    ).splitlines()
    assert printed == [f"error: {says}"]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_the_table_of_kinds_is_what_the_stages_do(kind: Kind) -> None:
    out, evaluated = f"data/{kind.folder}/${{key}}", STAGES[kind.evaluated_by]
    made = [s for s in STAGES.values() if "do" in s and s["do"]["outs"] == [out]]
    assert evaluated["foreach"] == f"${{{kind.section}}}"
    assert (
        f"data/{kind.folder}/${{{'key' if kind.original else 'item'}}}" in evaluated["do"]["deps"]
    )
    if kind.original:
        assert evaluated["foreach"] in [stage["foreach"] for stage in made]
        assert evaluated["foreach"].strip("${}") in SECTIONS_OF_FOLDER[kind.folder]
        assert all(kind.original in entry for entry in PARAMS[kind.section].values())
    assert kind.name in SIZES


@pytest.mark.parametrize("group", [name for name in STAGES if name.startswith("evaluate")])
def test_evaluations_depend_on_all_settings_but_the_list_of_models(group: str) -> None:
    def followed(stage: dict[str, Any]) -> set[str]:
        named = {*re.findall(r"\${evaluation\.(\w+)}", stage["cmd"])}
        return named | {p.partition(".")[2] for p in stage["params"]}

    tracked, known = followed(STAGES[group]["do"]), followed(STAGES["reference"]["do"])
    assert tracked | known == {field.name for field in dataclasses.fields(EvaluationSettings)}
    assert tracked & known == {"dtype"}


def computes(stage: str) -> bool:
    """Tell whether a stage's script calls something that is told a device."""
    command = STAGES[stage].get("do", STAGES[stage])["cmd"]
    script = (ROOT / command.split()[1]).read_text(encoding="utf-8")
    called = re.findall(r"\b(\w+)\(", script)
    public = [getattr(llmpress, name) for name in called if name in llmpress.__all__]
    return "pick_device" in called or any("device" in signature(f).parameters for f in public)


@pytest.mark.parametrize("name", ["default", "slurm"])
def test_profiles_give_a_gpu_to_the_stages_that_compute(name: str) -> None:
    profile = yaml.safe_load((ROOT / f"profiles/{name}/config.yaml").read_text(encoding="utf-8"))
    resources = profile["set-resources"]
    assert {*resources, *profile["set-threads"]} <= {*STAGES}
    assert profile["default-resources"]["gpu"] != 0
    without = {rule for rule, asked in resources.items() if asked.get("gpu") == 0}
    assert without == {stage for stage in STAGES if not computes(stage)}


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
