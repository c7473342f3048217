import pandas as pd
from report_project import Project

from llmpress.report.allocation import measures, with_allocation
from llmpress.report.charts import layer_charts
from llmpress.report.tables import layers_frame, read_results


def layers_of(project: Project) -> pd.DataFrame:
    return layers_frame(read_results(project.metrics, project.details, project.params))


def test_a_layer_without_a_number_has_none() -> None:
    given = [{"Rank": 72, "Rank at 8 bits": 8.0}, {"Codebook entries K": 512}, None]
    layers = pd.DataFrame({"allocation": given})
    columns = [measure.column for measure in measures(layers)]
    assert columns == ["bits_per_weight", "Rank", "Rank at 8 bits", "Codebook entries K"]
    filled = with_allocation(layers)
    assert filled["Rank"].iloc[0] == 72
    assert filled["Rank"].count() == 1
    assert filled["Codebook entries K"].count() == 1


def test_only_runs_with_such_a_number_are_offered(project: Project) -> None:
    charts = {c.key: c for c in layer_charts(layers_of(project))}
    keys = {key for key in charts["layers-allocation"].variants if key.endswith("|Rank")}
    assert keys == {f"{run}|Rank" for run in ("svd-20pct", "lillama-20pct", "delta-come-1bit",
                                              "delta-svd")}  # fmt: skip
    runs, numbers = charts["layers-allocation"].choices
    assert runs.options[""][0][0] == "rtn-4bit"
    assert next(iter(numbers.options[""]))[0] == "bits_per_weight"


def test_one_number_for_all_layers_is_said(project: Project) -> None:
    for layer in (details := project.read("details", "gptq-3bit"))["layers"]["layers"]:
        layer["bits_per_weight"] = 3.25
    project.edit("details", "gptq-3bit", lambda d: d.update(details))
    variants = {c.key: c.variants for c in layer_charts(layers_of(project))}
    figure = variants["layers-allocation"]["gptq-3bit|bits_per_weight"]
    assert figure["layout"]["meta"]["note"] == "The same in all of these layers: 3.250."
    assert (figure["data"][0]["zmin"], figure["data"][0]["zmax"]) == (2.75, 3.75)


def test_layers_outside_of_the_blocks_do_not_stop_the_charts(project: Project) -> None:
    layers = layers_of(project)
    assert layer_charts(layers.assign(block=-1)) == []
