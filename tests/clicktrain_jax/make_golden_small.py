"""Writes golden_small.npz: whole small layers of the shared golden files, facts without their nets.

    python tests/clicktrain_jax/make_golden_small.py ../shared/golden

Kernel choices are made over a layer, so layers are taken whole and the large ones left out. Masks and weights
are the reference's own (float32, PyTorch, OIHW); the lasso sums, which the shared files give over all
listed layers, are recomputed here for the layers taken, in float64 by `oracle`.
"""

import pathlib
import sys

import numpy as np
import oracle

LARGEST = 24 * 16 * 9
WEIGHTS = ("w_before_e1b0", "g_select", "w_before_e1b1", "w_final")


def small_case(full):
    names = [name for name in full["names"] if full[f"w_final/{name}"].size <= LARGEST]
    ratios = dict(zip(full["names"], full["ratios"]))
    case = {"names": np.array(names), "ratios": np.array([ratios[name] for name in names])}
    case["num_patterns"], case["coeff"] = full["num_patterns"], full["coeff"]
    pattern_sum = kernel_sum = 0.0
    total = retained = 0
    for name in names:
        for key in WEIGHTS:
            case[f"{key}/{name}"] = full[f"{key}/{name}"]
        masks = {}
        for key in ("pmask", "kmask"):
            if f"{key}/{name}" in full:
                case[f"{key}/{name}"] = full[f"{key}/{name}"].astype(bool)
                masks[key] = oracle.to_hwio(case[f"{key}/{name}"])
        weight = oracle.to_hwio(full[f"w_before_e1b1/{name}"])
        pattern_sum += oracle.lasso_sum(weight, masks.get("pmask"))
        kernel_sum += oracle.lasso_sum(weight, masks["kmask"])
        total += weight.size
        retained += int((masks["kmask"] & masks.get("pmask", True)).sum())
    case["group_lasso_pattern"], case["group_lasso_kernel"] = pattern_sum, kernel_sum
    case["compression_listed_layers"] = total / retained
    return case


def main(folder):
    arrays = {}
    for path in sorted(pathlib.Path(folder).glob("*.npz")):
        with np.load(path) as full:
            arrays |= {f"{path.stem}:{key}": value for key, value in small_case(dict(full)).items()}
    target = pathlib.Path(__file__).with_name("golden_small.npz")
    np.savez_compressed(target, **arrays)
    print(f"{target}: {target.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main(sys.argv[1])
