"""What only MLX needs.

- `activations`: gated feed-forward and GELU, without a compiler
- `backward`: a backward that is built before the gradients that it starts from are known
- `recorder`: token steps and elementwise functions that are compiled where MLX compiles by itself
- `scores`: attention with a gradient, in blocks that keep no scores
- `sums`: sums over a vocabulary that keep their digits
"""
