"""The checkpoint of another run that a run starts from, and its record."""

import json
from dataclasses import asdict, dataclass

from jaxii.config import Config, check_equal
from jaxii.errors import InputError
from jaxii.runs.run import Run
from jaxii.runs.workdir import Workdir
from jaxii.storage import write_json

# Fields of the network that its trunk depends on.
TRUNK_FIELDS = ("variant", "depth", "width", "stem")


@dataclass(frozen=True, kw_only=True)
class StartPoint:
    """A checkpoint of another run, as `Workdir.start_file` records it.

    Attributes:
      workdir: The other run's workdir.
      stage: Stage of the checkpoint.
      step: Step of the checkpoint.
      part: "network", or "trunk" if the heads start fresh.
      digest: See `Checkpoints.content_hash`.
    """

    workdir: str
    stage: str
    step: int
    part: str
    digest: str

    @classmethod
    def of(cls, start: Run, config: Config) -> "StartPoint":
        """Returns the start of a run.

        Args:
          start: The other run, at its checkpoint.
          config: Configuration of the run that starts from it.
        """
        return cls(
            workdir=str(start.workdir.path),
            stage=start.saved.stage,
            step=start.saved.step,
            part="network" if config.start_from else "trunk",
            digest=start.checkpoint_hash,
        )

    @classmethod
    def load(cls, workdir: Workdir) -> "StartPoint | None":
        """Returns the recorded start of a run.

        Returns:
          None if the run started from no other run, or was begun by an earlier version
          of jaxii, which did not record it.

        Raises:
          InputError: If the record is damaged.
        """
        path = workdir.start_file
        if not path.exists():
            return None
        try:
            return cls(**json.loads(path.read_bytes()))
        except (OSError, TypeError, ValueError) as error:
            raise InputError(
                f"{path} cannot be read ({error}); restore it from a copy, or train "
                "again in another workdir."
            ) from error

    def save(self, workdir: Workdir) -> None:
        """Records the start of a run."""
        write_json(workdir.start_file, asdict(self))

    def __str__(self) -> str:
        trunk = "trunk of " if self.part == "trunk" else ""
        return (
            f"{trunk}step {self.step} of stage {self.stage} of {self.workdir} "
            f"(checkpoint {self.digest[:16]})"
        )

    def check_same(self, workdir: Workdir) -> None:
        """Checks that a run without a checkpoint starts again from the same weights.

        Args:
          workdir: Workdir of that run.

        Raises:
          InputError: If an earlier start was from another checkpoint.
        """
        before = StartPoint.load(workdir)
        if before is not None and before.digest != self.digest:
            raise InputError(
                f"{workdir.path} started from {before}, but the best checkpoint there "
                f"is now that of {self}; use another workdir to start from it, or "
                "restore the former checkpoint."
            )


def check_same_trunk(start: Run, config: Config) -> None:
    """Checks that the trunk of a run has the architecture of a configuration.

    Raises:
      InputError: If a field of `TRUNK_FIELDS` differs; names the field.
    """
    check_equal(
        start.config.model,
        config.model,
        TRUNK_FIELDS,
        f"{start.workdir.path} has a trunk with model",
        f"; use the same {', '.join(TRUNK_FIELDS)}.",
    )
