"""The largest batch that fits, found on memory that is made up."""

import pytest

from jaxii.planner.fit import largest_batch


class Compiler:
    """Memory of a fixed part and a part an image; refuses above a limit."""

    def __init__(self, fixed, each, limit):
        self.fixed, self.each, self.limit, self.asked = fixed, each, limit, []

    def __call__(self, size):
        self.asked.append(size)
        total = self.fixed + self.each * size
        return total if total <= self.limit else None


def test_memory_on_a_line_takes_three_compiles():
    compiler = Compiler(fixed=1000, each=10, limit=5000)
    found = largest_batch(compiler, start=128, hbm_bytes=5000)
    assert found.device_batch_size == 400 and found.total_bytes == 5000
    assert found.fitted == (64, 128) and found.refused == ()
    assert compiler.asked == [128, 64, 400]


def test_what_the_compiler_refuses_is_no_answer():
    # It has less room than it should.
    compiler = Compiler(fixed=1000, each=10, limit=4700)
    found = largest_batch(compiler, start=128, hbm_bytes=5000)
    assert found.refused == (400,)
    assert found.device_batch_size == 344 and compiler(344) is not None


def test_a_start_that_does_not_fit_is_halved_until_it_does():
    compiler = Compiler(fixed=1000, each=10, limit=2000)
    found = largest_batch(compiler, start=512, hbm_bytes=2000)
    assert found.device_batch_size == 96 and found.refused == (512, 256, 128)


def test_a_start_that_is_the_largest_is_the_answer():
    compiler = Compiler(fixed=1000, each=10, limit=2280)
    found = largest_batch(compiler, start=128, hbm_bytes=2280)
    assert found.device_batch_size == 128 and compiler.asked == [128, 64]


def test_what_is_tried_divides_over_micro_batches():
    compiler = Compiler(fixed=1000, each=10, limit=5000)
    found = largest_batch(compiler, start=96, hbm_bytes=5000, micro_batches=3)
    assert found.device_batch_size == 384
    assert all(size % 3 == 0 for size in compiler.asked)


@pytest.mark.parametrize("start", [1, 2])
def test_no_batch_fits_where_one_image_does_not(start):
    assert largest_batch(Compiler(100, 1, 50), start=start, hbm_bytes=50) is None


def test_one_image_is_compared_with_two():
    found = largest_batch(Compiler(100, 10, 125), start=1, hbm_bytes=125)
    assert found.device_batch_size == 2
    found = largest_batch(Compiler(100, 10, 115), start=1, hbm_bytes=115)
    assert found.device_batch_size == 1 and found.refused == (2,)
