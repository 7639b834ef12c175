"""Multi-label image classifiers in JAX: `load`, `train`, `evaluate`, and their parts.

Nothing is imported before it is used: `import jaxii` does not import JAX.
"""

# `__getattr__` provides the names; `__init__.pyi` declares them.
# pyright: reportUnsupportedDunderAll=false

import sys
from types import ModuleType
from typing import Any

from jaxii import train

__all__ = (
    "Config",
    "Run",
    "decoding",
    "evaluate",
    "load",
    "losses",
    "metrics",
    "train",
)


class _CallableModule(ModuleType):
    """The package `jaxii.train`, which trains a run when it is called."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        from jaxii.runs import api

        return api.train(*args, **options)


sys.modules[train.__name__].__class__ = _CallableModule


def __getattr__(name: str) -> Any:
    if name in ("load", "evaluate", "Run"):
        from jaxii.runs import api

        return getattr(api, name)
    if name == "Config":
        from jaxii.config import Config

        return Config
    if name == "losses":
        from jaxii.objective import losses

        return losses
    if name == "metrics":
        import jaxii.metrics

        return jaxii.metrics
    if name == "decoding":
        import jaxii.decoding

        return jaxii.decoding
    raise AttributeError(f"module 'jaxii' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
