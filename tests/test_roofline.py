"""Tests the bound on a step's time against calculations by hand."""

from dataclasses import replace

import pytest

from jaxii.distributed.mesh import make_mesh
from jaxii.planner.compiled import Figures
from jaxii.planner.hlo import Collective
from jaxii.planner.roofline import roofline, sent_bytes
from jaxii.planner.topology import CHIPS, Topology

FIGURES = Figures(
    argument_bytes=1.0,
    output_bytes=2.0,
    temporary_bytes=3.0,
    program_bytes=4.0,
    flops=197e12 * 0.010,
    hbm_bytes=819e9 * 0.030,
    collectives=(Collective(kind="all-reduce", num_bytes=175_000_000),),
)
CHIP = CHIPS["v5e"]
SLICE = Topology(
    name="v5e:2x4", chip=CHIP, sides=(2, 4), mesh=make_mesh(), hbm_bytes=None
)


def test_a_step_takes_the_longer_of_arithmetic_and_traffic_and_then_collectives():
    bound = roofline(FIGURES, SLICE)
    # Eight chips send 2 x 7/8 of the bytes, over one link of 50 GB/s per axis.
    assert bound.network_seconds == pytest.approx(2 * 7 / 8 * 175e6 / 100e9)
    assert bound.step_seconds == pytest.approx(0.030 + bound.network_seconds)
    assert bound.longest == "memory traffic"
    assert bound.efficiency == pytest.approx(0.030 / bound.step_seconds)


def test_arithmetic_can_be_what_a_step_waits_for():
    bound = roofline(replace(FIGURES, flops=197e12 * 0.050), SLICE)
    assert bound.longest == "arithmetic" and bound.step_seconds > 0.050


@pytest.mark.parametrize(
    ("sides", "links"),
    [((1, 1), 0), ((2, 4), 2), ((4, 4), 2), ((8, 16), 3), ((16, 16), 4)],
)
def test_a_ring_has_two_links_a_line_one_and_a_single_chip_none(sides, links):
    assert replace(SLICE, sides=sides).network_bandwidth == links * 50e9


def test_without_the_peaks_of_a_device_there_is_no_bound():
    assert roofline(FIGURES, replace(SLICE, chip=None)) is None


@pytest.mark.parametrize(
    ("kind", "num_bytes", "sent"),
    [
        ("all-reduce", 800, 1400),
        ("all-gather", 800, 700),
        # The result is a share of 100; every share goes to its owner.
        ("reduce-scatter", 100, 700),
        ("all-to-all", 800, 700),
        ("collective-permute", 800, 800),
    ],
)
def test_what_a_device_sends_of_each_collective(kind, num_bytes, sent):
    assert sent_bytes([Collective(kind=kind, num_bytes=num_bytes)], 8) == sent


def test_a_group_sends_among_itself_and_a_loop_each_time():
    one = Collective(kind="all-reduce", num_bytes=800, group_size=2, times=3)
    assert sent_bytes([one], 8) == 3 * 800


def test_one_device_sends_nothing():
    assert sent_bytes([Collective(kind="all-reduce", num_bytes=800)], 1) == 0.0
