"""`draftdiff ui`: a local page to try dense and sparse attention on one prompt. Only `page` needs gradio."""
