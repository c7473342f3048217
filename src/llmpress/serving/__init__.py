"""Serving: many compressed deltas beside one base, each row of a batch its own; over HTTP too.

May import from core up to export.
"""
