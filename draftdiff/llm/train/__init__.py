"""Training drafts: losses, data that the target wrote, trainer, and drafts with a smaller vocabulary."""
