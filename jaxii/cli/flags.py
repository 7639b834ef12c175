"""Declares and reads the flags of a command, and the flags that commands share."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

from absl import flags as absl_flags
from ml_collections import config_flags

from jaxii.config import Config
from jaxii.distributed.cluster import ProcessInfo
from jaxii.errors import InputError, nearest_path
from jaxii.storage import AnyPath, at
from jaxii.train.stages import Origin

# The same as `decoding.decoders.NAMES`, which imports JAX; the first is the default.
DECODERS = (
    "expected_f2",
    "threshold",
    "per_class",
    "top_k",
    "embedding",
)


# The same as `prepare.recurring.CHOICES`, which imports Polars.
NEAR_COPIES = ("keep", "remove", "ignore")
# The same as `prepare.tables.rows.CHOICES` without "", which imports Polars.
SEPARATORS = ("none", "|", ";", ",", "space", "json")


class Flags:
    """The flags of one command.

    Flags are declared in the order of the help, where `placeholder` stands for the
    value. After parsing, each value is an attribute: `flags.workdir`.

    Attributes:
      values: The flags as absl parses them.
      entries: The help of each flag: its form and a description with the default. An
        entry without a form is a paragraph.
      placeholder: Name of the words that the command takes beside flags; "" for none.
      words: The words given beside flags.
      place: This process among several; None before `start_jax`, and for a single
        process.
    """

    def __init__(self, argv: Sequence[str] = ()):
        self.values = absl_flags.FlagValues()
        self.entries: list[tuple[str, str]] = []
        self.placeholder = ""
        self.words: list[str] = []
        self.place: ProcessInfo | None = None
        self._argv = list(argv)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.values, name)

    def takes_words(self, placeholder: str) -> None:
        """Declares that the command takes words beside flags."""
        self.placeholder = placeholder

    def paragraph(self, text: str) -> None:
        """Adds a paragraph to the help, above the flags that follow."""
        self.entries.append(("", text))

    def text(
        self,
        name: str,
        placeholder: str,
        help: str,
        *,
        default: str = "",
        otherwise: str = "",
    ) -> None:
        """Declares a string; the help shows `otherwise` if there is no default."""
        absl_flags.DEFINE_string(name, default, help, flag_values=self.values)
        self._describe(f"{name}={placeholder}", help, default or otherwise)

    def texts(
        self, name: str, placeholder: str, help: str, *, default: Sequence[str] = ()
    ) -> None:
        """Declares a list of strings, separated by commas."""
        absl_flags.DEFINE_list(name, list(default), help, flag_values=self.values)
        self._describe(f"{name}={placeholder}", help, ",".join(default))

    def integer(
        self,
        name: str,
        placeholder: str,
        help: str,
        *,
        default: int | None = None,
        at_least: int,
        otherwise: str = "",
    ) -> None:
        """Declares an integer; None if it is not given and has no default."""
        absl_flags.DEFINE_integer(
            name, default, help, lower_bound=at_least, flag_values=self.values
        )
        text = otherwise if default is None else str(default)
        self._describe(f"{name}={placeholder}", help, text)

    def number(self, name: str, placeholder: str, help: str, *, otherwise: str) -> None:
        """Declares a float that is not negative; None if it is not given."""
        absl_flags.DEFINE_float(
            name, None, help, lower_bound=0.0, flag_values=self.values
        )
        self._describe(f"{name}={placeholder}", help, otherwise)

    def choice(
        self,
        name: str,
        placeholder: str,
        choices: Sequence[str],
        help: str,
        *,
        default: str | None = None,
        otherwise: str = "",
    ) -> None:
        """Declares one of several strings; None if not given and without a default."""
        absl_flags.DEFINE_enum(
            name, default, list(choices), help, flag_values=self.values
        )
        names = [name if name.isidentifier() else repr(name) for name in choices]
        allowed = f"{', '.join(names[:-1])} or {names[-1]}"
        self._describe(
            f"{name}={placeholder}", f"{help} ({allowed})", default or otherwise
        )

    def switch(self, name: str, help: str) -> None:
        """Declares a boolean, false by default."""
        absl_flags.DEFINE_bool(name, False, help, flag_values=self.values)
        self._describe(name, help, "")

    def takes_config(self, help: str = "recipe and dataset preset") -> None:
        """Declares --config and its overrides."""
        config_flags.DEFINE_config_file(
            "config", None, help, flag_values=self.values, sys_argv=self._argv
        )
        self._describe(
            "config=FILE[:DATASET]",
            f"{help}; --config.FIELD=VALUE overrides a field",
            "",
        )

    def _describe(self, form: str, help: str, default: str) -> None:
        self.entries.append((f"--{form}", f"{help} [{default}]" if default else help))


# Flags that several commands share.


def declare_data_dir(flags: Flags) -> None:
    """Declares the folder of a dataset that has moved since the run."""
    flags.text("data_dir", "DIR", "new location of the dataset, if it has moved")


def declare_near_copies(flags: Flags) -> None:
    """Declares how `prepare` and `new` treat near copies."""
    flags.choice(
        "near_copies",
        "WHAT",
        NEAR_COPIES,
        "recompressed, resized or cropped copies of another image; keep counts them, "
        "and evaluate also reports figures without them; remove treats them as "
        "identical files; ignore does not search for them",
        default="keep",
    )


def declare_label_file(flags: Flags) -> None:
    """Declares a label file and how it is read."""
    flags.text(
        "labels",
        "FILE",
        "CSV, TSV, Parquet or JSON Lines file with a column of image paths or ids, and "
        "labels: one row per label, one row per image with all labels in a cell (or a "
        "list), or one column of 0 and 1 per label",
        otherwise="folder names are labels",
    )
    flags.text(
        "path_column",
        "NAME",
        "column with the image paths or ids",
        otherwise="the column that matches most images",
    )
    flags.text(
        "label_column",
        "NAME",
        "column with the labels",
        otherwise="found by its name, or the only one left",
    )
    flags.choice(
        "label_separator",
        "CHAR",
        SEPARATORS,
        "separator between labels in a cell",
        otherwise="detected from all cells; the rule is printed",
    )
    flags.switch("fold_case", "merge labels that differ only in case")


def declare_verify(flags: Flags) -> None:
    """Declares the flag that hashes the data."""
    flags.switch(
        "verify",
        "first verify the hashes of the whole dataset; sizes, indexes and the "
        "checkpoint in use are always verified",
    )


def declare_inference(flags: Flags, images: str) -> None:
    """Declares how a run's model is changed before it predicts.

    Args:
      flags: The command's flags.
      images: The images that the model adapts to, in words.
    """
    flags.texts(
        "ensemble",
        "RUNS",
        "average the probabilities with those of the runs in these workdirs",
    )
    flags.switch(
        "adapt_bn",
        f"use the BatchNorm statistics of {images} (needs no labels); after hold_out, "
        "its effect on held-out domains is printed too",
    )
    flags.switch(
        "label_shift",
        f"correct for the label frequencies of {images} (needs no labels); after "
        "hold_out, its effect on held-out domains is printed too",
    )


# Values of the parsed flags.


def config_of(flags: Flags) -> Config:
    """Returns the configuration given by --config, its overrides and --data_dir.

    Raises:
      InputError: If --config is missing, or a value is outside its range.
    """
    if flags.config is None:
        raise InputError(
            "--config is missing; for a first run, give "
            "--config configs/f2_multitask.py."
        )
    return Config.resolve(flags.config).moved(flags.data_dir)


def recipe_of(flags: Flags) -> Origin:
    """Returns the recipe's name, and its values of the fields that flags change."""
    if flags.config is None:
        return {}
    holder = flags.values["config"]
    own: dict[str, object] = {
        name: flags.values[f"config.{name}"].default
        for name in config_flags.get_override_values(holder)
    }
    if flags.data_dir:
        own.setdefault("data.directory", flags.config.data.directory)
    return {"name": config_flags.get_config_filename(holder), "own": own}


def inference_of(flags: Flags) -> Any:
    """Returns the options that `declare_inference` declared."""
    from jaxii.runs.inference import InferenceOptions

    return InferenceOptions(
        ensemble=tuple(flags.ensemble),
        adapt_bn=flags.adapt_bn,
        label_shift=flags.label_shift,
        allow_tuning_labels=flags.allow_tuning_labels,
    )


def required(flags: Flags, name: str) -> AnyPath:
    """Returns the path that a flag gives.

    Raises:
      InputError: If the flag is missing.
    """
    value = flags.values[name].value
    if not value:
        raise InputError(f"--{name} is missing; see --help.")
    return at(value)


def existing(flags: Flags, name: str) -> AnyPath:
    """Returns the path that a flag gives, after a check for spelling.

    Returns a missing path, too, if no similar path exists.

    Raises:
      InputError: If the flag is missing, or its path does not exist and one with a
        similar name does.
    """
    path = required(flags, name)
    near = nearest_path(path)
    if near:
        raise InputError(f"--{name}={path} does not exist; {near}")
    return path


class LabelFile(TypedDict):
    """How a label file is read; see `prepare.tables.labelled.read`."""

    path_column: str
    label_column: str
    label_separator: str
    fold_case: bool


def label_file_of(flags: Flags) -> LabelFile:
    """Returns the values of `declare_label_file`, without the file."""
    return LabelFile(
        path_column=flags.path_column,
        label_column=flags.label_column,
        label_separator=flags.label_separator or "",
        fold_case=flags.fold_case,
    )


def local(name: str, path: AnyPath) -> Path:
    """Returns a local path; `name` is the flag or argument it comes from.

    Raises:
      InputError: If the path is in a bucket.
    """
    if isinstance(path, Path):
        return path
    raise InputError(
        f"{name}={path} is in a bucket, but must be a local path; mount the bucket, or "
        "copy the files to this machine."
    )


def file_to_write(flags: Flags, name: str, kind: str) -> AnyPath | None:
    """Returns the path of a file to write, or None if the flag is not given.

    Raises:
      InputError: If the path is a folder.
    """
    value = flags.values[name].value
    path = at(value) if value else None
    if path is not None and path.is_dir():
        raise InputError(
            f"--{name}={path} is a folder; use the path of a file for the {kind}."
        )
    return path


def check_two_files(output: AnyPath | None, sheet: AnyPath | None) -> None:
    """Checks that --output and --sheet, if both are written, are different files.

    Raises:
      InputError: If they are one file.
    """
    if output is not None and output == sheet:
        raise InputError(
            f"--output and --sheet are both {sheet}; use two different files."
        )
