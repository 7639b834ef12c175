"""Times the loop of `train` against its own compiled step on one resident batch.

    python -m tests.benchmarks.loop [--evaluations=4]

The default run (configs/f2_multitask.py: toy_regions, ResNet-18 of half the width, 64
images of 64 pixels per step), with a longer first stage, goes through the loop of
`train`: images are read, decoded and sent, figures are logged every 20 steps, and the
run is evaluated on `validation` and saved every 100 steps. After a log without an
evaluation, the loop's input pauses for 10 steps of the same compiled function on one
resident batch, so that each stretch of 20 steps of the loop lies between two of these
measurements.

* images/s of the loop over images/s of the bare step: median over the stretches without
  an evaluation; once with its input, once with --reuse_batch, where the input is free.
  On CPUs, decoding uses the same cores as the step, even if the loop never waits.
* cost of saves and evaluations: the time of 40 steps around one (the evaluation, the
  start of the save, the slowdown while it is written) minus that of 40 other steps,
  over 100 steps; median. The first evaluation, which compiles, is printed but not
  counted.

Takes about five minutes on two cores.
"""

import argparse
import itertools
import runpy
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import jax

from jaxii.config import Config
from jaxii.distributed.mesh import divided, replicated, to_devices
from jaxii.runs import assembly
from jaxii.runs.begin import begin
from jaxii.runs.train import make_trainer
from jaxii.runs.workdir import Workdir
from jaxii.storage import user_cache
from jaxii.train.step import make_train_step
from jaxii.train.telemetry.telemetry import Telemetry
from jaxii.train.trainer import Preempted
from tests.benchmarks.table import Row, emit

CONFIG = Path(__file__).parents[2] / "configs" / "f2_multitask.py"
STRETCH, BARE_STEPS = 20, 10
SPEED_BAR, ADDED_BAR = 0.97, 0.03


class Bare:
    """The compiled step of a run's first stage on one batch, with its own state.

    Args:
      session: The run.
      batches: Its training batches.
    """

    def __init__(self, session, batches):
        plan, mesh = session.plans[0], session.mesh
        self._step = make_train_step(plan.settings, mesh)
        batch = next(batches(plan.stage.split, 0))
        self._given = to_devices(batch, divided(mesh)), session.vectors()
        make = jax.jit(plan.fresh_state, out_shardings=replicated(mesh))
        self._state = make(jax.random.key(0))
        self.seconds()

    def seconds(self) -> float:
        """Returns the time of a step."""
        start = time.monotonic()
        for _ in range(BARE_STEPS):
            self._state, metrics = self._step(self._state, *self._given)
        jax.block_until_ready((self._state, metrics))
        return (time.monotonic() - start) / BARE_STEPS


class Halted:
    """The input of a run that pauses for the bare step and times the steps in between.

    Args:
      batches: The run's training batches.
      evaluate_every_steps: Cadence of its evaluations.
      bare: The step.
    """

    def __init__(self, batches, evaluate_every_steps, bare):
        self._batches, self._bare = batches, bare
        self._evaluate_every_steps = evaluate_every_steps
        # Steps of the loop in each stretch, and their time in seconds.
        self.stretches: list[tuple[int, float]] = []
        # Seconds of a bare step before each stretch and after the last.
        self.bare = []
        # Seconds for which the loop waited for a batch.
        self.waited = 0.0

    def batches(self, split, start_example):
        inner = self._batches(split, start_example)
        halted_at = resumed = 0
        for step in itertools.count():
            # Not after an evaluation, while its save is being written.
            due = step % STRETCH == 0 and step % self._evaluate_every_steps != 0
            if step == 0 or due:
                if step:
                    seconds = time.monotonic() - resumed
                    self.stretches.append((step - halted_at, seconds))
                self.bare.append(self._bare.seconds())
                halted_at, resumed = step, time.monotonic()
            asked = time.monotonic()
            batch = next(inner)
            self.waited += time.monotonic() - asked
            yield batch

    def plain(self) -> list[tuple[float, float]]:
        """Returns seconds per step of the loop and of the bare step, by stretch.

        Excludes evaluations and the first stretch, in which the loop's step compiles.
        """
        return [
            (seconds / steps, (self.bare[i] + self.bare[i + 1]) / 2)
            for i, (steps, seconds) in enumerate(self.stretches)
            if steps == STRETCH and i > 0
        ]

    def added(self) -> list[float]:
        """Returns the seconds that each evaluation and save added."""
        usual = statistics.median(own for own, _ in self.plain())
        return [
            seconds - steps * usual
            for steps, seconds in self.stretches
            if steps > STRETCH
        ]


def halted_run(num_steps: int, *, reuse_batch: bool = False) -> Halted:
    """Runs the loop for `num_steps` steps; returns its times."""
    config = runpy.run_path(str(CONFIG))["get_config"]()
    first, *others = config.stages
    config.stages = ({**first, "num_epochs": 100.0}, *others)
    config.data.reuse_batch = reuse_batch
    config = Config.resolve(config)
    assert config.log_every_steps == STRETCH
    with tempfile.TemporaryDirectory() as folder:
        workdir = Workdir(Path(folder))
        run = begin(config, workdir)
        # The run ends after the step that follows the last stretch.
        batches = partial(assembly.train_batches, config, run.data)
        halted = Halted(batches, config.evaluate_every_steps, Bare(run, batches))
        with Telemetry(folder, total_steps=num_steps, start_step=0) as telemetry:
            trainer = make_trainer(
                run,
                telemetry,
                batches=halted.batches,
                should_stop=lambda step: step > num_steps,
                recipe={},
            )
            try:
                trainer.run()
            except Preempted:
                run.checkpoints.close()
    return halted


def speed(halted: Halted, what: str, images: int) -> Row:
    plain = halted.plain()
    own, bare = (statistics.median(column) for column in zip(*plain, strict=True))
    return Row(
        what=f"images/s of the loop, {what}",
        ours=f"{images / own:.1f} images/s",
        peer=f"bare step {images / bare:.1f} images/s",
        figure=statistics.median(bare / own for own, bare in plain),
        relation=">=",
        bar=SPEED_BAR,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--evaluations", type=int, default=4, help="evaluations after the first"
    )
    args = parser.parse_args()
    config = Config.resolve(runpy.run_path(str(CONFIG))["get_config"]())
    images, every = config.global_batch_size, config.evaluate_every_steps
    assembly.open_data(config)
    # The same cache as that of the command.
    jax.config.update("jax_compilation_cache_dir", str(user_cache() / "compiled"))
    num_steps = every * (1 + args.evaluations) + STRETCH
    halted = halted_run(num_steps)
    free = halted_run(2 * every + STRETCH, reuse_batch=True)
    first, *added = halted.added()
    usual = statistics.median(own for own, _ in halted.plain())
    share = halted.waited / sum(seconds for _, seconds in halted.stretches)
    print(
        f"input wait {share:.1%} of the time; the first evaluation, which compiles, "
        f"added {first:.1f} s"
    )
    emit(
        speed(halted, f"{config.data.dataset}, with input", images),
        speed(free, "--reuse_batch, without input", images),
        Row(
            what=f"time that evaluating and saving every {every} steps adds",
            ours=f"{statistics.median(added):.2f} s each",
            peer=f"{every} steps {every * usual:.1f} s",
            figure=100 * statistics.median(added) / (every * usual),
            relation="<=",
            bar=100 * ADDED_BAR,
            unit="%",
        ),
    )


if __name__ == "__main__":
    main()
