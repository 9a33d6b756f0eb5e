"""Functions with a backward of their own, where autograd would keep more, or pass over memory more
often, than is needed.

- `flash`: torch's private attention operators, which give the logarithms of sums.
- `function`: `torch.autograd.Function` with types.
- `fused`: Triton kernels of half-precision training on a GPU: norm, rotation, gate.
- `joined`: attention over a prompt's keys and a completion's own, without copying the prompt's.
- `pointwise`: norms and GELU in fewer passes than transformers' modules, which they replace.
- `recorder`: token steps as CUDA graphs.
- `rotary`: rotary positions as products of complex numbers.
"""
