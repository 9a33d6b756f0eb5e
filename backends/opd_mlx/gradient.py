"""The student's gradient: backwards to parameters by name, and sums of what they give. On torch autograd does this by itself.

Legend: U different tokens that some rows look up, V vocabulary, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import chain

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from opd.types import Group
from opd_mlx.kernels.backward import Backward
from opd_mlx.model import Model, Parameters

TOGETHER = 2**24
"""Bytes of parameters whose gradient, or step, is computed at a time; of a gradient, those of one layer at most."""


class Run:
    """Some rows of the student, and their backward: to parameters, and to other arrays that they read, by name.

    Of a trained embedding, the rows [U, D] that are looked up run in its place, so that its gradient is no table of zeros [V, D].
    """

    def __init__(
        self,
        model: Model,
        parameters: Parameters,
        names: Sequence[str],
        tokens: mx.array,
        run: Callable[..., Sequence[mx.array]],
        given: Mapping[str, mx.array] | None = None,
        words: NDArray[np.int32] | None = None,
    ) -> None:
        """`run` takes the `tokens` [N], and the arrays `given`; `names` are the `parameters` that it reads beside the embedding. `words`
        [U] are all tokens, in order, where other rows have more than these.
        """
        self.parameters = parameters
        names, given = list(names), given or {}
        primals = [parameters[name] for name in names]
        self.words: mx.array | None = None
        if model.embedding_name in parameters:
            looked = np.array(tokens)
            words = np.unique(looked) if words is None else words
            names.append(model.embedding_name)
            self.words, tokens = mx.array(words), mx.array(np.searchsorted(words, looked).astype(np.int32))
            primals.append(parameters[model.embedding_name][self.words])

        def bound(*values: mx.array) -> Sequence[mx.array]:
            with model.bound(dict(zip(names, values, strict=False))):
                return run(tokens, *values[len(names) :])

        self._names = [*names, *given]
        self._backward = Backward(bound, [*primals, *given.values()])

    @property
    def outputs(self) -> list[mx.array]:
        """What the rows give; evaluate them before `start`."""
        return self._backward.outputs

    def start(self, gradients: Sequence[mx.array]) -> Parameters:
        """Slopes by name from the float32 gradients to the outputs; the embedding's are those of `words`. They are not evaluated yet, and
        nothing is kept of them here.
        """
        self.parameters = {}
        return dict(zip(self._names, self._backward.start(gradients), strict=True))


def words_of(groups: Sequence[Group]) -> NDArray[np.int32]:
    """All tokens that completions of `groups` look up, in order, with 0, which stands where a completion has ended."""
    looked = [one.tokens for group in groups for one in group.completions] + [group.student.tokens[-1:] for group in groups]
    return np.unique(np.concatenate([np.zeros(1, np.int32), *looked])).astype(np.int32)


def memory_name(share: int, place: int) -> str:
    """The name among slopes of a share's keys (even places, two for each layer) or values."""
    return f"language_model.{place // 2}.memory.{share}.{place % 2}"


def words_name(share: int) -> str:
    """The name among slopes of those of the words of a share's completions."""
    return f"language_model.words{share}"


def add(sums: Parameters, slopes: list[Parameters]) -> None:
    """Adds slopes to `sums` in float32, and evaluates them, in the order in which a backward meets them.

    That is the language model from its last layer down, then what makes image features. Each sum takes its slope's place: so what is done
    with is freed on the way.
    """

    def place(name: str) -> tuple[bool, int]:
        numbers = [int(part) for part in name.split(".") if part.isdigit()]
        return not name.startswith("language_model."), -numbers[0] if numbers else 1

    pending: list[str] = []
    names = sorted(dict.fromkeys(chain(*slopes)), key=place)
    for name, following in zip(names, [*names[1:], None], strict=True):
        for one in slopes:
            if name in one:
                slope = one.pop(name).astype(mx.float32)
                sums[name] = sums[name] + slope if name in sums else slope
                del slope
        pending.append(name)
        if following is None or place(following) != place(name) or sum(sums[one].nbytes for one in pending) > TOGETHER:
            mx.eval([sums[one] for one in pending])
            pending.clear()


def add_words(sums: Parameters, name: str, shape: Sequence[int], looked: Sequence[tuple[mx.array, mx.array]]) -> None:
    """Adds slopes [U, D] of words [U] to the sum of a table of `shape` (V, D), all in one pass over that."""
    words, slopes = (mx.concatenate(list(parts)) for parts in zip(*looked, strict=True))
    table = sums.pop(name) if name in sums else mx.zeros(shape)
    sums[name] = table.at[words].add(slopes)
    del table
    mx.eval(sums[name])
