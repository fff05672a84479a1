import subprocess
import sys
import textwrap

import pytest

from gencore import data, plugins
from gencore.config import ConfigError
from gencore.plugins import Entry, PluginError

GOOD = """
from dataclasses import dataclass
from gencore.data import DatasetPlugin
from gencore.models import ModelConfig, ModelPlugin
@dataclass(frozen=True)
class Settings(ModelConfig):
    size: int = 3
@dataclass(frozen=True)
class Required(ModelConfig):
    size: int = None
    __dataclass_fields__ = {}
class Undecorated(ModelConfig):
    pass
plugin = ModelPlugin("good", "vae", Settings, lambda config: None)
data = DatasetPlugin("rings", lambda path, split: None)
"""


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Writes a package's metadata and modules where Python finds them, as an installer would."""
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)

    def install(package, entry_points, version="1.0", **modules):
        folder = tmp_path / f"{package.replace('-', '_')}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
        (folder / "entry_points.txt").write_text(textwrap.dedent(entry_points))
        for name, source in modules.items():
            (tmp_path / f"{name}.py").write_text(textwrap.dedent(source))

    yield install
    for name in set(sys.modules) - before:
        if str(tmp_path) in (getattr(sys.modules[name], "__file__", None) or ""):
            del sys.modules[name]


def test_lists_without_importing(install):
    install("zoo", "[gencore.models]\ngood = zoo_bomb:plugin\n", "2.1", zoo_bomb="raise RuntimeError('imported')")
    entries = [entry for entry in plugins.list_models() if entry.package == "zoo"]
    assert entries == [Entry("good", "model", "zoo", "2.1", "zoo_bomb:plugin")]
    assert "zoo_bomb" not in sys.modules


def test_builtins_are_listed_without_importing_them():
    code = """
        import sys, gencore.plugins as plugins
        plugins.list_models(); plugins.list_datasets()
        loaded = [m for m in sys.modules if m.startswith(("gencore.models.", "gencore.data.")) or m == "sklearn"]
        assert loaded in ([], ["gencore.models.base"]), loaded
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)


def test_loads_models_and_datasets(install):
    install("zoo", "[gencore.models]\ngood = zoo_good:plugin\n[gencore.datasets]\nrings = zoo_good:data", zoo_good=GOOD)
    model, data = plugins.load_model("good"), plugins.load_dataset("rings")
    assert (model.name, model.family, model.config().size) == ("good", "vae", 3)
    assert data.name == "rings"
    for listed, name in ((plugins.list_models(), "good"), (plugins.list_datasets(), "rings")):
        assert [plugins.status(entry) for entry in listed if entry.name == name] == ["ok"]


def test_unknown_name_has_close_matches(install):
    install("zoo", "[gencore.models]\ngood = zoo_good:plugin\n", zoo_good=GOOD)
    with pytest.raises(PluginError, match=r"no model plugin is called 'god'; did you mean good.* available: .*good"):
        plugins.load_model("god")
    with pytest.raises(PluginError, match="no model plugin is called 'GOOD'; did you mean good"):
        plugins.load_model("GOOD")
    with pytest.raises(PluginError, match=r"no data set plugin is called 'qqqq'; available: "):
        plugins.load_dataset("qqqq")
    with pytest.raises(TypeError, match="name must be a string, got int"):
        plugins.load_model(3)


def test_clash_names_both_packages_and_breaks_nothing_else(install):
    install("zoo", "[gencore.models]\ngood = zoo_good:plugin\ntwice = zoo_good:plugin\n", zoo_good=GOOD)
    install("ark", "[gencore.models]\ntwice = ark:plugin\n", "3.0", ark=GOOD)
    with pytest.raises(PluginError, match=r"two model plugins are called 'twice': in ark 3\.0 .* and zoo 1\.0"):
        plugins.load_model("twice")
    assert plugins.load_model("good").name == "good"
    status = {entry.package: plugins.status(entry) for entry in plugins.list_models() if entry.name == "twice"}
    assert status == {"ark": "clash: also in zoo 1.0", "zoo": "clash: also in ark 3.0"}


@pytest.mark.parametrize(
    ("source", "cause"),
    [
        ("import nowhere_to_be_found", "ModuleNotFoundError: No module named 'nowhere_to_be_found'"),
        ("plugin = 1 +", "SyntaxError"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("x = 1", "AttributeError: .*no attribute 'plugin'"),
        ("plugin = 3", "it must be a gencore.models.ModelPlugin, but is of type int"),
        (GOOD + "plugin = ModelPlugin", "it must be a gencore.models.ModelPlugin, but is the class ModelPlugin"),
        (GOOD, "its entry point is called 'bad', but the plugin calls itself 'good'"),
        (
            GOOD + "plugin = ModelPlugin('bad', 'vae', int, print)",
            "its config must be a subclass of gencore.models.ModelConfig, but is the class int",
        ),
        (
            GOOD + "plugin = ModelPlugin('bad', 'vae', Settings(), print)",
            "its config must be a subclass of gencore.models.ModelConfig, but is of type Settings",
        ),
        (GOOD + "plugin = ModelPlugin('bad', 'vae', Undecorated, print)", "must be decorated with @dataclass"),
        (GOOD + "plugin = ModelPlugin('bad', 'transformer', Settings, print)", "its family must be one of vae, gan"),
        (GOOD + "plugin = ModelPlugin('bad', 'vae', Settings, 3)", "its build must be callable, but is of type int"),
    ],
)
def test_broken_plugin_is_named_with_package_and_cause(install, source, cause):
    install("zoo", "[gencore.models]\nbad = zoo_bad:plugin\ngood = zoo_good:plugin", zoo_bad=source, zoo_good=GOOD)
    with pytest.raises(
        PluginError, match=rf"model plugin 'bad' \(zoo_bad:plugin\) of package zoo 1\.0 is broken: .*{cause}"
    ) as info:
        plugins.load_model("bad")
    assert info.value.__cause__ is not None
    assert "\n" not in str(info.value)
    assert plugins.load_model("good").name == "good"
    (entry,) = (entry for entry in plugins.list_models() if entry.name == "bad")
    assert plugins.status(entry).startswith("broken: ")


def test_settings_without_default_are_refused(install):
    source = """
        from dataclasses import dataclass
        from gencore.config import field
        from gencore.models import ModelConfig, ModelPlugin
        @dataclass(frozen=True, kw_only=True)
        class Settings(ModelConfig):
            size: int = field(ge=1)
        plugin = ModelPlugin("bad", "vae", Settings, print)
    """
    install("zoo", "[gencore.models]\nbad = zoo_bad:plugin", zoo_bad=source)
    with pytest.raises(PluginError, match="every setting of its config must have a default, but size has none"):
        plugins.load_model("bad")


NEEDS_SIZE = """
from gencore.config import Config, field
@dataclass(frozen=True)
class NeedsSize(Config):
    size: int = field(ge=1)
"""

BUILT = """
import torch
from gencore.config import ConfigError
from gencore.models import GenerativeModel, Phase
class Model(GenerativeModel):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.weight = torch.nn.Parameter(torch.zeros(2))
    def phases(self):
        return [Phase("fit", [self.weight], print)]
class NoConfig(Model):
    def __init__(self, config):
        super().__init__(config)
        del self.config
class NoPhases(Model):
    def phases(self):
        return []
class NotImplementedPhases(Model):
    phases = GenerativeModel.phases
class WrongPhases(Model):
    def phases(self):
        return [self.weight]
class FailingPhases(Model):
    def phases(self):
        return self.weights
def refuse(config):
    raise ConfigError("Settings", ["size: must be even, was 3"])
def leave(config):
    raise SystemExit(3)
"""


def build_with(install, build):
    source = f"{GOOD}{BUILT}plugin = ModelPlugin('bad', 'vae', Settings, {build})"
    install("zoo", "[gencore.models]\nbad = zoo_bad:plugin", zoo_bad=source)
    plugin = plugins.load_model("bad")
    return plugins.build_model(plugin, plugin.config())


def test_builds_a_model(install):
    assert build_with(install, "Model").config.size == 3


@pytest.mark.parametrize(
    ("build", "cause"),
    [
        ("lambda config: 1 / 0", "ZeroDivisionError: division by zero"),
        ("lambda: None", "TypeError: .*takes 0 positional arguments"),
        ("leave", "SystemExit: 3"),
        ("lambda config: None", "build must return a gencore.models.GenerativeModel, .* is of type NoneType"),
        ("NoConfig", "its model must keep its Settings as config, but config is of type NoneType"),
        ("NoPhases", "its model lists no training phases"),
        ("NotImplementedPhases", r"its model NotImplementedPhases does not implement phases\(\)"),
        ("WrongPhases", r"phases\(\) of its model must return a sequence of gencore.models.Phase"),
        ("FailingPhases", "AttributeError: .*no attribute 'weights'"),
    ],
)
def test_broken_build_is_named_with_package_and_cause(install, build, cause):
    with pytest.raises(
        PluginError, match=rf"model plugin 'bad' \(zoo_bad:plugin\) of package zoo 1\.0 is broken: {cause}"
    ) as info:
        build_with(install, build)
    assert info.value.__cause__ is not None
    assert "\n" not in str(info.value)


def test_trainer_and_checkpoints_name_a_plugin_that_cannot_build(install, tmp_path):
    pytest.importorskip("accelerate")
    from gencore.train import Checkpoint, Run, TrainConfig, Trainer
    from gencore.train.checkpoint import restore_model

    install("zoo", "[gencore.models]\nbad = zoo_bad:plugin", zoo_bad=GOOD.replace('"good"', '"bad"'))
    plugin, digits = plugins.load_model("bad"), data.load("digits", "test")
    message = r"model plugin 'bad' .* of package zoo 1\.0 is broken: build must return"
    with pytest.raises(PluginError, match=message):
        Trainer(plugin, plugin.config(), digits, TrainConfig(), tmp_path, data_name="digits", device="cpu")
    train = TrainConfig().to_dict()
    run = Run("bad", plugin.config().to_dict(), "digits", {}, len(digits), [], digits.fingerprint, train)
    with pytest.raises(PluginError, match=message):
        restore_model(Checkpoint(tmp_path, run, 1, {}, {}))


def test_a_configuration_that_build_refuses_is_no_broken_plugin(install):
    with pytest.raises(ConfigError, match="size: must be even, was 3"):
        build_with(install, "refuse")


@pytest.mark.parametrize(
    ("source", "cause"),
    [
        ("plugin = {}", "it must be a gencore.data.DatasetPlugin, but is of type dict"),
        (GOOD + "plugin = data", "its entry point is called 'bad', but the plugin calls itself 'rings'"),
        (GOOD + "plugin = DatasetPlugin('bad', 'folder')", "its load must be callable, but is of type str"),
        (
            GOOD + "plugin = DatasetPlugin('bad', print, settings={'size': 3})",
            "its settings must be None or a subclass of gencore.config.Config, but are of type dict",
        ),
        (
            GOOD + "plugin = DatasetPlugin('bad', print, settings=int)",
            "its settings must be None or a subclass of gencore.config.Config, but are the class int",
        ),
        (
            GOOD + "plugin = DatasetPlugin('bad', print, settings=Undecorated)",
            r"its settings Undecorated must be decorated with @dataclass\(frozen=True\)",
        ),
        (
            GOOD + NEEDS_SIZE + "plugin = DatasetPlugin('bad', print, settings=NeedsSize)",
            "every setting of its settings must have a default, but size has none",
        ),
    ],
)
def test_broken_dataset(install, source, cause):
    install("zoo", "[gencore.datasets]\nbad = zoo_bad:plugin", zoo_bad=source)
    with pytest.raises(PluginError, match=rf"data set plugin 'bad' .* of package zoo 1\.0 is broken: {cause}"):
        plugins.load_dataset("bad")


def test_broken_load_is_named_with_package_and_cause(install):
    install(
        "zoo",
        "[gencore.datasets]\nrings = zoo_good:data\nbad = zoo_bad:data",
        zoo_good=GOOD,
        zoo_bad=f"""{GOOD}
data = DatasetPlugin("bad", lambda path, split: 1 / 0)
""",
    )
    named = r"data set plugin '{}' \({}:data\) of package zoo 1\.0 is broken: {}"
    with pytest.raises(PluginError, match=named.format("bad", "zoo_bad", "ZeroDivisionError")) as info:
        data.load("bad", "train")
    assert isinstance(info.value.__cause__, ZeroDivisionError)
    with pytest.raises(PluginError, match=named.format("rings", "zoo_good", "load must return an ImageDataset")):
        data.load("rings", "train")


def test_status_of_an_entry_that_is_gone():
    assert plugins.status(Entry("gone", "model", "zoo", "1.0", "zoo:plugin")) == "broken: no longer installed"
