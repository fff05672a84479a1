"""The activations on the device: csrc/include/gencore/activations.h, step by step.

``x`` is a pointer to what is computed: elements of a half type have no use for the last bits of float32.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import triton
import triton.language as tl

from gencore.backends.triton.noise import exponential, multiply_add


@triton.jit
def exponential_for(t, x):
    """e^t; what is rounded to a half type next needs no more than the GPU's own, in a quarter of the instructions."""
    return tl.exp(t) if x.dtype.element_ty.primitive_bitwidth == 16 else exponential(t)


@triton.jit
def sigmoid(t, x):
    return 1.0 / (1.0 + exponential_for(-t, x))


@triton.jit
def silu(t, x):
    return t / (1.0 + exponential_for(-t, x))


@triton.jit
def silu_derivatives(t, x):
    """The first and the second."""
    s = sigmoid(t, x)
    first = s * multiply_add(t, 1.0 - s, 1.0)
    return first, s * (1.0 - s) * multiply_add(t, multiply_add(s, -2.0, 1.0), 2.0)


@triton.jit
def decay(t, x):
    """e^-|t|."""
    return exponential_for(-tl.abs(t), x)


@triton.jit
def bump(e):
    """The derivative of the sigmoid, of e = e^-|t|."""
    return e / (1.0 + e) / (1.0 + e)


@triton.jit
def exponential_less_one(t):
    """e^t - 1 for t <= 0."""
    if t.dtype == tl.float64:
        u = tl.exp(t)
        # Kahan's: what rounding u did to it, it did to its logarithm too.
        near = (u - 1.0) * t / tl.where((u == 1.0) | (u == 0.0), 1.0, tl.log(tl.where(u == 0.0, 1.0, u)))
        result = tl.where(u == 1.0, t, tl.where(u == 0.0, -1.0, near))
    else:
        t = tl.maximum(-104.0, t, propagate_nan=tl.PropagateNan.ALL)
        shifted = tl.fma(t, 1.4426950216293335, 12582912.0)
        n = shifted - 12582912.0
        r = tl.fma(n, -0.693147182464599609375, t)
        r = tl.fma(n, 1.904654299957767878541e-9, r)
        p = tl.fma(r, 0.0013815740821883082, 0.00836868118494749)
        p = tl.fma(p, r, 0.0416683629155159)
        p = tl.fma(p, r, 0.1666652113199234)
        p = tl.fma(p, r, 0.4999999403953552)
        power = shifted.to(tl.int32, bitcast=True) - 0x4B400000
        half = power >> 1
        low = ((half + 127) << 23).to(tl.float32, bitcast=True)
        scale = low * ((power - half + 127) << 23).to(tl.float32, bitcast=True)
        result = tl.fma(scale, tl.fma(r * r, p, r), scale - 1.0)
    return result


@triton.jit
def log_of_one_and(u):
    """ln(1 + u) for 0 <= u <= 1."""
    if u.dtype == tl.float64:
        v = 1.0 + u
        result = tl.where(v == 1.0, u, tl.log(v) * u / tl.where(v == 1.0, 1.0, v - 1.0))
    else:
        z = u / (2.0 + u)
        square, twice = z * z, z + z
        p = tl.fma(square, 0.14006394147872925, 0.14000819623470306)
        p = tl.fma(p, square, 0.20010769367218018)
        p = tl.fma(p, square, 0.3333320915699005)
        result = tl.fma(twice * square, p, twice)
    return result


@triton.jit
def normal_at(t, x):
    """The density of the standard normal distribution, and how much of it lies beyond |t|."""
    a = tl.abs(t)
    if t.dtype == tl.float64:
        density = 0.3989422804014327 * tl.exp(-0.5 * t * t)
        beyond = 0.5 - 0.5 * tl.erf(a * 0.7071067811865476)
    else:
        a = tl.minimum(16.0, a, propagate_nan=tl.PropagateNan.ALL)
        square = a * a
        rest = tl.fma(a, a, -square)
        bell = exponential_for(square * -0.5, x)
        bell = tl.fma(bell * -0.5, rest, bell)
        k = 1.0 / tl.fma(a, 0.26, 1.0)
        p = tl.fma(k, 0.030230147764086723, -0.15149374306201935)
        p = tl.fma(p, k, 0.24873186647891998)
        p = tl.fma(p, k, -0.1477879285812378)
        p = tl.fma(p, k, 0.15875785052776337)
        p = tl.fma(p, k, 0.05196518078446388)
        p = tl.fma(p, k, 0.10278859734535217)
        p = tl.fma(p, k, 0.10305098444223404)
        p = tl.fma(p, k, 0.10375702381134033)
        density = bell * 0.3989422804
        beyond = bell * k * p
    return density, beyond


@triton.jit
def tanh(t):
    m = exponential_less_one(-2.0 * tl.abs(t))
    negative = m / (m + 2.0)
    return tl.where(t > 0.0, -negative, negative)


@triton.jit
def value_of(t, x, slope, FUNCTION: tl.constexpr):
    if FUNCTION == "piecewise_linear":
        y = t * tl.where(t > 0.0, 1.0, slope)
    elif FUNCTION == "silu":
        y = silu(t, x)
    elif FUNCTION == "sigmoid":
        y = sigmoid(t, x)
    elif FUNCTION == "tanh":
        y = tanh(t)
    elif FUNCTION == "elu":
        y = tl.where(t > 0.0, t, slope * exponential_less_one(tl.where(t > 0.0, 0.0, t)))
    elif FUNCTION == "softplus":
        y = tl.where(t < 0.0, 0.0, t) + log_of_one_and(decay(t, x))
    else:
        _, beyond = normal_at(t, x)
        y = t * tl.where(t > 0.0, 1.0 - beyond, beyond)
    return y


@triton.jit
def first_of(t, x, slope, FUNCTION: tl.constexpr):
    if FUNCTION == "piecewise_linear":
        d = tl.where(t > 0.0, 1.0, slope)
    elif FUNCTION == "silu":
        d, _ = silu_derivatives(t, x)
    elif FUNCTION == "sigmoid":
        d = bump(decay(t, x))
    elif FUNCTION == "tanh":
        d = 4.0 * bump(decay(2.0 * t, x))
    elif FUNCTION == "elu":
        d = tl.where(t > 0.0, 1.0, slope * exponential_for(tl.where(t > 0.0, 0.0, t), x))
    elif FUNCTION == "softplus":
        d = sigmoid(t, x)
    else:
        density, beyond = normal_at(t, x)
        d = multiply_add(t, density, tl.where(t > 0.0, 1.0 - beyond, beyond))
    return d


@triton.jit
def second_of(t, x, slope, FUNCTION: tl.constexpr):
    if FUNCTION == "piecewise_linear":
        d = t * 0.0
    elif FUNCTION == "silu":
        _, d = silu_derivatives(t, x)
    elif FUNCTION == "sigmoid":
        e = decay(t, x)
        d = bump(e) * ((e - 1.0) / (e + 1.0))
        d = tl.where(t > 0.0, d, -d)
    elif FUNCTION == "tanh":
        d = -2.0 * tanh(t) * first_of(t, x, slope, FUNCTION)
    elif FUNCTION == "elu":
        d = tl.where(t > 0.0, 0.0, slope * exponential_for(tl.where(t > 0.0, 0.0, t), x))
    elif FUNCTION == "softplus":
        d = bump(decay(t, x))
    else:
        density, _ = normal_at(t, x)
        d = density * multiply_add(-t, t, 2.0)
    return d
