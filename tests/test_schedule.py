import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxii.errors import InputError
from jaxii.objective.schedule import is_constant_zero, make_schedule, warmup_cosine


def values(schedule, steps):
    return [float(schedule(step)) for step in steps]


def test_a_number_is_constant():
    assert values(make_schedule(0.5, 10), (0, 7, 100)) == [0.5, 0.5, 0.5]


def test_an_integer_number_gives_float32():
    assert make_schedule(1, 10)(3).dtype == jnp.float32


def test_between_pairs_it_is_linear():
    schedule = make_schedule(((0.0, 1.0), (1.0, 0.0)), 10)
    expected = [1 - step / 10 for step in range(11)]
    np.testing.assert_allclose(values(schedule, range(11)), expected, atol=1e-7)


def test_before_the_first_and_after_the_last_pair_it_is_constant():
    schedule = make_schedule([(0.2, 3.0), (0.4, 5.0)], 10)
    assert values(schedule, (0, 1, 2, 3, 4, 5, 50)) == [3, 3, 3, 4, 5, 5, 5]


@pytest.mark.parametrize("share", [0.1, 0.3, 0.6, 0.7, 0.9])
@pytest.mark.parametrize("num_steps", [10, 70, 1000, 600_000])
def test_a_jump_happens_at_its_step_and_not_before(share, num_steps):
    schedule = make_schedule(((share, 1.0), (share, 0.0)), num_steps)
    at = round(share * num_steps)
    assert values(schedule, (at - 1, at, at + 1)) == [1.0, 0.0, 0.0]


def test_a_ramp_may_be_shorter_than_a_step():
    assert values(make_schedule(((0.375, 0.0), (0.625, 4.0)), 2), (0, 1, 2)) == [
        0,
        2,
        4,
    ]


def test_a_share_of_seven_digits_jumps_at_the_step_that_it_rounds_to():
    schedule = make_schedule(((0.1428572, 1.0), (0.1428572, 0.0)), 7)
    assert values(schedule, (0, 1, 2)) == [1.0, 0.0, 0.0]


def test_a_jump_at_the_start_takes_the_second_value():
    assert float(make_schedule(((0.0, 1.0), (0.0, 2.0)), 10)(0)) == 2.0


def test_a_swap_of_two_weights_adds_up_to_one():
    down = make_schedule(((0.2, 1.0), (0.7, 0.0)), 37)
    up = make_schedule(((0.2, 0.0), (0.7, 1.0)), 37)
    total = np.add(values(down, range(38)), values(up, range(38)))
    np.testing.assert_allclose(total, 1.0, atol=1e-6)
    assert min(values(down, range(38))) >= 0.0


def test_it_equals_numpy_interpolation():
    pairs = ((0.0, 0.1), (0.13, 2.0), (0.5, 0.0), (0.9, 4.0))
    schedule = jax.vmap(make_schedule(pairs, 211))
    shares, heights = zip(*pairs, strict=True)
    steps = np.arange(250)
    expected = np.interp(steps / 211, shares, heights)
    actual = schedule(jnp.asarray(steps, jnp.int32))
    np.testing.assert_allclose(actual, expected, atol=1e-6)


@pytest.mark.parametrize(
    "make",
    [
        lambda: make_schedule(((0.1, 1.0), (0.5, 0.0), (0.5, 2.0)), 10),
        lambda: make_schedule(0.5, 10),
        lambda: warmup_cosine(0.1, 3, 10),
        lambda: warmup_cosine(0.1, 0, 10),
    ],
)
def test_a_traced_step_compiles_once_and_gives_a_float32_scalar(make):
    schedule, traces = make(), []

    @jax.jit
    def compiled(step):
        traces.append(step)
        return schedule(step)

    for step in range(12):
        value = compiled(jnp.int32(step))
        assert value.dtype == jnp.float32
        assert value.shape == ()
        # 1 + cos cancels near the end, so the scale of the comparison is the peak, 0.1.
        np.testing.assert_allclose(value, schedule(step), rtol=1e-6, atol=1e-8)
    assert len(traces) == 1


@pytest.mark.parametrize(
    "spec",
    [
        "0.5",
        None,
        True,
        (),
        [],
        {0.0: 1.0},
        (0.0, 1.0),
        ((0.0,),),
        ((0.0, "a"),),
        ("01",),
        ((0.0, True),),
        ((-0.1, 1.0),),
        ((1.5, 1.0),),
        ((math.nan, 1.0),),
        math.nan,
        math.inf,
        -1.0,
        ((0.0, 1.0), (0.5, -1.0)),
        ((0.5, 1.0), (0.2, 0.0)),
        ((0.5, 1.0), (0.5, 2.0), (0.5, 3.0)),
    ],
    ids=repr,
)
def test_a_bad_spec_is_refused_in_one_line_that_names_the_field(spec):
    for parse in (
        lambda: make_schedule(spec, 10, name="terms.bce.weight"),
        lambda: is_constant_zero(spec, name="terms.bce.weight"),
    ):
        with pytest.raises(InputError, match=r"terms\.bce\.weight") as caught:
            parse()
        assert "\n" not in str(caught.value)


def test_a_stage_without_steps_is_refused_and_one_of_a_step_is_not():
    with pytest.raises(InputError, match="num_steps"):
        make_schedule(1.0, 0)
    assert values(make_schedule(((0.0, 1.0), (1.0, 3.0)), 1), (0, 1)) == [1.0, 3.0]


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (0, True),
        (0.0, True),
        (1e-9, False),
        (((0.0, 0.0), (1.0, 0.0)), True),
        (((0.0, 0.0), (0.5, 0.0), (0.5, 1.0)), False),
    ],
)
def test_constant_zero_means_zero_at_every_step(spec, expected):
    assert is_constant_zero(spec) is expected


def test_warm_up_is_linear_and_reaches_the_peak_at_its_last_step():
    schedule = warmup_cosine(0.8, 3, 10)
    np.testing.assert_allclose(values(schedule, range(4)), [0.2, 0.4, 0.6, 0.8])


def test_after_the_warm_up_it_is_half_a_cosine():
    schedule = warmup_cosine(1.0, 2, 10)
    expected = [(1 + math.cos(math.pi * (step - 2) / 8)) / 2 for step in range(2, 11)]
    found = values(schedule, range(2, 11))
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)


def test_after_the_end_the_rate_stays():
    assert float(warmup_cosine(1.0, 2, 10)(99)) == 0.0


def test_without_warm_up_it_starts_at_the_peak():
    assert float(warmup_cosine(0.3, 0, 10)(0)) == pytest.approx(0.3)


@pytest.mark.parametrize(
    "arguments",
    [
        (0.0, 1, 10),
        (-0.1, 1, 10),
        (math.nan, 1, 10),
        (math.inf, 1, 10),
        (0.1, 10, 10),
        (0.1, -1, 10),
        (0.1, 0, 0),
    ],
    ids=repr,
)
def test_a_learning_rate_outside_its_range_is_refused(arguments):
    with pytest.raises(InputError):
        warmup_cosine(*arguments)
