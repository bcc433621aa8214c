#!/usr/bin/env bash
# A stranger's path: the wheel alone, outside the checkout, from a clip to a comparison and a profile. `make stranger`
# gives the wheel and the folder of packages that the bare environment borrows, so that nothing is downloaded twice.
set -euo pipefail
wheel=$1 packages=$2
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
cd "$here"
export XDG_CACHE_HOME="$here/cache" HF_HUB_OFFLINE=1

"$(dirname "$packages")/../../bin/python" -m venv bare
bare/bin/python -m pip install --quiet --disable-pip-version-check --no-deps "$wheel"
bare/bin/python - "$packages" <<'PY'
"""Borrow every package but draftdiff, of which nothing but the wheel may be seen."""
import site, sys
from pathlib import Path

own, lent = Path(site.getsitepackages()[0]), Path(sys.argv[1])
for path in lent.iterdir():
    if "draftdiff" not in path.name and path.suffix != ".pth" and not (own / path.name).exists():
        (own / path.name).symlink_to(path)
PY
draftdiff() { bare/bin/draftdiff "$@"; }
bare/bin/python - "$here" <<'PY'
import sys, draftdiff
from importlib.metadata import entry_points
assert draftdiff.__file__.startswith(sys.argv[1]), draftdiff.__file__
assert {point.name for point in entry_points(group="sglang.multimodal_gen.plugins")} == {"draftdiff"}
PY

clip=(--prompt "a red circle moves right" --size 64x64 --frames 9 --steps 4 --seed 3)
draftdiff doctor > doctor.txt
draftdiff generate "${clip[@]}" --sparsity 0.5 -o clip.mp4
draftdiff compare "${clip[@]}" --sparsity 0.75 --repeat 1 -o comparison/
draftdiff tune --prompt "a red circle moves right" --steps 3 --target "25 dB" -o tuned.json # of 64x64 there is nothing to tune
draftdiff generate --prompt "a red circle moves right" --steps 3 --profile tuned.json -o tuned.mp4
draftdiff bench report comparison/results.json -o report.html

bare/bin/python - <<'PY'
"""What was made is there and is right."""
import json
from pathlib import Path

import imageio.v3 as iio

for clip in ("clip.mp4", "tuned.mp4"):
    frames = iio.imread(clip)
    assert frames.ndim == 4 and len(frames) > 4 and frames.std() > 5, (clip, frames.shape)
dense, sparse = json.loads(Path("comparison/results.json").read_text())["settings"]
assert (dense["setting"], sparse["psnr"] > 20, 0.2 < sparse["density"] < 0.5) == ("dense", True, True), sparse
assert "<table>" in Path("comparison/report.html").read_text()
profile = json.loads(Path("tuned.json").read_text())
assert "WanTransformer3DModel" in json.dumps(profile) and "<table>" in Path("tuned.html").read_text()
assert "Videos, dense and sparse" in Path("report.html").read_text()
assert "cpu" in Path("doctor.txt").read_text()
print("a stranger came through: clip, comparison, profile, report")
PY
