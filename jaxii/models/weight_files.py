"""Reads torch's weight files without torch and without running code in them.

Supports `.safetensors` and the formats of `torch.save`: a zip, or a sequence of pickles
before torch 1.6.
"""

import hashlib
import io
import json
import math
import struct
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxii.errors import InputError
from jaxii.models.torch_pickle import Storage, Tensor, read_pickle
from jaxii.storage import at

# Keys of the state dict in a checkpoint; averaged weights first, as in timm.
WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")
# Prefixes of torch.compile and DistributedDataParallel.
PREFIXES = ("_orig_mod.", "module.")
MOST_NAME_LETTERS = 200

_SAFETENSORS_TYPES = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "bfloat16",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "i1",
    "U8": "u1",
    "BOOL": "?",
}
# Source: torch/serialization.py
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001


class StateDict(NamedTuple):
    """Weights by their names in torch, and their origin.

    Attributes:
      arrays: Read-only, in the types of the file; bfloat16 is widened to float32.
      origin: The file, the key that was used, and the SHA-256 of the file.
      digest: That SHA-256, in hexadecimal.
    """

    arrays: dict[str, np.ndarray]
    origin: str
    digest: str


def read_state_dict(path: str) -> StateDict:
    """Reads the weights in a local file or at gs://...

    Raises:
      InputError: If the file is missing, damaged, of another format, or a pickle with
        anything except a state dict.
    """
    place = at(path)
    try:
        content = place.read_bytes()
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({error.strerror or error}); give a file of "
            "pretrained weights"
        ) from error
    try:
        wrapper, arrays = _read(content)
        arrays = _without_prefixes(arrays)
    except (
        ArithmeticError,
        LookupError,
        OSError,
        RuntimeError,  # an encrypted zip, or deeply nested JSON
        TypeError,
        ValueError,
        struct.error,
        zipfile.BadZipFile,
    ) as error:
        # Text from the file may be long or contain control characters.
        shown = "".join(c if c.isprintable() else " " for c in str(error)[:500])
        reason = " ".join(shown.split())
        raise InputError(
            f"{path} cannot be used as weights: {reason}. Download it again; or, if "
            "you trust it, load it with torch and save its state dict with "
            "safetensors.torch.save_file(state_dict, 'weights.safetensors')"
        ) from error
    digest = hashlib.sha256(content).hexdigest()
    taken = f"{wrapper} of " if wrapper else ""
    return StateDict(arrays, f"{taken}{place.name} (sha256 {digest})", digest)


def _read(content: bytes) -> tuple[str, dict[str, np.ndarray]]:
    if content[8:9] == b"{":
        return "", _read_safetensors(content)
    if content.startswith(b"PK"):
        return _read_zip(content)
    if content.startswith(b"\x80"):
        return _read_legacy(content)
    raise ValueError("it is neither a .safetensors file nor a file of torch.save")


def _read_safetensors(content: bytes) -> dict[str, np.ndarray]:
    """Reads 8 bytes of header length, a JSON header, then raw little-endian data.

    Source: https://github.com/huggingface/safetensors#format
    """
    (header_bytes,) = struct.unpack("<Q", content[:8])
    if header_bytes > len(content) - 8:
        raise ValueError("its header extends past the end of the file")
    header = json.loads(content[8 : 8 + header_bytes])
    data = memoryview(content)[8 + header_bytes :]
    header.pop("__metadata__", None)
    return {name: _safetensor(name, entry, data) for name, entry in header.items()}


def _safetensor(name: str, entry: Mapping[str, Any], data: memoryview) -> np.ndarray:
    if entry["dtype"] not in _SAFETENSORS_TYPES:
        raise ValueError(f"{name} has the unsupported dtype {entry['dtype']}")
    dtype = _SAFETENSORS_TYPES[entry["dtype"]]
    (start, stop), shape = entry["data_offsets"], tuple(entry["shape"])
    if not 0 <= start <= stop <= len(data):
        raise ValueError(f"the data of {name} lies outside the file")
    if stop - start != math.prod(shape) * _item_bytes(dtype):
        raise ValueError(f"the number of bytes of {name} does not match its shape")
    return _numbers(data[start:stop], dtype).reshape(shape)


def _read_zip(content: bytes) -> tuple[str, dict[str, np.ndarray]]:
    """Reads NAME/data.pkl and the storages NAME/data/KEY."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {info.filename: info for info in archive.infolist()}
        packed = [
            n for n, m in members.items() if m.compress_type != zipfile.ZIP_STORED
        ]
        if packed:
            raise ValueError(
                f"its member {packed[0]} is compressed, which torch.save never does"
            )
        # Overlapping members could expand a small file to a huge one.
        if sum(info.file_size for info in archive.infolist()) > len(content):
            raise ValueError("its members claim more bytes than the file has")
        found = [name for name in members if name.endswith("/data.pkl")]
        if len(found) != 1:
            raise ValueError(
                "it is a zip archive without the single data.pkl of torch.save"
            )
        root = found[0].removesuffix("data.pkl")
        order = f"{root}byteorder"
        if order in members and archive.read(order) != b"little":
            raise ValueError("its data is not little-endian")

        def storage_bytes(storage: Storage) -> bytes:
            name = f"{root}data/{storage.key}"
            if name not in members:
                raise ValueError(f"it has no storage {storage.key[:80]!r}")
            return archive.read(name)

        pickled = read_pickle(io.BytesIO(archive.read(found[0])))
        wrapper, tensors = _unwrapped(pickled.value)
        return wrapper, _arrays(tensors, storage_bytes)


def _read_legacy(content: bytes) -> tuple[str, dict[str, np.ndarray]]:
    """Reads five pickles, then each storage: a count and its numbers."""
    file = io.BytesIO(content)
    for expected in (_LEGACY_MAGIC, _LEGACY_PROTOCOL):
        if read_pickle(file).value != expected:
            raise ValueError("it is a pickle that torch.save did not write")
    system = read_pickle(file).value
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise ValueError("its data is not little-endian")
    value, storages = read_pickle(file)
    wrapper, tensors = _unwrapped(value)
    data: dict[str, bytes] = {}
    for key in read_pickle(file).value:
        (num_elements,) = struct.unpack("<q", file.read(8))
        if not isinstance(key, str) or key not in storages:
            raise ValueError("it has a storage that its pickle does not refer to")
        storage = storages[key]
        if num_elements != storage.num_elements:
            raise ValueError(f"its storage {key} does not have the stated size")
        data[key] = file.read(num_elements * _item_bytes(storage.dtype))
    return wrapper, _arrays(tensors, lambda storage: data[storage.key])


def _unwrapped(value: Any) -> tuple[str, dict[str, Tensor]]:
    """Returns the key of the state dict in `value` ("" for none) and the state dict."""
    wrapper = ""
    if isinstance(value, dict):
        wrapper = next((key for key in WRAPPERS if value.get(key) is not None), "")
        value = value[wrapper] if wrapper else value
    if not isinstance(value, dict):
        raise ValueError(f"it holds a {type(value).__name__}, not a state dict")
    for name, tensor in value.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise ValueError(
                f"its entry {str(name)[:80]} is not a tensor; the state dict may be at "
                f"the top level or in {', '.join(WRAPPERS)}"
            )
    return wrapper, value


def _arrays(
    tensors: Mapping[str, Tensor], storage_bytes: Callable[[Storage], bytes]
) -> dict[str, np.ndarray]:
    storages: dict[str, np.ndarray] = {}
    arrays = {}
    for name, tensor in tensors.items():
        key, dtype = tensor.storage.key, tensor.storage.dtype
        if key not in storages:
            data = storage_bytes(tensor.storage)
            if len(data) != tensor.storage.num_elements * _item_bytes(dtype):
                raise ValueError(f"{name} does not have the stated number of bytes")
            storages[key] = _numbers(data, dtype)
        arrays[name] = _view(name, tensor, storages[key])
    return arrays


def _view(name: str, tensor: Tensor, storage: np.ndarray) -> np.ndarray:
    """Returns a tensor as a view of its storage, within its bounds."""
    shape, strides = tensor.shape, tensor.strides
    if len(shape) != len(strides):
        raise ValueError(
            f"{name} has shape {shape} and strides {strides}, which differ in length"
        )
    last = tensor.offset + sum(
        (size - 1) * stride for size, stride in zip(shape, strides, strict=True)
    )
    # A stride of 0 could expand a small storage to a huge tensor.
    if not 0 < math.prod(shape) <= storage.size or last >= storage.size:
        raise ValueError(
            f"{name} with shape {shape}, strides {strides} and offset {tensor.offset} "
            f"does not fit in its storage of {storage.size} elements"
        )
    size = storage.itemsize
    return np.ndarray(
        shape,
        storage.dtype,
        buffer=storage,
        offset=tensor.offset * size,
        strides=[stride * size for stride in strides],
    )


def _numbers(data: bytes | memoryview, dtype: str) -> np.ndarray:
    if dtype != "bfloat16":
        return np.frombuffer(data, dtype)
    # NumPy has no bfloat16, which is the upper half of a float32.
    bits = np.frombuffer(data, "<u2").astype(np.uint32) << np.uint32(16)
    return bits.view(np.float32)


def _item_bytes(dtype: str) -> int:
    return 2 if dtype == "bfloat16" else np.dtype(dtype).itemsize


def _without_prefixes(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    clean: dict[str, np.ndarray] = {}
    for name, array in arrays.items():
        bare = name
        # Prefixes may be repeated in any order.
        while bare.startswith(PREFIXES):
            bare = bare.partition(".")[2]
        if not bare.isprintable() or len(bare) > MOST_NAME_LETTERS:
            raise ValueError(f"it has a weight with the invalid name {bare[:80]!r}")
        if bare in clean:
            raise ValueError(f"it holds {bare} more than once, with different prefixes")
        clean[bare] = array
    return clean
