"""Modules that compute from packed weights: kernels, layers, bit packing.

May import from core.
"""
