"""Runs of one model side by side: what is compared is measured, judged, and shown in a table and on a page."""
