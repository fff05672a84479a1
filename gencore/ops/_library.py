"""How an op enters PyTorch's dispatcher, and when a call may pass the dispatcher by, written once.

Every op is a ``torch.library`` op with a schema, a fake and, where it has one, its gradient. Which backend's kernel
runs is decided at every call, by :mod:`gencore.backends.choice`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from string import ascii_lowercase
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gencore._torch import (
    compiled_as_constant,
    has_tangents,
    is_batched_gradient,
    is_fake,
    is_forward_mode,
    is_transformed,
    is_wrapped,
    quick_apply,
    transforms,
    unwrapped,
    when_imported,
)
from gencore._torch import is_unobserved as is_unobserved
from gencore.backends import choice

_library = torch.library.Library("gencore", "DEF")
PLAIN_TYPES = frozenset((Tensor, torch.nn.Parameter))


class Layout(NamedTuple):
    """One way to share out the work of an op: along which dimension of which tensors.

    What ``inputs`` does not name, every process has whole. An output whose dimension is None is the sum of what the
    processes have. Samples have a key each then, so that a process makes the noise of its own.
    """

    inputs: Mapping[str, int]
    outputs: Sequence[int | None]


Layouts = Callable[[Mapping[str, Any]], Sequence[Layout]]


class Out(NamedTuple):
    """How results of an op are written to tensors that are given: by the op ``<name>_out``.

    Attributes:
        memory_format: the format of the results, for the first argument.
        names: of those tensors, each for a result, in their order; one that ends in ``?`` may be left out.
        options: further arguments of the kernel, which come after the tensors to write to.
        others: whether the op gives the results that are not written.
    """

    memory_format: Callable[[Tensor], torch.memory_format]
    names: Sequence[str] = ("out",)
    options: Sequence[Any] = ()
    others: bool = False


class Op:
    """A ``torch.library`` op, and the ways to it. Calling it takes the cheapest one that is right for the arguments.

    - No observer, no gradient wanted: the kernel itself.
    - No observer, a gradient wanted: an ``autograd.Function`` around the kernel, a third of the library op's cost.
    - Forward-mode differentiation of an op without a ``jvp``, and transforms of ``torch.func`` that are compiled: the
      definition, in PyTorch's operations, whose derivatives of any order are known.
    - Another transform of ``torch.func``, which tensors do not show: a Function that they know.
    - Everything else (the compiler, modes, subclasses, views with a negative bit): the library op.

    What it writes to may be any tensor: autograd is told of it, and where the sign is a bit of the tensor, which the
    dispatcher cannot resolve in what an op writes to, it goes through another one.
    """

    def __init__(
        self,
        name: str,
        library: Callable[..., Any],
        setup_context: Callable[..., None] | None,
        backward: Callable[..., Any] | None,
        definition: Callable[..., Any] | None,
        jvp: Callable[..., Any] | None,
        keeping: Callable[..., Any] | None = None,
        into: Op | None = None,
    ):
        self.name = name
        self.library = library
        self._into = into
        self._written = _written.get(name, ())
        self._definition = definition
        self._has_jvp = jvp is not None
        self._transformed: Any = None
        # The way of plain tensors, one of which wants a gradient, while nothing observes the call.
        self.with_gradient: Any = None
        if backward is None:
            return

        class Eager(torch.autograd.Function):
            # With a setup_context of its own, apply() would look at the signature at every call: 15 microseconds.
            @staticmethod
            def forward(ctx: Any, *args: Any) -> Any:
                outputs, kept = (run_kernel(name, args), None) if keeping is None else keeping(*args)
                if setup_context is not None:
                    setup_context(ctx, args, outputs)
                if kept is not None:
                    # Saved as the others are, so that hooks of saved tensors move it too.
                    ctx.save_for_backward(*ctx.to_save, kept)
                return outputs

        class Transformed(torch.autograd.Function):
            generate_vmap_rule = True

            @staticmethod
            def forward(*args: Any) -> Any:
                return library(*args)

        setup = setup_context or _nothing
        if jvp is not None:
            Transformed.jvp = staticmethod(jvp)  # type: ignore[method-assign]
            setup = _saving_for_forward(setup)
        Eager.backward = staticmethod(backward)  # type: ignore[method-assign]
        Transformed.backward = staticmethod(backward)  # type: ignore[method-assign]
        Transformed.setup_context = staticmethod(setup)  # type: ignore[method-assign]
        self._transformed = Transformed
        self.with_gradient = quick_apply(Eager)

    def into(self, *args: Any) -> Any:
        """The op with the tensors to write to as its last arguments; see :class:`Out`."""
        assert self._into is not None
        return self._into(*args)

    def defined(self, *args: Any) -> Any:
        """The op in PyTorch's operations, as its definition has it."""
        assert self._definition is not None
        return self._definition(*args)

    def __call__(self, *args: Any) -> Any:
        if self._written and not torch.compiler.is_compiling():
            for place in self._written:
                if args[place] is not None and args[place].is_neg():
                    other = torch.empty_like(args[place])
                    results = self(*args[:place], other, *args[place + 1 :])
                    args[place].copy_(other)
                    return results
        if self.name in _optional and not has_kernel(self.name, args):
            return _optional[self.name][1](*args)
        if not is_unobserved():
            if is_transformed():
                if self._definition is not None and needs_definition(args, self._has_jvp):
                    return self._definition(*args)
                if self._transformed is not None and not torch.compiler.is_compiling():
                    return self._transformed.apply(*(_Whole(arg) if type(arg) is list else arg for arg in args))
            return self.library(*args)
        wanted = False
        for arg in args:
            if type(arg) in PLAIN_TYPES:
                if not (arg.is_cpu or arg.is_cuda) or arg.is_neg():
                    return self.library(*args)
                wanted = wanted or arg.requires_grad
            elif isinstance(arg, Tensor):
                return self.library(*args)
        if wanted and self.with_gradient is not None and torch.is_grad_enabled():
            return self.with_gradient(*args)
        return run_kernel(self.name, args)


class _Whole(list):
    """A list that transforms of ``torch.func`` do not take for as many arguments."""


def _run(name: str, args: Sequence[Any]) -> Any:
    outputs = kernel_for(name, args)(*args)
    for place in _written.get(name, ()):
        if args[place] is not None:
            # Autograd must know that what it may have saved was written over.
            torch.autograd.graph.increment_version(args[place])
    return outputs


def run_kernel(name: str, args: tuple[Any, ...]) -> Any:
    try:
        return _run(name, args)
    except RuntimeError:
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        # Tensors without memory, which nothing but their use tells from others: several gradients in one ...
        if any(map(is_batched_gradient, tensors)):
            return getattr(torch.ops.gencore, name).default(*args)
        # ... and what a transform of torch.func that is over leaves around the tensors that left it.
        if not any(map(is_wrapped, tensors)):
            raise
        return _run(name, unwrapped(args))


_composed: dict[str, Callable[..., Any]] = {}
# The places of the arguments that ops write to.
_written: dict[str, tuple[int, ...]] = {}
# Ops that not every backend can run: the kernel that they take, and their definitions.
_optional: dict[str, tuple[str, Callable[..., Any]]] = {}
_flops: dict[str, Callable[..., int]] = {}
_layouts: dict[str, Layouts] = {}


_is_explaining: ContextVar[bool] = ContextVar("_is_explaining", default=False)


@contextmanager
def explaining() -> Iterator[None]:
    """Within it every op is called that would be, whether or not a backend has it. Other threads do not notice."""
    token = _is_explaining.set(True)
    try:
        yield
    finally:
        _is_explaining.reset(token)


def optional_kernel(name: str) -> str | None:
    """The kernel of an op that not every backend can run; None of others."""
    return _optional[name][0] if name in _optional else None


def kernel_for(name: str, args: Sequence[Any]) -> Callable[..., Any]:
    """The kernel where the first tensor of ``args`` is; the key, which comes after, may be on the CPU."""
    if name in _composed:
        return _composed[name]
    first = next(arg for arg in args if isinstance(arg, Tensor))
    if name in _optional and not has_kernel(name, args):
        return _optional[name][1]
    return choice.kernel(name, first)


@compiled_as_constant
def _is_served(kernel: str, device: torch.device) -> bool:
    return choice.has_kernel(kernel, torch.empty(0, device=device))


def has_kernel(name: str, args: Sequence[Any]) -> bool:
    """Whether the backend that serves the tensors has what an optional op runs; the compiler's have all."""
    first = next(arg for arg in args if isinstance(arg, Tensor))
    try:
        if first.is_meta or is_fake(first):
            return True
        if torch.compiler.is_compiling():
            return _is_served(_optional[name][0], first.device)
        return _is_explaining.get() or choice.has_kernel(_optional[name][0], first)
    except choice.NoBackend:
        return True


def _without_autocast(definition: Callable[..., Any]) -> Callable[..., Any]:
    """A definition in the types that it says, also where autocast would have others."""

    @functools.wraps(definition)
    def run(*args: Any) -> Any:
        kind = next(arg for arg in args if isinstance(arg, Tensor)).device.type
        if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
            return definition(*args)
        with torch.autocast(kind, enabled=False):
            return definition(*args)

    return run


def _nothing(ctx: Any, inputs: Any, output: Any) -> None:
    """The ``setup_context`` of an op that keeps nothing for its gradient."""


def _saving_for_forward(setup_context: Callable[..., None]) -> Callable[..., None]:
    """A ``setup_context`` that saves for forward mode, where it is on, what it saves for the gradient.

    Else it does not: a result that is saved so keeps itself, being part of its own graph, until garbage is collected.
    """

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        setup_context(_SavingForBoth(ctx) if is_forward_mode() else ctx, inputs, output)

    return setup


class _SavingForBoth:
    """A context of a Function that saves tensors for forward mode too.

    It is given them as they are under ``vmap``: what was saved no longer tells which dimension is mapped over.
    """

    def __init__(self, ctx: Any):
        self.__dict__["_ctx"] = ctx

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._ctx, name, value)

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self._ctx.save_for_backward(*tensors)
        self._ctx.save_for_forward(*tensors)


def widened(value: Any) -> Any:
    """A tensor of a half type in float32, as definitions compute it; anything else as it is."""
    return value.float() if isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16) else value


def needs_definition(args: Sequence[Any], has_jvp: bool) -> bool:
    """Whether a transform needs the operations that an op is made of."""
    forward, reverse, others = transforms()
    if torch.compiler.is_compiling():
        # The compiler cannot look into a Function that a transform is to see; mapping needs none.
        return is_forward_mode() or reverse > 0
    # Derivatives of derivatives forwards, and tangents of autograd's that are mapped over, a rule would get wrong.
    if forward > 1 or (forward == 0 and is_forward_mode() and reverse + others > 0):
        return True
    return not has_jvp and has_tangents(args)


def pull_back(function: Callable[..., Any], inputs: Sequence[Tensor], grads: Any) -> tuple[Tensor, ...]:
    """The gradients of a function's inputs for those of its outputs, which may be differentiated again."""
    pulled: Any = torch.func.vjp(function, *inputs)
    return tuple(pulled[1](grads))


def arguments_of(ctx: Any) -> list[Any]:
    """The arguments of an op whose ``setup_context`` is that of :func:`by_definition`."""
    args = list(ctx.others)
    for place, tensor in zip(ctx.places, ctx.saved_tensors, strict=True):
        args[place] = tensor
    return args


def by_definition(
    definition: Callable[..., Any], constants: Sequence[int]
) -> tuple[Callable[..., None], Callable[..., Any]]:
    """The autograd formula of an op, ``setup_context`` and ``backward``, as PyTorch differentiates its definition.

    It may be differentiated again, to any order. The arguments at the places ``constants`` have no gradient.
    """

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.others = [None if isinstance(arg, Tensor) else arg for arg in inputs]
        ctx.places = [place for place, arg in enumerate(inputs) if isinstance(arg, Tensor)]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*(inputs[place] for place in ctx.places))

    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        args = arguments_of(ctx)
        wanted = [place for place in ctx.places if ctx.needs_input_grad[place] and place not in constants]
        used = [number for number, grad in enumerate(grads) if grad is not None]
        results: list[Tensor | None] = [None] * len(args)
        if wanted and used:

            def of_wanted(*given: Tensor) -> tuple[Tensor, ...]:
                whole = list(args)
                for place, tensor in zip(wanted, given, strict=True):
                    whole[place] = tensor
                outputs = definition(*whole)
                outputs = outputs if isinstance(outputs, tuple) else (outputs,)
                return tuple(outputs[number] for number in used)

            inputs = tuple(args[place] for place in wanted)
            pulled = pull_back(of_wanted, inputs, tuple(grads[number] for number in used))
            for place, result in zip(wanted, pulled, strict=True):
                results[place] = result
        return tuple(results)

    return setup_context, backward


def define(
    signature: str,
    *,
    fake: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
    composed: Callable[..., Any] | None = None,
    flops: Callable[..., int] | None = None,
    layouts: Layouts | None = None,
    batched: Callable[..., Any] | None = None,
    definition: Callable[..., Any] | None = None,
    made_again: Sequence[str] = (),
    jvp: Callable[..., Any] | None = None,
    optional: str | None = None,
    keeping: Callable[..., Any] | None = None,
    out: Out | None = None,
) -> Op:
    """Registers an op.

    Args:
        signature: the schema, such as ``"normal_(Tensor(a!) out, Tensor key) -> ()"``. Every backend has the kernel
            under this name. It may return None for one of several outputs, which then is an empty tensor like the first
            argument.
        fake: gives outputs of the right shapes, dtypes and strides for inputs without data.
        setup_context, backward: the autograd formula, as :func:`torch.library.register_autograd` takes it.
        composed: what runs instead of a kernel of that name, where an op is another one's kernel called in another way.
        flops: the floating-point operations of matrix products, from the shapes of the tensors and the other arguments,
            as :func:`torch.utils.flop_counter.register_flop_formula` takes it.
        batched: the op under ``torch.func.vmap``, as :func:`torch.library.register_vmap` takes it; without it, calls
            are made one by one, which those of an op that writes to its arguments cannot be.
        layouts: how the work on a DTensor may be shared out; see :class:`Layout`.
        definition: the op in PyTorch's operations: its derivatives in forward mode are this one's, and so is the
            gradient of an op without a ``backward``, such as one that is itself a gradient.
        made_again: the arguments that follow from others, as results of the forward pass do: the definition makes them
            again, so they have no gradient of their own.
        jvp: the derivative in forward mode, as :class:`torch.autograd.Function` takes it, from what ``setup_context``
            saves for the gradient.
        optional: the kernel that it takes, where not every backend has it: the definition is then run.
        keeping: ``(*args)``, what runs instead of the kernel where nothing observes the call and a gradient is wanted:
            it gives the output, and None or a tensor, of no more memory than the gradient, that is saved behind what
            ``setup_context`` saves.
        out: how its results may be written to tensors that are given: :meth:`Op.into` then does that.
    """
    name, _, arguments_and_returns = signature.partition("(")
    arguments = arguments_and_returns.partition(") -> ")[0].split(", ")
    written = tuple(place for place, argument in enumerate(arguments) if "!" in argument)
    if written:
        _written[name] = written
    if composed is not None:
        _composed[name] = composed
    if definition is not None:
        definition = _without_autocast(definition)
        if optional is not None:
            _optional[name] = optional, definition
    # Kernels take any strides, but the fake derives the output's from the input's, so they must be the same ones.
    _library.define(signature, tags=(torch.Tag.needs_exact_strides,))

    def dispatched(*args: Any) -> Any:
        outputs = _run(name, args)
        if isinstance(outputs, tuple):
            # None is a gradient that is not wanted; the dispatcher wants a tensor in its place.
            first = next(arg for arg in args if isinstance(arg, Tensor))
            return tuple(first.new_empty(0) if output is None else output for output in outputs)
        return outputs

    for device in ("CPU", "CUDA"):
        _library.impl(name, dispatched, device)
    torch.library.register_fake(f"gencore::{name}", fake, lib=_library)
    if backward is None and definition is not None:
        names = [argument.partition("=")[0].rpartition(" ")[2] for argument in arguments]
        setup_context, backward = by_definition(definition, [names.index(given) for given in made_again])
    if backward is not None:
        setup = setup_context or _nothing
        torch.library.register_autograd(f"gencore::{name}", backward, setup_context=setup, lib=_library)
    if batched is not None:
        torch.library.register_vmap(f"gencore::{name}", batched, lib=_library)
    if flops is not None:
        _flops[name] = flops
    if layouts is not None:
        _layouts[name] = layouts
    into = None if out is None else _define_into(signature, out, fake, layouts)
    library = getattr(torch.ops.gencore, name).default
    return Op(name, library, setup_context, backward, definition, jvp, keeping, into)


def _define_into(signature: str, out: Out, fake: Callable[..., Any], layouts: Layouts | None) -> Op:
    """Registers the op that writes results of another one to tensors that are given."""
    head, _, returns = signature.partition(") -> ")
    name, given = head.partition("(")[0], len(out.names)
    tensors = [
        f"Tensor({letter}!){'?' * tensor.endswith('?')} {tensor.rstrip('?')}"
        for letter, tensor in zip(ascii_lowercase[:given], out.names, strict=True)
    ]
    others = returns.strip("()").split(", ")[given:] if out.others else []

    def compute(x: Tensor, *args: Any) -> Any:
        wanted = args[-given:]
        x = x.contiguous(memory_format=out.memory_format(x))
        made = [one if one is None or one.stride() == x.stride() else torch.empty_like(x) for one in wanted]
        results = choice.kernel(name, x)(x, *args[:-given], *made, *out.options)
        for one, other in zip(wanted, made, strict=True):
            if other is not one:
                one.copy_(other)
        if not others:
            return None
        results = tuple(x.new_empty(0) if result is None else result for result in results[given:])
        return results if len(others) > 1 else results[0]

    def fake_others(*args: Any) -> Any:
        if not others:
            return None
        results = fake(*args[:-given])[given:]
        return results if len(others) > 1 else results[0]

    def layouts_into(args: Mapping[str, Any]) -> list[Layout]:
        assert layouts is not None
        names = [tensor.rstrip("?") for tensor in out.names]
        return [
            Layout({**way.inputs, **dict.fromkeys(names, way.outputs[0])}, way.outputs[given:])  # type: ignore[dict-item]
            for way in layouts(args)
        ]

    return define(
        f"{name}_out({', '.join([head.partition('(')[2], *tensors])}) -> ({', '.join(others)})",
        fake=fake_others,
        composed=compute,
        layouts=None if layouts is None else layouts_into,
    )


def _register_flops() -> None:
    from torch.utils.flop_counter import register_flop_formula

    for name, formula in _flops.items():
        register_flop_formula(getattr(torch.ops.gencore, name))(formula)


def _register_layouts() -> None:
    from gencore.ops._sharding import register

    for name, layouts in _layouts.items():
        register(name, layouts, _library)


def register_rules() -> None:
    """Tells what counts and what distributes tensors about the ops, once that is imported."""
    when_imported("torch.utils.flop_counter", _register_flops)
    when_imported("torch.distributed.tensor", _register_layouts)
