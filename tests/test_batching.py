"""Tests that threads fill batches without overwriting those still referenced."""

import jax
import numpy as np
import pytest

from jaxii.data.batching import Memory, batches

SHAPE = (4, 64, 64, 3)


def numbered(number):
    return {"value": np.full(SHAPE[1:], number % 251, np.uint8), "number": number}


def some(num_batches):
    return batches(
        numbered, num_batches=num_batches, batch_size=SHAPE[0], num_threads=3
    )


def test_a_batch_that_is_kept_keeps_its_values():
    kept = list(some(40))
    for batch, fields in enumerate(kept):
        numbers = np.arange(4 * batch, 4 * batch + 4)
        np.testing.assert_array_equal(fields["number"], numbers)
        want = np.broadcast_to(numbers[:, None, None, None] % 251, SHAPE)
        np.testing.assert_array_equal(fields["value"], want)


def test_the_memory_of_batches_that_are_gone_is_used_again():
    places = {batch["value"].ctypes.data for batch in some(200)}
    # Two batches are ready, one is being made, one is in use and one is about to be.
    assert len(places) <= 6


@pytest.mark.parametrize(
    "refer",
    [
        lambda array: array[1:][0],
        lambda array: array.reshape(-1).view(np.int8),
        lambda array: np.asarray(memoryview(array)),
        jax.device_put,
        lambda array: jax.device_put(array[1:]),
    ],
    ids=["view of a view", "other shape and type", "buffer", "jax", "part in jax"],
)
def test_memory_is_not_used_again_while_something_refers_to_it(refer):
    memory = Memory(SHAPE, np.dtype(np.uint8))
    array = memory.array()
    array[:] = 1
    reference = refer(array)
    del array
    for _ in range(3):
        other = memory.array()
        other[:] = 2
    assert (np.asarray(reference) == 1).all()


def test_an_example_without_a_field_of_the_others_is_an_error():
    def example(number):
        return {"a": np.int32(number)} | ({"b": np.int32(1)} if number < 5 else {})

    made = batches(example, num_batches=3, batch_size=4, num_threads=1)
    with pytest.raises(KeyError, match="b"):
        list(made)


def test_an_example_of_another_shape_is_not_repeated_to_fill_its_row():
    def example(number):
        return {"a": np.zeros((8, 8) if number < 5 else (1, 8), np.uint8)}

    made = batches(example, num_batches=3, batch_size=4, num_threads=1)
    with pytest.raises(ValueError, match=r"a has shape \(1, 8\); .* \(8, 8\)"):
        list(made)
