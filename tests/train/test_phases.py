"""Phases that run seldom, that share a batch or an optimiser; optimisers of every kind; parts of a minibatch."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn
from train.comparing import assert_same, assert_same_runs, metrics, stopping, weights
from train.toys import Adafactor, NAdam

from gencore import Key
from gencore.models.base import GenerativeModel, Loss, ModelConfig, ModelPlugin, Phase, Step, freeze
from gencore.models.optimizers import SGD, Adam, Optimizer, RMSprop
from gencore.processes import ALONE
from gencore.train import AverageConfig, TrainingError, checkpoint
from gencore.train.descent import Average, Descent, PhaseRunner
from gencore.train.loader import Minibatch, minibatches


def spied(trainer):
    """The (name, step) of every loss that the trainer computes, from now on."""
    trainer.begin()
    seen = []
    for runner in trainer.runners:

        def spy(step, *, name=runner.phase.name, loss=runner.loss.loss):
            seen.append((name, step))
            return loss(step)

        runner.loss.loss = spy
    return seen


def test_a_phase_runs_in_its_steps_only(trainer, tmp_path):
    made = trainer(tmp_path / "run", {"every": 3}, "toy-phases", steps=7)
    seen = spied(made)
    made.fit()
    found = [(name, step.number) for name, step in seen]
    expected = []
    for number in range(7):
        seldom = [("spread", number)] if number in (0, 3, 6) else []
        expected += [("mean", number), *seldom, ("critic", number), ("critic", number), ("table", number)]
    assert found == expected
    assert {step.total for _, step in seen} == {7}


def test_a_phase_takes_the_batch_of_another_with_noise_of_its_own(trainer, tmp_path):
    made = trainer(tmp_path / "run", {"every": 1}, "toy-phases", steps=3)
    seen = spied(made)
    made.fit()
    for number in range(3):
        of_step = [(name, step) for name, step in seen if step.number == number]
        (_, mean), (_, spread), *others = of_step
        assert torch.equal(mean.batch.images, spread.batch.images)
        assert torch.equal(mean.batch.labels, spread.batch.labels)
        assert repr(mean.key) != repr(spread.key)
        assert all(not torch.equal(mean.batch.images, step.batch.images) for _, step in others)


def test_a_lazy_phase_goes_through_the_data_without_gaps(trainer, tmp_path):
    made = trainer(tmp_path / "run", plugin="toy-phases")
    made.begin()
    lazy = replace(made.runners[0].phase, name="lazy", every=4, batch_of=None)
    read = list(minibatches([lazy], 0, 12))
    assert read == [Minibatch(0, 0, 0, 0), Minibatch(4, 0, 0, 1), Minibatch(8, 0, 0, 2)]
    assert list(minibatches([lazy], 5, 12)) == read[2:]
    assert [(m.phase, m.repetition, m.draw) for m in minibatches([replace(lazy, repeats=2, every=3)], 3, 4)] == [
        (0, 0, 2),
        (0, 1, 3),
    ]


def test_the_epochs_are_those_of_the_phase_that_reads_most(trainer, tmp_path):
    # 60 images, and two minibatches of 15 a step.
    made = trainer(tmp_path / "run", plugin="toy-phases", steps=None, epochs=3, batch_size=15)
    made.begin()
    assert made.total_steps == 6


def test_phases_that_share_an_optimiser_step_one_state(trainer, tmp_path):
    made = trainer(tmp_path / "run", {"every": 2}, "toy-phases", steps=3)
    made.fit()
    mean, spread, critic, table = made.runners
    assert mean.descent is spread.descent
    assert made.descents == [mean.descent, critic.descent, table.descent]
    names = set(weights(tmp_path / "run", "optimizer"))
    assert {name for name in names if name.startswith("mean/")} == {
        "mean/mean/momentum_buffer",
        "mean/spread/momentum_buffer",
    }
    assert {name.split("/")[0] for name in names} == {"mean", "critic", "table"}


def test_a_shared_state_is_that_of_one_optimiser(trainer, tmp_path):
    made = trainer(tmp_path / "run", {"every": 1}, "toy-phases", steps=2)
    made.begin()
    model = made.model
    own = [nn.Parameter(parameter.detach().clone()) for parameter in (model.mean, model.spread)]
    expected = torch.optim.SGD(own, lr=1e-2, momentum=0.9)
    gradients = []
    for runner in made.runners[:2]:
        descend = runner.descend

        def noting(step, clip=None, *, descend=descend):
            gradients.append([None if p.grad is None else p.grad.clone() for p in (model.mean, model.spread)])
            return descend(step, clip)

        runner.descend = noting
    made.fit()
    assert len(gradients) == 4
    for of_phase in gradients:
        for parameter, gradient in zip(own, of_phase, strict=True):
            parameter.grad = gradient
        expected.step()
    # The first phase does not reach the spread, which has no gradient in it, and so no step.
    assert [gradient is None for of_phase in gradients for gradient in of_phase] == [False, True, False, False] * 2
    assert torch.equal(own[0], model.mean)
    assert torch.equal(own[1], model.spread)


def test_groups_keep_their_own_learning_rates_under_a_schedule(trainer, tmp_path):
    made = trainer(tmp_path / "run", plugin="toy-phases", schedule="cosine", warmup=2, steps=6)
    used, one_step = [], made.advance

    def follow() -> None:
        one_step()
        used.append([group["lr"] for group in made.descents[1].optimizer.param_groups])

    made.advance = follow
    made.fit()
    factors = [made.config.learning_rate_factor(step, 6) for step in range(6)]
    assert used == [[1e-2 * factor, 1e-3 * factor] for factor in factors]
    assert [group["momentum"] for group in made.descents[1].optimizer.param_groups] == [0.0, 0.5]


@pytest.mark.parametrize("stop_after", [3, 6, 7])
def test_phases_of_every_kind_go_on_to_the_same_bits(trainer, tmp_path, stop_after):
    settings = {"plugin": "toy-phases", "schedule": "cosine", "average": {"decay": 0.9, "begin": 3, "every": 2}}
    settings |= {"steps": 9, "clip": 0.5}
    trainer(tmp_path / "whole", **settings).fit()
    with pytest.raises(KeyboardInterrupt):
        stopping(trainer(tmp_path / "parts", **settings), stop_after).fit()
    trainer(tmp_path / "parts", **settings).fit(resume=True)
    assert_same_runs(tmp_path / "whole", tmp_path / "parts")


@dataclass(frozen=True)
class _Config(ModelConfig):
    pass


def fitting(settings, frozen=False):
    """The plugin of a model that descends by an optimiser of these settings."""

    class Fitting(GenerativeModel):
        def __init__(self, config, spec):
            super().__init__(config, spec)
            self.table = nn.Linear(16, 16)
            # One without gradient in any loss has no state.
            self.unused = nn.Parameter(torch.zeros(3))
            if frozen:
                self.part = freeze(nn.BatchNorm1d(16))

        def phases(self):
            own = [*self.table.parameters(), self.unused]
            return [Phase("fit", self._loss, Optimizer(own, settings))]

        def _loss(self, step: Step) -> Loss:
            images = step.batch.images.flatten(1)
            return Loss((self.table(images) - images.flip(1)).square().mean())

    return ModelPlugin("fitting", "toy", _Config, Fitting)


@pytest.mark.parametrize(
    "settings",
    [
        Adam(lr=1e-2, weight_decay=0.1),
        RMSprop(lr=1e-2),
        RMSprop(lr=1e-2, momentum=0.9),
        SGD(lr=1e-1),
        SGD(lr=1e-1, momentum=0.9, nesterov=True, weight_decay=0.1),
        NAdam(lr=1e-2),
        Adafactor(lr=1e-1),
    ],
    ids=["adam", "rmsprop", "rmsprop-momentum", "sgd", "sgd-nesterov", "nadam", "adafactor"],
)
def test_every_optimiser_goes_on_to_the_same_bits(trainer, tmp_path, settings):
    def made(out):
        return trainer(tmp_path / out, plugin=fitting(settings), steps=7, checkpoint_every=2)

    made("whole").fit()
    with pytest.raises(KeyboardInterrupt):
        stopping(made("parts"), 5).fit()
    made("parts").fit(resume=True)
    assert_same_runs(tmp_path / "whole", tmp_path / "parts")
    assert not any("unused" in name for name in weights(tmp_path / "whole", "optimizer"))
    # It went on from a state, where the optimiser has one: without it, the weights are others.
    if weights(tmp_path / "whole", "optimizer"):
        saved = checkpoint.read(tmp_path / "whole")
        tensors = {"model": saved.tensors("model"), "optimizer": {}}
        checkpoint.write_run(tmp_path / "bare", saved.run)
        checkpoint.save(tmp_path / "bare", saved.run, saved.step, tensors, saved.state, keep=1)
        for out in ("whole", "bare"):
            trainer(tmp_path / out, plugin=fitting(settings), steps=8).fit(resume=True)
        tables = [weights(tmp_path / out)["table.weight"] for out in ("whole", "bare")]
        assert not torch.equal(*tables)


def test_a_minibatch_in_parts_gives_the_same_weights_and_noise(trainer, tmp_path):
    settings = {"model": {"dropout": 0.0, "batch_norm": False}, "steps": 5, "clip": 0.5, "batch_size": 15}
    found = {}
    for parts in (1, 2, 4, 15):
        made = trainer(tmp_path / f"{parts}", accumulate=parts, **settings)
        seen = spied(made)
        made.fit()
        assert len(seen) == 15 * parts
        sizes = [len(step.batch) for _, step in seen[:parts]]
        assert sum(sizes) == 15
        assert max(sizes) - min(sizes) <= 1
        # The first minibatch of all, image by image, with the noise of each.
        images = torch.cat([step.batch.images for _, step in seen[:parts]])
        keys = [step.key.packed.tolist() for _, step in seen[:parts]]
        rows = [
            (seed, stream, start + i) for (seed, stream, start), n in zip(keys, sizes, strict=True) for i in range(n)
        ]
        found[parts] = images, rows
    for parts in (2, 4, 15):
        assert torch.equal(found[1][0], found[parts][0])
        assert found[1][1] == found[parts][1]
        whole, divided = weights(tmp_path / "1"), weights(tmp_path / f"{parts}")
        for name, expected in whole.items():
            torch.testing.assert_close(divided[name], expected, rtol=1e-4, atol=1e-5, msg=name)
        for ours, theirs in zip(metrics(tmp_path / "1"), metrics(tmp_path / f"{parts}"), strict=True):
            assert theirs == pytest.approx(ours, rel=1e-4)


def test_the_number_of_parts_may_change_when_a_run_goes_on(trainer, tmp_path):
    trainer(tmp_path / "run", steps=4).fit()
    trainer(tmp_path / "run", steps=8, accumulate=4).fit(resume=True)
    assert checkpoint.read(tmp_path / "run").step == 8


def test_more_parts_than_images_are_refused(trainer, tmp_path):
    with pytest.raises(ValueError, match="accumulate: must be at most batch_size=16, was 17"):
        trainer(tmp_path / "run", accumulate=17)


def test_the_average_begins_and_steps_when_it_is_to(trainer, tmp_path):
    made = trainer(tmp_path / "run", plugin="toy-phases", steps=9, average={"decay": 0.5, "begin": 3, "every": 2})
    made.begin()
    expected = made.model.mean.detach().clone().double()
    one_step, seen = made.advance, []

    def follow() -> None:
        nonlocal expected
        step = made.step
        one_step()
        now = made.model.mean.detach().double()
        if step < 3:
            expected = now
        elif (step - 3) % 2 == 0:
            past = (step - 3) // 2
            decay = min(0.5, (1 + past) / (10 + past))
            expected = decay * expected + (1 - decay) * now
        torch.testing.assert_close(made.average.tensors["mean"].double(), expected, rtol=1e-5, atol=1e-7)
        seen.append(torch.equal(made.average.tensors["mean"], made.model.mean))

    made.advance = follow
    made.fit()
    assert seen == [True] * 3 + [False] * 6


def test_what_is_frozen_or_counts_is_not_averaged():
    model = nn.Module()
    model.norm, model.part = nn.BatchNorm1d(2), freeze(nn.BatchNorm1d(2))
    model.partial = nn.Linear(1, 1)
    average = Average(model, AverageConfig(decay=0.5))
    # No part, and called nearly like one.
    assert {name.split(".")[0] for name in average.tensors} == {"norm", "partial"}
    model.norm.num_batches_tracked.fill_(7)
    model.norm.running_mean.fill_(1.0)
    average.update(model, 100)
    assert average.tensors["norm.num_batches_tracked"] == 7
    assert torch.equal(average.tensors["norm.running_mean"], torch.full((2,), 0.5))


def test_frozen_modules_stay_as_they_are(trainer, tmp_path):
    made = trainer(tmp_path / "run", plugin=fitting(Adam(), frozen=True), steps=2, average={})
    made.begin()
    before = {name: tensor.clone() for name, tensor in made.model.part.state_dict().items()}
    assert made.model.training
    assert not made.model.part.training
    made.fit()
    assert_same(before, made.model.part.state_dict())
    assert not any(name.startswith("part.") for name in weights(tmp_path / "run", "ema"))
    assert_same(before, {k.removeprefix("part."): v for k, v in weights(tmp_path / "run").items() if "part." in k})


def test_float16_is_for_gpus(trainer, tmp_path):
    with pytest.raises(TrainingError, match=r"train\.precision=float16 is for GPUs; bfloat16 runs on the CPU too"):
        trainer(tmp_path / "run", precision="float16")
    assert not (tmp_path / "run").exists()


def scaled_runner(scaled):
    """A phase of one weight with the gradient 3, and the trainer's way down it."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.tensor([2.0]))
    model = nn.Module()
    model.register_parameter("weight", weight)
    phase = Phase("fit", lambda step: Loss((3 * weight * float(step.number)).sum()), Optimizer([weight], SGD(lr=0.125)))
    descent = Descent("fit", phase.optimizer, model, torch.device("cpu"))
    return PhaseRunner(0, phase, descent, ALONE, scaled=scaled), weight


def test_a_scaled_loss_gives_the_same_steps_and_leaves_out_those_that_overflow():
    """What float16 needs on GPUs, on the CPU: the scale is a power of two, so that nothing is rounded."""
    found = []
    for scaled in (False, True):
        runner, weight = scaled_runner(scaled)
        for _ in range(3):
            runner.clear()
            runner.add(Step(None, Key(0), 1))
            assert runner.descend(1) == 3
        found.append(weight.item())
    assert found == [2 - 3 * 3 * 0.125] * 2
    scale = runner.scaler.get_scale()
    runner.clear()
    runner.add(Step(None, Key(0), int(1e38)))
    assert runner.descend(2).isinf()
    assert weight.item() == found[1]
    assert runner.scaler.get_scale() == scale / 2
    # An overflow of the scaled gradient is no divergence.
    assert runner.meter.first_bad_step() is None
    again, _ = scaled_runner(True)
    again.load_state(runner.state())
    assert again.scaler.get_scale() == scale / 2


def test_sharding_is_for_several_processes(trainer, tmp_path):
    with pytest.raises(TrainingError, match=r"train\.sharding=full is for several processes"):
        trainer(tmp_path / "run", sharding="full")


def test_steps_by_themselves_write_nothing(trainer, tmp_path):
    made = trainer(tmp_path / "run", plugin="toy-phases", steps=3)
    for _ in range(3):
        made.advance()
    assert made.step == 3
    assert not (tmp_path / "run").exists()
    trainer(tmp_path / "whole", plugin="toy-phases", steps=3).fit()
    assert_same(made.model.state_dict(), weights(tmp_path / "whole"))


def test_a_trainer_that_has_begun_takes_no_other_step(trainer, tmp_path):
    trainer(tmp_path / "run", steps=4).fit()
    begun = trainer(tmp_path / "run", steps=8)
    begun.advance()
    with pytest.raises(TrainingError, match=r"this trainer is at step 1 already, .*step-00000004 is not"):
        begun.fit(resume=True)
    # The same one may be trained again, and is left as it is.
    again = trainer(tmp_path / "run", steps=6)
    again.fit(resume=True)
    again.fit(resume=True)
    assert again.step == 6


def test_a_loss_may_be_compiled(trainer, tmp_path, monkeypatch):
    compiled = []

    def backend(graph, inputs):
        # As the loss says it, without a compiler.
        compiled.append(graph)
        return graph.forward

    compile = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda module: compile(module, backend=backend))
    trainer(tmp_path / "plain", plugin=fitting(Adam(lr=1e-2)), steps=4).fit()
    assert not compiled
    trainer(tmp_path / "compiled", plugin=fitting(Adam(lr=1e-2)), steps=4, compile=True).fit()
    # Once for all steps, though each has a number and noise of its own.
    assert 1 <= len(compiled) <= 2
    assert_same_runs(tmp_path / "plain", tmp_path / "compiled")
    trainer(tmp_path / "plain", plugin=fitting(Adam(lr=1e-2)), steps=5, compile=True).fit(resume=True)
