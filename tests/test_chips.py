"""Chips and slices: what there is, and what a person who asks for another is told."""

import pytest

from jaxii.errors import InputError
from jaxii.planner.chips import CHIPS, parse, peak_flops


def test_a_slice_is_a_chip_and_its_sides():
    assert parse("v5e:16x16") == (CHIPS["v5e"], (16, 16))
    assert parse("v4:2x2x1") == (CHIPS["v4"], (2, 2, 1))


@pytest.mark.parametrize(
    ("given", "pattern"),
    [
        ("v5e:4x5", "v5e:4x4, v5e:4x8.*the nearest is v5e:4x"),
        # The compiler aborts the process for one that is too large.
        ("v5e:32x32", "v5e:16x16"),
        ("v5e:4x4x4", "v5e:4x4"),
        ("v5e-16", "use local or .*v5e:16x16.*v6e:1x1"),
        ("v7:2x2", "v4:2x2x1.*v5p.*v6e"),
        ("", "use local or "),
    ],
)
def test_an_unknown_slice_is_refused_with_those_there_are(given, pattern):
    with pytest.raises(
        InputError, match=f"--topology={given} is not a slice.*{pattern}"
    ):
        parse(given)


def test_a_plane_is_a_ring_only_along_a_side_of_16():
    chip = CHIPS["v6e"]
    assert [chip.wraps((8, 16), axis) for axis in range(2)] == [False, True]


def test_a_cube_is_a_ring_along_every_side_if_all_are_whole():
    chip = CHIPS["v5p"]
    assert all(chip.wraps((4, 4, 8), axis) for axis in range(3))
    assert not any(chip.wraps((2, 4, 4), axis) for axis in range(3))


@pytest.mark.parametrize(
    ("device_kind", "flops"),
    [
        ("TPU v5 lite", 197e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", None),
        ("cpu", None),
    ],
)
def test_a_device_has_the_peak_of_its_kind_or_none_that_is_known(device_kind, flops):
    assert peak_flops(device_kind) == flops
