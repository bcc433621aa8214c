"""What the Triton kernels become on GPUs that are not here: registers, spills, tensor loads, products."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from draftdiff.kernels.triton_configs import Config

pytest.importorskip("triton.backends.nvidia", reason="Triton without its NVIDIA compiler")
ROOT = Path(__file__).resolve().parents[2]
SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # what one program may have
TWO_PROGRAMS_KIB = 113  # on Hopper, each with the KiB that the system takes
EVERY = pytest.param("every", marks=pytest.mark.slow, id="every configuration")


@pytest.mark.parametrize("which", [pytest.param("first", id="first configurations"), EVERY])
@pytest.mark.parametrize("capability", SHARED_KIB)
def test_kernels_compile_without_spills_in_loops_and_use_what_the_chip_has(capability, which):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.compile_ahead", str(capability), which]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    kernels = json.loads(done.stdout)
    assert not [kernel for kernel in kernels if "error" in kernel]
    drafting = {"_pool", "_cover", "_threshold", "_compact"}
    probe = {"_values", "_errors", "_worst", "_sample", "_pick", "_mark", "_marked"}
    assert {kernel["kernel"] for kernel in kernels} >= {"forward"} | drafting | probe
    if capability not in (90, 100):
        assert "quantise" in {kernel["kernel"] for kernel in kernels}
        assert "int8" in {kernel.get("precision") for kernel in kernels if kernel["kernel"] == "forward"}
    for kernel in kernels:
        assert kernel["registers"] <= 255, kernel
        assert kernel["shared"] <= SHARED_KIB[capability] << 10, kernel
        # One spills, and its products wait, while another program on the multiprocessor works: the fastest on an H100.
        crowded = str(Config(128, 8, 2, registers=128, masked_stages=2)) == kernel.get("config")
        assert crowded or all(loop["spills"] == 0 for loop in kernel["loops"]), kernel
        if "config" not in kernel:  # the draft and the lists
            assert kernel["spills"] == 0, kernel
            continue
        assert len(kernel["loops"]) >= 2 + kernel["tail"] + kernel["singles"], kernel
        assert (kernel["bulk_tensor_loads"] > 0) == (capability in (90, 100)), kernel
        if capability == 90 and not crowded:  # products that wait for one another leave the tensor cores idle
            assert 0 < kernel["arrivals"] < kernel["products"] / 2 and kernel["drains"] < kernel["products"] / 2, kernel
        if "registers=128" in kernel["config"] and kernel["kernel"] == "forward":
            shared = kernel["shared"] <= TWO_PROGRAMS_KIB << 10
            assert kernel["registers"] <= 128 and shared, f"two do not fit: {kernel}"
