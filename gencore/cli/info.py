"""``gencore info``: what is installed, what was built, what of it serves here."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from gencore.info import info


def command(
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, for programs and bug reports.")] = False,
) -> None:
    """Show versions, the compiled kernels and the SIMD level in use."""
    told = info()
    print(json.dumps(told, indent=1) if as_json else "\n".join(lines(told)))


def lines(told: dict[str, Any]) -> list[str]:
    """What :func:`gencore.info.info` tells, one aligned line for each thing."""
    module, openmp = told["cpu_module"], told["openmp"]
    rows = [
        ("gencore", f"{told['gencore']}  (Python {told['python']}, torch {told['torch']}, NumPy {told['numpy']})"),
        ("machine", f"{told['cpu']}, {told['threads']} threads, {told['system']}"),
    ]
    rows += [
        ("CPU kernels", f"built with {module['compiler']} for {', '.join(module['simd_compiled'])}"),
        ("SIMD level", f"{module['simd_level']} (this CPU supports {', '.join(module['simd_supported'])})"),
        ("OpenMP", _openmp(openmp)),
    ]
    cuda, triton = told["cuda_module"], told["triton"]
    rows.append(("GPUs", ", ".join(told["gpus"]) or "none that torch can use"))
    rows.append(("CUDA kernels", cuda["built"] if cuda["available"] else f"not used: {cuda['reason']}"))
    rows.append(("Triton", triton["version"] if triton["available"] else f"not used: {triton['reason']}"))
    return [f"{name:<14}{value}" for name, value in rows]


def _openmp(openmp: dict[str, Any]) -> str:
    if openmp["runtime"] is None:
        return "the kernels were built without it and use one thread"
    if openmp["shared"] == "unknown":
        return "whether the kernels share torch's threads is unknown on this system"
    if openmp["shared"]:
        return f"{openmp['runtime']}, shared with torch"
    return f"{openmp['runtime']}, which is not torch's: two pools of threads may get in each other's way"
