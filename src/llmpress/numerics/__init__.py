"""Algorithms that several methods share: linear algebra, grids, error feedback.

May import from core up to nn.
"""
