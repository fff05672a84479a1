import subprocess
import sys
import textwrap

import pytest
import torch

from gencore import Key, data, plugins
from gencore.config import ConfigError
from gencore.data import DATASETS
from gencore.models import ModelConfig, ModelPlugin
from gencore.plugins import MODELS, Entry, PluginError
from gencore.spec import Batch, Condition, DataSpec

SPEC = DataSpec((1, 8, 8), (Condition("label", "class", ("a", "b")),))

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
plugin = ModelPlugin("good", "vae", Settings, lambda config, spec: None)
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
    entries = [entry for entry in MODELS.entries() if entry.package == "zoo"]
    assert entries == [Entry("good", "model", "zoo", "2.1", "zoo_bomb:plugin")]
    assert "zoo_bomb" not in sys.modules


def test_builtins_are_listed_without_importing_them():
    code = """
        import sys
        from gencore.data import DATASETS
        from gencore.plugins import MODELS
        models, sets = MODELS.names(), DATASETS.names()
        assert {"vae", "beta-vae", "gan", "ddpm"} <= set(models) and {"digits", "images"} <= set(sets), (models, sets)
        modules = [entry.value.partition(":")[0] for entry in MODELS.entries() + DATASETS.entries()]
        packages = {"sklearn", "PIL", "datasets"}
        loaded = [name for name in sys.modules if name in packages or name in modules]
        assert loaded == [], loaded
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)


def test_loads_models_and_datasets(install):
    install("zoo", "[gencore.models]\ngood = zoo_good:plugin\n[gencore.datasets]\nrings = zoo_good:data", zoo_good=GOOD)
    model, rings = MODELS.load("good"), DATASETS.load("rings")
    assert (model.name, model.family, model.config().size) == ("good", "vae", 3)
    assert rings.name == "rings"
    for registry, name in ((MODELS, "good"), (DATASETS, "rings")):
        assert [registry.status(entry) for entry in registry.entries() if entry.name == name] == ["ok"]
    assert [entry.kind for entry in DATASETS.entries() if entry.name == "rings"] == ["data set"]


def test_each_name_is_named_once(install):
    install("zoo", "[gencore.models]\ngood = zoo_good:plugin\ntwice = zoo_good:plugin\n", zoo_good=GOOD)
    install("ark", "[gencore.models]\ntwice = ark:plugin\n", "3.0", ark=GOOD)
    names = MODELS.names()
    assert names == sorted(set(names))
    assert {"good", "twice", "vae"} <= set(names)
    assert len([entry for entry in MODELS.entries() if entry.name == "twice"]) == 2


def test_any_word_may_be_a_family(install):
    source = GOOD + "plugin = ModelPlugin('bad', 'hopfield network', Settings, print)"
    install("zoo", "[gencore.models]\nbad = zoo_bad:plugin", zoo_bad=source)
    assert MODELS.load("bad").family == "hopfield network"


def test_a_preset_is_a_plugin_like_any_other(install):
    source = GOOD + "plugin = plugin.preset('quick', 'a quick one', size=7)"
    install("zoo", "[gencore.models]\nquick = zoo_quick:plugin", zoo_quick=source)
    quick = MODELS.load("quick")
    assert (quick.name, quick.preset_of, quick.config_of({}).size) == ("quick", "good", 7)


def test_unknown_name_has_close_matches(install):
    install("zoo", "[gencore.models]\ngood = zoo_good:plugin\n", zoo_good=GOOD)
    with pytest.raises(PluginError, match=r"no model plugin is called 'god'; did you mean good.* available: .*good"):
        MODELS.load("god")
    with pytest.raises(PluginError, match="no model plugin is called 'GOOD'; did you mean good"):
        MODELS.load("GOOD")
    with pytest.raises(PluginError, match=r"no data set plugin is called 'qqqq'; available: "):
        DATASETS.load("qqqq")
    with pytest.raises(TypeError, match="name must be a string, got int"):
        MODELS.load(3)


def test_clash_names_both_packages_and_breaks_nothing_else(install):
    install("zoo", "[gencore.models]\ngood = zoo_good:plugin\ntwice = zoo_good:plugin\n", zoo_good=GOOD)
    install("ark", "[gencore.models]\ntwice = ark:plugin\n", "3.0", ark=GOOD)
    with pytest.raises(PluginError, match=r"two model plugins are called 'twice': in ark 3\.0 .* and zoo 1\.0"):
        MODELS.load("twice")
    assert MODELS.load("good").name == "good"
    status = {entry.package: MODELS.status(entry) for entry in MODELS.entries() if entry.name == "twice"}
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
        (GOOD + "plugin = ModelPlugin('bad', '', Settings, print)", "its family must be a word, but is ''"),
        (GOOD + "plugin = ModelPlugin('bad', None, Settings, print)", "its family must be a word, but is None"),
        (
            GOOD + "plugin = ModelPlugin('bad', 'vae', Settings, print, defaults=3)",
            "its defaults must be a mapping, but is of type int",
        ),
        (
            GOOD + "plugin = plugin.preset('bad', '', size='x', siz=1)",
            "its defaults are wrong: siz: is not a setting; did you mean size\\?; size: must be an integer, was 'x'",
        ),
        (GOOD + "plugin = ModelPlugin('bad', 'vae', Settings, 3)", "its build must be callable, but is of type int"),
    ],
)
def test_broken_plugin_is_named_with_package_and_cause(install, source, cause):
    install("zoo", "[gencore.models]\nbad = zoo_bad:plugin\ngood = zoo_good:plugin", zoo_bad=source, zoo_good=GOOD)
    with pytest.raises(
        PluginError, match=rf"model plugin 'bad' \(zoo_bad:plugin\) of package zoo 1\.0 is broken: .*{cause}"
    ) as info:
        MODELS.load("bad")
    assert info.value.__cause__ is not None
    assert "\n" not in str(info.value)
    assert MODELS.load("good").name == "good"
    (entry,) = (entry for entry in MODELS.entries() if entry.name == "bad")
    assert MODELS.status(entry).startswith("broken: ")


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
        MODELS.load("bad")


NEEDS_SIZE = """
from gencore.config import Config, field
@dataclass(frozen=True)
class NeedsSize(Config):
    size: int = field(ge=1)
"""

BUILT = """
import torch
from gencore.config import ConfigError
from gencore.models import GenerativeModel, Loss, Optimizer, Phase
class Model(GenerativeModel):
    def __init__(self, config, spec):
        super().__init__(config, spec)
        self.weight = torch.nn.Parameter(torch.zeros(2))
    def phases(self):
        return [Phase("fit", lambda step: Loss(self.weight.sum()), Optimizer([self.weight]))]
class NoInit(Model):
    def __init__(self, config, spec):
        torch.nn.Module.__init__(self)
class NoConfig(Model):
    def __init__(self, config, spec):
        super().__init__(config, spec)
        self.config = None
class OtherSpec(Model):
    def __init__(self, config, spec):
        super().__init__(config, spec)
        self.spec = type(spec)((3, 1, 1))
class NotImplementedPhases(Model):
    phases = GenerativeModel.phases
class NoPhases(Model):
    def phases(self):
        return []
class WrongPhases(Model):
    def phases(self):
        return [self.weight]
class FailingPhases(Model):
    def phases(self):
        return self.weights
class TakesText(Model):
    takes = {"text": "optional"}
class TakesPerhaps(Model):
    takes = {"label": "perhaps"}
class TakesNames(Model):
    takes = ("label",)
class Picky(Settings):
    def faults_with(self, spec):
        yield f"size: must be below {spec.image_shape[1]}, was {self.size}"
        yield "size: must be even, was 3"
Picky = dataclass(frozen=True)(Picky)
def refuse(config, spec):
    raise ConfigError("Settings", ["size: must be even, was 3"])
def leave(config, spec):
    raise SystemExit(3)
"""


def loaded_with(install, build, config="Settings"):
    source = f"{GOOD}{BUILT}plugin = ModelPlugin('bad', 'vae', {config}, {build})"
    install("zoo", "[gencore.models]\nbad = zoo_bad:plugin", zoo_bad=source)
    return MODELS.load("bad")


def build_with(install, build, config="Settings"):
    plugin = loaded_with(install, build, config)
    return plugins.build_model(plugin, plugin.config(), SPEC)


def test_builds_a_model(install):
    model = build_with(install, "Model")
    assert (model.config.size, model.spec, model.plugin_name) == (3, SPEC, "bad")


def test_a_configuration_is_held_against_the_data_before_anything_is_built(install):
    with pytest.raises(ConfigError) as info:
        build_with(install, "leave", "Picky")
    assert (info.value.name, info.value.faults) == (
        "bad",
        ["size: must be below 8, was 3", "size: must be even, was 3"],
    )


@pytest.mark.parametrize(
    ("build", "cause"),
    [
        ("lambda config, spec: 1 / 0", "ZeroDivisionError: division by zero"),
        ("lambda config: None", "TypeError: .*takes 1 positional argument but 2 were given"),
        ("leave", "SystemExit: 3"),
        ("lambda config, spec: None", "build must return a gencore.models.GenerativeModel, .* is of type NoneType"),
        ("NoConfig", "its model must keep its Settings as config, but config is of type NoneType"),
        ("NoInit", "its model must keep its Settings as config, but config is of type NoneType"),
        ("OtherSpec", "its model must keep the DataSpec that it is built with as spec"),
        ("NotImplementedPhases", r"its model NotImplementedPhases does not implement phases\(\)"),
        (
            "TakesPerhaps",
            r"takes\['label'\] of its model must be 'required' or 'optional', but is 'perhaps'",
        ),
        ("TakesNames", "takes of its model must be a mapping, but is of type tuple"),
    ],
)
def test_broken_build_is_named_with_package_and_cause(install, build, cause):
    with pytest.raises(
        PluginError, match=rf"model plugin 'bad' \(zoo_bad:plugin\) of package zoo 1\.0 is broken: {cause}"
    ) as info:
        build_with(install, build)
    assert info.value.__cause__ is not None
    assert "\n" not in str(info.value)


@pytest.mark.parametrize(
    ("build", "cause"),
    [
        ("WrongPhases", r"phases\(\)"),
        ("FailingPhases", r"phases\(\): AttributeError: .*no attribute 'weights'"),
    ],
)
def test_broken_phases_are_named_with_package_and_cause(install, tmp_path, build, cause):
    """They are known once the run has begun: a model may build its networks to fit what it adopts then."""
    pytest.importorskip("safetensors")
    from gencore.train import TrainConfig, Trainer

    plugin, digits = loaded_with(install, build), data.load("digits", "test")
    trainer = Trainer(
        plugin,
        plugin.config(),
        digits,
        TrainConfig(),
        tmp_path / "run",
        data_name="digits",
        device="cpu",
        progress=False,
    )
    with pytest.raises(
        PluginError, match=rf"model plugin 'bad' \(zoo_bad:plugin\) of package zoo 1\.0 is broken: {cause}"
    ):
        trainer.begin()


def test_a_model_without_phases_is_whole_after_its_start(install, tmp_path):
    pytest.importorskip("safetensors")
    from gencore.train import TrainConfig, Trainer, load

    plugin, digits = loaded_with(install, "NoPhases"), data.load("digits", "test")
    options = {"data_name": "digits", "device": "cpu", "progress": False}
    Trainer(plugin, plugin.config(), digits, TrainConfig(), tmp_path, **options).fit()
    assert type(load(tmp_path, device="cpu")).__name__ == "NoPhases"


def test_trainer_and_checkpoints_name_a_plugin_that_cannot_build(install, tmp_path):
    pytest.importorskip("safetensors")
    from gencore.train import Checkpoint, Run, TrainConfig, Trainer
    from gencore.train.checkpoint import restore_model

    install("zoo", "[gencore.models]\nbad = zoo_bad:plugin", zoo_bad=GOOD.replace('"good"', '"bad"'))
    plugin, digits = MODELS.load("bad"), data.load("digits", "test")
    message = r"model plugin 'bad' .* of package zoo 1\.0 is broken: build must return"
    with pytest.raises(PluginError, match=message):
        Trainer(plugin, plugin.config(), digits, TrainConfig(), tmp_path, data_name="digits", device="cpu")
    run = Run(
        model="bad", config=plugin.config().to_dict(), spec=digits.spec.to_dict(), data="digits", data_settings={},
        images=len(digits), fingerprint=digits.fingerprint, train=TrainConfig().to_dict(),
    )  # fmt: skip
    with pytest.raises(PluginError, match=message):
        restore_model(Checkpoint(tmp_path, run, 1, {}, {}))


def test_a_configuration_that_build_refuses_is_no_broken_plugin(install):
    with pytest.raises(ConfigError, match="size: must be even, was 3"):
        build_with(install, "refuse")


def test_who_is_blamed(install):
    """An error within names the plugin, but for what is the user's, the machine's, or named already."""
    install("zoo", "[gencore.models]\ngood = zoo_good:plugin\n", zoo_good=GOOD)
    named = r"model plugin 'good' \(zoo_good:plugin\) of package zoo 1\.0 is broken: the loss: "
    for error, told in ((KeyError("label"), "KeyError: 'label'"), (SystemExit(3), "SystemExit: 3")):
        with pytest.raises(PluginError, match=named + told) as info, plugins.blamed("good", "the loss"):
            raise error
        assert info.value.__cause__ is error
    for error in (MemoryError("short"), PluginError("other"), KeyboardInterrupt(), FloatingPointError("nan")):
        with pytest.raises(type(error)) as info, plugins.blamed("good", "the loss", FloatingPointError):
            raise error
        assert info.value is error
    # A model that no plugin built.
    with pytest.raises(KeyError), plugins.blamed("", "the loss"):
        raise KeyError


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
        DATASETS.load("bad")


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
    with pytest.raises(
        PluginError,
        match=named.format(
            "rings", "zoo_good", "load must return a data set with spec, len.. and batch.., got NoneType"
        ),
    ):
        data.load("rings", "train")


def test_a_data_set_needs_the_three_members_only(install):
    source = """
        import torch
        from gencore.data import DatasetPlugin
        from gencore.spec import Batch, DataSpec
        class Ones:
            spec = DataSpec((1, 2, 2))
            def __len__(self):
                return 3
            def batch(self, indices, key=None):
                return Batch(torch.ones(len(indices), 1, 2, 2))
        plugin = DatasetPlugin("ones", lambda path, split: Ones())
    """
    install("zoo", "[gencore.datasets]\nones = zoo_ones:plugin", zoo_ones=source)
    ones = data.load("ones", "train")
    assert (ones.name, ones.split, len(ones), ones.spec) == ("ones", "train", 3, DataSpec((1, 2, 2)))
    assert isinstance(batch := ones.batch(torch.arange(2), Key(0)), Batch)
    assert batch.images.shape == (2, 1, 2, 2)


def test_status_of_an_entry_that_is_gone():
    assert MODELS.status(Entry("gone", "model", "zoo", "1.0", "zoo:plugin")) == "broken: no longer installed"


def test_a_condition_that_the_data_lack_is_no_fault_of_the_plugin(install):
    with pytest.raises(ConfigError) as info:
        build_with(install, "TakesText")
    assert info.value.faults == ["data: must give what model bad takes, but lack 'text'"]


@pytest.mark.parametrize(
    ("faults", "told"),
    [(None, []), ("size: is odd", ["size: is odd"]), (("a", "b"), ["a", "b"]), ([1], None), (ZeroDivisionError, None)],
)
def test_what_faults_with_gives(faults, told):
    """Lines, one line, or none; anything else is the plugin's fault."""

    class Settings(ModelConfig):
        def faults_with(self, spec):
            if faults is ZeroDivisionError:
                raise faults
            return faults

    plugin = ModelPlugin("bad", "other", Settings, lambda config, spec: None)
    if told is None:
        with pytest.raises(PluginError, match=r"'bad' is broken: faults_with\(\): "):
            plugins.faults_with(plugin, Settings(), DataSpec((1, 2, 2)))
    else:
        assert plugins.faults_with(plugin, Settings(), DataSpec((1, 2, 2))) == told
