"""Static proof of the CUDA kernels: what nvcc makes of them, judged without a GPU.

``make proof`` compiles every kernel for all architectures and writes docs/kernels.md;
``make proof ARGS="--arch 90a"`` judges for some and writes nothing.
"""
