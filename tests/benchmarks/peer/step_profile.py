"""Prints where PyTorch's train step spends its time on one thread, as JSON.

python step_profile.py toy_regions|inclusive_images BATCH
"""

import json
import sys
import time
from collections import Counter

import torch
import torchvision
from torch.profiler import ProfilerActivity, profile
from whole_run import ResNet

CLASSES, TRACED = 60, 3
KINDS = {
    "convolution_backward": "convolutions, both gradients",
    "convolution": "convolutions, forward",
    "batch_norm": "norms",
    "mm": "matrix products",
}


def main():
    preset, batch = sys.argv[1], int(sys.argv[2])
    torch.set_num_threads(1)
    small = preset == "toy_regions"
    model = ResNet(CLASSES, 32) if small else torchvision.models.resnet50()
    model = model.to(memory_format=torch.channels_last)
    classes, size = (CLASSES, 64) if small else (1000, 224)
    images = torch.randn(batch, 3, size, size).to(memory_format=torch.channels_last)
    targets = torch.zeros(batch, classes)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, nesterov=True)
    loss_of = torch.nn.BCEWithLogitsLoss()

    def steps(number):
        start = time.perf_counter()
        for _ in range(number):
            loss = loss_of(model(images), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return (time.perf_counter() - start) / number

    steps(2)
    seconds = steps(TRACED)
    with profile(activities=[ProfilerActivity.CPU]) as traced:
        steps(TRACED)
    taken = Counter()
    for event in traced.key_averages():
        kind = next((k for part, k in KINDS.items() if part in event.key), "others")
        taken[kind] += event.self_cpu_time_total / 1e6 / TRACED
    print(json.dumps({"seconds": seconds, "kinds": taken}))


if __name__ == "__main__":
    main()
