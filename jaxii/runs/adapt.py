"""`adapt`: fine-tunes a trained run on the tuning split's labels, in a new workdir.

The result is an ordinary run of one stage; its provenance records that labels of the
target domain trained it. The original solution tried this and abandoned it, because it
is against the spirit of the task.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal, cast

import jax

from jaxii.config import (
    ADAPT_BATCH_SIZE,
    ADAPT_EPOCHS,
    ADAPT_LR_SHARES,
    Config,
    StageConfig,
    Terms,
)
from jaxii.console import say
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
    change_batch_size: bool = False,
    verify: bool = False,
) -> None:
    """Fine-tunes a run on the tuning split's labels, evaluates and reports it.

    Args:
      output: Workdir of the adapted run.
      stage: Stage whose best checkpoint to start from; "" for the last one trained.
      trainable: A key of `config.ADAPT_EPOCHS`.
      num_epochs: Passes over the tuning split; 0 takes the default.
      peak_lr: Highest learning rate; 0 takes a share of the run's highest, see
        `config.ADAPT_LR_SHARES`.
      data_dir: Folder of the dataset, if it has moved; "" otherwise.
      should_stop: Called with each step; returns whether to save and stop.
      change_batch_size: Whether a resumed run may have another batch size.
      verify: Whether to hash every byte of the data first.
    """
    start = Run.open(workdir.path, stage)
    config = adapted(start, trainable=trainable, num_epochs=num_epochs, peak_lr=peak_lr)
    start.close()
    say(
        f"rate      {config.optimizer.peak_lr:g} at most; the run's highest was "
        f"{highest_peak_lr(start.config):g}"
    )
    if config.global_batch_size < start.config.global_batch_size:
        is_scaled = config.optimizer.base_batch_size > 0
        say(
            f"batches   {config.global_batch_size} images instead of the run's "
            f"{start.config.global_batch_size}, for more updates; the learning rate is "
            f"{'' if is_scaled else 'not '}scaled with the batch, as in the run's "
            "recipe (optimizer.base_batch_size)"
        )
    train(
        config.moved(data_dir),
        Workdir(output),
        should_stop,
        allow_tuning_labels=True,
        change_batch_size=change_batch_size,
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
    config = with_small_batches(start.config, jax.device_count())
    (before,) = (s for s in config.stages if s.name == start.saved.stage)
    stage = StageConfig(
        name=STAGE,
        terms=final_terms(before.terms),
        split="tuning",
        trainable=trainable,
        num_epochs=num_epochs or ADAPT_EPOCHS[trainable],
    )
    peak_lr = peak_lr or ADAPT_LR_SHARES[trainable] * highest_peak_lr(config)
    return replace(
        config,
        start_from=str(start.workdir.path),
        start_from_stage=start.saved.stage,
        model=replace(config.model, pretrained=""),
        stages=(stage,),
        # A short stage whose learning rate falls to 0 has nothing to average.
        optimizer=replace(config.optimizer, average="none", peak_lr=peak_lr),
    )


def highest_peak_lr(config: Config) -> float:
    """Returns the highest learning rate of all stages, not scaled with the batch."""
    scale = max(stage.peak_lr_scale for stage in config.stages)
    return scale * config.optimizer.peak_lr


def with_small_batches(config: Config, num_devices: int) -> Config:
    """Returns the configuration with batches of at most `ADAPT_BATCH_SIZE` images.

    The tuning split is small, so that larger batches leave only a few updates. A batch
    has at least one image per device. BatchNorm uses the statistics of the whole batch,
    because a device has too few images. The learning rate is scaled if the recipe sets
    `optimizer.base_batch_size`.
    """
    batch_size = max(1, ADAPT_BATCH_SIZE // num_devices) * num_devices
    if config.global_batch_size <= batch_size:
        return config
    # A slice is not larger than the run's, which fits the memory of a device.
    most = max(1, config.global_batch_size // (num_devices * config.micro_batches))
    share = batch_size // num_devices
    divisors = (n for n in range(1, share + 1) if share % n == 0)
    return replace(
        config,
        global_batch_size=batch_size,
        micro_batches=next(n for n in divisors if share // n <= most),
        model=replace(config.model, batch_norm="global"),
    )


def final_terms(terms: Terms) -> Terms:
    """Returns the objective at the end of a stage, without the embedding term.

    Terms whose weight is then 0 are left out. If none is left, returns cross-entropy.
    """
    final: Terms = {
        name: {key: _last(value) for key, value in term.items()}
        if isinstance(term, Mapping)
        else _last(term)
        for name, term in terms.items()
        if name != "embedding"
    }
    return {name: term for name, term in final.items() if _weight(term)} or {"bce": 1.0}


def _weight(term: Any) -> Any:
    if isinstance(term, Mapping):
        return cast(Mapping[str, Any], term).get("weight", 1.0)
    return term


def _last(value: Any) -> Any:
    if isinstance(value, tuple):
        return cast(tuple[tuple[float, float], ...], value)[-1][1]
    return value
