"""Predictions for held-out domains, and figures for new domains derived from them.

Every image is predicted by the run that was not trained on its domain. Decoders for new
domains are fitted on these predictions, pooled over all domains. Leaving out each
domain of the pool in turn gives the error of an expected F2.
"""

import functools
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, BinaryIO, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float32

from jaxii.decoding import label_shift
from jaxii.decoding.decoders import Decoders, fit_decoders, sums_of
from jaxii.decoding.thresholds import choose
from jaxii.errors import InputError
from jaxii.metrics.f_beta import f_beta
from jaxii.metrics.streaming import Accumulators
from jaxii.storage import AnyPath, write_beside

# The predictions of a run that held out a domain.
FILE = "held_out.npz"
# Limit on probabilities in the file, 4 bytes each; above it, images are subsampled.
MOST_NUMBERS = 2**26


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """Probabilities and truth of images that a run was not trained on.

    Attributes:
      image_ids: text, in the order of the split.
      probs: uncalibrated probabilities.
      truth: whether a label is present.
    """

    image_ids: np.ndarray
    probs: Float32[np.ndarray, "image class"]
    truth: Bool[np.ndarray, "image class"]

    def sums(self) -> Accumulators:
        """Returns the sums that decoders are fitted on."""
        return self._sums

    @functools.cached_property
    def _sums(self) -> Accumulators:
        return sums_of(self.probs, self.truth)

    def f2s(self, decoders: Decoders) -> dict[str, float]:
        """Returns the mean F2 of each decoder."""
        names = decoders.names(has_head=False)
        chosen = decoders.decisions(names, self.probs, None)
        return {name: float(f_beta(chosen[name], self.truth).mean()) for name in names}

    def save(self, path: AnyPath, label_hash: str) -> None:
        """Writes the file; `label_hash` is the content hash of the labels."""

        def write(file: BinaryIO) -> None:
            np.savez(
                file,
                label_hash=np.array(label_hash),
                image_ids=self.image_ids.astype(str),
                probs=self.probs,
                truth=np.packbits(self.truth, axis=1),
            )

        write_beside(path, write, binary=True)

    @classmethod
    def load(cls, path: AnyPath, label_hash: str) -> "Predictions":
        """Reads what `save` wrote.

        Raises:
          InputError: If the file is missing or damaged, or has other labels.
        """
        try:
            with cast(BinaryIO, path.open("rb")) as file, np.load(file) as arrays:
                found = str(arrays["label_hash"])
                probs = arrays["probs"]
                truth = np.unpackbits(arrays["truth"], axis=1, count=probs.shape[1])
                read = cls(
                    image_ids=arrays["image_ids"], probs=probs, truth=truth.astype(bool)
                )
        except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise InputError(
                f"{path} is not a file of predictions ({error}); run hold_out again."
            ) from error
        if found != label_hash:
            raise InputError(
                f"{path} has labels with hash {found}, but those of the run have hash "
                f"{label_hash}; run hold_out again."
            )
        return read


def pool(sums: Sequence[Accumulators]) -> Accumulators:
    """Returns the sums over all domains, with the same weight for each domain.

    A new domain is no more like a large domain than like a small one. The weights of
    all images add up to the number of images.
    """
    counts = [int(domain.sums.num_images) for domain in sums]
    weights = [np.mean(counts) / count for count in counts]

    def add(*leaves: np.ndarray) -> Any:
        return sum(weight * leaf for weight, leaf in zip(weights, leaves, strict=True))

    return replace(sums[0], sums=jax.tree.map(add, *(domain.sums for domain in sums)))


def fit(domains: Sequence[Predictions]) -> Decoders:
    """Fits all decoders except `embedding`; every domain has the same weight."""
    sums = pool([domain.sums() for domain in domains])
    decoders = fit_decoders(sums, choose(sums), label_embeddings=None)
    return replace(decoders, expected_f2_offsets=expected_f2_offsets(decoders, domains))


def expected_f2_offsets(
    decoders: Decoders, domains: Sequence[Predictions]
) -> dict[str, float]:
    """Returns decoder -> minus the mean of `expected_f2_errors` over domains.

    Args:
      decoders: fitted on these domains, without offsets.
      domains: predictions for each domain.
    """
    errors = [expected_f2_errors(decoders, domain) for domain in domains]
    return {name: -float(np.mean([e[name] for e in errors])) for name in errors[0]}


def expected_f2_errors(decoders: Decoders, seen: Predictions) -> dict[str, float]:
    """Returns, for each decoder, the mean expected F2 minus the mean F2.

    Args:
      decoders: fitted decoders.
      seen: predictions for one domain.
    """
    names = decoders.names(has_head=False)
    errors: dict[str, float] = {}
    for name, chosen in decoders.decisions(names, seen.probs, None).items():
        expected = decoders.expected_f2(name, seen.probs, chosen)
        errors[name] = float(expected.mean() - f_beta(chosen, seen.truth).mean())
    return errors


def errors_of_pools(found: Mapping[str, Predictions]) -> dict[str, dict[str, float]]:
    """Returns domain -> errors of expected F2 of decoders fitted on all other domains.

    Args:
      found: domain -> predictions; at least two domains.
    """
    return {
        domain: expected_f2_errors(
            fit([found[other] for other in found if other != domain]), own
        )
        for domain, own in found.items()
    }


def adaptation_gains(
    decoders: Decoders,
    held_out: Predictions,
    adapted_probs: Float32[np.ndarray, "image class"],
) -> dict[str, dict[str, float]]:
    """Returns the gains in F2 on a held-out domain from adapting to its images.

    Args:
      decoders: fitted on other domains.
      held_out: predictions for the held-out domain.
      adapted_probs: probabilities after adapting BatchNorm to the same images.

    Returns:
      Joined names of `InferenceOptions` -> decoder -> F2 with minus F2 without them.
    """
    adapted = replace(held_out, probs=adapted_probs)
    ways = {
        "adabn": adapted,
        "label_shift": _without_label_shift(held_out, decoders),
        "adabn_label_shift": _without_label_shift(adapted, decoders),
    }
    before = held_out.f2s(decoders)
    return {
        way: {name: f2 - before[name] for name, f2 in found.f2s(decoders).items()}
        for way, found in ways.items()
    }


def _without_label_shift(predictions: Predictions, decoders: Decoders) -> Predictions:
    sums, calibration = predictions.sums(), decoders.calibration
    home, histogram = decoders.frequencies, np.asarray(sums.sums.histogram)
    target = label_shift.target_frequencies(
        histogram, sums.thresholds, calibration, home
    )
    shift = label_shift.logit_shift(calibration, home, target)
    probs = label_shift.corrected(jnp.asarray(predictions.probs), jnp.asarray(shift))
    return replace(predictions, probs=np.asarray(probs))


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Measurements on held-out domains.

    Attributes:
      adaptation_gains: domain -> result of the function `adaptation_gains`.
      expected_f2_errors: domain -> result of the function `expected_f2_errors`.
      f2s: domain -> split -> decoder -> F2 of the run that held out the domain, on
        "validation" and "held_out", with decoders fitted on validation. Empty for runs
        that did not record it.
      length: length of the runs as a share of that of the run on all domains.
    """

    adaptation_gains: Mapping[str, Mapping[str, Mapping[str, float]]]
    expected_f2_errors: Mapping[str, Mapping[str, float]]
    f2s: Mapping[str, Mapping[str, Mapping[str, float]]] = field(
        default_factory=dict[str, Mapping[str, Mapping[str, float]]]
    )
    length: float = 1.0

    def union(self, other: "HeldOut") -> "HeldOut":
        """Returns the record of the domains of both records."""
        return HeldOut(
            length=min(self.length, other.length),
            adaptation_gains={**self.adaptation_gains, **other.adaptation_gains},
            expected_f2_errors={**self.expected_f2_errors, **other.expected_f2_errors},
            f2s={**self.f2s, **other.f2s},
        )

    def expected_f2_error(self, decoder: str) -> float | None:
        """Returns the root mean square error over domains; None for fewer than two."""
        found = [errors.get(decoder) for errors in self.expected_f2_errors.values()]
        known = [error for error in found if error is not None]
        if len(known) < 2:
            return None
        return float(np.sqrt(np.mean(np.square(known))))

    def adaptation_gain(self, way: str, decoder: str) -> tuple[float, float] | None:
        """Returns mean and standard deviation over domains; None for fewer than two.

        Args:
          way: names of `InferenceOptions`, as in `adaptation_gains`.
          decoder: name of the decoder.
        """
        found = [ways[way].get(decoder) for ways in self.adaptation_gains.values()]
        known = [gain for gain in found if gain is not None]
        if len(known) < 2:
            return None
        return float(np.mean(known)), float(np.std(known, ddof=1))
