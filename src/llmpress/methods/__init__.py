"""Compression methods, a package each; its name is the method's name in params.yaml.

May import from core up to numerics.
"""
