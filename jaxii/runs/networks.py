"""A run's networks, and what they start from, as its configuration says.

`assemble` builds the stages on them; together they are the only readers of the
configuration's fields.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxii.config import Config, ModelConfig
from jaxii.data.prepared import Data
from jaxii.distributed.mesh import DATA_AXIS
from jaxii.models.multitask import Network, make_network
from jaxii.models.pretrained import Trunk, load_trunk


@dataclass(frozen=True, kw_only=True)
class Networks:
    """The run's network with and without the embedding head, each made once."""

    config: ModelConfig
    num_classes: int
    embedding_dim: int
    classifier_bias: np.ndarray | None = None
    # None: that of the devices at hand.
    platform: str | None = None
    _made: dict[bool, Network] = field(default_factory=dict)

    def get(self, embedding_head: bool) -> Network:
        """Returns the network; the same object for the same argument."""
        if embedding_head not in self._made:
            model = self.config
            self._made[embedding_head] = make_network(
                depth=model.depth,
                num_classes=self.num_classes,
                embedding_dim=self.embedding_dim if embedding_head else 0,
                variant=model.variant,
                width=model.width,
                stem=model.stem,
                dropout=model.dropout,
                dtype=jnp.dtype(model.compute_dtype),
                classifier_bias=self.classifier_bias,
                bn_axis=None if model.batch_norm == "device" else DATA_AXIS,
                bn_group=batch_norm_group(self.config),
                platform=self.platform,
            )
        return self._made[embedding_head]


def batch_norm_group(config: ModelConfig) -> int | None:
    """Returns the devices that share BatchNorm statistics; None where no N is given."""
    _, _, number = config.batch_norm.partition(":")
    return int(number) if number else None


def prior_bias(counts: np.ndarray, num_images: int) -> np.ndarray:
    """Returns each label's log prior odds, [class] float32 (Lin et al. 2017, 3.3)."""
    prior = (counts + 0.5) / (num_images + 1.0)
    return np.log(prior / (1.0 - prior)).astype(np.float32)


def make_networks(config: Config, data: Data, embedding_dim: int) -> Networks:
    """Returns a run's networks, the bias set from the training labels."""
    num_classes = len(data.vocabulary)
    bias = None
    if config.model.prior_bias:
        counts = data.train_rows.class_counts(num_classes)
        bias = prior_bias(counts, data.split("train").num_examples)
    return Networks(
        config=config.model,
        num_classes=num_classes,
        embedding_dim=embedding_dim,
        classifier_bias=bias,
    )


def pretrained_trunk(config: Config, init: Callable[..., Any]) -> Trunk | None:
    """Returns the configured weights, or None where there are none.

    Args:
        config: checked.
        init: gives the parameters and the statistics that they are to start.
    """
    if not config.model.pretrained:
        return None
    shapes = jax.eval_shape(init, jax.random.key(0))
    return load_trunk(config.model.pretrained, *shapes)
