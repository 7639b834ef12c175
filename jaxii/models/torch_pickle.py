"""Reads the pickle in a file of `torch.save` without running anything.

Unpickling runs the functions that a pickle names. Here `pickletools` decodes the
instructions; only those that state dicts need are followed, on lists and dictionaries.
A tensor becomes a reference to its numbers, and any other name is refused.
"""

import io
import pickletools
from typing import Any, NamedTuple

# Storage type in a file -> type of its numbers.
DTYPES = {
    "torch DoubleStorage": "<f8",
    "torch FloatStorage": "<f4",
    "torch HalfStorage": "<f2",
    "torch BFloat16Storage": "bfloat16",
    "torch LongStorage": "<i8",
    "torch IntStorage": "<i4",
    "torch ShortStorage": "<i2",
    "torch CharStorage": "i1",
    "torch ByteStorage": "u1",
    "torch BoolStorage": "?",
}

_TENSORS = ("torch._utils _rebuild_tensor", "torch._utils _rebuild_tensor_v2")
_PARAMETER = "torch._utils _rebuild_parameter"
_ORDERED_DICT = "collections OrderedDict"
# Options that timm's and torchvision's training scripts save beside the weights.
_NAMESPACE = "argparse Namespace"
ALLOWED = {*DTYPES, *_TENSORS, _PARAMETER, _ORDERED_DICT, _NAMESPACE}

_LITERALS = {
    *("NONE", "NEWTRUE", "NEWFALSE"),
    *("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT"),
    *("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
    *("SHORT_BINSTRING", "BINSTRING"),  # written by Python 2
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class Storage(NamedTuple):
    """Numbers in the file; `dtype` is a value of `DTYPES`."""

    dtype: str
    key: str
    num_elements: int


class Tensor(NamedTuple):
    """A view of a storage; offset and strides count elements and are not checked."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Pickle(NamedTuple):
    """The content of a pickle.

    Attributes:
      value: dict, list, tuple, str, int, float, bool, None and `Tensor`; options of a
        training script are an empty dict.
      storages: Every storage that the pickle refers to, by key.
    """

    value: Any
    storages: dict[str, Storage]


class _Name(NamedTuple):
    """A name that the pickle would import."""

    text: str


def read_pickle(file: io.BytesIO) -> Pickle:
    """Reads one pickle and leaves the file position after it.

    Raises:
      ValueError: If the pickle is damaged or has a name or instruction that state dicts
        do not need.
    """
    machine = _Machine()
    try:
        for opcode, argument, _ in pickletools.genops(file):
            machine.follow(opcode.name, argument)
        (value,) = machine.stack
    except (IndexError, KeyError, TypeError) as error:
        raise ValueError(f"its pickle is damaged: {error!r}") from error
    return Pickle(value, machine.storages)


class _Machine:
    """Stack, marks and memo while reading a pickle."""

    def __init__(self):
        self.stack: list[Any] = []
        self.storages: dict[str, Storage] = {}
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def follow(self, opcode: str, argument: Any) -> None:
        stack, memo = self.stack, self._memo
        match opcode:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case _ if opcode in _LITERALS:
                stack.append(_CONSTANTS.get(opcode, argument))
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "MARK":
                self._marks.append(len(stack))
            case "TUPLE":
                stack.append(tuple(self._since_mark()))
            case _ if opcode in _TUPLES:
                stack.append(tuple(self._pop(_TUPLES[opcode])))
            case "EMPTY_LIST":
                stack.append([])
            case "APPEND" | "APPENDS":
                more = self._pop(1) if opcode == "APPEND" else self._since_mark()
                _of_type(list, stack[-1]).extend(more)
            case "EMPTY_DICT":
                stack.append({})
            case "SETITEM" | "SETITEMS":
                more = self._pop(2) if opcode == "SETITEM" else self._since_mark()
                _of_type(dict, stack[-1]).update(
                    _entries(zip(more[::2], more[1::2], strict=True))
                )
            case "GLOBAL":
                stack.append(_allowed(argument))
            case "STACK_GLOBAL":
                module, name = (_of_type(str, word) for word in self._pop(2))
                stack.append(_allowed(f"{module} {name}"))
            case "BINPERSID":
                storage = _storage(stack.pop())
                if self.storages.setdefault(storage.key, storage) != storage:
                    raise ValueError(
                        f"its storage {storage.key[:80]} is declared with two types or "
                        "sizes"
                    )
                stack.append(storage)
            case "REDUCE" | "NEWOBJ":
                name, arguments = self._pop(2)
                stack.append(_rebuilt(_of_type(_Name, name).text, arguments))
            case "BUILD":
                # Discards versions of modules and options of scripts.
                _of_type(dict, self._pop(1)[0])
                _of_type(dict, stack[-1])
            case _:
                shown = "" if argument is None else f" {str(argument)[:80]!r}"
                raise ValueError(
                    f"its pickle has the instruction {opcode}{shown}, which no state "
                    "dict needs; nothing was executed"
                )

    def _pop(self, count: int) -> list[Any]:
        if len(self.stack) < count:
            raise IndexError("empty stack")
        start = len(self.stack) - count
        popped = self.stack[start:]
        del self.stack[start:]
        return popped

    def _since_mark(self) -> list[Any]:
        start = self._marks.pop()
        popped = self.stack[start:]
        del self.stack[start:]
        return popped


def _allowed(name: str) -> _Name:
    if name not in ALLOWED:
        raise ValueError(
            f"its pickle refers to {name[:80].replace(' ', '.')}, which no state dict "
            "needs; nothing was executed"
        )
    return _Name(name)


def _storage(persistent_id: Any) -> Storage:
    kind, name, key, _, num_elements, *view = _of_type(tuple, persistent_id)
    if kind != "storage" or any(part is not None for part in view):
        raise ValueError("its pickle has a persistent id that is not a whole storage")
    dtype = DTYPES[_of_type(_Name, name).text]
    return Storage(dtype, _of_type(str, key), _count(num_elements))


def _rebuilt(name: str, arguments: Any) -> Any:
    """Returns the result of calling an allowed name."""
    arguments = _of_type(tuple, arguments)
    if name == _NAMESPACE:
        return {}
    if name == _ORDERED_DICT:
        # Python 2 passed the pairs as an argument.
        return dict(_entries(*arguments)) if arguments else {}
    if name == _PARAMETER:
        return _of_type(Tensor, arguments[0])
    if name not in _TENSORS:
        raise ValueError(f"its pickle calls {name}; nothing was executed")
    storage, offset, shape, strides, *more = arguments
    if any(more[2:]):
        raise ValueError("it has a tensor with a conjugate or negative bit")
    return Tensor(
        _of_type(Storage, storage),
        _count(offset),
        tuple(_count(size) for size in _of_type(tuple, shape)),
        tuple(_count(stride) for stride in _of_type(tuple, strides)),
    )


def _entries(pairs: Any) -> list[tuple[str | int, Any]]:
    return [(_of_type((str, int), key), value) for key, value in pairs]


def _count(value: Any) -> int:
    if _of_type(int, value) < 0 or isinstance(value, bool):
        raise ValueError(f"its pickle has the invalid count {value}")
    return value


# Errors do not show the value: a small pickle can describe a huge one.
def _of_type(kind: Any, value: Any) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"unexpected {type(value).__name__}")
    return value
