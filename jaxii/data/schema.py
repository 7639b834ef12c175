"""The schema of records that preparation writes and training reads.

A record is a `tf.train.Example` with TFDS features in an ArrayRecord shard, written and
parsed without TensorFlow and without TFDS's slower decoder.
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Float, Float32, Int, Int32, UInt8
from tensorflow_datasets.proto import tf_example_pb2, tf_feature_pb2

from jaxii.data.labels import Vocabulary

NAME = "labelled_images"
VERSION = "1.0.0"
# Protocol buffer classes are made at run time.
_Example: Any = tf_example_pb2.Example  # pyright: ignore[reportAttributeAccessIssue]
_PROTOS: Any = tf_feature_pb2
Fields = Mapping[str, Any]


class Record(TypedDict):
    """A stored image with its labels, [label]."""

    image: bytes  # JPEG
    image_id: str
    label_ids: Int32[np.ndarray, " label"]
    label_confidences: Float32[np.ndarray, " label"]
    label_sources: UInt8[np.ndarray, " label"]
    slice_id: int


def features(vocabulary: Vocabulary) -> tfds.features.FeaturesDict:
    """Returns the TFDS description of a record, with the codes of a vocabulary."""
    return tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg"),
            "image_id": tfds.features.Text(doc="unique within the dataset"),
            "label_ids": tfds.features.Sequence(
                tfds.features.ClassLabel(names=vocabulary.codes)
            ),
            "label_confidences": tfds.features.Sequence(
                np.float32, doc="1 = present, 0 = verified absent, between = machine"
            ),
            "label_sources": tfds.features.Sequence(
                tfds.features.ClassLabel(names=["human", "machine", "box"])
            ),
            "group": tfds.features.Text(doc="images of one thing; never divided"),
            "domain": tfds.features.Text(doc="a whole source: a region, a vendor"),
            "slice": tfds.features.Text(doc="what reports are cut by"),
        }
    )


def serialize(
    *,
    image: bytes,
    image_id: str,
    label_ids: Sequence[int] | Int[np.ndarray, " label"],
    label_confidences: Sequence[float] | Float[np.ndarray, " label"],
    label_sources: Sequence[int] | UInt8[np.ndarray, " label"],
    group: str,
    domain: str,
    slice_name: str,
) -> bytes:
    """Returns a record, byte for byte as TFDS serializes it."""
    record = {
        "image": _bytes(image),
        "image_id": _bytes(image_id.encode()),
        "label_ids": _ints(label_ids),
        "label_confidences": _PROTOS.Feature(
            float_list=_PROTOS.FloatList(value=label_confidences)
        ),
        "label_sources": _ints(label_sources),
        "group": _bytes(group.encode()),
        "domain": _bytes(domain.encode()),
        "slice": _bytes(slice_name.encode()),
    }
    example = _Example(features=_PROTOS.Features(feature=record))
    return example.SerializeToString(deterministic=True)


def parse(record: bytes) -> Fields:
    """Returns the undecoded fields of a `tf.train.Example`, by name."""
    return _Example.FromString(record).features.feature


def decode(fields: Fields, *, slice_ids: Mapping[str, int]) -> Record:
    """Returns a record.

    Args:
      fields: Parsed fields of a record.
      slice_ids: Position of each slice of the dataset.
    """
    return {
        "image": fields["image"].bytes_list.value[0],
        "image_id": text(fields, "image_id"),
        "label_ids": integers(fields, "label_ids").astype(np.int32),
        "label_confidences": np.array(
            fields["label_confidences"].float_list.value, np.float32
        ),
        "label_sources": integers(fields, "label_sources").astype(np.uint8),
        "slice_id": slice_ids[text(fields, "slice")],
    }


def text(fields: Fields, name: str) -> str:
    return fields[name].bytes_list.value[0].decode()


def integers(fields: Fields, name: str) -> Int[np.ndarray, " label"]:
    """Returns a field of integers, int64; empty if the record lacks it."""
    return np.array(fields[name].int64_list.value, np.int64)


def _bytes(value: bytes) -> Any:
    return _PROTOS.Feature(bytes_list=_PROTOS.BytesList(value=[value]))


def _ints(values) -> Any:
    return _PROTOS.Feature(int64_list=_PROTOS.Int64List(value=values))
