"""Training of modules inside of the encoder and in the place of its attention, and what they begin from."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from footprint import footprint
from small import small_model, small_processor
from training import DISTILL, FEATURES, ORDERED, save_host, settings, write_questions

import vtc
from vtc.learned import build, from_pretrained
from vtc.learned.in_tower import ReplacedAttention
from vtc.training import train
from vtc.training.batches import IGNORED, Asked, Visit
from vtc.training.config import Stage
from vtc.training.distill import Distill, divergence
from vtc.training.on_features import Imitate
from vtc.training.pictures import load_pictures
from vtc.training.run import _end, _image_token

SCORERS = {"name": "staged", "module": "learned-scorer", "blocks": [0]}
AGENTS = {"name": "replaced-attention", "replacement": "agent-attention", "blocks": [0, 1], "agents": 9}


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    return save_host(tmp_path_factory.mktemp("host"))


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    return write_questions(tmp_path_factory.mktemp("questions"))


@pytest.fixture
def make(host, questions, tmp_path):
    return lambda *stages, into="out", **more: settings(host, questions, tmp_path / into, *stages, **more)


@pytest.fixture
def batch(tmp_path):
    """Two questions about two pictures, each a row of its own."""
    model, processor = small_model(), small_processor()
    pictures = load_pictures(f"jsonl:{write_questions(tmp_path, 2)}", None, "", tmp_path)
    collate = Asked(processor, pictures, _image_token(model), _end(model, processor))
    collate.shared = False
    return collate([Visit(0, (0,)), Visit(1, (1,))])


def answers(model, batch):
    logits = model(**batch["vision"], **batch["rows"]).logits
    return logits[batch["wanted"] != IGNORED].float()


def made(objective, module, model, where, **stage):
    found = objective(module, model, Stage(**{**DISTILL, **stage}), (0, 0), (12, 12), where)
    found.attach()
    return found


def moved(before, after):
    return {name for name, value in after.items() if not torch.equal(value, before[name])}


def test_the_loss_inside_of_the_encoder_is_that_of_the_compressed_host(batch):
    model, where = small_model().requires_grad_(False), {"stage": "encoder", "schedule": [0, 1]}
    torch.manual_seed(0)
    module = build("learned-scorer", in_width=32)
    objective = made(Distill, module, model, where, counts=(9,), full=False, kl=1.0, ce=0.5)
    torch.manual_seed(1)  # scorers draw what stays
    loss = objective(**batch)["loss"]
    loss.backward()
    found = [p.grad.clone() for p in module.parameters()]
    objective.detach()
    module.zero_grad()
    teacher = answers(small_model(), batch).detach()
    torch.manual_seed(1)
    with vtc.compress(model, module, keep=9, **where) as handle:
        student = answers(model, batch)
        assert [len(record.index) for record in handle.last] == [9, 9]
    expected = divergence(student, teacher, 1.0)
    expected = expected + 0.5 * F.cross_entropy(student, batch["wanted"][batch["wanted"] != IGNORED])
    torch.testing.assert_close(loss, expected)
    expected.backward()
    for own, parameter in zip(found, module.parameters(), strict=True):
        torch.testing.assert_close(own, parameter.grad, rtol=1e-4, atol=1e-6)
    assert all(bool(own.any()) for own in found[:4])


def test_scorers_inside_of_the_encoder_learn(make):
    config = make({**DISTILL, "learning_rate": 1e-2}, module=SCORERS)
    torch.manual_seed(0)
    fresh = build(**SCORERS, options=({"in_width": 32},)).state_dict()
    module = train(config)
    assert len(moved(fresh, module.state_dict())) > 6
    model = small_model()
    with vtc.compress(model, config["output"], keep=16) as handle:
        assert handle.plan[0][1]["stage"] == "encoder"


def test_a_module_of_two_places_learns_where_it_is_told(make):
    where = {"stage": "encoder", "schedule": [1]}
    config = make(DISTILL, module={"name": "learned-scorer"}, compress=where)
    train(config)
    told = json.loads((Path(config["output"]) / "train.json").read_text())
    assert told["config"]["compress"] == where
    with pytest.raises(ValueError, match="another compress"):
        train(config | {"compress": {"stage": "encoder", "schedule": [0]}}, resume=True)
    with pytest.raises(ValueError, match="another compress"):
        train({name: value for name, value in config.items() if name != "compress"}, resume=True)


def test_all_tokens_inside_of_the_encoder_are_no_number_to_learn_with(make):
    with pytest.raises(ValueError, match="139, 140, 141, 142 or 143 tokens, not 144"):
        train(make({**DISTILL, "counts": [4, 144]}, module=SCORERS))


@pytest.mark.parametrize("stages", [[FEATURES], [DISTILL], [FEATURES, DISTILL]])
def test_replaced_attention_learns(make, host, stages):
    stages = [{name: value for name, value in stage.items() if name != "counts"} for stage in stages]
    validation = {"validation": "scenes", "n_validation": 4}
    config = make(*[{**stage, "learning_rate": 1e-2} for stage in stages], module=AGENTS)
    config["data"] |= validation
    fresh = ReplacedAttention.for_host(small_model(), "agent-attention", [0, 1], agents=9).state_dict()
    module = train(config)
    assert len(moved(fresh, module.state_dict())) > len(fresh) / 2
    told = json.loads((Path(config["output"]) / "train.json").read_text())
    assert set(told["accuracy"]) == {"full", "all"}
    model = small_model()
    with vtc.compress(model, config["output"]) as handle:
        assert "agent-attention in 2 blocks" in handle.describe()


def test_features_are_those_of_the_bare_host(batch):
    model = small_model().requires_grad_(False)
    module = ReplacedAttention.for_host(model, "agent-attention", agents=9)
    pixels = batch["vision"]["pixel_values"]
    with torch.no_grad():
        wanted = torch.cat([*model.get_image_features(pixel_values=pixels).pooler_output])
    objective = made(Imitate, module, model, {}, kind="features", counts=())
    loss = objective(vision=batch["vision"])["loss"]
    found = torch.cat([*model.get_image_features(pixel_values=pixels).pooler_output])
    objective.detach()
    assert float((found - wanted).abs().max().detach()) > 1e-3
    expected = (found - wanted).square().mean() / wanted.var(0, correction=0).mean()
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("name", ["granite4_vision", "gemma3", "llava_next-clip", "internvl"])
def test_features_of_families_are_compared_whatever_their_form(name):
    from tiny import build as tiny

    losses = []
    for cell in (1, 2):
        model, make_inputs = tiny(name)
        inputs = make_inputs()
        vision = {
            name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")
        }
        module = ReplacedAttention.for_host(model, "super-token-attention", cell=(cell, cell)).float()
        objective = made(Imitate, module, model.requires_grad_(False), {}, kind="features", counts=())
        losses.append(float(objective(vision=vision)["loss"].detach()))
        objective.detach()
    assert losses[0] < 1e-6 < 1e-4 < losses[1]  # a super token for each token is the host's own attention


def test_replaced_attention_learns_its_loss_away(make):
    steps = {"steps": 30, "batch_size": 6, "logging_steps": 1, "learning_rate": 1e-2, "weight_decay": 0}
    config = make({"kind": "features", **steps}, module=AGENTS)
    train(config)
    state = Path(config["output"]) / "checkpoints/1-features/checkpoint-30/trainer_state.json"
    losses = [row["loss"] for row in json.loads(state.read_text())["log_history"] if "loss" in row]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


@torch.no_grad()
def test_at_a_budget_of_one_attention_is_the_host_s(batch):
    model, pixels = small_model(), batch["vision"]["pixel_values"]
    tower = model.model.vision_tower
    bare, before = tower(pixels).last_hidden_state, footprint(model)
    with vtc.compress(model, ReplacedAttention.for_host(model, "agent-attention", agents=4)) as handle:
        replaced = tower(pixels).last_hidden_state
        assert not torch.allclose(replaced, bare)
        handle.keep = 1.0
        assert handle.keep == 1.0 and torch.equal(tower(pixels).last_hidden_state, bare)
        for keep in (0.5, 1, 144):
            with pytest.raises(ValueError, match="None is with the module"):
                handle.keep = keep
        handle.keep = None
        assert torch.equal(tower(pixels).last_hidden_state, replaced)
    assert footprint(model) == before


# What modules begin from


def features_of(model, questions, n=6):
    from PIL import Image

    processor = small_processor()
    images = [Image.open(questions.parent / f"{i}.png") for i in range(n)]
    pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        return model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]


def test_token_slimming_begins_as_means_of_blocks(make, questions):
    resting = {**DISTILL, "steps": 1, "counts": [], "learning_rate": 0.0, "weight_decay": 0}
    found = train(make(resting, module={"name": "token-slimming", "tokens": 9}))
    torch.manual_seed(0)
    expected = build("token-slimming", in_width=32, tokens=9)
    fresh = {name: value.clone() for name, value in expected.state_dict().items()}
    expected.start_from(features_of(small_model(), questions), (12, 12))
    assert moved(fresh, expected.state_dict()) == {"weight.3.weight"}
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], value, rtol=1e-2, atol=1e-3)


def test_the_proxy_projector_begins_as_the_host_s(make):
    resting = {**DISTILL, "steps": 1, "counts": [], "learning_rate": 0.0, "weight_decay": 0}
    found = train(make(resting, module={"name": "proxy-projector", "heads": 4, "window": 4}))
    theirs = small_model().model.multi_modal_projector
    assert torch.equal(found.projector[0].weight, theirs.linear_1.weight)
    assert torch.equal(found.projector[2].bias, theirs.linear_2.bias)
    other = build("proxy-projector", in_width=32, out_width=48, heads=4)
    before = {name: value.clone() for name, value in other.state_dict().items()}
    other.begin([], theirs)  # which is of other widths
    other.begin([], None)
    assert not moved(before, other.state_dict())


def test_a_saved_module_does_not_begin_again(make):
    resting = {**DISTILL, "steps": 1, "counts": [], "learning_rate": 0.0, "weight_decay": 0}
    module = build("token-slimming", in_width=32, tokens=9).trained_on(small_model())
    config = make(resting, module={"from": "saved"})
    folder = Path(config["output"]).parent / "saved"
    module.save_pretrained(folder)
    found = train(config | {"module": {"from": str(folder)}})
    assert not moved(module.state_dict(), found.state_dict())
    assert not moved(module.state_dict(), from_pretrained(config["output"]).state_dict())


# What cannot be


@pytest.mark.parametrize(
    "module, stage, more, told",
    [
        (ORDERED, FEATURES, {"compress": {"stage": "encoder"}}, "does not run at stage 'encoder'"),
        (
            {"name": "reconstructing-selector", "width": 16, "heads": 2, "depth": 1},
            FEATURES,
            {"compress": {"stage": "encoder", "schedule": [1]}},
            "stage 1-features: it would learn from what leaves the encoder",
        ),
        (ORDERED, DISTILL, {"compress": {"keep": 4}}, "compress has no 'keep'"),
        (ORDERED, DISTILL, {"compress": {"stages": "encoder"}}, "did you mean stage"),
        (ORDERED, DISTILL, {"compress": "encoder"}, "compress holds names with values"),
        (AGENTS, DISTILL, {}, "makes no fewer tokens, not 1, 4, 16"),
        (AGENTS, {"kind": "length", "steps": 1}, {}, "has no halting_loss"),
        (AGENTS, FEATURES, {"compress": {"schedule": [1]}}, "keeps all tokens and has no schedule"),
        ({"name": "replaced-attention"}, FEATURES, {}, "no 'replacement': agent-attention, proxy-attention"),
        ({**AGENTS, "replacement": "ordered"}, FEATURES, {}, "is no replacement of attention"),
        ({**AGENTS, "blocks": [7]}, FEATURES, {}, "no \\[7\\]"),
        ({**AGENTS, "agent": 9}, FEATURES, {}, "no option 'agent'"),
    ],
)
def test_what_cannot_be_trained(make, module, stage, more, told):
    config = make(stage, module=module, **more)
    with pytest.raises(ValueError, match=told):
        train(config)
    assert not Path(config["output"]).exists()
