"""Direct alignment (arXiv 2403.00858): the draft learns the target's whole distribution on what the target writes.

A draft pretrained on text is distilled, by default with TVD++, on texts of the target mixed with text of the
pretraining. The corpus is the Python standard library; with the embedded target it takes some minutes on one core:

    python samples/llm/direct_alignment.py --loss tvd_pp -o my-draft

The folder is a plain Hugging Face model, for `assistant_model=`, vLLM's `draft_model` and `draftdiff.llm.ModelDrafter`.
"""

from __future__ import annotations

import sys

from recipe import Recipe, arguments

from draftdiff.cli import run
from draftdiff.cli.options import share
from draftdiff.llm import LOSSES, mix_in_text

TEMPERATURES = (0.0, 0.3, 0.7, 1.0)


def main(argv: list[str] | None = None) -> None:
    parser = arguments("direct_alignment", __doc__ or "", "aligned-draft")
    parser.add_argument("--loss", choices=sorted(LOSSES), default="tvd_pp", help="of the alignment (default tvd_pp)")
    parser.add_argument("--plain-share", type=share, default=0.1, help="share of plain text in the mix (default 0.1)")
    recipe = Recipe.begin(parser, argv)
    options = recipe.options
    text = recipe.plain_text()
    if options.draft is None:
        recipe.train("pretrained", text, options.pretrain_steps, "ce", rate=4e-3)
    written = recipe.written(recipe.prompts, TEMPERATURES)
    recipe.train(
        "aligned", mix_in_text(written, text, options.plain_share), options.align_steps, options.loss, rate=1e-3
    )
    recipe.finish()


if __name__ == "__main__":
    sys.exit(run(main, "direct_alignment"))
