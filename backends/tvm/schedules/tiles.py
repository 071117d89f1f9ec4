"""Tiles: small contractions that a function of ``qc_kernels.h`` computes, as TVM's tensor intrinsics."""

from __future__ import annotations

from collections.abc import Mapping

from qcompile.backends.tvm.emit import load_tvm

_SCRIPT = """
@T.prim_func(s_tir=True)
def {function}(a: T.handle, w: T.handle, c: T.handle):
    {steps}
    A = T.match_buffer(a, {a_shape}, "{codes}", offset_factor=1{a_strides})
    W = T.match_buffer(w, {w_shape}, "int8", offset_factor=1{w_strides})
    C = T.match_buffer(c, {c_shape}, "int32", offset_factor=1{c_strides})
    with T.sblock("root"):
        T.reads(C[{c_all}], A[{a_all}], W[{w_all}])
        T.writes(C[{c_all}])
        {body}
"""
_DESCRIPTION = """for {loops} in T.grid({extents}):
            with T.sblock("acc"):
                {inner} = T.axis.remap("{kinds}", [{loops}])
                C[{c}] = C[{c}] + T.Cast("int32", A[{a}]) * T.Cast("int32", W[{w}])"""
_CALL = 'T.evaluate(T.call_extern("int32", "{call}", {a}, {w}, T.address_of(C[{c}]), {length}))'
#: Where weights are stored in another form than the expression has them in: their start, and the byte of the first row.
_STORED = "W.data, T.truncdiv(W.elem_offset, {logical}) * {stored}, {stored}"


def register_tile(
    call: str, contraction: str, extents: Mapping[str, int], codes: str = "int8", stored: tuple[int, int] | None = None
) -> str:
    """Register ``call(a, step of a, w, step of w, acc, length)`` as a tensor intrinsic, and return its name.

    Where weights are stored in a form of their own it is ``call(a, step of a, w, first byte, bytes of a row, acc,
    length)``.

    Parameters
    ----------
    call : str
        The C function: it adds to `acc`.
    contraction : str
        In Einstein's notation, such as ``pk,qk->pq``: axes of a, of w, and of acc; one is summed over.
    extents : mapping of str to int
        Of each axis; all above 1.
    codes : str
        Type of a.
    stored : tuple of int, optional
        Weights of a row, and the bytes that these are stored in.
    """
    tvm = load_tvm()
    operands, result = contraction.split("->")
    axes = {"a": operands.split(",")[0], "w": operands.split(",")[1], "c": result}
    (summed,) = set(extents) - set(result)
    order = [*result, summed]
    shapes = {f"{name}_shape": f"({', '.join(str(extents[axis]) for axis in each)},)" for name, each in axes.items()}
    whole = {f"{name}_all": ", ".join(f"0:{extents[axis]}" for axis in each) for name, each in axes.items()}
    description = _DESCRIPTION.format(
        loops=", ".join(order), extents=", ".join(str(extents[axis]) for axis in order),
        inner=", ".join(f"v{axis}" for axis in order), kinds="S" * len(result) + "R",
        **{name: ", ".join(f"v{axis}" for axis in each) for name, each in axes.items()},
    )  # fmt: skip
    plain = {"codes": codes} | dict.fromkeys(("a_strides", "w_strides", "c_strides"), "")
    body, strides = _implementation(call, axes, extents[summed], stored)
    strides["codes"] = codes
    first = _SCRIPT.format(function="description", steps="pass", body=description, **shapes, **whole, **plain)
    second = _SCRIPT.format(function="body", steps="s_a, s_w, s_c = T.int32(), T.int32(), T.int32()", body=body,
                            **shapes, **whole, **strides)  # fmt: skip
    name = f"{call}_{'_'.join(str(extents[axis]) for axis in order)}"  # `codes` and `stored` follow from these
    functions = (tvm.script.from_source(text.replace("    pass\n", "")) for text in (first, second))
    tvm.s_tir.TensorIntrin.register(name, *functions, override=True)
    return name


def _implementation(
    call: str, axes: Mapping[str, str], length: int, stored: tuple[int, int] | None
) -> tuple[str, dict[str, str]]:
    """Return the call, and the strides that it takes from the buffers."""
    strides = {f"{name}_strides": f", strides=[s_{name}, 1]" if len(each) == 2 else "" for name, each in axes.items()}
    given = {
        name: f"T.address_of({name.upper()}[{', '.join('0' * len(axes[name]))}]), "
        + (f"s_{name}" if len(axes[name]) == 2 else "0")
        for name in ("a", "w")
    }
    if stored is not None:
        given["w"] = _STORED.format(logical=stored[0], stored=stored[1])
    return _CALL.format(call=call, **given, c=", ".join("0" * len(axes["c"])), length=length), strides
