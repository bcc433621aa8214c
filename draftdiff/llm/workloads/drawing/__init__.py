"""Drawing revision: instructions for engineering drawings answered by tool calls (after arXiv 2507.11527)."""
