"""The private names of the libraries that draftdiff works inside of: a file a library, each name once."""
