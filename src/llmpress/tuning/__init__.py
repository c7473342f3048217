"""Tune: finetune a compressed model block by block, against the original's outputs.

May import from core up to deltas.
"""
