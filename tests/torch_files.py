"""Valid and hostile files in the format of `torch.save`, made without torch.

Pickles are written by hand, because Python's pickler requires that the names it writes
exist. `make_torchvision_golden` has files that torch itself wrote.
"""

import io
import struct
import zipfile
from typing import Any, NamedTuple

import numpy as np

STORAGES = {
    "float64": "DoubleStorage",
    "float32": "FloatStorage",
    "float16": "HalfStorage",
    "uint16": "BFloat16Storage",  # its bits
    "int64": "LongStorage",
    "int8": "CharStorage",
    "bool": "BoolStorage",
}
MAGIC = 0x1950A86A20F9469CFC6C


class Global(NamedTuple):
    """A name that the pickle refers to."""

    module: str
    name: str


class Call(NamedTuple):
    """A call of a name."""

    function: Global
    arguments: tuple


class Persistent(NamedTuple):
    """A reference to data that torch keeps outside of the pickle."""

    value: Any


class Code(NamedTuple):
    """Raw instructions."""

    content: bytes


ORDERED_DICT = Global("collections", "OrderedDict")
REBUILD = Global("torch._utils", "_rebuild_tensor_v2")


def pickled(value):
    """Returns a pickle of protocol 2."""
    return b"\x80\x02" + code(value) + b"."


def code(value):
    """Returns the instructions that push a value onto the stack."""
    match value:
        case Code():
            return value.content
        case Global():
            return f"c{value.module}\n{value.name}\n".encode()
        case Call():
            return code(value.function) + code(value.arguments) + b"R"
        case Persistent():
            return code(value.value) + b"Q"
        case None:
            return b"N"
        case bool():
            return b"\x88" if value else b"\x89"
        case int():
            content = value.to_bytes(16, "little", signed=True)
            return b"\x8a" + bytes([len(content)]) + content
        case str():
            return b"X" + struct.pack("<I", len(value.encode())) + value.encode()
        case tuple():
            return b"(" + b"".join(map(code, value)) + b"t"
        case list():
            return b"](" + b"".join(map(code, value)) + b"e"
        case dict():
            return b"}" + entries(value)
    raise TypeError(value)


def entries(mapping):
    pairs = (code(key) + code(value) for key, value in mapping.items())
    return b"(" + b"".join(pairs) + b"u"


def ordered(mapping):
    """Returns a state dict as modules return it, with versions beside its entries."""
    made = code(Call(ORDERED_DICT, ())) + entries(mapping)
    return Code(made + code({"_metadata": Call(ORDERED_DICT, ())}) + b"b")


def storage(key, kind, num_elements, *view):
    return Persistent(
        ("storage", Global("torch", kind), key, "cpu", num_elements, *view)
    )


def tensor(where, shape, strides, offset=0, *more):
    return Call(
        REBUILD,
        (where, offset, shape, strides, False, Call(ORDERED_DICT, ()), *more),
    )


def contiguous(shape):
    return tuple(int(np.prod(shape[i + 1 :])) for i in range(len(shape)))


class Written:
    """Collects arrays to write: tensors for the pickle, and their numbers."""

    def __init__(self):
        self.data = {}

    def __call__(self, array, *view):
        key, kind = str(len(self.data)), STORAGES[array.dtype.name]
        self.data[key] = array.tobytes()
        where = storage(key, kind, array.size, *view)
        return tensor(where, array.shape, contiguous(array.shape))


def zip_file(value, data, *, root="archive", **members):
    """Returns the format that torch has written since 1.6."""
    contents = {"data.pkl": pickled(value), "byteorder": "little"}
    contents |= {f"data/{key}": content for key, content in data.items()} | members
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in contents.items():
            # With the time of day, names of parametrised tests would differ between
            # the processes that run them.
            archive.writestr(zipfile.ZipInfo(f"{root}/{name}"), content)
    return buffer.getvalue()


def legacy_file(value, data, sizes, *, little_endian=True):
    """Returns the format of torch before 1.6; `sizes` are the storages' in elements."""
    head = [MAGIC, 1001, {"little_endian": little_endian}, value, list(data)]
    blocks = [struct.pack("<q", sizes[key]) + data[key] for key in data]
    return b"".join(map(pickled, head)) + b"".join(blocks)


def save(path, arrays):
    """Writes a state dict as torch does; returns the path."""
    write = Written()
    value = ordered({name: write(array) for name, array in arrays.items()})
    path.write_bytes(zip_file(value, write.data))
    return path


def save_legacy(path, arrays):
    """Writes a state dict as torch did before 1.6; returns the path."""
    write = Written()
    value = ordered({name: write(array, None) for name, array in arrays.items()})
    sizes = {key: a.size for key, a in zip(write.data, arrays.values(), strict=True)}
    path.write_bytes(legacy_file(value, write.data, sizes))
    return path
