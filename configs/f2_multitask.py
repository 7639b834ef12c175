"""The default recipe: a multitask stage, then the classifier alone.

  python -m jaxii.main --config configs/f2_multitask.py
  python -m jaxii.main --config configs/f2_multitask.py:emoji --data_dir=DIR

Other presets: `:inclusive_images`, `:inclusive_images_pod` and `:open_images_v4`.

The first command generates its dataset; prepare the other datasets first (see
`prepare --help`).

`emoji` is the recipe that `new` writes for small data. In the other presets, the stage
`multitask` starts with cross-entropy, moves to focal loss between 20 % and 40 % of its
steps and adds soft F2 between 40 % and 60 %; it also trains the label embedding. The
stage `classifier` drops the embedding head and fine-tunes at a tenth of the learning
rate.
"""

from jaxii.config import default_config
from jaxii.errors import nearest
from jaxii.prepare.recipe import SMALL, mixing, stages

PRESETS = (
    "toy_regions",
    "emoji",
    "inclusive_images",
    "inclusive_images_pod",
    "open_images_v4",
)


def get_config(dataset="toy_regions"):
    """Returns the recipe for a dataset, one of `PRESETS`."""
    if dataset not in PRESETS:
        raise ValueError(
            f"configs/f2_multitask.py:{dataset}; there is no such preset; "
            f"{nearest(dataset, PRESETS)}use one of {', '.join(PRESETS)}."
        )
    config = default_config()
    if dataset == "toy_regions":
        _small_images(config)
    elif dataset == "emoji":
        return _stock(config)
    else:
        config.data.dataset = "kaggle" if "inclusive" in dataset else dataset
        config.data.image_size_pixels = 224
        config.global_batch_size = 1024
        config.optimizer.peak_lr = 0.4
        config.evaluate_every_steps = 2000
        config.log_every_steps = 100
    if dataset == "inclusive_images_pod":
        _large_batch(config)
    both, last = (8, 1) if dataset == "toy_regions" else (16, 2)
    focal = {"gamma": 2.0, "alpha": None}
    config.stages = (
        {
            "name": "multitask",
            "num_epochs": float(both),
            "embedding_head": True,
            "terms": {
                "bce": ((0.0, 1.0), (0.2, 1.0), (0.4, 0.0)),
                "focal": {"weight": ((0.2, 0.0), (0.4, 1.0)), **focal},
                "soft_f": ((0.4, 0.0), (0.6, 10.0)),
                "embedding": 1.0,
            },
        },
        {
            "name": "classifier",
            "num_epochs": float(last),
            "embedding_head": False,
            "peak_lr_scale": 0.1,
            "terms": {"focal": {"weight": 1.0, **focal}, "soft_f": 10.0},
        },
    )
    return config


def _stock(config):
    # The recipe that `new` writes for small data and 30 minutes on two cores.
    config.data.dataset = "kaggle"
    epochs = 40.0
    for choice in (*SMALL, *mixing(epochs)):
        config.update_from_flattened_dict({choice.field: choice.value})
    config.evaluate_every_steps = 400
    config.stages = stages(epochs)
    return config


def _large_batch(config):
    config.global_batch_size = 8192
    # Values from papers, not measured here. LAMB with binary cross-entropy: 0.005 at
    # batch size 2048 (Wightman et al. 2021, ResNet strikes back, table 2, A2), scaled
    # by the square root of the batch size (You et al. 2020, LAMB, section 4).
    config.optimizer.name = "lamb"
    config.optimizer.peak_lr = 0.01
    config.optimizer.weight_decay = 0.02
    config.optimizer.shard_state = True
    config.evaluate_every_steps = 250
    config.log_every_steps = 20


def _small_images(config):
    config.model.depth = 18
    config.model.width = 32
    # The same on all CPUs; bfloat16 is faster only on those with units for it.
    config.model.compute_dtype = "float32"
    # In so few epochs, stronger augmentation costs more than it gains.
    config.data.augmentation = 0.5
    config.label_embedding.dim = 32
    config.optimizer.peak_lr = 0.15
    config.optimizer.average = "ema"
    config.optimizer.ema_decay = 0.99
    config.evaluate_every_steps = 200
