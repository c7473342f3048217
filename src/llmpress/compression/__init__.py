"""Compress: every linear layer of a model by one method, with a record of each.

May import from core up to calibration.
"""
