"""A data set of 100,000 JPEGs: memory stays flat, in one process and in several. ``python tests/data/test_large.py``
prints the figures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

IMAGES = 100_000
_DIFFERENT = 500
_CACHE = 1 / 128  # GiB


def contents() -> list[bytes]:
    """JPEGs of 64x64 to 160x120."""
    import io

    random = np.random.default_rng(0)
    made = []
    for _ in range(_DIFFERENT):
        width, height = random.integers(64, 161), random.integers(64, 121)
        small = Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        stream = io.BytesIO()
        small.resize((int(width), int(height)), Image.Resampling.BICUBIC).save(stream, "JPEG", quality=90)
        made.append(stream.getvalue())
    return made


def write(path: Path, images: int = IMAGES) -> Path:
    """The images as an archive, or as a folder."""
    made = contents()
    names = [f"{i % 10}/{i:06}.jpg" for i in range(images)]
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for i, name in enumerate(names):
                archive.writestr(name, made[i % _DIFFERENT])
        return path
    for name in range(10):
        (path / str(name)).mkdir(parents=True)
    for i, name in enumerate(names):
        (path / name).write_bytes(made[i % _DIFFERENT])
    return path


def memory(process: int | str = "self") -> dict[str, float]:
    """MB of a process: all that it uses, and what it shares with no other."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    kilobytes = {line.split()[0]: int(line.split()[1]) for line in lines[1:]}
    return {
        "rss": kilobytes["Rss:"] / 1024,
        "own": (kilobytes["Private_Clean:"] + kilobytes["Private_Dirty:"]) / 1024,
        "pss": kilobytes["Pss:"] / 1024,
    }


class Batches(torch.utils.data.Dataset):
    """One batch an item, as a training reads them in worker processes."""

    def __init__(self, dataset, order):
        self.dataset, self.order = dataset, order

    def __len__(self):
        return len(self.order)

    def __getitem__(self, step):
        from gencore import Key

        # No tensor: torch keeps memory for the last 128 that a worker handed over.
        return float(self.dataset.batch(self.order[step], Key(0).fold_in(step)).images.sum())


def measured(path: str, workers: int, batches: int) -> dict[str, object]:
    """Reads the data set and ``batches`` batches of 64 of it; the memory at the beginning, and over the batches."""
    from gencore import data

    torch.set_num_threads(1)
    before, begun = memory(), time.perf_counter()
    dataset = data.load(f"images:{path}", "train", {"size": 64, "cache": _CACHE, "flip": True})
    loaded = time.perf_counter()
    mark = dataset.fingerprint
    hashed = time.perf_counter()
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0)).repeat(2)[: batches * 64].split(64)
    loader = torch.utils.data.DataLoader(Batches(dataset, order), batch_size=None, num_workers=workers)
    told = []
    iterator = iter(loader)
    started = time.perf_counter()
    for step, _ in enumerate(iterator):
        if step % (batches // 10) == batches // 20:
            processes = ["self", *(worker.pid for worker in getattr(iterator, "_workers", ()))]
            told.append([memory(process) for process in processes])
    return {
        "images": len(dataset),
        "load_s": loaded - begun,
        "fingerprint_s": hashed - loaded,
        "images_per_s": len(order) * 64 / (time.perf_counter() - started),
        "before": before,
        "memory": told,
        "fingerprint": mark,
    }


def run(path: Path, workers: int, batches: int) -> dict[str, object]:
    """The same in a process of its own."""
    code = f"import json, test_large; print(json.dumps(test_large.measured({str(path)!r}, {workers}, {batches})))"
    folder = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(folder.parents[1])])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory is measured by /proc")
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("name", ["large.zip", "large"])
def test_memory_stays_flat(tmp_path, name, workers):
    told = run(write(tmp_path / name), workers, 1000)
    totals = [sum(process["pss"] for process in at) for at in told["memory"]]
    # The cache of 8 MB fills up at first.
    assert totals[-1] - totals[1] < 30
    assert abs(totals[-1] - totals[5]) < 15


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        for name in ("large.zip", "large"):
            path = write(Path(folder) / name)
            for workers in (0, 2):
                told = run(path, workers, 1400)
                memories = [[round(process["rss"]) for process in at] for at in told.pop("memory")]
                print(name, f"{workers} workers", json.dumps(told), "MB resident:", memories, flush=True)
