"""Compares label-free estimates of runs on shifted tests with the true values.

    python -m tests.benchmarks.shifted_figures runs/emoji runs/clip --tune_on=held_out

Takes evaluated runs whose prepared tests have labels. `--tune_on=held_out` uses the
decoders of `evaluate --tune_on=held_out`, which needs `hold_out`. The expected F2 of
each test, and of each of its slices, is compared with the true F2 (bar: a mean absolute
error of 0.05, for the tests alone and with their slices), and the clean decoder with
the best single threshold chosen on the test's own labels, an oracle (bar: 0.02 behind
it on average).
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxii.decoding.decoders import load
from jaxii.metrics.f_beta import f_beta
from jaxii.runs import unseen
from jaxii.runs.run import Run
from tests.benchmarks.table import Row, emit

MOST_ERROR, MOST_BEHIND = 0.05, 0.02


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Figures of a run's test.

    Attributes:
      expected: Test or slice -> expected F2.
      true: Test or slice -> true F2.
      oracle: F2 at the best threshold for the test's own labels.
      error: The run's stated error of its expected F2; None if it is unknown.
    """

    expected: dict[str, float]
    true: dict[str, float]
    oracle: float
    error: float | None


def figures(path: Path, *, tune_on: str, decoder: str) -> Figures:
    """Predicts the test of a run, and scores one decoder of its evaluation.

    Args:
      path: Workdir of the run.
      tune_on: See `evaluate`; "" for its default.
      decoder: Name of the decoder; "" for the one in use.
    """
    variants = [f"tuned_on_{tune_on}"] * bool(tune_on)
    with Run.open(path) as run:
        metrics = run.workdir.metrics(variants)
        run.check_evaluated(metrics)
        decoder = decoder or metrics.decoder.name
        decoders = load(run.workdir.result_file("decoders.npz", variants), None)
        test = unseen.predict_scored(run, run.model(), "test")
        index = run.data.split("test").index
        rows = np.flatnonzero(np.isin(index.image_ids, test.image_ids))
        slice_ids, slices = index.slice_ids[rows], run.data.slices
        record = metrics.held_out
    chosen = decoders.decisions([decoder], test.probs, None)[decoder]
    expected = decoders.expected_f2(decoder, test.probs, chosen)
    true = f_beta(chosen, test.truth)
    parts = {"test": np.ones(len(rows), bool)}
    parts |= {slices[i]: slice_ids == i for i in np.unique(slice_ids).tolist()}
    return Figures(
        expected={name: float(expected[part].mean()) for name, part in parts.items()},
        true={name: float(true[part].mean()) for name, part in parts.items()},
        oracle=metrics.splits["test"].best_f2,
        error=None if record is None else record.expected_f2_error(decoder),
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, help="workdirs")
    parser.add_argument("--tune_on", default="", help="--tune_on of the evaluation")
    parser.add_argument(
        "--decoder", default="", help="name of the decoder [the one in use]"
    )
    args = parser.parse_args()
    errors, behind = {"": [], " and their slices": []}, []
    for path in args.runs:
        found = figures(path, tune_on=args.tune_on, decoder=args.decoder)
        stated = "unknown" if found.error is None else f"{found.error:.3f}"
        print(f"{path}: expected F2 ± {stated}")
        for name, expected in found.expected.items():
            error = expected - found.true[name]
            errors[" and their slices"].append(error)
            if name == "test":
                errors[""].append(error)
            print(
                f"  {name:24} expected {expected:.4f}  true {found.true[name]:.4f}  "
                f"{error:+.4f}"
            )
        behind.append(found.oracle - found.true["test"])
        print(f"  best threshold of the test {found.oracle:.4f}: {-behind[-1]:+.4f}")
    what = f"{len(args.runs)} shifted tests"
    rows = [
        Row(
            what=f"expected F2 of {what}{parts}, mean absolute error",
            ours=f"{(error := float(np.mean(np.abs(values)))):.4f}",
            peer="",
            figure=error,
            relation="<=",
            bar=MOST_ERROR,
        )
        for parts, values in errors.items()
    ]
    mean = float(np.mean(behind))
    emit(
        *rows,
        Row(
            what=f"clean decoder behind the best threshold of {what}, mean",
            ours=f"{mean:.4f}",
            peer="",
            figure=mean,
            relation="<=",
            bar=MOST_BEHIND,
        ),
    )


if __name__ == "__main__":
    main()
