"""Draws the pictures of docs/ideas: all of them, or those that are named. `python samples/figures/ideas.py tail code`

What they show is computed from the embedded models, or read from samples/results where a caption says so.
"""

from __future__ import annotations

import argparse
import sys

import ideas_pictures
import ideas_text
import ideas_video
from ideas_style import save
from tqdm import tqdm

from draftdiff.cli import run

PICTURES = ideas_video.PICTURES | ideas_pictures.PICTURES | ideas_text.PICTURES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", choices=[*PICTURES, []], metavar="NAME", help=", ".join(PICTURES))
    names = parser.parse_args().names or list(PICTURES)
    for name in (bar := tqdm(names, unit="picture")):
        bar.set_postfix_str(name)
        path = save(name, PICTURES[name]())
        tqdm.write(f"{path}: {path.stat().st_size / 1e3:.0f} KB")


if __name__ == "__main__":
    sys.exit(run(main, "ideas"))
