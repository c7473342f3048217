"""All of params.yaml: its sections as one class, their check and their schema.

May import from core up to evaluation.
"""
