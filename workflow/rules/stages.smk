# Every stage of dvc.yaml is a rule. What it asks of a machine (threads, memory, time, GPUs) is in profiles/.


def flagged(path):
    """Tell Snakemake what an output is: a folder, a page or table of its own report, or a file."""
    if path.endswith((".html", ".csv")):
        return report(path, caption="../report/report.rst", category="Results")
    return path if Path(path).suffix else directory(path)


for group in bridge.groups:

    rule:
        name:
            group
        input:
            bridge.inputs(group),
        output:
            [flagged(path) for path in bridge.outputs(group)],
        log:
            f"logs/{bridge.label(group)}.log",
        benchmark:
            f"logs/benchmarks/{bridge.label(group)}.tsv"
        wildcard_constraints:
            name=bridge.names(group),
        # what comes from outside is tried again
        retries: 2 * group.startswith("fetch_")
        conda:
            "../envs/llmpress.yaml"
        params:
            stage=bridge.stage(group),
        shell:
            dvc_bridge.COMMAND
