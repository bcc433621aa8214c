"""Travel planning: plans for some days from long tables, checked by rule (after arXiv 2402.01622 and 2408.06318)."""
