"""A transformer's blocks by kernels of ours: for GPUs of NVIDIA, and for CPUs with AVX512-FP16.

For those CPUs, what torch has no quick instructions for, in C++ (train.precision "float16"):

    halves     layers and attention whose products are taken in float16

For GPUs, what a block does between its products (compute.fused). Products are bound by arithmetic
and left to torch; all between them, and what becomes of a weight's gradient, is bound by memory,
and here read and written as few times as can be:

    adaln      norm, modulation, gate and residual
    attention  attention of few tokens, from the product's output to the next product's input
    gelu       GELU's backward
    product    layers whose weights' gradients are added to an update's sum by the product itself
    blocks     blocks made of them, for eqm.compute

A product's bias costs nothing going forward, and going back the sum of a gradient over all tokens:
another reading of it. So who reads a product's output takes its bias too, which it does not use,
and sums the gradient while it writes it.

All are differentiable once, and sum in a fixed order, without atomics: the same bits every time.
Those for GPUs are float32 inside whatever goes in, and written in Triton, which also runs it,
slowly, on a CPU where TRITON_INTERPRET=1 is set: tests do. Opaque to torch.compile, which calls
them where they stand.
"""
