"""Noise and exp on the device: csrc's philox.h and math.h, operation by operation, so that the bits are theirs.

Nothing here may be contracted: multiply-adds that shall be fused say fma, and every kernel is launched with
``enable_fp_fusion=False``.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Where the steps of NVIDIA's square root are known to round correctly; other vendors' reciprocal roots are others.
_NVIDIA = tl.constexpr(torch.version.hip is None)


@triton.jit
def philox(c0, c1, c2, c3, k0, k1):
    """The four words of blocks of Philox4x32-10. All arguments are uint32 and broadcast."""
    for _ in tl.static_range(10):
        # A product in 64 bits is one instruction; its two halves on their own would be two.
        p0 = c0.to(tl.uint64) * 0xD2511F53
        p1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c1 = p1.to(tl.uint32)
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c3 = p0.to(tl.uint32)
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def square_root(a):
    """The square root, correctly rounded, of 0 or of a number from 2^-100 to 2^100.

    These are the steps of NVIDIA's sqrt.rn.f32 in that range, without its branch for the rest, which would part the
    instructions before it from those after it.

    They round correctly given NVIDIA's rsqrt.approx, not given any reciprocal root: taken from the correctly rounded
    one, an error of one unit in its last place would break 3 of the 2^24 mantissas. Tests compare all of them.
    """
    if _NVIDIA:
        # Of 0 this takes the root of 2^-100 instead: infinity times 0 would be NaN.
        reciprocal = tl.rsqrt(tl.maximum(a, 7.888609052210118e-31))
        root = a * reciprocal
        root = tl.fma(tl.fma(-root, root, a), reciprocal * 0.5, root)
    else:
        root = tl.sqrt_rn(a)
    return root


@triton.jit
def box_muller(word0, word1):
    """Two standard normals of two words. The definition, with its reasons, is gencore.noise.box_muller."""
    u = tl.fma(word0.to(tl.float32), 2.3283064365386963e-10, 1.1641532182693481e-10)
    bits = u.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23
    f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    q = tl.fma(f, -0.17537200450897217, 0.2861766219139099)
    q = tl.fma(q, f, -0.29812416434288025)
    q = tl.fma(q, f, 0.3313974142074585)
    q = tl.fma(q, f, -0.3992644250392914)
    q = tl.fma(q, f, 0.5000360012054443)
    q = tl.fma(q, f, -0.6666783690452576)
    q = tl.fma(q, f, 0.9999998211860657)
    tail = tl.fma(f * f, q, f * -2.0)
    radius = square_root(tl.fma(exponent.to(tl.float32), -1.3862943649291992, tail))
    turned = (radius.to(tl.uint32, bitcast=True) ^ (word1 & 0x80000000)).to(tl.float32, bitcast=True)

    s = (word1 << 2).to(tl.int32, bitcast=True).to(tl.float32) * 2.3283064365386963e-10
    square = s * s
    sine = tl.fma(square, -0.004601658321917057, 0.07968003302812576)
    sine = tl.fma(sine, square, -0.6459634900093079)
    sine = s * tl.fma(sine, square, 1.5707963705062866)
    cosine = tl.fma(square, -0.020418191328644753, 0.2536035478115082)
    cosine = tl.fma(square, tl.fma(cosine, square, -1.233697772026062), 1.0)
    mirrored = (word1 & 0x40000000) != 0
    return turned * tl.where(mirrored, sine, cosine), turned * tl.where(mirrored, cosine, sine)


@triton.jit
def unit_uniform(word):
    """Uniform in [0, 1) with the upper 24 bits of a word."""
    return (word >> 8).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08


@triton.jit
def exponential(x):
    """e^x: in float32 with the bits that the other backends give, in float64 by the library."""
    return tl.exp(x) if x.dtype == tl.float64 else exponential32(x)


@triton.jit
def exponential32(x):
    """gencore::exp of gencore/math.h."""
    x = tl.minimum(89.0, x, propagate_nan=tl.PropagateNan.ALL)
    x = tl.maximum(-104.0, x, propagate_nan=tl.PropagateNan.ALL)
    # Adding 1.5 * 2^23 rounds to an integer, which the low bits of the sum then hold.
    shifted = tl.fma(x, 1.4426950216293335, 12582912.0)
    n = shifted - 12582912.0
    r = tl.fma(n, -0.693147182464599609375, x)
    r = tl.fma(n, 1.904654299957767878541e-9, r)
    p = tl.fma(r, 0.0013815740821883082, 0.00836868118494749)
    p = tl.fma(p, r, 0.0416683629155159)
    p = tl.fma(p, r, 0.1666652113199234)
    p = tl.fma(p, r, 0.4999999403953552)
    mantissa = 1.0 + tl.fma(r * r, p, r)
    # 2^n in two factors, so that e^x underflows gradually.
    power = shifted.to(tl.int32, bitcast=True) - 0x4B400000
    half = power >> 1
    low = ((half + 127) << 23).to(tl.float32, bitcast=True)
    high = ((power - half + 127) << 23).to(tl.float32, bitcast=True)
    return mantissa * low * high


@triton.jit
def multiply_add(a, b, c):
    """a * b + c, fused in float32 and not in float64, as the CPU kernels do."""
    return a * b + c if a.dtype == tl.float64 else tl.fma(a, b, c)


@triton.jit
def words_of_rows(key, seed, stream, sample, row, inside, PER_SAMPLE: tl.constexpr):
    """What the noise of rows begins with: (seed low, seed high, stream, sample id low, sample id high).

    Without a `key`, the three words are arguments of the launch. A `key` on the device, here halves of its words, is
    read when the kernel runs, so that new words give new noise when a captured graph is replayed. It is read in halves
    because the compiler would do all of Philox in 64 bits if it saw words cut in two.
    """
    if key is None:
        sample = sample + row
        seed_low, seed_high = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
        stream_low = stream.to(tl.uint32)
    elif PER_SAMPLE:
        of_row = key + 6 * row
        seed_low = tl.load(of_row, inside, other=0).to(tl.uint32, bitcast=True)
        seed_high = tl.load(of_row + 1, inside, other=0).to(tl.uint32, bitcast=True)
        stream_low = tl.load(of_row + 2, inside, other=0).to(tl.uint32, bitcast=True)
        sample_low = tl.load(of_row + 4, inside, other=0).to(tl.uint32, bitcast=True)
        sample_high = tl.load(of_row + 5, inside, other=0).to(tl.uint32, bitcast=True)
    else:
        seed_low, seed_high = tl.load(key).to(tl.uint32, bitcast=True), tl.load(key + 1).to(tl.uint32, bitcast=True)
        stream_low = tl.load(key + 2).to(tl.uint32, bitcast=True)
        first_low, first_high = tl.load(key + 4).to(tl.uint32, bitcast=True), tl.load(key + 5)
        sample = first_low.to(tl.int64) + (first_high.to(tl.int64) << 32) + row
    if not PER_SAMPLE:
        sample_low, sample_high = sample.to(tl.uint32), (sample >> 32).to(tl.uint32)
    return seed_low, seed_high, stream_low, sample_low, sample_high


@triton.jit
def values_of_blocks(block, words, UNIFORM: tl.constexpr):
    """The four values of each block."""
    seed_low, seed_high, stream, sample_low, sample_high = words
    w0, w1, w2, w3 = philox(block, stream, sample_low, sample_high, seed_low, seed_high)
    if UNIFORM:
        v0, v1, v2, v3 = unit_uniform(w0), unit_uniform(w1), unit_uniform(w2), unit_uniform(w3)
    else:
        v0, v1 = box_muller(w0, w1)
        v2, v3 = box_muller(w2, w3)
    return v0, v1, v2, v3
