"""What is run for several questions about one picture is what separate prompts would give."""

import copy

import pytest
import torch
import torch.nn.functional as F
from small import small_model, small_processor
from training import DISTILL, ORDERED, write_questions

from vtc.api import current
from vtc.learned import build
from vtc.training.batches import IGNORED, Asked, Visit
from vtc.training.config import Stage
from vtc.training.distill import Distill, divergence
from vtc.training.forms import check_form
from vtc.training.pictures import load_pictures
from vtc.training.run import _end, _image_token

VISITS = [Visit(0, (0, 1, 2)), Visit(1, (0,)), Visit(2, (1, 2))]


@pytest.fixture
def collate(tmp_path):
    model, processor = small_model(), small_processor()
    pictures = load_pictures(f"jsonl:{write_questions(tmp_path, 3)}", None, "", tmp_path)
    return Asked(processor, pictures, _image_token(model), _end(model, processor))


@pytest.fixture
def objective():
    torch.manual_seed(0)
    module = build(in_width=32, **ORDERED)
    torch.nn.init.normal_(module.out_proj.weight, std=0.3)
    stage = Stage(**{**DISTILL, "counts": (1, 4, 16)})
    made = Distill(module, small_model().requires_grad_(False), stage, (0, 0), grid=(12, 12))
    made.attach()
    yield made
    made.detach()


def both(collate):
    """The same questions, from a common beginning and as rows of their own."""
    shared = collate(VISITS)
    collate.shared = False
    return shared, collate(VISITS)


def losses(objective, batch):
    objective.zero_grad()
    loss = objective(**batch)["loss"]
    loss.backward()
    objective.begin(0)
    return loss.detach(), {n: p.grad.clone() for n, p in objective.named_parameters() if p.grad is not None}


def test_a_common_beginning_changes_nothing(collate, objective):
    shared, rows = both(collate)
    assert len(shared["vision"]["pixel_values"]) == 3 and len(rows["vision"]["pixel_values"]) == 6
    assert shared["prefix"]["input_ids"].shape[0] == 3 and "rows" in rows
    (a, own), (b, others) = losses(objective, shared), losses(objective, rows)
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert own.keys() == others.keys() and len(own) > 10
    for name in own:
        torch.testing.assert_close(own[name], others[name], rtol=1e-3, atol=1e-5)


@torch.no_grad()
def test_logits_are_those_of_the_bare_host(collate, objective):
    shared, rows = both(collate)
    found = [objective.teacher(shared), objective.teacher(rows)]
    model = small_model()
    logits = model(**rows["vision"], **rows["rows"]).logits  # (R, L, V)
    for own in found:
        torch.testing.assert_close(own, logits[rows["wanted"] != IGNORED], rtol=1e-4, atol=1e-4)


def test_answers_are_wanted_behind_the_prompt(collate):
    _, rows = both(collate)
    words = collate.processor.tokenizer
    ids, wanted = rows["rows"]["input_ids"], rows["wanted"]
    expected = ["red", "one", "0", "red", "three", "2"]
    for row, answer in enumerate(expected):
        places = (wanted[row] != IGNORED).nonzero()[:, 0]
        assert words.decode(wanted[row][places]).split() == [answer, "</s>"]
        assert ids[row][places[1:]].tolist() == wanted[row][places[:-1]].tolist()
        assert words.decode(ids[row][: places[0] + 1]).endswith("assistant :")


def test_the_loss_is_what_it_says(collate, objective):
    batch = collate(VISITS)
    wanted = batch["wanted"][batch["wanted"] != IGNORED]
    while len(objective.counts()) < 2:  # the most twice
        objective.begin(objective.step + 1)
    with torch.no_grad():
        teacher = objective.teacher(batch).softmax(-1)
        kl = ce = 0.0
        for k in objective.counts():
            student = objective.student(batch, k).log_softmax(-1)
            kl += (teacher * (teacher.log() - student)).sum(-1).mean() / len(objective.counts())
            ce += F.nll_loss(student, wanted) / len(objective.counts())
    found = objective(**batch)
    torch.testing.assert_close(found["loss"], kl + 0.5 * ce, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["kl"], kl, rtol=1e-4, atol=1e-5)


def test_the_divergence_has_the_scale_of_gradients_at_any_temperature():
    student, teacher = torch.randn(2, 50, 7).unbind(0)
    assert divergence(teacher, teacher, 2.0).abs() < 1e-6
    p, q = (F.softmax(logits / 2, -1) for logits in (teacher, student))
    expected = 4 * (p * (p / q).log()).sum(-1).mean()
    torch.testing.assert_close(divergence(student, teacher, 2.0), expected)


@pytest.mark.parametrize("form", ["shared", "rows"])
def test_the_tower_looks_once_at_each_picture(collate, objective, form):
    batch = both(collate)[form == "rows"]
    tower = objective.tower
    loss, _ = losses(objective, batch)
    assert (tower.calls, tower.rows) == (1, 3)
    objective.shared = torch.enable_grad  # nothing is
    alone, _ = losses(objective, batch)
    assert torch.equal(loss, alone) and tower.calls == 1


def test_everything_is_taken_off_again(collate):
    model, batch = small_model(), collate(VISITS)
    with torch.no_grad():  # transformers puts hooks of its own onto what is run for the first time
        model(**both(collate)[1]["vision"], **both(collate)[1]["rows"])
    before = {name: dict(vars(part)) for name, part in model.named_modules()}
    hooks = [len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.modules()]
    made = Distill(
        build(in_width=32, **ORDERED), model, Stage(**{**DISTILL, "counts": ()}), (0, 0), grid=(12, 12)
    )
    made.attach()
    made(**batch)
    assert "forward" in vars(model.model.vision_tower)
    made.detach()
    assert current(model) is None
    assert [len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.modules()] == hooks
    for name, part in model.named_modules():
        assert vars(part).keys() == before[name].keys()


def test_only_the_module_is_trained_saved_and_put_into_training_mode(objective):
    objective.train()
    assert {name.split(".")[0] for name in objective.state_dict()} == {"module"}
    assert objective.module.training and not objective.host.training
    assert not any(parameter.requires_grad for parameter in objective.host.parameters())


def test_numbers_of_tokens_are_drawn_by_the_step_alike_for_all_processes(objective):
    drawn = []
    for step in range(40):
        objective.begin(step)
        objective.rank = step % 3
        first, *rest = objective.counts()
        assert first == 16
        drawn.append(rest[0] if rest else 16)
    assert set(drawn) == {1, 4, 16}
    other = copy.copy(objective)
    other.rank = 5
    objective.begin(7), other.begin(7)
    assert other.counts() == objective.counts()
    seeds = [own.generator().initial_seed() for own in (objective, other)]
    assert seeds[0] != seeds[1]


def test_counts_that_the_module_cannot_make():
    stage = Stage(**{**DISTILL, "counts": (1, 17, 99)})
    with pytest.raises(
        ValueError,
        match=r"of 12 x 12 tokens, ordered makes .* or 16 tokens, not 17, 99: leave those out of its counts",
    ):
        Distill(build(in_width=32, **ORDERED), small_model(), stage, (0, 0), grid=(12, 12))


def test_a_host_that_does_not_go_on_from_a_cache_gets_rows(collate, objective, monkeypatch):
    items = VISITS
    check_form(objective, collate, items)
    assert collate.shared
    run = objective.answers._run

    def forgetful(where, **inputs):
        inputs.pop("past_key_values", None)
        if inputs.get("attention_mask") is not None and "input_ids" in inputs:
            inputs["attention_mask"] = inputs["attention_mask"][:, -inputs["input_ids"].shape[1] :]
        return run(where, **inputs)

    monkeypatch.setattr(objective.answers, "_run", forgetful)
    check_form(objective, collate, items)
    assert not collate.shared and "rows" in collate(VISITS)


def test_a_module_that_answers_do_not_teach_is_refused(collate):
    module = build("m3", width=32)  # averages, and nothing to learn
    made = Distill(module, small_model().requires_grad_(False), Stage("distill", 1), (0, 0), grid=(12, 12))
    made.attach()
    with pytest.raises(ValueError, match="answers have no gradient for m3"):
        check_form(made, collate, VISITS)
