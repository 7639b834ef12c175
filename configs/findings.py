"""What the original competitor found, one small run a finding; on the emoji set.

  python -m jaxii.main --config configs/findings.py:baseline --data_dir=D

`launch/findings.sh D RUNS` trains all of them, continues where it stopped, and prints
the table of configs/README.md. Every run changes one thing of `baseline`: a ResNet-18
of half the width on 64-pixel images, ten epochs of cross-entropy with augmentation.
`long` and `long_deep` continue from there to the best figure.
"""

from jaxii.config import default_config
from jaxii.errors import nearest

EPOCHS = 10.0
# Share of the epochs that a run of two stages spends in the first.
FIRST = 0.8
FOCAL = {"gamma": 2.0, "alpha": None}
RISING_SOFT_F = ((0.4, 0.0), (0.6, 10.0))
TO_FOCAL = {
    "bce": ((0.3, 1.0), (0.5, 0.0)),
    "focal": {"weight": ((0.3, 0.0), (0.5, 1.0)), **FOCAL},
}


def get_config(name="baseline"):
    """Returns the configuration of a run, one of `RUNS`."""
    if name not in RUNS:
        raise ValueError(
            f"configs/findings.py:{name}; {nearest(name, RUNS)}use one of "
            f"{', '.join(RUNS)}."
        )
    config = default_config()
    config.data.dataset = "kaggle"
    config.model.depth = 18
    config.model.width = 32
    config.model.compute_dtype = "float32"
    # Of 0.5, 1 and 2 the best on a vendor held out of training, at this length.
    config.data.augmentation = 0.5
    config.label_embedding.dim = 32
    config.optimizer.average = "ema"
    config.optimizer.ema_decay = 0.99
    config.evaluate_every_steps = 100
    config.evaluate_train_images = 600
    _classify(config, bce=1.0)
    RUNS[name](config)
    return config


def _baseline(config):
    """Cross-entropy and augmentation: what every other run is compared with."""


def _no_augmentation(config):
    # As the original ran, by reading its code: nothing but a mirror.
    config.data.augmentation = 0.0


def _focal_from_zero(config):
    config.model.prior_bias = False
    _classify(config, focal={"weight": 1.0, **FOCAL})


def _focal(config):
    _classify(config, focal={"weight": 1.0, **FOCAL})


def _bce_then_focal(config):
    config.model.prior_bias = False
    _classify(config, **TO_FOCAL)


def _asl(config):
    _classify(config, asl=1.0)


def _bce_soft_f(config):
    _classify(config, bce=1.0, soft_f=RISING_SOFT_F)


def _soft_f_fine_tune(config):
    config.stages = (
        {"name": "bce", "num_epochs": FIRST * EPOCHS, "terms": {"bce": 1.0}},
        {
            "name": "soft_f",
            "num_epochs": (1 - FIRST) * EPOCHS,
            "peak_lr": config.optimizer.peak_lr / 5,
            "terms": {"soft_f": 10.0},
        },
    )


def _embedding(weight, dim=32):
    def change(config):
        config.label_embedding.dim = dim
        _classify(config, embedding_head=True, bce=1.0, embedding=weight)

    return change


def _embedding_dropped(config):
    config.stages = (
        {
            "name": "multitask",
            "num_epochs": FIRST * EPOCHS,
            "embedding_head": True,
            "terms": {"bce": 1.0, "embedding": 1.0},
        },
        {
            "name": "classifier",
            "num_epochs": (1 - FIRST) * EPOCHS,
            "peak_lr": config.optimizer.peak_lr / 5,
            "terms": {"bce": 1.0},
        },
    )


def _long(config):
    # As `embedding_0.1`, three times as long: what helped most on held-out vendors.
    _classify(
        config, num_epochs=3 * EPOCHS, embedding_head=True, bce=1.0, embedding=0.1
    )


def _long_deep(config):
    # A larger rate fits more in as many epochs, a deeper network still more: the best
    # on validation and on a held-out vendor.
    config.optimizer.peak_lr = 0.15
    _variant("resnet_d")(config)
    _long(config)


def _variant(variant):
    def change(config):
        # Bottlenecks, so that the variants differ in one thing each.
        config.model.depth = 26
        config.model.variant = variant

    return change


def _classify(config, *, num_epochs=EPOCHS, embedding_head=False, **terms):
    config.stages = (
        {
            "name": "classifier",
            "num_epochs": num_epochs,
            "embedding_head": embedding_head,
            "terms": terms,
        },
    )


RUNS = {
    "baseline": _baseline,
    "no_augmentation": _no_augmentation,
    "bce_soft_f": _bce_soft_f,
    "focal": _focal,
    "focal_from_zero": _focal_from_zero,
    "bce_then_focal": _bce_then_focal,
    "asl": _asl,
    "soft_f_fine_tune": _soft_f_fine_tune,
    "embedding_1": _embedding(1.0),
    "embedding_0.1": _embedding(0.1),
    "embedding_dim_8": _embedding(1.0, dim=8),
    "embedding_dim_128": _embedding(1.0, dim=128),
    "embedding_dropped": _embedding_dropped,
    "resnet_26": _variant("resnet"),
    "resnet_26_d": _variant("resnet_d"),
    "se_resnet_26": _variant("se_resnet"),
    "resnext_26": _variant("resnext"),
    "long": _long,
    "long_deep": _long_deep,
}

# The names that `get_config` takes.
PRESETS = tuple(RUNS)
