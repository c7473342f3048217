# The pipeline: from a model to results/report.html.
#
# dvc.yaml says what each stage runs, reads and makes; one rule for all of them says how it is
# executed: log, benchmark, retries. profiles/ says what a stage asks of a machine.

import sys
from pathlib import Path

from snakemake.utils import min_version

min_version("9.0")

sys.path.insert(0, str(Path(workflow.basedir) / "workflow"))
import dvc_bridge

if workflow.is_main_process:
    dvc_bridge.check_params()
bridge = dvc_bridge.Bridge(check_staleness=workflow.is_main_process)


report: "workflow/report/workflow.rst"


localrules:
    all,


rule all:
    default_target: True
    input:
        bridge.outputs("report"),


include: "workflow/rules/stages.smk"
