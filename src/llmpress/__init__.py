"""Compress large language models and their fine-tuning deltas, and measure what was lost.

Deliberately empty: every stage of the pipeline depends on this file, so whatever stood here would
invalidate all of them. Import the modules you need, for example ``llmpress.hf``.
"""
