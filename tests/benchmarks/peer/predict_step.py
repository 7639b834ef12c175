"""PyTorch's prediction: torchvision's ResNet-50 in eval mode, channels last.

    python predict_step.py float32|bfloat16 BATCH PIXELS

From uint8 pixels to probabilities. Reads numbers of batches, one a line, and prints the
seconds of one. On a GPU the network goes through torch.compile.
"""

import json
import sys
import time

import torch
import torchvision

NUM_CLASSES = 7178
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


def main() -> None:
    dtype, batch, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    on_gpu = torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    model = torchvision.models.resnet50(num_classes=NUM_CLASSES).eval()
    model = model.to(device, memory_format=torch.channels_last)
    if on_gpu:
        model = torch.compile(model)
    mean, std = (torch.tensor(x, device=device).view(1, 3, 1, 1) for x in (MEAN, STD))
    # NHWC in memory, as an image decoder hands them over.
    images = torch.randint(0, 256, (batch, size, size, 3), dtype=torch.uint8)
    images = images.to(device).permute(0, 3, 1, 2)
    half = dtype == "bfloat16"
    for line in sys.stdin:
        number = int(line)
        start = time.perf_counter()
        for _ in range(number):
            with (
                torch.inference_mode(),
                torch.autocast(device, dtype=torch.bfloat16, enabled=half),
            ):
                torch.sigmoid(model((images.float() - mean) / std))
        if on_gpu:
            torch.cuda.synchronize()
        answer = {"seconds": (time.perf_counter() - start) / number}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
