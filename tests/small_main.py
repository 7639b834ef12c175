"""`jaxii.main` with one block a stage, so that compilation is not most of the test."""

from jaxii import main
from tests.small_layers import few_blocks

if __name__ == "__main__":
    with few_blocks(1, 1, 1, 1):
        main.run()
