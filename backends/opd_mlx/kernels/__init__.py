"""Functions that only MLX needs.

- `activations`: gated feed-forward and GELU from operations that need no compiler.
- `backward`: a backward that is built before the gradients of the outputs are known.
- `recorder`: token steps and elementwise functions, compiled if the device compiles.
- `scores`: attention with a gradient, in blocks that keep no scores.
- `sums`: sums over a vocabulary without loss of digits.
"""
