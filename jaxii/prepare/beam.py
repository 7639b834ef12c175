"""Writes shards on many machines through Apache Beam, before `shards` completes them.

An element of the pipeline is a shard, and it is written by the function that the
threads of one machine use: the same records in the same order, byte for byte, and a
shard that is there is never written again. `shards.write` then finds them all and
accounts for them. What a shard needs (the paths and labels of its images) lies beside
it in a file: Dataflow takes 10 MB of job description, and this is a gigabyte.
"""

import pickle
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxii.errors import InputError
from jaxii.prepare import shards
from jaxii.storage import AnyPath, at, names_in, write_beside

PLAN_SUFFIX = ".plan"
SECONDS_BETWEEN_LOOKS = 5.0


@dataclass(frozen=True)
class Beam:
    """Where a pipeline runs; Apache Beam is needed only when one is made.

    Args:
      runner: as Apache Beam names it: DirectRunner, DataflowRunner, FlinkRunner ...
      options: of the pipeline, as "name=value" or "name".
    """

    runner: str
    options: tuple[str, ...] = ()

    def pipeline(self) -> Any:
        """Returns an empty pipeline.

        Raises:
          InputError: Apache Beam is not installed, or it knows no such runner or
            option, or misses one.
        """
        try:
            from apache_beam import (  # pyright: ignore[reportMissingImports]
                Pipeline,
                options,
            )
        except ImportError as error:
            raise InputError(
                f"--beam_runner={self.runner} needs Apache Beam ({error}); "
                "pip install 'jaxii[beam]'"
            ) from error
        given = options.pipeline_options.PipelineOptions(
            [f"--runner={self.runner}", *(f"--{option}" for option in self.options)]
        )
        every = given.get_all_options(retain_unknown_options=True)
        unknown = sorted(every.keys() - given.get_all_options().keys())
        if unknown:
            raise InputError(
                f"--beam_options: {', '.join(unknown)} is no option of Apache Beam; "
                "see its documentation of pipeline options"
            )
        try:
            return Pipeline(options=given)
        except (ValueError, ImportError, AttributeError) as error:
            raise InputError(f"--beam_runner={self.runner}: {error}") from error

    def check(self, paths: Sequence[AnyPath]) -> None:
        """Refuses what cannot run, before label files are read.

        Args:
          paths: what the machines of the runner read and write.

        Raises:
          InputError: as in `pipeline`, or a path is out of Dataflow's reach.
        """
        local = [path for path in paths if isinstance(path, Path)]
        if "dataflow" in self.runner.lower() and local:
            raise InputError(
                f"{local[0]} is on this machine, out of reach of Dataflow; copy the "
                "images to gs:// and give a gs:// folder for the dataset"
            )
        self.pipeline()


def write_with_beam(
    directory: AnyPath,
    plans: Sequence[shards.Plan],
    *,
    short_side: int,
    beam: Beam,
    on_progress: shards.Progress | None = None,
) -> None:
    """Writes the shards of all splits that are not there yet.

    Args:
      directory: exists; holds shards of the same plans or none.
      plans: one a split.
      short_side: pixels, see `recode.recode`.
      beam: where.
      on_progress: called with (images done, images in all, runner), a whole shard at a
        time.
    """
    present = names_in(directory)
    images: dict[AnyPath, int] = {}
    missing = []
    for plan in plans:
        paths = shards.shard_paths(directory, plan)
        for path, rows in zip(paths, plan.shards(), strict=True):
            images[path] = len(rows)
            if not {path.name, shards.account_path(path).name} <= present:
                job = pickle.dumps((rows.start, plan.part(rows)))
                write_beside(
                    _plan_path(path), lambda file, j=job: file.write(j), binary=True
                )
                missing.append(str(path))

    def report() -> None:
        if on_progress is not None:
            names = names_in(directory)
            done = sum(n for path, n in images.items() if path.name in names)
            on_progress(done, sum(images.values()), beam.runner)

    if missing:
        _run(beam, missing, short_side, report)
    report()


def _run(beam: Beam, missing: list[str], short_side: int, report) -> None:
    # Some runners return at once and others at the end: a thread of its own lets both
    # report, and Ctrl-C end them.
    from apache_beam import (  # pyright: ignore[reportMissingImports]
        Create,
        Map,
        Reshuffle,
    )

    pipeline = beam.pipeline()
    # Without a shuffle a runner may leave all elements to one machine.
    act = Map(_write_planned, short_side=short_side)
    _ = pipeline | Create(missing) | Reshuffle() | act
    results, errors = [], []

    def run() -> None:
        try:
            results.append(pipeline.run())
            results[0].wait_until_finish()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            thread.join(timeout=SECONDS_BETWEEN_LOOKS)
            report()
    except BaseException:
        for result in results:
            result.cancel()
        raise
    for error in errors:
        raise error


def _write_planned(name: str, short_side: int) -> None:
    """Writes one shard; runs on a machine of the runner."""
    from apache_beam.metrics import (  # pyright: ignore[reportMissingImports]
        Metrics,
    )

    path = at(name)
    if path.exists() and shards.account_path(path).exists():
        return  # runners try again what they have lost sight of
    first_row, part = pickle.loads(_plan_path(path).read_bytes())
    with shards.one_thread_each():
        shards.write_shard(
            path,
            part,
            first_row=first_row,
            short_side=short_side,
            advance=Metrics.counter("jaxii", "images").inc,
        )


def _plan_path(shard: AnyPath) -> AnyPath:
    return shard.with_name(shard.name + PLAN_SUFFIX)
