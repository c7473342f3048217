"""Tasks for lm-eval: their data as JSON lines and the task.yaml that describes them."""
