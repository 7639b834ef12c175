"""Writes shards on many machines through Apache Beam.

Each element of the pipeline is a shard, written by `shards.write_shard`. The records
are byte for byte the same as those written by threads, and existing shards are kept.
The paths and labels of a shard's images are in a file beside it, because Dataflow
limits a job description to 10 MB.
"""

import hashlib
import pickle
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxii.console import OnProgress, no_progress
from jaxii.errors import InputError
from jaxii.prepare import shards
from jaxii.prepare.threads import one_thread_each
from jaxii.storage import AnyPath, at, names_in, write_beside

SECONDS_BETWEEN_LOOKS = 5.0


@dataclass(frozen=True)
class Beam:
    """Where a pipeline runs.

    Attributes:
      runner: Name of an Apache Beam runner: DirectRunner, DataflowRunner, ...
      options: Pipeline options, each "name=value" or "name".
    """

    runner: str
    options: tuple[str, ...] = ()

    def pipeline(self) -> Any:
        """Returns an empty pipeline.

        Raises:
          InputError: If Apache Beam is not installed, or the runner or an option is
            unknown or missing.
        """
        try:
            from apache_beam import (  # pyright: ignore[reportMissingImports]
                Pipeline,
                options,
            )
        except ImportError as error:
            raise InputError(
                f"--beam_runner={self.runner} requires Apache Beam ({error}); "
                "run pip install 'jaxii[beam]'"
            ) from error
        given = options.pipeline_options.PipelineOptions(
            [f"--runner={self.runner}", *(f"--{option}" for option in self.options)]
        )
        every = given.get_all_options(retain_unknown_options=True)
        unknown = sorted(every.keys() - given.get_all_options().keys())
        if unknown:
            raise InputError(
                f"--beam_options: Apache Beam has no option {', '.join(unknown)}; "
                "see its documentation on pipeline options"
            )
        try:
            return Pipeline(options=given)
        except (ValueError, ImportError, AttributeError) as error:
            raise InputError(f"--beam_runner={self.runner}: {error}") from error

    def check(self, paths: Sequence[AnyPath]) -> None:
        """Checks that the pipeline can run and reach these folders.

        Raises:
          InputError: As for `pipeline`, or if Dataflow cannot reach a folder.
        """
        local = [path for path in paths if isinstance(path, Path)]
        if "dataflow" in self.runner.lower() and local:
            raise InputError(
                f"{local[0]} is a local folder, which Dataflow cannot access; copy the "
                "images to gs:// and use a gs:// folder for the dataset"
            )
        self.pipeline()


def write_with_beam(
    directory: AnyPath,
    plans: Sequence[shards.Plan],
    *,
    short_side: int,
    beam: Beam,
    on_progress: OnProgress = no_progress,
) -> None:
    """Writes the missing shards of all splits.

    Args:
      directory: An existing folder, without shards or with shards of the same plans.
      plans: One per split.
      short_side: See `recode.recode`.
      beam: Where the pipeline runs.
      on_progress: Called every few seconds with (images in finished shards, images in
        all, runner).
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
                missing.append((str(path), hashlib.sha256(job).hexdigest()))

    def report() -> None:
        names = names_in(directory)
        done = sum(n for path, n in images.items() if path.name in names)
        on_progress(done, sum(images.values()), beam.runner)

    if missing:
        _run(beam, missing, short_side, report)
    report()


def _run(beam: Beam, missing: list[tuple[str, str]], short_side: int, report) -> None:
    # `pipeline.run` returns at once for some runners and at the end for others. It runs
    # in a thread, so that this one can report progress and react to Ctrl-C.
    from apache_beam import (  # pyright: ignore[reportMissingImports]
        Create,
        Map,
        Reshuffle,
    )

    pipeline = beam.pipeline()
    # Without a shuffle, a runner may give all elements to one machine.
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


def _write_planned(job: tuple[str, str], short_side: int) -> None:
    """Writes one shard, on a machine of the runner.

    Args:
      job: The shard's path and the SHA-256 of its plan, which is a pickle.
      short_side: See `recode.recode`.
    """
    name, digest = job
    path = at(name)
    if path.exists() and shards.account_path(path).exists():
        return  # runners may repeat an element
    plan = _plan_path(path).read_bytes()
    if hashlib.sha256(plan).hexdigest() != digest:
        raise ValueError(f"{_plan_path(path)} does not match the plan of this job")
    first_row, part = pickle.loads(plan)
    from apache_beam.metrics import (  # pyright: ignore[reportMissingImports]
        Metrics,
    )

    with one_thread_each():
        shards.write_shard(
            path,
            part,
            first_row=first_row,
            short_side=short_side,
            advance=Metrics.counter("jaxii", "images").inc,
        )


def _plan_path(shard: AnyPath) -> AnyPath:
    return shard.with_name(shard.name + ".plan")
