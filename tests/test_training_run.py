"""Whole trainings of a few steps: what they leave behind, how they go on, and how they fail."""

import json
import os
import subprocess
import sys
from functools import partialmethod

import pytest
import torch
import yaml
from small import small_model, write_task
from training import DISTILL, FEATURES, LENGTH, ORDERED, save_host, settings, write_questions

import vtc
from vtc import cli
from vtc.learned import from_pretrained
from vtc.training import distill, objectives, on_features, run, train, trainer


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    return save_host(tmp_path_factory.mktemp("host"))


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    return write_questions(tmp_path_factory.mktemp("questions"))


@pytest.fixture
def make(host, questions, tmp_path):
    """A configuration with these stages, into a folder of this name."""
    return lambda *stages, into="out", **more: settings(host, questions, tmp_path / into, *stages, **more)


def report(config):
    return json.loads((run.Path(config["output"]) / "train.json").read_text())


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def logged(config, stage):
    folder = run.Path(config["output"]) / "checkpoints" / stage
    history = json.loads((trainer.last_checkpoint(folder) / "trainer_state.json").read_text())["log_history"]
    return [row["loss"] for row in history if "loss" in row]


STAGES = {
    "features": {**FEATURES, "learning_rate": 2e-2, "steps": 60},
    "distill": {**DISTILL, "learning_rate": 1e-2, "counts": [4]},
    "length": {**LENGTH, "learning_rate": 1e-2},
    "length of answers": {**LENGTH, "learning_rate": 1e-2, "errors": "answers", "counts": [1, 4]},
    "muon": {**FEATURES, "muon": 3e-2, "steps": 60},
}


@pytest.mark.parametrize("stage", STAGES)
def test_every_kind_of_stage_lowers_its_loss(make, stage):
    config = make({"steps": 40, **STAGES[stage], "batch_size": 6, "logging_steps": 1, "weight_decay": 0})
    config["stages"][0]["steps"] = max(40, config["stages"][0]["steps"])
    train(config)
    losses = logged(config, f"1-{STAGES[stage]['kind']}")
    assert len(losses) == config["stages"][0]["steps"]
    assert sum(losses[-5:]) / 5 < 0.95 * sum(losses[:5]) / 5


def test_what_a_training_leaves_behind(make, host, capsys):
    config = make(FEATURES, DISTILL, LENGTH)
    module = train(config)
    told = report(config)
    out = capsys.readouterr().out
    assert "ordered: 1-features" in out and "2-distill" in out and f"saved in {config['output']}" in out
    assert told["finished"] and told["processes"] == 1
    assert [stage["pictures"] for stage in told["stages"].values()] == [6] * len(told["stages"])
    assert told["config"]["module"] == ORDERED and told["versions"]["torch"] == torch.__version__
    assert list(told["stages"]) == ["1-features", "2-distill", "3-length"]
    for stage in told["stages"].values():
        assert stage["minutes"] > 0 and stage["steps"] == 4 and stage["last"]["loss"] > 0
    assert told["seconds"] == pytest.approx(60 * sum(s["minutes"] for s in told["stages"].values()), abs=0.1)
    assert set(told["stages"]["2-distill"]["last"]) == {"loss", "kl", "ce", "step"}
    assert same(from_pretrained(config["output"]), module) and not module.training
    assert float(module.std.std()) > 0  # it was calibrated
    model = small_model()
    with vtc.compress(model, config["output"], keep=4) as handle:  # of this host
        assert "ordered" in handle.describe()
    other = small_model(seed=1)
    with pytest.raises(ValueError, match="was trained on"):
        vtc.compress(other, config["output"], keep=4)


def test_checkpoints_are_folders_of_the_module(make):
    config = make({**DISTILL, "save_steps": 2})
    train(config)
    folder = run.Path(config["output"]) / "checkpoints" / "1-distill"
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    for checkpoint in folder.glob("checkpoint-*"):
        weights = checkpoint / "model.safetensors"
        assert weights.stat().st_size < 200_000  # no weight of the host is in it
        with vtc.compress(small_model(), checkpoint, keep=4):
            pass
    assert same(from_pretrained(folder / "checkpoint-4"), from_pretrained(config["output"]))


class Stop(Exception):
    pass


def stop_at(monkeypatch, step):
    """As if the process ended in the middle of a step."""
    compute = trainer.ModuleTrainer.compute_loss

    def stopping(self, *args, **kwargs):
        if self.state.global_step == step:
            raise Stop
        return compute(self, *args, **kwargs)

    monkeypatch.setattr(trainer.ModuleTrainer, "compute_loss", stopping)


@pytest.mark.parametrize("stage", ["features", "distill"])
def test_a_training_that_is_resumed_ends_with_the_same_weights(make, monkeypatch, stage):
    stages = [
        {**FEATURES, "steps": 5, "batch_size": 2, "save_steps": 2},
        {**DISTILL, "steps": 5, "save_steps": 3, "gradient_accumulation_steps": 2},
    ]
    expected = train(make(*stages, into="unbroken"))
    config = make(*stages)
    with monkeypatch.context() as patch:
        if stage == "distill":
            patch.setitem(objectives.OBJECTIVES, "distill", Broken)
        else:
            stop_at(patch, 3)
        with pytest.raises(Stop):
            train(config)
    assert not (run.Path(config["output"]) / "model.safetensors").exists()
    found = train(config, resume=True)
    assert same(found, expected) and report(config)["finished"]
    again = train(config, resume=True)  # nothing is left to do
    assert same(again, expected)


class Broken(distill.Distill):
    def losses(self, batch):
        if self.step == 4 and self.micro == 1:  # between two forwards, in the middle of an epoch
            raise Stop
        return super().losses(batch)


def test_muon_is_resumed_with_its_momentum(make, monkeypatch):
    stage = {**DISTILL, "steps": 4, "muon": 3e-3, "save_steps": 2}
    expected = train(make(stage, into="unbroken", adapter={"rank": 2}))
    plain = train(make({**DISTILL, "steps": 4}, into="plain", adapter={"rank": 2}))
    assert not same(expected, plain)
    config = make(stage, adapter={"rank": 2})
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        with pytest.raises(Stop):
            train(config)
    assert same(train(config, resume=True), expected)


def test_the_optimizer_is_the_one_that_is_asked_for(make, monkeypatch):
    made = []
    create = trainer.ModuleTrainer.create_optimizer
    monkeypatch.setattr(
        trainer.ModuleTrainer, "create_optimizer", lambda self, *args: made.append(create(self, *args))
    )
    train(make(FEATURES, into="a"))
    train(make({**FEATURES, "optim": "sgd"}, into="b"))
    train(make({**FEATURES, "muon": 1e-3}, into="c"))
    assert [type(one).__name__ for one in made] == ["AdamW", "SGD", "Together"]
    matrices, others = (
        {id(p) for group in part.param_groups for p in group["params"]} for part in made[2].parts
    )
    assert matrices and others and not matrices & others
    assert all(p.dim() == 2 for group in made[2].parts[0].param_groups for p in group["params"])


def test_an_adapter_is_trained_and_saved_along(make):
    config = make({**DISTILL, "steps": 3}, adapter={"rank": 2})
    module = train(config)
    assert any(up.detach().abs().max() > 0 for up in module.adapter.up)
    found = from_pretrained(config["output"])
    assert same(found, module) and found.adapter.rank == 2
    bare = train(make({**DISTILL, "steps": 3}, into="bare"))
    assert bare.adapter is None


def test_what_a_length_head_was_taught_is_known_after_a_stop(make, monkeypatch):
    first = {**LENGTH, "errors": "answers", "counts": [1, 4]}
    config = make(first, {**LENGTH, "steps": 2})
    with monkeypatch.context() as patch:
        patch.setattr(on_features.Length, "of", lambda *args: (_ for _ in ()).throw(Stop))
        with pytest.raises(Stop):
            train(config)
    one = run.Path(config["output"]) / "checkpoints" / "1-length" / "module"
    assert from_pretrained(one).config.error == "answers"
    assert train(config, resume=True).config.error == "features"
    assert train(make(first, into="one")).config.error == "answers"
    config = make(FEATURES, into="other", module={"from": str(one)})
    assert train(config).config.error == ""  # what the head learned is no longer so


def test_a_stage_goes_on_with_the_rates_that_it_has_now(make):
    for muon in (None, 1e-3):
        stage = {**FEATURES, "steps": 4, "save_steps": 2, "logging_steps": 1, "lr_scheduler_type": "constant"}
        stage |= {"warmup": 0, "learning_rate": 1e-3} | ({} if muon is None else {"muon": muon})
        lower = stage | {"learning_rate": 1e-5} | ({} if muon is None else {"muon": 1e-5})
        config = make(stage, into=f"rates-{muon}")
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
            patch.setattr(on_features.OnFeatures, "of", partialmethod(stopped, on_features.OnFeatures.of))
            train(config)
        config["stages"] = [lower]
        train(config, resume=True)
        folder = run.Path(config["output"]) / "checkpoints" / "1-features"
        state = json.loads((trainer.last_checkpoint(folder) / "trainer_state.json").read_text())
        rates = {row["step"]: row["learning_rate"] for row in state["log_history"] if "loss" in row}
        assert rates[3] == rates[4] == pytest.approx(1e-5) and rates[2] == pytest.approx(1e-3)


def stopped(objective, of, *args):
    """A loss that is not computed after the second step."""
    if objective.step == 2:
        raise Stop
    return of(objective, *args)


def test_an_adapter_that_was_learned_goes_on(make):
    first = make({**DISTILL, "learning_rate": 1e-2}, adapter={"rank": 2})
    learned = train(first)
    more = {"module": {"from": first["output"]}}
    with pytest.raises(
        ValueError, match="has an adapter of another rank, which would be lost: its rank is 2"
    ):
        train(make(DISTILL, into="b", adapter={"rank": 4}, **more))
    still = {**DISTILL, "steps": 1, "learning_rate": 0.0, "weight_decay": 0.0}
    assert same(train(make(still, into="c", adapter={"rank": 2}, **more)), learned)


def test_a_first_picture_that_is_broken(make, questions, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no picture")
    bad = json.dumps({"image": str(tmp_path / "bad.png"), "question": "a", "answer": "b"})
    lines = [json.loads(line) for line in run.Path(questions).read_text().splitlines()]
    lines = [json.dumps(line | {"image": str(run.Path(questions).parent / line["image"])}) for line in lines]
    path = tmp_path / "broken.jsonl"
    path.write_text("\n".join([bad, *lines]))
    data = {"train": f"jsonl:{path}", "questions": 3, "skip_broken": True}
    with pytest.warns(UserWarning, match="left out"):
        train(make(FEATURES, data=data))


def test_a_checkpoint_that_was_not_written_to_its_end_is_passed_over(make, monkeypatch):
    config = make({**FEATURES, "steps": 5, "save_steps": 2})
    expected = train(make({**FEATURES, "steps": 5, "save_steps": 2}, into="unbroken"))
    with monkeypatch.context() as patch:
        stop_at(patch, 4)
        with pytest.raises(Stop):
            train(config)
    folder = run.Path(config["output"]) / "checkpoints" / "1-features"
    (folder / "checkpoint-4" / "trainer_state.json").write_text('{"half')
    assert trainer.last_checkpoint(folder).name == "checkpoint-2"
    assert same(train(config, resume=True), expected)


def test_a_module_goes_on_from_a_folder(make):
    first = train(make(FEATURES, into="first"))
    config = make({**FEATURES, "learning_rate": 0.0}, module={"from": make(into="first")["output"]})
    assert same(train(config), first)


def test_products_of_half_precision(make, monkeypatch):
    module = train(make(FEATURES, DISTILL, precision="bf16"))
    exact = train(make(FEATURES, DISTILL, into="exact"))
    assert module.dtype == torch.float32 and not same(module, exact)
    losses = [report(make(into=into))["stages"]["2-distill"]["last"]["loss"] for into in ("out", "exact")]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="fp16 needs a GPU"):
        train(make(FEATURES, into="half", precision="fp16"))


def test_accuracy_of_the_validation_data(make, tmp_path, capsys):
    data = {"train": make()["data"]["train"], "validation": f"jsonl:{write_task(tmp_path)}"}
    config = make({**DISTILL, "evaluate": 2}, data=data)
    train(config)
    told = report(config)
    assert list(told["accuracy"]) == ["full", "1", "4", "16"] and told["accuracy"]["full"] == 1.0
    assert list(told["stages"]["1-distill"]["accuracy"]) == ["2"]
    out = capsys.readouterr().out
    assert "1-distill, step 2: full 100.0%, 1 " in out and "right answers by tokens: full 100.0%" in out


# What goes wrong


def test_a_loss_that_is_no_number(make, monkeypatch):
    config = make({**FEATURES, "steps": 5, "save_steps": 2})
    training_loss = on_features.OnFeatures.of

    def broken(self, *args):
        found = training_loss(self, *args)
        return {name: value * float("nan") for name, value in found.items()} if self.step == 3 else found

    with monkeypatch.context() as patch:
        patch.setattr(on_features.OnFeatures, "of", broken)
        with pytest.raises(RuntimeError) as error:
            train(config)
    text = str(error.value)
    assert "the loss is nan at step 4 of stage 1-features" in text and "checkpoint-2" in text
    folder = run.Path(config["output"]) / "checkpoints" / "1-features"
    assert [path.name for path in folder.iterdir()] == ["checkpoint-2"]
    assert all(p.isfinite().all() for p in from_pretrained(folder / "checkpoint-2").parameters())
    assert same(train(config, resume=True), train(make({**FEATURES, "steps": 5, "save_steps": 2}, into="b")))


def test_a_gradient_that_is_no_number(make, monkeypatch):
    training_loss = on_features.OnFeatures.of

    def broken(self, *args):
        found = training_loss(self, *args)
        root = (self.module.registers * 0).sum().sqrt()  # 0, with a gradient that is none
        return {name: value + root for name, value in found.items()}

    with monkeypatch.context() as patch:
        patch.setattr(on_features.OnFeatures, "of", broken)
        with pytest.raises(
            RuntimeError, match=r"the gradient is nan at step 1 .*no checkpoint of this stage yet"
        ):
            train(make(FEATURES))
    train(make(FEATURES))  # nothing was made, so that the folder is not in use


def test_an_output_folder_in_use(make):
    train(make(FEATURES))
    with pytest.raises(ValueError, match="holds a training with this configuration: go on with --resume"):
        train(make(FEATURES))
    with pytest.raises(ValueError, match="with another configuration"):
        train(make(FEATURES, LENGTH))
    with pytest.raises(ValueError, match="another module: choose another output"):
        train(make(FEATURES, module={**ORDERED, "tokens": 8}), resume=True)
    with pytest.raises(ValueError, match="another adapter: choose another output"):
        train(make(FEATURES, adapter={"rank": 2}), resume=True)
    train(make(FEATURES, LENGTH), resume=True)  # a stage more
    assert list(report(make())["stages"]) == ["1-features", "2-length"]


def test_stages_that_were_trained_stay_what_they_were(make):
    """What train.json tells is how the module was made."""
    train(make(FEATURES, LENGTH))
    told = report(make())
    more = {"steps": FEATURES["steps"] + 2}
    changed = [
        (FEATURES,), (LENGTH, LENGTH), (FEATURES | more, LENGTH), (FEATURES, LENGTH | {"steps": 1}),
        (FEATURES, LENGTH | {"learning_rate": 1e-9}),
    ]  # fmt: skip
    for stages in changed:
        with pytest.raises(ValueError, match=r"stage .* was trained already, by other settings"):
            train(make(*stages), resume=True)
        assert report(make()) == told


def test_a_finished_training_is_not_said_to_be_another(make):
    first = train(make(FEATURES))
    told = report(make())
    assert told["stages"]["1-features"]["precision"] == "no"
    for more in ({"seed": 7}, {"precision": "bf16"}, {"data": {**make()["data"], "questions": 1}}):
        with pytest.raises(ValueError, match=r"all stages in .* are trained, which another .* nothing of"):
            train(make(FEATURES, **more), resume=True)
        assert report(make()) == told
    assert same(train(make(FEATURES), resume=True), first)
    train(make(FEATURES, DISTILL, seed=7), resume=True)  # of what is still to be done
    assert [stage["seed"] for stage in report(make())["stages"].values()] == [0, 7]


def test_a_single_step_is_taken(make):
    before = train(make({**FEATURES, "steps": 1, "learning_rate": 0.0, "weight_decay": 0}))
    assert not same(train(make({**FEATURES, "steps": 1}, into="one")), before)


def test_the_last_stage_is_gone_on_with_where_it_has_more_steps(make):
    first = train(make(FEATURES))
    steps = FEATURES["steps"] + 2
    found = train(make({**FEATURES, "steps": steps}), resume=True)
    assert not same(found, first) and report(make())["stages"]["1-features"]["steps"] == steps
    folder = run.Path(make()["output"]) / "checkpoints" / "1-features"
    assert trainer.last_checkpoint(folder).name == f"checkpoint-{steps}"
    state = json.loads((folder / f"checkpoint-{steps}" / "trainer_state.json").read_text())
    assert state["global_step"] == steps


def test_an_output_that_would_cost_another_model(make, host):
    before = {file.name: file.stat().st_mtime_ns for file in run.Path(host).iterdir()}
    with pytest.raises(ValueError, match="holds a model, which would be lost: choose another output"):
        train(make(FEATURES) | {"output": str(host)})
    assert {file.name: file.stat().st_mtime_ns for file in run.Path(host).iterdir()} == before
    with pytest.raises(ValueError, match="is a file: output is the folder"):
        train(make(FEATURES) | {"output": str(run.Path(host) / "config.json")})


def test_nothing_to_go_on_with(make, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").touch()
    with pytest.raises(ValueError, match="holds no training to go on with"):
        train(make(FEATURES), resume=True)


@pytest.mark.parametrize(
    "module, stage, told",
    [
        (
            {"name": "mqt", "heads": 2},
            FEATURES,
            "mqt has no training_loss, which stage 1-features makes small",
        ),
        ({"name": "mqt", "heads": 2}, LENGTH, "mqt has no halting_loss"),
        ({"name": "agent-attention"}, DISTILL, "'agent-attention' is no module that"),
        ({"name": "orderd"}, DISTILL, "there is no module 'orderd'"),
        ({**ORDERED, "token": 3}, DISTILL, "ordered has no option 'token'"),
        ({**ORDERED, "in_width": 48}, DISTILL, "48"),
        (ORDERED, {**DISTILL, "counts": [1, 17]}, "not 17"),
        (ORDERED, {**DISTILL, "optim": "best"}, "stage 1-distill: .*best"),
    ],
)
def test_what_cannot_be_trained(make, module, stage, told):
    with pytest.raises(ValueError, match=told):
        train(make(stage, module=module))


def test_a_module_of_another_host(make, tmp_path):
    train(make(FEATURES))
    other = small_model(seed=1)
    other.save_pretrained(tmp_path / "other")
    from small import small_processor

    small_processor().save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="was trained on"):
        train(make(FEATURES, into="b", model=str(tmp_path / "other"), module={"from": make()["output"]}))


def test_widths_are_the_host_s(make):
    module = train(make({**DISTILL, "counts": [4, 9]}, module={"name": "mqt", "heads": 2, "queries": 16}))
    assert (module.config.in_width, module.config.out_width) == (32, 32)


# From the command line


def test_the_command(make, tmp_path, capsys):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(make(FEATURES)))))
    assert cli.main(["train", str(tmp_path / "config.yaml"), "--set", "stages.0.steps=3"]) == 0
    assert report(make())["stages"]["1-features"]["steps"] == 3
    assert cli.main(["train", str(tmp_path / "config.yaml")]) == 2
    assert "go on with --resume" in capsys.readouterr().err
    assert cli.main(["train", str(tmp_path / "config.yaml"), "--set", "stages.0.kind=all"]) == 2
    assert "stages.0.kind is one of features, distill, length" in capsys.readouterr().err


def test_two_processes(make, tmp_path):
    config = make({**DISTILL, "batch_size": 1, "save_steps": 2})
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(config))))
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    launch += ["--num_cpu_threads_per_process", "1", "--main_process_port", "0"]
    command = [*launch, "-m", "vtc.cli", "train", str(tmp_path / "config.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("saved in") == 1
    told = report(config)
    assert told["processes"] == 2 and told["finished"]
    # What both did together is what one does with both halves of each batch.
    alone = make({**DISTILL, "batch_size": 2, "save_steps": 2}, into="alone")
    a, b = from_pretrained(config["output"]), train(alone)
    for name, value in a.state_dict().items():
        torch.testing.assert_close(value, b.state_dict()[name], rtol=1e-2, atol=2e-3)
