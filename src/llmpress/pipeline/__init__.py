"""All of params.yaml: one class, its check and its schema; and the stages of dvc.yaml.

May import from core up to evaluation.
"""
