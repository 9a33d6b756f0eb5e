"""What of a model decides its cost: kinds of layers with their sizes, and the parameters that follow from them.

`families` reads them from config.json; nothing here knows a model by its name.

Legend: D hidden width, H query heads, G key-value heads, d head width, I feed-forward width, V vocabulary; a visual token is made of
merge x merge patches.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

PARTS = ("vision tower", "projector", "language", "head")
"""Where parameters are; the embedding belongs to the language, and so does a head that is tied to it."""

Linears: TypeAlias = Mapping[str, tuple[int, int]]
"""Inputs and outputs of linear layers, by the last words of their names."""


@dataclass(frozen=True)
class Attention:
    """Attention of a language layer.

    `normed`: a norm over each head's queries and keys. `biases`: numbers of all biases. `gated`: the projection of queries also gives a
    gate as wide. `window`: only so many tokens back. `blocks`: tokens of an image see each other in both directions.
    """

    heads: int
    kv_heads: int
    head_dim: int
    normed: bool = False
    biases: int = 0
    gated: bool = False
    window: int | None = None
    blocks: bool = False

    @property
    def query(self) -> int:
        """Width of all query heads, H * d."""
        return self.heads * self.head_dim

    @property
    def key(self) -> int:
        """Width of all key heads, G * d; values are as wide."""
        return self.kv_heads * self.head_dim

    @property
    def handed(self) -> tuple[str, ...]:
        """Linear layers of which completions need what they make of a prompt."""
        return "k_proj", "v_proj"

    @property
    def others(self) -> int:
        """Parameters beside the linear layers."""
        return self.normed * 2 * self.head_dim + self.biases

    def linears(self, hidden: int) -> Linears:
        """Its projections."""
        return {
            "q_proj": (hidden, self.query * (1 + self.gated)),
            "k_proj": (hidden, self.key),
            "v_proj": (hidden, self.key),
            "o_proj": (self.query, hidden),
        }


@dataclass(frozen=True)
class Delta:
    """A gated delta net: `key_heads` of `key_dim`, `value_heads` of `value_dim`, behind a convolution of `kernel` tokens."""

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    kernel: int

    @property
    def keys(self) -> int:
        """Width of all key heads; queries are as wide."""
        return self.key_heads * self.key_dim

    @property
    def values(self) -> int:
        """Width of all value heads."""
        return self.value_heads * self.value_dim

    @property
    def channels(self) -> int:
        """Channels of the convolution: queries, keys and values."""
        return 2 * self.keys + self.values

    @property
    def state(self) -> int:
        """Numbers of a state, [value heads, key width, value width], which is float32."""
        return self.values * self.key_dim

    @property
    def handed(self) -> tuple[str, ...]:
        """See `Attention`: the state is made of these."""
        return "in_proj_qkv", "in_proj_b", "in_proj_a"

    @property
    def others(self) -> int:
        """See `Attention`: the convolution, two numbers a head, and a norm."""
        return self.channels * self.kernel + 2 * self.value_heads + self.value_dim

    def linears(self, hidden: int) -> Linears:
        """Its projections."""
        return {
            "in_proj_qkv": (hidden, self.channels),
            "in_proj_z": (hidden, self.values),
            "in_proj_b": (hidden, self.value_heads),
            "in_proj_a": (hidden, self.value_heads),
            "out_proj": (self.values, hidden),
        }


Layer: TypeAlias = Attention | Delta
"""What mixes tokens in a layer of the language model; a feed-forward follows every one."""


@dataclass(frozen=True)
class Projector:
    """What makes visual tokens of patches: the sizes of its products, each at every visual token, and all other parameters.

    `linear`: the products are linear layers, on which an adapter can stand.
    """

    products: tuple[tuple[int, int], ...]
    others: int
    linear: bool = True

    @property
    def weights(self) -> int:
        """Weights of its products."""
        return sum(inputs * outputs for inputs, outputs in self.products)


@dataclass(frozen=True)
class Vision:
    """A vision tower: width, blocks, `values` of a patch in `moments` frames, how many x how many patches make a token.

    `embedding`: parameters before and after the blocks beside the patch's product. `taps`: features for further language layers.
    `gated`: a feed-forward with a gate, and norms without biases. `apart`: queries, keys and values from linear layers of their own, and
    no rotation. `whole` blocks attend to the whole of an image, the others within windows of `window` x `window` patches.
    """

    hidden: int
    layers: int
    heads: int
    intermediate: int
    values: int
    merge: int
    embedding: int
    projector: Projector
    taps: int = 0
    gated: bool = False
    apart: bool = False
    window: int = 0
    windowed: int = 0
    moments: int = 1

    @property
    def whole(self) -> int:
        """Blocks that attend to the whole of an image."""
        return self.layers - self.windowed

    @property
    def linears(self) -> tuple[tuple[int, int], ...]:
        """Inputs and outputs of a block's linear layers."""
        width, wide = self.hidden, self.intermediate
        mixing = ((width, width),) * 3 if self.apart else ((width, 3 * width),)
        return (*mixing, (width, width), *((width, wide),) * (1 + self.gated), (wide, width))

    @property
    def block(self) -> int:
        """Weights of a block's products."""
        return sum(inputs * outputs for inputs, outputs in self.linears)

    @property
    def parameters(self) -> int:
        """Parameters without those of the projector: two norms a block, and a bias for every linear layer."""
        norms = 2 * self.hidden * (1 if self.gated else 2)
        block = self.block + norms + sum(outputs for _, outputs in self.linears)
        return self.hidden * self.values + self.embedding + self.layers * block


@dataclass(frozen=True)
class Shape:
    """A vision-language model by its sizes; `norms` of a language layer, 2 or 4; `gelu` where its feed-forward has that instead of SiLU."""

    hidden: int
    intermediate: int
    vocabulary: int
    tied: bool
    layers: tuple[Layer, ...]
    vision: Vision
    norms: int = 2
    gelu: bool = False

    @property
    def attention(self) -> Attention:
        """One of the layers that attend."""
        return next(layer for layer in self.layers if isinstance(layer, Attention))

    @property
    def kinds(self) -> Counter[Layer]:
        """How many layers there are of each kind."""
        return Counter(self.layers)

    @property
    def embedding(self) -> int:
        """Parameters of the embedding, and of the head."""
        return self.vocabulary * self.hidden

    @property
    def weights(self) -> int:
        """Weights of all layers' linear layers."""
        return sum(count * self.products(layer) for layer, count in self.kinds.items())

    def linears(self, layer: Layer) -> Linears:
        """Linear layers of a language layer, its feed-forward among them."""
        wide = (self.hidden, self.intermediate)
        return {**layer.linears(self.hidden), "gate_proj": wide, "up_proj": wide, "down_proj": (self.intermediate, self.hidden)}

    def products(self, layer: Layer, handed: bool = False) -> int:
        """Weights of a layer's linear layers, or of those alone that make what is `handed` to completions."""
        return sum(i * o for name, (i, o) in self.linears(layer).items() if not handed or name in layer.handed)

    @property
    def parameters(self) -> dict[str, int]:
        """Parameters by part."""
        projector = self.vision.projector.weights + self.vision.projector.others
        beside = sum(count * (layer.others + self.norms * self.hidden) for layer, count in self.kinds.items())
        language = self.embedding + self.weights + beside + self.hidden
        return dict(zip(PARTS, (self.vision.parameters, projector, language, 0 if self.tied else self.embedding), strict=True))


@dataclass(frozen=True)
class Tune:
    """What is trained: `kind` full (without tower and projector unless `vision`), lora or qlora.

    Adapters of `rank` stand on the language model's linear layers, on every one or on `targets` (by the last words of their names), and
    on tower and projector where `vision` and `projector` say so.
    """

    kind: str = "full"
    vision: bool = True
    projector: bool = False
    rank: int = 32
    targets: tuple[str, ...] = ()

    @property
    def full(self) -> bool:
        """Whether weights themselves are trained."""
        return self.kind == "full"

    @property
    def sees(self) -> bool:
        """Whether image features change, so that they have a backward and cannot be kept."""
        return self.vision or (self.projector and not self.full)

    def adapts(self, name: str) -> bool:
        """Whether a language layer's linear layer of that name gets an adapter."""
        return not self.full and (not self.targets or name in self.targets)

    def adapted(self, shape: Shape, layer: Layer) -> list[tuple[int, int]]:
        """Inputs and outputs of a language layer's linear layers that get an adapter."""
        return [size for name, size in shape.linears(layer).items() if self.adapts(name)]

    def trained(self, shape: Shape) -> dict[str, int]:
        """Trained parameters by part; an adapter of a matrix [out, in] has rank * (in + out)."""
        if self.full:
            return {part: count * (self.vision or part in PARTS[2:]) for part, count in shape.parameters.items()}
        v = shape.vision
        widths = (
            self.vision * v.layers * sum(map(sum, v.linears)),
            self.projector * v.projector.linear * sum(map(sum, v.projector.products)),
            sum(count * sum(map(sum, self.adapted(shape, layer))) for layer, count in shape.kinds.items()),
            0,
        )
        return {part: self.rank * width for part, width in zip(PARTS, widths, strict=True)}
