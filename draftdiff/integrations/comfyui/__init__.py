"""Draft attention as nodes of ComfyUI. Nothing here needs ComfyUI to be imported."""
