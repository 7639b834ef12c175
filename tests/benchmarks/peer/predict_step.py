"""Times PyTorch's prediction: torchvision's ResNet-50 in eval mode, channels last.

    python predict_step.py float32|bfloat16 BATCH PIXELS

From uint8 pixels to probabilities. Reads one number of batches per line, and prints the
seconds per batch. On a GPU, the network is compiled by torch.compile.
"""

import sys

import torch
from stepping import make_model, serve

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


def main() -> None:
    dtype, batch, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    model, device = make_model(train=False)
    mean, std = (torch.tensor(x, device=device).view(1, 3, 1, 1) for x in (MEAN, STD))
    # NHWC in memory, as image decoders return them.
    images = torch.randint(0, 256, (batch, size, size, 3), dtype=torch.uint8)
    images = images.to(device).permute(0, 3, 1, 2)
    half = dtype == "bfloat16"

    @torch.inference_mode()
    def step():
        with torch.autocast(device, dtype=torch.bfloat16, enabled=half):
            torch.sigmoid(model((images.float() - mean) / std))

    serve(step)


if __name__ == "__main__":
    main()
