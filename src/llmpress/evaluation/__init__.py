"""What a model or a run is worth: likelihood, divergence, tasks, samples, size, cost and speed."""
