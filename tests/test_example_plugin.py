"""The example package, installed as a user would and used in a process of its own."""

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parent.parent / "examples" / "plugin"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Runs Python where the example is installed, in a folder beside it; returns what it prints."""
    folder = tmp_path_factory.mktemp("example")
    # A copy: the build writes beside the source.
    source, site = folder / "source", folder / "site"
    shutil.copytree(EXAMPLE, source)
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--quiet"]
    done = subprocess.run([*command, "--target", site, source], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    path = os.pathsep.join([str(site), str(EXAMPLE.parent.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}

    def run(*arguments):
        done = subprocess.run(
            [sys.executable, *arguments], capture_output=True, text=True, env=environment, cwd=folder, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


def test_is_listed_before_it_is_imported(run):
    code = """
        import sys
        from gencore.data import DATASETS
        from gencore.plugins import MODELS
        entries = [
            (registry, entry) for registry in (MODELS, DATASETS) for entry in registry.entries()
            if entry.package == "gencore-mixture"
        ]
        assert not any(name.startswith("gencore_mixture") for name in sys.modules)
        for registry, entry in entries:
            print(entry.name, entry.kind, entry.package, entry.version, registry.status(entry))
    """
    assert run("-c", textwrap.dedent(code)).splitlines() == [
        "mixture model gencore-mixture 1.0.0 ok",
        "small-mixture model gencore-mixture 1.0.0 ok",
        "rings data set gencore-mixture 1.0.0 ok",
    ]


def test_data_set_is_what_it_says(run):
    code = """
        import torch
        from gencore.data import load
        train, test = load("rings", "train"), load("rings", "test")
        print(train)
        print(test)
        assert torch.equal(train.images, load("rings", "train").images)
        assert not (test.images[0] == train.images).flatten(1).all(1).any()
        print(train.labels.double().mean().item(), train.images.double().mean().item() / 255)
    """
    first, second, figures = run("-c", textwrap.dedent(code)).splitlines()
    assert first == "<rings train: 4000 images 1x16x16, 2 classes>"
    assert second == "<rings test: 1000 images 1x16x16, 2 classes>"
    discs, brightness = map(float, figures.split())
    assert 0.45 < discs < 0.55
    assert 0.1 < brightness < 0.3


def test_likelihood_is_one_of_binary_images(run):
    """The probabilities of all 2^4 images of 2x2 pixels sum to 1, and samples come as often as they say."""
    code = """
        import torch
        from gencore import Key
        from gencore.plugins import MODELS, build_model
        from gencore.spec import Batch, DataSpec
        plugin = MODELS.load("mixture")
        torch.manual_seed(0)
        model = build_model(plugin, plugin.config_of({"components": 3}), DataSpec((1, 2, 2)))
        model.weights.data = torch.tensor([0.0, 1.0, -1.0])
        images = torch.tensor([[i >> bit & 1 for bit in range(4)] for i in range(16)]).float().reshape(16, 1, 2, 2)
        probabilities = model.log_likelihood_bound(Batch(images), Key(0)).exp().detach()
        samples = model.sample(20000, Key(1))
        assert torch.equal(samples[5:9], model.sample(4, Key(1).samples(5)))
        codes = (samples.flatten(1) @ torch.tensor([1.0, 2.0, 4.0, 8.0])).long()
        print(probabilities.sum().item(), (codes.bincount(minlength=16) / 20000 - probabilities).abs().max().item())
    """
    total, difference = map(float, run("-c", textwrap.dedent(code)).split())
    assert total == pytest.approx(1, abs=1e-5)
    assert difference < 0.015


def test_the_preset_differs_in_its_defaults(run):
    code = """
        from gencore.plugins import MODELS
        small, plugin = MODELS.load("small-mixture"), MODELS.load("mixture")
        assert small.preset_of == plugin.name and small.config is plugin.config
        print(plugin.config_of({}).components, small.config_of({}).components, small.config_of({"components": 3}))
    """
    told = run("-c", textwrap.dedent(code)).split(maxsplit=2)
    assert told[:2] == ["100", "10"]
    assert told[2].startswith("MixtureConfig(components=3, ")


def test_every_purpose_has_a_stream_of_its_own(run):
    code = """
        from gencore_mixture import model
        numbers = [value for name, value in vars(model).items() if name.startswith("STREAM_")]
        print(len(set(numbers)), len(numbers))
    """
    assert run("-c", textwrap.dedent(code)).split() == ["3", "3"]


def test_trains_evaluates_and_samples(run):
    pytest.importorskip("safetensors")
    code = """
        import torch
        from gencore import Key
        from gencore.data import load
        from gencore.metrics import likelihood_bound
        from gencore.plugins import MODELS
        from gencore.train import TrainConfig, Trainer
        data, test, plugin = load("rings", "train"), load("rings", "test"), MODELS.load("mixture")
        config = plugin.config.from_settings({"components": "60"})
        trainer = Trainer(
            plugin, config, data, TrainConfig(steps=300), "run", data_name="rings", device="cpu", progress=False
        )
        print(likelihood_bound(trainer.model, test, Key(0)).nats)
        model = trainer.fit()
        print(likelihood_bound(model, test, Key(0)).nats)
        samples = model.sample(200, Key(0))
        print(samples.mean().item(), test.images.double().mean().item() / 255)
    """
    before, after, *brightness = map(float, run("-c", textwrap.dedent(code)).split())
    # Independent pixels have -68.5 nats.
    assert before < -80
    assert after > -50
    assert brightness[0] == pytest.approx(brightness[1], abs=0.04)
