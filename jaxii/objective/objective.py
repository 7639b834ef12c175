"""The objective of a stage: a sum of loss terms, weighted by schedules.

Weights and parameters of the losses are evaluated inside the compiled train step, so
moving from one loss to another does not recompile. The train step divides each term by
the sum of its example weights over the global batch, differentiates and updates.
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import cast

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from jaxii.errors import InputError, nearest
from jaxii.objective import losses
from jaxii.objective.schedule import Schedule, is_constant_zero, make_schedule

EMBEDDING = "embedding"
UNKNOWN = ("negative", "ignored")

# Allowed values, in words and as a test that NaN fails.
_Range = tuple[str, Callable[[float], bool]]
_AT_LEAST_0: _Range = ("finite and at least 0", lambda x: 0.0 <= x < math.inf)
_FINITE: _Range = ("finite", math.isfinite)
# Parameter of a loss -> its range; others must be finite.
_RANGES: Mapping[str, _Range] = {
    "gamma": _AT_LEAST_0,
    "alpha": ("from 0 to 1, or None", lambda x: 0.0 <= x <= 1.0),
    "gamma_pos": _AT_LEAST_0,
    "gamma_neg": _AT_LEAST_0,
    "clip": ("a probability, at least 0 and below 1", lambda x: 0.0 <= x < 1.0),
    "beta": ("finite and above 0", lambda x: 0.0 < x < math.inf),
}


def targets_from_labels(
    label_ids: Int[Array, "batch slot"],
    label_confidences: Float[Array, "batch slot"],
    *,
    num_classes: int,
    unknown: str,
) -> tuple[Float[Array, "batch class"], Float[Array, "batch class"]]:
    """Scatters sparse labels into targets and a mask of the known classes.

    Args:
      label_ids: Class indices, padded with -1.
      label_confidences: 1 present, 0 verified absent, in between machine labels.
      num_classes: Number of classes.
      unknown: Treatment of classes that are not listed: "negative" or "ignored".

    Returns:
      targets [batch, class] in [0, 1] and known [batch, class], 1 where the class
      counts. A class listed twice gets the larger confidence.
    """
    rows = jnp.arange(label_ids.shape[0], dtype=label_ids.dtype)[:, None]
    # Padding gets an index out of bounds, which is dropped; -1 would wrap around.
    columns = jnp.where(label_ids < 0, num_classes, label_ids)
    blank = jnp.zeros((label_ids.shape[0], num_classes), jnp.float32)
    targets = blank.at[rows, columns].max(label_confidences, mode="drop")
    if unknown == "negative":
        return targets, jnp.ones_like(blank)
    return targets, blank.at[rows, columns].set(1.0, mode="drop")


@dataclass(frozen=True, kw_only=True)
class Term:
    """One loss, with its weight and its parameters as schedules of the stage step."""

    name: str
    weight: Schedule
    params: Mapping[str, Schedule | float | None]


@dataclass(frozen=True, kw_only=True)
class Objective:
    """The weighted sum of a stage's terms; see `make_objective`."""

    terms: tuple[Term, ...]
    num_classes: int
    unknown: str

    def targets(
        self,
        label_ids: Int[Array, "batch slot"],
        label_confidences: Float[Array, "batch slot"],
    ) -> tuple[Float[Array, "batch class"], Float[Array, "batch class"]]:
        """Returns targets and known classes, as `targets_from_labels` does."""
        return targets_from_labels(
            label_ids,
            label_confidences,
            num_classes=self.num_classes,
            unknown=self.unknown,
        )

    def example_weights(
        self,
        *,
        targets: Float[Array, "batch class"],
        known: Float[Array, "batch class"],
        mask: Float[Array, " batch"],
        label_embeddings: Float[Array, "class embed"] | None,
    ) -> dict[str, Float[Array, " batch"]]:
        """Returns each image's weight in each term, 0 or 1.

        Terms over classes need a known class, `soft_f` a known positive label, and the
        embedding term a nonzero target vector. Padding has weight 0.

        The weights depend on labels only, so the global denominators are known before
        the forward pass and micro-batches add up exactly.

        Raises:
          ValueError: If there is an embedding term and no `label_embeddings`.
        """
        weights: dict[str, Float[Array, " batch"]] = {}
        for term in self.terms:
            if term.name == EMBEDDING:
                goal = _embedding_goal(targets, label_embeddings)
                weights[term.name] = mask * losses.has_direction(goal)
            elif term.name == "soft_f":
                weights[term.name] = mask * losses.has_positive(known * targets)
            else:
                weights[term.name] = mask * losses.has_known(known)
        return weights

    def losses(
        self,
        *,
        logits: Float[Array, "batch class"],
        embedding: Float[Array, "batch embed"] | None,
        targets: Float[Array, "batch class"],
        known: Float[Array, "batch class"],
        label_embeddings: Float[Array, "class embed"] | None,
        stage_step: Num[Array, ""],
    ) -> dict[str, Float[Array, " batch"]]:
        """Returns each term's loss, one number per image.

        Raises:
          ValueError: If there is an embedding term and no embedding head.
        """
        values: dict[str, Float[Array, " batch"]] = {}
        for term in self.terms:
            if term.name == EMBEDDING:
                if embedding is None:
                    raise ValueError("the embedding term needs an embedding head")
                goal = _embedding_goal(targets, label_embeddings)
                values[term.name] = losses.embedding(embedding, goal)
                continue
            params = {
                name: value(stage_step) if callable(value) else value
                for name, value in term.params.items()
            }
            loss = losses.LOSSES[term.name]
            values[term.name] = loss(logits, targets, known, **params)
        return values

    def weights(self, stage_step: Num[Array, ""]) -> dict[str, Float[Array, ""]]:
        """Returns each term's weight at a step of the stage."""
        return {term.name: term.weight(stage_step) for term in self.terms}


def make_objective(
    terms: Mapping[str, object],
    *,
    num_steps: int,
    num_classes: int,
    unknown: str = "negative",
) -> Objective:
    """Returns a stage's objective.

    Args:
      terms: Term name to its weight, or to a dict of `weight` and the loss's
        parameters. A weight or parameter is a number or (share of the stage, value)
        pairs; focal's alpha may be None. A term whose weight is the constant 0 is not
        computed.
      num_steps: Length of the stage in steps.
      num_classes: Number of classes.
      unknown: Treatment of classes that are not listed: "negative" or "ignored".

    Raises:
      InputError: If a term, parameter or choice does not exist, a value is outside its
        range, or there is no term.
    """
    allowed = (*losses.LOSSES, EMBEDDING)
    if unknown not in UNKNOWN:
        raise InputError(
            f"unknown={unknown!r} is not supported; use one of {', '.join(UNKNOWN)}."
        )
    built: list[Term] = []
    for name, spec in terms.items():
        if name not in allowed:
            raise InputError(
                f"term {name!r} does not exist; {nearest(name, allowed)}use one of "
                f"{', '.join(allowed)}."
            )
        term = _make_term(name, spec, num_steps)
        if term is not None:
            built.append(term)
    if not built:
        raise InputError(
            "a stage has no term with a weight above 0; give at least one of "
            f"{', '.join(allowed)}."
        )
    return Objective(terms=tuple(built), num_classes=num_classes, unknown=unknown)


def _embedding_goal(
    targets: Float[Array, "batch class"],
    label_embeddings: Float[Array, "class embed"] | None,
) -> Float[Array, "batch embed"]:
    """Returns the sum of each image's label embeddings, weighted by its targets.

    Absent and unknown labels add nothing, so `known` is not needed.
    """
    if label_embeddings is None:
        raise ValueError("the embedding term needs label embeddings")
    return targets @ label_embeddings


def _make_term(name: str, spec: object, num_steps: int) -> Term | None:
    params: dict[str, object] = {"weight": spec}
    if isinstance(spec, Mapping):
        params = dict(cast("Mapping[str, object]", spec))
    weight = params.pop("weight", 1.0)
    field = f"weight of term {name!r}"
    if is_constant_zero(weight, name=field):
        return None
    own = _parameters(name)
    for key in params:
        if key not in own:
            raise InputError(
                f"term {name!r} has no parameter {key!r}; {nearest(key, own)}it takes "
                f"{', '.join(('weight', *own))}."
            )
    made = {
        key: _make_parameter(
            value, num_steps, name=f"{key} of term {name!r}", key=key, default=own[key]
        )
        for key, value in params.items()
    }
    schedule = make_schedule(weight, num_steps, name=field)
    return Term(name=name, weight=schedule, params=made)


def _make_parameter(
    value: object, num_steps: int, *, name: str, key: str, default: float | None
) -> Schedule | float | None:
    """Returns numbers and None unchanged, and a schedule for other values.

    None is allowed where it is the default.
    """
    if value is None and default is None:
        return None
    if isinstance(value, int | float) and not isinstance(value, bool):
        made = value
    else:
        made = make_schedule(value, num_steps, name=name)
    pairs = ((0.0, value),) if isinstance(value, Real) else value
    allowed, is_allowed = _RANGES.get(key, _FINITE)
    for _, number in cast("Sequence[tuple[float, float]]", pairs):
        if not is_allowed(number):
            raise InputError(
                f"{name}: value {number} must be {allowed}; the default is {default}."
            )
    return made


def _parameters(name: str) -> dict[str, float | None]:
    """Returns the parameters of a loss with their defaults.

    Raises:
      InputError: If the loss cannot be called as `Objective.losses` calls it.
    """
    if name == EMBEDDING:
        return {}
    signature = inspect.signature(losses.LOSSES[name])
    try:
        signature.bind("logits", "targets", "known")
    except TypeError as error:
        raise InputError(
            f"the loss {name!r} in LOSSES has the signature {signature} ({error}); use "
            "(logits, targets, known=None, *, parameter=default)."
        ) from error
    return {
        parameter.name: parameter.default
        for parameter in signature.parameters.values()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }
