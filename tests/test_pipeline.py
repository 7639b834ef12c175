"""Tests order, shards of processes, padding and slots of the input pipeline."""

import cv2
import numpy as np
import pytest

from jaxii.config import MOST_LABELS
from jaxii.data import batching
from jaxii.data.pipeline import (
    LabelPolicy,
    Reordered,
    ShardSpec,
    eval_batches,
    train_batches,
)
from jaxii.data.transforms import EvalTransform, TrainTransform
from jaxii.errors import InputError

SIZE = 16
POLICY = LabelPolicy(num_slots=4)


def jpeg(value):
    pixels = np.full((24, 24, 3), value, np.uint8)
    return cv2.imencode(".png", pixels)[1].tobytes()


class Source:
    """Images and labels that encode their index."""

    def __init__(self, length):
        self.images = [jpeg(i) for i in range(length)]

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return {
            "image": self.images[index],
            "image_id": f"id-{index}",
            "label_ids": np.array([index % 7, 3], np.int32),
            "label_confidences": np.array([1.0, 0.25], np.float32),
            "label_sources": np.array([0, 1], np.uint8),
            "slice_id": index % 2,
        }


def train(length, *, shard, steps, start=0, seed=0, transform=None):
    batches = train_batches(
        Source(length),
        transform=transform or TrainTransform(size_pixels=SIZE),
        policy=POLICY,
        shard=shard,
        seed=seed,
        start_example=start,
    )
    return [next(batches) for _ in range(steps)]


def rows(batches):
    return [index for batch in batches for index in batch["index"].tolist()]


def test_an_epoch_is_every_record_once_over_all_processes():
    shards = [
        ShardSpec(global_batch_size=8, process_index=p, process_count=4)
        for p in range(4)
    ]
    seen = [r for shard in shards for r in rows(train(40, shard=shard, steps=5))]
    assert sorted(seen) == list(range(40))


def test_each_process_sees_other_examples_in_another_epoch():
    shard = ShardSpec(global_batch_size=8, process_index=0, process_count=4)
    batches = train(40, shard=shard, steps=10)
    assert set(rows(batches[:5])) != set(rows(batches[5:]))


def test_epochs_differ_in_order():
    batches = train(40, shard=ShardSpec(global_batch_size=8), steps=10)
    first, second = rows(batches[:5]), rows(batches[5:])
    assert sorted(first) == sorted(second)
    assert first != second


def test_starting_in_the_middle_gives_the_same_batches_bit_for_bit():
    shard = ShardSpec(global_batch_size=8)
    whole = train(40, shard=shard, steps=7)
    rest = train(40, shard=shard, steps=3, start=4 * 8)
    for a, b in zip(whole[4:], rest, strict=True):
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


@pytest.mark.parametrize("num_threads", [1, 3, 16])
@pytest.mark.parametrize("block", [1, 3, 64])
def test_threads_and_blocks_do_not_change_the_batches(monkeypatch, num_threads, block):
    want = train(40, shard=ShardSpec(global_batch_size=10), steps=5)
    monkeypatch.setattr(batching, "BLOCK_EXAMPLES", block)
    shard = ShardSpec(global_batch_size=10, num_threads=num_threads)
    got = train(40, shard=shard, steps=5)
    for a, b in zip(want, got, strict=True):
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


def test_positions_count_the_examples_of_the_run():
    shard = ShardSpec(global_batch_size=8, process_index=1, process_count=4)
    first, second = train(40, shard=shard, steps=2, start=80)
    assert first["positions"].tolist() == [82, 83]
    assert second["positions"].tolist() == [90, 91]


def test_positions_wrap_where_int32_ends():
    shard = ShardSpec(global_batch_size=4)
    (batch,) = train(40, shard=shard, steps=1, start=2**31 - 2)
    assert batch["positions"].tolist() == [2**31 - 2, 2**31 - 1, 0, 1]


def test_a_training_batch_is_real_images_with_their_own_labels_and_slices():
    (batch,) = train(40, shard=ShardSpec(global_batch_size=8), steps=1)
    rows = batch["index"]
    np.testing.assert_array_equal(batch["mask"], np.ones(8, np.float32))
    np.testing.assert_array_equal(batch["label_ids"][:, 0], rows % 7)
    np.testing.assert_array_equal(batch["slice_ids"], rows % 2)


def test_the_batches_of_several_processes_one_after_another_are_that_of_one():
    parts = [
        train(
            40,
            shard=ShardSpec(global_batch_size=8, process_index=p, process_count=4),
            steps=2,
        )
        for p in range(4)
    ]
    whole = train(40, shard=ShardSpec(global_batch_size=8), steps=2)
    for step, batch in enumerate(whole):
        for name, array in batch.items():
            joined = np.concatenate([part[step][name] for part in parts])
            np.testing.assert_array_equal(joined, array)


def test_another_seed_gives_another_order():
    shard = ShardSpec(global_batch_size=8)
    assert rows(train(40, shard=shard, steps=5)) != rows(
        train(40, shard=shard, steps=5, seed=1)
    )


def evaluate(length, *, processes=1, batch=8):
    return [
        list(
            eval_batches(
                Source(length),
                transform=EvalTransform(size_pixels=SIZE),
                policy=POLICY,
                shard=ShardSpec(
                    global_batch_size=batch, process_index=p, process_count=processes
                ),
            )
        )
        for p in range(processes)
    ]


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_evaluation_sees_thirteen_images_once_for_any_number_of_processes(processes):
    batches = [b for process in evaluate(13, processes=processes) for b in process]
    assert sorted(r for r in rows(batches) if r >= 0) == list(range(13))
    masks = np.concatenate([b["mask"] for b in batches])
    np.testing.assert_array_equal(
        masks > 0, np.concatenate([b["index"] for b in batches]) >= 0
    )


def test_every_process_gets_as_many_evaluation_batches():
    lengths = {len(process) for process in evaluate(13, processes=4)}
    assert lengths == {2}


def test_pixels_belong_to_their_row():
    (batches,) = evaluate(13)
    for batch in batches:
        for pixels, row, mask in zip(
            batch["images"], batch["index"], batch["mask"], strict=True
        ):
            assert (pixels == (row if mask else 0)).all()


def test_a_damaged_image_is_masked_when_asked_and_raises_otherwise():
    source = Source(3)
    source.images[1] = b"no image"
    shard = ShardSpec(global_batch_size=3)
    kwargs = {
        "transform": EvalTransform(size_pixels=SIZE),
        "policy": POLICY,
        "shard": shard,
    }
    (batch,) = eval_batches(source, mask_damaged=True, **kwargs)
    assert batch["mask"].tolist() == [1.0, 0.0, 1.0]
    assert batch["index"].tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="image"):
        list(eval_batches(source, **kwargs))


def test_a_damaged_image_is_refused_with_its_id_and_split():
    source = Source(3)
    source.images[1] = b"no image"
    shard = ShardSpec(global_batch_size=3)
    kwargs = {"policy": POLICY, "shard": shard, "name": "split train"}
    trained = train_batches(
        source, transform=TrainTransform(size_pixels=SIZE), seed=0, **kwargs
    )
    evaluated = eval_batches(
        source, transform=EvalTransform(size_pixels=SIZE), **kwargs
    )
    for batches in (trained, evaluated):
        with pytest.raises(
            InputError,
            match=r"split train: image id-1 cannot be decoded \(.+\); restore",
        ):
            next(batches)


def test_machine_labels_are_ignored_unless_asked_for():
    record = Source(2)[0]
    ids, confidences = POLICY.slots(record)
    assert ids.tolist() == [0, -1, -1, -1]
    soft = LabelPolicy(num_slots=4, machine_labels="soft")
    ids, confidences = soft.slots(record)
    assert ids.tolist() == [0, 3, -1, -1]
    assert confidences.tolist() == [1.0, 0.25, 0.0, 0.0]


def test_by_default_a_thresholded_machine_label_counts_from_one_half_on():
    record = {
        "label_ids": np.array([0, 1], np.int32),
        "label_confidences": np.array([0.5, 0.49], np.float32),
        "label_sources": np.ones(2, np.uint8),
    }
    policy = LabelPolicy(num_slots=2, machine_labels="thresholded")
    assert policy.slots(record)[0].tolist() == [0, -1]


def test_the_least_confident_labels_are_cut():
    record = {
        "label_ids": np.arange(3, dtype=np.int32),
        "label_confidences": np.array([0.2, 1.0, 0.9], np.float32),
        "label_sources": np.array([1, 0, 1], np.uint8),
    }
    ids, _ = LabelPolicy(num_slots=2, machine_labels="soft").slots(record)
    assert sorted(ids.tolist()) == [1, 2]


def test_labels_of_a_full_size_vocabulary_send_less_than_a_kilobyte_an_image():
    policy = LabelPolicy(num_slots=MOST_LABELS)
    (batch,) = eval_batches(
        Source(8),
        transform=EvalTransform(size_pixels=224),
        policy=policy,
        shard=ShardSpec(global_batch_size=8),
    )
    beyond = sum(v.nbytes for k, v in batch.items() if k not in ("images", "index"))
    assert beyond / 8 <= 1024


def test_verified_absences_are_cut_before_labels_that_are_present():
    record = {
        "label_ids": np.arange(5, dtype=np.int32),
        "label_confidences": np.array([0.0, 0.0, 1.0, 0.3, 1.0], np.float32),
        "label_sources": np.array([0, 0, 0, 1, 0], np.uint8),
    }
    ids, _ = LabelPolicy(num_slots=3, machine_labels="soft").slots(record)
    assert sorted(ids.tolist()) == [2, 3, 4]


def test_a_record_that_is_not_scored_has_mask_0_and_its_own_index():
    (batch,) = eval_batches(
        Source(3),
        transform=EvalTransform(size_pixels=SIZE),
        policy=POLICY,
        shard=ShardSpec(global_batch_size=4),
        scored=np.array([True, False, True]),
    )
    assert batch["mask"].tolist() == [1.0, 0.0, 1.0, 0.0]
    assert batch["index"].tolist() == [0, 1, 2, -1]
    assert (batch["images"][1] == 1).all()


def test_padding_has_no_label_and_is_black():
    ((batch,),) = evaluate(3, batch=4)
    assert batch["label_ids"][3].tolist() == [-1] * 4
    assert batch["label_confidences"][3].tolist() == [0.0] * 4
    assert (batch["index"][3], batch["mask"][3], batch["slice_ids"][3]) == (-1, 0, 0)
    assert not batch["images"][3].any()


def test_a_padded_batch_has_the_types_of_a_full_one():
    ((padded,),), ((full,),) = evaluate(3, batch=4), evaluate(4, batch=4)
    types = [{name: x.dtype for name, x in batch.items()} for batch in (padded, full)]
    assert types[0] == types[1]
    assert types[0]["label_ids"] == np.int32


def test_a_batch_of_padding_alone_has_the_types_of_a_full_one():
    # The batch of the second of two processes, with one image for both.
    first, second = evaluate(1, batch=2, processes=2)
    types = [
        {name: x.dtype for name, x in batch.items()} for (batch,) in (first, second)
    ]
    assert second[0]["mask"].tolist() == [0.0]
    assert types[0] == types[1]


def test_of_equally_sure_labels_those_of_lower_id_fill_the_slots():
    record = {
        "label_ids": np.array([6, 2, 4], np.int32),
        "label_confidences": np.array([0.5, 0.5, 0.9], np.float32),
        "label_sources": np.zeros(3, np.uint8),
    }
    for num_slots, kept in ((1, [4]), (2, [4, 2]), (3, [2, 4, 6])):
        assert LabelPolicy(num_slots=num_slots).slots(record)[0].tolist() == kept


def test_a_source_in_another_order_has_the_rows_that_are_named():
    source = Reordered(Source(5), np.array([4, 0, 0]))
    assert len(source) == 3
    labels = [int(source[row]["label_ids"][0]) for row in range(3)]
    assert labels == [4, 0, 0]
