"""Other programs that draft attention runs in, a folder each; none needs another's."""
