"""Reduces a folder of JPEGs with Pillow in a pool of processes: prints seconds (JSON).

    python prepare.py FOLDER OUTPUT SHORT_SIDE PROCESSES

The usual loop: open, convert to RGB, resize (bicubic, Pillow's default), save with the
quality that jaxii stores. The processes start before the clock does.
"""

import functools
import json
import multiprocessing
import sys
import time
from pathlib import Path

from PIL import Image

QUALITY = 92


def reduce(path, output, short_side):
    with Image.open(path) as file:
        image = file.convert("RGB")
    scale = short_side / min(image.size)
    if scale < 1:
        image = image.resize(tuple(max(1, round(side * scale)) for side in image.size))
    image.save(output / path.name, quality=QUALITY)
    return 1


def main():
    folder, output, short_side, processes = sys.argv[1:]
    paths = sorted(Path(folder).glob("*.jpg"))
    work = functools.partial(reduce, output=Path(output), short_side=int(short_side))
    with multiprocessing.Pool(int(processes)) as pool:
        pool.map(abs, range(int(processes)))
        start = time.perf_counter()
        done = sum(pool.imap_unordered(work, paths, chunksize=16))
        passed = time.perf_counter() - start
    print(json.dumps({"seconds": passed, "images": done}))


if __name__ == "__main__":
    main()
