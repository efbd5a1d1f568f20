"""The forecast against what is then measured; plans that fit; tiles and coarser grids against the whole."""

import time

import pytest
import torch
from torch import Tensor, nn

from common import InputError
from common.fields import identity
from common.run import forecast, progress
from common.run.engines import RegistrationInferer


class Wide(nn.Module):
    """32 channels at full size: some 300 bytes a voxel."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv3d(2, 32, 3, padding=1), nn.ReLU(), nn.Conv3d(32, 3, 3, padding=1))

    def forward(self, image: Tensor) -> Tensor:
        return self.layers(image)


def linear(image: Tensor) -> Tensor:
    """A displacement that depends on the scans voxel by voxel."""
    return torch.cat([image[:, :1], image[:, 1:], image[:, :1] - image[:, 1:]], 1)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_memory_is_forecast(device: str) -> None:
    """From the crop to a grid of four times its size, within a tenth of what that one then needs."""
    net = Wide().to(device)
    image = torch.rand(1, 2, 96, 104, 100, device=device)
    with torch.inference_mode():
        cost = forecast.measure_cost(net, image)
        found = forecast._timed(lambda: net(image), image.device)[1]
    assert cost.bytes * image[0, 0].numel() == pytest.approx(found, rel=0.1) and found > 200 * image[0, 0].numel()
    assert cost.seconds > 0


def test_steps_of_the_refinement_are_counted() -> None:
    def run_steps(steps: int):
        return lambda image: [net(image) for _ in range(1 + 3 * steps)][0]

    net, image = Wide(), torch.rand(1, 2, 70, 70, 70)
    with torch.inference_mode():
        plain = forecast.measure_cost(net, image)
        refined = forecast.measure_cost(net, image, steps=10, run_steps=run_steps)
    assert refined.seconds > 5 * plain.seconds, "one and thirty passes"


COST = forecast.Cost(1e-6, 1000.0)


@pytest.mark.parametrize("policy", ["tile", "coarsen"])
@pytest.mark.parametrize("share", [0.9, 0.5, 0.1])
def test_plans_fit(policy: str, share: float) -> None:
    size = (160, 192, 144)
    limit = share * 160 * 192 * 144 * COST.bytes
    how, smaller = forecast.plan(size, COST, limit, policy)
    assert how == policy and all(n % 16 == 0 and n <= m for n, m in zip(smaller, size))
    assert 0.4 * limit < smaller[0] * smaller[1] * smaller[2] * COST.bytes <= limit
    assert forecast.plan(size, COST, limit / share, policy) == ("whole", size)
    assert forecast.plan(size, COST, None, policy) == ("whole", size)


def test_what_cannot_fit_is_refused() -> None:
    words = r"--too_large stop: 4.1 GiB are needed for 160 x 192 x 144 voxels and 1.0 GiB may be used; choose"
    with pytest.raises(InputError, match=words):
        forecast.plan((160, 192, 144), COST, forecast.GIB, "stop")
    for policy in ("tile", "coarsen"):
        with pytest.raises(InputError, match="not even 32 voxels a side would fit"):
            forecast.plan((160, 192, 144), COST, 1e6, policy)


def test_tiles_give_what_the_whole_gives() -> None:
    """Of a displacement that is found voxel by voxel; on a size that no tile divides."""
    image = torch.rand(1, 2, 50, 61, 45)
    found = forecast.run_planned(linear, image, "tile", (32, 32, 32))
    torch.testing.assert_close(found, linear(image), atol=1e-5, rtol=1e-5)


def test_a_coarser_grid_gives_displacements_in_voxels_of_the_fine_one() -> None:
    """A ramp image: what is found on the coarse grid in its voxels comes back in those of the fine one."""
    size, coarse = (49, 65, 33), (25, 33, 17)

    def found_there(image: Tensor) -> Tensor:
        assert image.shape[2:] == coarse
        return 0.1 * identity(coarse, image)

    image = torch.rand(1, 2, *size)
    found = forecast.run_planned(found_there, image, "coarsen", coarse)
    torch.testing.assert_close(found, 0.1 * identity(size, image), atol=1e-4, rtol=1e-4)


def test_the_inferer_tiles_when_memory_is_short() -> None:
    """The displacement is about the same, the plan is noted, and without a policy the pair is stopped."""
    torch.manual_seed(0)
    image, net = torch.rand(1, 2, 96, 80, 80), Wide()
    with torch.inference_mode():
        progress.take()
        whole = RegistrationInferer()(image, net)
        notes, facts = progress.take()
        assert notes == [] and facts["forecast"]["plan"] == "whole" and 0.1 < facts["forecast"]["gib"] < 1
        tiled = RegistrationInferer(memory=0.1, too_large="tile")(image, net)
        notes, facts = progress.take()
        assert "registered in tiles of" in notes[0] and facts["forecast"]["plan"] == "tile"
        inner = (..., *[slice(2, -2)] * 3)  # the convolutions see zeros beyond a tile, blended away inside
        assert (tiled - whole)[inner].abs().mean() < 0.1 * whole.std()
        with pytest.raises(InputError, match="--too_large stop: 0.* GiB are needed"):
            RegistrationInferer(memory=0.1)(image, net)
        coarse = RegistrationInferer(memory=0.1, too_large="coarsen")(image, net)
    assert coarse.shape == whole.shape and "coarser grid" in progress.take()[0][0]


def test_a_small_pair_is_forecast_only_against_a_limit() -> None:
    """And what was measured on it does not stand for larger ones."""
    small, large, net = torch.rand(1, 2, 48, 48, 48), torch.rand(1, 2, 80, 72, 64), Wide()
    with torch.inference_mode():
        progress.take()
        RegistrationInferer()(small, net)
        assert "forecast" not in progress.take()[1]
        with pytest.raises(InputError, match="GiB are needed for 48 x 48 x 48 voxels"):
            RegistrationInferer(memory=0.01)(small, net)
        both = RegistrationInferer(memory=10)
        both(small, net)
        assert both._cost is None and progress.take()[1]["forecast"]["plan"] == "whole"
        both(large, net)
        assert both._cost is not None


def test_the_whole_pair() -> None:
    """What was spent is known, the network's memory counts on the CPU only, a large scan needs most when written."""
    gib, cpu = forecast.GIB, torch.device("cpu")
    if forecast.resident_memory() is None:
        pytest.skip("this system does not say how much memory a process has")
    now = forecast.resident_memory() - forecast.kept_memory()
    pair = forecast.whole_pair(forecast.Cost(10.0, 64 * gib), cpu, 1_000_000, 5.0)
    assert pair.seconds == pytest.approx(15 + forecast.DELIVERY.seconds * 1e6)
    assert 64 * gib <= pair.bytes - now < 65 * gib
    on_gpu = forecast.whole_pair(forecast.Cost(10.0, 64 * gib), torch.device("cuda"), 1_000_000, 5.0)
    assert on_gpu.bytes < 32 * gib
    large = forecast.whole_pair(forecast.Cost(10.0, gib), cpu, 10**9, 5.0)
    assert forecast.DELIVERY.bytes * 1e9 <= large.bytes - now < forecast.DELIVERY.bytes * 1e9 + gib


def test_the_inferer_forecasts_the_whole_pair() -> None:
    image, net = torch.rand(1, 2, 80, 72, 64), Wide()
    with torch.inference_mode():
        progress.take()
        RegistrationInferer()(image, net, started=time.time() - 7, scan_voxels=1000)
    told = progress.take()[1]["forecast"]
    assert told["pair_seconds"] >= 7 + told["seconds"] and told["pair_gib"] > told["gib"]


def test_options_are_checked() -> None:
    with pytest.raises(InputError, match="--memory must be a number of GiB, got many"):
        RegistrationInferer(memory="many")
    with pytest.raises(InputError, match="--too_large must be one of stop, tile, coarsen, got shrink"):
        RegistrationInferer(too_large="shrink")


def test_memory_of_this_machine() -> None:
    free, peak = forecast.free_memory(torch.device("cpu")), forecast.peak_memory(torch.device("cpu"))
    assert free is None or 2**20 < free < 2**50
    assert peak is None or 2**25 < peak < 2**45


def test_a_known_cost_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes and steps add up in time, the largest counts in memory, and the network runs once: for the pair itself."""
    cpu, work = torch.device("cpu"), forecast.Work(2.0, 1000.0)
    monkeypatch.setattr(forecast, "unit_seconds", lambda device: 1e-6)
    step = forecast.STEP["lncc"]
    assert forecast.known_cost(work, cpu) == forecast.Cost(2e-6, forecast.HEAP * 1000)
    both = forecast.known_cost(work, cpu, passes=2, steps=10, similarity="lncc")
    assert both.seconds == pytest.approx((2 * 2 + 10 * step.units) * 1e-6)
    assert both.bytes == forecast.HEAP * max(1000.0, step.bytes)
    net, calls = Wide(), []
    net.register_forward_hook(lambda *_: calls.append(1))
    with torch.inference_mode():
        progress.take()
        RegistrationInferer(cost={"units": 2.0, "bytes": 1000.0})(torch.rand(1, 2, 80, 72, 64), net)
    told = progress.take()[1]["forecast"]
    assert len(calls) == 1 and told["gib"] == pytest.approx(forecast.HEAP * 1000 * 80 * 72 * 64 / forecast.GIB)


def test_the_unit_is_measured_once() -> None:
    first = forecast.unit_seconds(torch.device("cpu"))
    assert 0 < first < 1e-3 and forecast.unit_seconds(torch.device("cpu")) == first
