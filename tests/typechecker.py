"""Checks jaxii's annotations at runtime in tests; an int may stand for a float.

jaxtyping's import hook decorates every function with `jaxtyping.jaxtyped`, which also
tracks dimensions and takes a tenth of the suite's time. `install` uses it only for
functions with array annotations; beartype checks the types of the others.
"""

import inspect
from collections.abc import Callable
from typing import Any, get_args

import jaxtyping
from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True, violation_type=TypeError))
_with_dimensions = jaxtyping.jaxtyped


def install(package: str) -> None:
    """Checks every function and dataclass of a package that is imported from now on."""
    jaxtyping.jaxtyped = _checked
    jaxtyping.install_import_hook(package, f"{__name__}.check")


def _checked(*, typechecker: Any) -> Callable[[Any], Any]:
    def decorate(thing: Any) -> Any:
        annotations = getattr(thing, "__annotations__", {})
        if inspect.isfunction(thing) and not any(map(_is_array, annotations.values())):
            return typechecker(thing) if annotations else thing
        return _with_dimensions(typechecker=typechecker)(thing)

    return decorate


def _is_array(annotation: Any) -> bool:
    """Returns whether an annotation contains or may contain an array of jaxtyping."""
    if isinstance(annotation, type) and issubclass(annotation, jaxtyping.AbstractArray):
        return True
    return isinstance(annotation, str) or any(map(_is_array, get_args(annotation)))
