"""Who proposes tokens: one file a kind of drafter."""
