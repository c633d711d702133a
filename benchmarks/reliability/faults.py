"""Kill it, fill its disk, quarrel over its files.

    python benchmarks/reliability/faults.py

Linux; as root it also fills and write-protects a small file system in memory. Simulated cells,
small models, on the processor. Moments are drawn with a seeded generator, uniformly from the time
that an undisturbed run takes (to train, or to write), 20 of each kind:

- training is killed, once of the default model with quick checkpoints and once of the published
  objective with large ones that take half of the time, and goes on from the last checkpoint in a
  new process
- `spaperb predict` and `spaperb benchmark` are killed while they write
- a full disk, a limit of a file's size, a folder without rights; two processes that write one file

Writes `faults.csv` beside this file: one row an attack.
"""

import argparse
import contextlib
import hashlib
import io
import os
import resource
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import anndata as ad
import lightning
import numpy as np
import scvi
import torch
from common import make_cells, make_row, write

from spaperb import SpaPerbModel, cli, pl
from spaperb import _files as files
from spaperb._files import atomic_write

NOBODY = 65534
PAUSE = 0.05
"""Seconds before and after a file is written, so that kills fall between these steps too."""
TRAININGS: dict[str, dict[str, Any]] = {
    "small checkpoints": {"objective": "in_context", "max_epochs": 15},
    "large checkpoints": {"objective": "published", "max_epochs": 20, "batch_size": 1000},
}
PREDICT = ("--max-epochs", "1", "--objective", "published")
BENCHMARK = ("--seeds", "0", "--min-cells", "20", "--methods", "no_change")


@dataclass
class Moments:
    """Random moments, n of them for each kind of attack."""

    n: int
    rng: np.random.Generator

    def __call__(self, seconds: float) -> float:
        """Draw one from a time in seconds."""
        return self.rng.uniform(0, seconds)


# In the attacked processes.


def train(sender: Connection, folder: Path, kind: str, resume: bool) -> None:
    """Train with checkpoints, and tell what came out."""
    # With another seed nothing but the checkpoint leads to the same result.
    scvi.settings.seed = 1 if resume else 0
    adata = ad.read_h5ad(folder / "few.h5ad")
    SpaPerbModel.setup_anndata(adata)
    settings = dict(TRAININGS[kind])
    model = SpaPerbModel(adata, objective=settings.pop("objective"))
    checkpoint = folder / "training.ckpt"
    sender.send(("start", None))
    model.train(
        **settings,
        checkpoint=checkpoint,
        ckpt_path=checkpoint if resume else None,
        accelerator="cpu",
        enable_progress_bar=False,
    )
    sender.send(("end", None))
    weights = b"".join(w.numpy().tobytes() for w in model.module.state_dict().values())
    predicted = model.predict_stimulated(inplace=False).tobytes()
    sender.send(("result", hashlib.sha256(weights + predicted).hexdigest()))


def command(
    sender: Connection, *arguments: object, largest: int | None = None, user: int | None = None
) -> None:
    """Run the command, with a largest size of files or as another user.

    Tells when it begins to write, and how it ended.
    """
    if largest is not None:
        limit_files(largest)
    if user is not None:
        os.setuid(user)

    @contextmanager
    def slow(path: Path, *, overwrite: bool) -> Iterator[Path]:
        sender.send(("start", None))
        with atomic_write(path, overwrite=overwrite) as whole:
            time.sleep(PAUSE)
            yield whole
            time.sleep(PAUSE)

    files.atomic_write = pl.atomic_write = cli.atomic_write = slow
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        code = cli.main([str(argument) for argument in arguments])
    sender.send(("end", None))
    lines = [x for x in errors.getvalue().splitlines() if x.startswith("spaperb: error: ")]
    sender.send(("result", (code, "\n".join(lines))))


def limit_files(largest: int) -> None:
    """Let no file of this process grow beyond a size."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, limits[1]))


def write_letters(path: Path, letter: str, n: int, barrier: Any) -> None:
    """Write one file again and again."""
    barrier.wait()
    for _ in range(n):
        with atomic_write(path, overwrite=True) as whole:
            whole.write_text(letter * 1_000_000)


# In the attacker.

CONTEXT = get_context("forkserver")  # new processes with the imports done
CONTEXT.set_forkserver_preload(["spaperb.cli"])


class Child:
    """A process that tells when it starts and ends what is attacked."""

    def __init__(self, target: Callable[..., None], *arguments: object, **options: Any):
        self.receiver, sender = CONTEXT.Pipe(duplex=False)
        self.process = CONTEXT.Process(target=target, args=(sender, *arguments), kwargs=options)
        self.process.start()
        sender.close()
        self.said: dict[str, Any] = {}

    def wait_for(self, word: str) -> float:
        """Wait until it says a word, or is gone."""
        while word not in self.said:
            try:
                name, value = self.receiver.recv()
            except (EOFError, OSError):
                break
            self.said[name] = value
        return time.perf_counter()

    def kill_after(self, seconds: float) -> bool:
        """Kill it a while after its start; whether it had not ended by then."""
        start = self.wait_for("start")
        time.sleep(max(0, start + seconds - time.perf_counter()))
        self.process.kill()
        self.finish()
        was_running = "end" not in self.said
        if "start" not in self.said or (was_running and self.process.exitcode != -signal.SIGKILL):
            raise RuntimeError(f"The attacked process failed by itself: {self.process.exitcode}.")
        return was_running

    def finish(self) -> Any:
        """Wait until it is gone; what came out."""
        self.wait_for("result")
        self.process.join()
        return self.said.get("result")


def undisturbed(target: Callable[..., None], *arguments: object) -> tuple[float, Any]:
    """Seconds from start to end, and what came out."""
    child = Child(target, *arguments)
    start = child.wait_for("start")
    seconds = child.wait_for("end") - start
    if (result := child.finish()) is None:
        raise RuntimeError(f"{target.__name__} failed undisturbed.")
    return seconds, result


def leftovers(folder: Path) -> int:
    """Remove what killed writers leave, and count it."""
    found = list(folder.glob(".spaperb-*"))
    for path in found:
        shutil.rmtree(path)
    return len(found)


def kill_training(folder: Path, kind: str, moments: Moments) -> dict[str, Any]:
    """Kill training at random moments, and go on from its last checkpoint."""
    checkpoint = folder / "training.ckpt"
    seconds, expected = undisturbed(train, folder, kind, False)
    outcomes, n_left = [], 0
    for _ in range(moments.n):
        moment = moments(seconds)
        checkpoint.unlink(missing_ok=True)
        was_running = Child(train, folder, kind, False).kill_after(moment)
        n_left += leftovers(folder)
        resume = checkpoint.exists()
        found = Child(train, folder, kind, resume).finish()
        how = "resumed" if resume else "began anew (no checkpoint yet)"
        if not was_running:
            how = "had ended, resumed from its last checkpoint"
        same = "same result" if found == expected else "another result"
        outcomes.append(f"{how}, {same}")
        print(f"{moment:.2f} of {seconds:.2f} s: {outcomes[-1]}", flush=True)
    checkpoint.unlink(missing_ok=True)
    good = {outcome for outcome in outcomes if outcome.endswith("same result")}
    return make_row(f"SIGKILL in training, {kind}", outcomes, good, left_folders=n_left)


def is_prediction(path: Path, expected: np.ndarray) -> bool:
    """Whether a file is a whole output of ``spaperb predict``."""
    try:
        layer = ad.read_h5ad(path).layers[cli.LAYER]
    except Exception as error:  # noqa: BLE001  a torn file may fail to be read in any way
        print(f"{path} cannot be read: {error}")
        return False
    return np.array_equal(layer, expected)


def kill_predict(folder: Path, with_old: bool, moments: Moments) -> dict[str, Any]:
    """Kill ``spaperb predict`` while it writes."""
    output = folder / "out.h5ad"
    arguments = ("predict", folder / "cells.h5ad", *PREDICT, "--overwrite", "--output", output)
    seconds, _ = undisturbed(command, *arguments)
    expected = ad.read_h5ad(output).layers[cli.LAYER]
    outcomes, n_left = [], 0
    while len(outcomes) < moments.n:
        output.unlink(missing_ok=True)
        if with_old:
            output.write_text("old")
        was_writing = Child(command, *arguments).kill_after(moments(seconds))
        n_left += leftovers(folder)
        if not was_writing:
            continue
        if not output.exists():
            outcomes.append("no file")
        elif output.read_bytes() == b"old":
            outcomes.append("old file")
        else:
            outcomes.append("new file" if is_prediction(output, expected) else "torn file")
    output.unlink(missing_ok=True)
    attack = f"SIGKILL while predict writes, {'an old file there' if with_old else 'no file yet'}"
    good = {"old file" if with_old else "no file", "new file"}
    return make_row(attack, outcomes, good, left_folders=n_left)


def kill_benchmark(folder: Path, moments: Moments) -> dict[str, Any]:
    """Kill ``spaperb benchmark`` while it writes its tables and figures."""
    output = folder / "bench"
    arguments = ("benchmark", folder / "few.h5ad", "--output", output, *BENCHMARK)

    def files() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in output.glob("*.*")}

    undisturbed(command, *arguments)
    old = files()
    undisturbed(command, *arguments, "mean_shift")
    seconds, _ = undisturbed(command, *arguments, "mean_shift")  # finished folds are read
    new = files()
    outcomes, n_left = [], 0
    while len(outcomes) < moments.n:
        for name, content in old.items():
            (output / name).write_bytes(content)
        attacked = Child(command, *arguments, "mean_shift")
        was_writing = attacked.kill_after(moments(seconds))
        n_left += leftovers(output)
        if not was_writing:
            continue
        found = files()
        whole = all(found[name] in (old[name], new[name]) for name in old)
        n_new = sum(found[name] == new[name] for name in old)
        outcomes.append(f"{n_new} of {len(old)} files new, the others old" if whole else "torn")
    shutil.rmtree(output)
    good = set(outcomes) - {"torn"}
    return make_row(
        "SIGKILL while benchmark writes tables and figures", outcomes, good, left_folders=n_left
    )


def refused(folder: Path, output: Path, words: str, **options: int) -> str:
    """Predict to where nothing can be written, and say what came of it and of the old file."""
    arguments = ("predict", folder / "cells.h5ad", *PREDICT, "--overwrite", "--output", output)
    child = Child(command, *arguments, **options)
    code, error = child.finish() or (None, "")
    old = output.read_bytes() == b"old" if output.exists() else None
    left = [path.name for path in output.parent.glob(".spaperb-*")]
    crashed = child.process.exitcode != 0
    # The prediction, which is written to another place then.
    for path in Path(tempfile.gettempdir()).glob(f"{output.stem}_{child.process.pid}*"):
        path.unlink()
    if code == 1 and words in error and not left and old is not False and not crashed:
        return "clear error, " + ("old file intact" if old else "nothing written")
    return (
        f"exit code {code}, crashed: {crashed}, {error!r}, old file intact: {old}, "
        f"left beside it {left}"
    )


@contextmanager
def file_system(folder: Path, options: str) -> Iterator[Path]:
    """Mount a small file system in memory."""
    place = folder / "mounted"
    place.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


def full_disk(folder: Path, size: int) -> dict[str, Any]:
    """Write to disks with too little space for the file."""
    outcomes = []
    for share in np.linspace(0.05, 0.95, 10):
        with file_system(folder, f"size={int(share * size) + 4096}") as place:
            (place / "out.h5ad").write_text("old")
            outcomes.append(refused(folder, place / "out.h5ad", "No space left on device"))
    return make_row("full disk", outcomes, {"clear error, old file intact"})


def limited_size(folder: Path, size: int) -> dict[str, Any]:
    """Write where files may not become as large."""
    outcomes = []
    place = folder / "limited"
    place.mkdir()
    for share in np.linspace(0.05, 0.95, 10):
        (place / "out.h5ad").write_text("old")
        largest = int(share * size)
        outcomes.append(refused(folder, place / "out.h5ad", "File too large", largest=largest))
    return make_row("file-size limit", outcomes, {"clear error, old file intact"})


def no_rights(folder: Path) -> dict[str, Any]:
    """Write to a read-only file system, and to another user's folder."""
    outcomes = []
    words = "Read-only file system. Choose another folder."
    with file_system(folder, "size=1m") as place:
        (place / "out.h5ad").write_text("old")
        subprocess.run(["mount", "-o", "remount,ro", place], check=True)
        outcomes.append(refused(folder, place / "out.h5ad", words))
        outcomes.append(refused(folder, place / "new.h5ad", words))
        subprocess.run(["mount", "-o", "remount,rw", place], check=True)
    place = folder / "locked"
    place.mkdir()
    (place / "out.h5ad").write_text("old")
    place.chmod(0o555)
    folder.chmod(0o755)
    words = "Permission denied. Choose another folder."
    outcomes.append(refused(folder, place / "out.h5ad", words, user=NOBODY))
    good = {"clear error, old file intact", "clear error, nothing written"}
    return make_row("folder without rights to write", outcomes, good)


class LimitSize(lightning.Callback):
    """Let files become no larger than half a checkpoint from an epoch on."""

    def __init__(self, checkpoint: Path, epoch: int):
        self.checkpoint, self.epoch = checkpoint, epoch

    def on_train_epoch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Count epochs."""
        if trainer.current_epoch == self.epoch:
            self.old = self.checkpoint.read_bytes()
            limit_files(len(self.old) // 2)


def limited_checkpoint(folder: Path) -> dict[str, Any]:
    """Let the disk fill up between two checkpoints."""
    outcomes = []
    checkpoint = folder / "training.ckpt"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    adata = ad.read_h5ad(folder / "few.h5ad")
    for epoch in range(1, 6):
        SpaPerbModel.setup_anndata(adata)
        model = SpaPerbModel(adata)
        limit = LimitSize(checkpoint, epoch)
        try:
            model.train(9, checkpoint=checkpoint, callbacks=[limit], enable_progress_bar=False)
            outcome = "no error"
        except OSError as error:
            outcome = (
                "clear error"
                if "could not be written, and is as it was" in str(error)
                else str(error)
            )
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        intact = (
            checkpoint.read_bytes() == limit.old and torch.load(checkpoint)["epoch"] == epoch - 1
        )
        outcomes.append(f"{outcome}, checkpoint before {'intact' if intact else 'torn'}")
        checkpoint.unlink()
    good = {"clear error, checkpoint before intact"}
    return make_row("file-size limit between two checkpoints", outcomes, good)


def two_writers(folder: Path) -> dict[str, Any]:
    """Write one file from two processes, and read it all the while."""
    path, n = folder / "letters.txt", 100
    path.write_text("a" * 1_000_000)
    barrier = CONTEXT.Barrier(3)
    writers = [
        CONTEXT.Process(target=write_letters, args=(path, letter, n, barrier)) for letter in "ab"
    ]
    for writer in writers:
        writer.start()
    barrier.wait()
    outcomes = []
    while any(writer.is_alive() for writer in writers):
        text = path.read_text()
        whole = len(text) == 1_000_000 and len(set(text)) == 1
        outcomes.append("one writer's file, whole" if whole else "mixed or torn")
    failed = sum(writer.exitcode != 0 for writer in writers)
    attack = f"two processes write one file {n} times each, and a third reads"
    outcomes += ["a writer failed"] * failed
    return make_row(attack, outcomes, {"one writer's file, whole"})


def two_commands(folder: Path, overwrite: bool) -> dict[str, Any]:
    """Run ``spaperb predict`` twice at once to one file."""
    output = folder / "out.h5ad"
    options = ["--overwrite"] if overwrite else []
    arguments = ("predict", folder / "cells.h5ad", *PREDICT, "--output", output, *options)
    undisturbed(command, *arguments)
    expected = ad.read_h5ad(output).layers[cli.LAYER]
    outcomes = []
    for _ in range(5):
        output.unlink()
        children = [Child(command, *arguments) for _ in range(2)]
        ends = sorted(child.finish() for child in children)
        codes = [code for code, _ in ends]
        file = "whole file" if is_prediction(output, expected) else "torn file"
        clear = "was made by another process" in ends[1][1]
        outcomes.append(f"exit codes {codes}, {file}" + (", clear error" if clear else ""))
    output.unlink()
    good = "exit codes [0, 0], whole file"
    if not overwrite:
        good = "exit codes [0, 1], whole file, clear error"
    how = "with" if overwrite else "without"
    return make_row(f"two commands write one file, {how} --overwrite", outcomes, {good})


def main() -> None:
    """Run all attacks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20, help="kills of each kind")
    args = parser.parse_args()
    moments = Moments(args.kills, np.random.default_rng(0))

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for name, n_cells, n_genes in (("few", 60, 100), ("cells", 300, 1000)):
            make_cells(n_cells, n_genes).write_h5ad(folder / f"{name}.h5ad")
        output = ("--output", folder / "out.h5ad")
        undisturbed(command, "predict", folder / "cells.h5ad", *PREDICT, *output)
        size = (folder / "out.h5ad").stat().st_size
        attacks: list[Callable[[], dict[str, Any]]] = [
            *(lambda kind=kind: kill_training(folder, kind, moments) for kind in TRAININGS),
            lambda: kill_predict(folder, True, moments),
            lambda: kill_predict(folder, False, moments),
            lambda: kill_benchmark(folder, moments),
            lambda: limited_size(folder, size),
            lambda: limited_checkpoint(folder),
            lambda: two_writers(folder),
            lambda: two_commands(folder, True),
            lambda: two_commands(folder, False),
        ]
        if os.geteuid() == 0:
            attacks += [lambda: full_disk(folder, size), lambda: no_rights(folder)]
        write("faults", [attack() for attack in attacks])


if __name__ == "__main__":
    main()
