"""Checks that all processes of a command read the same runs and results.

Folders of one name differ between processes if they are local to each machine.
"""

import hashlib
import os
from collections.abc import Iterable, Sequence

from jaxii import manifest
from jaxii.distributed import processes
from jaxii.runs.run import Run
from jaxii.runs.workdir import Workdir
from jaxii.storage import AnyPath
from jaxii.train.checkpoint import complete_steps


def check_same_runs(runs: Sequence[Run]) -> None:
    """Checks that all processes opened the same runs at the same checkpoints.

    Raises:
      InputError: On every process, if a run, its batch size or its checkpoint differs.
    """
    # First, because every process must compare the same number of checkpoints.
    paths = [os.fspath(run.workdir.path) for run in runs]
    processes.check_same(_digest(paths), "the runs are different")
    for run, path in zip(runs, paths, strict=True):
        other = f"the checkpoint of {path} is different"
        processes.check_same(_digest(_words([run])), other)


def check_same_checkpoints(workdir: Workdir, stages: Iterable[str]) -> None:
    """Checks that all processes have the same checkpoints of a run to resume.

    Call before Orbax opens them: it waits for the processes that have the same stages.

    Args:
      workdir: The run's folder.
      stages: Names of the run's stages.

    Raises:
      InputError: On every process, if a checkpoint differs.
    """
    folders = [workdir.path / "checkpoints" / stage for stage in stages]
    saved = [
        folder / str(step) for folder in folders for step in complete_steps(folder)
    ]
    # The manifest of a checkpoint has the hashes of its metadata and arrays.
    manifests = [folder / manifest.NAME for folder in saved]
    check_same_files(
        [path for path in manifests if path.exists()],
        f"the checkpoints of {workdir.path} are different",
    )


def check_same_data(runs: Iterable[Run]) -> None:
    """Checks that all processes opened the same dataset for each run.

    Raises:
      InputError: On every process, if a dataset differs.
    """
    for run in runs:
        data, path = run.data, run.workdir.path
        other = f"the dataset of {path} ({data.directory}) is different"
        processes.check_same(data.content_hash, other)


def check_same_files(files: Iterable[AnyPath], problem: str) -> None:
    """Checks that all processes have the same files; reads each once.

    Args:
      files: The files.
      problem: See `processes.check_same`.

    Raises:
      InputError: On every process, if a file differs.
    """
    found = {os.fspath(file): manifest.describe(file) for file in files}
    processes.check_same(manifest.Manifest(found).content_hash(), problem)


def check_same_evaluation(workdir: Workdir, variants: Sequence[str] = ()) -> None:
    """Checks that all processes have the same figures and decoders of a run.

    Args:
      variants: See `Workdir.result_file`.

    Raises:
      InputError: On every process, if a file differs.
    """
    check_same_files(
        _evaluation_files(workdir, variants),
        f"the evaluation of {workdir.path} is different",
    )


def identity(
    runs: Iterable[Run], workdir: Workdir, variants: Sequence[str], *more: str
) -> str:
    """Returns a digest of checkpoints, of an evaluation and of more words.

    Args:
      variants: See `Workdir.result_file`.
    """
    files = _evaluation_files(workdir, variants)
    found = manifest.Manifest({file.name: manifest.describe(file) for file in files})
    return _digest([*_words(runs), found.content_hash(), *more])


def _evaluation_files(workdir: Workdir, variants: Sequence[str]) -> list[AnyPath]:
    names = "metrics.json", "decoders.npz"
    return [workdir.result_file(name, variants) for name in names]


def _words(runs: Iterable[Run]) -> list[str]:
    return [f"{run.config.content_hash()} {run.checkpoint_hash}" for run in runs]


def _digest(words: Iterable[str]) -> str:
    text = "\0".join(words)
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()
