"""What a transformer's block does between its products, as kernels of ours for GPUs of NVIDIA.

Products are bound by arithmetic and left to torch; all between them is bound by memory, and here
read and written as few times as can be:

    adaln      norm, modulation, gate and residual
    attention  attention of few tokens, from the product's output to the next product's input
    gelu       GELU's backward
    blocks     blocks made of them, for eqm.compute

A product's bias costs nothing going forward, and going back the sum of a gradient over all tokens:
another reading of it. So who reads a product's output takes its bias too, which it does not use,
and sums the gradient while it writes it.

Float32 inside whatever goes in; differentiable once; sums in a fixed order, without atomics: the
same bits every time. Written in Triton, which also runs it, slowly, on a CPU where
TRITON_INTERPRET=1 is set: tests do. Opaque to torch.compile, which calls them where they stand.
"""
