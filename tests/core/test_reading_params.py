"""params.yaml: every mistake is one line that names the key and the nearest known one."""

import re
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
    "text",
    [None, "a: [1\nb: 2", "- 1\n- 2", ""],
    ids=["missing", "broken", "a-list", "empty"],
)
def test_read_params_refuses(tmp_path: Path, text: str | None) -> None:
    file = tmp_path / "params.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=re.escape(str(file))) as caught:
        read_params(file)
    assert "\n" not in str(caught.value)


def test_section_walks_dotted_names() -> None:
    assert section({"runs": {"rtn-4bit": {"bits": 4}}}, "runs.rtn-4bit.bits") == 4


@pytest.mark.parametrize(
    ("dotted", "named"),
    [
        ("runs.rtn-4bt", "runs .*'rtn-4bt'.* 'rtn-4bit'"),
        ("runs.zzz", "runs .*'zzz'.* gptq-3bit, rtn-4bit"),
        ("rusn", r"params\.yaml .*'rusn'.* 'runs'"),
        ("seed.x", r"seed in params\.yaml .*'x'"),
    ],
    ids=["near", "far", "top", "too-deep"],
)
def test_section_names_what_is_missing(dotted: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        section({"seed": 0, "runs": {"rtn-4bit": {}, "gptq-3bit": {}}}, dotted)


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
    ("values", "named"),
    [
        ({"num_bitz": 4}, r"runs\.a .*'num_bitz'.* 'num_bits'"),
        ({"num_bits": 4, "groups": [{"bitz": 1}]}, r"runs\.a\.groups\.0 .*'bitz'"),
        ({"num_bits": 4, "named": {"x": {"rnk": 1}}}, r"runs\.a\.named\.x .*'rnk'.* 'rank'"),
        ({"num_bits": 4, "extra": {"rnk": 1}}, r"runs\.a\.extra .*'rnk'"),
        ({}, r"runs\.a\.num_bits"),
        ({"num_bits": 4.5}, r"runs\.a\.num_bits.*4\.5"),
        ({"num_bits": "four"}, r"runs\.a\.num_bits.*'four'"),
        ({"num_bits": 9}, r"runs\.a.*num_bits.*9"),
        (["num_bits"], r"runs\.a"),
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
def test_build_refuses(values: object, named: str) -> None:
    with pytest.raises(ConfigError, match=named) as caught:
        build(Settings, values, "runs.a")  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("runs: true", "runs .*True"),
        ("models: {a: 3}", r"models\.a .*3"),
        ("evaluation: 3", "evaluation .*3"),
        ("evaluation: {models: {a: 1}}", r"evaluation\.models"),
    ],
)
def test_sections_of_another_form_are_refused(content: str, named: str, tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text(content)
    with pytest.raises(ConfigError, match=named):
        read_params(tmp_path / "params.yaml")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("runs:\n  a: {method: rtn}\n  a: {method: svd}\n", "'a' .* line 3"),
        ("runs: {}\nruns: {}\n", "'runs' .* line 2"),
        ("runs: {a: {settings: {bits: 1, bits: 2}}}\n", "'bits' .* line 1"),
    ],
    ids=["a-run", "a-section", "a-setting"],
)
def test_a_name_that_stands_twice_is_refused(tmp_path: Path, text: str, named: str) -> None:
    (tmp_path / "params.yaml").write_text(text)
    with pytest.raises(ConfigError, match=named):
        read_params(tmp_path / "params.yaml")
