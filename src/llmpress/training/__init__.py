"""End-to-end finetuning: few parameters train on the whole model's loss, on a task or on text.

May import from core up to tuning.
"""
