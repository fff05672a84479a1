"""Tries an installed gencore that has torch and NumPy and nothing else; run it from outside the checkout."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import torch

import gencore
from gencore import Key, ops
from gencore.backends import cpu
from gencore.noise import philox4x32, reference_normal, reference_uniform

KNOWN_ANSWERS = (
    ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
)


def check(holds: bool, what: str) -> None:
    print(f"{'ok' if holds else 'WRONG':6}{what}")
    if not holds:
        sys.exit(1)


def main() -> None:
    installed = Path(gencore.__file__).resolve()
    check(installed.is_relative_to(Path(sys.prefix).resolve()), f"gencore {gencore.__version__} comes from the wheel")
    check(all(philox4x32(c, k) == words for c, k, words in KNOWN_ANSWERS), "Philox gives its three known answers")

    key, shape = Key(2**50 + 3).stream(4).samples(2**35), (5, 3, 7, 11)
    for level in cpu.build_info()["simd_supported"]:
        cpu.set_simd_level(level)
        for name, reference in (("normal", reference_normal), ("uniform", reference_uniform)):
            drawn = getattr(ops, name)(shape, key)
            check(torch.equal(drawn, torch.from_numpy(reference(shape, key))), f"{name} is its reference ({level})")

    mu = torch.linspace(-2, 2, 40).reshape(4, 10).requires_grad_()
    logvar = torch.zeros(4, 10, requires_grad=True)
    z, kl = ops.reparameterize_kl(mu, logvar, key)
    noise = torch.from_numpy(reference_normal((4, 10), key))
    check(torch.equal(z, mu + noise), "reparameterize adds the noise")
    check(torch.allclose(kl, mu.square().sum(1) / 2), "the divergence is mu^2 / 2 where the variance is 1")
    z.sum().backward()
    check(torch.allclose(logvar.grad, noise / 2), "the gradient makes the same noise again")

    x = torch.randn(2, 8, 5, 5, requires_grad=True)
    norm = gencore.nn.GroupNorm(4, 8, activation="silu")
    want = torch.nn.functional.silu(torch.nn.functional.group_norm(x, 4))
    check(torch.allclose(norm(x), want, atol=1e-5), "group norm with SiLU is PyTorch's")
    grads = [torch.autograd.grad(y.square().sum(), x)[0] for y in (norm(x), want)]
    check(torch.allclose(*grads, atol=1e-4), "and so is its gradient")

    q, k, v = torch.randn(3, 2, 4, 100, 40).unbind(0)
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    for level in cpu.build_info()["simd_supported"]:
        cpu.set_simd_level(level)
        check(torch.allclose(ops.attention(q, k, v), want, atol=1e-5), f"attention is PyTorch's ({level})")

    schedule, t = gencore.diffusion.linear(), torch.tensor([0, 500, 999])
    data = torch.linspace(-1, 1, 36).reshape(3, 12)
    noised, eps = ops.add_noise(data, t, schedule, key, return_noise=True)
    alpha, sigma = (level[t].float()[:, None] for level in (schedule.alpha, schedule.sigma))
    check(torch.allclose(noised, alpha * data + sigma * eps, atol=1e-6), "data is noised to each sample's own step")
    output = eps.clone().requires_grad_()
    loss = ops.denoising_loss(output, data, t, schedule, key)
    check(bool((loss == 0).all()), "the loss of the very noise is 0")
    sampler = gencore.diffusion.ddim(schedule, 10)
    found = gencore.diffusion.sample(lambda x, t: x * sigma[0], (2, 12), sampler, key)
    check(bool(found.isfinite().all()) and found.shape == (2, 12), "a sampler samples")

    told = gencore.info()
    check(told["openmp"]["shared"] in (True, "unknown"), f"the threads are torch's, of {told['openmp']['runtime']}")
    reason = told["cuda_module"].get("reason", "nothing")
    if importlib.util.find_spec("gencore._cuda") is not None:
        from gencore import _cuda

        built = _cuda.build_info()
        check(
            built["version"] == gencore.__version__,
            f"the CUDA module can be loaded: by {built['compiler']} for {built['architectures']}",
        )
        check("has no CUDA module" not in reason, f"what keeps it from a GPU is said: {reason}")
    else:
        check("has no CUDA module" in reason, f"what is missing is said: {reason}")
    explanation = gencore.explain(ops.normal, (2, 2))
    check(explanation.chosen == "cpu", str(explanation).replace("\n", "\n      "))

    command = Path(sys.executable).with_name("gencore")
    done = subprocess.run([command, "info"], capture_output=True, text=True)
    said = done.stderr.strip()
    check(
        done.returncode == 2 and not done.stdout and len(said.splitlines()) == 1 and "gencore[train]" in said,
        f"the command line says what it lacks: {said}",
    )


if __name__ == "__main__":
    main()
