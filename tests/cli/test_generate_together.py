"""`draftdiff generate` under torchrun: processes share the prompts, or one clip."""

import multiprocessing
import os
import socket
from unittest import mock

import imageio
import numpy as np
import pytest

from draftdiff.cli import main

CALL = ["--frames", "9", "--height", "128", "--width", "128", "--steps", "2", "--min-tokens", "0", "--dense-steps", "0"]
CALL += ["--dense-layers", "0"]  # diffusers has no dense ring attention on a CPU


def process(rank: int, port: int, argv: list[str]) -> None:
    import torch

    from draftdiff.cli import main

    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    # diffusers counts accelerators to place a process; a CPU has none.
    with mock.patch("torch.accelerator.device_count", return_value=1):
        code = main(argv)
    os._exit(code)  # gloo's threads need not end well


def run_two(argv: list[str]) -> list[int]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    start = multiprocessing.get_context("spawn").Process
    processes = [start(target=process, args=(rank, port, argv)) for rank in range(2)]
    for one in processes:
        one.start()
    for one in processes:
        one.join(200)
    return [one.exitcode for one in processes]


def test_processes_share_the_prompts(model, tmp_path):
    argv = ["generate", "--model", model, "--seed", "1", "2", "3", "--prompt", "a", "-o", str(tmp_path / "clips")]
    assert run_two([*argv, *CALL]) == [0, 0]
    assert sorted(file.name for file in (tmp_path / "clips").iterdir()) == sorted(
        f"001-a-{seed}.{ending}" for seed in (1, 2, 3) for ending in ("mp4", "json")
    )


@pytest.mark.parametrize("way", ["--ulysses", "--ring"])
def test_processes_share_one_clip(model, tmp_path, way):
    alone, together = tmp_path / "alone.png", tmp_path / "together.png"
    argv = ["generate", "--model", model, "--prompt", "a red circle", *CALL]
    frames = [str(path.with_name(f"{path.stem}-%02d.png")) for path in (alone, together)]
    assert main([*argv, "-o", frames[0]]) == 0
    assert run_two([*argv, "-o", frames[1], way, "2"]) == [0, 0]
    pictures = [
        np.stack([imageio.v3.imread(file) for file in sorted(tmp_path.glob(f"{name}-*.png"))]).astype(int)
        for name in ("alone", "together")
    ]
    assert len(pictures[0]) == 9
    assert np.abs(pictures[0] - pictures[1]).max() <= 1  # of 255: rounding
