"""PyTorch's train step: torchvision's ResNet-50, channels last, SGD with momentum.

python train_step.py float32|bfloat16 BATCH PIXELS ROUNDS
"""

import json
import statistics
import sys
import time

import torch
import torchvision

NUM_CLASSES = 7178


def main() -> None:
    dtype, (batch, size, rounds) = sys.argv[1], map(int, sys.argv[2:])
    torch.manual_seed(0)
    model = torchvision.models.resnet50(num_classes=NUM_CLASSES)
    model = model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, nesterov=True)
    images = torch.randn(batch, 3, size, size).to(memory_format=torch.channels_last)
    targets = (torch.rand(batch, NUM_CLASSES) < 4 / NUM_CLASSES).float()
    loss_of = torch.nn.BCEWithLogitsLoss()
    seconds = []
    for number in range(rounds + 2):
        start = time.perf_counter()
        half = dtype == "bfloat16"
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
            loss = loss_of(model(images), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if number > 1:
            seconds.append(time.perf_counter() - start)
    print(json.dumps({"seconds": statistics.median(seconds)}))


if __name__ == "__main__":
    main()
