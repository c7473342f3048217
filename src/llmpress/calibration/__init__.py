"""Calibrate: what text tells of the inputs and outputs of linear layers.

May import from core up to models.
"""
