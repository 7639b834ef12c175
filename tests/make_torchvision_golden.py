"""Records logits of torchvision and timm, and small files of torch.

Run `python tests/make_torchvision_golden.py` in an environment with torch, torchvision
and timm (recorded with torch 2.14.1, torchvision 0.29.1 and timm 1.0.31 on a CPU,
float32). The weights behind the logits are not stored: each is drawn by a generator
seeded with its name, both here and in the tests.
"""

import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

GOLDEN = Path(__file__).parent / "golden"
BLOCKS = {18: (2, 2, 2, 2), 50: (3, 4, 6, 3)}


class Recorded(NamedTuple):
    """A recorded network, and its name here."""

    library: str
    depth: int
    variant: str = "resnet"


RECORDED = {
    "resnet18": Recorded("torchvision", 18),
    "resnet50": Recorded("torchvision", 50),
    "resnext50_32x4d": Recorded("torchvision", 50, "resnext"),
    "wide_resnet50_2": Recorded("torchvision", 50, "wide_resnet"),
    "resnet50d": Recorded("timm", 50, "resnet_d"),
    "seresnet50": Recorded("timm", 50, "se_resnet"),
}

TORCH_FILES = {
    "zip": GOLDEN / "torch_checkpoint.pth.tar",
    "legacy": GOLDEN / "torch_checkpoint_legacy.pth.tar",
}
# The averaged weights; in the first one, the first two axes are swapped.
CHECKPOINT = {
    "0.weight": np.arange(6, dtype=np.float32).reshape(2, 3, 1, 1),
    "0.bias": np.array([1.5, -2.0], np.float32),
    "1.weight": np.array([0.5, 65504.0], np.float32),
    "1.bias": np.array([-1e-30, 3e38], np.float32),
}


def golden_file(name: str) -> Path:
    """Returns the path of a network's recorded logits."""
    return GOLDEN / f"{RECORDED[name].library}_{name}.npz"


def torchvision_shapes(
    name: str, num_classes: int = 1000, width: int = 64
) -> dict[str, tuple]:
    """Returns a network's state dict as names to shapes, without its library."""
    _, depth, variant = RECORDED[name]
    bottleneck = depth >= 50
    shapes: dict[str, tuple] = {}

    def conv_norm(conv: str, norm: str, *shape: int) -> None:
        shapes[f"{conv}.weight"] = shape
        for leaf in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{norm}.{leaf}"] = (shape[0],)

    if variant == "resnet_d":
        half = width // 2
        conv_norm("conv1.0", "conv1.1", half, 3, 3, 3)
        conv_norm("conv1.3", "conv1.4", half, half, 3, 3)
        conv_norm("conv1.6", "bn1", width, half, 3, 3)
    else:
        conv_norm("conv1", "bn1", width, 3, 7, 7)
    groups = 32 if variant == "resnext" else 1
    channels = width
    for stage, num_blocks in enumerate(BLOCKS[depth], start=1):
        planes = width * 2 ** (stage - 1)
        outer = planes * 4 if bottleneck else planes
        inner = planes * 2 if variant in ("resnext", "wide_resnet") else planes
        for block in range(num_blocks):
            at = f"layer{stage}.{block}"
            if bottleneck:
                conv_norm(f"{at}.conv1", f"{at}.bn1", inner, channels, 1, 1)
                conv_norm(f"{at}.conv2", f"{at}.bn2", inner, inner // groups, 3, 3)
                conv_norm(f"{at}.conv3", f"{at}.bn3", outer, inner, 1, 1)
            else:
                conv_norm(f"{at}.conv1", f"{at}.bn1", inner, channels, 3, 3)
                conv_norm(f"{at}.conv2", f"{at}.bn2", inner, inner, 3, 3)
            if variant == "se_resnet":
                shapes[f"{at}.se.fc1.weight"] = (outer // 16, outer, 1, 1)
                shapes[f"{at}.se.fc1.bias"] = (outer // 16,)
                shapes[f"{at}.se.fc2.weight"] = (outer, outer // 16, 1, 1)
                shapes[f"{at}.se.fc2.bias"] = (outer,)
            if block == 0 and channels != outer:
                # timm's ResNet-D has an average pool or nothing at index 0.
                first = 1 if variant == "resnet_d" else 0
                down = f"{at}.downsample"
                norm = f"{down}.{first + 1}"
                conv_norm(f"{down}.{first}", norm, outer, channels, 1, 1)
            channels = outer
    shapes["fc.weight"] = (num_classes, channels)
    shapes["fc.bias"] = (num_classes,)
    return shapes


def torchvision_weights(
    name: str, num_classes: int = 1000, width: int = 64
) -> dict[str, np.ndarray]:
    """Returns a float32 state dict: He-scaled kernels, batch norms not the identity."""
    weights = {}
    for key, shape in torchvision_shapes(name, num_classes, width).items():
        rng = np.random.default_rng(zlib.crc32(key.encode()))
        if len(shape) > 1:
            fan_in = np.prod(shape[1:])
            array = rng.normal(0.0, np.sqrt(2.0 / fan_in), shape)
        elif key.endswith("running_var"):
            # Above 1, so that the residual sums do not grow with depth.
            array = rng.uniform(1.5, 3.0, shape)
        elif key.endswith(".weight"):
            array = rng.uniform(0.5, 1.5, shape)
        else:
            array = rng.normal(0.0, 0.1, shape)
        weights[key] = array.astype(np.float32)
    return weights


def golden_images() -> np.ndarray:
    """Returns two normalised images, [2, 224, 224, 3] float32."""
    return np.random.default_rng(0).normal(size=(2, 224, 224, 3)).astype(np.float32)


def live_model(name: str) -> tuple[dict, np.ndarray]:
    """Returns state dict and logits, [2, 1000], of a network of torchvision or timm."""
    import torch

    if RECORDED[name].library == "timm":
        import timm

        model = timm.create_model(name).eval()
    else:
        import torchvision

        model = getattr(torchvision.models, name)().eval()
    weights = {
        key: torch.from_numpy(array) for key, array in torchvision_weights(name).items()
    }
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected
    assert all(key.endswith("num_batches_tracked") for key in missing)
    images = torch.from_numpy(golden_images().transpose(0, 3, 1, 2).copy())
    with torch.inference_mode():
        return model.state_dict(), model(images).numpy()


def write_checkpoints() -> None:
    """Writes the files of a training script in both of torch's formats."""
    import argparse

    import torch

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 1), torch.nn.BatchNorm2d(2))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3, 2, 2)).sum().backward()
    optimizer.step()
    averaged = {f"module.{key}": value for key, value in model.state_dict().items()}
    for key, array in CHECKPOINT.items():
        averaged[f"module.{key}"] = torch.from_numpy(array.copy())
    averaged["module.0.bias"] = averaged["module.0.bias"].bfloat16()
    averaged["module.1.weight"] = averaged["module.1.weight"].half()
    # Strides of torch's channels-last layout.
    averaged["module.0.weight"] = averaged["module.0.weight"].permute(1, 0, 2, 3)
    checkpoint = {
        "epoch": 3,
        "arch": "resnet50",
        "state_dict": model.state_dict(),
        "state_dict_ema": averaged,
        "optimizer": optimizer.state_dict(),
        "args": argparse.Namespace(lr=0.1),
        "metric": 71.5,
    }
    torch.save(checkpoint, TORCH_FILES["zip"])
    torch.save(checkpoint, TORCH_FILES["legacy"], _use_new_zipfile_serialization=False)


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    write_checkpoints()
    for name in RECORDED:
        _, logits = live_model(name)
        print(f"{name}: standard deviation {logits.std():.3f}")
        np.savez_compressed(golden_file(name), logits=logits)
