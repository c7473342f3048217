# The one page that shows all results.


rule report:
    input:
        bridge.inputs("report"),
    output:
        report(
            bridge.outputs("report"),
            caption="../report/report.rst",
            category="Results",
        ),
    log:
        "logs/report.log",
    benchmark:
        "logs/benchmarks/report.tsv"
    conda:
        "../envs/llmpress.yaml"
    threads: 1
    resources:
        mem_mb=4000,
        runtime=60,
    params:
        stage=bridge.stage("report"),
    shell:
        dvc_bridge.COMMAND
