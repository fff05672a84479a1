"""The Kullback-Leibler divergence in both directions: a table, and a picture of what each direction seeks.

    python examples/kl_divergence.py --out kl.png

It needs gencore[train], and runs in seconds.
"""

from __future__ import annotations

import argparse

import torch
from matplotlib.figure import Figure
from torch.distributions import Categorical, Distribution, MixtureSameFamily, Normal

from gencore.metrics import kl_divergence, nearest_normal


def normal(mean: float, deviation: float) -> Normal:
    return Normal(torch.tensor(mean).double(), torch.tensor(deviation).double())


# log p(x) of two normal distributions, half each.
MODES = MixtureSameFamily(Categorical(torch.ones(2).double()), Normal(torch.tensor([-2.0, 2.0]).double(), 0.6))
PAIRS: dict[str, tuple[Distribution, Distribution]] = {
    "equal: N(0, 1) and N(0, 1)": (normal(0.0, 1.0), normal(0.0, 1.0)),
    "apart: N(0, 1) and N(2, 1)": (normal(0.0, 1.0), normal(2.0, 1.0)),
    "narrow and wide: N(0, 1) and N(0, 3²)": (normal(0.0, 1.0), normal(0.0, 3.0)),
    "two modes and N(0, 2²)": (MODES, normal(0.0, 2.0)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description="KL(p || q) in both directions.")
    parser.add_argument("--out", default="kl.png", help="where the picture goes")
    out = parser.parse_args().out
    print(f"{'p and q':<40}{'KL(p || q)':>11}{'numeric':>9}{'KL(q || p)':>12}{'numeric':>9}   nats")
    for name, (p, q) in PAIRS.items():
        figures = [kl_divergence(a, b, numeric=numeric) for a, b in ((p, q), (q, p)) for numeric in (False, True)]
        print(f"{name:<40}{figures[0]:>11.4f}{figures[1]:>9.4f}{figures[2]:>12.4f}{figures[3]:>9.4f}")
    figure = Figure(figsize=(9, 3), layout="constrained")
    x = torch.linspace(-6, 6, 601).double()
    fits = {
        "forward, KL(p || q): q covers all of p": nearest_normal(MODES, "forward"),
        "reverse, KL(q || p): q settles on a mode": nearest_normal(MODES, "reverse", start=1.0),
    }
    for axes, (title, q) in zip(figure.subplots(1, 2, sharey=True), fits.items(), strict=True):
        axes.fill_between(x, MODES.log_prob(x).exp(), alpha=0.3, label="p")
        label = f"q: KL(p || q) = {kl_divergence(MODES, q):.2f}, KL(q || p) = {kl_divergence(q, MODES):.2f}"
        axes.plot(x, q.log_prob(x).exp(), label=label)
        axes.set(title=title, ylim=(0, 0.95))
        axes.legend(frameon=False, loc="upper left", fontsize="small")
    figure.savefig(out, dpi=130)
    print(out)


if __name__ == "__main__":
    main()
