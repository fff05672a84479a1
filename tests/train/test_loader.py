"""Data that processes of their own read ahead of the training."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import re
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch
from train.comparing import assert_same, assert_same_runs, metrics, stopping, weights
from train.toys import LazyBars, OddError

from gencore import Key
from gencore.data import DataError
from gencore.plugins import PluginError
from gencore.spec import Batch
from gencore.train import NotEnoughMemoryError, TrainingError, checkpoint, loader
from gencore.train.errors import TrainingError as AnyTrainingError
from gencore.train.loader import Minibatch

SETTINGS = {"plugin": "toy-phases", "steps": 6, "batch_size": 16, "average": {"decay": 0.9}}


@pytest.fixture
def bars(environment) -> LazyBars:
    return LazyBars()


def children() -> list[int | None]:
    return [child.pid for child in multiprocessing.active_children()]


def test_weights_do_not_depend_on_who_reads(trainer, tmp_path, bars):
    for workers in (0, 1, 2):
        trainer(tmp_path / f"{workers}", images=bars, workers=workers, **SETTINGS).fit()
        assert not children()
    trainer(tmp_path / "held", images=bars.held, **SETTINGS).fit()
    for run in ("1", "2", "held"):
        assert_same_runs(tmp_path / "0", tmp_path / run)


def test_what_is_random_in_data_differs_between_minibatches_only(trainer, tmp_path, bars):
    def read(first, workers):
        made = trainer(tmp_path / "run", images=bars, **SETTINGS)
        made.begin()
        phases = [runner.phase for runner in made.runners]
        settings = {"seed": 3, "batch_size": 60, "rows": (0, 60), "device": torch.device("cpu")}
        batches = loader.read(bars, phases, first=first, total=6, workers=workers, **settings)
        return list(batches)

    whole = read(0, 0)
    later = read(2, 1)
    # Of the mean, the critic twice, and the table, which begin with step 2.
    for ours, theirs in zip(whole[8:], later, strict=True):
        assert torch.equal(ours.images, theirs.images)
        assert torch.equal(ours.conditions["source"], theirs.conditions["source"])
        assert tuple(ours.conditions["text"]) == tuple(theirs.conditions["text"])
    # Each holds every image once, some of them mirrored, others in another epoch.
    unmirrored = bars.held.batch(torch.arange(60)).images
    turned = []
    for batch in whole[::4]:
        order = [int(text.removeprefix("bar ")) for text in batch.conditions["text"]]
        assert sorted(order) == sorted(bars.held.labels.tolist())
        counts = batch.images.sum((1, 2, 3)).sort().values
        torch.testing.assert_close(counts, unmirrored.sum((1, 2, 3)).sort().values)
        turned.append(batch.conditions["source"])
    assert not torch.equal(turned[0], turned[1])


def test_rows_of_a_minibatch_are_those_of_the_whole(bars, environment):
    rows = loader._Rows(bars, 5, 16, (0, 16))[Minibatch(3, 1, 0, 7)]
    for first, last in ((0, 5), (5, 11), (11, 16)):
        part = loader._Rows(bars, 5, 16, (first, last))[Minibatch(3, 1, 0, 7)]
        assert torch.equal(part.images, rows.images[first:last])
        assert torch.equal(part.conditions["source"], rows.conditions["source"][first:last])
        assert tuple(part.conditions["text"]) == tuple(rows.conditions["text"][first:last])


@pytest.mark.parametrize("workers", [0, 2])
def test_an_interrupted_run_goes_on_to_the_same_bits(trainer, tmp_path, bars, workers):
    settings = {**SETTINGS, "images": bars, "steps": 9, "checkpoint_every": 3}
    trainer(tmp_path / "whole", workers=0, **settings).fit()
    with pytest.raises(KeyboardInterrupt):
        stopping(trainer(tmp_path / "parts", workers=workers, **settings), 5).fit()
    assert not children()
    trainer(tmp_path / "parts", workers=1, **settings).fit(resume=True)
    assert_same_runs(tmp_path / "whole", tmp_path / "parts")


def test_unpaired_images_are_the_same_after_a_resume(trainer, tmp_path, bars):
    settings = {"plugin": "toy-translator", "images": bars.held, "steps": 7, "checkpoint_every": 2}
    trainer(tmp_path / "whole", **settings).fit()
    with pytest.raises(KeyboardInterrupt):
        stopping(trainer(tmp_path / "parts", **settings), 5).fit()
    trainer(tmp_path / "parts", **settings).fit(resume=True)
    assert_same_runs(tmp_path / "whole", tmp_path / "parts")
    # Which they are has an effect, and so has the key.
    plain = bars.held.batch(torch.arange(16)).conditions["source"]
    drawn = [bars.held.batch(torch.arange(16), Key(number)).conditions["source"] for number in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0], plain)


def test_data_in_memory_need_no_processes(trainer, tmp_path, bars, monkeypatch):
    monkeypatch.setattr(loader.torch_data, "DataLoader", None)
    trainer(tmp_path / "run", images=bars.held, workers=2, steps=1).fit()
    trainer(tmp_path / "lazy", images=bars, workers=0, steps=1).fit()


def test_the_number_of_processes_is_that_of_the_cores_to_spare(trainer, tmp_path, bars, monkeypatch):
    asked = []

    class Nothing:
        _workers = ()

        def __init__(self, *arguments, num_workers, **settings):
            asked.append(num_workers)

        def __iter__(self):
            return self

        def __next__(self):
            raise StopIteration

        def _shutdown_workers(self):
            pass

    monkeypatch.setattr(loader.torch_data, "DataLoader", Nothing)
    made = trainer(tmp_path / "run", images=bars)
    made.begin()
    settings = {"first": 0, "total": 1, "seed": 0, "batch_size": 4, "rows": (0, 4), "device": torch.device("cpu")}
    for cores in (1, 2, 3, 64):
        monkeypatch.setattr(loader, "_cores", lambda cores=cores: cores)
        list(loader.read(bars, [], workers=None, **settings))
    assert asked == [1, 1, 2, 4]


@pytest.mark.parametrize(
    ("fault", "kind", "message"),
    [
        ("damaged", DataError, "bars.zip: image 9 is damaged"),
        ("local", DataError, "LocalError: bars.zip: image 9 is damaged"),
        ("attribute", DataError, "bars.zip: image 9 is damaged"),
        ("odd", DataError, "OddError: bars.zip has 9"),
    ],
)
def test_an_error_of_a_worker_arrives_as_it_is(trainer, tmp_path, environment, fault, kind, message):
    made = trainer(tmp_path / "run", images=LazyBars(bad=9, fault=fault), workers=2)
    with pytest.raises(kind) as caught:
        made.fit()
    assert str(caught.value) == message
    assert "\n" not in str(caught.value)
    assert type(caught.value) is kind
    # Where it was raised is not lost.
    assert "in fail" in str(caught.value.__cause__)
    if fault == "damaged":
        assert caught.value.files == ("9.png",)
        assert "OSError: short" in str(caught.value.__cause__)
    del caught
    assert not children()


def test_a_data_set_that_ends_the_worker_is_broken(trainer, tmp_path, environment):
    made = trainer(tmp_path / "run", images=LazyBars(bad=9, fault="exit"), workers=2)
    with pytest.raises(PluginError, match=r"batch\(\): SystemExit: enough$") as caught:
        made.fit()
    # Where it was raised is not lost.
    assert "in fail" in str(caught.value.__cause__.__cause__)
    del caught
    assert not children()


def test_short_memory_of_a_worker_is_short_memory(trainer, tmp_path, environment):
    made = trainer(tmp_path / "run", images=LazyBars(bad=9, fault="memory"), workers=1)
    with pytest.raises(NotEnoughMemoryError, match="not enough memory for a step of toy with minibatches of 16"):
        made.fit()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("killed", "a process that reads images was ended by a signal: Killed; too little memory is a common cause"),
        ("gone", "a process that reads images has ended unexpectedly; too little memory is a common cause"),
    ],
)
def test_a_worker_that_dies_is_an_error(trainer, tmp_path, environment, fault, message):
    made = trainer(tmp_path / "run", images=LazyBars(bad=9, fault=fault), workers=2)
    begun = time.monotonic()
    with pytest.raises(TrainingError, match=message) as caught:
        made.fit()
    assert type(caught.value) is AnyTrainingError
    assert "\n" not in str(caught.value)
    assert time.monotonic() - begun < 60


def test_a_worker_that_is_killed_while_the_training_computes_is_an_error(trainer, tmp_path, bars):
    made = trainer(tmp_path / "run", images=bars, workers=1, steps=400)
    made.begin()
    runner = made.runners[0]

    def killing(step, *, loss=runner.loss.loss):
        if step.number == 2:
            for child in multiprocessing.active_children():
                os.kill(child.pid, signal.SIGKILL)
            # PyTorch tells of it by raising an error at once, wherever this process is.
            for _ in range(100):
                time.sleep(0.01)
        return loss(step)

    runner.loss.loss = killing
    with pytest.raises(TrainingError, match="a process that reads images was ended by a signal: Killed"):
        made.fit()
    trainer(tmp_path / "run", images=bars, workers=1, steps=4).fit(resume=True)
    assert checkpoint.read(tmp_path / "run").step == 4


class UnwritableError(Exception):
    """What cannot be written."""

    def __init__(self) -> None:
        super().__init__("it is open")
        self.read = lambda: None


class PathError(OSError):
    def __init__(self, path: str):
        super().__init__(f"cannot read {path}")


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (KeyError("name"), KeyError, "'name'"),
        (FileNotFoundError(2, "No such file", "a.png"), FileNotFoundError, "[Errno 2] No such file: 'a.png'"),
        (UnwritableError(), Exception, "UnwritableError: it is open"),
        # Read by its class, it would be "cannot read cannot read a.png".
        (PathError("a.png"), OSError, "PathError: cannot read a.png"),
        (OddError("a.zip", 3), DataError, "OddError: a.zip has 3"),
        (SystemExit(3), SystemExit, "3"),
    ],
)
def test_errors_pass_to_another_process(error, kind, message):
    failure = pickle.loads(pickle.dumps(loader._Failure(error)))
    found = failure.error()
    assert type(found) is kind
    assert str(found) == message


def test_a_batch_that_could_not_be_sent_is_put_in_a_form_that_can(bars, environment):
    class Views(LazyBars):
        def batch(self, indices, key=None):
            batch = super().batch(indices, key)
            conditions = {name: values for name, values in batch.conditions.items() if name != "text"}
            names = (text for text in batch.conditions["text"])
            return Batch(batch.images.requires_grad_() * 1, {**conditions, "text": list(names)})

    views = Views()
    settings = {"first": 0, "total": 1, "seed": 0, "batch_size": 4, "rows": (0, 4), "device": torch.device("cpu")}
    assert list(loader.read(views, [], workers=1, **settings)) == []
    sent = loader._WorkerRows(views, 0, 4, (0, 4))[Minibatch(0, 0, 0, 0)]
    assert not sent.images.requires_grad
    assert pickle.loads(pickle.dumps(sent)).conditions["text"] == sent.conditions["text"]


def test_other_errors_are_no_death_of_a_worker():
    for error in (RuntimeError("shape"), DataError("bad"), TrainingError("no"), KeyboardInterrupt()):
        with pytest.raises(type(error), match=f"^{re.escape(str(error))}$"), loader.watched():
            raise error


def test_a_process_that_still_reads_can_end(environment, tmp_path):
    # As one that takes a single step by itself.
    code = f"""
        from gencore.train.runs import make_trainer
        from gencore.train.settings import apart
        settings = apart({{"train.workers": 2, "train.batch_size": 4}})
        trainer = make_trainer("toy-phases", "lazy-bars", {str(tmp_path / "run")!r}, settings, progress=False)
        trainer.advance()
        print("done", flush=True)
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_to_all_processes_lets_the_step_end(trainer, tmp_path, bars, interruptible, name):
    """As Ctrl-C at a terminal: the workers are needed until the step is done and saved."""
    number = getattr(signal, name)
    former = signal.getsignal(signal.SIGTERM)
    made = trainer(tmp_path / "run", images=bars, workers=2, plugin="toy-phases", steps=40, checkpoint_every=100)
    one_step = made.advance

    def advance() -> None:
        if made.step == 3:
            for child in multiprocessing.active_children():
                os.kill(child.pid, number)
            os.kill(os.getpid(), number)
            time.sleep(0.3)
        one_step()

    made.advance = advance
    with pytest.raises(KeyboardInterrupt):
        made.fit()
    assert signal.getsignal(signal.SIGTERM) == former
    assert checkpoint.read(tmp_path / "run").step == 4
    assert not children()
    trainer(tmp_path / "whole", images=bars, workers=0, plugin="toy-phases", steps=4).fit()
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "run"))
    assert metrics(tmp_path / "run")
