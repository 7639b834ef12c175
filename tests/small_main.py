"""`jaxii.main` with one block per stage, so that tests spend less time compiling."""

from jaxii import main
from tests.small_layers import few_blocks

if __name__ == "__main__":
    with few_blocks(1, 1, 1, 1):
        main.run()
