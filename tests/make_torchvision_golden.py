"""Records torchvision's logits for weights that NumPy can make again.

Run `python tests/make_torchvision_golden.py` where torch and torchvision are installed
(recorded with torch 2.14.1 and torchvision 0.29.1 on a CPU, float32). The weights are
not stored: each is drawn by a generator seeded by its name, here and in the tests.
"""

import zlib
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).parent / "golden"
BLOCKS = {18: (2, 2, 2, 2), 50: (3, 4, 6, 3)}


def torchvision_shapes(depth: int, num_classes: int = 1000) -> dict[str, tuple]:
    """Returns torchvision's state dict as names to shapes, without torchvision."""
    bottleneck = depth >= 50
    shapes: dict[str, tuple] = {}

    def conv_norm(conv: str, norm: str, *shape: int) -> None:
        shapes[f"{conv}.weight"] = shape
        for leaf in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{norm}.{leaf}"] = (shape[0],)

    conv_norm("conv1", "bn1", 64, 3, 7, 7)
    channels = 64
    for stage, num_blocks in enumerate(BLOCKS[depth], start=1):
        inner = 64 * 2 ** (stage - 1)
        outer = inner * 4 if bottleneck else inner
        for block in range(num_blocks):
            at = f"layer{stage}.{block}"
            if bottleneck:
                conv_norm(f"{at}.conv1", f"{at}.bn1", inner, channels, 1, 1)
                conv_norm(f"{at}.conv2", f"{at}.bn2", inner, inner, 3, 3)
                conv_norm(f"{at}.conv3", f"{at}.bn3", outer, inner, 1, 1)
            else:
                conv_norm(f"{at}.conv1", f"{at}.bn1", inner, channels, 3, 3)
                conv_norm(f"{at}.conv2", f"{at}.bn2", inner, inner, 3, 3)
            if block == 0 and channels != outer:
                down = f"{at}.downsample"
                conv_norm(f"{down}.0", f"{down}.1", outer, channels, 1, 1)
            channels = outer
    shapes["fc.weight"] = (num_classes, channels)
    shapes["fc.bias"] = (num_classes,)
    return shapes


def torchvision_weights(depth: int, num_classes: int = 1000) -> dict[str, np.ndarray]:
    """Returns a float32 state dict: He-scaled kernels, batch norms not the identity."""
    weights = {}
    for name, shape in torchvision_shapes(depth, num_classes).items():
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        if len(shape) > 1:
            fan_in = np.prod(shape[1:])
            array = rng.normal(0.0, np.sqrt(2.0 / fan_in), shape)
        elif name.endswith("running_var"):
            # Above 1, so that the residual sums do not grow with depth.
            array = rng.uniform(1.5, 3.0, shape)
        elif name.endswith(".weight"):
            array = rng.uniform(0.5, 1.5, shape)
        else:
            array = rng.normal(0.0, 0.1, shape)
        weights[name] = array.astype(np.float32)
    return weights


def golden_images() -> np.ndarray:
    """Returns two normalised images, [2, 224, 224, 3] float32."""
    return np.random.default_rng(0).normal(size=(2, 224, 224, 3)).astype(np.float32)


def torchvision_logits(depth: int) -> np.ndarray:
    """Returns the logits of the live torchvision network, [2, 1000]."""
    import torch
    import torchvision

    model = getattr(torchvision.models, f"resnet{depth}")().eval()
    weights = {
        name: torch.from_numpy(array)
        for name, array in torchvision_weights(depth).items()
    }
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected
    assert all(name.endswith("num_batches_tracked") for name in missing)
    images = torch.from_numpy(golden_images().transpose(0, 3, 1, 2).copy())
    with torch.inference_mode():
        return model(images).numpy()


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for depth in BLOCKS:
        logits = torchvision_logits(depth)
        print(f"resnet{depth}: standard deviation {logits.std():.3f}")
        np.savez_compressed(GOLDEN / f"torchvision_resnet{depth}.npz", logits=logits)
