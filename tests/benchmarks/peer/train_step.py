"""Times PyTorch's train step: torchvision's ResNet-50, channels last, momentum SGD.

    python train_step.py float32|bfloat16 BATCH PIXELS

Reads one number of steps per line; trains that many, and prints the seconds per step
and, on a GPU, its peak memory in bytes. On a GPU, the step is compiled by
torch.compile.
"""

import sys

import torch
from stepping import NUM_CLASSES, make_model, serve


def main() -> None:
    dtype, batch, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    model, device = make_model(train=True)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, nesterov=True)
    images = torch.randn(batch, 3, size, size, device=device)
    images = images.to(memory_format=torch.channels_last)
    targets = torch.rand(batch, NUM_CLASSES, device=device) < 4 / NUM_CLASSES
    loss_of = torch.nn.BCEWithLogitsLoss()
    half = dtype == "bfloat16"

    def step():
        with torch.autocast(device, dtype=torch.bfloat16, enabled=half):
            loss = loss_of(model(images), targets.float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    serve(step)


if __name__ == "__main__":
    main()
