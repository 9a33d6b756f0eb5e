"""What crosses the protocol arrives in the kernels, on every backend: each argument is changed, and
what comes back is worked out apart.

`score` with all alternatives gives both policies' whole distributions; from them the reference
says, in float64, what every objective gives and which token every uniform draws. Nothing here looks
into a backend.
"""

from __future__ import annotations

import pkgutil
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from opd import registry
from opd.errors import BackendError
from opd.models.choice import ModelChoice
from opd.objective import Objective, evaluate, log_softmax
from opd.prompts.processor import open_encoder
from opd.testing.toy import ToyBackend, ToyEncoder
from opd.tiny import MODEL
from opd.types import STATISTICS, Completion, Group, Sampling, Update
from tests.conftest import INSTALLED
from tests.support.cases import watch

WHOLE = Objective(top_k=None, ratio_clip=None)
OBJECTIVE = Objective(alpha=0.5, top_k=7, tail=True, ratio_clip=1.5, temperature=1.0)
STEP = Update(learning_rate=1e-2, weight_decay=0.1)
NOTHING = Update(learning_rate=0.0, weight_decay=0.0)
"""Clears the gradient, and changes no weight."""


class Case:
    """A backend whose teacher is not its student, groups of unequal prompts and completions for it,
    and the policies' distributions."""

    def __init__(self, name, folder):
        toy = name == "toy"
        self.make = ToyBackend if toy else lambda: registry.load(name, ModelChoice().options())
        self.encoder = ToyEncoder() if toy else open_encoder(MODEL)
        self.vocabulary = 16 if toy else 346
        rng = np.random.default_rng(0)
        pictures = [
            Image.fromarray(rng.integers(0, 255, (32, 32 + 16 * number, 3), dtype=np.uint8))
            for number in range(6)
        ]
        asked = ("What digit?", "Where is the red one?", "How many?")
        pairs = [
            (
                self.encoder.encode([pictures[number]], question),
                self.encoder.encode([pictures[3 + number]], question),
            )
            for number, question in enumerate(asked)
        ]
        tokens = [[[5, 3, 9], [7]], [[2, 11]], [[4, 4, 4, 8], [6, 10]]]
        self.groups = [
            Group(
                student,
                teacher,
                tuple(
                    Completion(
                        np.array(one, np.int32),
                        rng.normal(-3, 1, len(one)).astype(np.float32),
                        False,
                    )
                    for one in rows
                ),
                tuple(rng.uniform(0.1, 1, len(one)).astype(np.float32) for one in rows),
            )
            for (student, teacher), rows in zip(pairs, tokens, strict=True)
        ]
        self.prompts = [group.student for group in self.groups]
        self.folder = folder
        backend = self.make()
        backend.accumulate(self.groups, OBJECTIVE)
        assert backend.apply(replace(STEP, learning_rate=0.5 if toy else 0.03)).taken
        backend.save(folder)
        self.loaded = backend
        # Ratios on both sides of every bound.
        self.groups = [
            replace(
                group,
                completions=tuple(
                    replace(
                        one,
                        logprobs=(said.student_logprobs + rng.normal(-0.5, 1, len(one))).astype(
                            np.float32
                        ),
                    )
                    for one, said in zip(group.completions, row, strict=True)
                ),
            )
            for group, row in zip(self.groups, backend.score(self.groups, WHOLE), strict=True)
        ]
        scored = backend.score(self.groups, WHOLE, top=self.vocabulary)
        self.student, self.teacher = (
            [[self.dense(getattr(one, f"{policy}_top")) for one in row] for row in scored]
            for policy in POLICIES
        )

    def dense(self, alternatives):
        logprobs = np.full((len(alternatives.tokens), self.vocabulary), np.nan)
        np.put_along_axis(
            logprobs,
            alternatives.tokens.astype(np.int64),
            alternatives.logprobs.astype(np.float64),
            1,
        )
        assert np.isfinite(logprobs).all()
        return logprobs

    def restored(self):
        backend = self.make()
        backend.load(self.folder)
        return backend

    def first(self, policy):
        """Log-probabilities [B, V] of the first token behind each student's prompt, of either
        policy.

        The teacher's own distributions are of the teacher's prompts; here both read the student's.
        """
        if policy == "student":
            return np.stack([rows[0][0] for rows in self.student])
        groups = [replace(group, teacher=group.student) for group in self.groups]
        return np.stack(
            [
                self.dense(row[0].teacher_top)[0]
                for row in self.loaded.score(groups, WHOLE, top=self.vocabulary)
            ]
        )


POLICIES = ("student", "teacher")


@pytest.fixture(scope="module", params=["toy", *INSTALLED])
def case(request, tmp_path_factory):
    return Case(request.param, tmp_path_factory.mktemp("state"))


OBJECTIVES = [
    OBJECTIVE,
    *(replace(OBJECTIVE, alpha=alpha) for alpha in (0.0, 1.0, 0.2)),
    *(replace(OBJECTIVE, top_k=top_k) for top_k in (None, 3)),
    replace(OBJECTIVE, tail=False),
    *(replace(OBJECTIVE, ratio_clip=clip) for clip in (None, 4.0)),
    *(replace(OBJECTIVE, temperature=temperature) for temperature in (0.6, 1.7)),
    replace(OBJECTIVE, form="sampled"),
]


def test_every_part_of_the_objective_counts(case):
    """And the teacher reads its own prompt, the ratio the sampler's log-probabilities; with a
    gradient and without."""
    seen = set()
    for objective in OBJECTIVES:
        scored, accumulated = (
            getattr(case.loaded, verb)(case.groups, objective) for verb in ("score", "accumulate")
        )
        values = []
        for group, students, teachers, *rows in zip(
            case.groups, case.student, case.teacher, scored, accumulated, strict=True
        ):
            for completion, student, teacher, *found in zip(
                group.completions, students, teachers, *rows, strict=True
            ):
                expected = evaluate(
                    student, teacher, completion.tokens, completion.logprobs, objective
                )
                for name in STATISTICS:
                    wanted = getattr(expected, name)
                    for one in found:
                        np.testing.assert_allclose(
                            getattr(one, name),
                            wanted,
                            rtol=2e-4,
                            atol=2e-5,
                            err_msg=f"{name} of {objective}",
                        )
                values += (expected.ratio * expected.divergence).tolist()
        seen.add(tuple(f"{value:.3g}" for value in values))
    assert len(seen) == len(OBJECTIVES)
    case.loaded.apply(NOTHING)


@pytest.mark.parametrize("policy", POLICIES)
def test_every_part_of_sampling_counts(case, policy):
    """The token of every uniform, by its inverse CDF; banned tokens are left out, and the policy is
    the one that was asked for."""
    logits = case.first(policy)
    likeliest = logits.argmax(1)
    uniforms = np.random.default_rng(1).random((3, 20, 1), np.float32)
    seen = set()
    for temperature in (1.0, 0.6, 0.0):
        for banned in ((), tuple(sorted({*likeliest.tolist(), 1}))):
            found = case.loaded.sample(
                case.prompts, uniforms, Sampling(temperature, (), banned), policy
            )
            kept = logits.copy()
            kept[:, list(banned)] = -np.inf
            s = log_softmax(kept / (temperature or 1.0))
            for group, row, draws in zip(found, s, uniforms[..., 0], strict=True):
                cumulative = np.exp(row).cumsum()
                for one, uniform in zip(group, draws, strict=True):
                    assert not one.finished
                    (token,) = one.tokens
                    if temperature == 0:
                        assert token == row.argmax()
                    elif np.abs(cumulative - uniform).min() > 1e-4:
                        assert token == np.searchsorted(cumulative, uniform, side="right")
                    assert one.logprobs[0] == pytest.approx(row[token], rel=1e-4, abs=1e-4)
            seen.add(
                tuple(
                    (int(one.tokens[0]), round(float(one.logprobs[0]), 4))
                    for group in found
                    for one in group
                )
            )
    assert len(seen) == 6
    other = case.first("teacher" if policy == "student" else "student")
    assert np.abs(np.exp(other) - np.exp(logits)).max() > 1e-2


def test_completions_end_at_a_stop_token_or_at_their_limit(case):
    uniforms = np.random.default_rng(2).random((3, 8, 6), np.float32)
    free = case.loaded.sample(case.prompts, uniforms, Sampling(1.0))
    assert {len(one) for group in free for one in group} == {6}
    stop = tuple({int(one.tokens[2]) for group in free for one in group[:2]})
    for group, whole in zip(
        case.loaded.sample(case.prompts, uniforms, Sampling(1.0, stop)), free, strict=True
    ):
        for one, longer in zip(group, whole, strict=True):
            stops = np.flatnonzero(np.isin(longer.tokens, stop))
            length = stops[0] + 1 if len(stops) else 6
            assert one.tokens.tolist() == longer.tokens[:length].tolist()
            assert one.finished == bool(len(stops))
    short = case.loaded.sample(case.prompts, uniforms[:, :3, :2], Sampling(1.0))
    assert [[one.tokens.tolist() for one in group] for group in short] == [
        [one.tokens[:2].tolist() for one in row[:3]] for row in free
    ]


def gradient(backend, groups):
    backend.accumulate(groups, OBJECTIVE)
    return backend.tensors("gradient")


def near(ours, theirs):
    assert ours.keys() == theirs.keys()
    whole = np.sqrt(sum(float((value.astype(np.float64) ** 2).sum()) for value in theirs.values()))
    assert whole > 0
    return all(
        np.linalg.norm(ours[name] - value) <= 1e-4 * max(np.linalg.norm(value), 1e-2 * whole)
        for name, value in theirs.items()
    )


def test_gradients_add_up_until_a_step(case):
    once = gradient(case.loaded, case.groups)
    assert near(
        gradient(case.loaded, case.groups), {name: 2 * value for name, value in once.items()}
    )
    case.loaded.apply(NOTHING)
    assert near(gradient(case.loaded, case.groups), once)
    case.loaded.apply(NOTHING)


@pytest.mark.parametrize("change", ["apply", "load"])
def test_nothing_that_a_rollout_kept_outlives_the_weights(change, case, tmp_path):
    """A backend may keep its pass over a rollout's prompts for the gradient along them; but not
    once the student is another one."""
    backend, uniforms = case.restored(), np.full((3, 2, 3), 0.5, np.float32)
    before = gradient(backend, case.groups)
    prefill = backend.prefill(case.prompts)
    backend.sample(case.prompts, uniforms, Sampling(1.0), prefill=prefill)
    fresh = case.make()
    if change == "apply":
        assert backend.apply(STEP).taken
        backend.save(tmp_path)
        fresh.load(tmp_path)
    else:
        fresh.save(tmp_path)
        backend.load(tmp_path)
    with pytest.raises(ValueError, match="weights have changed"):
        backend.accumulate(case.groups, Objective(), prefill=prefill)
    expected = gradient(fresh, case.groups)
    assert not near(before, expected)
    assert near(gradient(backend, case.groups), expected)
    ours, theirs = (one.sample(case.prompts, uniforms, Sampling(1.0)) for one in (backend, fresh))
    assert texts(ours) == texts(theirs)


def texts(sampled):
    return [[one.tokens.tolist() for one in group] for group in sampled]


def test_what_a_rollout_kept_serves_its_own_prompts_alone(case):
    """Other prompts, some of them, or the same in another order: the gradient is that of a backend
    that never sampled."""
    backend, fresh = case.restored(), case.restored()
    for chosen in ([0, 1, 2], [2, 0, 1], [0], [1, 2]):
        groups = [case.groups[index] for index in chosen]
        expected = gradient(fresh, groups)
        for policy in POLICIES:
            backend.sample(case.prompts, np.full((3, 2, 3), 0.5, np.float32), Sampling(1.0), policy)
            assert near(gradient(backend, groups), expected)
            backend.apply(NOTHING)
        fresh.apply(NOTHING)


UPDATES = [
    Update(learning_rate=1e-2),
    Update(learning_rate=3e-2),
    Update(learning_rate=1e-2, betas=(0.5, 0.999)),
    Update(learning_rate=1e-2, betas=(0.9, 0.9)),
    Update(learning_rate=1e-2, epsilon=0.1),
    Update(learning_rate=1e-2, weight_decay=0.5),
    Update(learning_rate=1e-2, epsilon=0.1, gradient_clip=None),
    Update(learning_rate=1e-2, epsilon=0.1, gradient_clip=0.5),
]


def flat(tensors):
    return np.concatenate([tensors[name].astype(np.float64).ravel() for name in sorted(tensors)])


def test_every_part_of_an_update_counts(case, tmp_path):
    """Two steps of each update from one start, by AdamW's formula from the gradient that the
    backend tells."""
    backend, groups = (
        case.make(),
        [
            replace(group, weights=tuple(300 * one for one in group.weights))
            for group in case.groups[:1]
        ],
    )
    backend.save(tmp_path)
    seen = set()
    for update in UPDATES:
        backend.load(tmp_path)
        theta = flat(backend.tensors("student"))
        first, second = np.zeros_like(theta), np.zeros_like(theta)
        for step in (1, 2):
            backend.accumulate(groups, OBJECTIVE)
            g = flat(backend.tensors("gradient"))
            norm = np.linalg.norm(g)
            found = backend.apply(update)
            assert found.taken
            assert found.gradient_norm == pytest.approx(norm, rel=1e-4)
            assert norm > 1
            g = g * min(1, (update.gradient_clip or np.inf) / norm)
            (b1, b2), rate = update.betas, update.learning_rate
            first, second = b1 * first + (1 - b1) * g, b2 * second + (1 - b2) * g**2
            moved = (
                first / (1 - b1**step) / (np.sqrt(second / (1 - b2**step)) + update.epsilon)
                + update.weight_decay * theta
            )
            after = flat(backend.tensors("student"))
            assert np.linalg.norm(after - theta + rate * moved) < 2e-3 * np.linalg.norm(
                rate * moved
            ), update
            theta = after
        seen.add(f"{np.linalg.norm(theta):.8g}")
    assert len(seen) == len(UPDATES)


def test_the_teacher_moves_by_its_rate_and_is_stored_apart(case, tmp_path):
    backend = case.restored()
    for rate in (0.25, 1.0):
        student, before = flat(backend.tensors("student")), flat(backend.tensors("teacher"))
        assert np.abs(student - before).max() > 1e-3
        backend.move_teacher(rate)
        after = flat(backend.tensors("teacher"))
        np.testing.assert_allclose(after, before + rate * (student - before), atol=1e-6)
        assert np.array_equal(flat(backend.tensors("student")), student)
        backend.save(tmp_path)
        other = case.make()
        other.load(tmp_path)
        for kind in POLICIES:
            assert np.array_equal(flat(other.tensors(kind)), flat(backend.tensors(kind)))
        for one in (backend, other):  # moments and the number of steps too
            one.accumulate(case.groups, OBJECTIVE)
            one.apply(Update(learning_rate=1e-2, betas=(0.5, 0.7)))
        assert (
            np.linalg.norm(flat(other.tensors("student")) - flat(backend.tensors("student"))) < 1e-3
        )


# What a recipe's model section makes of a real backend.


def load(name, seed=0, **choice):
    return registry.load(name, ModelChoice(**choice).options(seed))


def pieces(backend):
    """The parts of the model in which something is trained, and the shapes of what is, by the
    layer's last word."""
    shapes = {key: value.shape for key, value in backend.tensors("student").items()}
    parts = {"vision" if ".visual." in key else "language" for key in shapes if "merger" not in key}
    return parts | {"projector" for key in shapes if "merger" in key}, shapes


def words(shapes):
    return {key.split(".lora_")[0].rpartition(".")[2] for key in shapes if ".visual." not in key}


def test_what_is_trained_is_what_the_recipe_says(backend_name):
    assert pieces(load(backend_name))[0] == {"vision", "language", "projector"}
    assert pieces(load(backend_name, vision=False))[0] == {"language"}
    lora = {"tune": "lora", "rank": 3}
    plain, seeing = load(backend_name, 1, **lora), load(backend_name, 1, **lora, vision=True)
    other = load(backend_name, 2, **lora, projector=True, targets=("q_proj", "up_proj"))
    assert [pieces(one)[0] for one in (plain, seeing, other)] == [
        {"language"},
        {"vision", "language"},
        {"projector", "language"},
    ]
    assert words(pieces(plain)[1]) == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    }
    assert words(pieces(other)[1]) == {"q_proj", "up_proj"}
    assert all(3 in shape for shape in pieces(plain)[1].values())
    name = next(name for name in plain.tensors("student") if "q_proj.lora_A" in name)
    first, again, differs = (one.tensors("student")[name] for one in (plain, seeing, other))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, differs)


def test_alpha_and_rank_scale_an_adapter(backend_name, tmp_path):
    """An adapted model says what the whole one says with alpha / rank * B A added to its weights;
    its teacher goes by its own adapter."""
    from safetensors.numpy import load_file, save_file

    encoder, rng = open_encoder(MODEL), np.random.default_rng(0)
    prompt = encoder.encode([Image.new("RGB", (32, 32), "red")], "What digit?")
    completion = Completion(np.array([5, 9, 3], np.int32), np.zeros(3, np.float32), False)
    group = [Group(prompt, prompt, (completion,), (np.ones(3, np.float32),))]

    def says(backend):
        ((one,),) = backend.score(group, WHOLE)
        return one.student_logprobs, one.teacher_logprobs

    whole = load(backend_name)
    whole.save(tmp_path / "whole")
    base = load_file(tmp_path / "whole/student.safetensors")
    seen = []
    for alpha, rank in ((2.0, 2), (6.0, 2), (6.0, 3)):
        adapted = load(
            backend_name, tune="lora", alpha=alpha, rank=rank, targets=("q_proj", "down_proj")
        )
        adapted.save(tmp_path / "adapted")
        values = {}
        for policy, size in (("student", 0.3), ("teacher", 0.1)):
            file = tmp_path / f"adapted/{policy}.safetensors"
            tensors = {
                name: (size * rng.normal(size=value.shape)).astype(np.float32)
                for name, value in load_file(file).items()
            }
            save_file(tensors, file, metadata={"format": "pt"})
            merged = dict(base)
            for name in [name for name in tensors if ".lora_A" in name]:
                layer = name.removesuffix(".lora_A.weight")
                merged[f"{layer}.weight"] = (
                    base[f"{layer}.weight"]
                    + alpha / rank * tensors[f"{layer}.lora_B.weight"] @ tensors[name]
                )
            save_file(merged, tmp_path / f"whole/{policy}.safetensors", metadata={"format": "pt"})
            values[policy] = tensors
        adapted.load(tmp_path / "adapted")
        whole.load(tmp_path / "whole")
        found, expected = says(adapted), says(whole)
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)
        assert np.abs(found[0] - found[1]).max() > 1e-2
        seen.append(found[0])
    assert all(np.abs(a - b).max() > 1e-2 for a, b in ((seen[0], seen[1]), (seen[1], seen[2])))


def test_the_type_of_computation_is_the_recipes(backend_name):
    encoder = open_encoder(MODEL)
    prompt = encoder.encode([Image.new("RGB", (32, 32), "red")], "What digit?")
    group = [
        Group(
            prompt,
            prompt,
            (Completion(np.array([5, 9, 3], np.int32), np.zeros(3, np.float32), False),),
            (np.ones(3, np.float32),),
        )
    ]
    for tune in ("full", "lora"):
        exact, half = (
            load(backend_name, tune=tune, dtype=dtype).score(group, WHOLE)[0][0].student_logprobs
            for dtype in DTYPES
        )
        assert 1e-4 < np.abs(exact - half).max() < 1


DTYPES = ("float32", "bfloat16")


def test_layers_run_again_above_the_recipes_bound(backend_name, monkeypatch):
    """Where a backward would hold more, to the same gradient; `opd plan` takes the same bound."""
    package = "opd_mlx" if backend_name == "mlx" else "opd_torch"
    encoder, shares, gradients = open_encoder(MODEL), [], []
    share = pkgutil.resolve_name(f"{package}.footprint.recompute_share")
    seen = f"{package}.gradient.recompute_share"
    watch(monkeypatch, seen, lambda *given: shares.append(share(*given)))
    student, teacher = (
        encoder.encode([Image.new("RGB", (32, 32), colour)], "What digit?")
        for colour in ("red", "blue")
    )
    completion = Completion(np.array([5, 9, 3], np.int32), np.zeros(3, np.float32), False)
    group = [Group(student, teacher, (completion,), (np.ones(3, np.float32),))]
    for bound in (2.0, 0.0):
        backend = load(backend_name, recompute_above=bound)
        gradients.append(gradient(backend, group))
    assert shares == [0.0, 1.0]
    assert near(gradients[1], gradients[0])
    for bound in (2.0, 0.5):
        options = ModelChoice(recompute_above=bound).options()
        assert options.checkpoint_above == int(bound * 2**30)


def test_a_backend_says_the_budgets_of_its_device(backend_name):
    said = registry.state(backend_name).budgets
    assert said["checkpoint_above"] == ModelChoice().options().checkpoint_above
    assert said["prefill_tokens"] > 0
    assert said["feature_bytes"] > 0


def test_qlora_holds_the_base_in_four_bits(backend_name):
    encoder = open_encoder(MODEL)
    prompt = encoder.encode([Image.new("RGB", (32, 32), "red")], "What digit?")
    group = [
        Group(
            prompt,
            prompt,
            (Completion(np.array([5, 9, 3], np.int32), np.zeros(3, np.float32), False),),
            (np.ones(3, np.float32),),
        )
    ]
    if backend_name != "mlx":
        with pytest.raises(BackendError, match="needs a CUDA GPU"):
            load(backend_name, tune="qlora")
        return
    exact, coarse = (
        load(backend_name, tune=tune, rank=2).score(group, WHOLE)[0][0].student_logprobs
        for tune in ("lora", "qlora")
    )
    assert 1e-3 < np.abs(exact - coarse).max() < 5
