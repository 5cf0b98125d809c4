"""Cases of ordinary tests that run with the slow ones: like a sibling that stays, on what takes longer."""

from fnmatch import fnmatchcase

# A callback that does nothing while training meets what happens there in a few of these; the other meets all.
_PTQ = "[[]PostTrainingQuantization-"
SLOW_CASES = (
    f"test_lightning_features.py::test_flags{_PTQ}*",
    f"test_other_callbacks.py::test_*{_PTQ}*ours-first]",
    "test_other_callbacks.py::test_batch_size_finder*ours-last]",
    # Compilers: one net each stays.
    "test_contract.py::*[[]inductor-multi_modal]",
    "test_contract.py::*[[]executorch-[mp][uo]*]",
    "test_contract.py::test_loaded_artifact_is_called_like_the_module[[]executorch-mlp]",
    "test_contract.py::test_report_is_made_of_every_runtime[[]inductor]",
    "test_contract.py::test_same_model_again_is_the_same_file[[][ei]*]",
    "test_standalone.py::test_lines_of_every_runtime_run_the_model_where_the_package_is_not_installed[[]executorch]",
    "test_grid.py::test_symmetric_activations_run_in_integers_as_simulated[[]executorch-*]",
    "test_forged_files.py::test_some_forged_*[[]*-layers]",
    "test_only_if_needed.py::test_a_resumed_run_knows_what_was_decided",
    "test_compilation.py::test_each_phase_is_one_graph_with_the_numbers_of_the_module_as_it_is[[]aot_eager]",
    # Half precision: float16 stays; steps of an end that fail: one callback each.
    "test_layer_recipes.py::test_contract[[]bfloat16-torch]",
    "test_openvino_weights.py::test_artifact_computes_what_the_layers_in_memory_do*bfloat16*",
    "test_openvino_weights.py::test_artifact_computes_what_the_layers_in_memory_do[[]bert-float16*",
    "test_openvino_weights.py::test_artifact_computes_what_the_layers_in_memory_do[[]gpt2-int8*",
    "test_openvino_weights.py::test_integers_of_recurrent_layers[[]rnn-int8*",
    "test_openvino_weights.py::test_integers_of_recurrent_layers[[][gl][rs][ut]*-int8]",
    "test_layer_recipes.py::test_contract[[]int4_weight_only-torch]",
    "test_layer_recipes.py::test_contract[[]float16-torch]",
    "test_stored_in_graphs.py::test_files_are_small_and_near_to_float[[]encoder-onnxruntime]",
    "test_allowances.py::test_exports[[]decoder-int8_dynamic-onnxruntime]",
    "test_random_nets.py::test_random_nets_on_other_runtimes[[]torch]",
    # A choice of runtimes when fit begins, and statistics that are kept: one of two stays.
    f"test_runtime_choice.py::test_callbacks_choose_when_fit_begins*{_PTQ[:-1]}]",
    "test_after_training.py::test_statistics_are_kept_where_the_loss_on_other_batches_is_less[[]True]",
    f"test_interruptions.py::test_failing_stage{_PTQ}*-new]",
    "test_interruptions.py::test_failing_stage[[]Quant*-export-old]",
    "test_interruptions.py::test_failing_stage[[]Quant*-make_report-new]",
    # A deep network: the engine that most use stays.
    "test_parity.py::test_deep_network_is_as_far_from_its_artifact_as_tipped_ties_can_bring_it[[][ot][!n]*]",
    # Fresh processes: being killed, one process that fails in a group, one spelling of the import stay.
    "test_commit.py::test_crash_at_any_point_leaves_the_old_artifact_or_the_new_one[[][!k]*]",
    "test_shorthand.py::test_lightning_cli_knows_the_callbacks_by_their_bare_names[[]from *]",
    "test_decomposed.py::test_a_pytorch_without_them_exports_the_same",
    "test_examples.py::test_audio_transformer_from_its_checkpoint[[]quantized0]",
    # Recipes of layers: of each scheme one engine stays, and of what is forged, one format.
    "test_layer_recipes.py::test_contract[[]int4_weight_only-onnxruntime]",
    "test_layer_recipes.py::test_contract[[]int4_weight_only_gptq-torch]",
    "test_layer_recipes.py::test_contract[[]int8_dynamic-torch]",
    "test_packed.py::test_packed_sequences[[]*-float16-torch]",
    "test_packed.py::test_packed_sequences[[]*-int4_weight_only-torch]",
    "test_packed.py::test_packed_sequences[[]*-int8_dynamic-torch]",
    "test_packed.py::test_projected_states_at_other_lengths[[]torch]",
    "test_packed.py::test_states_of_packed_sequences_keep_their_order[[]GRU]",
    "test_ptq_layers.py::test_lstm_classifier[[]int[48]_*-torch]",
    "test_stored_in_graphs.py::test_files_are_small_and_near_to_float[[]tables-onnxruntime]",
    "test_openvino_weights.py::test_artifact_computes_what_the_layers_in_memory_do[[]bert-int8*",
    "test_forged_files.py::test_some_forged_files[[][ot][po]*]",
    "test_contract.py::test_signature_of_another_model_is_refused[[]inductor]",
    "test_contract.py::test_what_cannot_be_exported_is_refused_before_training[[]openvino]",
    "test_model_peculiarities.py::test_compiled_modules[[]Quant*-whole]",
    "test_onnx_export.py::test_modules_that_differ_*[[][rp]*]",
    "test_onnx_moves.py::test_integers_are_moved[[]torch]",
    "test_prepare.py::test_before_quantizing_the_output_is_the_float_one_to_the_bit[[]off]",
    "test_standalone.py::test_lines_of_every_runtime_run_the_model_where_the_package_is_not_installed[[]torch]",
    "test_float_weights.py::test_all_of_them_run_in_integers[[]onnxruntime]",
    "test_grid.py::test_training_rounds_to_the_grid[[]wide]",
    "test_grid.py::test_sixteen_bits_run_on_onnx_runtime_as_simulated[[]*symmetric]",
    f"test_pickling.py::test_*{_PTQ[:-1]}]",
    f"test_lightning_features.py::test_max_time{_PTQ[:-1]}]",
    "test_subclasses.py::test_converted_parts_keep_class_and_attributes[[]torch]",
    "test_pipeline.py::test_several_parts_that_read_one_tensor[[]openvino]",
    "test_torch.py::test_recurrent_layer_that_stays_float_gets_the_artifacts_weights[[]LSTM]",
    "test_openvino_graph.py::test_reduction_is_what_was_simulated[[]mean over tokens]",
    "test_openvino_sums.py::test_sum_in_float_is_what_was_simulated[[]behind ReLU]",
    "test_by_chance.py::test_the_report_says_which_metrics_are_random_and_how_much[[]python]",
    "test_quantize_command.py::test_limits_in_yaml_are_those_of_the_command_line",
    # What makes the same exports again: one net, one way into a search stay.
    "test_contract.py::*[[]executorch-residual]",
    "test_loaded.py::*[[]inductor*",
    "test_searching.py::test_training_through_rounding_is_searched_with_its_own_ranges",
    "test_runtime_choice.py::test_a_resumed_run_goes_on_with_the_runtime_that_has_its_ranges",
    "test_decomposed.py::test_what_loads_those_of_pytorch_later_is_not_in_the_way",
    "test_layer_recipes.py::test_contract[[]int8_weight_only_gptq-torch]",
    "test_openvino_weights.py::test_artifact_computes_what_the_layers_in_memory_do[[]gpt2-float16*",
    "test_interruptions.py::test_failing_stage[[]Quant*-_metrics-new]",
    "test_working_part.py::test_callbacks_name_it_before_training[[]Quant*",
    "test_sweeping.py::test_an_interruption_at_the_end_keeps_what_is_made",
    "test_only_if_needed.py::test_weights_of_the_trial_are_exported_where_the_last_miss_the_limit",
    # The code of one page, one engine whose compiler starts, one fresh process of every kind stay.
    "test_examples.py::test_quickstart_loses_at_most_two_images_and_runs_in_integers",
    "test_cli.py::test_commands_of_the_page_run_one_after_the_other",
    "test_torch.py::test_same_outputs_in_a_fresh_process",
    "test_contract.py::test_what_cannot_be_exported_is_refused_before_training[[]inductor]",
    "test_contract.py::test_report_is_made_of_every_runtime[[]executorch]",
)


def is_slow(node: str) -> bool:
    """Tell whether a test, by its id, is one of the slow cases."""
    return any(fnmatchcase(node.rpartition("/")[2], case) for case in SLOW_CASES)
