"""Shared by PyTorch's timed scripts: ResNet-50 on the device, and the steps."""

import json
import sys
import time

import torch
import torchvision

NUM_CLASSES = 7178


def on_gpu():
    return torch.cuda.is_available()


def make_model(*, train):
    """Returns channels-last ResNet-50 and its device; compiled on a GPU."""
    device = "cuda" if on_gpu() else "cpu"
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    model = torchvision.models.resnet50(num_classes=NUM_CLASSES).train(train)
    model = model.to(device, memory_format=torch.channels_last)
    return torch.compile(model) if on_gpu() else model, device


def serve(step):
    """Runs the number of steps of each line of stdin; prints the seconds per step.

    On a GPU, also prints the peak of its memory in bytes.
    """
    for line in sys.stdin:
        number = int(line)
        start = time.perf_counter()
        for _ in range(number):
            step()
        if on_gpu():
            torch.cuda.synchronize()
        answer = {"seconds": (time.perf_counter() - start) / number}
        if on_gpu():
            answer["memory_bytes"] = torch.cuda.max_memory_allocated()
        print(json.dumps(answer), flush=True)
