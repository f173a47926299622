"""webdataset pipelines as users write them: PIL transforms, or uint8 tensors with either decoder."""

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import webdataset
from PIL import Image
from torchvision.transforms import InterpolationMode, v2

try:
    import simplejpeg
except ImportError:  # an extra
    simplejpeg = None

Decode = Callable[[bytes], Any]  # an encoded image -> uint8 [3, 224, 224]


def crop_and_flip() -> list[Any]:
    """torchvision's own, for PIL images and tensors alike."""
    return [v2.RandomResizedCrop(224, interpolation=InterpolationMode.BICUBIC), v2.RandomHorizontalFlip()]


def pil_transforms() -> Decode:
    transforms = v2.Compose([*crop_and_flip(), v2.PILToTensor()])
    return lambda data: transforms(Image.open(io.BytesIO(data)).convert("RGB"))


def tensor_transforms(decode: Decode) -> Decode:
    """On a uint8 tensor in channels-last memory, torchvision's fastest."""
    transforms = v2.Compose(crop_and_flip())
    return lambda data: transforms(decode(data).permute(2, 0, 1))


def pillow(data: bytes) -> torch.Tensor:
    import numpy as np

    return torch.from_numpy(np.array(Image.open(io.BytesIO(data)).convert("RGB")))


PIPELINES: dict[str, Decode | None] = {
    "PIL": pil_transforms(),
    "uint8 tensors of Pillow": tensor_transforms(pillow),
    "uint8 tensors of simplejpeg": (
        tensor_transforms(lambda data: torch.from_numpy(simplejpeg.decode_jpeg(data))) if simplejpeg else None
    ),
}


def write_tars(pictures: Path, folder: Path) -> str:
    """The pictures as a plain WebDataset, image and label alone; returns its brace pattern."""
    folder.mkdir()
    files = sorted(path for path in pictures.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    classes = sorted({path.parent.name for path in files})
    for number in range(4):  # striped, so that a shard holds all classes
        with open(folder / f"{number}.tar", "wb") as file, webdataset.TarWriter(file, encoder=False, mtime=0) as tar:
            for i, path in list(enumerate(files))[number::4]:
                label = str(classes.index(path.parent.name)).encode()
                tar.write({"__key__": f"{i:08d}", "jpg": path.read_bytes(), "cls": label})
    return str(folder / "{0..3}.tar")


def webdataset_batches(tars: str, decode: Decode, batch_size: int) -> Iterator[int]:
    """Shuffled through a buffer, endless; gives the samples of every batch."""
    source = webdataset.WebDataset(tars, shardshuffle=100).shuffle(200).to_tuple("jpg", "cls")
    batches = source.map_tuple(decode, int).batched(batch_size, partial=False)
    while True:
        for images, _ in batches:
            yield len(images)
