"""Dense and sparse runs of one pipeline side by side: run.py measures, metrics.py judges, page.py shows."""
