"""Trains a small ResNet-18 on a folder in PyTorch, and evaluates it once.

    python whole_run.py FOLDER CLASSES EPOCHS BATCH PIXELS WIDTH DTYPE

Prints the number of updates as JSON.
"""

import json
import sys
from pathlib import Path

import torch
import torchvision
from PIL import Image
from torchvision.models.resnet import BasicBlock
from torchvision.transforms import v2

WORKERS = 2


class Images(torch.utils.data.Dataset):
    def __init__(self, folder, classes, transform):
        self.paths = sorted(folder.glob("*.jpg"))
        self.labels = json.loads((folder / "labels.json").read_text())
        self.classes, self.transform = classes, transform

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, row):
        with Image.open(self.paths[row]) as file:
            image = self.transform(file.convert("RGB"))
        target = torch.zeros(self.classes)
        target[self.labels[row]] = 1.0
        return image, target


class ResNet(torchvision.models.ResNet):
    """torchvision's ResNet-18 with fewer channels."""

    def __init__(self, classes, width):
        super().__init__(BasicBlock, [2, 2, 2, 2], num_classes=classes)
        self.inplanes = width
        self.conv1 = torch.nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = torch.nn.BatchNorm2d(width)
        for stage in range(4):
            layer = self._make_layer(
                BasicBlock, width * 2**stage, 2, stride=1 if stage == 0 else 2
            )
            setattr(self, f"layer{stage + 1}", layer)
        self.fc = torch.nn.Linear(8 * width, classes)


def main():
    folder, numbers = Path(sys.argv[1]), map(float, sys.argv[2:-1])
    dtype = getattr(torch, sys.argv[-1])
    cast = torch.autocast("cpu", dtype, enabled=dtype != torch.float32)
    classes, epochs, batch, size, width = map(int, numbers)
    torch.manual_seed(0)
    to_tensor = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)]
    augment = [
        v2.RandomResizedCrop(size, scale=(0.35, 1.0)),
        v2.RandomHorizontalFlip(),
        v2.ColorJitter(0.2, 0.2, 0.2),
    ]
    train = Images(folder / "train", classes, v2.Compose([*augment, *to_tensor]))
    resize = [v2.Resize((size, size)), *to_tensor]
    validation = Images(folder / "validation", classes, v2.Compose(resize))
    model = ResNet(classes, width).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, nesterov=True)
    loss_of = torch.nn.BCEWithLogitsLoss()
    loader = torch.utils.data.DataLoader(
        train,
        batch,
        shuffle=True,
        drop_last=True,
        num_workers=WORKERS,
        persistent_workers=True,
    )
    for _ in range(epochs):
        for images, targets in loader:
            images = images.to(memory_format=torch.channels_last)
            with cast:
                logits = model(images)
            loss = loss_of(logits.float(), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval()
    with torch.inference_mode(), cast:
        for images, _ in torch.utils.data.DataLoader(validation, batch):
            model(images.to(memory_format=torch.channels_last))
    print(json.dumps({"updates": epochs * len(loader)}))


if __name__ == "__main__":
    main()
