"""What `metrics.json` says: figures of the splits, the floor, and what produced them.

Comes after `summary` (figures) and `provenance`; `report` and `compare` read it.
"""

import datetime
import os
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxii import manifest
from jaxii.data.labels import Vocabulary
from jaxii.decoding.decode import best_constant, constant_f2
from jaxii.errors import InputError
from jaxii.evaluation import domain_shift
from jaxii.evaluation.provenance import Provenance
from jaxii.storage import AnyPath
from jaxii.train.checkpoint import Checkpoints
from jaxii.train.stages import Saved, Stage, choose
from jaxii.train.trainer import StagePlan

# The manifest of an evaluation; written last, removed first.
EVALUATION = "evaluation.json"
Present = Callable[[str], tuple[np.ndarray, np.ndarray]]


def write_evaluation(path: AnyPath, files: Iterable[AnyPath]) -> None:
    """Writes the manifest of an evaluation: the files that belong together.

    Args:
      path: of the manifest.
      files: beside it; those that do not exist are left out.
    """
    listed = {file.name: manifest.describe(file) for file in files if file.exists()}
    manifest.Manifest(listed).save(path)


def check_evaluation(
    path: AnyPath, names: Iterable[str], *, grown: str = "", again: str
) -> None:
    """Refuses files that are not those of one whole evaluation.

    Args:
      path: of the manifest.
      names: of files beside it.
      grown: name of a file that may be longer by now; "" for none.
      again: how to evaluate again, for the error.

    Raises:
      InputError: If the evaluation was interrupted, or a file is missing or differs.
    """
    listed = manifest.Manifest.load(path, fix=again)
    listed.check(path.parent, by=path, fix=again, names=names, verify=True)
    wanted, file = listed.files.get(grown), path.parent / grown
    if wanted is not None and not (
        file.exists() and manifest.describe(file, wanted.size_bytes) == wanted
    ):
        raise InputError(f"{file} is missing or damaged; {again}.")


@dataclass(frozen=True, kw_only=True)
class Constant:
    """The best answer that does not look at the image.

    Attributes:
      label_ids: the most frequent labels of training; how many, validation decided.
      f2: its mean F2 by split.
    """

    label_ids: np.ndarray
    f2: Mapping[str, float]


def best_constant_of(
    class_counts: np.ndarray, present: Present, splits: Sequence[str], chosen_on: str
) -> Constant:
    """Finds the best constant prediction and scores it.

    Args:
      class_counts: images of the training split with each label, [class].
      present: split name to offsets and label ids of what is present (CSR).
      splits: where to score it.
      chosen_on: the split on which the number of labels is chosen.
    """
    label_ids, _ = best_constant(class_counts, *present(chosen_on))
    num_classes = len(class_counts)
    f2 = {
        split: constant_f2(label_ids, num_classes, *present(split)) for split in splits
    }
    return Constant(label_ids=label_ids, f2=f2)


def provenance_by_stage(
    start: Provenance, stages: Sequence[Stage], chosen_on: str
) -> dict[str, Provenance]:
    """Returns stage name -> what its checkpoints say; each keeps its past.

    Args:
      start: of the parameters that the first stage starts from.
      stages: in order.
      chosen_on: the split that chooses checkpoints and ends stages.
    """
    record, by_stage = start, {}
    for stage in stages:
        record = record.with_("weights", labels=[stage.split])
        record = record.with_("model_selection", labels=[chosen_on])
        if stage.embedding_head:
            record = record.with_("label_embedding", labels=["train"])
        by_stage[stage.name] = record
    return by_stage


def make_result(
    *,
    saved: Saved,
    summaries: Mapping[str, Mapping[str, Any]],
    decoder: Mapping[str, Any],
    constant: Constant,
    vocabulary: Vocabulary,
    provenance: Provenance,
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    """Returns the content of `metrics.json`.

    Args:
      saved: the checkpoint that was evaluated.
      summaries: split name to the figures of `summarise`; those that the answers
        decide (`f2`, `coverage`, `slices`, ...) are the decoder's in use.
      decoder: name, parameter and the split it was chosen on.
      constant: the floor.
      vocabulary: the labels.
      provenance: what influenced the figures.
      facts: seed, dataset, hashes and whatever else identifies the run.
    """
    return {
        **facts,
        "stage": saved.stage,
        "step": saved.step,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "hardware": hardware(),
        "provenance": provenance.to_json(),
        "decoder": dict(decoder),
        "constant": {
            "labels": [vocabulary.codes[i] for i in constant.label_ids],
            "names": vocabulary.names(constant.label_ids.tolist()),
            "num_labels": len(constant.label_ids),
            "f2": dict(constant.f2),
        },
        "splits": {name: dict(summary) for name, summary in summaries.items()},
    }


def hardware() -> str:
    """Returns the devices and the host in a few words."""
    device = jax.devices()[0]
    kind = "CPU" if device.platform == "cpu" else device.device_kind
    return (
        f"{jax.device_count()} x {kind} ({platform.machine()} host, "
        f"{os.cpu_count()} cores), jax {jax.__version__}, "
        f"Python {platform.python_version()}"
    )


def stage_rows(
    plans: Sequence[StagePlan], checkpoints: Checkpoints, origin: str = ""
) -> list[dict[str, Any]]:
    """Returns what became of each stage that has begun, for the stage table.

    Args:
      plans: the stages in order.
      checkpoints: of the run.
      origin: the run or the file that the first stage started from; "" for none.
    """
    found = checkpoints.saved()
    rows: list[dict[str, Any]] = []
    previous: Sequence[Saved] = ()
    for plan in plans:
        saved = found.get(plan.stage.name)
        if not saved:
            break
        best, last = choose(saved, "best"), choose(saved, "last")
        ends = [
            plan.settings.objective.weights(jnp.asarray(step, jnp.int32))
            for step in (0, last.step - last.first_step)
        ]
        rows.append(
            {
                "name": plan.stage.name,
                "first_step": last.first_step,
                "last_step": last.step,
                "embedding_head": plan.stage.embedding_head,
                "terms": {name: [float(end[name]) for end in ends] for name in ends[0]},
                "enters_from": _entered_from(plan, previous, origin),
                "train_step_compilations": checkpoints.metadata(last)[
                    "train_step_compilations"
                ],
                "best_step": best.step,
                "best_f2": best.metric,
            }
        )
        previous = saved
    return rows


def _entered_from(plan: StagePlan, previous: Sequence[Saved], origin: str) -> str:
    if not previous:
        return origin or "fresh parameters"
    start = choose(previous, plan.stage.enters_from)
    return f"{plan.stage.enters_from} of {start.stage} (step {start.step})"


def lines(metrics: Mapping[str, Any]) -> list[str]:
    """Returns the figures that a person asks for first."""
    provenance = Provenance.from_json(metrics["provenance"])
    decoder, constant = metrics["decoder"], metrics["constant"]
    rows = []
    for split, figures in metrics["splits"].items():
        rows.append(
            f"{split:11}F2 {figures['f2']:.4f}  (best constant "
            f"{constant['f2'][split]:.4f})  mAP {figures['map']:.4f}  coverage "
            f"{figures['coverage']}  worst slice {figures['worst_slice']}"
        )
        without = figures["num_images_without_truth"]
        if without:
            rows.append(
                f"{'':11}{without} of {figures['num_images'] + without} images have no "
                "verified label: they are left out of all figures"
            )
    rows += _decoder_lines(metrics["splits"], decoder["name"])
    rows.append(
        f"decoder    {decoder['name']}, fitted on {decoder['chosen_on']} (threshold "
        f"{decoder['threshold']:.2f}); provenance: {provenance.badge()}"
    )
    if metrics["variant"]:
        rows.append(f"variant    {', '.join(metrics['variant'])}")
    if len(metrics["members"]) > 1:
        rows.append(f"mean of    {'; '.join(metrics['members'])}")
    if "estimates" in metrics:
        rows.append(domain_shift.line(metrics["estimates"]))
    return rows


def _decoder_lines(splits: Mapping[str, Any], in_use: str) -> list[str]:
    """Returns a line a decoder: its F2 by split, then what it gave the last one."""
    last = list(splits)[-1]
    rows = [f"decoders   {'':13}" + "".join(f"{split:>12}" for split in splits)]
    for name, figures in splits[last]["decoders"].items():
        f2s = "".join(f"{s['decoders'][name]['f2']:12.4f}" for s in splits.values())
        rows.append(
            f"         {'*' if name == in_use else ' '} {name:13}{f2s} "
            f"± {figures['standard_error']:.4f}  coverage {figures['coverage']}, "
            f"{figures['labels_per_image']:.1f} labels an image"
        )
    return rows
