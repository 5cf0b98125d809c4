"""What keeps training safe, each guard with the code that it is and the tests that must miss it.

`test_guards.py` takes them out one at a time, in a copy of the package, and records which tests go red.
"""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from filelock import FileLock

import lightning_quant

PACKAGE = Path(lightning_quant.__file__).parent
TESTS = Path(__file__).parent
RECORD = TESTS / "guards.json"


@dataclass(frozen=True)
class Guard:
    """A guard: where it stands, what takes it out, and where to look for tests that miss it."""

    name: str
    file: str
    code: str
    without: str
    tests: str


GUARDS = (
    Guard(
        "bins of pools are those of the size that comes",
        "runtimes/_spelled_out.py",
        "        if function in _POOLED_DIMENSIONS:\n",
        "        if False:\n",
        "runtimes/test_spelled_out.py -k bins_are_cut",
    ),
    Guard(
        "what training and validation both call is quantized",
        "callbacks/captured.py",
        "            captured, exported = part, exported_call(trainer, pl_module, settings, part, fills=together)\n",
        "            pass\n",
        "callbacks/test_captured.py -k part_that_validation_calls",
    ),
    Guard(
        "files that cannot be tried against limits cost no artifact",
        "callbacks/only_if_needed.py",
        "    except Exception as error:\n        warn(",
        "    except ZeroDivisionError as error:\n        warn(",
        "callbacks/test_only_if_needed.py -k past_the_network",
    ),
    Guard(
        "validation past the module says nothing of its simulation",
        "callbacks/file_metrics.py",
        "    if not bypassed:\n",
        "    if True:\n",
        "callbacks/test_file_metrics.py",
    ),
    Guard(
        "recurrences that stay float take any length",
        "runtimes/_onnx_export.py",
        " as fixed, recurrences_whole(), BinsSpelledOut(),",
        " as fixed, BinsSpelledOut(),",
        "layers/test_recurrent.py -k any_length and dynamic",
    ),
    Guard(
        "files of stored layers keep no state that a forward changes",
        "planned/layerwise.py",
        "            check_call(quantized.root, call)\n",
        "            pass\n",
        "graph/test_state.py -k own_code_alone",
    ),
    Guard(
        "a forward that reads the data of tensors is exported",
        "runtimes/_allowances.py",
        "        if function == _DATA:\n",
        "        if False:\n",
        "runtimes/test_allowances.py -k another_form and Data and torch",
    ),
    Guard(
        "weights that code beside their layer reads are stored",
        "planned/try_layers.py",
        'tried[name].open_weights("code outside it reads its weight", half_arithmetic=half_arithmetic)',
        'tried[name].stay_float("code outside it reads its weight")',
        "layers/test_shared.py -k stored_and_named",
    ),
    Guard(
        "weights that are scaled for each sample are stored",
        "layers/products.py",
        "(name in _MOVES or self._scales(name, args, result))",
        "name in _MOVES",
        "layers/test_products.py -k scaled_for_each_sample",
    ),
    Guard(
        "copies of stored recurrent layers read packed sequences",
        "layers/recurrent.py",
        "layer._flat_weights = before",
        "layer._flat_weights = []",
        "layers/test_recurrent.py -k packed",
    ),
    Guard(
        "inputs of OpenVINO files have the names of the signature",
        "runtimes/openvino.py",
        ' != "Parameter" and number',
        " and number",
        "runtimes/test_openvino.py -k keep_their_names",
    ),
    Guard(
        "determinants and products so far are exported to ONNX",
        "runtimes/_onnx_export.py",
        "BinsSpelledOut(), SpelledOut():",
        "BinsSpelledOut():",
        "runtimes/test_spelled_out.py -k flow",
    ),
    Guard(
        "the monitor leaves spectral norm's power iteration as it is",
        "measure/quantizability.py",
        "with torch.no_grad(), isolated_rng(), evaluation_mode(layer):",
        "with torch.no_grad():",
        "callbacks/test_monitor.py -k same_with_it",
    ),
    Guard(
        "flips are those of a batch that moves weights",
        "callbacks/monitor.py",
        "moves = is_last or (batch_idx + 1) % trainer.accumulate_grad_batches == 0",
        "moves = True",
        "callbacks/test_monitor.py -k flips",
    ),
    Guard(
        "a resumed run knows which layers have gone bad",
        "callbacks/monitor.py",
        '        self.bad = dict(state_dict.get("bad", {}))\n',
        "",
        "callbacks/test_monitor.py -k resumed",
    ),
    Guard(
        "a module that computes its loss itself is taught",
        "simulate/distillation.py",
        "        together = any(answers[index].dim() == 0 for index in taught)\n",
        "        together = False\n",
        "callbacks/test_teaching.py -k computes_its_loss",
    ),
    Guard(
        "a sample of a rare class counts in an area by what it changes there",
        "measure/recorder.py",
        "moved = functools.partial(_answered_otherwise, value, whole, self._lists, len(added))",
        "moved = None",
        "measure/test_recorder.py -k rare_class",
    ),
    Guard(
        "a step that one part of the calls refuses is not fitted to the other",
        "calibrate/ladder.py",
        "> _MOST_LOSERS * len(after)",
        "> 2 * len(after)",
        "calibrate/test_ladder.py -k most_samples",
    ),
    Guard(
        "aligned channels keep room for values that calibration did not see",
        "calibrate/alignment.py",
        "torch.ones_like(maximum), _STRENGTH)",
        "torch.ones_like(maximum), 1.0)",
        "calibrate/test_alignment.py -k room",
    ),
    Guard(
        "processes align by the extremes of all of them",
        "calibrate/alignment.py",
        "processes.maximum(processes.together(extremes, prepared, groups, steps))",
        "extremes(prepared, groups, steps)",
        "calibrate/test_alignment.py -k alone",
    ),
    Guard(
        "channels are aligned in all processes or in none",
        "calibrate/alignment.py",
        "(processes or Group()).together(scaling_groups, prepared)",
        "scaling_groups(prepared)",
        "calibrate/test_alignment.py -k fails_calibration",
    ),
    Guard(
        "a correction of means holds what calls agree on",
        "calibrate/output_correction.py",
        "return mean * (1 - noise / power).clamp(min=0)",
        "return mean",
        "calibrate/test_output_correction.py -k agree",
    ),
    Guard(
        "integer kernels that saturate are not used",
        "layers/kernels.py",
        "torch.backends.mkldnn.is_available() and _is_exact()",
        "torch.backends.mkldnn.is_available()",
        "layers/test_kernels.py -k every_processor",
    ),
    Guard(
        "a limit on memory is about what a file takes in a process of its own",
        "search/files.py",
        "memory = self._memory(model, artifact) if self.weighed else {}",
        "memory: dict[str, Any] = {}",
        "search/test_files.py -k own_file",
    ),
    Guard(
        "layers that four bits do not hold get eight before they are kept in float",
        "search/layer_ranking.py",
        "{STORED: left} if left < noise else {}",
        "{}",
        "search/test_layer_ranking.py -k gets_eight_first",
    ),
    Guard(
        "overrides of a recipe of layers count",
        "layers/trial.py",
        "    return recipe if named is None or named.needs_calibration else named\n",
        "    return recipe\n",
        "planned/test_overrides.py -k recipe_of_layers",
    ),
    Guard(
        "products with a parameter are linear layers",
        "graph/contractions.py",
        "if _is_matrix(right, root) and _shape(left) and not _is_weight(left, root):",
        "if False:",
        "graph/test_contractions.py -k runs_in_integers",
    ),
    Guard(
        "pickles of stored subclasses find their class",
        "layers/derived.py",
        ', "__reduce_ex__": _reduce',
        "",
        "layers/test_derived.py -k pickles",
    ),
    Guard(
        "experts that read as many rows as were found are stored",
        "layers/leftovers.py",
        " and row.reason != UNKNOWN_SHAPES",
        "",
        "layers/test_leftovers.py -k nobody_refused",
    ),
    Guard(
        "graphs store nothing together with what is excluded",
        "simulate/prepared.py",
        "kept_as_whole(root, analysis.plan)",
        "analysis.plan",
        "layers/test_leftovers.py -k stored_together",
    ),
    Guard(
        "recipes of layers store nothing together with what is excluded",
        "layers/trial.py",
        'next(iter(_excluded_inside(trial, selection)), "")',
        '""',
        "layers/test_leftovers.py -k holds_what_is_excluded",
    ),
    Guard(
        "weights that few bits do not hold get eight before their layers are kept in float",
        "search/wide_weights.py",
        "prepared.weight_quant_max(identity) <= _SIX_BITS",
        "prepared.weight_quant_max(identity) <= 0",
        "search/test_wide_weights.py -k gets_eight_first",
    ),
    Guard(
        "corrections of biases are not those of other bits",
        "search/candidates.py",
        "    others = [i for i in made.weight_quant_maxima if made.weight_quant_max(i) != whole.weight_quant_max(i)]\n",
        "    others: list[str] = []\n",
        "search/test_wide_weights.py -k corrections",
    ),
    Guard(
        "what an artifact is timed beside is decided by no order",
        "machine/latency.py",
        "                if elapsed < _QUICK_S:\n                    elapsed = _seconds(contestants[name], clock)\n",
        "",
        "machine/test_latency.py -k came_before",
    ),
    Guard(
        "a report names the runtime in which float is faster",
        "report/speed.py",
        "**own, **self.elsewhere}",
        "**own}",
        "report/test_speed.py -k way_out",
    ),
    Guard(
        "grids narrow to the recipe's bits while bits are annealed",
        "callbacks/qat.py",
        "        prepared.anneal_bits(self.timeline.width(trainer))\n",
        "",
        "numerics/test_learned_steps.py -k annealed_from_eight",
    ),
    Guard(
        "a twin has the recipe's bits while training has more",
        "simulate/prepared.py",
        "        other.anneal_bits(0.0)\n",
        "",
        "callbacks/test_twin.py -k steps_of_the_twin",
    ),
    Guard(
        "layers are folded for alignment without any range, as scores do in training",
        "calibrate/rescale.py",
        "    gain, bias = merged(*prepared.bias_and_norm(identity, weight))\n",
        "    gain, bias = (folded := prepared.folded(identity, corrected=False)).gain, folded.bias\n",
        "calibrate/test_alignment.py -k observed",
    ),
    Guard(
        "steps that a twin learns are no steps of the run",
        "simulate/prepared.py",
        "other.ranges, other.learned_steps = copied((self.ranges, self.learned_steps))",
        "other.ranges = copied(self.ranges)",
        "callbacks/test_twin.py -k steps_of_the_twin",
    ),
    Guard(
        "learned zero points stay at the end of a range that has zero there",
        "numerics/learned_steps.py",
        "else is_inside * float(grid.high - grid.low)",
        "else float(grid.high - grid.low)",
        "numerics/test_learned_steps.py -k zero_stays",
    ),
    Guard(
        "learned ranges of four bits begin with the published step, also beyond the data",
        "numerics/learned_steps.py",
        "    return (low, high) if steps <= _FEW_STEPS else (",
        "    return (",
        "numerics/test_learned_steps.py -k first_range",
    ),
    Guard(
        "ranges of eight bits beside learned ones follow the data",
        "simulate/rounding.py",
        "        if self._learns and identity not in self._ranges.wide:\n",
        "        if self._learns:\n",
        "simulate/test_quantizers.py -k eight_bits_beside",
    ),
    Guard(
        "ranges of eight bits follow the data from the first batch on",
        "simulate/quantizers.py",
        "return self.learns_ranges and identity not in self.ranges.wide",
        "return self.learns_ranges",
        "simulate/test_quantizers.py -k eight_bits_beside",
    ),
    Guard(
        "weights of the first and the last layer keep eight bits",
        "planned/overrides.py",
        "dict.fromkeys(ends(recipe, operators), 127)",
        "dict[str, int]()",
        "planned/test_overrides.py -k keep_eight_bits",
    ),
    Guard(
        "what the first and the last layer read keeps eight bits",
        "planned/overrides.py",
        "groups_read(by_ends=False) - groups_read(by_ends=True)",
        "groups_read(by_ends=False) | groups_read(by_ends=True)",
        "planned/test_overrides.py -k keep_eight_bits",
    ),
    Guard(
        "sums read in eight bits what products read in four",
        "export/prepare.py",
        "    analysis = with_rereads(analysis, on_cpu, narrow_products(chosen, analysis))\n",
        "",
        "graph/test_rereads.py -k in_eight_bits",
    ),
    Guard(
        "learned steps slow down with the weights",
        "numerics/learned_steps.py",
        "self.learning_rate * (now / highest if highest > 0 else 0.0)",
        "self.learning_rate",
        "numerics/test_learned_steps.py -k slow_down",
    ),
    Guard(
        "weights are rounded to the bits that grids have now",
        "simulate/running.py",
        "            self._graphs, self._calls = {}, {}\n",
        "            pass\n",
        "numerics/test_learned_steps.py -k annealed_from_eight",
    ),
    Guard(
        "what is scored by default is a part of a validation",
        "callbacks/score.py",
        "    share = 1 / EVERY if limit is None else limit\n",
        "    share = 1.0 if limit is None else limit\n",
        "callbacks/test_score.py -k lie_evenly",
    ),
    Guard(
        "a teacher's gradients are scaled as those of the loss",
        "callbacks/teaching.py",
        "return loss_scale(trainer) / trainer.accumulate_grad_batches",
        "return 1.0",
        "callbacks/test_teaching.py -k scaled_as_the_loss",
    ),
    Guard(
        "equal scores that an engine puts in another order are ties",
        "simulate/ties.py",
        "prepared.simulation.jittering(draw), _TippedChoices(draw):",
        "prepared.simulation.jittering(draw):",
        "simulate/test_ties.py -k another_order",
    ),
    Guard(
        "hooks and layers that come after the plan are refused before the first batch",
        "callbacks/base.py",
        "refused_in_callback(self.planned.check_once, self.require_prepared(), resolve(pl_module, self.path))",
        "pass",
        "callbacks/test_unplanned.py -k first_batch",
    ),
    Guard(
        "a number that training changed is said to be none of its graphs'",
        "callbacks/deployment.py",
        "else stale(Prepared.of(model)) if with_ranges else []",
        "else []",
        "callbacks/test_unplanned.py -k says_that_a_number",
    ),
    Guard(
        "calibration has what was taken away when training ended",
        "callbacks/training_data.py",
        "        start_hooks(duplicate, batch)\n        return run(duplicate, batch, index)\n",
        "        raise\n",
        "callbacks/test_training_data.py -k taken_away",
    ),
    Guard(
        "what is planned and lost on the way to a file is told from what nothing reads",
        "export/export.py",
        "model.plan.with_edges(present, lost_edges(model, converted, present))",
        "model.plan.with_edges(present)",
        "export/test_lost_edges.py -k keeps_its_share",
    ),
    Guard(
        "graphs in parts of a graph are modules of what is exported",
        "export/convert.py",
        "    return (InParts(converted, graphs) if graphs else converted).eval()\n",
        "    return converted.eval()\n",
        "export/test_float_weights.py -k run_in_integers",
    ),
    Guard(
        "a layer whose hook changes its answer stays float",
        "graph/operations.py",
        'if node.meta.get("as_it_is"):\n',
        "if False:\n",
        "graph/test_faithful.py -k hook",
    ),
    Guard(
        "what nobody can copy is shared by copies",
        "surgery/routing.py",
        "            before[id(culprit)] = culprit\n",
        "            raise\n",
        "surgery/test_routing.py -k nobody_can_copy",
    ),
    Guard(
        "measured validation sees the run's callbacks and keeps them still",
        "measure/lent.py",
        "evaluator.callbacks = [*evaluator.callbacks, *(",
        "_ = [*evaluator.callbacks, *(",
        "measure/test_lent.py",
    ),
    Guard(
        "what cannot be measured when fit has ended costs no artifact",
        "measure/attempts.py",
        "        if not alone and not isinstance(error, QuantizationError):\n",
        "        if True:\n",
        "measure/test_attempts.py -k everything_fails",
    ),
    Guard(
        "a best checkpoint without all weights costs no artifact",
        "callbacks/deployment.py",
        "if reason := _misfit(duplicate, saved):",
        "if reason := '':",
        "callbacks/test_callbacks_deployment.py -k without_all",
    ),
    Guard(
        "results of an ONNX file are not rounded for what reads them",
        "runtimes/_onnx_moves.py",
        "    keep_results_apart(model)\n\n",
        "\n",
        "runtimes/test_onnx_moves.py -k not_rounded",
    ),
    Guard(
        "attention over three dimensions is exported as one head",
        "runtimes/_allowances.py",
        "args[0].dim() == 3",
        "False",
        "runtimes/test_allowances.py -k another_form and OneHead",
    ),
    Guard(
        "bilinear layers reach ExecuTorch as products",
        "runtimes/_allowances.py",
        "_bilinear if function is F.bilinear else function",
        "function",
        "runtimes/test_allowances.py -k another_form and Pairs",
    ),
    Guard(
        "OpenVINO makes no kernels of attention that answer otherwise in the second call",
        "runtimes/_openvino_compiled.py",
        '{"SNIPPETS_MODE": "DISABLE"}',
        "{}",
        "runtimes/test_openvino_graph.py -k every_call",
    ),
    Guard(
        "nothing is computed in the kernel of a maximum on OpenVINO",
        "runtimes/_openvino_graph.py",
        '    return tape.op("Max", [alone, alone])\n',
        "    return alone\n",
        "runtimes/test_openvino_graph.py -k norm",
    ),
    Guard(
        "integers are scaled before OpenVINO reduces them",
        "runtimes/_openvino_graph.py",
        "if _is_dequantized(values) else values",
        "if False else values",
        "runtimes/test_openvino_graph.py -k maximum and tokens",
    ),
    Guard(
        "a graph that does otherwise than the forward it was traced from is left out",
        "graph/faithful.py",
        '        unfaithful = _unfaithful(traced, module, tensors, *calls[""])\n',
        "        unfaithful = None\n",
        "graph/test_faithful.py -k runs_as_it_is",
    ),
    Guard(
        "later batches of validation are looked at before training",
        "callbacks/validation_batches.py",
        "        check_takes(model, args, kwargs)\n",
        "        pass\n",
        "callbacks/test_validation_batches.py -k decides_otherwise",
    ),
    Guard(
        "an artifact without a program is not opened without a module",
        "artifact/stored.py",
        'if "into_only" in own.manifest and',
        "if False and",
        "planned/test_inside.py -k told_what_to_type",
    ),
    Guard(
        "what a disk refuses is an error with the way out",
        "machine/disk.py",
        '        raise DiskError(f"Expected {folder} to take {what}, but {error}. {way_out}") from error\n',
        "        raise\n",
        "machine/test_disk.py -k names_the_place",
    ),
    Guard(
        "a full disk is no refusal of the module",
        "runtimes/_flat.py",
        "                raise refusal from error\n",
        "                pass\n",
        "machine/test_disk.py -k fix_sizes",
    ),
    Guard(
        "limits in the better direction are refused before training",
        "search/checks.py",
        "    if wrong := other_directions(directions, said):\n",
        "    if wrong := []:\n",
        "search/test_checks.py",
    ),
    Guard(
        "a limit of a search is decided on the interval, not on the estimate",
        "search/judge.py",
        "    kept = reached <= allowed or math.isclose(reached, allowed, rel_tol=1e-6)\n",
        "    kept = estimate <= allowed or math.isclose(estimate, allowed, rel_tol=1e-6)\n",
        "search/test_judge.py -k interval",
    ),
    Guard(
        "what a search for latency ends with is timed beside both ends",
        "search/find.py",
        "        if not times or times[0] <= _BOUND * min(times[1:]):\n",
        "        if True:\n",
        "search/test_quicker.py -k last_run",
    ),
    Guard(
        "an interruption of a search loses nothing that was tried",
        "search/find.py",
        '            record.ended, search.is_over = "an interruption", True\n',
        "            record.trials, record.ended = [], 'an interruption'\n",
        "search/test_find.py -k interrupted",
    ),
    Guard(
        "what a part of validation promised is validated whole before it is taken",
        "search/find.py",
        "    for step in (search.run, search.confirm):\n",
        "    for step in (search.run,):\n",
        "search/test_find.py -k promised",
    ),
    Guard(
        "an interim look decides with the confidence that several looks leave it",
        "search/judge.py",
        "    return 1 - (1 - confidence_of(look)) / len(SHARES)\n",
        "    return confidence_of(look)\n",
        "search/test_judge.py -k interim_look",
    ),
    Guard(
        "validations in which the order of batches makes a difference are not cut short",
        "callbacks/searching.py",
        "        order = order if is_indifferent(floating, part, order, names) else []\n",
        "",
        "callbacks/test_searching.py -k depends_on_its_order",
    ),
    Guard(
        "random metrics are seen",
        "measure/logged_values.py",
        "        self.draws = self.draws or self._before != _random_states()\n",
        "        pass\n",
        "callbacks/test_by_chance.py -k which_metrics",
    ),
    Guard(
        "ranges follow training batches alone",
        "callbacks/qat.py",
        "        prepared.observing = False\n",
        "        pass\n",
        "callbacks/test_qat.py -k validation",
    ),
    Guard(
        "the module gets its forward back when fit ends",
        "simulate/prepared.py",
        "                unroute(resolve(self.root, path))\n",
        "                pass\n",
        "callbacks/test_qat.py -k after_fit",
    ),
    Guard(
        "copies get their forward back too",
        "simulate/prepared.py",
        "            twin.detach()\n",
        "            pass\n",
        "callbacks/test_model_peculiarities.py -k copies",
    ),
    Guard(
        "copies move no range",
        "simulate/quantizers.py",
        "return self.control.observing and not self.is_twin",
        "return self.control.observing",
        "callbacks/test_model_peculiarities.py -k copies",
    ),
    Guard(
        "a checkpoint's ranges are taken over",
        "callbacks/qat.py",
        "            prepared.load_state_dict(self._restored)\n",
        "            pass\n",
        "callbacks/test_checkpoints.py -k resumed_run",
    ),
    Guard(
        "loaders resume where they stood",
        "callbacks/training_data.py",
        "            trainer.fit_loop._combined_loader = None\n",
        "            pass\n",
        "callbacks/test_checkpoints.py -k resumed_run",
    ),
    Guard(
        "capture draws no random number of the run",
        "capture/capture.py",
        "    with torch.random.fork_rng():\n",
        "    if True:\n",
        "callbacks/test_training_data.py -k bit_equal",
    ),
    Guard(
        "an idle callback is not routed",
        "callbacks/qat.py",
        '        if prepared.phase != "off":\n            prepared.attach()',
        "        prepared.attach()",
        "callbacks/test_idle.py",
    ),
    Guard(
        "extremes are reduced over processes",
        "calibrate/distributed.py",
        "        dist.all_reduce(reduced, operation)\n",
        "",
        "callbacks/test_distributed_training.py -k ranges_are_those",
    ),
    Guard(
        "histograms of processes are added up",
        "calibrate/distributed.py",
        "observer.load_state(merged(observer, states))",
        "observer.load_state(states[0])",
        "callbacks/test_distributed_training.py -k histograms_of_all",
    ),
    Guard(
        "metrics are merged over processes",
        "measure/evaluate.py",
        "merged(group.gather(shares.values))",
        "merged([shares.values])",
        "callbacks/test_distributed_training.py -k metrics_are_those",
    ),
    Guard(
        "repeated samples are left out",
        "measure/evaluate.py",
        "    loaders = without_repetitions(loaders, group)\n",
        "",
        "callbacks/test_distributed_training.py -k metrics_are_those",
    ),
    Guard(
        "strategies that shard are refused",
        "callbacks/base.py",
        "            refused_in_callback(refusals.check_strategy, trainer)\n",
        "",
        "callbacks/test_distributed_training.py -k shard",
    ),
    Guard(
        "calibration is float32 in any precision",
        "callbacks/training_data.py",
        "tensor.float() if tensor.is_floating_point() else tensor",
        "tensor",
        "callbacks/test_lightning_features.py -k precisions",
    ),
    Guard(
        "BatchNorm is measured anew after weight averaging",
        "callbacks/qat.py",
        'phase = "frozen" if phase == "frozen_batch_norm" and is_updating_batch_norm(trainer) else phase',
        "pass",
        "callbacks/test_other_callbacks.py -k stochastic",
    ),
    Guard(
        "metrics in float are those of the module as training left it",
        "callbacks/finish.py",
        'with attempt("the metrics of validation are"), deployment.as_trained():',
        'with attempt("the metrics of validation are"):',
        "callbacks/test_after_training.py -k compared_with_the_users_module",
    ),
    Guard(
        "statistics measured anew are the mean over processes",
        "callbacks/after_training.py",
        "    measured = {name: group.mean(value.float()).to(value.dtype) for name, value in measured.items()}\n",
        "",
        "callbacks/test_after_training.py -k mean_of_their",
    ),
    Guard(
        "what ends before rounding is calibrated",
        "callbacks/untrained.py",
        "    if callback.group.size == 1:\n",
        "    if callback.group.size == 0:\n",
        "callbacks/test_untrained.py -k quantized_as_after_training",
    ),
    Guard(
        "a second training of one module is refused",
        "callbacks/qat.py",
        "        check_trained_once(self.path, [other.path for other in others if other.prepared is not None])\n",
        "",
        "callbacks/test_other_callbacks.py -k two_trainings",
    ),
    Guard(
        "compilers do not look into routed graphs, and copies are not compiled",
        "surgery/routing.py",
        "    _forget_compiled_steps(duplicate)\n",
        "",
        "callbacks/test_model_peculiarities.py -k compiled",
    ),
    Guard(
        "parametrized layers use the rounded weight",
        "simulate/simulation.py",
        ", unparametrized(layer):",
        ":",
        "callbacks/test_model_peculiarities.py -k parametrized",
    ),
    Guard(
        "power iterations run once",
        "export/convert.py",
        "torch.random.fork_rng(devices=[]), evaluation_mode(prepared.root):\n        prepared.root(*args, **kwargs)",
        "torch.random.fork_rng(devices=[]):\n        prepared.root(*args, **kwargs)",
        "callbacks/test_model_peculiarities.py -k power",
    ),
    Guard(
        "lazy layers are refused",
        "callbacks/base.py",
        "        refusals.check_initialized(pl_module)\n",
        "",
        "callbacks/test_model_peculiarities.py -k lazy",
    ),
    Guard(
        "what no layer computes counts",
        "graph/claims.py",
        "    return rows + [_unclaimed(place",
        "    return rows or [_unclaimed(place",
        "graph/test_counting.py -k layers_count",
    ),
    Guard(
        "operators claim no more than was counted",
        "graph/claims.py",
        "min(sum(wanted), _total(left, place))",
        "sum(wanted)",
        "graph/test_claims.py -k no_more",
    ),
    Guard(
        "little coverage is said before training",
        "callbacks/announce.py",
        "    for warning in low_coverage(plan.to_dict()):\n",
        "    for warning in ():\n",
        "callbacks/test_announce.py -k before_training",
    ),
    Guard(
        "calls beside the forward are found",
        "callbacks/base.py",
        "seen.step.share, announce_beside(type(self).__name__, captured, seen.step)\n",
        "seen.step.share, ()\n",
        "callbacks/test_observe_step.py -k beside",
    ),
    Guard(
        "evaluation knows the epoch",
        "measure/validation_trainer.py",
        "    _lend_progress(trainer, evaluator)\n",
        "",
        "callbacks/test_lightning_features.py -k knows_the_epoch",
    ),
    Guard(
        "an interrupted run says how to go on",
        "callbacks/base.py",
        "        if begun and self._checkpoint is None:",
        "        if False:",
        "callbacks/test_interruptions.py -k without_checkpoints",
    ),
    Guard(
        "programs call listed operators alone",
        "runtimes/_torch_operators.py",
        """    if not _is_listed(call):
        raise ValueError(f"{call!r:.80} is no operator of a program")
""",
        "",
        "runtimes/test_torch_program.py -k not_in_the_list",
    ),
    Guard(
        "programs write into nothing",
        "runtimes/_torch_operators.py",
        "    if operator is None or operator._schema.is_mutable:\n",
        "    if operator is None:\n",
        "runtimes/test_torch_program.py -k not_in_the_list",
    ),
    Guard(
        "sizes of programs are numbers",
        "runtimes/_torch_operators.py",
        "    if not all(isinstance(value, bool | int | float) for value in values):\n",
        "    if False:\n",
        "runtimes/test_torch_program.py -k arithmetic",
    ),
    Guard(
        "what a program computes when it is opened is small",
        "runtimes/_torch_program.py",
        '        if known is not None and _is_small(step["call"], *known):\n',
        "        if known is not None:\n",
        "runtimes/test_torch_program.py -k little_memory",
    ),
    Guard(
        "each thread has a request of OpenVINO",
        "runtimes/openvino.py",
        "            request = self._requests.pop()\n",
        "            request = self._requests[0]\n",
        "calls/test_loaded.py -k threads_get and openvino",
    ),
    Guard(
        "computed weights keep their integers apart",
        "layers/layer.py",
        "            known[key] = weight, quantize(weight.detach(), scheme.storage, group_size)\n",
        "            known[key] = None, quantize(weight.detach(), scheme.storage, group_size)\n",
        "layers/test_finite.py -k computed_weight",
    ),
    Guard(
        "weights of layers are finite",
        "planned/try_layers.py",
        "    check_weights(tried)\n",
        "",
        "layers/test_finite.py -k not_finite",
    ),
    Guard(
        "dimensions of one name have one size",
        "calls/signature.py",
        "        check_named_sizes(self.inputs, tensors)\n",
        "",
        "calls/test_loaded.py -k unequal and onnxruntime",
    ),
    Guard(
        "values survive the captured type",
        "calls/call_checks.py",
        "    if not both_float and not torch.equal(converted.to(tensor.dtype), tensor):\n",
        "    if False:\n",
        "calls/test_loaded.py -k survive and onnxruntime",
    ),
    Guard(
        "a report is added to its own model alone",
        "artifact/artifact.py",
        "    return is_same_model(manifest, artifact.manifest)\n",
        "    return True\n",
        "artifact/test_folder.py -k report_is_not_added",
    ),
    Guard(
        "an error in shape propagation is no shape",
        "graph/trace.py",
        'proxy.node.meta["unknown"] = str(error)',
        'proxy.node.meta["fake"] = error',
        "graph/test_trace.py -k shape",
    ),
    Guard(
        "what calls for shapes is planned on the CPU",
        "export/prepare.py",
        "on_cpu, (args, kwargs) = on_host(model), moved_call(args, kwargs or {})",
        "on_cpu, (args, kwargs) = model, (args, kwargs or {})",
        "devices/test_functions.py -k learned",
    ),
    Guard(
        "the trial export runs on the CPU",
        "export/export.py",
        "    trial = model.on_host().for_trial()\n",
        "    trial = model.for_trial()\n",
        "devices/test_callbacks.py -k anew",
    ),
    Guard(
        "layers are tried on the CPU",
        "planned/layerwise.py",
        "source, model = model, on_host(model)",
        "source, model = model, model",
        "devices/test_functions.py -k hessians",
    ),
    Guard(
        "a call is tried where the layers are",
        "planned/layerwise.py",
        "    call = moved_call(args, kwargs or {})\n",
        "    call = Call(args, kwargs or {})\n",
        "devices/test_callbacks.py -k emulated-int8_weight_only-torch",
    ),
    Guard(
        "learned steps follow the module",
        "simulate/quantizers.py",
        "            self.learned_steps.to(device)\n",
        "            pass\n",
        "devices/test_functions.py -k learned",
    ),
    Guard(
        "ranges follow the module",
        "simulate/running.py",
        "            quantizers.to(device)\n",
        "            pass\n",
        "devices/test_functions.py -k follows_the_module",
    ),
    Guard(
        "integers are simulated in full float32",
        "simulate/running.py",
        "exact_arithmetic() if simulation",
        "nullcontext() if simulation",
        "devices/test_functions.py -k simulated_in_exact",
    ),
)


def take_out(guard: Guard, folder: Path) -> Path:
    """Return a folder with a copy of the package without one guard."""
    copy = folder / "lightning_quant"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    file = copy / guard.file
    source = file.read_text()
    if source.count(guard.code) != 1:
        raise ValueError(f"Expected {guard.file} to hold the code of {guard.name!r} once; it has changed.")
    file.write_text(source.replace(guard.code, guard.without))
    return folder


NAMES = {guard.name for guard in GUARDS}


def red_tests(package: Path, tests: str) -> list[str]:
    """Return the tests that fail, with the package of that folder in place of this one.

    The slow tests of the selection run where no ordinary one fails.
    """
    path = os.pathsep.join(entry for entry in sys.path if entry)
    # Without the working directory in front, where the whole package lies.
    environment = os.environ | {"PYTHONPATH": f"{package}{os.pathsep}{path}", "PYTHONSAFEPATH": "1"}
    where, *selection = tests.split(" ", 2)
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "-rfE", str(TESTS / where)]
    for speed in ("not slow", "slow"):
        result = subprocess.run(
            [*command, *selection, "-m", f"{speed}"],
            cwd=TESTS.parent,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        lines = [line.split(" ")[1] for line in result.stdout.splitlines() if line.startswith(("FAILED ", "ERROR "))]
        if lines:
            break
        if result.returncode not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            raise RuntimeError(result.stdout[-2000:] + result.stderr[-2000:])
    return sorted({line.rpartition("/")[2].partition("[")[0] for line in lines})


def record(guard: Guard, red: list[str]) -> None:
    """Write which tests missed a guard; several processes may do so at once."""
    with FileLock(RECORD.with_suffix(".lock")):
        recorded = {name: tests for name, tests in json.loads(RECORD.read_text()).items() if name in NAMES}
        RECORD.write_text(json.dumps(recorded | {guard.name: red}, indent=2, sort_keys=True) + "\n")


def table() -> str:
    """Return the record of the last complete run in Markdown."""
    recorded = json.loads(RECORD.read_text())
    lines = [
        "## Guards",
        "",
        "`pytest -m slow tests/test_guards.py` takes each out of a copy of the package; these tests went red:",
        "",
        "| guard | in | red without it |",
        "|---|---|---|",
    ]
    for guard in GUARDS:
        red = ", ".join(f"`{test}`" for test in recorded.get(guard.name, [])) or "not recorded"
        lines.append(f"| {guard.name} | `{guard.file}` | {red} |")
    return "\n".join(lines)
