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
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}

    def run(*arguments):
        done = subprocess.run(
            [sys.executable, *arguments], capture_output=True, text=True, env=environment, cwd=folder, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


@pytest.fixture(scope="module")
def gencore(run):
    """Runs commands of the command line one after the other in one process, which saves time; returns what they say."""
    code = """
        import shlex, sys
        from gencore.cli import main
        for command in sys.argv[1:]:
            assert main(shlex.split(command)) == 0, command
    """
    return lambda *commands: run("-c", textwrap.dedent(code), *commands)


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
        "latent-mixture model gencore-mixture 1.0.0 ok",
        "mixture model gencore-mixture 1.0.0 ok",
        "small-mixture model gencore-mixture 1.0.0 ok",
        "translator model gencore-mixture 1.0.0 ok",
        "rings data set gencore-mixture 1.0.0 ok",
        "shapes data set gencore-mixture 1.0.0 ok",
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
        from gencore_mixture import model, staged, translate
        for module in (model, staged, translate):
            numbers = [value for name, value in vars(module).items() if name.startswith("STREAM_")]
            print(len(set(numbers)), len(numbers))
    """
    assert run("-c", textwrap.dedent(code)).split() == ["3", "3", "3", "3", "1", "1"]


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


def test_captions_say_what_is_in_the_pictures(run, gencore):
    """The class by the area of its bounding box that a shape fills, the colour by its largest and second channel."""
    told = gencore("data shapes --out shapes.png")
    assert "shapes: 4000 train images 3x16x16, 3 classes, text" in told
    assert "shapes: 1000 test images 3x16x16, 3 classes, text" in told
    assert "text: 1,000 of 1,000 images, 12 different" in told
    code = """
        from pathlib import Path
        import torch
        from gencore.data import load
        assert Path("shapes.png").read_bytes().startswith(b"\\x89PNG")
        train, test = load("shapes", "train"), load("shapes", "test")
        assert train.fingerprint == load("shapes", "train").fingerprint
        assert not (test.images[0] == train.images).flatten(1).all(1).any()
        batch = test.batch(torch.arange(len(test)))
        names = test.spec.class_names
        filled = torch.zeros(len(names))
        for image, label, text in zip(batch.images, batch.labels, batch.conditions["text"], strict=True):
            article, colour, shape = text.split()
            assert (article, shape) == ("a", names[label])
            channels = image.amax((1, 2))
            assert colour == ("yellow" if channels[:2].min() > 0.8 else ("red", "green", "blue")[channels.argmax()])
            # Edges are smooth, so that sums of them are sizes between whole pixels.
            weight = image.sum(0) / image.sum(0).max()
            box = weight.amax(0).sum() * weight.amax(1).sum()
            filled[label] += weight.sum() / box / (batch.labels == label).sum()
        print(*filled.tolist())
    """
    disc, square, diamond = map(float, run("-c", textwrap.dedent(code)).split())
    assert disc == pytest.approx(3.14 / 4, abs=0.05)
    assert square == pytest.approx(1, abs=0.05)
    assert diamond == pytest.approx(0.5, abs=0.1)


def test_translates_pairs(run, gencore):
    pytest.importorskip("safetensors")
    code = """
        from pathlib import Path
        import torch
        from gencore import pictures
        from gencore.data import load
        for split, count in (("train", 128), ("test", 20)):
            folder = Path("pairs", split)
            folder.mkdir(parents=True)
            for i, image in enumerate(load("shapes", split).batch(torch.arange(count)).images):
                pixels = pictures.pixels(torch.cat([1 - image, image], dim=2))
                pictures.save(pictures.picture(pixels), folder / f"{i}.png")
    """
    run("-c", textwrap.dedent(code))
    train = "train translator --data pairs:pairs --batch-size 16 --set width=8 --set generator_optimizer.lr=3e-3"
    gencore(f"{train} --out translator --steps 100", f"{train} --out stopped-translator --steps 30")
    gencore(
        "train --out stopped-translator --resume --steps 100",
        "sample translator -n 20 --from pairs:pairs --format npz --out translated.npz",
    )
    code = """
        import numpy as np
        import torch
        from gencore import Key
        from gencore.data import load as load_data
        from gencore.train import load
        model, data, test = load("translator"), load_data("pairs:pairs", "train"), load_data("pairs:pairs", "test")
        mean = data.batch(torch.arange(len(data))).images.mean(0)
        batch = test.batch(torch.arange(20))
        sources = batch.conditions["source"]
        translated = torch.from_numpy(np.load("translated.npz")["arr_0"]).permute(0, 3, 1, 2) / 255
        for images in (translated, mean, torch.zeros(()), model.sample(20, Key(1), {"source": sources.roll(1, 0)})):
            print((images - batch.images).abs().mean().item())
        key = Key(2)
        images = model.sample(20, key, {"source": sources})
        part = model.sample(5, key.samples(10), {"source": sources[10:15]})
        assert torch.allclose(part, images[10:15], atol=1e-5)
        assert not torch.allclose(images, model.sample(20, Key(3), {"source": sources}), atol=1e-3)
        weights, resumed = model.state_dict(), load("stopped-translator").state_dict()
        assert all(resumed[name].equal(value) for name, value in weights.items())
        before = load("stopped-translator/checkpoints/step-00000030").state_dict()
        assert not any(before[name].equal(value) for name, value in weights.items())
    """
    translated, mean, black, of_others = map(float, run("-c", textwrap.dedent(code)).split())
    assert translated < min(mean, black) / 2
    assert of_others > min(mean, black)


def test_translator_refuses_images_without_pairs(run):
    code = """
        from gencore.config import ConfigError
        from gencore.plugins import MODELS, build_model
        from gencore.spec import Condition, DataSpec
        plugin = MODELS.load("translator")
        paired = Condition("source", "image", shape=(1, 8, 8))
        build_model(plugin, plugin.config_of({}), DataSpec((3, 8, 8), (paired,)))
        for condition in (
            None, Condition("source", "image", shape=(1, 8, 8), paired=False), Condition("source", "text")
        ):
            spec = DataSpec((3, 8, 8), (condition,) if condition else ())
            try:
                build_model(plugin, plugin.config_of({}), spec)
            except ConfigError as error:
                print(*error.faults)
    """
    assert run("-c", textwrap.dedent(code)).count("must have paired images 'source'") == 3


def test_a_prior_of_another_runs_codes(run, gencore):
    """Of the autoencoder nothing is left but what the second run keeps of it."""
    pytest.importorskip("safetensors")
    train = "train latent-mixture --data shapes --set autoencoder=autoencoder"
    gencore(
        "train vae --data shapes --out autoencoder --steps 100 --set likelihood=gaussian --set hidden_sizes=256,128"
        " --set latent_size=8",
        "train --out autoencoder --resume --steps 200",
        f"{train} --out latent --steps 200",
        f"{train} --out stopped-latent --steps 80",
    )
    run("-c", "import os; os.rename('autoencoder', 'gone')")
    gencore("train --out stopped-latent --resume --steps 200", "sample stopped-latent -n 64 --out latent.png")
    code = """
        import math
        import torch
        from gencore import Key
        from gencore.data import load as load_data
        from gencore.train import load
        model, first, test = load("stopped-latent"), load("gone"), load_data("shapes", "test")
        assert all(model.state_dict()[name].equal(value) for name, value in load("latent").state_dict().items())
        batch = test.batch(torch.arange(len(test)))
        with torch.no_grad():
            print(model.log_prob(batch.images, Key(0)).mean().item())
            mean, logvar = first.encode(batch.images)
        assert torch.allclose(model.center, mean.mean(0), atol=0.2)
        assert torch.allclose(model.scale, (mean.var(0) + logvar.exp().mean(0)).sqrt(), rtol=0.15)
        # The same codes as one normal distribution, which the scale of the latents makes a standard one.
        print(-model.center.numel() / 2 * (1 + math.log(2 * math.pi)))
        for each in (batch.images, model.sample(400, Key(1)), first.sample(400, Key(1))):
            assert 0 <= each.min() and each.max() <= 1
            # Between images; and how much of an image is dark.
            print(each.std(0).mean().item(), (each.amax(1) < 0.1).float().mean().item())
        assert all(p.equal(q) for p, q in zip(model.autoencoder.parameters(), first.parameters(), strict=True))
        assert torch.allclose(model.sample(4, Key(1).samples(5)), model.sample(9, Key(1))[5:], atol=1e-5)
    """
    prior, normal, *figures = map(float, run("-c", textwrap.dedent(code)).split())
    (varied, dark), (of_prior, dark_prior), (_, dark_normal) = zip(figures[::2], figures[1::2], strict=True)
    assert prior > normal + 2
    assert of_prior == pytest.approx(varied, rel=0.3)
    assert abs(dark_prior - dark) < abs(dark_normal - dark) / 2
