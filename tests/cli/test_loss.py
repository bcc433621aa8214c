"""Whatever happens to the machine, what was there before is there still, and nothing half-written is.

Every command that writes is run as users run it, and killed at moments that chance chooses, or given a full disk.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import imageio_ffmpeg
import pytest
import torch
from PIL import Image

from draftdiff.files import replacing
from draftdiff.pipelines.var import VARPipeline
from draftdiff.var.vq_model import VQModel
from tests.var import tiny

pytestmark = [pytest.mark.slow, pytest.mark.skipif(os.name == "nt", reason="signals and mounts are POSIX's")]
KILLS = 20


def whole_file(path: Path) -> None:
    """Raises for a file that was cut off."""
    if path.suffix == ".mp4":
        assert imageio_ffmpeg.count_frames_and_secs(str(path))[0] > 0
    elif path.suffix == ".png":
        Image.open(path).load()
    elif path.suffix == ".json":
        json.loads(path.read_text())
    elif path.suffix == ".html":
        assert path.read_text().rstrip().endswith("</html>")


def whole(path: Path) -> None:
    for file in [path, *path.rglob("*")]:
        whole_file(file)


def whole_pipeline(path: Path) -> None:
    VARPipeline.from_pretrained(path)


@dataclass(frozen=True)
class Command:
    """A command line, where it writes, and what raises for a result that is not whole. new: it never replaces."""

    line: str
    output: str
    check: Callable[[Path], None] = whole
    new: bool = False
    taken: dict[str, float] = field(default_factory=dict)

    def argv(self, folder: Path, checkpoints: Path) -> list[str]:
        places = {"checkpoints": checkpoints, "output": folder / self.output}
        words = [word.replace("_", " ").format(**places) for word in self.line.split()]
        return [sys.executable, "-m", "draftdiff", *words]


VIDEO = "--prompt a_red_circle --frames 5 --height 32 --width 32 --steps 1 -o {output}"
CLASS = "--class red_circle -o {output}"
TOKENS = "--examples 1 --prompt-tokens 16 --tokens 8 --repeat 1 --method chain -o {output}"
COMMANDS = {
    "generate": Command(f"generate {VIDEO}", "out.mp4"),
    "compare": Command(f"compare --sparsity 0.5 --repeat 1 {VIDEO}", "out"),
    "image": Command(f"image {CLASS}", "out.png"),
    "image --compare": Command(f"image --compare --count 1 --repeat 1 --scale-kv 0.5 {CLASS}", "out"),
    "image calibrate": Command(f"image calibrate {CLASS}", "out.json"),
    "llm compare": Command(f"llm compare {TOKENS}", "out"),
    "convert": Command("convert {checkpoints}/var.pth {checkpoints}/vae.pth {output}", "out", whole_pipeline, new=True),
    "bench": Command("bench llm prefill --tokens 1280 --rounds 1 --device cpu -o {output}", "out"),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    tokens = torch.tensor([side**2 for side in tiny.PATCH_NUMS])
    levels = torch.repeat_interleave(torch.arange(len(tokens)), tokens)
    torch.save({**tiny.to_original(tiny.transformer()), "lvl_1L": levels}, folder / "var.pth")
    vae = VQModel((32, 32), 1, latent_channels=4, num_vq_embeddings=32, patch_nums=tiny.PATCH_NUMS)
    torch.save(tiny.to_original(vae), folder / "vae.pth")
    return folder


@pytest.fixture(params=COMMANDS)
def case(request, checkpoints, tmp_path):
    """A command, a folder with what it made before, and the seconds that took."""
    command = COMMANDS[request.param]
    started = time.perf_counter()
    done = subprocess.run(command.argv(tmp_path, checkpoints), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    command.check(tmp_path / command.output)
    if command.new:
        shutil.rmtree(tmp_path / command.output)
    return command, tmp_path, time.perf_counter() - started


def half_written(folder: Path) -> list[Path]:
    return list(folder.rglob(".draftdiff.*"))


def test_a_killed_command_leaves_what_was_there_or_what_it_made(case, checkpoints):
    command, folder, seconds = case
    target, chance = folder / command.output, random.Random(0)
    for turn in range(KILLS):
        number = chance.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
        running = subprocess.Popen(
            command.argv(folder, checkpoints), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        if turn % 2:
            time.sleep(chance.uniform(0, seconds))
        else:  # while it writes
            while running.poll() is None and not half_written(folder):
                time.sleep(0.001)
            time.sleep(chance.uniform(0, 0.05))
        running.send_signal(number)
        _, err = running.communicate(timeout=120)
        told = f"turn {turn}, {number.name}, exit code {running.returncode}: {err}"
        assert running.returncode in (0, 128 + number, -number) or "KeyboardInterrupt" in err, told
        if target.exists():
            command.check(target)
        assert target.exists() or command.new, told
        if number != signal.SIGKILL:
            assert not half_written(folder), told
        elif half_written(folder):
            time.sleep(1.1)  # younger ones might be another's
            for place in {path.parent for path in half_written(folder)}:
                with replacing(place / "next") as partial:
                    partial.touch()
                (place / "next").unlink()
            assert not half_written(folder), told
        if command.new and target.exists():
            shutil.rmtree(target)


FULL = """
import json, shutil, subprocess, sys
from pathlib import Path
disk, kept, target, *argv = sys.argv[1:]
disk, kept, target = Path(disk), Path(kept), Path(target)
pages = sum(-(-file.stat().st_size // 4096) for file in kept.rglob("*") if file.is_file()) + 8
subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={4 * pages}k", "tmpfs", disk], check=True)
shutil.copytree(kept, disk, dirs_exist_ok=True)
with open(disk / "filling", "wb", buffering=0) as filling:
    try:
        while filling.write(bytes(4096)): pass
    except OSError: pass
def files(): return {str(p.relative_to(disk)): p.stat().st_size for p in disk.rglob("*")}
before = files()
done = subprocess.run(argv, capture_output=True, text=True)
same = all((disk / name).read_bytes() == (kept / name).read_bytes()
           for name in before if (kept / name).is_file())
print(json.dumps({"code": done.returncode, "err": done.stderr, "same": same and files() == before}))
subprocess.run(["umount", disk], check=True)
"""


def test_a_full_disk_is_one_line_and_leaves_what_was_there(case, checkpoints, tmp_path_factory):
    command, kept, _ = case
    disk = tmp_path_factory.mktemp("disk")
    own_mounts = ["unshare", "--mount", "--map-root-user"]
    if not shutil.which("unshare") or subprocess.run([*own_mounts, "true"], check=False).returncode:
        pytest.skip("this system lets nobody mount a disk of one's own")
    argv = command.argv(disk, checkpoints)
    given = [str(disk), str(kept), str(disk / command.output), *argv]
    done = subprocess.run(
        [*own_mounts, sys.executable, "-c", FULL, *given], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["code"] == 1 and result["same"], result
    assert "Traceback" not in result["err"]
    last = result["err"].splitlines()[-1]
    assert last.startswith("draftdiff: error: ") and "No space left on device" in last
