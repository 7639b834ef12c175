"""Times torchvision's input path over a folder of JPEGs: prints images/s as JSON.

    python input_path.py FOLDER IMAGES BATCH WORKERS SMALLEST_AREA

Decode with Pillow, random resized crop to 224 pixels, flip, uint8, labels in slots, in
a DataLoader as in torchvision's references. The first batches, which wait for the
workers to start, are not timed.
"""

import json
import sys
import time
from pathlib import Path

import torch
from PIL import Image
from torchvision.transforms import v2

SLOTS = 8
WARM_UP_BATCHES = 4


class Folder(torch.utils.data.Dataset):
    def __init__(self, folder, smallest_area):
        self.paths = sorted(Path(folder).glob("*.jpg"))
        self.transform = v2.Compose(
            [
                v2.RandomResizedCrop(224, scale=(smallest_area, 1.0)),
                v2.RandomHorizontalFlip(),
                v2.PILToTensor(),
            ]
        )

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, row):
        with Image.open(self.paths[row]) as file:
            image = self.transform(file.convert("RGB"))
        label_ids = torch.full((SLOTS,), -1, dtype=torch.int32)
        label_ids[:4] = row % 7_000
        return image, label_ids


def main():
    folder, images, batch, workers, smallest_area = sys.argv[1:]
    images, batch = int(images), int(batch)
    dataset = Folder(folder, float(smallest_area))
    steps = images // batch
    sampler = torch.utils.data.RandomSampler(
        dataset, replacement=True, num_samples=(steps + WARM_UP_BATCHES) * batch
    )
    loader = iter(
        torch.utils.data.DataLoader(
            dataset, batch, sampler=sampler, num_workers=int(workers), drop_last=True
        )
    )
    for _ in range(WARM_UP_BATCHES):
        next(loader)
    start = time.perf_counter()
    for _ in range(steps):
        pixels, _ = next(loader)
    passed = time.perf_counter() - start
    assert pixels.shape == (batch, 3, 224, 224), pixels.shape
    assert pixels.dtype == torch.uint8, pixels.dtype
    print(json.dumps({"images_per_second": steps * batch / passed}))


if __name__ == "__main__":
    main()
