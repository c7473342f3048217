# Measuring every model and every compressed one the same way.


rule evaluate_model:
    input:
        bridge.inputs("evaluate_model"),
    output:
        bridge.outputs("evaluate_model"),
    log:
        "logs/evaluate_model/{name}.log",
    benchmark:
        "logs/benchmarks/evaluate_model/{name}.tsv"
    wildcard_constraints:
        name=bridge.names("evaluate_model"),
    conda:
        "../envs/llmpress.yaml"
    threads: 1
    resources:
        gpu=dvc_bridge.gpus_per_job(),
        mem_mb=6000,
        runtime=240,
    params:
        stage=bridge.stage("evaluate_model"),
    shell:
        dvc_bridge.COMMAND


rule evaluate:
    input:
        bridge.inputs("evaluate"),
    output:
        bridge.outputs("evaluate"),
    log:
        "logs/evaluate/{name}.log",
    benchmark:
        "logs/benchmarks/evaluate/{name}.tsv"
    wildcard_constraints:
        name=bridge.names("evaluate"),
    conda:
        "../envs/llmpress.yaml"
    threads: 1
    resources:
        gpu=dvc_bridge.gpus_per_job(),
        mem_mb=6000,
        runtime=240,
    params:
        stage=bridge.stage("evaluate"),
    shell:
        dvc_bridge.COMMAND


rule evaluate_delta:
    input:
        bridge.inputs("evaluate_delta"),
    output:
        bridge.outputs("evaluate_delta"),
    log:
        "logs/evaluate_delta/{name}.log",
    benchmark:
        "logs/benchmarks/evaluate_delta/{name}.tsv"
    wildcard_constraints:
        name=bridge.names("evaluate_delta"),
    conda:
        "../envs/llmpress.yaml"
    threads: 1
    resources:
        gpu=dvc_bridge.gpus_per_job(),
        mem_mb=6000,
        runtime=240,
    params:
        stage=bridge.stage("evaluate_delta"),
    shell:
        dvc_bridge.COMMAND


rule evaluate_finetuned:
    input:
        bridge.inputs("evaluate_finetuned"),
    output:
        bridge.outputs("evaluate_finetuned"),
    log:
        "logs/evaluate_finetuned/{name}.log",
    benchmark:
        "logs/benchmarks/evaluate_finetuned/{name}.tsv"
    wildcard_constraints:
        name=bridge.names("evaluate_finetuned"),
    conda:
        "../envs/llmpress.yaml"
    threads: 1
    resources:
        gpu=dvc_bridge.gpus_per_job(),
        mem_mb=6000,
        runtime=240,
    params:
        stage=bridge.stage("evaluate_finetuned"),
    shell:
        dvc_bridge.COMMAND


rule evaluate_trained:
    input:
        bridge.inputs("evaluate_trained"),
    output:
        bridge.outputs("evaluate_trained"),
    log:
        "logs/evaluate_trained/{name}.log",
    benchmark:
        "logs/benchmarks/evaluate_trained/{name}.tsv"
    wildcard_constraints:
        name=bridge.names("evaluate_trained"),
    conda:
        "../envs/llmpress.yaml"
    threads: 1
    resources:
        gpu=dvc_bridge.gpus_per_job(),
        mem_mb=6000,
        runtime=240,
    params:
        stage=bridge.stage("evaluate_trained"),
    shell:
        dvc_bridge.COMMAND
