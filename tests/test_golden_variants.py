"""The golden harness takes every case of its format: variants with other parameters and fewer results, written by our
own code, pass; with one number changed they do not."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from draftdiff.var.cache import KVCache
from draftdiff.var.scale_kv import window
from tests import golden_cases
from tests.golden_cases import Case
from tests.golden_infinity import check_infinity, infinity_results
from tests.golden_scale_kv import check_scale_kv, generate, scale_kv_results
from tests.golden_var import check_code, check_var, code_results, var_results

GOLDEN = Path(__file__).parent / "golden"
PICTURES = ("image_down4", "image_crop", "image_mean_std")


def variant(name: str, folder: Path, call: dict, drop: tuple[str, ...] = ()) -> Case:
    """A case with its calls changed, without results, that reads the weights of the one it comes from."""
    case = golden_cases.load(name, GOLDEN)
    info = copy.deepcopy(case.info)
    info["state_dicts"] = {part: str(GOLDEN / file) for part, file in info["state_dicts"].items() if part not in drop}
    info["file"] = "variant.safetensors"
    for arguments in info["calls"].values():
        arguments.update(call)
    inputs = {key: tensor for key, tensor in case.tensors.items() if key in golden_cases.INPUTS}
    return Case(info, inputs, folder)


def written(case: Case, results: dict[str, torch.Tensor]) -> Case:
    """The case with these results, from its files."""
    save_file({k: t.contiguous().clone() for k, t in (case.tensors | results).items()}, case.folder / case.info["file"])
    (case.folder / "variant.json").write_text(json.dumps(case.info))
    return golden_cases.load("variant", case.folder)


def holds(case: Case, check, *names: str) -> None:
    """The check passes, and fails if the last number of any of these results is another."""
    check(case)
    for name in names:
        changed = case[name].clone()
        changed.view(-1)[-1] += 2  # in a mask of keys: another key
        with pytest.raises(AssertionError):
            check(Case(case.info, case.tensors | {name: changed}, case.folder))


def chosen(results: dict[str, torch.Tensor], *names: str) -> dict[str, torch.Tensor]:
    return {name: results[name].short() if name.startswith("idx") else results[name] for name in names}


@pytest.mark.parametrize(
    ("call", "names"),
    [
        ({"label_B": 3}, ("idx",)),
        ({"label_B": -1, "cfg": 0.0}, ("idx", "logits_scales0to3")),
        ({"label_B": None, "B": 3}, ("idx", "f_hat", *PICTURES)),
        ({"label_B": None, "B": 1, "more_smooth": True, "top_k": 7, "top_p": 0.0}, ("idx", "logits")),
    ],
    ids=["one label", "no label", "labels drawn", "smooth"],
)
def test_var(tmp_path, call, names):
    case = variant("var_shared", tmp_path, call)
    results = chosen(var_results(case, "run0"), *names)
    case = written(case, {f"run0.{name}": tensor for name, tensor in results.items()})
    holds(case, check_var, f"run0.{names[-1]}")


@pytest.mark.parametrize(
    ("drafted", "call", "left_out"),
    [(9, {}, ["logits_refine_last"]), (1, {"label_B": None}, PICTURES), (5, {"label_B": 4, "more_smooth": True}, [])],
)
def test_code(tmp_path, drafted, call, left_out):
    case = variant("code_n6", tmp_path, call)
    case.info["N"] = drafted
    results = code_results(case)
    case = written(case, chosen(results, *(name for name in results if name not in left_out)))
    holds(case, check_code, "idx_refine_prefix")


def test_code_with_the_indices_alone_and_other_filters_of_each_model(tmp_path):
    case = variant("code_n6", tmp_path, {"cfg": 0.0})
    case.info["calls"]["refine"] |= {"top_k": [9] * 10, "temp": [0.7] * 10}
    case = written(case, chosen(code_results(case), "idx_draft", "idx_refine", "idx_refine_prefix"))
    holds(case, check_code, "idx_refine")


@pytest.mark.parametrize(
    ("name", "call", "drop"),
    [
        ("infinity_patchify_r1000", {"cfg_list": [1.0] * 7, "top_p": 0.0}, ()),
        ("infinity_f16_r1500", {"cfg_list": 2.0, "tau_list": 1.0}, ("vae_decoder",)),
        (
            "infinity_f16_r1000",
            {
                "scale_schedule": [
                    [1, w, h]
                    for _, h, w in golden_cases.load("infinity_f16_r1500", GOLDEN).info["calls"]["run0"][
                        "scale_schedule"
                    ]
                ]
            },
            (),
        ),
    ],
    ids=["without guidance", "without a decoder", "landscape"],
)
def test_infinity(tmp_path, name, call, drop):
    case = variant(name, tmp_path, call, drop)
    results = infinity_results(case)
    case = written(case, results | {"bits": results["bits"].byte()})
    holds(case, check_infinity, "latent" if drop else "image_bgr_crop")


@pytest.mark.parametrize(
    ("pooling", "window_size", "kernel_size", "kept", "extra"),
    [
        ("avgpool", 16, 5, ["l0.s08"], ()),
        ("maxpool", 9, 7, None, ("latent", "full_cache_bits", "score.l3.s07")),
    ],
)
def test_scale_kv(tmp_path, pooling, window_size, kernel_size, kept, extra):
    schedule = golden_cases.load("scalekv_maxpool", GOLDEN).info["calls"]["run0"]["scale_schedule"][:10]
    case = variant(
        "scalekv_maxpool", tmp_path, {"scale_schedule": schedule, "cfg_list": [2.0] * 10, "tau_list": [1.0] * 10}
    )
    case.info["scalekv"] = {
        "window_size": window_size,
        "max_capacity": 400,
        "kernel_size": kernel_size,
        "pooling": pooling,
    }
    case.info["budget_rows"] = {
        "Scale 8": [400, 300, 90, 90],
        "Scale 9": [700, 300, 90, 90],
        "Scale 10": [900, 200, 80, 80],
    }
    results, cache = scale_kv_results(case)
    case.info["eviction"] = {
        "keys_before": {name[6:]: t.shape[-1] for name, t in results.items() if name.startswith("score.")},
        "window": {str(n): window(cache.scales[n], cache.window_side).tolist() for n in range(6, 10)},
    }
    labels = case.info["eviction"]["keys_before"] if kept is None else kept
    tensors = {f"kept.{label}": torch.from_numpy(np.packbits(results[f"kept.{label}"].numpy(), -1)) for label in labels}
    tensors |= {"bits": results["bits"].byte(), "cached_len": results["cached_len"].int()}
    results["full_cache_bits"] = generate(case, KVCache())[0].byte()
    case = written(case, tensors | {name: results[name] for name in extra})
    holds(case, check_scale_kv, "cached_len", *extra)


def test_a_result_that_nobody_knows_or_that_lacks_is_told(tmp_path):
    case = variant("var_shared", tmp_path, {"B": 1, "label_B": 0})
    results = var_results(case, "run0")
    with pytest.raises(AssertionError, match=r"the case lacks \['idx'\]"):
        check_var(written(case, {"run0.f_hat": results["f_hat"]}))
    with pytest.raises(AssertionError, match=r"unknown results: \['smell'\]"):
        check_var(written(case, {"run0.idx": results["idx"].short(), "run0.smell": results["f_hat"]}))
