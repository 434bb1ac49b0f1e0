"""Measure how many pictures a build resizes and encodes per second of processor time, beside img2dataset.

Both read the same local JPEGs (img2dataset by file:// URLs), scale the longer side down, encode at quality 90 and write
WebDataset tars, one process and one thread each. Each measurement is a fresh process; what starting it costs is taken
out by measuring with a tenth of the pictures too:

    pictures per CPU second = (n - n / 10) / (cpu_s(n) - cpu_s(n / 10))
"""

from __future__ import annotations

import csv
import json
import os
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from triweave.data_pipeline.errors import BuildError
from triweave.data_pipeline.media import images

WIDTH_PX, HEIGHT_PX, MAX_SIDE_PX = 1024, 768, 448
_OURS = """
import json, sys
from pathlib import Path
from triweave.data_pipeline.shards.build import BuildOptions, build
from triweave.data_pipeline.shards.media_encoder import MediaOptions
from triweave.data_pipeline.sources.folder import FolderSource
asked = json.loads(sys.argv[1])
media = MediaOptions(image_max_side_px=asked["max_side_px"])
print(build(FolderSource(root=Path(asked["folder"])), Path(asked["out"]), BuildOptions(media=media)).samples)
"""
_IMG2DATASET = """
import json, sys, pathlib
from img2dataset import download
asked = json.loads(sys.argv[1])
download(
    url_list=asked["urls"], input_format="csv", url_col="url", caption_col="caption", output_folder=asked["out"],
    output_format="webdataset", image_size=asked["max_side_px"], resize_mode="keep_ratio_largest",
    resize_only_if_bigger=True, encode_quality=90, processes_count=1, thread_count=1, enable_wandb=False,
)
print(sum(json.loads(path.read_bytes())["successes"] for path in pathlib.Path(asked["out"]).glob("*_stats.json")))
"""


@dataclass(frozen=True, kw_only=True)
class BuilderRow:
    """The median of one builder: pictures per second of processor time, and that over the peer's."""

    builder: str
    pictures: int
    cpu_s: float
    pictures_per_cpu_s: float
    ratio_to_img2dataset: float


def measure_builders(
    folder: Path, *, pictures: int, repeats: int, peer_python: Path, progress: Callable[[str], None]
) -> list[BuilderRow]:
    """Return the rows of Triweave and img2dataset, which take turns `repeats` times.

    folder: an empty folder for pictures and shards. peer_python: interpreter of an environment with img2dataset.
    Raises BuildError where the peer cannot be started or either loses a picture.
    """
    commands = {"triweave": (Path(sys.executable), _OURS), "img2dataset": (peer_python, _IMG2DATASET)}
    sizes = (pictures, pictures // 10)
    for size in sizes:
        progress(f"making {size} pictures")
        write_pictures(folder / f"pictures-{size}", size)
    seconds: dict[tuple[str, int], list[float]] = {}
    for turn in range(repeats):
        for size in sizes:
            for builder, (python, program) in commands.items():
                progress(f"{builder}: {size} pictures, turn {turn + 1} of {repeats}")
                source = folder / f"pictures-{size}"
                asked = {
                    "folder": str(source),
                    "urls": str(source.with_suffix(".csv")),
                    "out": str(folder / f"{builder}-{size}-{turn}"),
                    "max_side_px": MAX_SIDE_PX,
                }
                seconds.setdefault((builder, size), []).append(_cpu_seconds(python, program, asked, size))
    rate = {}
    for builder in commands:
        whole, start = (statistics.median(seconds[builder, size]) for size in sizes)
        rate[builder] = (sizes[0] - sizes[1]) / (whole - start)
    return [
        BuilderRow(
            builder=builder,
            pictures=pictures,
            cpu_s=round(statistics.median(seconds[builder, pictures]), 2),
            pictures_per_cpu_s=round(rate[builder], 1),
            ratio_to_img2dataset=round(rate[builder] / rate["img2dataset"], 2),
        )
        for builder in commands
    ]


def write_pictures(folder: Path, pictures: int) -> None:
    """Write JPEGs of waves and noise with their captions, and `FOLDER.csv` of their URLs; the same ones every time."""
    folder.mkdir()
    across, down = np.meshgrid(np.arange(WIDTH_PX), np.arange(HEIGHT_PX))
    with open(folder.with_suffix(".csv"), "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["url", "caption"])
        for number in range(pictures):
            generator = np.random.default_rng(number)
            turns = generator.uniform(0.005, 0.08, (3, 2))
            waves = np.stack([np.sin(across * x + down * y) for x, y in turns], axis=-1)
            pixels = 127 + 90 * waves + generator.normal(0, 6, (HEIGHT_PX, WIDTH_PX, 3))
            path = folder / f"picture{number:05d}.jpg"
            path.write_bytes(images.encode_jpeg(np.clip(pixels, 0, 255).astype(np.uint8)))
            path.with_suffix(".txt").write_text(f"Picture {number}.", encoding="utf-8")
            table.writerow([path.resolve().as_uri(), f"Picture {number}."])


def _cpu_seconds(python: Path, program: str, asked: dict[str, Any], pictures: int) -> float:
    """Return user and system time of a process and its children. Raises BuildError unless all pictures came through."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "NO_ALBUMENTATIONS_UPDATE": "1"}
    command = [str(python), "-c", program, json.dumps(asked)]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    except OSError as error:
        raise BuildError(f"--python {python}: cannot be started ({error.strerror})") from None
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode or done.stdout.split()[-1:] != [str(pictures)]:
        why = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
        raise BuildError(f"{python}: {pictures} pictures did not come through ({why}); `pip install img2dataset` there")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
