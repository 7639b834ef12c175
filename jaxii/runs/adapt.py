"""`adapt`: fine-tunes a trained run on the tuning split's labels, in a new workdir.

The result is an ordinary run of one stage; its provenance records that labels of the
target domain trained it. The original solution tried this and abandoned it, because it
is against the spirit of the task.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal, cast

from jaxii.config import ADAPT_EPOCHS, ADAPT_LR_SHARES, Config, StageConfig, Terms
from jaxii.runs.run import Run
from jaxii.runs.train import train
from jaxii.runs.workdir import Workdir
from jaxii.storage import AnyPath

STAGE = "adapt"


def adapt(
    workdir: Workdir,
    *,
    output: AnyPath,
    stage: str,
    trainable: Literal["all", "last_layer"],
    num_epochs: float,
    peak_lr: float,
    data_dir: str,
    should_stop: Callable[[int], bool],
    verify: bool = False,
) -> None:
    """Fine-tunes a run on the tuning split's labels, evaluates and reports it.

    Args:
      output: Workdir of the adapted run.
      stage: Stage whose best checkpoint to start from; "" for the last one trained.
      trainable: A key of `config.ADAPT_EPOCHS`.
      num_epochs: Passes over the tuning split; 0 takes the default.
      peak_lr: Highest learning rate; 0 takes the default.
      data_dir: Folder of the dataset, if it has moved; "" otherwise.
      should_stop: Called with each step; returns whether to save and stop.
      verify: Whether to hash every byte of the data first.
    """
    start = Run.open(workdir.path, stage)
    config = adapted(start, trainable=trainable, num_epochs=num_epochs, peak_lr=peak_lr)
    start.close()
    train(
        config.moved(data_dir),
        Workdir(output),
        should_stop,
        allow_tuning_labels=True,
        verify=verify,
    )


def adapted(
    start: Run,
    *,
    trainable: Literal["all", "last_layer"],
    num_epochs: float,
    peak_lr: float,
) -> Config:
    """Returns a run's configuration with one stage, which adapts its checkpoint."""
    config = start.config
    share = ADAPT_LR_SHARES[trainable]
    (before,) = (s for s in config.stages if s.name == start.saved.stage)
    stage = StageConfig(
        name=STAGE,
        terms=final_terms(before.terms),
        split="tuning",
        trainable=trainable,
        num_epochs=num_epochs or ADAPT_EPOCHS[trainable],
        peak_lr=peak_lr or share * config.optimizer.peak_lr,
    )
    return replace(
        config,
        start_from=str(start.workdir.path),
        start_from_stage=start.saved.stage,
        model=replace(config.model, pretrained=""),
        stages=(stage,),
        # A short stage whose learning rate falls to 0 has nothing to average.
        optimizer=replace(config.optimizer, average="none"),
    )


def final_terms(terms: Terms) -> Terms:
    """Returns the objective at the end of a stage, without the embedding term."""
    kept = {
        name: {key: _last(value) for key, value in term.items()}
        if isinstance(term, Mapping)
        else _last(term)
        for name, term in terms.items()
        if name != "embedding"
    }
    return kept or {"bce": 1.0}


def _last(value: Any) -> Any:
    if isinstance(value, tuple):
        return cast(tuple[tuple[float, float], ...], value)[-1][1]
    return value
