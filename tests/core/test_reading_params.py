"""params.yaml: every mistake is one line that names the key and the nearest known one."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from llmpress.core.errors import ConfigError
from llmpress.core.params import build, read_params, section


@dataclass(frozen=True)
class Group:
    bits: int
    rank: int = 8


@dataclass(frozen=True)
class Settings:
    num_bits: int
    learning_rate: float = 1e-3
    groups: tuple[Group, ...] = ()
    named: dict[str, Group] = field(default_factory=dict)
    extra: Group | None = None

    def __post_init__(self) -> None:
        if self.num_bits > 8:
            raise ValueError(f"num_bits must be at most 8, got {self.num_bits}")


def test_read_params_returns_the_mapping(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text("seed: 3\nruns:\n  a: {method: rtn}\n")
    assert read_params(tmp_path / "params.yaml") == {"seed": 3, "runs": {"a": {"method": "rtn"}}}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "does not exist: run from the project's root"),
        ("a: [1\nb: 2", "is not valid YAML"),
        ("- 1\n- 2", "must be a mapping of sections, not list"),
        ("", "must be a mapping of sections, not NoneType"),
    ],
    ids=["missing", "broken", "a-list", "empty"],
)
def test_read_params_refuses(tmp_path: Path, text: str | None, says: str) -> None:
    file = tmp_path / "params.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=says) as caught:
        read_params(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_section_walks_dotted_names() -> None:
    assert section({"runs": {"rtn-4bit": {"bits": 4}}}, "runs.rtn-4bit.bits") == 4


@pytest.mark.parametrize(
    ("dotted", "says"),
    [
        ("runs.rtn-4bt", "runs has no 'rtn-4bt': did you mean 'rtn-4bit'?"),
        ("runs.zzz", "runs has no 'zzz': known are gptq-3bit, rtn-4bit"),
        ("rusn", "params.yaml has no 'rusn': did you mean 'runs'?"),
        ("seed.x", "seed in params.yaml is a plain value, it has no 'x'"),
    ],
    ids=["near", "far", "top", "too-deep"],
)
def test_section_names_what_is_missing(dotted: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        section({"seed": 0, "runs": {"rtn-4bit": {}, "gptq-3bit": {}}}, dotted)
    assert str(caught.value) == says


def test_build_converts_and_nests() -> None:
    values = {
        "num_bits": 4,
        "learning_rate": "1e-4",  # what YAML 1.1 makes of a number without a dot
        "groups": [{"bits": 8}, {"bits": 2, "rank": 3}],
        "named": {"a": {"bits": 1}},
    }
    expected = Settings(4, 1e-4, (Group(8), Group(2, 3)), {"a": Group(1)})
    assert build(Settings, values, "runs.a.settings") == expected


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"num_bitz": 4}, "runs.a has no setting 'num_bitz': did you mean 'num_bits'?"),
        ({"num_bits": 4, "groups": [{"bitz": 1}]}, "runs.a.groups.0 has no setting 'bitz'"),
        ({"num_bits": 4, "named": {"x": {"rnk": 1}}}, "no setting 'rnk': did you mean 'rank'?"),
        ({"num_bits": 4, "extra": {"rnk": 1}}, "runs.a.extra has no setting 'rnk'"),
        ({}, "runs.a.num_bits is missing"),
        ({"num_bits": 4.5}, "runs.a.num_bits: .*integer.*got 4.5"),
        ({"num_bits": "four"}, "runs.a.num_bits: .*integer.*got 'four'"),
        ({"num_bits": 9}, "runs.a: num_bits must be at most 8, got 9"),
        (["num_bits"], "runs.a must be a mapping of settings"),
    ],
    ids=[
        "unknown",
        "nested",
        "in-mapping",
        "optional",
        "missing",
        "fraction",
        "word",
        "refused",
        "list",
    ],
)
def test_build_refuses(values: object, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        build(Settings, values, "runs.a")  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("runs: true", "runs in params.yaml must map names to settings, not True"),
        ("models: {a: 3}", "models.a must be a mapping of settings, not 3"),
        ("evaluation: 3", "evaluation.models in params.yaml must be a list of names"),
        ("evaluation: {models: {a: 1}}", "must be a list of names"),
    ],
)
def test_sections_of_another_form_are_refused(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text(content)
    with pytest.raises(ConfigError, match=message):
        read_params(tmp_path / "params.yaml")
