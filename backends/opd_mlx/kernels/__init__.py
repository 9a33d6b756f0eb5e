"""What only MLX needs.

- `backward`: a backward that is built before the gradients that it starts from are known
- `exponentials`: softmax, activations and sums over a vocabulary
- `recorder`: token steps and elementwise functions that are compiled where MLX compiles by itself
- `scores`: attention with a gradient, in blocks that keep no scores
"""
