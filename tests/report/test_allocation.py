import pandas as pd
import pytest
from report_project import Project

from llmpress.report.allocation import MEASURES, rank_groups_figure, with_allocation
from llmpress.report.charts import layer_charts
from llmpress.report.tables import layers_frame, read_results


def layers_of(project: Project) -> pd.DataFrame:
    results = read_results(project.metrics, project.details, project.params)
    return with_allocation(layers_frame(results))


@pytest.mark.parametrize(
    ("settings", "numbers"),
    [
        ({"num_bits": 3, "group_size": 64}, {"code_bits": 3}),
        (
            {"num_entries": 512, "vector_size": 4, "dtype": "float16"},
            {"code_bits": 2.25, "num_entries": 512, "vector_size": 4},
        ),
        ({"rank": 230, "dtype": "bfloat16"}, {"rank": 230, "rank_share": 39.93055}),
        (
            {"groups": [{"rank": 8, "num_bits": 8}, {"rank": 64, "num_bits": 2}]},
            {"rank": 72, "rank_share": 12.5},
        ),
        ({"num_nonzeros": 33178, "index": "columns"}, {"kept_weights": 100 * 33178 / (576 * 1152)}),
        ({}, {}),
    ],
    ids=["quantized", "codebook", "low rank", "mixed low rank", "sparse", "dense or sign"],
)
def test_numbers_of_a_layer(settings: dict, numbers: dict[str, float]) -> None:
    layers = pd.DataFrame(
        {"settings": [settings], "shape": [[576, 1152]], "bits_per_weight": [16.0]}
    )
    row = with_allocation(layers).iloc[0]
    columns = [measure.column for measure in MEASURES]
    assert {c: row[c] for c in columns if pd.notna(row[c])} == pytest.approx(
        {"bits_per_weight": 16.0, **numbers}, rel=1e-6
    )


def test_ranks_are_stacked_by_their_bits(project: Project) -> None:
    layers = layers_of(project)
    rows = layers[(layers["run"] == "delta-come-1bit") & (layers["module"] == "mlp.up_proj")]
    figure = rank_groups_figure(rows)
    assert [trace["name"] for trace in figure["data"]] == ["8-bit", "2-bit"]
    assert figure["layout"]["barmode"] == "stack"
    assert figure["layout"]["meta"]["alt"] == (
        "Stacked bars of the ranks at 8, 2 bits of 4 layers by decoder block."
    )


def test_only_runs_with_such_a_number_are_offered(project: Project) -> None:
    charts = {c.key: c for c in layer_charts(layers_of(project))["layer_maps"]}
    keys = {key for key in charts["layers-allocation"].variants if key.endswith("|rank")}
    assert keys == {f"{run}|rank" for run in ("svd-20pct", "lillama-20pct", "delta-come-1bit",
                                              "delta-svd")}  # fmt: skip
    runs, numbers = charts["layers-allocation"].choices
    assert runs.options[""][0][0] == "rtn-4bit"
    assert [value for value, _ in numbers.options[""]][:2] == ["bits_per_weight", "rank"]


def test_one_number_for_all_layers_is_said(project: Project) -> None:
    for layer in (details := project.read("details", "gptq-3bit"))["layers"]["layers"]:
        layer["bits_per_weight"] = 3.25
    project.edit("details", "gptq-3bit", lambda d: d.update(details))
    variants = {c.key: c.variants for c in layer_charts(layers_of(project))["layer_maps"]}
    figure = variants["layers-allocation"]["gptq-3bit|bits_per_weight"]
    assert figure["layout"]["meta"]["note"] == "The same in all of these layers: 3.250."
    assert (figure["data"][0]["zmin"], figure["data"][0]["zmax"]) == (2.75, 3.75)


def test_layers_outside_of_the_blocks_do_not_stop_the_charts(project: Project) -> None:
    layers = layers_of(project)
    assert layer_charts(layers.assign(block=-1)) == {"layer_maps": [], "layer_lines": []}
