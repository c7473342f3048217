"""Text and tasks, and the sources that these and models are fetched from.

May import from core up to methods.
"""
