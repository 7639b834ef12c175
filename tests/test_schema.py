import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core.example_serializer import ExampleSerializer

from jaxii.data import schema
from jaxii.data.labels import Vocabulary

WORDS = Vocabulary(("/m/a", "/m/b", "/m/c"), ("A", "B", "C"))
FIELDS = {
    "image": b"\xff\xd8\xff not decoded here",
    "image_id": "0a",
    "label_ids": np.array([2, 0], np.int32),
    "label_confidences": np.array([1.0, 0.25], np.float32),
    "label_sources": np.array([0, 1], np.uint8),
    "group": "g",
    "domain": "Malmö",
}


def test_a_record_is_what_tfds_would_have_written():
    features = schema.features(WORDS)
    serializer = ExampleSerializer(features.get_serialized_info())
    expected = schema.parse(
        serializer.serialize_example(
            {**FIELDS, "label_sources": np.array([0, 1]), "slice": "s"}
        )
    )
    found = schema.parse(schema.serialize(**FIELDS, slice_name="s"))
    assert set(found) == set(expected) == set(features)
    assert all(found[name] == expected[name] for name in expected)


def test_tfds_decodes_a_record():
    record = schema.features(WORDS).deserialize_example_np(
        schema.serialize(**FIELDS, slice_name="s"),
        decoders={"image": tfds.decode.SkipDecoding()},
    )
    assert record["image"] == FIELDS["image"]
    assert record["domain"].decode() == "Malmö"
    np.testing.assert_array_equal(record["label_ids"], [2, 0])
    np.testing.assert_array_equal(record["label_confidences"], [1.0, 0.25])


def test_labels_are_described_by_their_codes():
    assert schema.features(WORDS)["label_ids"].feature.names == ["/m/a", "/m/b", "/m/c"]


def test_a_field_that_a_record_lacks_is_empty():
    fields = schema.parse(b"")
    assert len(schema.integers(fields, "label_ids")) == 0
