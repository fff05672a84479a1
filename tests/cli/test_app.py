"""The command line as a whole: help, listing, info, errors, real processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(environment, *arguments, **options):
    command = [sys.executable, "-m", "gencore", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, **options)


def test_list_shows_every_plugin_and_its_state(gencore):
    result = gencore("list")
    assert (result.code, result.err) == (0, "")
    toy = next(line for line in result.out.splitlines() if line.startswith("toy "))
    assert toy.split()[:6] == ["toy", "vae", "gencore-toy", "1.0", "ok", "an"]
    assert any(line.startswith("bars ") for line in result.out.splitlines())


def test_list_shows_the_settings_of_a_model(gencore):
    result = gencore("list", "toy")
    assert "hidden" in result.out
    assert "train.batch_size" in result.out
    assert "image_shape" not in result.out
    assert "train.average.decay" in result.out
    assert "did you mean toy" in gencore("list", "toyy").err
    assert "one of 'bernoulli', 'gaussian'" in gencore("list", "vae").out


def test_list_shows_what_a_preset_changes(gencore):
    row = next(line for line in gencore("list").out.splitlines() if line.startswith("beta-vae "))
    assert row.endswith("(preset of vae: beta=4.0)")
    assert row.split()[1] == "vae"
    result = gencore("list", "beta-vae")
    assert (result.code, result.err) == (0, "")
    defaults = {line.split()[0]: line.split()[1:3] for line in result.out.splitlines() if line.startswith("  ")}
    assert defaults["beta"] == ["4.0", "(preset)"]
    assert [name for name, default in defaults.items() if default[1:] == ["(preset)"]] == ["beta"]
    plain = {line.split()[0]: line.split()[1] for line in gencore("list", "vae").out.splitlines() if line[:1] == " "}
    assert plain["beta"] == "1.0"
    assert plain.keys() == defaults.keys()


def test_list_shows_what_a_preset_changes_of_the_trainer(gencore):
    row = next(line for line in gencore("list").out.splitlines() if line.startswith("r3gan "))
    assert "(preset of gan: network=r3gan, " in row
    assert row.endswith("train.average.decay=0.999)")
    told = gencore("list", "r3gan").out.splitlines()
    lines = {line.split()[0]: line.split()[1:3] for line in told if line[:1] == " "}
    assert lines["train.schedule"] == ["cosine", "(preset)"]
    assert lines["train.epochs"][0] == "20"


def test_info(gencore):
    assert "SIMD level" in gencore("info").out
    assert json.loads(gencore("info", "--json").out)["threads"] >= 1


def test_help_names_every_command(gencore):
    result = gencore("--help")
    assert result.code == 0
    for command in (
        "quickstart",
        "train",
        "sample",
        "evaluate",
        "reconstruct",
        "interpolate",
        "traverse",
        "edit",
        "bench",
        "profile",
        "runs",
        "list",
        "info",
    ):
        assert command in result.out


@pytest.mark.parametrize("arguments", [("smaple",), ("sample",), ("--wrong",)])
def test_a_wrong_command_line_is_one_line(gencore, arguments):
    result = gencore(*arguments)
    assert (result.code, len(result.err.splitlines())) == (2, 1)
    assert result.err.startswith("gencore: ")


def test_a_mistake_in_a_real_process_has_no_traceback(toy_environment, tmp_path):
    done = run(toy_environment, "train", "toyy", "--out", str(tmp_path / "run"))
    assert done.returncode == 2
    assert done.stderr.startswith("gencore: no model plugin is called 'toyy'; did you mean toy")
    assert len(done.stderr.splitlines()) == 1


def test_a_missing_extra_is_one_line(toy_environment):
    for name in ("typer", "safetensors", "matplotlib.figure"):
        program = f"import sys; sys.modules[{name!r}] = None; from gencore.cli import main; sys.exit(main(['info']))"
        done = subprocess.run([sys.executable, "-c", program], env=toy_environment, capture_output=True, text=True)
        if name == "matplotlib.figure":
            assert done.returncode == 0
        else:
            assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
            assert "pip install 'gencore[train]'" in done.stderr


def test_a_reader_that_goes_away_is_no_error(toy_environment):
    command = f"{sys.executable} -m gencore list | head -1"
    done = subprocess.run(["bash", "-c", command], env=toy_environment, capture_output=True, text=True)
    assert done.stderr == ""


def test_version_and_short_help(gencore):
    assert gencore("--version") == (0, f"gencore {metadata.version('gencore')}\n", "")
    assert gencore("-h") == gencore("--help")
    assert "--steps" in gencore("train", "-h").out


def test_a_shell_completes_commands_and_models(toy_environment):
    environment = {**toy_environment, "_GENCORE_COMPLETE": "complete_bash"}
    toys = {"toy", "toy-captions", "toy-mean", "toy-sampler", "toy-stage", "toy-translator"}
    for words, expected in (("gencore tr", {"train", "traverse"}), ("gencore train to", toys)):
        count = str(len(words.split()) - 1)
        done = run({**environment, "COMP_WORDS": words, "COMP_CWORD": count})
        assert set(done.stdout.split()) == expected, done.stderr


def test_a_traceback_is_shown_when_asked_for(gencore, tmp_path):
    result = gencore("--traceback", "train", "toyy", "--out", tmp_path / "run")
    assert result.code == 2
    assert result.err.startswith("Traceback")
    assert result.err.splitlines()[-1].startswith("gencore: no model plugin is called 'toyy'")
    assert "Traceback" not in gencore("train", "toyy", "--out", tmp_path / "run").err


@pytest.mark.parametrize("encoding", ["ascii", "iso8859-2", "gbk", "utf-8"])
def test_any_terminal_takes_what_is_printed(encoding):
    program = (
        "import os, sys; from gencore.cli import main; main(['--version']);"
        "print('\\xb1 \\u2265 caf\\xe9 \\u4e2d', os.fsdecode(b'caf\\xe9.png'), '\\ud800')"
    )
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr
    expected = {
        "ascii": b"+/- >= cafe ? caf\xe9.png ?",
        "iso8859-2": b"+/- >= caf\xe9 ? caf\xe9.png ?",
        "gbk": "\xb1 \u2265 caf\xe9 \u4e2d".encode("gbk") + b" caf\xe9.png ?",
        "utf-8": "\xb1 \u2265 caf\xe9 \u4e2d".encode() + b" caf\xe9.png ?",
    }[encoding]
    assert done.stdout.splitlines()[-1] == expected
