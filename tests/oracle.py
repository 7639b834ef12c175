"""A network that knows the truth: the shade of an image encodes its labels."""

import contextlib
from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np
import pytest
import small_layout
from small_layers import own_networks

from jaxii.config import Config, default_config
from jaxii.models.multitask import Network, Outputs

DARKEST, LIGHTEST = 10, 230


def image(kind: int, num_kinds: int) -> bytes:
    """Returns a JPEG whose shade encodes a kind."""
    step = (LIGHTEST - DARKEST) / (num_kinds - 1)
    return small_layout.jpeg(round(DARKEST + kind * step), 40, 40)


def network(truths: Sequence[Sequence[int]]) -> Callable[..., Network]:
    """Returns a stand-in for `make_network` that answers kind k with `truths[k]`."""

    def make_network(*, num_classes, **_):
        table = np.full((len(truths), num_classes), -10, np.float32)
        for kind, label_ids in enumerate(truths):
            table[kind, list(label_ids)] = 10

        def init(key):
            return {"classifier": {"bias": jnp.zeros(num_classes)}}, {}

        def apply(params, batch_stats, images, *, train, key):
            shade = jnp.mean(images.astype(jnp.float32), axis=(1, 2, 3))
            share = (shade - DARKEST) / (LIGHTEST - DARKEST)
            kind = jnp.round(share * (len(truths) - 1)).astype(jnp.int32)
            # The gradient of a parameter without effect.
            logits = jnp.asarray(table)[kind] + 0 * params["classifier"]["bias"][None]
            return Outputs(logits, None, logits), batch_stats

        return Network(init=init, apply=apply)

    return make_network


@contextlib.contextmanager
def every_network_is(network: Callable[..., Network]):
    """Gives runs this network; runs of other tests in the process keep theirs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jaxii.runs.assembly.make_network", network)
        own_networks(patch)
        yield


def make_config(data, **changes) -> Config:
    """Returns a configuration of two steps on a prepared dataset."""
    config = default_config()
    config.data.dataset, config.data.directory = "kaggle", str(data)
    config.data.image_size_pixels, config.data.validation_fraction = 16, 0.4
    config.data.augmentation, config.data.num_threads = 0.0, 1
    config.global_batch_size = 8
    # On 8 devices, each has one image, whose last maps have one pixel.
    config.model.batch_norm = "global"
    config.stages = ({"name": "only", "terms": {"bce": 1.0}, "num_steps": 2},)
    config.data.update(changes)
    return Config.resolve(config)
