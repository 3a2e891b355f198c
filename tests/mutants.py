"""Mutants: small mistakes in the core, storage and deploying, each of which some quick test must notice.

``python -m tests.mutants`` applies each to a copy of the tree and runs the tests that should fail, with ``-x``; it
lists the survivors and exits with 1 if there are any. ``python -m tests.mutants due`` takes those whose symbol holds
the word alone, and ``--check`` runs the tests without any mutant first. A mutant names the function or class that it is
in, wherever that lies, and the tests by file and function; `tests/test_mutants.py` sees that all still apply.
"""

import ast
import importlib
import os
import pathlib
import shutil
import signal
import sys
import tempfile
import time
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = "clicktrain_jax"
LIMIT_S = 600


class Mutant(NamedTuple):
    """``old`` becomes ``new`` in the function, method ("Class.method") or class ``symbol``; ``tests`` are
    "file::function", or "file::function[case]", without the ending of the file."""

    symbol: str
    old: str
    new: str
    tests: str


MUTANTS = [Mutant(*each) for each in (
    # Masks.
    ("_words", "layer.pattern_ids == index", "layer.pattern_ids < index",
     "test_layer_masks::test_views"),
    ("_spread", "taps[:, :, None, None]", "taps[::-1, :, None, None]", "test_layer_masks::test_views"),
    ("_full", "layer.kernel[:, :, 0, 0].T", "layer.kernel[:, :, 0, 0]",
     "test_convolutions::test_oihw_chooses_what_hwio_chooses"),
    ("FullMask.combined", "self.pattern & self.kernel", "self.pattern | self.kernel",
     "test_transform_phases::test_later_gradients_are_masked"),
    ("kept", "jnp.where(placed_like(keep, weight), weight, jnp.zeros((), weight.dtype))",
     "weight * placed_like(keep, weight).astype(weight.dtype)",
     "test_masks_and_lasso::test_masked_weights_become_plus_zero"),
    ("keep_all", "jnp.ones((cin, cout)", "jnp.zeros((cin, cout)",
     "test_layer_masks::test_all_is_kept_before_the_selection"),
    ("keep_all", "jnp.ones((num_patterns, kh, kw), bool)", "jnp.zeros((num_patterns, kh, kw), bool)",
     "test_layer_masks::test_all_is_kept_before_the_selection"),
    ("layers_for", "*(set(leaves) - set(masks.names)), ", "",
     "test_layer_masks::test_masks_of_a_part_leave_the_rest_dense"),
    ("layers_for", "            check_shape(name, leaves[name], mask)", "            pass",
     "test_bad_input::test_trees_and_shapes_that_do_not_belong_together"),
    ("masks_of", "selected >= 0 > pruned", "selected >= 0",
     "test_facts::test_an_update_that_is_not_finite_puts_the_selection_off[nan]"),
    # Phases.
    ("PhaseSchedule.due", "full & (first & (count >= self.select_step)", "full & (first & (count == self.select_step)",
     "test_phases::test_what_is_due_when_a_run_does_not_go_as_planned"),
    ("PhaseSchedule.due", "(count >= self.prune_step) & (waits ^ True)", "(count == self.prune_step) & (waits ^ True)",
     "test_phases::test_what_is_due_when_a_run_does_not_go_as_planned"),
    ("PhaseSchedule.due", "(count >= self.prune_step) & (waits ^ True)", "(count >= self.prune_step)",
     "test_phases::test_what_is_due_when_a_run_does_not_go_as_planned"),
    ("PhaseSchedule.due", "begin = self.select_step - self.importance_steps + 1", "begin = self.select_step",
     "test_phases::test_what_is_due_when_a_run_does_not_go_as_planned"),
    ("PhaseSchedule.due", "(selected < coming) & (pruned < 0)", "(selected < coming)",
     "test_phases::test_what_is_due_when_a_run_does_not_go_as_planned"),
    ("PhaseSchedule.due", "gathered + 1 >= self.importance_steps", "gathered + 2 >= self.importance_steps",
     "test_phases::test_what_is_due_when_a_run_does_not_go_as_planned"),
    ("PhaseSchedule.planned", "self.prune_step if self.prune_step < step",
     "self.prune_step if self.prune_step <= step", "test_phases::test_host_and_device_agree"),
    ("PhaseSchedule.segments", "else gathered) + due.gathers", "else gathered)",
     "test_phases::test_segments_with_windows"),
    ("schedule", "max(prune_step, select_step + 1)", "max(prune_step, select_step)", "test_accounting::test_schedule"),
    # The transformation.
    ("_Pieces._add_scores", "jnp.isfinite(score).all()", "jnp.isfinite(score).any()",
     "test_facts::test_an_update_that_is_not_finite_puts_the_selection_off[nan]"),
    ("_Pieces._add_scores", "at - exponents[-1]", "0",
     "test_facts::test_gathered_scores_of_very_different_scales_add_up"),
    ("_Pieces.gather", "(~finite).astype(jnp.int32)", "finite.astype(jnp.int32)",
     "test_facts::test_an_update_that_is_not_finite_puts_the_selection_off[nan]"),
    ("_Pieces.select", "selected=old.count", "selected=seen.count + 1",
     "test_facts::test_an_update_that_is_not_finite_puts_the_selection_off[nan]"),
    ("_Pieces.select", "mean.max() == mean.min()", "mean.max() == 0",
     "test_facts::test_scores_that_are_all_alike_are_no_order"),
    ("_Pieces.select", "jnp.where(alike[name], magnitude, mean)", "mean",
     "test_facts::test_a_layer_that_says_nothing_is_judged_by_magnitude"),
    ("_Pieces.select", "scores=jax.tree.map(jnp.zeros_like, old.scores)", "scores=seen.scores",
     "test_importance_steps::test_the_sums_are_empty_between_the_selections_and_gone_when_not_asked_for"),
    ("_Pieces.select", "gathered=jnp.zeros_like(old.gathered)", "gathered=seen.gathered",
     "test_importance_steps::test_the_sums_are_empty_between_the_selections_and_gone_when_not_asked_for"),
    ("_Pieces.move", "apply_masks(grads, _where(masks, masked))", "grads",
     "test_transform_phases::test_later_gradients_are_masked"),
    ("_Pieces.move", "self.coeff(state.count)", "self.coeff(0)", "test_facts::test_a_schedule_for_the_coefficient"),
    ("phase_updates.select", "pieces.select(grads, state, params), params, extra)",
     "pieces.select(grads, state, params), params, extra, lasso=True)",
     "test_transform_phases::test_compiled_phase_updates_are_the_transformation[momentum]"),
    ("phase_updates.prune", "pruned=state.count", "pruned=state.count + 1",
     "test_transform_phases::test_compiled_phase_updates_are_the_transformation[momentum]"),
    ("clicktrain.whole_update", "masked=due.pruned,", "masked=due.prunes | due.pruned,",
     "test_transform_phases::test_pruning_updates_gradient_is_whole_and_without_lasso"),
    ("clicktrain.whole_update", "lasso=due.regularizes", "lasso=due.pruned",
     "test_transform_phases::test_regularized_gradient_has_the_lasso_added"),
    ("clicktrain.whole_update", "held=due.prunes | due.pruned", "held=due.pruned",
     "test_facts::test_an_update_that_is_not_finite_puts_the_selection_off[nan]"),
    ("_held_weights.hold", "-weight.astype(wide)", "jnp.zeros((), wide)",
     "test_facts::test_an_update_that_is_not_finite_puts_the_selection_off[nan]"),
    ("_held_weights.hold", "jnp.promote_types(update.dtype, weight.dtype)", "update.dtype",
     "test_transform_trees::test_dtypes[f16 with bf16 gradients]"),
    ("enforce", "map(_held, leaves, mirrored)", "leaves",
     "test_sparse_training::test_masked_weights_and_what_is_remembered_of_them_are_zero"),
    ("held_update.step", "_held(one, masked.get(id(result)))", "one",
     "test_transform_trees::test_a_layer_is_not_taken_for_another_of_the_same_shape"),
    ("_mirrored.name_of", "max(splits", "min(splits",
     "test_transform_trees::test_a_module_named_like_a_field_of_the_optimizer"),
    # States.
    ("_unreplicated", "raise ValueError(\n                f\"there are",
     "return first\n            raise ValueError(\n                f\"there are",
     "test_wrappers::test_states_that_differ_along_a_leading_axis"),
    ("check_state", "if name not in held or layer is None", "if name not in held",
     "test_facts::test_a_state_of_another_plan_names_what_differs[one layer less]"),
    ("check_state", "len(held[name].patterns) != num_patterns", "False",
     "test_facts::test_a_state_of_another_plan_names_what_differs[other patterns]"),
    ("_by_path", "all((*head, name) in leaves for name in _FACTS)", "False",
     "test_checkpoints::test_flax_serialization"),
    ("status", "sorted(Masks.of(state.masks).layers)", "reversed(sorted(Masks.of(state.masks).layers))",
     "test_facts::test_a_layer_that_says_nothing_is_judged_by_magnitude"),
    ("transformation.call", "if isinstance(item[1], _CONSTANTS)", "if False",
     "test_eager::test_arguments_for_the_inner_optimizer[a switch]"),
    # Importance and the lasso.
    ("group_taylor.score", "group / jnp.where(whole > 0, whole, 1.0)", "group",
     "test_importance_steps::test_group_taylor_by_hand"),
    ("rescaled", "- 127 - goal", "- 126 - goal", "test_facts::test_scaling_by_powers_of_two_is_exact"),
    ("times_power_of_two", "(half, exponent - half)", "(half, half)",
     "test_facts::test_scaling_by_powers_of_two_is_exact"),
    ("scaled_scores", "exponent[name] + 2 * pairs[name][1]", "exponent[name] - 2 * pairs[name][1]",
     "test_facts::test_gathered_scores_of_very_different_scales_add_up"),
    ("group_lasso", "if name not in layers or leaves[name] is None",
     "if name not in layers or leaves[name] is None or leaves[name].shape[0] == 1",
     "test_masks_and_lasso::test_group_lasso_against_float64"),
    ("inverse_norms", "1 / _norms(part, axes)", "jnp.ones_like(_norms(part, axes))",
     "test_masks_and_lasso::test_gradient_is_that_of_the_value"),
    ("add_group_lasso.add", "* push).astype(grad.dtype)", "* push.astype(grad.dtype)).astype(grad.dtype)",
     "test_masks_and_lasso::test_bfloat16_gradients_stay_so_and_are_summed_in_float32"),
    ("_norms", " + EPSILON", "", "test_masks_and_lasso::test_gradient_is_finite_at_zero"),
    # Selection.
    ("keep", "(tied & (jnp.cumsum(tied, axis=1) <= among_tied))", "tied",
     "test_selection::test_ties_at_the_threshold_only"),
    ("keep", "flat < threshold", "flat <= threshold", "test_selection::test_ties_at_the_threshold_only"),
    ("protect", "best_of_row | best_of_column", "best_of_row",
     "test_selection_shapes::test_the_floor_empties_no_filter_and_no_channel"),
    ("_levels", "-(-places * size // counts[:, None])", "places * size // counts[:, None]",
     "test_selection_shapes::test_places_of_a_short_block_are_rounded_up"),
    ("choose_patterns", "jnp.argmax(retained_scores(sums, patterns), axis=0)",
     "jnp.argmin(retained_scores(sums, patterns), axis=0)",
     "test_selection::test_a_kernel_takes_the_pattern_that_retains_most"),
    ("_choose_jointly", "jnp.maximum(value, here)", "here",
     "test_selection_shapes::test_quads_are_two_of_four_at_every_tap_and_the_best"),
    ("quad_combinations", "used <= 2", "used <= 3",
     "test_selection_shapes::test_quads_are_two_of_four_at_every_tap_and_the_best"),
    ("_drafted", "kernels = ordered_sum(taps) if", "kernels = retained_by(taps, ids, patterns) if",
     "test_selection::test_kernels_are_removed_by_all_taps_not_by_the_retained_ones"),
    ("_finished", "jnp.where(kernel, draft.taps, 0.0)", "draft.taps",
     "test_selection_shapes::test_a_shared_pattern_is_chosen_over_the_kernels_that_stay"),
    ("_finished", "kernel.T[:, :, None, None]", "kernel[:, :, None, None]",
     "test_convolutions::test_oihw_chooses_what_hwio_chooses"),
    ("untile", "jnp.repeat(values, channels, axis=0), filters, axis=1",
     "jnp.repeat(values, filters, axis=0), channels, axis=1", "test_selection::test_tiles_agree_with_the_loops"),
    # Plan and targets.
    ("LayerPlan.num_removed", "math.ceil(round(self.fraction * math.prod(self.scope_block), 6))",
     "math.ceil(self.fraction * math.prod(self.scope_block))", "test_selection::test_55_percent_of_1600_is_880"),
    ("make_plan", "next((text for text, expression in compiled.items() if",
     "next((text for text, expression in reversed(compiled.items()) if",
      "test_targets::test_the_first_rule_that_matches_counts"),
    ("check_groups", "declared is not None and declared > 1", "declared is not None and declared > 9",
     "test_bad_input::test_grouped_convolutions"),
    ("check_layer", "layer.num_removed >= units and not reference", "layer.num_removed > units and not reference",
     "test_selection_shapes::test_a_fraction_that_would_remove_all_that_competes_is_refused"),
    ("_checked", "total / ratio < least", "total / ratio < 0", "test_targets::test_bad_targets"),
    ("least_kernels", "kernels -= _removed_at_least(layer)", "pass",
     "test_targets::test_what_fractions_leave_counts_for_the_target"),
    ("_rank", "values / jnp.maximum(remaining, values)", "values",
     "test_targets::test_damage_is_weighed_against_what_the_layer_still_holds"),
    ("PhaseSchedule.due", "forgets |= waits & (gathered > count - begin)", "pass",
     "test_phases::test_what_was_gathered_before_a_window_is_forgotten"),
    ("_Pieces._add_scores", "jnp.where(counts, state.scores[name], 0.0)", "state.scores[name]",
     "test_facts::test_updates_by_phase_forget_what_was_gathered_too"),
    ("why_not", "bias in ((cout,), (cin,))", "bias is not None",
     "test_convolutions::test_what_is_no_convolution_is_left_out_and_listed"),
    ("layouts.settle", "voices == {\"OIHW\"}", "False", "test_convolutions::test_oihw_is_named"),
    ("report", "retained = int(keep.sum()) + pending * marked", "retained = int(keep.sum())",
     "test_accounting::test_a_run_that_ends_before_its_prune"),
    ("Report.promised_conv_compression", "self.pending * ", "",
     "test_accounting::test_masks_that_are_handed_in_count_as_applied"),
    # Storage.
    ("width_of", "max(count - 1, 0)", "max(count, 0)", "test_bits::test_widths"),
    ("unpack", "<< values.dtype.type(bit)", "<< values.dtype.type(0)", "test_bits::test_round_trip"),
    ("encode", "(kernel == kernel[:1]).all()", "True", "test_layers::test_a_kernel_mask_that_differs_between_taps"),
    ("encode", "weights = weights._replace(kernel_weights=True)", "pass",
     "test_layers::test_a_kernel_mask_that_differs_between_taps"),
    ("decode", "words | ~stays if coding.parts == \"both\"", "words if coding.parts == \"both\"",
     "test_layers::test_round_trips_of_any_mask"),
    ("split", "FullMask(keep | ~kernel, kernel)", "FullMask(keep, kernel)",
     "test_containers::test_masks_from_zeros_by_hand"),
    ("stored_dtype", "array.ndim >= 2) or", "array.ndim >= 1) or", "test_values::test_which_leaves_are_narrowed"),
    ("_to_int8", "np.where(keep, wide, wide.dtype.type(0))", "wide",
     "test_values::test_nan_and_negative_zero_do_not_leak_through_a_mask"),
    ("_to_int8", "np.rint(", "np.trunc(", "test_values::test_int8_is_within_half_a_step"),
    ("check_file_name", "set(\"/\\\\:\")", "set(\"/\")", "test_broken::test_a_path_outside_of_the_folder"),
    ("_decode", "leaf.stored != leaf.dtype", "leaf.stored == leaf.dtype",
     "test_storage::test_narrow_exports_keep_masks_vectors_and_dtypes"),
    # Deploying.
    ("check_zeros", "np.asarray(array)[~mask]", "np.asarray(array)[mask]",
     "test_promises::test_weights_that_are_marked_and_not_zero_are_refused_or_pruned"),
    ("check_is_inference", "> _SAME *", "> 1e9 *", "test_promises::test_training_mode_is_refused"),
    ("check_probe", "> _SAME * largest", "> 1e9 * largest", "test_promises::test_what_is_loaded_is_what_was_exported"),
    ("InferenceNet._count", "given = batch if images is None else images", "given = batch",
     "test_promises::test_a_loaded_net_takes_what_an_accelerated_one_takes"),
    ("split", "keep.any(axis=taps, keepdims=True)", "keep.any(axis=(0, 1), keepdims=True)",
     "test_oihw::test_zeros_tell_of_whole_kernels"),
    ("_encode", "mask if mask is None else mask.transposed(TO_HWIO[order])", "mask",
     "test_oihw::test_it_is_stored_like_other_kernels"),
    ("_decided", "if prefix + name in used", "if True", "test_places::test_the_copy_that_is_read_is_taken"),
    ("ConvStep.finished", "jax.nn.relu(y) if self.relu else y", "y", "test_fold::test_nnx_with_convolution_bias"),
)]  # fmt: skip


def symbols(root: pathlib.Path) -> dict[str, list[tuple[pathlib.Path, int, int]]]:
    """``{qualified name: [(file, begin, end)]}`` of all functions and classes, places as offsets in the text."""
    found: dict[str, list[tuple[pathlib.Path, int, int]]] = {}

    def look(body: list[ast.stmt], prefix: str, path: pathlib.Path, starts: list[int]) -> None:
        for node in body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                place = path, starts[node.lineno - 1], starts[node.end_lineno]
                found.setdefault(prefix + node.name, []).append(place)
                look(node.body, f"{prefix}{node.name}.", path, starts)
            elif isinstance(node, ast.If):
                look(node.body + node.orelse, prefix, path, starts)

    for path in sorted((root / PACKAGE).rglob("*.py")):
        text, starts = path.read_text(), [0]
        for line in text.splitlines(keepends=True):
            starts.append(starts[-1] + len(line))
        look(ast.parse(text).body, "", path, starts)
    return found


def place_of(mutant: Mutant, known: dict[str, list[tuple[pathlib.Path, int, int]]]) -> tuple[pathlib.Path, int]:
    """The file, and where in its text ``old`` begins.

    Raises:
        ValueError: not exactly one place.
    """
    places = []
    for path, begin, end in known.get(mutant.symbol, []):
        text = path.read_text()[begin:end]
        places += [(path, begin + at) for at in range(len(text)) if text.startswith(mutant.old, at)]
    if len(places) != 1:
        raise ValueError(f"{mutant.symbol}: {mutant.old!r} is found {len(places)} times, expected once")
    return places[0]


def tests_of(mutant: Mutant, root: pathlib.Path) -> list[str]:
    """What pytest is given.

    Raises:
        ValueError: no such test.
    """
    file, _, function = mutant.tests.partition("::")
    paths = list((root / "tests" / PACKAGE).rglob(f"{file}.py"))
    if len(paths) != 1 or f"def {function.partition('[')[0]}(" not in paths[0].read_text():
        raise ValueError(f"{mutant.symbol}: there is no test {mutant.tests}")
    return [f"{paths[0]}::{function}"]


def run(root: pathlib.Path, tests: list[str]) -> str:
    """ "passed", "failed" or what else came of the tests, in a process that has jax already."""
    child = os.fork()
    if child == 0:
        os.chdir(root)
        sys.path.insert(0, str(root))
        sys.dont_write_bytecode = True  # a file of the same second and size would be taken for the one before
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        import pytest

        os._exit(pytest.main(["-x", "-q", "-p", "no:cacheprovider", f"--rootdir={root}", *tests]))
    deadline = time.monotonic() + LIMIT_S
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            return {0: "passed", 1: "failed"}.get(code, f"ended with {code}")
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return "failed"  # it does not end
        time.sleep(0.05)


def main(arguments: list[str]) -> int:
    """Run them; the exit code."""
    words = [word for word in arguments if word != "--check"]
    chosen = [each for each in MUTANTS if not words or any(word in each.symbol for word in words)]
    os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "NPROC": "16"}
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    # Once for all; no device is looked at before a test does.
    for module in ("flax.linen", "flax.nnx", "flax.serialization", "hypothesis.extra.numpy", "optax", "pytest"):
        importlib.import_module(module)

    survivors = []
    with tempfile.TemporaryDirectory(prefix="clicktrain-mutants-") as folder:
        copy = pathlib.Path(folder) / "tree"
        copy.mkdir()
        for name in (PACKAGE, "pallas_kernels", "experiments", "tests"):
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        if (ROOT / ".native").exists():
            (copy / ".native").symlink_to(ROOT / ".native")
        known = symbols(copy)
        if "--check" in arguments:
            tests = sorted({test for mutant in chosen for test in tests_of(mutant, copy)})
            print(f"without a mutant: {len(tests)} tests {run(copy, tests)}", flush=True)
        for number, mutant in enumerate(chosen, start=1):
            path, at = place_of(mutant, known)
            text = path.read_text()
            path.write_text(text[:at] + mutant.new + text[at + len(mutant.old) :])
            begin, said = time.monotonic(), run(copy, tests_of(mutant, copy))
            path.write_text(text)
            if said != "failed":
                survivors.append(f"{mutant.symbol}: {mutant.old!r} -> {mutant.new!r} ({mutant.tests} {said})")
            print(f"{number}/{len(chosen)} {mutant.symbol} {said} ({time.monotonic() - begin:.0f} s)", flush=True)
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} mutants die", *survivors, sep="\n")
    return int(bool(survivors))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
