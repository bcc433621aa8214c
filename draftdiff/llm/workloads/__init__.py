"""Workloads that judge lossy decoding: cases with known answers, and a score of what a model writes."""
