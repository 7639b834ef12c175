"""Fuzzes the reading of images or tables with atheris (Python 3.11 or 3.12).

    pip install atheris
    python -m tests.fuzz images FOUND tests/fuzz/seeds/images -max_total_time=1800

FOUND is a folder for inputs that reach new code; the other arguments are options of
libFuzzer. An input that crashes, hangs or raises is written to the current folder. Once
it is fixed, add it to seeds/: `test_bad_corpus` reads those files.
"""

import sys

import atheris

with atheris.instrument_imports(include=["jaxii"]):
    from tests.fuzz import readers

if __name__ == "__main__":
    name = sys.argv.pop(1)
    atheris.Setup(sys.argv, {"images": readers.image, "tables": readers.table}[name])
    atheris.Fuzz()
