"""What a training says of its arithmetic: FLOP/s of a rank, and their share of the device's peak."""

from __future__ import annotations

import json
from unittest import mock

import pytest
import torch
from support.invented_steps import result
from support.small_run import TARGET_TOP2, make_recipe

from lsmoe_ds.data.batches import Step
from lsmoe_ds.parallel.topology import Topology
from lsmoe_ds.planning.arithmetic import flops
from lsmoe_ds.planning.devices import DEVICES
from lsmoe_ds.training import monitor as module
from lsmoe_ds.training import throughput
from lsmoe_ds.training.monitor import Monitor
from lsmoe_ds.training.throughput import Throughput, Work, describe_rates, find_peak, peak_of

STEP = Step([], target_tokens=50, source_tokens=60, sentences=10, directions=[], given_tokens=10)


def recipe_in(tmp_path, peak: float | None = None, trainable="all"):
    recipe = make_recipe(tmp_path, TARGET_TOP2, TARGET_TOP2)
    recipe.training.peak_flops, recipe.training.trainable = peak, trainable
    return recipe


def test_the_flops_are_those_of_the_plan_at_the_mean_length(tmp_path):
    """Two steps of 60 + 50 + 10 tokens in 10 sentences of each side: 6 tokens each."""
    recipe = recipe_in(tmp_path)
    planned = flops(recipe, 6)
    found = Throughput(recipe, 1, None).flops(Work() + STEP + STEP)
    assert found == 2 * (60 * planned.source_training + 60 * planned.target_training)
    assert planned != flops(recipe, 7), "the length counts"


def test_what_is_frozen_takes_less(tmp_path):
    whole, frozen = recipe_in(tmp_path), recipe_in(tmp_path, trainable=["decoder.*"])
    taken = [Throughput(recipe, 1, None).flops(Work() + STEP) for recipe in (whole, frozen)]
    planned = flops(frozen, 6)
    assert taken[1] == 60 * planned.source_training + 60 * planned.target_training < taken[0]


def test_layers_that_are_computed_again_count_once(tmp_path):
    """Utilization is of the FLOPs that the model needs; those of the plan include the second computation."""
    once, again = recipe_in(tmp_path), recipe_in(tmp_path)
    again.training.activation_checkpointing = True
    assert flops(again, 6).source_training > flops(once, 6).source_training
    taken = [Throughput(recipe, 1, None).flops(Work() + STEP) for recipe in (once, again)]
    assert taken[0] == taken[1]


def test_counting_leaves_the_random_numbers_of_the_training_alone(tmp_path, monkeypatch):
    def drawing(recipe):
        torch.rand(3)
        return lambda name: True

    monkeypatch.setattr(throughput, "trains", drawing)
    before = torch.get_rng_state()
    assert Throughput(recipe_in(tmp_path), 1, None).flops(Work() + STEP)
    assert torch.equal(torch.get_rng_state(), before)


def test_rates_are_of_one_rank(tmp_path):
    recipe = recipe_in(tmp_path)
    work = Work() + STEP
    of_all = Throughput(recipe, 1, None).flops(work)
    rates = Throughput(recipe, 4, of_all).rates(work, seconds=2.0)
    assert rates == {"tflops_per_rank": pytest.approx(of_all / 8e12), "mfu": pytest.approx(1 / 8)}
    assert describe_rates(rates) == " · 12.5 % MFU"
    rates = Throughput(recipe, 4, None).rates(work, seconds=2.0)
    assert list(rates) == ["tflops_per_rank"]


@pytest.mark.parametrize(
    ("tflops", "text"),
    [(123.44, "123.4 TFLOP/s"), (0.01234, "12.3 GFLOP/s"), (7.87e-5, "78.7 MFLOP/s"), (1e-9, "0.0 MFLOP/s")],
)
def test_rates_are_written_in_a_unit_of_their_size(tflops, text):
    assert describe_rates({"tflops_per_rank": tflops}) == f" · {text} a rank"
    assert describe_rates({"tflops_per_rank": tflops, "mfu": 0.381}) == " · 38.1 % MFU"
    assert describe_rates({}) == ""


NAMES = {
    "NVIDIA A100-SXM4-80GB": (312, 156, 19.5),
    "NVIDIA A100-PCIE-40GB": (312, 156, 19.5),
    "NVIDIA H100 80GB HBM3": (989, 494.5, 67),
    "NVIDIA H100 PCIe": (756, 378, 51),
    "NVIDIA H100 NVL": (835, 417.5, 60),
    "NVIDIA H200": (989, 494.5, 67),
    "NVIDIA GH200 480GB": (989, 494.5, 67),
    "NVIDIA B200": (2250, 1125, 75),
    "NVIDIA L40S": (362, 181, 91.6),
    "NVIDIA L4": (121, 60.5, 30.3),
    "Tesla V100-SXM2-32GB": (125, None, 15.7),
    "Tesla V100-PCIE-16GB": (112, None, 14),
    "NVIDIA A100-SXM4-40GB MIG 1g.5gb": (None, None, None),
    "NVIDIA A10": (None, None, None),
    "NVIDIA GeForce GTX 1080": (None, None, None),
}


@pytest.mark.parametrize("name", NAMES)
def test_peaks_are_found_by_the_name_of_the_device(name):
    half, tf32, full = NAMES[name]
    found = [find_peak(name, True), find_peak(name, False)]
    assert found == [None if each is None else pytest.approx(each * 1e12) for each in (half, full)]
    if tf32 is not None:
        assert find_peak(name, False, tf32=True) == pytest.approx(tf32 * 1e12)


def test_the_peak_is_that_of_the_recipe_or_of_the_device_in_its_precision(tmp_path):
    given, free = recipe_in(tmp_path, peak=5e12), recipe_in(tmp_path)
    assert peak_of(free, Topology.single()) is None, "nothing is known of a CPU"
    assert peak_of(given, Topology.single()) == 5e12
    half = make_recipe(tmp_path, None, None, bf16=True)
    device = {"get_device_name": lambda _: "NVIDIA A100-SXM4-80GB", "get_device_capability": lambda _: (8, 0)}
    with mock.patch.multiple(torch.cuda, **device):
        assert peak_of(free, Topology.single("cuda:0")) == 19.5e12
        assert peak_of(half, Topology.single("cuda:0")) == 312e12
        assert peak_of(given, Topology.single("cuda:0")) == 5e12
        with mock.patch.object(torch, "get_float32_matmul_precision", lambda: "high"):
            assert peak_of(free, Topology.single("cuda:0")) == 156e12
            assert peak_of(half, Topology.single("cuda:0")) == 312e12


def test_of_a_host_nothing_is_counted(tmp_path):
    recipe = recipe_in(tmp_path)
    recipe.model.huggingface = tmp_path
    assert Throughput(recipe, 1, 1e12).rates(Work() + STEP, 1.0) == {}


def test_records_and_lines_have_the_rates_of_their_own_steps(tmp_path, capsys):
    """Ten seconds a step on two ranks; the second record and the second line are of two steps."""
    recipe = recipe_in(tmp_path)
    of_step = Throughput(recipe, 2, None).flops(Work() + STEP)
    with (
        mock.patch.object(module.time, "perf_counter") as now,
        Monitor(tmp_path, 4, 2, True, 2, Throughput(recipe, 2, of_step / 10)) as monitor,
    ):
        now.return_value = 100.0
        monitor.start(0, None)
        for number in range(1, 5):
            now.return_value += 10 if number < 3 else 20
            monitor.after_step(number, STEP, result(1.0))
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [each["mfu"] for each in records] == pytest.approx([0.5, 0.25])
    assert [each["tflops_per_rank"] for each in records] == pytest.approx([of_step / 20e12, of_step / 40e12])
    assert [each["tokens_per_second"] for each in records] == pytest.approx([11, 5.5])
    assert [each["tokens_per_second_per_rank"] for each in records] == pytest.approx([5.5, 2.75])
    lines = capsys.readouterr().err.splitlines()
    assert ["· 50.0 % MFU ·" in lines[0], "· 25.0 % MFU ·" in lines[-1]] == [True, True], lines


def test_every_known_device_is_found_by_its_own_row():
    for name, device in DEVICES.items():
        found = find_peak(f"NVIDIA {name}", True), find_peak(f"NVIDIA {name}", False)
        assert found == (device.half, device.single), name
