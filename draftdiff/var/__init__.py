"""Next-scale image models (VAR, Infinity), collaborative decoding (CoDe) and scale-aware cache budgets (ScaleKV)."""
