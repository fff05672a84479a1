"""Runs diffusers' own tests without and with :func:`accelerate`, and lists those that pass only without.

    python tests/integrations/diffusers_suite.py ~/diffusers tests/models/unets tests/pipelines/pag

``~/diffusers`` is a checkout of diffusers' sources, best of the installed version; the paths are relative to it and
default to ``PATHS``. With ``accelerate``, every model and scheduler of diffusers is accelerated when its outermost
constructor returns, whether a test calls that or ``from_pretrained`` does. The exit status is 1 if a test that passes
without fails with it, and 2 if a path gives no outcome or pytest itself fails there. ``--json FILE`` keeps them;
``--baseline FILE`` takes those without from such a file.

Most tests make small models with random weights. The exception is the tokenizer of the text encoders, which they
download; where there is no network (``HF_HUB_OFFLINE=1``), a tokenizer of single letters stands in for it, both times.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

PATHS = (
    "tests/models/unets",
    "tests/models/autoencoders",
    "tests/models/controlnets",
    "tests/models/test_attention_processor.py",
    "tests/models/test_layers_utils.py",
    "tests/hooks",
    "tests/schedulers",
    "tests/pipelines/ddim",
    "tests/pipelines/ddpm",
    "tests/pipelines/stable_diffusion",
    "tests/pipelines/stable_diffusion_2",
    "tests/pipelines/stable_diffusion_adapter",
    "tests/pipelines/stable_diffusion_xl",
    "tests/pipelines/controlnet",
    "tests/pipelines/pag",
    "tests/pipelines/ip_adapters",
    "tests/pipelines/stable_video_diffusion",
    "tests/pipelines/animatediff",
    "tests/lora/test_lora_layers_sd.py",
    "tests/lora/test_lora_layers_sdxl.py",
)
# What the plugin below is told by the process that starts pytest.
OUTCOMES, ACCELERATED = "GENCORE_SUITE_OUTCOMES", "GENCORE_SUITE_ACCELERATED"


def accelerate_every_constructor() -> None:
    from diffusers import ModelMixin, SchedulerMixin

    from gencore.integrations.diffusers import accelerate

    depth = 0

    def wrap(kind: type) -> None:
        if "__init__" not in vars(kind):
            return
        constructor = kind.__init__

        @functools.wraps(constructor)
        def accelerated(self, *args, **kwargs):
            nonlocal depth
            depth += 1
            try:
                constructor(self, *args, **kwargs)
            finally:
                depth -= 1
            if depth == 0:
                accelerate(self)

        kind.__init__ = accelerated

    def wrap_later(base: type) -> None:
        for kind in base.__subclasses__():
            wrap(kind)
            wrap_later(kind)

    def wrap_when_defined(base: type) -> None:
        former = vars(base).get("__init_subclass__")

        def init_subclass(kind, **options):
            inherited = super(base, kind).__init_subclass__ if former is None else former.__get__(None, kind)
            inherited(**options)
            wrap(kind)

        base.__init_subclass__ = classmethod(init_subclass)

    for base in (ModelMixin, SchedulerMixin):
        wrap_later(base)
        # diffusers imports a model's module when its name is first used.
        wrap_when_defined(base)


def replace_tokenizer() -> None:
    """Lets ``CLIPTokenizer.from_pretrained`` of a repository for tests give a tokenizer of single letters."""
    from transformers import CLIPTokenizer

    from_pretrained = CLIPTokenizer.from_pretrained

    def of_letters(name, *args, **kwargs):
        if not str(name).startswith("hf-internal-testing/"):
            return from_pretrained(name, *args, **kwargs)
        ends = ["<|startoftext|>", "!", "<|endoftext|>"]
        letters = [chr(code) for code in range(34, 127)]
        words = [*ends, *letters, *(f"{letter}</w>" for letter in ["!", *letters])]
        return CLIPTokenizer(
            vocab={word: number for number, word in enumerate(words)}, merges=[], pad_token="!", model_max_length=77
        )

    CLIPTokenizer.from_pretrained = of_letters


class Recorder:
    """A plugin of pytest that writes each test's outcome, as a line that survives a crash."""

    def __init__(self, path: str):
        self.file = open(path, "a", buffering=1)  # noqa: SIM115
        self.seen: dict[str, str] = {}

    def pytest_runtest_logreport(self, report):
        worse = report.outcome != "passed" or report.when == "call"
        if worse and self.seen.get(report.nodeid) != "failed":
            self.seen[report.nodeid] = report.outcome
            why = str(report.longrepr).strip().splitlines()[-1:] if report.failed else []
            self.file.write(json.dumps([report.nodeid, report.outcome, *why]) + "\n")


def pytest_configure(config):
    if path := os.environ.get(OUTCOMES):
        config.pluginmanager.register(Recorder(path))
        if os.environ.get("HF_HUB_OFFLINE") == "1":
            replace_tokenizer()
        if os.environ[ACCELERATED] == "1":
            accelerate_every_constructor()


def outcomes(
    source: Path, paths: list[str], accelerated: bool, options: list[str], broken: list[str]
) -> dict[str, list[str]]:
    """Each test's outcome, and the last line of its error. Every path is run by a process of its own.

    What has no outcome, such as a path that is mistyped, and where pytest did not come to its end, joins ``broken``.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "outcomes"
        file.touch()
        here = Path(__file__).resolve()
        roots = (str(source / "src"), str(here.parents[2]), str(here.parent), os.environ.get("PYTHONPATH", ""))
        environment = {
            **os.environ,
            OUTCOMES: str(file),
            ACCELERATED: str(int(accelerated)),
            "PYTHONPATH": os.pathsep.join(filter(None, roots)),
        }
        for path in paths:
            command = [sys.executable, "-m", "pytest", "-q", "-p", here.stem, "-p", "no:cacheprovider", *options, path]
            print(f"{'with' if accelerated else 'without'} accelerate: {path}", flush=True)
            size = file.stat().st_size
            status = subprocess.run(command, cwd=source, env=environment, stdout=subprocess.DEVNULL).returncode
            # All tests passed, or some failed.
            if status not in (0, 1) or file.stat().st_size == size:
                broken.append(path)
                print(f"BROKEN {path}: no outcome, or not all of them; pytest's exit status is {status}", flush=True)
        lines = (json.loads(line) for line in file.read_text().splitlines())
        return {name: rest for name, *rest in lines}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="a checkout of diffusers' sources")
    parser.add_argument("paths", nargs="*", default=PATHS, help="tests, relative to it")
    parser.add_argument("--json", type=Path, help="where the outcomes are written")
    parser.add_argument("--baseline", type=Path, help="a file of --json, in place of the run without accelerate")
    parser.add_argument("--pytest", default="", help="more options for pytest, such as '--timeout 300'")
    given = parser.parse_args()
    broken: list[str] = []
    options = given.pytest.split()
    run = functools.partial(outcomes, given.source.resolve(), list(given.paths), options=options, broken=broken)
    without = json.loads(given.baseline.read_text())["without"] if given.baseline else run(accelerated=False)
    with_it = run(accelerated=True)
    if given.json:
        given.json.write_text(json.dumps({"without": without, "with": with_it}, indent=1))
    passed = [name for name, (outcome, *_) in without.items() if outcome == "passed"]
    lost = [name for name in passed if with_it.get(name, ["not run"])[0] != "passed"]
    for name in lost:
        print(f"LOST {name}: {' '.join(with_it.get(name, ['not run']))}")
    print(f"{len(passed)} pass without accelerate, {len(passed) - len(lost)} of them with it")
    return 2 if broken else int(bool(lost))


if __name__ == "__main__":
    sys.exit(main())
