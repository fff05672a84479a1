"""What :func:`gencore.integrations.diffusers.accelerate` says of the parts that it replaced or left."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

ALREADY = "it runs on gencore's kernels already"


class Part(NamedTuple):
    """A part of what was given to :func:`accelerate`, and what was done with it.

    Attributes:
        name: its path, as ``named_modules`` has it; "scheduler" for a scheduler.
        type: the name of its class.
        what: what runs it now; or, if it runs as it was, why.
    """

    name: str
    type: str
    what: str


@dataclass(frozen=True)
class Explanation:
    """What was replaced, and what was not. Printed, it is a few lines of text."""

    replaced: tuple[Part, ...]
    kept: tuple[Part, ...]

    def __str__(self) -> str:
        lines = []
        for title, parts in (("replaced", self.replaced), ("left as it was", self.kept)):
            groups: dict[tuple[str, str], list[str]] = {}
            for part in parts:
                groups.setdefault((part.type, part.what), []).append(part.name)
            lines.append(f"{title}: {len(parts) or 'nothing'}")
            for (kind, what), names in groups.items():
                lines.append(f"  {len(names)} {kind}: {what}")
                lines.append(f"    {', '.join(names)}")
        return "\n".join(lines)


class Replacement(Protocol):
    """A part that was given another implementation, or was left."""

    def told(self) -> tuple[Part, bool] | None:
        """The part, and whether it runs on our kernels as it is now; None if another part speaks for it."""
        ...

    def undo(self) -> None: ...


class Left(NamedTuple):
    """A part that was left as it was."""

    part: Part

    def told(self) -> tuple[Part, bool]:
        return self.part, False

    def undo(self) -> None:
        pass
