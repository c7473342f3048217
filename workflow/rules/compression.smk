# Compressing weights and deltas, and finetuning what was compressed.


rule compress:
    input:
        bridge.inputs("compress"),
    output:
        directory(bridge.outputs("compress")),
    log:
        "logs/compress/{name}.log",
    benchmark:
        "logs/benchmarks/compress/{name}.tsv"
    wildcard_constraints:
        name=bridge.names("compress"),
    conda:
        "../envs/llmpress.yaml"
    threads: 1
    resources:
        gpu=dvc_bridge.gpus_per_job(),
        mem_mb=6000,
        runtime=240,
    params:
        stage=bridge.stage("compress"),
    shell:
        dvc_bridge.COMMAND


rule compress_delta:
    input:
        bridge.inputs("compress_delta"),
    output:
        directory(bridge.outputs("compress_delta")),
    log:
        "logs/compress_delta/{name}.log",
    benchmark:
        "logs/benchmarks/compress_delta/{name}.tsv"
    wildcard_constraints:
        name=bridge.names("compress_delta"),
    conda:
        "../envs/llmpress.yaml"
    threads: 1
    resources:
        gpu=dvc_bridge.gpus_per_job(),
        mem_mb=6000,
        runtime=240,
    params:
        stage=bridge.stage("compress_delta"),
    shell:
        dvc_bridge.COMMAND


rule finetune:
    input:
        bridge.inputs("finetune"),
    output:
        directory(bridge.outputs("finetune")),
    log:
        "logs/finetune/{name}.log",
    benchmark:
        "logs/benchmarks/finetune/{name}.tsv"
    wildcard_constraints:
        name=bridge.names("finetune"),
    conda:
        "../envs/llmpress.yaml"
    threads: 2
    resources:
        gpu=dvc_bridge.gpus_per_job(),
        mem_mb=6000,
        runtime=480,
    params:
        stage=bridge.stage("finetune"),
    shell:
        dvc_bridge.COMMAND


rule train:
    input:
        bridge.inputs("train"),
    output:
        directory(bridge.outputs("train")),
    log:
        "logs/train/{name}.log",
    benchmark:
        "logs/benchmarks/train/{name}.tsv"
    wildcard_constraints:
        name=bridge.names("train"),
    conda:
        "../envs/llmpress.yaml"
    threads: 2
    resources:
        gpu=dvc_bridge.gpus_per_job(),
        mem_mb=6000,
        runtime=480,
    params:
        stage=bridge.stage("train"),
    shell:
        dvc_bridge.COMMAND
