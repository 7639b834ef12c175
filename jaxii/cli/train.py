"""`train`: trains a configuration and evaluates it."""

import re
from pathlib import Path

from ml_collections import config_flags

from jaxii.cli.flags import Flags, config_of, declare_verify, recipe_of
from jaxii.cli.start import declare_processes, start_jax
from jaxii.config import Config
from jaxii.errors import InputError
from jaxii.storage import AnyPath, at

HELP = """\
Trains all stages of a configuration, evaluates the result, and writes a report and a
submission. Run the same command again to resume.

  python -m jaxii.main --config configs/f2_multitask.py
  python -m jaxii.main train --config configs/f2_multitask.py:emoji \\
      --data_dir=data/emoji --workdir=runs/emoji --config.optimizer.peak_lr=0.1

{flags}

To check whether the input pipeline limits the speed, train on the first batch
repeatedly, in a separate --workdir: --config.data.reuse_batch=True. The figures of such
a run are not a result and are marked accordingly.

Compiled programs are cached in $XDG_CACHE_HOME/jaxii/compiled (by default in ~/.cache),
or in JAX_COMPILATION_CACHE_DIR if it is set; if it is empty, the cache is off. Cached
programs are executed, so a folder that others can write to is not used.

Exit codes: 0 done; 2 invalid input; 75 stopped on request (SIGTERM or Ctrl-C), run the
same command again to resume; 1 any other error."""


def declare(flags: Flags) -> None:
    """Declares the command's flags."""
    flags.takes_config()
    flags.text("workdir", "DIR", "folder of the run", otherwise="runs/RECIPE-DATASET")
    flags.text(
        "data_dir", "DIR", "prepared dataset (toy_regions needs none: it is generated)"
    )
    flags.switch(
        "allow_tuning_labels",
        "required for a stage on the tuning split, and to start from a run whose "
        "weights have learned from its labels",
    )
    flags.switch(
        "change_batch_size",
        "resume with another --config.global_batch_size, at the next example; "
        "schedules continue at the same fraction of their stage, whose length remains "
        "num_epochs epochs or num_steps updates; a finished run keeps its batch size",
    )
    flags.text(
        "profile_steps",
        "FIRST:LAST",
        "trace the updates after step FIRST up to step LAST and write the trace to "
        "WORKDIR/profile, for TensorBoard's profile plugin or Perfetto; 100:105 traces "
        "five updates",
    )
    declare_verify(flags)
    declare_processes(flags)


def run(flags: Flags) -> None:
    """Trains."""
    recipe = recipe_of(flags)
    config = config_of(flags)
    workdir = _workdir(flags, config)
    steps = _profile_steps(flags.profile_steps)
    start_jax(flags, saves_on_sigterm=True)
    from jaxii.distributed import processes
    from jaxii.runs.train import train
    from jaxii.runs.workdir import Workdir

    train(
        config,
        Workdir(workdir),
        processes.preemption_notice(),
        allow_tuning_labels=flags.allow_tuning_labels,
        change_batch_size=flags.change_batch_size,
        profile_steps=steps,
        verify=flags.verify,
        recipe=recipe,
    )


def _workdir(flags: Flags, config: Config) -> AnyPath:
    if flags.workdir:
        return at(flags.workdir)
    name = config_flags.get_config_filename(flags.values["config"])
    recipe, _, preset = name.partition(":")
    return Path("runs") / f"{Path(recipe).stem}-{preset or config.data.dataset}"


def _profile_steps(text: str) -> tuple[int, int]:
    """Returns the steps after which a trace starts and ends; equal ones for none."""
    if not text:
        return 0, 0
    # ASCII digits only, without a sign.
    found = re.fullmatch(r"([0-9]+):([0-9]+)", text)
    if found and int(found[1]) < int(found[2]):
        return int(found[1]), int(found[2])
    raise InputError(
        f"--profile_steps={text} is not FIRST:LAST with FIRST below LAST; 100:105 "
        "traces the five updates after step 100."
    )
