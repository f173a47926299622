"""Runs in the peers' Python: python stranger.py litdata|streaming PICTURES FOLDER BATCH.

Writes the peer's own format, image bytes and label as they are, then reads a number of batches from stdin and answers
`> samples wall cpu`. Transforms are torchvision's on PIL images, batches uint8, no workers, shuffled, as elsewhere.
"""

import io
import os
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, v2


def samples(pictures):
    files = sorted(path for path in Path(pictures).rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    classes = sorted({path.parent.name for path in files})
    return [(path, classes.index(path.parent.name)) for path in files]


def read_litdata(pair):
    path, label = pair
    return {"image": path.read_bytes(), "label": label}


def litdata(pictures, folder, transform, batch_size):
    from litdata import StreamingDataLoader, StreamingDataset, optimize

    optimize(read_litdata, samples(pictures), output_dir=folder, chunk_bytes="64MB", num_workers=1, verbose=False)

    class Pictures(StreamingDataset):
        def __getitem__(self, index):
            sample = super().__getitem__(index)
            return transform(sample["image"]), sample["label"]

    data = Pictures(folder, shuffle=True)
    return StreamingDataLoader(data, batch_size=batch_size, num_workers=0, drop_last=True)


def streaming(pictures, folder, transform, batch_size):
    from streaming import MDSWriter, StreamingDataset

    with MDSWriter(out=folder, columns={"image": "bytes", "label": "int"}) as out:
        for path, label in samples(pictures):
            out.write({"image": path.read_bytes(), "label": label})

    class Pictures(StreamingDataset):
        def __getitem__(self, index):
            sample = super().__getitem__(index)
            return transform(sample["image"]), sample["label"]

    data = Pictures(local=folder, shuffle=True, batch_size=batch_size)
    return torch.utils.data.DataLoader(data, batch_size=batch_size, num_workers=0, drop_last=True)


def endless(batches):
    while True:
        yield from batches


def main():
    torch.set_num_threads(1)
    name, pictures, folder, batch_size = sys.argv[1:]
    steps = [v2.RandomResizedCrop(224, interpolation=InterpolationMode.BICUBIC), v2.RandomHorizontalFlip()]
    transforms = v2.Compose([*steps, v2.PILToTensor()])

    def transform(data):
        return transforms(Image.open(io.BytesIO(data)).convert("RGB"))

    make = {"litdata": litdata, "streaming": streaming}[name]
    batches = endless(make(pictures, folder, transform, int(batch_size)))
    package = {"streaming": "mosaicml-streaming"}.get(name, name)
    print(f"> {package} {version(package)} with numpy {version('numpy')}", flush=True)
    for line in sys.stdin:
        wall, cpu = time.perf_counter(), time.process_time()
        count = sum(len(next(batches)[0]) for _ in range(int(line)))
        print(f"> {count} {time.perf_counter() - wall} {time.process_time() - cpu}", flush=True)
    os._exit(0)  # their threads need not be waited for


if __name__ == "__main__":
    main()
