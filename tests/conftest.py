"""Tests are stricter than production.

They run with eight simulated CPU devices, strict dtype promotion, no implicit rank
promotion, runtime checks of types and shapes in all of jaxii, and warnings as errors.
"""

import contextlib
import gc
import os
import time
from importlib.metadata import version

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Without it, commands start twice to set it; see `main.use_huge_pages`.
os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
# Compilation takes most of the suite's time. XLA runs the same passes over a program as
# in production, but its code generation hardly optimizes. The older code generator
# compiles in two thirds of the time; jaxlib 0.12 has only a newer one.
os.environ["XLA_FLAGS"] = " ".join(
    (
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
        "--xla_cpu_use_fusion_emitters=false"
        if version("jaxlib").startswith("0.10.")
        else "",
    )
)

import jax
import pytest
import typechecker

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

typechecker.install("jaxii")

DAYS_KEPT = 7


def pytest_configure(config):
    """Keeps compiled programs in pytest's cache, for all workers and subprocesses."""
    if "PYTEST_XDIST_WORKER" in os.environ or not hasattr(config, "cache"):
        return
    folder = config.cache.mkdir("compiled")
    # jaxii ignores folders that others may write to, as with a umask for groups.
    folder.chmod(0o700)
    oldest = time.time() - DAYS_KEPT * 24 * 3600
    for path in folder.iterdir():
        if path.stat().st_mtime < oldest:
            path.unlink()
    settings = {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    for name, value in settings.items():
        jax.config.update(name, value)
        # JAX reads the environment in workers and subprocesses.
        os.environ[name.upper()] = str(value)


def pytest_collection_finish(session):
    """Collects garbage less often: each collection visits all modules and programs."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*gc.get_threshold()[:2], 100)


# Files that take over ten seconds, the longest first.
LONGEST = (
    "test_readme",
    "test_end_to_end",
    "test_provenance_paths",
    "test_programs",
    "test_trainer",
    "test_resnet",
    "test_normalised_convolution",
    "test_sharding",
    "test_layers",
    "test_main",
    "test_augment",
    "test_step",
    "test_recurring",
    "test_hold_out",
    "test_doctor",
    "test_speed",
    "test_failing_saves",
)


def pytest_collection_modifyitems(items):
    """Starts the longest files first, so that both workers end at the same time."""
    rank = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


@pytest.fixture(scope="module")
def without_drawings():
    """Omits the figures of reports: they take half the time of an evaluation."""
    with pytest.MonkeyPatch.context() as patch:
        names = "training", "threshold", "reliability", "throughput", "map"
        empty = {f"{name}_figure": "" for name in names}
        patch.setattr("jaxii.report.page._figures", lambda *_: empty)
        yield


@pytest.fixture
def without_space(monkeypatch):
    """Returns a context in which a file cannot be written, as on a full disk.

    The draft of the file is a link to /dev/full. The writer has to remove it.
    """
    monkeypatch.setattr("jaxii.storage.secrets.token_hex", lambda _: "draft")

    @contextlib.contextmanager
    def without_space(path):
        draft = path.with_name(f".{path.name}.draft.part")
        draft.symlink_to("/dev/full")
        yield
        assert not draft.is_symlink()

    return without_space
