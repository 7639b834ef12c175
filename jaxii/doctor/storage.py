"""Where a run writes: room and speed of the disk, and JAX's folder of programs."""

import os
import shutil
import tempfile
import time
import zlib
from pathlib import Path

from jaxii.doctor.finding import Finding

GB, MB = 1e9, 1e6
# Below this a few checkpoints of a large network fill a disk.
FEW_BYTES = 2 * GB
WRITTEN_BYTES = 64 * 2**20
# Looking into programs takes no longer.
CACHE_SECONDS = 3.0


def disk(folder: Path) -> Finding:
    """Returns room and write speed where a folder is or will be.

    Args:
      folder: need not be there; the nearest one above it that is, is measured.
    """
    place = folder.absolute()
    found = Finding()
    try:
        while not place.is_dir():
            place = place.parent
        free = shutil.disk_usage(place).free
        speed = _write_speed(place, min(WRITTEN_BYTES, free // 4))
    except OSError as error:
        return Finding(
            broken=[f"{place} cannot be written ({error.strerror}); give --workdir"]
        )
    found.lines.append(
        f"disk      {place}: {free / GB:,.0f} GB free, written with {speed / MB:,.0f} "
        "MB/s"
    )
    if free < FEW_BYTES:
        found.broken.append(
            f"{place} has {free / GB:.1f} GB free; make room for the checkpoints, or "
            "give another --workdir"
        )
    return found


def _write_speed(place: Path, size: int) -> float:
    block = os.urandom(1 << 20)
    with tempfile.TemporaryFile(dir=place) as file:
        start = time.perf_counter()
        for _ in range(max(1, size >> 20)):
            file.write(block)
        file.flush()
        # What is only in memory has not been written.
        os.fsync(file.fileno())
        return max(1, size >> 20) * len(block) / (time.perf_counter() - start)


def compiled_programs(folder: str) -> Finding:
    """Returns what JAX has kept, and the entries that it warns of at each start.

    Args:
      folder: of the persistent compilation cache; "" where there is none.
    """
    if not folder:
        return Finding(
            ["programs  not kept (JAX_COMPILATION_CACHE_DIR): each start compiles anew"]
        )
    if "://" in folder or not Path(folder).is_dir():
        return Finding([f"programs  are kept in {folder}"])
    entries = sorted(
        (path for path in Path(folder).glob("*-cache") if path.is_file()),
        key=lambda path: path.stat().st_mtime,
        reverse=True,
    )
    size = sum(path.stat().st_size for path in entries)
    end = time.monotonic() + CACHE_SECONDS
    broken, looked_at = [], 0
    for path in entries:
        if time.monotonic() > end:
            break
        looked_at += 1
        try:
            whole = _is_whole(path.read_bytes())
        except OSError as error:
            broken.append(
                f"{path} cannot be read ({error.strerror}); set "
                "JAX_COMPILATION_CACHE_DIR to a folder of your own"
            )
            continue
        if not whole:
            broken.append(
                f"{path} is cut off: JAX warns and compiles it again at each start; "
                "delete it"
            )
    part = "" if looked_at == len(entries) else f", the newest {looked_at} looked into"
    line = f"programs  {folder}: {len(entries)} kept, {size / MB:,.1f} MB{part}"
    return Finding([line], broken)


def _is_whole(data: bytes) -> bool:
    """Says whether an entry decompresses to its end; of zstd's only the start is read.

    JAX takes zlib, or zstd where Python has it (3.14, or the package zstandard).
    """
    if data[:4] == b"\x28\xb5\x2f\xfd":
        return True
    decompress = zlib.decompressobj()
    try:
        decompress.decompress(data)
    except zlib.error:
        return False
    return decompress.eof
