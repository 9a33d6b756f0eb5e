"""Functions with a hand-written backward, where autograd would keep more arrays or pass over memory
more often.

- `flash`: torch's private attention operators, which return the logarithms of sums.
- `function`: `torch.autograd.Function` with types.
- `fused`: Triton kernels for half precision on a GPU: norm, rotation, gate.
- `joined`: attention over the keys of prompt and completion, without copies of the prompt's keys.
- `pointwise`: norms and GELU with fewer passes over memory; they replace transformers' modules.
- `recorder`: token steps as CUDA graphs.
- `rotary`: rotary positions as products of complex numbers.
"""
