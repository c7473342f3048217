"""What everything else stands on: errors, params.yaml, devices, artifacts, resuming.

Imports no other package of llmpress.
"""
