"""`draftdiff bench`: one runner, a file a routine, one plotter."""
