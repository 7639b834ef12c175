"""Small synthetic folders of runs, as training and evaluation leave them."""

import json

from jaxii.config import Config
from jaxii.decoding.thresholds import DecoderChoice
from jaxii.evaluation.provenance import Provenance
from jaxii.evaluation.result import (
    Bootstrap,
    Constant,
    DecoderInUse,
    DecoderMetrics,
    EvaluationResult,
    SliceMetrics,
    SplitMetrics,
    write_evaluation,
)
from jaxii.train.checkpoint import CheckpointMetadata
from jaxii.train.stages import Saved

CLEAN = Provenance().with_("thresholds", labels=["validation"])


def changed(config, **changes):
    """Returns a configuration with other values: `section__field=value`."""
    fields = config.to_dict()
    for path, value in changes.items():
        *sections, name = path.split("__")
        (fields[sections[0]] if sections else fields)[name] = value
    return Config.resolve(fields)


def metadata_of(saved, **changes):
    """Returns metadata of a checkpoint that belongs to no run."""
    facts = {
        "provenance": {},
        "config_hash": "",
        "config": {},
        "recipe": {},
        "data_hash": "",
        "files": {},
        "train_step_compilations": 1,
        "history": None,
        "label_hash": "0123456789abcdef",
    }
    return CheckpointMetadata(**facts | changes, saved=saved)


def slice_metrics(f2, num_images=40, error=0.01, interval=None):
    return SliceMetrics(
        num_images=num_images, f2=f2, standard_error=error, interval=interval
    )


def decoder_metrics(f2, **parameter):
    return DecoderMetrics(
        f2=f2,
        standard_error=0.0054,
        coverage=44,
        labels_per_image=3.1,
        parameter=parameter,
    )


def split_metrics(f2, **changes):
    """Returns figures of a split with two slices."""
    facts = {
        "num_images": 100,
        "num_images_without_truth": 0,
        "f2": f2,
        "interval": None,
        "bootstrap": Bootstrap(by="image", level=0.95, resamples=1000),
        "coverage": 1234,
        "labels_per_image_predicted": 3.1,
        "labels_per_image_true": 2.4,
        "slices": {
            "[bold]north": slice_metrics(0.1111),
            "south": slice_metrics(0.5, 60),
        },
        "decoders": {"threshold": decoder_metrics(f2, threshold=0.31)},
        "threshold": 0.31,
        "micro_f2": 0.3,
        "macro_f2": 0.2,
        "thresholds": [0.25, 0.5],
        "f2_by_threshold": [0.2, 0.1],
        "best_threshold": 0.25,
        "best_f2": 0.2,
        "map": 0.4321,
        "map_num_classes": 58,
        "recall_at_5": 0.6789,
        "bce": 3.2,
        "calibration_error": 0.0345,
        "reliability": [[0.1, 0.2, 90], [0.6, 0.5, 20]],
        **changes,
    }
    slices = facts["slices"]
    worst = min(slices, key=lambda name: slices[name].f2)
    return SplitMetrics(**{"worst_slice": worst} | facts)


def result(cls=EvaluationResult, **changes):
    """Returns the result of an evaluation."""
    facts = {
        "stage": "last",
        "step": 3,
        "created": "2025-01-31T12:00:00+00:00",
        "hardware": "1 x CPU",
        "seed": 3,
        "dataset": "toy_regions",
        "config_hash": "9a0b33cd12ef4567",
        "label_hash": "abc",
        "data_hash": "4f1c2a9be0d37715",
        "short_side_pixels": None,
        "num_params": 11_241_123,
        "provenance": CLEAN,
        "decoder": decoder_in_use(),
        "constant": constant({"validation": 0.2, "test": 0.1}),
        "splits": {"validation": split_metrics(0.35), "test": split_metrics(0.25)},
        "members": ["one"],
    }
    return cls(**facts | changes)


def decoder_in_use(name="threshold", chosen_on="validation"):
    choice = DecoderChoice(threshold=0.31, top_k=4)
    return DecoderInUse(name=name, chosen_on=chosen_on, choice=choice)


def constant(f2, names=("/m/0sky",)):
    return Constant(labels=list(names), names=list(names), f2=f2)


def write_run(
    workdir,
    *,
    f2=0.25,
    lr=0.1,
    config=None,
    without=None,
    file="metrics.json",
    history=(),
    **changes,
):
    """Writes one evaluation of a run; `changes` are fields of its result."""
    workdir.mkdir(parents=True, exist_ok=True)
    splits = {"validation": split_metrics(f2 + 0.1), "test": split_metrics(f2)}
    metrics = result(**{"splits": splits} | changes)
    config = config or {"optimizer": {"peak_lr": lr}, "seed": metrics.seed}
    config = {"stages": [{"name": "last"}], **config}
    (workdir / "config.json").write_text(json.dumps(config))
    record = metrics.to_json()
    record.pop(without, None)
    (workdir / file).write_text(json.dumps(record))
    rows = [
        {"kind": "train", "step": 1, "images_per_second": 1.0},
        {"kind": "train", "step": 2, "images_per_second": 100.0},
        {"kind": "train", "step": 3, "images_per_second": 120.0},
        {"kind": "evaluation", "step": 3, "validation/f2": 0.3},
        {"kind": "train", "step": 1, "images_per_second": 110.0},
        *history,
    ]
    lines = "\n".join(json.dumps(row) for row in rows)
    (workdir / "history.jsonl").write_text(lines + "\n")
    seal(workdir, file)
    return workdir


def seal(workdir, file="metrics.json"):
    """Writes the manifest of an evaluation for its current files."""
    names = file, file.replace("metrics", "label_figures").replace(".json", ".csv")
    files = [workdir / name for name in (*names, "config.json", "history.jsonl")]
    write_evaluation(workdir / file.replace("metrics", "evaluation"), files)


def save_checkpoint(run, stage, step, state, *, first_step):
    """Saves a state as the last checkpoint of a finished stage."""
    saved = Saved(
        stage=stage,
        step=step,
        first_step=first_step,
        metric=0.1,
        evaluations=((step, 0.1),),
        finished=True,
    )
    metadata = run.metadata(
        saved,
        recipe={},
        files=run.workdir.own_files(),
        history=None,
        train_step_compilations=1,
    )
    run.checkpoints.save(metadata, state)
