"""What a model or a run is worth: likelihood, divergence, tasks, samples, size, cost and speed.

May import from core up to training.
"""
