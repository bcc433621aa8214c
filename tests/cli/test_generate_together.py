"""`draftdiff generate` under torchrun: processes share the prompts, or one clip."""

import multiprocessing
import os
import socket
from contextlib import ExitStack
from unittest import mock

import imageio
import numpy as np

from draftdiff.cli import main

CALL = ["--frames", "9", "--height", "128", "--width", "128", "--steps", "2", "--min-tokens", "0", "--dense-steps", "0"]
CALL += ["--dense-layers", "0"]  # diffusers has no dense ring attention on a CPU


def process(rank: int, ports: list[int], commands: list[list[str]]) -> None:
    import torch

    from draftdiff.cli import main

    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
    # diffusers counts accelerators to place a process; a CPU has none.
    with mock.patch("torch.accelerator.device_count", return_value=1):
        for port, argv in zip(ports, commands):
            os.environ["MASTER_PORT"] = str(port)
            if code := main(argv):
                os._exit(code)
    os._exit(0)  # gloo's threads need not end well


def run_two(commands: list[list[str]]) -> list[int]:
    """Exit codes of two processes that run the commands one after another: to start them takes longest."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in commands]
        for free in sockets:
            free.bind(("localhost", 0))
        ports = [free.getsockname()[1] for free in sockets]
    start = multiprocessing.get_context("spawn").Process
    processes = [start(target=process, args=(rank, ports, commands)) for rank in range(2)]
    for one in processes:
        one.start()
    for one in processes:
        one.join(300)
    return [one.exitcode for one in processes]


def test_processes_share_the_prompts_or_one_clip(model, tmp_path):
    prompts = ["generate", "--model", model, "--seed", "1", "2", "3", "--prompt", "a", "-o", str(tmp_path / "clips")]
    clip = ["generate", "--model", model, "--prompt", "a red circle", *CALL]
    frames = {name: str(tmp_path / f"{name}-%02d.png") for name in ("alone", "ulysses", "ring")}
    ways = [[*clip, "-o", frames[way], f"--{way}", "2"] for way in ("ulysses", "ring")]
    assert run_two([[*prompts, *CALL], *ways]) == [0, 0]
    assert sorted(file.name for file in (tmp_path / "clips").iterdir()) == sorted(
        f"001-a-{seed}.{ending}" for seed in (1, 2, 3) for ending in ("mp4", "json")
    )
    assert main([*clip, "-o", frames["alone"]]) == 0
    alone, *together = (
        np.stack([imageio.v3.imread(file) for file in sorted(tmp_path.glob(f"{name}-*.png"))]).astype(int)
        for name in frames
    )
    assert len(alone) == 9
    for pictures in together:
        assert np.abs(pictures - alone).max() <= 1  # of 255: rounding
