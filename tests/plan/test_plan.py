"""A plan's counts against a real model's, its dealing against a step's, its file formats and its errors."""

import dataclasses
import json
import re

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from trainer.__main__ import main
from trainer.base.errors import UserError
from trainer.base.yaml_files import dump
from trainer.cli import parse_plan
from trainer.data import orders
from trainer.data.sampler import Step, global_batch_size
from trainer.model.loading import load_for_training
from trainer.model.precision import autocast
from trainer.plan.asked import PlanConfig, links
from trainer.plan.costs import NAMES, features
from trainer.plan.devices import Device, find_device, find_link, table
from trainer.plan.gauge import PEAK_SIZES, device_file, kept
from trainer.plan.loads import loads_of, sampler_of
from trainer.plan.plan import PARTS
from trainer.plan.timing import Place, traffic
from trainer.plan.verb import prepared
from trainer.ranks import World
from trainer.step.plain import PlainStep

DEMO = ["--recipe", "demo", "--max_train_samples", "900", "--max_eval_samples", "50", "--max_test_samples", "50"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def own():
    config, asked = parse_plan([*DEMO, "--bf16", "true", "--per_device_train_batch_size", "16"], PlanConfig)
    return prepared(config, asked)


def rows_of(own, count, seed=0):
    return np.random.default_rng(seed).choice(len(own.data["train"]), count, replace=False)


@pytest.mark.parametrize("unpad", [True, False])
def test_flops_and_parameters_are_those_of_the_real_model(own, unpad):
    config = dataclasses.replace(own.config, unpad=unpad)
    planned, split = own if unpad else prepared(config, own.asked), own.data["train"]
    model = load_for_training(config, split.pairs.label_names).train()
    model.freeze_unused_rows(split.tokens)
    rows = rows_of(own, 13)
    batch = model.batch(split.tokens, split.pairs.label, rows, CPU, seed=1, step=1)
    with FlopCounterMode(display=False) as counter, autocast(CPU, True):
        model(batch).float().sum().backward()
    counted = planned.subject.count(split.tokens.lengths[rows])
    assert counted.flops == counter.get_total_flops()
    assert planned.parameters.total == model.num_parameters
    assert planned.parameters.trained == sum(p.numel() for p in model.parameters() if p.grad is not None)
    # And of any micro-batch, by the coefficients.
    by_features = np.array(features(planned.subject, split.tokens.lengths[rows], 16, True)) @ planned.costs.training
    found = dict(zip(NAMES, by_features, strict=True))
    assert found["linear"] + found["attention"] == pytest.approx(counted.flops, rel=1e-6)
    assert found["operations"] == pytest.approx(counted.operations, rel=0.03)
    assert found["moved"] == pytest.approx(counted.moved, rel=0.05)


@pytest.mark.parametrize("backend", ["ddp", "fsdp"])
def test_coefficients_hold_for_other_micro_batches_than_the_runs(own, backend):
    """Of captured steps, too, whose shapes are filled up to the largest micro-batch."""
    captured = prepared(own.config, dataclasses.replace(own.asked, device="h100"))
    for size in (1, 2, 5, 16, 40):
        guessed, traced = (captured.memory(4, size, backend, exact=exact, batch=160) for exact in (False, True))
        assert guessed.activations == pytest.approx(traced.activations, rel=0.1)


@pytest.mark.parametrize("ranks", [1, 3, 8])
def test_ranks_get_the_tokens_that_a_run_would_deal_them(own, ranks):
    split = own.data["train"]
    sampler = sampler_of(own.config, split, global_batch_size(own.config, ranks))
    loads = loads_of(sampler, split.tokens.lengths, own.subject, own.costs, ranks, 4)
    step = object.__new__(PlainStep)  # only its dealing
    vars(step).update(split=split, micro_batch_size=4, world=World(0, ranks, 0, torch.device("cpu")), _dealt=None)
    assert len(loads.tokens) == sampler.steps_per_epoch
    for number in (0, 5, len(loads.tokens) - 1):
        current: Step = sampler.at(number)
        dealt = [step.micro_batches(current, rank) for rank in range(ranks)]
        expected = [sum(int(split.tokens.lengths[rows].sum()) for rows in parts) for parts in dealt]
        assert loads.tokens[number].tolist() == expected
    assert loads.num_steps == sampler.num_steps


def test_peak_is_of_what_is_alive(own):
    """Twice the pairs keep twice the activations; to compute them again takes more products."""
    lengths = np.full(16, 30)
    once, twice = (own.subject.count(np.tile(lengths, times)).peak for times in (4, 8))
    assert 1.7 < twice / once < 2.1
    less = prepared(dataclasses.replace(own.config, gradient_checkpointing=True), own.asked)
    assert less.subject.count(lengths).linear > 1.2 * own.subject.count(lengths).linear


def test_json_has_its_keys_and_adds_up(tmp_path, capsys):
    picture = tmp_path / "plan.svg"
    argv = ["plan", *DEMO, "--json", "--nodes", "2", "--gpus_per_node", "2", "--device", "h100", "--price", "2.5"]
    assert main([*argv, "--picture", str(picture)]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert set(plan) == {"format", "model", "data", "run", "memory", "step", "seconds", "energy_kwh", "device_hours",
                         "cost", "scaling", "choice"}  # fmt: skip
    assert set(plan["step"]["parts"]) == set(PARTS)
    assert plan["step"]["seconds"] == pytest.approx(sum(plan["step"]["parts"].values()))
    memory = plan["memory"]
    assert memory["total"] == sum(memory[name] for name in ("process", "state", "activations", "slack"))
    assert memory["fits"]
    assert plan["run"]["ranks"] == 4
    assert [world["ranks"] for world in plan["scaling"]] == [2**power for power in range(11)]
    assert plan["scaling"][0]["efficiency"] == 1
    assert plan["cost"] == pytest.approx(2.5 * plan["device_hours"])
    assert picture.read_text().startswith("<?xml")


def small(tmp_path, base="cpu", **changed):
    """A file of a device with other values."""
    entries = table()["devices"][base] | {name: {"value": value, "source": "a test"} for name, value in changed.items()}
    path = tmp_path / "device.yaml"
    path.write_text(dump({"devices": {"small": entries}}))
    return str(path)


def test_ranks_of_a_cpu_share_its_memory(tmp_path, capsys):
    assert main(["plan", *DEMO, "--device", small(tmp_path, memory=1.5e9), "--gpus_per_node", "4"]) == 2
    assert re.search(r"4 ranks of a machine need \d\.\d GB, and .* has 1.5 GB; what fits: 2 ranks a machine, by "
                     "--gpus_per_node 2", capsys.readouterr().err)  # fmt: skip


def test_what_cannot_fit_says_what_would(tmp_path, capsys):
    device = small(tmp_path, "h100", memory=16e6, process=1e6)
    argv = ["plan", *DEMO, "--device", device, "--train_batch_size", "256", "--per_device_train_batch_size", "256"]
    assert main(argv) == 2
    said = capsys.readouterr()
    assert "DOES NOT FIT" in said.out
    assert "what fits: --train_batch_size 256 --per_device_train_batch_size" in said.err
    # What it says can be typed, and fits.
    would = said.err.split("what fits: ")[1].split(";")[0].split()
    assert main(["plan", *DEMO, "--device", device, *would, "--json", "--eval_strategy", "no"]) == 0
    assert json.loads(capsys.readouterr().out)["memory"]["largest_micro_batch"] >= int(would[-1]) > 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--device", "h1000"], "unknown device 'h1000'; known are rtx3090, a100, h100, h200, cpu"),
        (["--link", "string"], "known are nvlink4, nvlink3, pcie4, ethernet1"),
        (["--measure", "here.yaml", "--link", "string"], "known are nvlink4, nvlink3, pcie4, ethernet1"),
        (["--nodes", "0"], "nodes must be above 0, got 0"),
        (["--gpus_per_node", "-2"], "gpus_per_node must be above 0, got -2"),
        (["--device", "absent.yaml"], "absent.yaml"),
        (["--nodes", "100000"], "a plan is of at most 65,536"),
        (["--nodes", "2", "--backend", "single"], "backend single cannot wire 2 ranks; use --backend ddp"),
        (["--picture", "plan.gif", "--json"], "must end with .svg or .png"),
        (["--picture", "nowhere/plan.svg"], "nowhere/plan.svg: no such folder"),
    ],
)
def test_bad_input_is_one_clear_error_before_data_is_read(options, said, capsys, monkeypatch):
    monkeypatch.delattr("trainer.plan.verb.read_pairs")
    assert main(["plan", *DEMO, *options]) == 2
    assert said in capsys.readouterr().err


def test_files_of_devices_are_checked_field_by_field(tmp_path):
    good, _ = find_device(small(tmp_path, memory=1e9))
    assert good == dataclasses.replace(find_device("cpu")[0], memory=1e9)
    with pytest.raises(UserError, match="bandwidth must be above 0"):
        find_device(small(tmp_path, bandwidth=-1))
    for sharing, said in ((["1=1", "x=2"], "got 'x=2'"), (["1=1", "2=-3"], "got '2=-3'"), (["1=1", "2=7"], "got '2=7'"),
                          (["2=0.5"], "must begin with 1=1"), (["1=1", "4=1", "2=1"], "must ascend")):  # fmt: skip
        with pytest.raises(UserError, match=f"device.yaml: sharing .*{said}"):
            find_device(small(tmp_path, sharing=sharing))
    with pytest.raises(UserError, match="unknown entry 'bandwith'"):
        find_device(small(tmp_path, bandwith=1))
    entries = dict(table()["devices"]["cpu"])
    for broken, said in ((entries | {"slack": 1.2}, "slack must be {value"),
                         ({k: v for k, v in entries.items() if k != "watts"}, "lacks watts")):  # fmt: skip
        (tmp_path / "broken.yaml").write_text(dump({"devices": {"x": broken}}))
        with pytest.raises(UserError, match=said):
            find_device(str(tmp_path / "broken.yaml"))


def test_every_number_of_the_table_has_a_source():
    for name in table()["devices"]:
        assert isinstance(find_device(name)[0], Device)
    for name in table()["links"]:
        assert find_link(name).bandwidth > 0
    assert find_link("infiniband400x8").bandwidth == 8 * find_link("infiniband400").bandwidth == 400e9
    assert find_link("100Mbit").bandwidth == 12.5e6


def test_what_is_measured_is_read_back(own, tmp_path):
    """Seconds that known rates would give lead back to them."""
    rates = {"products": 2e11, "bytes": 8e9, "operation": 2e-5}
    counts = [own.subject.count(np.full(pairs, length)) for pairs, length in ((16, 30), (4, 12), (8, 60), (2, 20))]
    seconds = [c.linear / 2e11 + c.attention / 2e10 + c.moved / 8e9 + c.operations * 2e-5 for c in counts]
    rank = {"seconds": seconds, "products": rates["products"], "optimizer": 32 * 1000 / 9e9, "trained": 1000,
            "peaks": [1e8 + 1e7 + 1.5 * alive for alive in (1e7, 2e7, 4e7)], "all_reduce": []}  # fmt: skip
    found = {"ranks": [rank], "counts": [[getattr(c, name) for name in NAMES] for c in counts], "state": 1e7,
             "activations": [1e7, 2e7, 4e7], "threads": 1}  # fmt: skip
    shared = [2.5 * own for own in seconds]
    both = [rank | {"seconds": shared, "all_reduce": [1e-3 + size / 1e9 for size in PEAK_SIZES]}] * 2
    both[1] = both[1] | {"peaks": [peak + 3e7 for peak in rank["peaks"]]}  # the larger one counts
    path = tmp_path / "measured"  # any name will do
    path.write_text(dump(device_file({1: found, 2: found | {"ranks": both}}, own.config)))
    device, _ = find_device(str(path))
    assert device.linear_bf16 * device.linear_reached == pytest.approx(2e11)
    assert device.bandwidth * device.bandwidth_reached == pytest.approx(8e9, rel=1e-3)
    assert device.bandwidth * device.optimizer_reached == pytest.approx(9e9)
    assert device.operation == pytest.approx(2e-5, rel=1e-3)
    assert device.resident(alone=True) == pytest.approx((1e8, 1.5))
    assert device.resident(alone=False) == pytest.approx((1.3e8, 1.5))
    assert device.share(2) == pytest.approx(0.4, rel=1e-3)
    assert device.share(4) == pytest.approx(0.2, rel=1e-3)
    inside, between = links(PlanConfig(device=str(path), gpus_per_node=2), device)
    assert inside.bandwidth == pytest.approx(1e9, rel=1e-3)
    assert between == find_link("ethernet100")


@pytest.mark.parametrize("activations", [[0.0] * 3, [5e6] * 3, [0, 1e5, 3e6]])
def test_peaks_that_do_not_tell_the_slack(activations):
    """Of one pair, or where gradients are most of them: nothing absurd comes of it."""
    found = {"ranks": [{"peaks": [5e8, 5.1e8, 5.2e8]}], "state": 1e8, "activations": activations}
    process, slack = kept(found)
    assert slack == 2
    assert 3.9e8 < process < 4.2e8


def other(own, **changed):
    """`own` with other fields of its run, and the same coefficients."""
    made = dataclasses.replace(own, config=dataclasses.replace(own.config, **changed), dealt={})
    vars(made)["costs"] = own.costs
    return made


def test_a_step_has_the_pairs_that_there_are(own):
    """900 of them, also where a batch has room for more; a short last step counts as what it is."""
    once = {"num_train_epochs": 1}
    whole, short = other(own, train_batch_size=4096, **once).step(4), other(own, train_batch_size=64, **once).step(2)
    assert (whole.pairs, whole.batch, whole.num_steps) == (900, 900, 1)
    assert (round(short.pairs, 6), short.batch, short.num_steps) == (60, 64, 15)
    assert short.mean_tokens == pytest.approx(own.data["train"].tokens.lengths.sum() / 15 / 2)
    # The dev split is scored after each epoch of nine steps, and at the end.
    of_epochs = other(own, train_batch_size=100, max_steps=20, eval_strategy="epoch")
    assert of_epochs.num_evaluations(1) == 3


def test_micro_batches_that_fit_are_found_to_the_pair(own):
    # Just as much memory as 23 pairs a forward need.
    room = own.memory(1, 23, "single", exact=False, batch=300).total
    limit = dataclasses.replace(own, device=dataclasses.replace(own.device, memory=room))
    vars(limit)["costs"] = own.costs
    assert limit.largest(1, "single", 300) == 23
    # And a backend that shards has only a layer's gradients whole.
    assert limit.memory(8, 8, "fsdp", exact=False).state < limit.memory(8, 8, "ddp", exact=False).state / 2


def test_a_plan_leaves_no_order_behind(own, monkeypatch):
    monkeypatch.setattr("trainer.data.sampler.MAPPED", 100)
    made = other(own, seed=991)
    made.step(1)
    path = orders._path(made.orders.sampler(16)._name(0))
    assert path.exists()
    made.close()
    assert not path.exists()


def test_the_link_of_a_node_joins_no_nodes():
    h100, _ = find_device("h100")
    inside, between = find_link("nvlink4"), find_link("ethernet100")
    assert links(PlanConfig(device="h100", gpus_per_node=8), h100) == (inside, between)
    given = find_link("10Gbit")
    assert links(PlanConfig(device="h100", gpus_per_node=8, link="10Gbit"), h100) == (given, between)
    assert links(PlanConfig(device="h100", nodes=2, gpus_per_node=8, link="10Gbit"), h100) == (inside, given)


def test_traffic_is_that_of_a_ring(own):
    place = Place(2, 1, find_link("loopback"), find_link("100Mbit"))
    parameters, device = own.parameters, own.device

    def of(backend, compute=1e9, forwards=1, hook=False, place=place):
        return traffic(parameters, device, place, backend, "plain", compute, forwards, hook)

    sent = of("ddp")
    assert sent.sent == 4 * parameters.trained  # 2 (P - 1) / P of it
    assert sent.seconds > sent.sent / 12.5e6 > sent.hidden > 0
    assert of("ddp", hook=True).sent == sent.sent / 2
    alone = Place(1, 1, find_link("loopback"), find_link("loopback"))
    assert of("single", place=alone).sent == 0
    # Gradients go out in the last backward only; weights that are sharded are gathered for each forward.
    assert of("ddp", 0.03, 4).hidden == pytest.approx(0.02 / 4)
    assert of("ddp", 0.03, 4).sent == sent.sent
    assert of("zero3", forwards=4).sent == 4 * of("zero3").sent
    # A last node that is not full has no ranks that send nothing.
    odd = of("ddp", place=Place(3, 2, find_link("loopback"), find_link("100Mbit")))
    assert odd.sent == pytest.approx(2 * 2 / 3 * 4 * parameters.trained)


@pytest.mark.full
def test_this_machine_is_measured(tmp_path, capsys):
    path = tmp_path / "here.yaml"
    argv = ["plan", *DEMO, "--measure", str(path), "--gpus_per_node", "2", "--json", "--eval_strategy", "no"]
    assert main(argv) == 0
    assert json.loads(capsys.readouterr().out)["step"]["seconds"] > 0
    assert find_device(str(path))[0].kind == "cpu"
    assert main(["plan", *DEMO, "--device", str(path), "--bf16", "true"]) == 0
    assert "here.yaml was measured on builtin, fp32, unpadded, and this run is builtin, bf16" in capsys.readouterr().err
