"""Functions with a backward of their own, where autograd would keep more, or pass over memory more often, than is needed."""
