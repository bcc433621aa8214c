"""FastDraft (arXiv 2411.11055): a new small draft, pretrained on text and then tuned on what the target writes.

Plain cross-entropy throughout: the target is run to write, never to be compared with. The corpus is the Python standard
library; with the embedded target it takes some minutes on one core:

    python samples/llm/fast_draft.py -o my-draft

The folder is a plain Hugging Face model, for `assistant_model=`, vLLM's `draft_model` and `draftdiff.llm.ModelDrafter`.
"""

from __future__ import annotations

import sys

from recipe import Recipe, arguments

from draftdiff.cli import run
from draftdiff.llm.train.data import TEMPERATURES


def main(argv: list[str] | None = None) -> None:
    recipe = Recipe.begin(arguments("fast_draft", __doc__ or "", "fast-draft"), argv)
    options = recipe.options
    if options.draft is None:
        recipe.train("pretrained", recipe.plain_text(), options.pretrain_steps, "ce", rate=4e-3)
    written = recipe.written(recipe.prompts, TEMPERATURES)
    recipe.train("aligned", written, options.align_steps, "ce", rate=1e-3)
    recipe.finish()


if __name__ == "__main__":
    sys.exit(run(main, "fast_draft"))
