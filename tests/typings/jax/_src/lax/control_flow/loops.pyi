from collections.abc import Callable
from typing import Any

def map(f: Callable[[Any], Any], xs: Any) -> Any: ...
def scan(
    f: Callable[[Any, Any], tuple[Any, Any]],
    init: Any,
    xs: Any,
    unroll: int | bool = ...,
) -> tuple[Any, Any]: ...
def __getattr__(name: str) -> Any: ...
