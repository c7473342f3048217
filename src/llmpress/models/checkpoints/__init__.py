"""Checkpoint and delta folders, and views of one as another, tensor by tensor."""
