"""Trackers for Weights & Biases and MLflow, both optional packages.

A resumed workdir continues the same run of the service, whose id is kept in
`WORKDIR/tracked_run.json`. The services' own variables configure them: WANDB_PROJECT,
WANDB_MODE=offline, MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME.
"""

import json
import os
import secrets
import tempfile
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar

from jaxii.errors import InputError
from jaxii.storage import AnyPath, at, write_json
from jaxii.train.telemetry.images import Images, png
from jaxii.train.telemetry.tensorboard import TensorBoard
from jaxii.train.telemetry.trackers import Facts, Tracker, Trackers

PROJECT = "jaxii"
# Timeout of W&B at a run's start and end; its default would delay a preempted process.
WANDB_SECONDS = 20.0
# MLflow's limits of one request.
MLFLOW_BATCH = {"metrics": 1000, "params": 100}
MLFLOW_MOST_CHARACTERS = 5000


@contextmanager
def _needed(track: str) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise InputError(
            f"config.track={track!r} needs the package {track} ({error}); "
            f"pip install 'jaxii[{track}]'"
        ) from error


def _import_wandb() -> Any:
    with _needed("wandb"):
        import wandb  # pyright: ignore[reportMissingImports]
    return wandb


def _import_mlflow() -> Any:
    with _needed("mlflow"):
        import mlflow  # pyright: ignore[reportMissingImports]
    return mlflow


def _numbered(captions: Sequence[str]) -> str:
    return "\n".join(f"{i}: {caption}" for i, caption in enumerate(captions, 1))


class _Service(Tracker):
    """A workdir's run at a service.

    Args:
      workdir: Workdir of the run; if it is local, it also holds W&B's own files.
      facts: Name, settings and description of the run.
      say: Receives the address of the run.
    """

    name: ClassVar[str]

    def __init__(
        self,
        workdir: str | PathLike[str],
        facts: Facts,
        say: Callable[[str], None] = print,
    ):
        self._say, self._has_result = say, False
        folder = at(workdir)
        file, ids = folder / "tracked_run.json", dict[str, str]()
        if file.exists():
            ids = json.loads(file.read_text(encoding="utf-8"))
        self._run_id = ids[self.name] = self._open(folder, facts, ids.get(self.name))
        write_json(file, ids)
        say(f"{self.name}: {self._begin(facts)}")

    @abstractmethod
    def _open(self, folder: AnyPath, facts: Facts, run_id: str | None) -> str:
        """Reopens a run, or begins a new one; returns the run's id."""

    @abstractmethod
    def _begin(self, facts: Facts) -> str:
        """Prepares the open run for records; returns the run's address."""

    def result(self, step: int, figures: Mapping[str, float]) -> None:
        """Logs the figures; `close` then marks the run as finished."""
        self.scalars(step, figures)
        self._has_result = True

    def flush(self) -> None:
        """Does nothing: services send continuously."""


class Wandb(_Service):
    """A run at Weights & Biases; offline by WANDB_MODE, or if the server is down."""

    name = "wandb"

    @staticmethod
    def check() -> None:
        """Checks the package and, unless offline, the key.

        Raises:
          InputError: If one is missing.
        """
        wandb = _import_wandb()
        offline = wandb.setup().settings.mode in ("offline", "disabled", "dryrun")
        # `login` neither prompts nor contacts the server: a run starts without both.
        if not offline and not wandb.login(verify=False, prompt=False):
            raise InputError(
                "config.track='wandb' needs an API key of Weights & Biases, and none "
                "was found; run `wandb login`, or set WANDB_MODE=offline."
            )

    def _open(self, folder: AnyPath, facts: Facts, run_id: str | None) -> str:
        wandb = self._wandb = _import_wandb()
        run_id = run_id or secrets.token_hex(4)
        given = {
            "project": os.environ.get("WANDB_PROJECT", PROJECT),
            "id": run_id,
            "resume": "allow",
            "name": facts.name,
            "config": dict(facts.settings) | {"about": dict(facts.about)},
            "dir": str(folder) if isinstance(folder, Path) else None,
            # Otherwise W&B would wrap the terminal of the progress display.
            "settings": wandb.Settings(
                console="off",
                silent=True,
                init_timeout=WANDB_SECONDS,
                finish_timeout=WANDB_SECONDS,
            ),
            "allow_val_change": True,
        }
        try:
            self._run = wandb.init(**given)
        except wandb.errors.CommError:
            self._run = wandb.init(**given, mode="offline")
            self._say("wandb: the server does not respond.")
        return run_id

    def _begin(self, facts: Facts) -> str:
        # W&B's own step counter cannot go back when a killed run is resumed.
        self._run.define_metric("*", step_metric="step")
        folder = Path(self._run.dir).parent
        offline = f"offline; upload it with `wandb sync {folder}`"
        return offline if self._run.offline else self._run.url

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Logs figures."""
        self._run.log({**values, "step": step})

    def images(self, step: int, name: str, images: Images) -> None:
        """Logs the grid of images, with the captions below it."""
        caption = _numbered(images.captions)
        image = self._wandb.Image(images.pixels, caption=caption)
        self._run.log({name: image, "step": step})

    def result(self, step: int, figures: Mapping[str, float]) -> None:
        """Puts the figures into the run's summary."""
        super().result(step, figures)
        self._run.summary.update(dict(figures))

    def close(self) -> None:
        """Sends the remaining records and ends the run."""
        self._run.finish(exit_code=0 if self._has_result else 1)


class Mlflow(_Service):
    """A run at an MLflow server, or in MLflow's own SQLite file."""

    name = "mlflow"

    @staticmethod
    def check() -> None:
        """Checks the package.

        Raises:
          InputError: If it is missing.
        """
        _import_mlflow()

    def _open(self, folder: AnyPath, facts: Facts, run_id: str | None) -> str:
        self._mlflow = _import_mlflow()
        self._client = self._mlflow.MlflowClient()
        if run_id is not None and self._knows(run_id):
            return run_id
        return self._create(facts)

    def _begin(self, facts: Facts) -> str:
        self._describe(facts)
        self._client.update_run(self._run_id, status="RUNNING")
        return f"run {self._run_id} at {self._mlflow.get_tracking_uri()}"

    def _knows(self, run_id: str) -> bool:
        try:
            self._client.get_run(run_id)
        except self._mlflow.exceptions.MlflowException as error:
            # The run belongs to another server; other errors are raised.
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return False
            raise
        return True

    def _create(self, facts: Facts) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self._client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else None
        experiment = experiment or self._client.create_experiment(name)
        tags = {
            f"about.{k}": v[:MLFLOW_MOST_CHARACTERS] for k, v in facts.about.items()
        }
        run = self._client.create_run(experiment, run_name=facts.name, tags=tags)
        return run.info.run_id

    def _describe(self, facts: Facts) -> None:
        """Logs the new parameters; MLflow rejects changes of existing ones."""
        there = self._client.get_run(self._run_id).data.params
        params = [
            self._mlflow.entities.Param(name, str(value)[:MLFLOW_MOST_CHARACTERS])
            for name, value in facts.settings.items()
            if name not in there
        ]
        self._log("params", params)

    def _log(self, kind: str, entries: list[Any]) -> None:
        size = MLFLOW_BATCH[kind]
        for first in range(0, len(entries), size):
            batch = {kind: entries[first : first + size]}
            self._client.log_batch(self._run_id, **batch)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Logs figures."""
        now = int(time.time() * 1000)
        metrics = [
            self._mlflow.entities.Metric(name, value, now, step)
            for name, value in values.items()
        ]
        self._log("metrics", metrics)

    def images(self, step: int, name: str, images: Images) -> None:
        """Logs the grid of images as PNG, and the captions as text."""
        stem = f"{name.replace('/', '_')}_{step}"
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, f"{stem}.png")
            file.write_bytes(png(images.pixels))
            self._client.log_artifact(self._run_id, str(file), "images")
        text = _numbered(images.captions)
        self._client.log_text(self._run_id, text, f"images/{stem}.txt")

    def close(self) -> None:
        """Ends the run; a resume reopens it."""
        status = "FINISHED" if self._has_result else "KILLED"
        self._client.set_terminated(self._run_id, status=status)


SERVICES = {service.name: service for service in (Wandb, Mlflow)}


def check_tracker(track: str) -> None:
    """Checks that a service is installed and has credentials; "" is no service.

    Raises:
      InputError: If the package or the credentials are missing.
    """
    if track:
        SERVICES[track].check()


def open_trackers(
    workdir: str | PathLike[str],
    facts: Facts,
    *,
    track: str = "",
    start_step: int = 0,
    warn: Callable[[str], None],
) -> Trackers:
    """Starts TensorBoard's files and the configured service.

    Args:
      workdir: Workdir of the run; holds the run's id at the service.
      facts: Name, settings and description of the run.
      track: A key of `SERVICES`, or "".
      start_step: Updates done before this process started.
      warn: Receives messages, in a tracker's own thread.
    """
    makers: dict[str, Callable[[], Tracker]] = {
        "TensorBoard": lambda: TensorBoard(workdir, facts, start_step=start_step)
    }
    if track:
        makers[track] = lambda: SERVICES[track](workdir, facts, warn)
    return Trackers(makers, warn)
