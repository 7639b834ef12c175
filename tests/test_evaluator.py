"""Tests that evaluating a split on eight devices equals a loop over its images."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import log_loss

from jaxii.decoding.thresholds import choose, f2_by_threshold
from jaxii.distributed.mesh import make_mesh
from jaxii.evaluation.evaluator import Evaluator
from jaxii.evaluation.predictor import Model, make_predict
from jaxii.models.multitask import Outputs

NUM_IMAGES, NUM_CLASSES, SIDE, BATCH = 13, 5, 4, 8
THRESHOLDS = (0.2, 0.5, 0.8)
PARAMS = {
    "classifier": np.random.default_rng(7).normal(0, 4, (3, NUM_CLASSES)),
    "embedding": np.random.default_rng(8).normal(0, 1, (3, 2)),
}
PARAMS = jax.tree.map(lambda x: x.astype(np.float32), PARAMS)
VECTORS = np.random.default_rng(9).normal(0, 1, (NUM_CLASSES, 2)).astype(np.float32)


def apply(params, batch_stats, images, *, train, key):
    """A network of one layer on the mean colour."""
    assert not train
    features = jnp.mean(images.astype(jnp.float32), axis=(1, 2)) / 255 - 0.5
    outputs = Outputs(
        logits=features @ params["classifier"],
        embedding=features @ params["embedding"],
        features=features,
    )
    return outputs, batch_stats


def headless(params, batch_stats, images, *, train, key):
    outputs, batch_stats = apply(params, batch_stats, images, train=train, key=key)
    return outputs._replace(embedding=None), batch_stats


def split():
    """Returns images, (label, confidence) pairs and slices of 13 images."""
    rng = np.random.default_rng(3)
    images = rng.integers(0, 256, (NUM_IMAGES, 1, 1, 3), np.uint8)
    images = np.broadcast_to(images, (NUM_IMAGES, SIDE, SIDE, 3))
    labels = []
    for _ in range(NUM_IMAGES):
        ids = rng.choice(NUM_CLASSES, rng.integers(0, 4), replace=False)
        labels.append([(int(i), float(rng.random() < 0.7)) for i in ids])
    return images, labels, rng.integers(0, 2, NUM_IMAGES).astype(np.int32)


def batches():
    images, labels, slice_ids = split()
    for start in range(0, NUM_IMAGES, BATCH):
        rows = range(start, min(start + BATCH, NUM_IMAGES))
        batch = {
            "images": np.zeros((BATCH, SIDE, SIDE, 3), np.uint8),
            "label_ids": np.full((BATCH, 4), -1, np.int32),
            "label_confidences": np.zeros((BATCH, 4), np.float32),
            "mask": np.zeros(BATCH, np.float32),
            "slice_ids": np.zeros(BATCH, np.int32),
            "index": np.full(BATCH, -1, np.int32),
        }
        for i, row in enumerate(rows):
            batch["images"][i] = images[row]
            for slot, (label, confidence) in enumerate(labels[row]):
                batch["label_ids"][i, slot] = label
                batch["label_confidences"][i, slot] = confidence
            batch["mask"][i] = 1.0
            batch["slice_ids"][i] = slice_ids[row]
            batch["index"][i] = row
        yield batch


def true_probs():
    features = split()[0].mean(axis=(1, 2)) / 255 - 0.5
    return 1 / (1 + np.exp(-features @ PARAMS["classifier"]))


def present():
    targets = np.zeros((NUM_IMAGES, NUM_CLASSES))
    for row, labels in enumerate(split()[1]):
        targets[row, [label for label, confidence in labels if confidence >= 0.5]] = 1
    return targets


def f2_of(probs, labels, threshold):
    truth = {label for label, confidence in labels if confidence >= 0.5}
    guess = set(np.flatnonzero(probs >= threshold))
    if not truth and not guess:
        return 0.0
    hits = len(truth & guess)
    return 5 * hits / (5 * hits + 4 * len(truth - guess) + len(guess - truth))


@pytest.fixture(scope="module")
def evaluator():
    return Evaluator(
        mesh=make_mesh(),
        num_classes=NUM_CLASSES,
        label_embeddings=jnp.asarray(VECTORS),
        thresholds=THRESHOLDS,
    )


def predict_by(apply, mesh=None):
    model = Model(apply=apply, params=PARAMS, batch_stats={})
    return make_predict([model], mesh or make_mesh())


def run(evaluator, *, predict=None, verified_absent=False, on_batch=None):
    return evaluator.run(
        predict or predict_by(apply),
        batches(),
        verified_absent=verified_absent,
        on_batch=on_batch,
    )


@pytest.fixture(scope="module")
def sums(evaluator):
    return run(evaluator)


def test_the_devices_are_eight_and_the_last_batch_is_padded():
    assert jax.device_count() == 8
    assert sum(int(batch["mask"].sum()) for batch in batches()) == NUM_IMAGES


def test_every_image_counts_once(sums):
    assert int(sums.sums.num_images) == NUM_IMAGES


def test_f2_at_every_threshold_is_that_of_a_loop(sums):
    probs, (_, labels, _) = true_probs(), split()
    expected = [
        np.mean([f2_of(p, y, t) for p, y in zip(probs, labels, strict=True)])
        for t in THRESHOLDS
    ]
    np.testing.assert_allclose(f2_by_threshold(sums), expected, atol=1e-5)


def test_one_device_gives_what_eight_give(sums):
    mesh = make_mesh(jax.devices()[:1])
    one = Evaluator(
        mesh=mesh,
        num_classes=NUM_CLASSES,
        label_embeddings=jnp.asarray(VECTORS),
        thresholds=THRESHOLDS,
    )
    found = run(one, predict=predict_by(apply, mesh))
    figures, expected = (Evaluator.figures(s, "validation") for s in (found, sums))
    assert figures == pytest.approx(expected, rel=1e-5, abs=1e-6)
    np.testing.assert_allclose(f2_by_threshold(found), f2_by_threshold(sums), atol=1e-6)


def test_batches_are_handed_out_on_the_host_with_their_rows(evaluator):
    seen = []
    run(evaluator, on_batch=lambda *batch: seen.append(batch))
    probs, embeddings, rows = (
        np.concatenate(parts) for parts in zip(*seen, strict=True)
    )
    np.testing.assert_array_equal(rows, [*range(NUM_IMAGES), -1, -1, -1])
    np.testing.assert_allclose(probs[:NUM_IMAGES], true_probs(), atol=1e-5)
    assert embeddings.shape == (2 * BATCH, 2)


def test_without_a_head_no_embedding_is_ranked_nor_handed_out(evaluator, sums):
    seen = []
    found = run(
        evaluator,
        predict=predict_by(headless),
        on_batch=lambda _, e, rows: seen.append(e),
    )
    assert seen == [None, None]
    assert int(found.sums.embedding.num_images) == 0
    assert int(sums.sums.embedding.num_images) == NUM_IMAGES
    assert choose(found).embedding_k is None


def test_figures_of_a_run_are_plain_numbers_of_validation(evaluator, sums):
    figures = evaluator.figures(sums, "validation")
    assert figures["validation/f2"] == pytest.approx(f2_by_threshold(sums).max())
    assert figures["validation/threshold"] in THRESHOLDS
    exact = log_loss(present().ravel(), true_probs().ravel()) * NUM_CLASSES
    assert figures["validation/bce"] == pytest.approx(exact, rel=0.01)
    for name, value in figures.items():
        assert name.startswith("validation/")
        assert type(value) is float


def test_where_absence_is_verified_only_annotated_entries_are_ranked(evaluator, sums):
    verified = run(evaluator, verified_absent=True)
    one, other = (Evaluator.figures(s, "x")["x/map"] for s in (sums, verified))
    assert other > one
    assert f2_by_threshold(verified) == pytest.approx(f2_by_threshold(sums))


def test_the_forward_pass_gives_float32_probabilities():
    probs, embedding = predict_by(apply)(next(batches())["images"])
    assert probs.dtype == np.float32
    np.testing.assert_allclose(probs, true_probs()[:BATCH], atol=1e-5)
    assert embedding.shape == (BATCH, 2)


def test_a_pass_without_sums_hands_out_the_same_batches(evaluator):
    summed, plain = [], []
    run(evaluator, on_batch=lambda *batch: summed.append(batch))
    evaluator.predict(predict_by(apply), batches(), lambda *b: plain.append(b))
    for one, other in zip(summed, plain, strict=True):
        for a, b in zip(one, other, strict=True):
            np.testing.assert_array_equal(a, b)
