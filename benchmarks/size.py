"""Bytes that a sample takes beyond its image, with 16 views of 196 patches."""

from benchmarks.rounds import Part, Row
from benchmarks.setting import Setting
from shards import format as fmt
from shards.reader import TicketSet

WANTED = ("<=", 6.8)


def measure(setting: Setting) -> Part:
    opened = TicketSet.open(str(setting.shards))
    split = opened.manifest.splits["train"]
    samples = split.samples
    tar = (split.bytes - split.image_bytes) / samples / 1000
    index = sum(path.stat().st_size for path in (setting.shards / fmt.INDEX).glob("*.parquet")) / samples / 1000
    return Part(
        rows=[
            Row(f"bytes a sample beyond its image, V = {split.views}, in the tar", "", [tar], [], WANTED, "kB"),
            Row("the same, in the index", "", [index], unit="kB"),
        ],
        notes=["exact, one round"],
    )
