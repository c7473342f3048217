# What comes from outside: models, text, tasks. Only these stages are tried again when they fail.


rule fetch_model:
    input:
        bridge.inputs("fetch_model"),
    output:
        directory(bridge.outputs("fetch_model")),
    log:
        "logs/fetch_model/{name}.log",
    benchmark:
        "logs/benchmarks/fetch_model/{name}.tsv"
    wildcard_constraints:
        name=bridge.names("fetch_model"),
    retries: 2
    conda:
        "../envs/llmpress.yaml"
    threads: 1
    resources:
        mem_mb=4000,
        runtime=60,
    params:
        stage=bridge.stage("fetch_model"),
    shell:
        dvc_bridge.COMMAND


rule fetch_corpus:
    input:
        bridge.inputs("fetch_corpus"),
    output:
        directory(bridge.outputs("fetch_corpus")),
    log:
        "logs/fetch_corpus/{name}.log",
    benchmark:
        "logs/benchmarks/fetch_corpus/{name}.tsv"
    wildcard_constraints:
        name=bridge.names("fetch_corpus"),
    retries: 2
    conda:
        "../envs/llmpress.yaml"
    threads: 1
    resources:
        mem_mb=4000,
        runtime=60,
    params:
        stage=bridge.stage("fetch_corpus"),
    shell:
        dvc_bridge.COMMAND


rule fetch_task:
    input:
        bridge.inputs("fetch_task"),
    output:
        directory(bridge.outputs("fetch_task")),
    log:
        "logs/fetch_task/{name}.log",
    benchmark:
        "logs/benchmarks/fetch_task/{name}.tsv"
    wildcard_constraints:
        name=bridge.names("fetch_task"),
    retries: 2
    conda:
        "../envs/llmpress.yaml"
    threads: 1
    resources:
        mem_mb=4000,
        runtime=60,
    params:
        stage=bridge.stage("fetch_task"),
    shell:
        dvc_bridge.COMMAND
