"""Names and checks the files of one run.

A run's folder belongs to one configuration and one vocabulary.
"""

import contextlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast
from urllib.parse import quote

import xxhash

from jaxii import manifest
from jaxii.config import FREE_FIELDS, Config, differences, flatten
from jaxii.data.labels import Vocabulary
from jaxii.decoding.decoders import load as load_decoders
from jaxii.errors import InputError
from jaxii.evaluation.held_out import FILE, Predictions
from jaxii.evaluation.result import (
    EVALUATION,
    EvaluationResult,
    check_evaluation,
    describe_again,
    read_result,
)
from jaxii.manifest import File, Manifest
from jaxii.report.run_files import SETS
from jaxii.storage import AnyPath, write_json
from jaxii.train.checkpoint import CheckpointMetadata

MOST_SHOWN = 5
# Longest name of a folder, without its hash; file systems allow 255 bytes.
MOST_LETTERS = 120
# The only field in which a run with a held-out domain differs from the run on all.
HELD_OUT = "data.held_out_domain"
# Fields of the length of a run, which may be shorter with a domain held out.
LENGTH = re.compile(r"stages\[\d+\]\.num_(epochs|steps)|evaluate_every_steps")
# Fields that `change_batch_size` lets change on resume; the order of examples is kept.
BATCH_SIZE = ("global_batch_size", "micro_batches")
# What else to do if only these fields differ, where a command can change them.
CHANGE_BATCH_SIZE = (
    ", or --change_batch_size (in Python: change_batch_size=True) to continue the run"
)


@dataclass(frozen=True)
class Workdir:
    """Paths below a run's folder, and checks of its files."""

    path: AnyPath

    @property
    def config_file(self) -> AnyPath:
        """The resolved configuration."""
        return self.path / "config.json"

    @property
    def labels_file(self) -> AnyPath:
        """The vocabulary, in order."""
        return self.path / "labels.csv"

    @property
    def embedding_file(self) -> AnyPath:
        """The label embedding, with its provenance."""
        return self.path / "label_embedding.npz"

    @property
    def seen_file(self) -> AnyPath:
        """Hashes of the images that the run has learnt from."""
        return self.path / "seen_images.npz"

    @property
    def start_file(self) -> AnyPath:
        """The checkpoint of another run that the run started from, if it did."""
        return self.path / "start.json"

    @property
    def history_file(self) -> AnyPath:
        """The training history: figures by step."""
        return self.path / "history.jsonl"

    def result_file(self, name: str, variants: Sequence[str] = ()) -> AnyPath:
        """Returns the path of a result file, named by its variants.

        Args:
          name: File name of the run's own result.
          variants: Differences from it: tuned_on_SPLIT, ensemble, adabn, label_shift.
        """
        stem, dot, ending = name.partition(".")
        return self.path / f"{'_'.join([stem, *variants])}{dot}{ending}"

    def tuned_on(self, split: str) -> list[str]:
        """Returns the variant of an evaluation whose decoders are fitted on a split.

        Args:
          split: The split; "" or the run's choosing split give no variant.
        """
        if not split:
            return []
        # As `Data.choosing_split`, but without the data.
        own = "held_out" if self.config().data.held_out_domain else "validation"
        return [] if split == own else [f"tuned_on_{split}"]

    def metrics(self, variants: Sequence[str] = ()) -> EvaluationResult:
        """Returns the figures of the run, or of a variant of it.

        Raises:
          InputError: If the folder has no run, or the run has not been evaluated by a
            version of jaxii with the same decoders.
        """
        self._check_is_run()
        flags = [name.replace("tuned_on_", "tune_on=") for name in variants]
        same = "".join(f" and --{flag}" for flag in flags)
        again = f"run evaluate with the same --workdir{same}"
        path = self.result_file("metrics.json", variants)
        listed = self.result_file(EVALUATION, variants)
        if not path.exists() and not listed.exists():
            raise InputError(
                f"{path} does not exist, so no threshold has been chosen; {again} "
                "first."
            )
        decoders = self.result_file("decoders.npz", variants)
        check_evaluation(listed, [path.name, decoders.name], again=f"{again} again")
        # Refuses evaluations by versions that measured expected F2 without offsets.
        load_decoders(decoders, label_embeddings=None)
        return read_result(EvaluationResult, path)

    def check_current(
        self, metrics: EvaluationResult, variants: Sequence[str] = ()
    ) -> None:
        """Checks that the files of an evaluation were not replaced by others.

        Call after reading the other files of the evaluation.

        Args:
          metrics: The figures that `metrics` returned before.

        Raises:
          InputError: If the figures are others now, or as `metrics`.
        """
        # The same evaluation made again has the same files.
        now = replace(self.metrics(variants), created=metrics.created)
        if now != metrics:
            raise InputError(
                f"{self.path} was evaluated again while its files were read; run the "
                "same command again (in Python: open the run again)."
            )

    def check_writable(self) -> None:
        """Checks that results can be written, before they are computed.

        Raises:
          InputError: If the folder is read-only.
        """
        if isinstance(self.path, Path) and not os.access(self.path, os.W_OK):
            raise InputError(
                f"{self.path} is read-only, but results are written to it; change its "
                "permissions, or copy the folder."
            )

    def own_files(self) -> dict[str, File]:
        """Returns size and hash of the files that the run's checkpoints belong to."""
        files = self.labels_file, self.embedding_file, self.seen_file, self.start_file
        return {f.name: manifest.describe(f) for f in files if f.exists()}

    def check_belongs(self, metadata: CheckpointMetadata) -> None:
        """Checks that files and configuration are those of a checkpoint.

        Raises:
          InputError: If a file is missing or differs, or the configuration differs.
        """
        fix = (
            "restore it from a copy of the workdir, or train again in another --workdir"
        )
        by = f"step {metadata.saved.step} of stage {metadata.saved.stage}"
        Manifest(metadata.files).check(self.path, by=by, fix=fix, verify=True)
        differing = _differing(metadata.config, self.config().to_dict(), *BATCH_SIZE)
        if differing:
            raise InputError(
                f"{self.config_file} is not the configuration that the checkpoint was "
                f"trained with ({differing}); {fix}."
            )

    def history_fault(self, wanted: File | None) -> str:
        """Returns why `history.jsonl` is not that of a checkpoint; "" if it is."""
        if wanted is None:
            return ""
        if not self.history_file.exists():
            return f"{self.history_file} is missing"
        found = manifest.describe(self.history_file, wanted.size_bytes)
        return "" if found == wanted else f"{self.history_file} is damaged"

    def set_history_aside(self) -> AnyPath:
        """Renames a damaged history and returns its new path."""
        aside = self.path / "history.damaged.jsonl"
        if self.history_file.exists():
            self.history_file.replace(aside)
        return aside

    def held_out(self, domain: str) -> "Workdir":
        """Returns the workdir of the run that holds out a domain of this run's data."""
        return Workdir(self.path / "held_out" / _as_folder(domain))

    def set_file(self, set_name: str, name: str) -> AnyPath:
        """Returns the path of a result on a labelled set; see `run_files.read_sets`."""
        return self.path / SETS / _as_folder(set_name) / name

    def held_out_metrics(
        self, warn: Callable[[str], None] = lambda text: None
    ) -> dict[str, EvaluationResult]:
        """Returns domain -> figures of the run that held it out, if evaluated.

        A run is left out while it is evaluated, or if its evaluation was interrupted
        or was made by an older version, which measured expected F2 otherwise.

        Args:
          warn: Called with a line for each run that is left out.

        Raises:
          InputError: If such a run differs in more than domain, batch size and length.
        """
        fields = self.config().to_dict()
        lengths = [name for name in flatten(fields) if LENGTH.fullmatch(name)]
        free = HELD_OUT, *BATCH_SIZE, *lengths
        found: dict[str, EvaluationResult] = {}
        for file in sorted((self.path / "held_out").glob("*/metrics.json")):
            run = Workdir(file.parent)
            config = run.config()
            differing = _differing(fields, config.to_dict(), *free)
            if differing:
                raise InputError(
                    f"the configuration of {run.path} differs from that of {self.path} "
                    f"({differing}), so its figures do not apply; remove the folder of "
                    "the hold-out run, and run hold_out again."
                )
            try:
                found[config.data.held_out_domain] = run.metrics()
            except InputError:
                warn(
                    f"CAVEAT     {run.path} is left out: its evaluation is incomplete, "
                    "damaged or by another version of jaxii; run evaluate "
                    f"--workdir={run.path} again"
                )
        return found

    def held_out_length(self, domain: str) -> float:
        """Returns the length of the run that held a domain out, as a share of this one.

        It is the smallest share over stages.
        """
        stages = zip(
            self.held_out(domain).config().stages, self.config().stages, strict=True
        )
        return min(
            (short.num_epochs + short.num_steps) / (stage.num_epochs + stage.num_steps)
            for short, stage in stages
        )

    def held_out_predictions(self, domain: str) -> Predictions:
        """Returns the predictions for a domain by the run that held it out.

        Raises:
          InputError: If the predictions are missing, damaged or of other labels.
        """
        run = self.held_out(domain)
        path, again = run.result_file(FILE), "run hold_out again"
        check_evaluation(run.result_file(EVALUATION), [FILE], again=again)
        return Predictions.load(path, self.vocabulary().content_hash())

    def claim(self, config: Config, *, change_batch_size: bool = False) -> None:
        """Writes the configuration to the folder, after `check`.

        Evaluations list the file by its hash; if only fields changed that do not affect
        the result, those of the replaced file are updated.

        Raises:
          InputError: As `check`, or if the folder cannot be created.
        """
        self.check(config, change_batch_size=change_batch_size)
        self._make_folder()
        has_run = self.config_file.exists()
        is_same = has_run and self.config().content_hash() == config.content_hash()
        current = self._evaluations_of_config() if is_same else []
        write_json(self.config_file, config.to_dict())
        for listed in current:
            describe_again(listed, self.config_file)

    def check(
        self, config: Config, *, change_batch_size: bool = False, otherwise: str = ""
    ) -> None:
        """Checks that the folder is new or of this configuration; writes nothing.

        Args:
          change_batch_size: Whether the batch size may differ.
          otherwise: What else to do if only the batch size differs, for the error.

        Raises:
          InputError: If the folder is another run's; names the fields that differ.
        """
        if self.config_file.exists():
            free = BATCH_SIZE if change_batch_size else ()
            self._refuse_another(config.to_dict(), free, otherwise)

    def config(self) -> Config:
        """Returns the configuration of the run.

        Raises:
          InputError: If the folder has no run, or another version of jaxii wrote it.
        """
        self._check_is_run()
        fields = self._fields()
        try:
            config = Config.resolve(fields)
        except InputError as error:
            raise InputError(
                f"{self.config_file}: {error} If another version of jaxii wrote the "
                "file, use that version, or train again in another --workdir."
            ) from error
        if missing := differences(fields, config.to_dict()):
            raise InputError(
                f"{self.config_file} was written by another version of jaxii "
                f"({missing[0]}); use that version, or train again in another "
                "--workdir."
            )
        return config

    def vocabulary(self) -> Vocabulary:
        """Returns the labels that the run was trained on."""
        return Vocabulary.load(self.labels_file)

    def claim_labels(self, vocabulary: Vocabulary) -> None:
        """Writes the vocabulary, or checks that it equals the one written before.

        Raises:
          InputError: If the labels or their order differ.
        """
        self.check_labels(vocabulary)
        if not self.labels_file.exists():
            self._make_folder()
            vocabulary.save(self.labels_file)

    def check_labels(self, vocabulary: Vocabulary) -> None:
        """Checks that the labels are the run's, if it has any yet; writes nothing.

        Raises:
          InputError: If the labels or their order differ.
        """
        if not self.labels_file.exists():
            return
        before, now = self.vocabulary().content_hash(), vocabulary.content_hash()
        if before != now:
            raise InputError(
                f"{self.path} was trained on labels with hash {before}, but the labels "
                f"of the data have hash {now}; use the data it was trained on, or "
                "another --workdir."
            )

    def _evaluations_of_config(self) -> list[AnyPath]:
        """Returns the evaluations' lists that have the configuration as it is now."""
        now, found = manifest.describe(self.config_file), list[AnyPath]()
        for path in self.path.glob("evaluation*.json"):
            # A damaged list is reported when it is read.
            with contextlib.suppress(InputError):
                if Manifest.load(path, fix="").files.get(self.config_file.name) == now:
                    found.append(path)
        return found

    def _check_is_run(self) -> None:
        if not self.config_file.exists():
            raise InputError(
                f"{self.path} is not the folder of a run (it has no config.json); pass "
                "the --workdir of a training run."
            )

    def _fields(self) -> dict[str, Any]:
        try:
            fields = json.loads(self.config_file.read_text(encoding="utf-8"))
            if isinstance(fields, dict):
                return cast(dict[str, Any], fields)
            reason: object = f"a {type(cast(object, fields)).__name__}, not an object"
        except (OSError, ValueError) as error:
            reason = error
        raise InputError(
            f"{self.config_file} is not a valid JSON configuration ({reason}); "
            "restore it, or use another --workdir."
        )

    def _refuse_another(
        self, fields: Mapping[str, Any], free: Sequence[str], otherwise: str
    ) -> None:
        before = self.config().to_dict()
        differing = _differing(before, fields, *free)
        if differing:
            size = not _differing(before, fields, *BATCH_SIZE)
            raise InputError(
                f"{self.path} belongs to another configuration ({differing}); use that "
                f"configuration, or another --workdir{otherwise if size else ''}."
            )

    def _make_folder(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"--workdir={self.path} cannot be created ({error.strerror}); use a "
                "writable folder."
            ) from error


def _as_folder(text: str) -> str:
    """Returns a valid folder name for any text; different texts get different names."""
    name = quote(text, safe=" ")
    if len(name) > MOST_LETTERS:
        # `quote` never writes two percent signs in a row.
        name = f"{name[:MOST_LETTERS]}%%{xxhash.xxh3_64_hexdigest(name.encode())}"
    # "." and ".." are the names of existing folders.
    return name.replace(".", "%2E") if name in (".", "..") else name


def _differing(one: Mapping[str, Any], other: Mapping[str, Any], *free: str) -> str:
    """Returns the first few differing fields of two configurations; "" for none."""
    free = (*FREE_FIELDS, *free)
    lines = [
        line for line in differences(one, other) if line.partition(":")[0] not in free
    ]
    if len(lines) > MOST_SHOWN:
        lines[MOST_SHOWN:] = [f"and {len(lines) - MOST_SHOWN} more"]
    return "; ".join(lines)
