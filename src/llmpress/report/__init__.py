"""Metrics and details of all runs -> tables, figures and one self-contained HTML file.

May import from core up to planning.
"""
