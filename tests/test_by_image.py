"""The best and worst images are those of a sort of all, however they are batched."""

import numpy as np

from jaxii.metrics.by_image import MOST_SHOWN, ImageScores

NUM, CLASSES = 60, 7
RNG = np.random.default_rng(5)
# Few values: most images share their F2 with others.
F2 = RNG.integers(0, 4, NUM) / 4
NUM_TRUE = RNG.integers(1, 4, NUM)
CHOSEN = RNG.random((NUM, CLASSES)) < 0.4
PROBS = RNG.random((NUM, CLASSES)).astype(np.float32)


def scored(order, size):
    images = ImageScores(NUM)
    for start in range(0, NUM, size):
        rows = order[start : start + size]
        images.add(rows, F2[rows], NUM_TRUE[rows], CHOSEN[rows], PROBS[rows])
    return images


def test_they_are_those_of_a_sort_of_all_images():
    images = scored(np.arange(NUM), 8)
    best = sorted(range(NUM), key=lambda i: (-F2[i], -NUM_TRUE[i], i))
    worst = sorted(range(NUM), key=lambda i: (F2[i], -NUM_TRUE[i], i))
    assert [image.row for image in images.best()] == best[:MOST_SHOWN]
    assert [image.row for image in images.worst()] == worst[:MOST_SHOWN]
    np.testing.assert_array_equal(images.f2, F2)


def test_the_order_and_size_of_batches_do_not_matter():
    def rows(images):
        return [i.row for i in (*images.best(), *images.worst())]

    shuffled = np.random.default_rng(1).permutation(NUM)
    assert rows(scored(shuffled, 13)) == rows(scored(np.arange(NUM), 60))


def test_an_answer_lists_the_most_probable_label_first():
    for image in scored(np.arange(NUM), 16).best():
        assert set(image.label_ids) == set(np.flatnonzero(CHOSEN[image.row]))
        assert np.all(np.diff(PROBS[image.row, image.label_ids]) <= 0)


def test_no_image_of_a_small_split_is_both():
    images = ImageScores(5)
    rows = np.arange(5)
    images.add(rows, F2[:5], NUM_TRUE[:5], CHOSEN[:5], PROBS[:5])
    best, worst = ({i.row for i in some} for some in (images.best(), images.worst()))
    assert len(best | worst) == 5
    assert not best & worst


def test_where_nearly_all_are_perfect_the_worst_are_not_among_the_best():
    images, rows = ImageScores(200), np.arange(200)
    ones = np.ones(200, int)
    f2 = np.where(rows < 3, 0.0, 1.0)
    images.add(rows, f2, ones, np.ones((200, 1), bool), np.ones((200, 1), np.float32))
    best, worst = ([i.row for i in some] for some in (images.best(), images.worst()))
    assert len(best) == len(worst) == MOST_SHOWN
    assert worst[:3] == [0, 1, 2]
    assert not set(best) & set(worst)


def test_the_worst_are_at_most_half_of_the_images_taken():
    images, rows = ImageScores(50), np.arange(4) + 20
    images.add(rows, F2[:4], NUM_TRUE[:4], CHOSEN[:4], PROBS[:4])
    assert len(images.worst()) == len(images.best()) == 2
