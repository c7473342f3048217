"""Serving: many compressed deltas beside one base, each row of a batch its own.

May import from core up to export.
"""
