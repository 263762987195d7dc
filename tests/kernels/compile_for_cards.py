"""Compile the large kernels for cards that need not be here, and print the shared memory that each takes.

Run by `test_cards.py` in a process of its own, because there Triton must not interpret.
Arguments, one a card: compute capability and the bytes that a program may have, as 89:101376 for 8.9.
"""

import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from alpamayo_dflash.kernels import attention, fp8_triton, product, resize, waypoints

HEADS, KV_HEADS, DIM = 32, 8, 128  # R1's
EXPERT_HEADS = 16
POINTERS = {"length_ptr": "*i64", "mask_ptr": "*u8", "top_ptr": "*fp32", "mass_ptr": "*fp32"}
POINTERS |= {"texts_ptr": "*i32", "slots_ptr": "*i32"}
POINTERS |= {"codes_ptr": "*u8", "scales_ptr": "*fp32"}
POINTERS |= {"images_ptr": "*u8", "first_ptr": "*i32", "weights_ptr": "*i32", "resized_ptr": "*u8"}


def shared(kernel, constants, *, warps, stages, capability, floats=()):
    """Bytes of shared memory, with pointers and sizes as the runtime finds them: multiples of 16."""
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        if name.endswith("_ptr"):
            float32 = name in floats
            signature[name] = POINTERS.get(name, "*fp32" if float32 else "*bf16")
        else:
            signature[name] = "fp32" if name == "scale" else "i32"
        if name.endswith("_ptr") or name in ("inner", "columns", "x_stride", "part_inner"):
            attributes[index,] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": warps, "num_stages": stages}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).metadata.shared


def main():
    for card in sys.argv[1:]:
        compile_for(*map(int, card.split(":")))


def compile_for(capability, available):
    for rows, blocks, gated in (
        (16, product._NARROW, False),
        (16, product._NARROW_GATED, True),
        (64, product._NARROW, False),
        (64, product._WIDE_GATED, True),
    ):
        constants = {"GATED": gated, "SWAP": blocks.swap, "BLOCK_R": rows}
        constants |= {"BLOCK_N": blocks.columns, "BLOCK_K": blocks.inner}
        stages = blocks.staged(rows, gated, available)
        taken = shared(
            product.product_kernel, constants, warps=blocks.warps, stages=stages, capability=capability
        )
        print(capability, f"product of {rows} rows, gated {gated}, {stages} stages", taken, sep="\t")
    for folded, plan in attention._PLANS.items():
        fitted = plan.fitted(DIM, available)
        constants = {"HEADS": HEADS, "KV_HEADS": KV_HEADS, "DIM": DIM}
        constants |= {"BLOCK_M": fitted.rows, "BLOCK_T": fitted.keys}
        taken = shared(
            attention.stretches_kernel,
            constants,
            warps=fitted.warps,
            stages=fitted.stages,
            capability=capability,
            floats=("out_ptr",),
        )
        print(capability, f"attention of up to {folded} folded rows, {fitted}", taken, sep="\t")
    for folded, plan in waypoints.PLANS.items():
        fitted, alone = plan.fitted(DIM, available), plan.count == 1
        constants = {"HEADS": EXPERT_HEADS, "KV_HEADS": KV_HEADS, "DIM": DIM, "ALONE": alone}
        constants |= {"BLOCK_M": fitted.rows, "BLOCK_T": fitted.keys}
        taken = shared(
            waypoints.waypoints_kernel,
            constants,
            warps=fitted.warps,
            stages=fitted.stages,
            capability=capability,
            floats=() if alone else ("out_ptr",),
        )
        print(capability, f"way-points' attention, {folded} folded rows, {fitted}", taken, sep="\t")
    compile_images_for(capability)
    # Older cards' Triton has no conversion to e4m3: these would not compile with it.
    for kind in ("plain", "gated", "gelu"):
        constants = {"KIND": kind, "NATIVE": capability >= 89, "BLOCK_A": 4096, "BLOCK_B": 256}
        taken = shared(fp8_triton.cast_kernel, constants, warps=8, stages=3, capability=capability)
        print(capability, f"cast of rows, {kind}", taken, sep="\t")


def compile_images_for(capability):
    for kernel, tile, names in (
        (resize.across_kernel, resize.ACROSS, ("BLOCK_R", "BLOCK_B")),
        (resize.down_kernel, resize.DOWN, ("BLOCK_R", "BLOCK_X")),
    ):
        constants = {"TAPS": 14, "BITS": 16, "UNROLL": tile.unroll}
        constants |= dict(zip(names, (tile.rows, tile.columns), strict=True))
        if kernel is resize.down_kernel:
            constants |= {"PATCH": 16, "MERGE": 2, "TEMPORAL": 2}
        taken = shared(kernel, constants, warps=tile.warps, stages=3, capability=capability)
        print(capability, kernel.fn.__name__, taken, sep="\t")


if __name__ == "__main__":
    main()
