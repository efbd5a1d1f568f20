"""Metric, step, memory and processes of a training."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from graph_stand_in import record
from ignite.engine import Engine, Events
from monai.data import MetaTensor
from monai.engines import SupervisedTrainer
from monai.handlers import LrScheduleHandler
from networks import Dummy
from torch import Tensor, nn
from torch.utils.data import DataLoader

from common import graphs
from common.losses import RegistrationLoss
from common.train import engines
from sacb_net import SACBNet


def test_label_dice_value() -> None:
    """Label 1: 8 and 4 voxels, 4 in common, 2*4/12; label 2: equal, 1; label 3: two voxels, below the minimum."""
    fixed = torch.zeros(1, 1, 6, 6, 6)
    fixed[..., :2, :2, :2], fixed[..., 4:, 4:, 4:], fixed[..., 3, 0, :2] = 1, 2, 3
    warped = fixed.clone()
    warped[..., 0, :2, :2], warped[..., 3, 0, :2] = 0, 0
    metric, target = engines.LabelDice(minimum=2), torch.cat([fixed, fixed], 1)
    metric(warped, target)
    assert float(metric.aggregate()) == pytest.approx((2 / 3 + 1) / 2)
    metric(fixed, target)
    assert float(metric.aggregate()) == pytest.approx(((2 / 3 + 1) / 2 + 1) / 2)
    metric(torch.zeros_like(fixed), torch.zeros_like(target))  # no labels: does not count
    assert float(metric.aggregate()) == pytest.approx(((2 / 3 + 1) / 2 + 1) / 2)
    metric.reset()
    every = engines.LabelDice()
    every(warped, target)
    assert float(every.aggregate()) == pytest.approx((2 / 3 + 1 + 0) / 3)
    lacking = torch.cat([fixed, fixed * (fixed != 2)], 1)  # label 2 is not in the moving map: no fault of the warp
    every.reset()
    every(warped, lacking)
    assert float(every.aggregate()) == pytest.approx((2 / 3 + 0) / 2)


def test_label_dice_without_labels() -> None:
    """Scans without labels give nan instead of an error, also beside scans that have them."""
    metric = engines.label_dice_handler()
    labelled = {"warped_label": torch.ones(1, 4, 4, 4), "target_label": torch.ones(2, 4, 4, 4)}
    for output, expected in (([{"warped": 0}], float("nan")), ([labelled, {"warped": 0}], 1.0)):
        metric.reset()
        metric.update(metric._output_transform(output))
        assert float(metric.metric_fn.aggregate()) == pytest.approx(expected, nan_ok=True)


def test_label_dice_of_one_set() -> None:
    right = {"warped_label": torch.ones(1, 4, 4, 4), "target_label": torch.ones(2, 4, 4, 4), "set": "a"}
    wrong = right | {"warped_label": torch.zeros(1, 4, 4, 4), "set": "b"}
    for of, expected in (("a", 1.0), ("b", 0.0), (None, 0.5), ("c", float("nan"))):
        metric = engines.label_dice_handler(of=of)
        metric.reset()
        metric.update(metric._output_transform([right, wrong]))
        assert float(metric.metric_fn.aggregate()) == pytest.approx(expected, nan_ok=True)


def test_gradients_are_clipped_and_the_loss_knows_the_progress() -> None:
    """A trainer's step moves the weights by at most rate times norm; the loss sees 0, then the share that is behind."""
    network, seen = Dummy(), []

    class Loss(nn.Module):
        progress = None

        def forward(self, pred: Tensor, target: Tensor) -> Tensor:
            seen.append(self.progress)
            return 1e6 * pred.sum()

    loss = Loss()
    before = [p.detach().clone() for p in network.parameters()]
    SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=4,
        train_data_loader=[{"image": torch.rand(1, 2, 3, 3, 3)}],
        network=network,
        optimizer=torch.optim.SGD(network.parameters(), lr=1.0),
        loss_function=loss,
        prepare_batch=engines.prepare_pair,
        train_handlers=[engines.ClipGradients(network, 0.5), engines.Progress(loss)],
    ).run()
    assert seen == [0, 0.25, 0.5, 0.75]
    moved = torch.cat([(p - q).flatten() for p, q in zip(network.parameters(), before)])
    assert float(moved.norm()) == pytest.approx(4 * 0.5, rel=0.1)


def test_weights_are_averaged() -> None:
    """By 9/10 of the first step's weights, later by the momentum; the network that is trained stays as it is."""
    network = Dummy()
    average = engines.average_of(network)
    start = network.conv.bias.detach().clone()
    engine = Engine(lambda engine, batch: network.conv.bias.data.add_(1))
    engines.AverageWeights(network, average, 0.5).attach(engine)
    engine.run([0] * 12)
    expected = start.clone()
    for t in range(1, 13):
        expected += max(0.5, 9 / (9 + t)) * (start + t - expected)
    torch.testing.assert_close(average.conv.bias, expected)
    torch.testing.assert_close(network.conv.bias.detach(), start + 12)
    assert not any(p.requires_grad for p in average.parameters()) and network.conv.bias.requires_grad


def test_learning_rate_rises_stays_and_falls() -> None:
    factor = engines.warm_flat_cosine(100, warm=3, flat=0.6, last=0.02)
    values = [factor(epoch) for epoch in range(101)]
    assert values[:4] == [0.25, 0.5, 0.75, 1] and set(values[3:61]) == {1}
    assert values[80] == pytest.approx(0.51) and values[100] == pytest.approx(0.02)
    assert all(a > b for a, b in zip(values[60:], values[61:]))


def test_prepare_pair_gives_image_twice() -> None:
    x = torch.rand(1, 2, 3, 3, 3)
    image, target = engines.prepare_pair({"image": x}, torch.device("cpu"))
    assert image is target and torch.equal(image, x)


def test_prepare_labelled_and_the_step() -> None:
    """The step hands scans and classes to the loss, and gradients reach the network that is validated."""
    batch = {"image": MetaTensor(torch.rand(1, 2, 3, 3, 3)), "label": MetaTensor(torch.ones(1, 2, 3, 3, 3))}
    image, target, args, kwargs = engines.prepare_labelled(batch, torch.device("cpu"))
    assert type(image) is Tensor and type(target) is Tensor and kwargs == {}

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(3.0))

        def forward_train(self, image: Tensor) -> Tensor:
            return self.scale * image

    class Loss(nn.Module):
        def forward(self, result: Tensor, image: Tensor, label: Tensor) -> Tensor:
            return (result - image).sum() + label.sum()

    network = Network()
    value = engines.step_loss(engines.TrainingStep(network, Loss())(image, *args), target)
    torch.testing.assert_close(value, 2 * image.sum() + 54)
    value.backward()
    torch.testing.assert_close(network.scale.grad, image.sum())


class Squares(nn.Module):
    """A loss with a weight that changes in a training."""

    capturable = True

    def __init__(self) -> None:
        super().__init__()
        self.weight = 1.0

    def forward(self, pred: Tensor, target: Tensor) -> Tensor:
        return self.weight * (pred - target[:, :1]).square().mean()


def train(on: bool, device: torch.device, make: Callable[[], nn.Module], loss: nn.Module, count: int = 6) -> tuple:
    """Loss and weights after each step, with clipped gradients and a falling learning rate; and the trainer."""
    torch.manual_seed(0)
    network = make().to(device)
    network.capturable = True
    optimizer = torch.optim.Adam(network.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.5**epoch)
    data = [{"image": torch.rand(2, 16, 16, 16)} for _ in range(count // 2)]
    found: list[tuple[float, Tensor]] = []

    def keep(engine: Engine) -> None:
        weights = torch.cat([p.detach().flatten() for p in network.parameters()]).cpu().clone()
        found.append((float(engine.state.output[0]["loss"]), weights))

    trainer = SupervisedTrainer(
        device=device,
        max_epochs=2,
        train_data_loader=DataLoader(data, batch_size=1),
        network=network,
        optimizer=optimizer,
        loss_function=loss,
        prepare_batch=engines.prepare_pair,
        iteration_update=engines.GraphedStep(on),
        train_handlers=[engines.ClipGradients(network, 0.5), LrScheduleHandler(scheduler, print_lr=False)],
    )
    trainer.add_event_handler(Events.ITERATION_COMPLETED, keep)
    trainer.logger.disabled = True
    trainer.run()
    return found, trainer


def test_step_as_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit-equal to MONAI's own step, by the stand-in of a graph; recorded once."""
    made: list[object] = []
    monkeypatch.setattr(graphs, "possible", lambda device: True)
    monkeypatch.setattr(graphs, "record", lambda *given: made.append(record(*given)) or made[-1])
    cpu = torch.device("cpu")
    own, _ = train(False, cpu, Dummy, Squares())
    replayed, trainer = train(True, cpu, Dummy, Squares())
    assert len(made) == 1 and len(own) == len(replayed) == 6
    for (loss, weights), (other_loss, other_weights) in zip(own, replayed):
        assert loss == other_loss and torch.equal(weights, other_weights)
    assert not torch.equal(own[0][1], own[5][1])
    assert trainer.state.output[0]["pred"].isfinite().all()


def test_graph_is_made_anew_for_another_weight_of_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[object] = []
    monkeypatch.setattr(graphs, "possible", lambda device: True)
    monkeypatch.setattr(graphs, "record", lambda *given: made.append(record(*given)) or made[-1])
    loss = Squares()
    _, trainer = train(True, torch.device("cpu"), Dummy, loss)
    before = float(trainer.state.output[0]["loss"])
    loss.weight = 3.0
    batch = {"image": trainer.state.output[0]["image"][None]}
    for _ in range(3):
        trainer._process_function(trainer, batch)
    assert len(made) == 2 and float(trainer.state.output[0]["loss"]) > 2 * before


@pytest.mark.parametrize("what", ["network", "loss", "amp", "off"])
def test_step_as_written(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where network or loss do not say that they can be captured, with mixed precision, and when switched off."""
    monkeypatch.setattr(graphs, "possible", lambda device: True)
    monkeypatch.setattr(graphs, "record", lambda *given: pytest.fail("recorded"))
    network, loss = Dummy(), Squares()
    network.capturable, loss.capturable = what != "network", what != "loss"
    trainer = SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=1,
        train_data_loader=DataLoader([{"image": torch.rand(2, 4, 4, 4)}] * 3, batch_size=1),
        network=network,
        optimizer=torch.optim.SGD(network.parameters(), lr=0.1),
        loss_function=loss,
        prepare_batch=engines.prepare_pair,
        iteration_update=engines.GraphedStep(what != "off"),
    )
    trainer.logger.disabled = True
    trainer.amp = what == "amp"
    trainer.scaler = None
    trainer.run()
    assert trainer.state.iteration == 3


@pytest.mark.gpu
def test_step_as_a_graph_on_gpu() -> None:
    """SACB-Net, as its train.json trains it; Adam's step is its learning rate wherever a gradient's sign is sure."""
    device, make = torch.device("cuda"), SACBNet
    (own, _), (replayed, trainer) = (train(on, device, make, RegistrationLoss(), 8) for on in (False, True))
    assert trainer._process_function._graphed.told == "replayed"
    for number, ((loss, weights), (other_loss, other_weights)) in enumerate(zip(own, replayed), 1):
        assert other_loss == pytest.approx(loss, abs=5e-3)
        assert (weights - other_weights).abs().mean() <= 1e-2 * number


def run_python(code: str, root: Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, timeout=120)


@pytest.mark.skipif(sys.platform != "linux", reason="the names of a process's threads are read from /proc")
def test_threads_of_the_process_group_end_before_python_does(repository: Path) -> None:
    """Even when a finished workflow, whose parts name each other, has kept the group."""
    code = """if True:
        import atexit, os, pathlib, torch
        from common.train import engines
        def threads():
            print(sum("gloo" in path.read_text() for path in pathlib.Path("/proc/self/task").glob("*/comm")))
        atexit.register(threads)  # after what is registered later
        os.environ |= dict(MASTER_ADDR="localhost", MASTER_PORT="0", RANK="0", WORLD_SIZE="1")
        torch.cuda.is_available = lambda: False
        engines.init_processes()
        class Workflow: pass
        workflow = Workflow()
        workflow.itself = workflow
        workflow.network = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(1, 1))
        torch.distributed.destroy_process_group()
        threads()
        del workflow
    """
    done = run_python(code, repository)
    assert done.returncode == 0, done.stderr
    kept, left = map(int, done.stdout.split())
    assert kept > 0 and left == 0


def test_tensorboard_parts() -> None:
    item = {"image": torch.arange(2.0)[:, None, None, None].expand(2, 3, 3, 3), "warped": torch.full((1, 3, 3, 3), 7.0)}
    fixed, moving = engines.fixed_and_moving([item])
    assert moving[0].unique().tolist() == [0] and fixed[0].unique().tolist() == [1]
    assert engines.warped_image([item])[0].unique().tolist() == [7]
