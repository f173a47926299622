"""Small labeled image sets and a small selector with saved weights, for every test."""

import os
import signal
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # no test asks a hub, which would be tried again and again for most of a minute

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

# A shell's background jobs ignore it: what a test sends must not depend on how the tests were started.
signal.signal(signal.SIGINT, signal.default_int_handler)

pytest_plugins = ["browser", "servers"]
SELECTOR = "test_vit"  # timm's own small ViT: width 64, depth 6


@pytest.fixture(autouse=True, scope="session")
def one_torch_thread() -> None:
    """Models this small are slower with more threads, by far where others use the cores too."""
    torch.set_num_threads(1)


def long(*values: object):
    """Values of a parametrized test that CI alone runs."""
    return pytest.param(*values, marks=pytest.mark.long)


def write_image(path: Path, number: int, size: tuple[int, int] = (80, 60)) -> None:
    """A picture of its own for every number: smooth colors and a bright square."""
    rng = np.random.default_rng(number)
    small = Image.fromarray(rng.integers(0, 255, (4, 5, 3), np.uint8))
    image = small.resize(size, Image.Resampling.BICUBIC)
    x, y = int(rng.integers(0, size[0] - 12)), int(rng.integers(0, size[1] - 12))
    image.paste((255, 240, 20), (x, y, x + 12, y + 12))
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ImageFolder with train/ (3 classes of 7) and val/ (3 of 2); read-only, copy it to change it."""
    root = tmp_path_factory.mktemp("data") / "photos"
    number = 0
    for split, count in (("train", 7), ("val", 2)):
        for name in ("ant", "bee", "cat"):
            for i in range(count):
                write_image(root / split / name / f"{name}_{i}.{'png' if i % 3 == 2 else 'jpg'}", number)
                number += 1
    return root


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Saved random weights of SELECTOR, sharpened so that its attention differs from patch to patch."""
    import timm
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    model = timm.create_model(SELECTOR, num_classes=5)
    state = {k: v * 4 if "qkv.weight" in k else v for k, v in model.state_dict().items()}
    path = tmp_path_factory.mktemp("weights") / "selector.safetensors"
    save_file({k: v.contiguous() for k, v in state.items()}, path)
    return path


def mine(*arguments: object, code: int = 0) -> Result:
    """Run datalth-mine in this process on a 4x4 grid; assert its exit code."""
    from miner.cli import main

    result = CliRunner().invoke(main, ["--img-size", "64", "-j", "2", "--device", "cpu", *map(str, arguments)])
    assert result.exit_code == code, result.output + "".join(map(str, result.exc_info or ()))
    return result


def inspect(*arguments: object, code: int = 0) -> Result:
    """Run datalth-shards in this process; assert its exit code."""
    from shards.inspect.cli import main

    result = CliRunner().invoke(main, [*map(str, arguments)])
    assert result.exit_code == code, result.output + "".join(map(str, result.exc_info or ()))
    return result


@pytest.fixture(scope="session")
def center_set(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished set of `photos` by center, 3 views, shards of 10; read-only."""
    out = tmp_path_factory.mktemp("sets") / "center"
    mine("--data", photos, "--out", out, "--method", "center", "--views", "3", "--shard-size", "10")
    return out


@pytest.fixture(scope="session")
def ranked_set(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The samples of `center_set` as ranked views, with tickets of 6 of 16 patches; read-only."""
    return _mine_ranked(photos, tmp_path_factory.mktemp("sets") / "ranked")


@pytest.fixture(scope="session")
def cut_set(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `ranked_set`, with the best 8 patches of each view alone; read-only."""
    return _mine_ranked(photos, tmp_path_factory.mktemp("sets") / "cut", "--store-tokens", 7)


def _mine_ranked(photos: Path, out: Path, *flags: object) -> Path:
    mine("--data", photos, "--out", out, "--method", "center", "--views", "3", "--shard-size", "10", "--tokens", 6,
         "--images", "ranked", *flags)  # fmt: skip
    return out


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder; in JSON files `timing` is emptied, since it is not part of the promise."""
    import json

    out = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            data = path.read_bytes()
            if path.suffix == ".json":
                value = json.loads(data)
                if "timing" in value:
                    value["timing"] = None
                data = json.dumps(value, sort_keys=True).encode()
            out[str(path.relative_to(folder))] = data
    return out


@pytest.fixture(scope="session")
def tickets(photos: Path, weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real tickets: 8 of 16 patches, 4 views, shards of 10; 21 train and 6 val images."""
    out = tmp_path_factory.mktemp("tickets") / "set"
    mine("--data", photos, "--out", out, "--selector", SELECTOR, "--weights", weights, "--tokens", 8, "--views", 4,
         "--shard-size", 10)  # fmt: skip
    return out


@pytest.fixture(scope="session")
def whole(tickets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was never stopped, with everything on."""
    output = tmp_path_factory.mktemp("whole")
    from training import train

    train(tickets, output, "run")
    return output / "run"


def patches_of(view: np.ndarray, patch: int) -> np.ndarray:
    """uint8 [S, S, 3] -> its patches in raster order, [N, p, p, 3]."""
    side = len(view) // patch
    return view.reshape(side, patch, side, patch, 3).transpose(0, 2, 1, 3, 4).reshape(-1, patch, patch, 3)
