"""Functions of float32 in as few instructions as a GPU has for them.

Triton's own are also right for results that are denormal or out of a range, and take two to four times as many. In its
interpreter, which knows no instructions, these are what they come near to.
"""

import triton
import triton.language as tl

LOG2_E = 1.4426950408889634  # e^x is 2^(x log2 e)

if triton.knobs.runtime.interpret:

    @triton.jit
    def tanh(x):
        return 1.0 - 2.0 / (1.0 + tl.exp2(2.8853901 * x))

    @triton.jit
    def exp2(x):
        return tl.exp2(x)

    @triton.jit
    def silu(x):
        return x * tl.sigmoid(x)

else:

    @triton.jit
    def tanh(x):
        """Within 5e-4 of its value: less than half precision rounds off."""
        return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)

    @triton.jit
    def exp2(x):
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )

    @triton.jit
    def silu(x):
        """x sigmoid(x)."""
        denominator = 1.0 + exp2(-1.4426950 * x)
        return x * tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [denominator], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def gelu(x):
    """x Phi(x), where Phi(x) = (1 + tanh(x p(x^2))) / 2: a fit of p within 3.1e-6, that has no bend up to infinity."""
    u = x * x
    p = (((1.120348e-6 * u - 3.0602118e-5) * u - 1.2475871e-4) * u + 0.036468637) * u + 0.79782817
    return x * (0.5 + 0.5 * tanh(x * p))
