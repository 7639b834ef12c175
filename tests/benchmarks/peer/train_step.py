"""PyTorch's train step: torchvision's ResNet-50, channels last, SGD with momentum.

    python train_step.py float32|bfloat16 BATCH PIXELS

Reads numbers of steps, one a line; trains as many, and prints the seconds of one and,
on a GPU, the peak of its memory in bytes. On a GPU the step goes through torch.compile.
"""

import json
import sys
import time

import torch
import torchvision

NUM_CLASSES = 7178


def main() -> None:
    dtype, batch, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    on_gpu = torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    model = torchvision.models.resnet50(num_classes=NUM_CLASSES)
    model = model.to(device, memory_format=torch.channels_last)
    if on_gpu:
        model = torch.compile(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, nesterov=True)
    images = torch.randn(batch, 3, size, size, device=device)
    images = images.to(memory_format=torch.channels_last)
    targets = torch.rand(batch, NUM_CLASSES, device=device) < 4 / NUM_CLASSES
    loss_of = torch.nn.BCEWithLogitsLoss()
    half = dtype == "bfloat16"
    for line in sys.stdin:
        number = int(line)
        start = time.perf_counter()
        for _ in range(number):
            with torch.autocast(device, dtype=torch.bfloat16, enabled=half):
                loss = loss_of(model(images), targets.float())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if on_gpu:
            torch.cuda.synchronize()
        answer = {"seconds": (time.perf_counter() - start) / number}
        if on_gpu:
            answer["memory_bytes"] = torch.cuda.max_memory_allocated()
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
