"""The pickle inside a file of `torch.save`, read without running anything.

A pickle is a program, and unpickling runs what it names. Here nothing is called and no
name is looked up: instructions are decoded by `pickletools`, the few that state dicts
are made of are followed on plain lists and dictionaries, a tensor becomes a note of
where its numbers lie, and whatever else the program names is refused. `weight_files`
finds the pickle and reads the numbers.
"""

import io
import pickletools
from typing import Any, NamedTuple

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
"""The types of storage that a file may name, and what they hold."""

_TENSORS = ("torch._utils _rebuild_tensor", "torch._utils _rebuild_tensor_v2")
_PARAMETER = "torch._utils _rebuild_parameter"
_ORDERED_DICT = "collections OrderedDict"
# The options of timm's and torchvision's training scripts, beside the weights.
_NAMESPACE = "argparse Namespace"
ALLOWED = {*DTYPES, *_TENSORS, _PARAMETER, _ORDERED_DICT, _NAMESPACE}

_LITERALS = {
    *("NONE", "NEWTRUE", "NEWFALSE"),
    *("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT"),
    *("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
    *("SHORT_BINSTRING", "BINSTRING"),  # Python 2 wrote torchvision's oldest files
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class Storage(NamedTuple):
    """A row of numbers in the file.

    Attributes:
        dtype: a value of `DTYPES`.
        key: its name in the file.
        num_elements: >= 0, as the pickle says.
    """

    dtype: str
    key: str
    num_elements: int


class Tensor(NamedTuple):
    """A view of a storage; offset and strides count elements, and are not checked."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Pickle(NamedTuple):
    """What a pickle describes.

    Attributes:
        value: of dict, list, tuple, str, int, float, bool, None and `Tensor`; the
            options of a training script are an empty dict.
        storages: key -> every storage that it refers to.
    """

    value: Any
    storages: dict[str, Storage]


class _Name(NamedTuple):
    """What the pickle would import, as text."""

    text: str


def read_pickle(file: io.BytesIO) -> Pickle:
    """Reads one pickle and leaves the file behind it.

    Raises:
        ValueError: a name outside `ALLOWED`, an instruction that no state dict needs,
            or a damaged pickle.
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
    """Stack, marks and memo of a pickle that is being read."""

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
                    raise ValueError(f"its storage {storage.key[:80]} has two types")
                stack.append(storage)
            case "REDUCE" | "NEWOBJ":
                name, arguments = self._pop(2)
                stack.append(_rebuilt(_of_type(_Name, name).text, arguments))
            case "BUILD":
                # Versions of modules, or a script's options: nothing that is needed.
                _of_type(dict, self._pop(1)[0])
                _of_type(dict, stack[-1])
            case _:
                shown = "" if argument is None else f" {str(argument)[:80]!r}"
                raise ValueError(
                    f"its pickle has the instruction {opcode}{shown}, which no state "
                    "dict needs; nothing of it was run"
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
            f"its pickle names {name[:80].replace(' ', '.')}, which no state dict "
            "needs; nothing of it was run"
        )
    return _Name(name)


def _storage(persistent_id: Any) -> Storage:
    kind, name, key, _, num_elements, *view = _of_type(tuple, persistent_id)
    if kind != "storage" or any(part is not None for part in view):
        raise ValueError("its pickle refers to what is no storage, or a part of one")
    dtype = DTYPES[_of_type(_Name, name).text]
    return Storage(dtype, _of_type(str, key), _count(num_elements))


def _rebuilt(name: str, arguments: Any) -> Any:
    """Returns what a call of an allowed name stands for."""
    arguments = _of_type(tuple, arguments)
    if name == _NAMESPACE:
        return {}
    if name == _ORDERED_DICT:
        # Python 2 gave the pairs at once.
        return dict(_entries(*arguments)) if arguments else {}
    if name == _PARAMETER:
        return _of_type(Tensor, arguments[0])
    if name not in _TENSORS:
        raise ValueError(f"its pickle calls {name}; nothing of it was run")
    storage, offset, shape, strides, *more = arguments
    if any(more[2:]):
        raise ValueError("it has a tensor that is to be negated or conjugated")
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
        raise ValueError(f"its pickle has {value} for a count")
    return value


# Errors show no value of another type: a small pickle can describe one whose text, or
# hash, would take for ever.
def _of_type(kind: Any, value: Any) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"{type(value).__name__} in an unfit place")
    return value
