"""Converts a traced JAX program to an ONNX graph, with one rule per operation.

An operation without a rule is an error. Values that do not depend on the images are
computed here and stored as constants.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Literal

from jaxii.errors import InputError

# Supported by every onnxruntime since 2022.
OPSET, IR_VERSION = 17, 8
INPUT, OUTPUT = "images", "probabilities"
BATCH = "batch"
# The largest file that protobuf can write.
MOST_BYTES = 2**31 - 1
# NHWC to ONNX's NCHW and back; HWIO to OIHW.
_CHANNELS_FIRST, _CHANNELS_LAST, _KERNEL = (0, 3, 1, 2), (0, 2, 3, 1), (3, 2, 0, 1)


class Value(NamedTuple):
    """A constant, or the name of a tensor.

    `shape` is the shape before broadcasting, because ONNX's elementwise operations
    broadcast implicitly. The size of the batch axis is symbolic, not an `int`.
    """

    held: np.ndarray | str
    shape: tuple[Any, ...]


def constant(array: Any) -> Value:
    """Returns an array as a value of the graph."""
    array = np.asarray(array)
    return Value(array, array.shape)


class Graph:
    """Nodes and constants, in program order."""

    def __init__(self):
        self.nodes: list[tuple[str, list[str], str, dict[str, object]]] = []
        self.constants: dict[str, np.ndarray] = {}
        self._names: dict[int, str] = {}

    def add(self, op: str, *inputs: Value | np.ndarray, **attributes: object) -> str:
        """Adds a node with one output and returns the output's name."""
        names = [self.name_of(x) for x in inputs]
        output = f"{op}_{len(self.nodes)}"
        self.nodes.append((op, names, output, attributes))
        return output

    def name_of(self, x: Value | np.ndarray) -> str:
        """Returns the name of a tensor or constant; constants are stored."""
        held = x.held if isinstance(x, Value) else x
        if isinstance(held, str):
            return held
        # Storing the array keeps its id unique.
        if id(held) not in self._names:
            self._names[id(held)] = f"constant_{len(self.constants)}"
            self.constants[self._names[id(held)]] = held
        return self._names[id(held)]

    def keep_needed(self, output: str) -> None:
        """Removes nodes and constants that the output does not depend on."""
        needed, kept = {output}, []
        for node in reversed(self.nodes):
            if node[2] in needed:
                needed.update(node[1])
                kept.append(node)
        self.nodes = kept[::-1]
        self.constants = {k: v for k, v in self.constants.items() if k in needed}


Rule = Callable[..., Value]


def _elementwise(op: str) -> Rule:
    def rule(graph: Graph, eqn: Any, *inputs: Value) -> Value:
        rank = len(eqn.outvars[0].aval.shape)
        shapes = [(1,) * (rank - len(x.shape)) + x.shape for x in inputs]
        shape = tuple(
            next((n for n in sides if not isinstance(n, int) or n > 1), 1)
            for sides in zip(*shapes, strict=True)
        )
        return Value(graph.add(op, *inputs), shape)

    return rule


def _cast(graph: Graph, eqn: Any, x: Value) -> Value:
    kind = _tensor_type(np.dtype(eqn.params["new_dtype"]))
    return Value(graph.add("Cast", x, to=kind), x.shape)


def _broadcast(graph: Graph, eqn: Any, x: Value) -> Value:
    axes = eqn.params["broadcast_dimensions"]
    held = dict(zip(axes, x.shape, strict=True))
    rank = len(eqn.outvars[0].aval.shape)
    return _reshaped(graph, x, tuple(held.get(axis, 1) for axis in range(rank)))


def _reshape(graph: Graph, eqn: Any, x: Value) -> Value:
    _check_whole(eqn, x)
    return _reshaped(graph, x, eqn.outvars[0].aval.shape)


def _reshaped(graph: Graph, x: Value, shape: tuple[Any, ...]) -> Value:
    if isinstance(x.held, np.ndarray):
        return constant(x.held.reshape(shape))
    sides = [side if isinstance(side, int) else -1 for side in shape]
    return Value(graph.add("Reshape", x, np.array(sides, np.int64)), shape)


def _concatenate(graph: Graph, eqn: Any, *inputs: Value) -> Value:
    _check_whole(eqn, *inputs)
    name = graph.add("Concat", *inputs, axis=eqn.params["dimension"])
    return Value(name, eqn.outvars[0].aval.shape)


def _slice(graph: Graph, eqn: Any, x: Value) -> Value:
    _check_whole(eqn, x)
    starts, stops = eqn.params["start_indices"], eqn.params["limit_indices"]
    steps = eqn.params["strides"] or (1,) * len(x.shape)
    cut = [
        axis
        for axis, side in enumerate(x.shape)
        if (starts[axis], stops[axis], steps[axis]) != (0, side, 1)
    ]
    for axis in cut:
        _demand(eqn, isinstance(x.shape[axis], int), "of the batch")
    bounds = [
        np.array([values[axis] for axis in cut], np.int64)
        for values in (starts, stops, range(len(x.shape)), steps)
    ]
    return Value(graph.add("Slice", x, *bounds), eqn.outvars[0].aval.shape)


def _sum(graph: Graph, eqn: Any, x: Value) -> Value:
    _check_whole(eqn, x)
    axes = np.array(eqn.params["axes"], np.int64)
    name = graph.add("ReduceSum", x, axes, keepdims=0)
    return Value(name, eqn.outvars[0].aval.shape)


def _max_pool(graph: Graph, eqn: Any, x: Value) -> Value:
    _check_whole(eqn, x)
    window, steps = eqn.params["window_dimensions"], eqn.params["window_strides"]
    padding, dilated = eqn.params["padding"], eqn.params["window_dilation"]
    plain = set(dilated) | set(eqn.params["base_dilation"]) == {1} and len(window) == 4
    _demand(eqn, plain, "with dilation or a rank other than 4")
    outer = {(window[i], steps[i], tuple(padding[i])) for i in (0, 3)}
    _demand(eqn, outer == {(1, 1, (0, 0))}, "over images or channels")
    channels_first = graph.add("Transpose", x, perm=_CHANNELS_FIRST)
    pooled = graph.add(
        "MaxPool",
        Value(channels_first, ()),
        kernel_shape=window[1:3],
        strides=steps[1:3],
        pads=_pads(padding[1:3]),
    )
    return _channels_last(graph, eqn, pooled)


def _convolution(graph: Graph, eqn: Any, x: Value, kernel: Value) -> Value:
    _check_whole(eqn, x, kernel)
    numbers = eqn.params["dimension_numbers"]
    specs = numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec
    nhwc = specs == (_CHANNELS_FIRST, _KERNEL, _CHANNELS_FIRST)
    _demand(eqn, nhwc, "with a layout other than NHWC and HWIO")
    plain = set(eqn.params["lhs_dilation"]) | {eqn.params["batch_group_count"]} == {1}
    _demand(eqn, plain, "that is transposed or grouped over the batch")
    _demand(eqn, isinstance(kernel.held, np.ndarray), "with a non-constant kernel")
    channels_first = graph.add("Transpose", x, perm=_CHANNELS_FIRST)
    convolved = graph.add(
        "Conv",
        Value(channels_first, ()),
        np.ascontiguousarray(np.transpose(kernel.held, _KERNEL)),
        kernel_shape=kernel.shape[:2],
        strides=eqn.params["window_strides"],
        dilations=eqn.params["rhs_dilation"],
        pads=_pads(eqn.params["padding"]),
        group=eqn.params["feature_group_count"],
    )
    return _channels_last(graph, eqn, convolved)


def _pads(padding: Any) -> list[int]:
    """Returns padding in ONNX's order: all starts, then all ends."""
    return [low for low, _ in padding] + [high for _, high in padding]


def _channels_last(graph: Graph, eqn: Any, name: str) -> Value:
    last = graph.add("Transpose", Value(name, ()), perm=_CHANNELS_LAST)
    return Value(last, eqn.outvars[0].aval.shape)


def _transpose(graph: Graph, eqn: Any, x: Value) -> Value:
    _check_whole(eqn, x)
    name = graph.add("Transpose", x, perm=eqn.params["permutation"])
    return Value(name, eqn.outvars[0].aval.shape)


def _product(graph: Graph, eqn: Any, x: Value, matrix: Value) -> Value:
    _check_whole(eqn, x, matrix)
    contracted, batched = eqn.params["dimension_numbers"]
    flat = tuple(tuple(axes) for axes in (*contracted, *batched))
    of_last_axis = flat == ((len(x.shape) - 1,), (0,), (), ())
    _demand(
        eqn,
        of_last_axis and len(matrix.shape) == 2,
        "with an operand that is not a matrix",
    )
    return Value(graph.add("MatMul", x, matrix), eqn.outvars[0].aval.shape)


RULES: dict[str, Rule] = {
    "add": _elementwise("Add"),
    "sub": _elementwise("Sub"),
    "mul": _elementwise("Mul"),
    "div": _elementwise("Div"),
    "max": _elementwise("Max"),
    "logistic": _elementwise("Sigmoid"),
    "convert_element_type": _cast,
    "broadcast_in_dim": _broadcast,
    "reshape": _reshape,
    "concatenate": _concatenate,
    "slice": _slice,
    "reduce_sum": _sum,
    "reduce_window_max": _max_pool,
    "conv_general_dilated": _convolution,
    "dot_general": _product,
    "transpose": _transpose,
}


def packages() -> tuple[Any, Any]:
    """Returns the modules onnx and onnxruntime, or raises `InputError`."""
    try:
        import onnx  # pyright: ignore[reportMissingImports]
        import onnxruntime  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise InputError(
            f"--onnx needs onnx and onnxruntime ({error}); pip install 'jaxii[onnx]'"
        ) from error
    return onnx, onnxruntime


def to_onnx(program: ClosedJaxpr, metadata: dict[str, str]) -> bytes:
    """Returns a serialized ONNX model that maps images to probabilities.

    Args:
      program: Maps [batch, height, width, 3] to [batch, class], with symbolic batch.
      metadata: Metadata entries of the model.

    Raises:
      InputError: If an operation has no rule, the model exceeds 2 GiB, or onnx or
        onnxruntime is not installed.
    """
    onnx, _ = packages()
    graph, helper = Graph(), onnx.helper
    (images,), (probs,) = program.jaxpr.invars, program.jaxpr.outvars
    (result,) = _run(graph, program, [Value(INPUT, images.aval.shape)])
    # Gives the output its name; ONNX Runtime removes the node.
    graph.nodes.append(("Identity", [graph.name_of(result)], OUTPUT, {}))
    graph.keep_needed(OUTPUT)
    size = sum(array.nbytes for array in graph.constants.values())
    if size > MOST_BYTES:
        raise InputError(
            f"the ONNX model needs {size} bytes, but the format is limited to 2 GiB. "
            "Export without --onnx."
        )
    made = helper.make_graph(
        [helper.make_node(op, i, [o], **more) for op, i, o, more in graph.nodes],
        "jaxii",
        [_tensor(helper, INPUT, images.aval)],
        [_tensor(helper, OUTPUT, probs.aval)],
        [onnx.numpy_helper.from_array(a, n) for n, a in graph.constants.items()],
    )
    model = helper.make_model(
        made,
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="jaxii",
    )
    helper.set_model_props(model, metadata)
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString()


def _tensor(helper: Any, name: str, aval: Any) -> Any:
    sides = [side if isinstance(side, int) else BATCH for side in aval.shape]
    return helper.make_tensor_value_info(name, _tensor_type(aval.dtype), sides)


def _tensor_type(dtype: np.dtype) -> int:
    onnx, _ = packages()
    return onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))


def _run(graph: Graph, program: ClosedJaxpr, inputs: list[Value]) -> list[Value]:
    """Adds a program's operations to the graph and returns its outputs."""
    jaxpr = program.jaxpr
    values = dict(zip(jaxpr.constvars, map(constant, program.consts), strict=True))
    values |= zip(jaxpr.invars, inputs, strict=True)

    def value(atom):
        return constant(atom.val) if isinstance(atom, Literal) else values[atom]

    for eqn in jaxpr.eqns:
        given = [value(atom) for atom in eqn.invars]
        inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
        if isinstance(inner, ClosedJaxpr):
            found = _run(graph, inner, given)
        else:
            found = [_one(graph, eqn, given)]
        values |= zip(eqn.outvars, found, strict=True)
    return [value(atom) for atom in jaxpr.outvars]


def _one(graph: Graph, eqn: Any, given: list[Value]) -> Value:
    name = eqn.primitive.name
    sides = [side for atom in (*eqn.invars, *eqn.outvars) for side in atom.aval.shape]
    known = [x.held for x in given if isinstance(x.held, np.ndarray)]
    if len(known) == len(given) and all(isinstance(side, int) for side in sides):
        return constant(eqn.primitive.bind(*map(jnp.asarray, known), **eqn.params))
    if name not in RULES:
        raise InputError(
            f"the operation {name} of the network cannot be converted to ONNX; "
            f"supported: {', '.join(RULES)}. Export without --onnx."
        )
    return RULES[name](graph, eqn, *given)


def _check_whole(eqn: Any, *inputs: Value) -> None:
    for x, atom in zip(inputs, eqn.invars, strict=True):
        _demand(eqn, x.shape == atom.aval.shape, "with a broadcast operand")


def _demand(eqn: Any, is_met: bool, what: str) -> None:
    if not is_met:
        raise InputError(
            f"the operation {eqn.primitive.name} {what} cannot be converted to ONNX. "
            "Export without --onnx."
        )
