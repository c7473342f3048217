# What is made from the models before any compression: a fine-tuned partner, its delta, statistics.


rule train_task:
    input:
        bridge.inputs("train_task"),
    output:
        directory(bridge.outputs("train_task")),
    log:
        "logs/train_task/{name}.log",
    benchmark:
        "logs/benchmarks/train_task/{name}.tsv"
    wildcard_constraints:
        name=bridge.names("train_task"),
    conda:
        "../envs/llmpress.yaml"
    threads: 2
    resources:
        gpu=dvc_bridge.gpus_per_job(),
        mem_mb=4000,
        runtime=240,
    params:
        stage=bridge.stage("train_task"),
    shell:
        dvc_bridge.COMMAND


rule extract_delta:
    input:
        bridge.inputs("extract_delta"),
    output:
        directory(bridge.outputs("extract_delta")),
    log:
        "logs/extract_delta/{name}.log",
    benchmark:
        "logs/benchmarks/extract_delta/{name}.tsv"
    wildcard_constraints:
        name=bridge.names("extract_delta"),
    conda:
        "../envs/llmpress.yaml"
    threads: 1
    resources:
        mem_mb=4000,
        runtime=60,
    params:
        stage=bridge.stage("extract_delta"),
    shell:
        dvc_bridge.COMMAND


rule calibrate:
    input:
        bridge.inputs("calibrate"),
    output:
        directory(bridge.outputs("calibrate")),
    log:
        "logs/calibrate/{name}.log",
    benchmark:
        "logs/benchmarks/calibrate/{name}.tsv"
    wildcard_constraints:
        name=bridge.names("calibrate"),
    conda:
        "../envs/llmpress.yaml"
    threads: 1
    resources:
        gpu=dvc_bridge.gpus_per_job(),
        mem_mb=6000,
        runtime=60,
    params:
        stage=bridge.stage("calibrate"),
    shell:
        dvc_bridge.COMMAND
