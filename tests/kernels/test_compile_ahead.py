"""What the Triton kernels become on GPUs that are not here: registers, spills, tensor loads, products."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton.backends.nvidia", reason="Triton without its NVIDIA compiler")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module", params=[80, 90, 100])
def compiled(request):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.compile_ahead", str(request.param)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return request.param, json.loads(done.stdout)


def test_kernels_compile_without_spills_and_use_what_the_chip_has(compiled):
    capability, kernels = compiled
    errors = [kernel for kernel in kernels if "error" in kernel]
    # Warp specialisation is a pass of the compiler that comes and goes; every other configuration must compile.
    assert all("specialised=None" not in kernel["config"] for kernel in errors), errors
    built = [kernel for kernel in kernels if "error" not in kernel]
    drafting = {"_pool", "_cover", "_threshold", "_compact"}
    probe = {"_values", "_errors", "_worst", "_sample", "_collect", "_pick"}
    assert {kernel["kernel"] for kernel in built} >= {"forward"} | drafting | probe
    for kernel in built:
        assert kernel["spill_stores"] == 0 and kernel["stack"] == 0, kernel
        assert kernel["registers"] <= 255, kernel
        if "registers=128" in kernel.get("config", "") and kernel["kernel"] == "forward":
            assert kernel["registers"] <= 128 and kernel["shared_kib"] <= 113, f"two do not fit: {kernel}"
        if kernel["kernel"] in ("forward", "whole_tiles"):
            products = {80: "ampere_products", 90: "hopper_products", 100: "blackwell_products"}[capability]
            assert kernel[products] > 0, kernel
            assert (kernel["bulk_tensor_loads"] > 0) == (capability >= 90), kernel
            assert kernel["shared_kib"] <= (163 if capability == 80 else 227), kernel
        if kernel["kernel"] == "whole_tiles":
            assert kernel["register_handovers"] > 0, f"not specialised: {kernel}"
