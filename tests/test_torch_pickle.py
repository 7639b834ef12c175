import argparse
import collections
import contextlib
import copyreg
import io
import os
import pickle
import sys

import pytest
from torch_files import (
    ORDERED_DICT,
    Call,
    Code,
    Global,
    Persistent,
    code,
    ordered,
    pickled,
    storage,
    tensor,
)

from jaxii.models.torch_pickle import Storage, Tensor, read_pickle


def read(content):
    return read_pickle(io.BytesIO(content))


class Runs:
    """Calls a function when it is unpickled."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class Hidden(collections.OrderedDict):
    """A state dict that calls a function when it is unpickled."""

    def __init__(self, function, *arguments):
        super().__init__(weight=1)
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class Restores:
    """Runs a command when its attributes are restored."""

    def __init__(self, command):
        self.command = command

    def __setstate__(self, state):
        os.system(state["command"])


def hostile(marker):
    """Returns pickles that would create a file, and the refused name of each."""
    command = f"touch '{marker}'"
    python = f"open({str(marker)!r}, 'w').close()"
    cases = {
        "system": (Runs(os.system, command), r"posix\.system"),
        "eval": (Runs(eval, python), r"(builtins|__builtin__)\.eval"),
        "exec": (Runs(exec, python), r"(builtins|__builtin__)\.exec"),
        "hidden": (Hidden(os.system, command), r"posix\.system"),
        "nested": ({"a": [(1, Runs(os.system, command))]}, r"posix\.system"),
        "setstate": (
            Restores(command),
            r"(test_torch_pickle\.Restores|copy_?reg\._reconstructor)",
        ),
        "open": (Runs(open, str(marker), "w"), r"_?io\.open"),
    }
    return cases


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("name", hostile("marker"))
def test_what_would_run_is_named_and_does_not_run(tmp_path, name, protocol):
    marker = tmp_path / "marker"
    value, pattern = hostile(marker)[name]
    content = pickle.dumps(value, protocol)
    # The first protocol makes dictionaries with an instruction that torch never wrote.
    refused = rf"(refers to {pattern}|instruction DICT), which no state dict needs"
    with pytest.raises(ValueError, match=refused):
        read(content)
    assert not marker.exists()
    # The pickle works: Python's own unpickler creates the file.
    made = pickle.loads(content)
    assert marker.exists()
    if hasattr(made, "close"):
        made.close()


SYSTEM = Global("os", "system")


@pytest.mark.parametrize(
    ("value", "pattern"),
    [
        (SYSTEM, r"os\.system"),
        (Global("builtins", "getattr"), r"builtins\.getattr"),
        (Global("copyreg", "_reconstructor"), r"copyreg\._reconstructor"),
        (Global("torch.hub", "load"), r"torch\.hub\.load"),
        (Global("torch.storage", "_load_from_bytes"), "_load_from_bytes"),
        (Global("torch._utils", "_rebuild_qtensor"), "_rebuild_qtensor"),
        (Global("torch", "FloatStorage.__init__.__globals__"), "__globals__"),
        (Global("x" * 1000, "y"), "refers to x{80}, which"),
        (Code(code("os") + code("system") + b"\x93"), r"os\.system"),
        (Code(b"(ios\nsystem\n"), "instruction INST 'os system'"),
        (Code(b"(" + code("a") + b"o"), "instruction OBJ,"),
        (Code(b"\x82\x01"), "instruction EXT1 '1'"),
        (Code(code(Global("collections", "OrderedDict")) + b"(tR0"), "POP"),
        (Code(b"Pabc\n"), "PERSID"),
        (Call(Global("torch", "FloatStorage"), (8,)), "calls torch FloatStorage"),
        (Call(Global("argparse", "Namespace"), ()), None),
    ],
)
def test_only_what_state_dicts_need_is_followed(value, pattern):
    if pattern is None:
        assert read(pickled(value)).value == {}
        return
    with pytest.raises(ValueError, match=pattern):
        read(pickled(value))


def test_an_extension_registered_in_this_process_is_not_looked_up():
    copyreg.add_extension("posix", "system", 240)
    try:
        with pytest.raises(ValueError, match="EXT1"):
            read(pickled(Code(b"\x82\xf0")))
    finally:
        copyreg.remove_extension("posix", "system", 240)


WHERE = storage("0", "FloatStorage", 6)


def test_a_tensor_is_a_note_of_where_its_numbers_lie():
    pickle_ = read(pickled(ordered({"a": tensor(WHERE, (2, 3), (3, 1))})))
    found = Storage("<f4", "0", 6)
    assert pickle_.value == {"a": Tensor(found, 0, (2, 3), (3, 1))}
    assert pickle_.storages == {"0": found}


def test_python_2_and_the_first_torch_are_understood():
    short = Code(b"U\x01a")
    first = Global("torch._utils", "_rebuild_tensor")
    pairs = [[short, Call(first, (WHERE, 0, (6,), (1,)))]]
    value = read(pickled(Call(ORDERED_DICT, (pairs,)))).value
    assert value == {"a": Tensor(Storage("<f4", "0", 6), 0, (6,), (1,))}


def test_plain_values_are_read_as_pickle_reads_them():
    value = {"a": [1, -2, 2**70, 1.5, None, True, False], 3: ("é", (), (1, 2, 3, 4))}
    for protocol in (2, 3, 4, 5):
        assert read(pickle.dumps(value, protocol)).value == value


def test_a_training_scripts_options_are_passed_over():
    for protocol in (2, 4):
        content = pickle.dumps({"args": argparse.Namespace(lr=1, a="b")}, protocol)
        assert read(content).value == {"args": {}}


def test_the_file_is_left_behind_the_pickle():
    file = io.BytesIO(pickled(1) + pickled(2) + b"rest")
    assert [read_pickle(file).value, read_pickle(file).value] == [1, 2]
    assert file.read() == b"rest"


@pytest.mark.parametrize(
    ("value", "pattern"),
    [
        (tensor(WHERE, (6,), (1,), -1), "invalid count -1"),
        (tensor(WHERE, (-6,), (1,)), "invalid count -6"),
        (tensor(WHERE, (6,), (-1,)), "invalid count -1"),
        (tensor(WHERE, (6,), (True,)), "invalid count True"),
        (tensor(WHERE, (6,), ("1",)), "unexpected str"),
        (tensor(WHERE, [6], (1,)), "damaged.*unexpected list"),
        (tensor((), (6,), (1,)), "damaged.*unexpected tuple"),
        (tensor(WHERE, (6,), (1,), 0, {"neg": True}), "a conjugate or negative bit"),
        (storage("0", "FloatStorage", -1), "invalid count -1"),
        (storage("0", "FloatStorage", 6, ("1", 0, 6)), "not a whole storage"),
        (storage("0", "OtherStorage", 6), r"refers to torch\.OtherStorage"),
        ([WHERE, storage("0", "LongStorage", 6)], "storage 0 is declared with two"),
        ({((),): 1}, "unexpected tuple"),
        (Code(b"(1"), "POP_MARK"),
        (Code(b"t"), "damaged"),
        (Code(b"q\x00"), "damaged"),
        (Code(b"h\x07"), "damaged"),
        (Code(b"N}b"), "damaged"),
        (Code(b"}Nb"), "damaged"),
        (Code(b"NN"), "too many values"),
        (Code(b""), "not enough values"),
        (Code(b"X\xff\xff\xff\xffabc"), "expected 4294967295 bytes"),
        (Code(b"\x8d" + b"\xff" * 7 + b"\x7fabc"), "bytes in a unicodestring8"),
        (Code(b"\xfe"), "unknown"),
    ],
)
def test_a_pickle_that_makes_no_sense_is_refused(value, pattern):
    with pytest.raises(ValueError, match=pattern):
        read(pickled(value))


# Each tuple holds the previous one twice, a hundred times: 2 ** 100 when traversed.
ENDLESS = Code(b")" + b"".join(b"q%ch%c\x86" % (i, i) for i in range(100)))


@pytest.mark.parametrize(
    "value",
    [
        {ENDLESS: 1},
        Persistent((ENDLESS, 1, 2, 3, 4)),
        storage("0", "FloatStorage", ENDLESS),
        storage(ENDLESS, "FloatStorage", 6),
        tensor(WHERE, (ENDLESS,), (1,)),
        tensor(WHERE, ENDLESS, (1,)),
        tensor(ENDLESS, (6,), (1,)),
        Call(ORDERED_DICT, ([[ENDLESS, 1]],)),
        [{}, Code(ENDLESS.content + b"a")],
    ],
)
def test_a_small_pickle_of_something_endless_is_refused_at_once(value):
    with pytest.raises(ValueError):
        read(pickled(value))


def test_a_huge_memo_number_takes_no_memory():
    assert read(pickled(Code(b"Nr\xff\xff\xff\xff0"[:-1]))).value is None


EVENTS: list[str] = []


def test_reading_imports_opens_and_compiles_nothing():
    """Uses Python's audit events, which include lookups of Python's own unpickler."""
    content = pickled(ordered({"a": tensor(WHERE, (2, 3), (3, 1))}))
    read(content)  # imports at first use
    watching = [True]
    sys.addaudithook(lambda event, _: EVENTS.append(event) if watching else None)
    try:
        read(content)
        seen = set(EVENTS)
        with contextlib.suppress(pickle.UnpicklingError):
            pickle.loads(pickled(ORDERED_DICT))
    finally:
        watching.clear()  # a hook cannot be removed
    bad = {"import", "open", "exec", "compile", "pickle.find_class"}
    assert not seen & bad
    assert "pickle.find_class" in EVENTS
