"""Folders of runs as training and evaluation leave them, small and made up."""

import json

from jaxii.config import Config
from jaxii.evaluation.provenance import Provenance
from jaxii.evaluation.result import write_evaluation
from jaxii.train.checkpoint import CheckpointMetadata

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


def summary(f2, error=0.01):
    return {
        "f2": f2,
        "map": 0.4321,
        "coverage": 1234,
        "worst_slice": "[bold]north",
        "slices": {
            "[bold]north": {"num_images": 40, "f2": 0.1111, "standard_error": error},
            "south": {"num_images": 60, "f2": 0.5, "standard_error": error},
        },
    }


def write_run(
    workdir,
    *,
    f2=0.25,
    lr=0.1,
    seed=3,
    provenance=CLEAN,
    config=None,
    empty=None,
    file="metrics.json",
    history=(),
    **metrics,
):
    """Writes one evaluation of a run; `metrics` replace or add keys of its file."""
    workdir.mkdir(parents=True, exist_ok=True)
    config = config or {"optimizer": {"peak_lr": lr}, "seed": seed}
    (workdir / "config.json").write_text(json.dumps(config))
    metrics = {
        "dataset": "toy_regions",
        "label_hash": "abc",
        "step": 3,
        "decoder": {"name": "threshold", "threshold": 0.31, "chosen_on": "validation"},
        "provenance": provenance.to_json(),
        "constant": {"f2": {"validation": 0.2, "test": 0.1}},
        "splits": {"validation": summary(f2 + 0.1), "test": summary(f2)},
        **metrics,
    }
    if empty:
        metrics[empty] = {}
    (workdir / file).write_text(json.dumps(metrics))
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
    """Writes the manifest of an evaluation, as if its files had always been so."""
    names = file, file.replace("metrics", "label_figures").replace(".json", ".csv")
    files = [workdir / name for name in (*names, "config.json", "history.jsonl")]
    write_evaluation(workdir / file.replace("metrics", "evaluation"), files)
