# The pipeline: from a model to results/report.html.
#
# dvc.yaml says what each stage runs, reads and makes; the rules here say how it is executed: log,
# benchmark, threads, resources, retries. profiles/ holds what belongs to one machine.

import sys
from pathlib import Path

from snakemake.utils import min_version, validate

min_version("9.0")


configfile: "params.yaml"


validate(config, "workflow/schemas/params.schema.yaml")

sys.path.insert(0, str(Path(workflow.basedir) / "workflow"))
import dvc_bridge

bridge = dvc_bridge.Bridge(check_staleness=workflow.is_main_process)


report: "workflow/report/workflow.rst"


localrules:
    all,


rule all:
    default_target: True
    input:
        bridge.outputs("report"),


include: "workflow/rules/sources.smk"
include: "workflow/rules/models.smk"
include: "workflow/rules/compression.smk"
include: "workflow/rules/evaluation.smk"
include: "workflow/rules/report.smk"
include: "workflow/rules/ablations.smk"
