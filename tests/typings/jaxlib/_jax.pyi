# jaxlib has no stubs: without this, every function of JAX that takes a device is partly
# unknown.
from typing import Any

class Device:
    id: int
    platform: str
    device_kind: str
    process_index: int
    coords: tuple[int, ...]
    def memory_stats(self) -> dict[str, int] | None: ...

class Client: ...

def __getattr__(name: str) -> Any: ...
