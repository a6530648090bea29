"""Makes Triton's interpreter multiply matrices as a GPU does, and faster; for tests that run kernels in it."""

import numpy as np
import pytest
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


class _Kept:
    """What the interpreter takes for its changes of the language, and undoes after each launch."""

    def restore(self) -> None:
        pass


def keep_language_patched() -> None:
    """Lets the interpreter change the language once for each module of kernels, and not again in every launch and call.

    Looking for what to change took up to 40% of the time.  Nothing in these processes needs the language as it was:
    kernels are compiled in others.
    """
    patch, patched, kept = interpreter._patch_lang, set[int](), _Kept()
    if getattr(patch, "keeps", False):
        return

    def patch_once(fn):
        module = id(fn.__globals__)
        if module not in patched:
            patch(fn)
            patched.add(module)
        return kept

    patch_once.keeps = True  # type: ignore[attr-defined]
    interpreter._patch_lang = patch_once


def multiply_as_matrix_units(patch: pytest.MonkeyPatch) -> None:
    """Products added up 16 of the inner dimension at a time, in ascending order, in float32, whatever the shapes are.

    Matrix units do so too, one instruction at a time, so a sum does not depend on how many of them a loop iteration
    has.  The interpreter's own products go through a BLAS whose order depends on the shapes, and take bfloat16 for
    integers.  numpy reduces any axis but the last one number after the other.
    """

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        # Tests fill memory that no result may depend on with NaN.
        with np.errstate(invalid="ignore"):
            products = _numbers(a)[:, :, None] * _numbers(b)[None]
            rows, inner, columns = products.shape
            total = d.data
            for part in np.add.reduce(products.reshape(rows, inner // 16, 16, columns), axis=2).swapaxes(0, 1):
                total = total + part
        return TensorHandle(total, d.dtype.scalar)

    patch.setattr(InterpreterBuilder, "create_dot", create_dot)


def multiply_bfloat16(patch: pytest.MonkeyPatch) -> None:
    """Products of bfloat16 as of the float32 numbers they are; faster than `multiply_as_matrix_units`."""
    dot = InterpreterBuilder.create_dot

    def widened(handle):
        return TensorHandle(_numbers(handle), tl.float32) if handle.dtype.scalar.is_bf16() else handle

    patch.setattr(InterpreterBuilder, "create_dot", lambda self, a, b, *rest: dot(self, widened(a), widened(b), *rest))


def _numbers(handle) -> np.ndarray:
    if handle.dtype.scalar.is_bf16():
        return (handle.data.astype(np.uint32) << 16).view(np.float32)
    return handle.data.astype(np.float32)
