"""`jaxii.main`, which also records the examples of every step.

Started in its place by `many_processes`; wraps the batches on their way to the loop.
"""

import functools
import json
import os
from pathlib import Path

from jaxii import main
from jaxii.data import pipeline


def recorded(make):
    """Wraps `pipeline.train_batches`: writes a line per batch that the loop takes."""

    @functools.wraps(make)
    def batches(*args, shard, **more):
        folder = Path(os.environ["RECORDS_OF_EXAMPLES"])
        folder.mkdir(parents=True, exist_ok=True)
        name = f"{shard.process_index}_of_{shard.process_count}.jsonl"
        with (folder / name).open("a") as file:
            for batch in make(*args, shard=shard, **more):
                positions = batch[pipeline.POSITIONS].tolist()
                row = {
                    "step": positions[0] // shard.global_batch_size + 1,
                    "process": shard.process_index,
                    "positions": positions,
                    "index": batch[pipeline.INDEX].tolist(),
                }
                file.write(json.dumps(row) + "\n")
                file.flush()
                yield batch

    return batches


if __name__ == "__main__":
    pipeline.train_batches = recorded(pipeline.train_batches)
    main.run()
