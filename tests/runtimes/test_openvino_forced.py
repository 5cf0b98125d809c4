"""Single operators of a file run on given integers in OpenVINO."""

from pathlib import Path

from forced_operators import check_forced


def test_operators_of_openvino_get_what_is_given_in_place_of_what_the_one_before_computes(tmp_path: Path) -> None:
    check_forced("openvino", tmp_path)
