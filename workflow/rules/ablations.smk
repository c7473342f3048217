# What each choice of a method is worth; not part of the default target. Measured rows are kept in
# workflow/ablations/, so that the page is there at once.


rule ablations:
    input:
        "workflow/ablations/{method}.yaml",
        "workflow/ablations/page.html.j2",
        "workflow/scripts/ablations.py",
    output:
        "results/ablations/{method}.html",
    log:
        "logs/ablations/{method}.log",
    conda:
        "../envs/llmpress.yaml"
    shell:
        "python workflow/scripts/ablations.py {wildcards.method} > {log} 2>&1"
