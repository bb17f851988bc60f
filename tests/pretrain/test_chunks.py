"""Heads that predict chunks: their losses, what flow matching learns, and a choice between two ways around an obstacle."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.ideas.toys import write
from benchmarks.ideas.training import publish, train
from tests.pretrain.token_fixtures import ARM, make, window
from tiphys.dataio.episode import DataError, Episode, FieldSpec, TaskSpec
from tiphys.dataio.philox import normals
from tiphys.dataio.plan.cost import Costs
from tiphys.pretrain.acting.policy import Policy
from tiphys.pretrain.acting.processor import Processor
from tiphys.pretrain.action_error import action_errors
from tiphys.pretrain.distributed.layer_costs import typical_batch
from tiphys.pretrain.model.bits import to_bits
from tiphys.pretrain.model.chunks import FlowHead
from tiphys.pretrain.model.config import DecisionConfig
from tiphys.pretrain.model.flops import flops_per_batch
from tiphys.pretrain.model.inputs import to_tensors
from tiphys.pretrain.model.layers import initialise
from tiphys.pretrain.model.pipeline import layer_operations
from tiphys.pretrain.model.transformer import DecisionModel
from tiphys.pretrain.objectives import Objectives
from tiphys.pretrain.tokens.batch import TokenBatch
from tiphys.pretrain.tokens.flow import times
from tiphys.pretrain.tokens.ranges import heads_of
from tiphys.recipes.sections.model import Model
from tiphys.recipes.sections.objective import Flow

SMALL = Flow(width=32, depth=2, draws=3, steps=5)


def objectives(head: str, **options: Any) -> Objectives:
    return make([ARM], "bc", context=40, horizon=5, chunk=2, head=head, flow=SMALL, **options)


def batch_of(made: Objectives, step: int = 3, rows: tuple[int, ...] = (0, 1, 2), training: bool = True) -> TokenBatch:
    shown = [[window(made, "arm", 5 + n, np.random.default_rng(n), after=n)] for n in rows]
    return TokenBatch.from_arrays(made.make_batch(step, np.array(rows), shown, seed=9, training=training))


def model_of(made: Objectives) -> DecisionModel:
    sizes = Model(layers=2, hidden=32, heads=2)
    model = DecisionModel(DecisionConfig.from_recipe(sizes, made.vocabulary), seed=1)
    for name, parameter in model.named_parameters():  # what starts at 0 hides mistakes
        if "adapt" in name or "out_weight" in name:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    return model


def test_noise_and_time_depend_on_the_row_alone() -> None:
    made = objectives("flow")
    together, alone = batch_of(made), batch_of(made, rows=(1,))
    (name, all_of), one = next(iter(together.chunks.items())), next(iter(alone.chunks.values()))
    mine = all_of.index // together.length == 1
    np.testing.assert_array_equal(all_of.noise[mine], one.noise)
    np.testing.assert_array_equal(all_of.time[mine], one.time)
    assert len(np.unique(all_of.noise)) == all_of.noise.size
    assert np.abs(np.corrcoef(all_of.noise.reshape(-1, 10).T) - np.eye(10)).max() < 0.7
    later = batch_of(made, step=4).chunks[name]
    assert (later.noise != all_of.noise).all()

    grid = [batch_of(made, step=step, training=False).chunks[name] for step in (3, 4)]  # validation: always the same
    np.testing.assert_array_equal(grid[0].noise, grid[1].noise)
    np.testing.assert_allclose(grid[0].time, np.tile(times(np.array([1, 3, 5]) / 6), (len(grid[0].time), 1)), rtol=1e-6)


def test_normal_numbers_are_normal() -> None:
    found = normals(5, np.arange(400), 1, 2, 50)
    assert max(abs(found.mean()), abs(found.std() - 1), abs((found**3).mean())) < 0.06
    assert len(np.unique(found)) > 0.99 * found.size
    np.testing.assert_array_equal(found[7:9, :8], normals(5, [7, 8], 1, 2, 8))
    assert abs(np.quantile(times(np.linspace(0, 1, 1001)), 0.5) - 0.6305) < 1e-3  # of Beta(1.5, 1)


@pytest.mark.parametrize("loss", ["l2", "l1"])
def test_the_loss_of_a_chunk_is_the_mean_over_what_is_there(loss: str) -> None:
    made = objectives(loss)
    model, batch = model_of(made), batch_of(made)
    output = model(to_tensors(batch), batch.targets, 1.0)
    (name, c), hidden = next(iter(batch.chunks.items())), output.hidden
    place = to_tensors(batch)[f"chunks/{name}"][:, 0]
    found = model.draw_chunk(hidden[place], name).detach().numpy().reshape(-1, 5, 2)
    error = found - c.value.reshape(-1, 5, 2)
    error = np.abs(error) if loss == "l1" else error**2
    each = [error[i, : c.count[i]].mean() for i in range(len(error))]
    assert set(c.count.tolist()) - {5}  # some end early
    np.testing.assert_allclose(output.loss.item(), np.sum(each) / batch.targets, rtol=1e-5)


def test_the_loss_of_a_flow_is_that_of_its_definition() -> None:
    made = objectives("flow")
    model, batch = model_of(made), batch_of(made)
    inputs = to_tensors(batch)
    output = model(inputs, batch.targets, 1.0)
    name, c = next(iter(batch.chunks.items()))
    head, total = model.head.chunk_head(name), 0.0
    assert isinstance(head, FlowHead)
    for i, place in enumerate(inputs[f"chunks/{name}"][:, 0].tolist()):
        for d in range(3):
            t, a, noise = c.time[i, d], c.value[i], c.noise[i, d]
            x = torch.tensor(t * noise + (1 - t) * a, dtype=torch.float32)
            v = head.velocity(output.hidden[place][None], x[None, None], torch.tensor([[t]]))[0, 0].detach().numpy()
            n = 2 * c.count[i]
            total += float(((v - (noise - a))[:n] ** 2).mean()) / 3
    np.testing.assert_allclose(float(output.loss), total / batch.targets, rtol=1e-5)
    sums, _ = action_errors(model, output, inputs)
    assert sums[0, 2] == len(c.index)
    assert sums[0, 3] > 0


def trunk_gradients(model: DecisionModel, batch: TokenBatch) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(to_tensors(batch), batch.targets, 1.0).loss.backward()
    found = {n: p.grad for n, p in model.named_parameters() if not n.startswith(("head.chunks", "output"))}
    return {n: g.clone() for n, g in found.items() if g is not None}


@pytest.mark.parametrize("loss", ["l2", "l1", "flow"])
def test_an_insulated_head_does_not_train_the_trunk(loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient of the trunk is that of the bins alone, bit for bit, and the head's own is that without bins."""
    made = objectives(loss, insulate=16)
    model, batch = model_of(made), batch_of(made)
    both = trunk_gradients(model, batch)
    (head,) = model.head.chunks.values()
    own = {n: p.grad.clone() for n, p in head.named_parameters() if p.grad is not None}
    monkeypatch.setattr(type(head), "losses", lambda self, hidden, payload: torch.zeros(len(hidden)))
    bins = trunk_gradients(model, batch)
    assert both.keys() == bins.keys()
    assert all(torch.equal(both[n], bins[n]) for n in both)
    assert both["layers.0.attention.qkv.weight"].abs().max() > 0
    monkeypatch.undo()
    monkeypatch.setattr(type(head), "bin_losses", lambda self, hidden, payload: torch.zeros(len(hidden)))
    assert not any(g.abs().max() for g in trunk_gradients(model, batch).values())
    for n, p in head.named_parameters():
        if not n.startswith("bins"):
            assert p.grad is not None
            assert torch.equal(p.grad, own[n])


def test_the_loss_of_bins_is_a_mean_over_what_is_there() -> None:
    made = objectives("l2", insulate=4)
    model, batch = model_of(made), batch_of(made)
    name, c = next(iter(batch.chunks.items()))
    inputs = to_tensors(batch)
    hidden = model(inputs, batch.targets, 1.0).hidden[inputs[f"chunks/{name}"][:, 0]]
    head = model.head.chunk_head(name)
    logits = (hidden @ head.bins_weight.T + head.bins_bias).detach().numpy().reshape(len(c.index), 10, 4)
    wanted = []
    for i, row in enumerate(logits):
        bins = np.clip(np.floor((c.value[i] + 1) / 2 * 4), 0, 3).astype(int)
        chances = np.exp(row) / np.exp(row).sum(-1, keepdims=True)
        wanted.append(-np.log(chances[np.arange(10), bins])[: 2 * c.count[i]].mean())
    found = head.bin_losses(hidden, inputs[f"chunks/{name}"][:, -head.empty(hidden.device).shape[1] :])
    np.testing.assert_allclose(found.detach().numpy(), wanted, rtol=1e-5)


def test_an_insulated_policy_acts_by_its_head() -> None:
    made = objectives("flow", insulate=8)
    model = model_of(made)
    policy = Policy(model, Processor.from_dict(json.loads(json.dumps(made.processor()))))
    seen = {"observation": np.ones(5, np.float32)}
    policy.reset("arm")
    first = policy.act(seen)
    model.head.chunk_head(next(iter(model.config.chunks))).bins_weight.data.normal_()
    policy.reset("arm")
    np.testing.assert_array_equal(policy.act(seen), first)


def test_an_insulated_head_needs_one() -> None:
    with pytest.raises(DataError, match=r"`insulate: 8` .* ids of actions are all that is predicted"):
        make([ARM], "bc", context=40, insulate=8)


def test_one_head_has_one_size() -> None:
    layouts = [objectives("flow").layouts[0], make([ARM], "bc", context=40, horizon=5, chunk=2, head="flow").layouts[0]]
    with pytest.raises(DataError, match="two objectives predict chunks by the head"):
        heads_of(layouts)


def test_every_parameter_has_a_gradient_without_targets() -> None:
    for loss in ("l2", "flow"):
        made = objectives(loss, insulate=8)
        model, batch = model_of(made), batch_of(made).without_targets()
        model(to_tensors(batch), 1.0, 1.0).loss.backward()
        missing = [name for name, p in model.named_parameters() if p.grad is None and "output" not in name]
        assert not missing


def test_a_flow_of_gaussian_data_is_the_known_one() -> None:
    """Of data N(m, s²) the velocity is known at each x and t. A trained head knows it, and draws such data."""
    mean, std, size = np.array([0.7, -0.4]), np.array([0.3, 0.15]), 2
    head = FlowHead(
        {"loss": "flow", "steps": 1, "entries": size, "width": 48, "depth": 2, "draws": 4, "euler": 10}, 4, 0.02
    )
    initialise(head, 0)
    rng, n = np.random.default_rng(0), 256
    optimizer = torch.optim.Adam(head.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 500)
    hidden = torch.zeros(n, 4)
    for _ in range(500):
        values = (rng.normal(mean, std, (n, size)), rng.normal(size=(n, 4 * size)), times(rng.random((n, 4))))
        payload = np.concatenate([np.ones((n, 1), np.int32), *map(to_bits, values)], axis=1)
        optimizer.zero_grad()
        head(hidden, torch.from_numpy(payload)).mean().backward()
        optimizer.step()
        schedule.step()

    def known(x: np.ndarray, t: np.ndarray) -> np.ndarray:
        """E[noise − a | x] of jointly normal noise, a and x."""
        variance = t**2 + (1 - t) ** 2 * std**2
        return (t - (1 - t) * std**2) / variance * (x - (1 - t) * mean) - mean

    t = np.array([0.2, 0.5, 0.8, 1.0])[:, None]
    for z in (-1.0, 0.0, 1.0):
        x = (1 - t) * mean + z * np.sqrt(t**2 + (1 - t) ** 2 * std**2)
        given = (torch.zeros(4, 4), torch.tensor(x[:, None]).float(), torch.tensor(t).float())
        found = head.velocity(*given)[:, 0].detach().numpy()
        np.testing.assert_allclose(found, known(x, t), atol=0.12)
    noise = torch.from_numpy(rng.normal(size=(2000, size))).float()
    with torch.no_grad():
        drawn = head.predict(torch.zeros(2000, 4), noise).numpy()
    exact = noise.numpy()
    for step in range(10):  # the same steps with the known velocity
        exact = exact - known(exact, np.array(1 - step / 10)) / 10
    assert np.sqrt(((drawn - exact) ** 2).mean()) < 0.05
    np.testing.assert_allclose(drawn.mean(0), mean, atol=0.03)


# the obstacle

STEPS, HEIGHT = 8, 0.4
WALK = TaskSpec(
    "walk",
    (
        FieldSpec("observation.place", "observation", "continuous", "float32", (2,)),
        FieldSpec("action", "action", "continuous", "float32", (2,)),
    ),
)


def walks(count: int) -> list[Episode]:
    """From x = 0 to 1, above or below what stands at x = .5; each action is the next place."""
    rng, made = np.random.default_rng(0), []
    for number in range(count):
        x = np.linspace(0, 1, STEPS + 1)
        y = rng.choice([-1, 1]) * rng.normal(0.8, 0.05) * np.sin(np.pi * x) + rng.normal(0, 0.03)
        place = np.stack([x, y], axis=1).astype(np.float32)
        made.append(Episode(f"w{number}", "walk", {"observation.place": place, "action": place[1:]}, STEPS))
    return made


def walk(policy: Policy, count: int = 256) -> tuple[float, float, float]:
    """Shares of the walks that pass the obstacle and arrive, and of those that pass it above and below."""
    policy.reset("walk", count)
    rng = np.random.default_rng(1)
    place = np.stack([np.zeros(count), rng.normal(0, 0.03, count)], axis=1).astype(np.float32)
    passed = place[:, 1]
    for step in range(STEPS):
        place = np.stack(policy.act([{"observation.place": p} for p in place]))
        if step + 1 == STEPS // 2:
            passed = place[:, 1]
    fine = (np.abs(passed) > HEIGHT) & (np.abs(place[:, 1]) < 0.25) & (np.abs(place[:, 0] - 1) < 0.1)
    return float(fine.mean()), float((fine & (passed > 0)).mean()), float((fine & (passed < 0)).mean())


def test_a_flow_passes_the_obstacle_on_both_sides(tmp_path: Path) -> None:
    """The mean of both ways is straight into it."""
    dataset, found = write(tmp_path / "data", [WALK], walks(400)), {}
    relative = {"to": "observation.place", "columns": [0, 1]}
    for head in ("flow", "l2"):
        objective = {
            "paradigm": "bc",
            "context": 24,
            "horizon": 8,
            "chunk": 4,
            "head": head,
            "flow": {"width": 64},
            "fields": {"action": {"relative": relative}},
        }
        policy = train([{"dataset": dataset}], objective, steps=200 if head == "flow" else 80, rows=8, rate=8e-3)
        found[head] = walk(policy)
        if head == "flow":
            check_alone(policy, tmp_path)
    success, above, below = found["flow"]
    assert success >= 0.9, found
    assert min(above, below) >= 0.3, found
    assert found["l2"][0] <= 0.2, found


def check_alone(policy: Policy, tmp_path: Path) -> None:
    """The published policy acts as this one; its draws depend on the environment's stream, not on its company."""
    loaded = Policy.load(publish(policy, tmp_path / "policy"), sample=True)
    seen = {"observation.place": np.array([0.0, 0.01], np.float32)}
    answers = []
    for one in (policy, loaded):
        one.reset("walk", 3)
        answers.append(np.stack(one.act([seen] * 3)))
    np.testing.assert_allclose(answers[0], answers[1], atol=1e-6)
    assert len(np.unique(answers[0][:, 1])) == 3
    loaded.reset("walk", 1)
    loaded.restart(0, stream=2)
    np.testing.assert_allclose(loaded.act(seen), answers[0][2], atol=1e-5)


def test_environments_of_different_phases_act_together() -> None:
    """Rows that execute a chunk and rows that need a new one may be asked at once."""
    made = objectives("flow")
    policy = Policy(model_of(made), Processor.from_dict(json.loads(json.dumps(made.processor()))), sample=True)
    rng = np.random.default_rng(0)
    seen = rng.normal(size=(6, 3, 5)).astype(np.float32)

    def run(orders: list[list[int]]) -> dict[int, list[np.ndarray]]:
        policy.reset("arm", 3)
        out: dict[int, list[np.ndarray]] = {0: [], 1: [], 2: []}
        for some in orders:
            actions = policy.act([{"observation": seen[len(out[i]), i]} for i in some], None, some)
            for i, action in zip(some, actions, strict=True):
                out[i].append(action)
        return out

    together = run([[0, 1, 2]] * 4)
    apart = run([[0], [0, 2], [0, 1, 2], [1, 2], [1], [0, 2, 1], [2]])
    for i in range(3):
        for mine, theirs in zip(together[i], apart[i], strict=False):
            np.testing.assert_allclose(mine, theirs, atol=1e-5)


def test_without_sample_the_noise_of_an_episode_stays() -> None:
    made = objectives("flow")
    policy = Policy(model_of(made), Processor.from_dict(made.processor()))
    name = next(iter(policy.model.config.chunks))
    policy.reset("arm", 2)
    first = policy._noise([0, 1], 0, name)
    policy._steps = [4, 4]
    torch.testing.assert_close(policy._noise([0, 1], 0, name), first)
    assert (first != 0).all()
    assert (first[0] != first[1]).all()
    policy.sample = True
    assert (policy._noise([0, 1], 0, name) != first).all()


@pytest.mark.parametrize("chunk", [1, 2, 3])
def test_windows_take_the_positions_that_the_plan_is_told(chunk: int) -> None:
    made = make([ARM], "bc", context=40, horizon=4, chunk=chunk, head="l1", prompt=0.5)
    lengths, rng = made.lengths(0), np.random.default_rng(0)
    costs, at = Costs([lengths.costs[0]], made.length), np.zeros(1, np.int64)
    for steps in range(1, 8):
        for start in (0, 1, 5):
            body = int(costs.cost(at, at + start, at + start + steps)[0])
            for options in ({}, {"after": 3}, {"prompt": True}):
                shown = window(made, "arm", steps, rng, start=start, **options)
                batch = TokenBatch.from_arrays(made.make_batch(0, np.array([0]), [[shown]], seed=0))
                assert batch.real_tokens <= int(lengths.fixed[0]) + body
                assert not (options.get("prompt") and batch.targets)


def test_the_cost_of_a_stage_counts_draws() -> None:
    costs = []
    for draws in (1, 4):
        made = make([ARM], "bc", context=40, head="flow", flow=Flow(draws=draws))
        config = DecisionConfig.from_recipe(Model(layers=2, hidden=32, heads=2), made.vocabulary)
        shown = [[window(made, "arm", 5, np.random.default_rng(0))]]
        batch = TokenBatch.from_arrays(made.make_batch(0, np.array([0]), shown, seed=0))
        costs.append((layer_operations(config)[-2], flops_per_batch(config, batch)))
        assert typical_batch(config, 1, 64).chunks
    assert costs[1][0] > 3.5 * costs[0][0]
    assert costs[1][1] > costs[0][1]
