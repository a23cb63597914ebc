"""Gradients through a compressed encoder, checkpointing, torch.compile, copies, threads."""

import copy
import threading

import pytest
import torch
from encoder_oracle import RULES, Ordered, Watch, bare, close, compressed, equal, run, shared, spied, tensors
from tiny.encoders import ENCODERS, make
from torch import nn

import vtc
from vtc.schedule import counts

SOME = (
    "timm-dinov2",
    "timm-eva02",
    "timm-siglip",
    "timm-dinov3",
    "open_clip-pooler",
    "open_clip-CLIP",
    "CLIPVisionModel",
    "SiglipVisionModel",
    "Dinov2ForImageClassification",
    "DINOv3ViTModel",
    "InternVLVisionModel",
)
KINDS = ("test-pairs", "test-behind", "test-soft", "test-turned")
BUDGET = {"keep": 0.4, "schedule": "constant"}
over_some = pytest.mark.parametrize("host", SOME)


def loss_of(output) -> torch.Tensor:
    """A number to which every tensor of an output adds."""
    total = 0.0
    for number, tensor in enumerate(tensors(output)):
        weights = torch.linspace(-1, 1, tensor[0].numel()).reshape(tensor[0].shape)
        total = total + (tensor * weights).sum() / (number + 1)
    return total


def gradients(model, loss, pixels) -> dict[str, torch.Tensor]:
    model.zero_grad()
    pixels.grad = None
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return {**found, "pixels": pixels.grad.clone()}


def assert_same(found, expected, rtol=1e-3):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        atol = 1e-5 * max(1.0, float(gradient.abs().max()))
        torch.testing.assert_close(found[name], gradient, atol=atol, rtol=rtol, msg=lambda m, n=name: n + m)


# -- gradients


@pytest.mark.parametrize("restore", [None, "unmerge"])
@pytest.mark.parametrize("host", ENCODERS)
def test_gradients_flow(host, restore):
    spec, model = ENCODERS[host], shared(host)
    pixels = spec.images().requires_grad_()
    full = gradients(model, loss_of(spec.call(model, pixels)), pixels)
    with vtc.compress(model, RULES["test-pairs"](), restore=restore, **BUDGET):
        found = gradients(model, loss_of(spec.call(model, pixels)), pixels)
    assert found.keys() == full.keys()
    for name, gradient in found.items():
        assert gradient.isfinite().all(), name
        assert bool((gradient != 0).any()) == bool((full[name] != 0).any()), name
    patches = found["pixels"].unfold(2, 8, 8).unfold(3, 8, 8).abs().sum((1, 4, 5))
    assert (patches > 0).all()  # every patch went into a token


@pytest.mark.parametrize("restore", [None, "unmerge"])
@pytest.mark.parametrize("method", [*KINDS, "test-cls"])
@pytest.mark.parametrize("host", ["timm-dinov2", "open_clip-tok", "DINOv3ViTModel"])
def test_gradients_are_those_of_the_blocks_step_by_step(host, method, restore):
    spec, model = ENCODERS[host], shared(host)
    pixels, blocks = spec.images().requires_grad_(), spec.blocks_of(model)
    left = counts(0.4, "constant", spec.n, len(blocks))
    with Watch(spec, model) as watch:
        spec.call(model, pixels)
    rule, seen = spied(RULES[method]())
    with vtc.compress(model, rule, restore=restore, **BUDGET), Watch(spec, model) as short:
        spec.call(model, pixels)
        found = gradients(model, loss_of(short.left), pixels)
    steps = run(spec, blocks, watch.entered[0], watch.given, RULES[method](), left, seen[0].lot)
    expected = loss_of([step.x if restore is None else step.full for step in steps])
    assert_same(found, gradients(model, expected, pixels))


@over_some
def test_training_mode_reduces_too(host):
    """With stochastic depth and dropout on, counts hold and gradients are finite."""
    spec, model = ENCODERS[host], make(host).train()
    pixels = spec.images().requires_grad_()
    with vtc.compress(model, RULES["test-pairs"](), **BUDGET) as handle:
        found = gradients(model, loss_of(spec.call(model, pixels)), pixels)
        assert all(gradient.isfinite().all() for gradient in found.values())
        k = counts(0.4, "constant", spec.n, len(spec.blocks_of(model)))[-1]
        assert [len(record.index) for record in handle.last] == [k, k]


def test_stochastic_depth_drops_whole_branches():
    """A block both of whose branches are dropped passes its tokens on, merged ones as plain averages."""
    spec, model = ENCODERS["timm-augreg"], make("timm-augreg").train()
    for module in model.modules():
        if type(module).__name__ == "DropPath":
            module.drop_prob = 1.0 - 1e-9
    with vtc.compress(model, Ordered(), keep={1: 0.5}) as handle, Watch(spec, model) as watch:
        spec.call(model, spec.images())
    before, behind, _ = (x[:, 1:].detach() for x in watch.left)
    assert behind.shape[1] == 12
    for row, record in enumerate(handle.last):
        groups = nn.functional.one_hot(record.source, 12).T.float()  # (K, N)
        close(behind[row], groups @ before[row] / groups.sum(1, keepdim=True))


@pytest.mark.parametrize("method", ["test-pairs", "random"])
def test_a_few_steps_of_training_lower_the_loss(method):
    spec, model = ENCODERS["timm-avg"], make("timm-avg").train()
    pixels, labels = spec.images(8), torch.arange(8) % 5
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    rule = RULES[method]() if method in RULES else vtc.get_method(method)
    with vtc.compress(model, rule, keep=0.5):
        losses = []
        for _ in range(12):
            optimiser.zero_grad()
            loss = nn.functional.cross_entropy(model(pixels), labels)
            loss.backward()
            optimiser.step()
            losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


# -- gradient checkpointing


def checkpointing(spec, model, reentrant=False) -> None:
    if spec.library == "transformers":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    else:
        getattr(model, "visual", model).set_grad_checkpointing(True)


def check_checkpointing(host, method, restore=None, reentrant=False):
    spec, model = ENCODERS[host], make(host).train()
    pixels = spec.images().requires_grad_()
    with vtc.compress(model, RULES[method](), restore=restore, **BUDGET) as handle:
        output = spec.call(model, pixels)
        records = handle.last
        expected = gradients(model, loss_of(output), pixels)
        checkpointing(spec, model, reentrant)
        again = spec.call(model, pixels)
        for a, b in zip(tensors(again), tensors(output), strict=True):
            close(a, b)
        assert_same(gradients(model, loss_of(again), pixels), expected)
        for found, wanted in zip(handle.last, records, strict=True):  # running again is no new forward
            assert torch.equal(found.source, wanted.source)
    plain = gradients(model, loss_of(spec.call(model, pixels)), pixels)
    assert any(not torch.allclose(plain[name], expected[name], atol=1e-4) for name in expected)


@over_some
def test_gradient_checkpointing(host):
    check_checkpointing(host, "test-pairs")


@pytest.mark.parametrize("restore", [None, "unmerge"])
@pytest.mark.parametrize("method", KINDS)
@pytest.mark.parametrize("host", ["timm-dinov3", "open_clip-tok", "DINOv3ViTModel"])
def test_gradient_checkpointing_of_every_kind_of_reduction(host, method, restore):
    spec = ENCODERS[host]
    if method == "test-soft" and restore and spec.library != "transformers":
        # There whole blocks run again, and what they are shown are mixtures, out of which no token comes.
        with pytest.raises(RuntimeError, match="mixtures of tokens"):
            check_checkpointing(host, method, restore)
    else:
        check_checkpointing(host, method, restore)


@pytest.mark.parametrize("restore", [None, "unmerge"])
@pytest.mark.parametrize("method", ["test-pairs", "test-behind", "test-cls"])
@pytest.mark.parametrize("host", ["timm-dinov2", "CLIPVisionModel", "DINOv3ViTModel"])
def test_reentrant_gradient_checkpointing(monkeypatch, host, method, restore):
    """It runs blocks without gradients first. Right gradients, or a sentence that says what to do."""
    if host.startswith("timm"):
        import timm.models._manipulate as manipulate

        monkeypatch.setattr(manipulate, "use_reentrant_ckpt", lambda: True)
    try:
        check_checkpointing(host, method, restore, reentrant=True)
    except RuntimeError as error:
        assert "use_reentrant=False" in str(error)


@over_some
def test_two_forwards_before_their_backwards(host):
    """Checkpointed blocks run again in an order of its own: each finds the tokens of its own forward."""
    spec, model = ENCODERS[host], make(host).train()
    first, second = spec.images().requires_grad_(), spec.images(first=5).requires_grad_()
    with vtc.compress(model, RULES["test-pairs"](), **BUDGET):
        expected = [gradients(model, loss_of(spec.call(model, x)), x) for x in (first, second)]
        checkpointing(spec, model)
        losses = [loss_of(spec.call(model, x)) for x in (first, second)]
        with torch.no_grad():
            spec.call(model, spec.images(first=9))  # and one that needs none
        for order in ((0, 1), (1, 0)):
            for number in order:
                x = (first, second)[number]
                assert_same(gradients(model, losses[number], x), expected[number])
            losses = [loss_of(spec.call(model, x)) for x in (first, second)]


@pytest.mark.parametrize("host", ["timm-dinov2", "open_clip-tok", "CLIPVisionModel"])
def test_the_same_pictures_twice_before_the_backwards(host):
    """Forwards whose inputs are alike are told apart, or need not be."""
    spec, model = ENCODERS[host], make(host).train()
    pixels = spec.images().requires_grad_()
    with vtc.compress(model, RULES["test-pairs"](), **BUDGET) as handle:
        expected = gradients(model, loss_of(spec.call(model, pixels)), pixels)
        checkpointing(spec, model)
        losses = [loss_of(spec.call(model, pixels))]
        handle.keep = 0.8
        losses.append(loss_of(spec.call(model, pixels)))
        other = gradients(model, losses[1], pixels)
        assert_same(gradients(model, losses[0], pixels), expected)
        handle.keep = 0.8
        assert_same(gradients(model, loss_of(spec.call(model, pixels)), pixels), other)


# -- torch.compile


@pytest.fixture
def fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


# A compile takes seconds: encoders of three blocks, one of which reduces tokens.
COMPILED = [("timm-augreg", None), ("CLIPVisionModelWithProjection", "unmerge")]


@pytest.mark.parametrize("host, restore", COMPILED)
@torch.no_grad()
def test_compiled_before_and_after_compressing(fresh, host, restore):
    spec, model = ENCODERS[host], make(host)
    pixels, settings = spec.images(), {"keep": {1: 0.4}, "restore": restore}
    full, _ = bare(spec, model, pixels)
    expected, _, records = compressed(spec, model, pixels, RULES["test-pairs"](), **settings)
    fast = torch.compile(model, backend="eager")
    assert_close_outputs(spec.call(fast, pixels), full)
    with vtc.compress(fast, RULES["test-pairs"](), **settings) as handle:  # compiled before
        assert_close_outputs(spec.call(fast, pixels), expected)
        assert [len(r.index) for r in handle.last] == [len(r.index) for r in records]
    assert_close_outputs(spec.call(fast, pixels), full)
    with vtc.compress(model, RULES["test-pairs"](), **settings) as handle:  # and behind
        late = torch.compile(model, backend="eager")
        assert_close_outputs(spec.call(late, pixels), expected)
        assert_close_outputs(spec.call(late, pixels[:1]), [t[:1] for t in tensors(expected)])
        handle.keep = {1: 0.6}
        assert not equal(tensors(spec.call(late, pixels))[0], tensors(expected)[0])
        assert len(handle.last[0].index) == int(0.6 * spec.n)


def assert_close_outputs(found, expected):
    for a, b in zip(tensors(found), tensors(expected), strict=True):
        close(a, b, atol=1e-4)


def test_compiled_training(fresh):
    spec, model = ENCODERS["timm-augreg"], make("timm-augreg")
    pixels = spec.images().requires_grad_()
    with vtc.compress(model, RULES["test-pairs"](), keep={1: 0.4}):
        expected = gradients(model, loss_of(spec.call(model, pixels)), pixels)
        fast = torch.compile(model, backend="eager")
        assert_same(gradients(model, loss_of(spec.call(fast, pixels)), pixels), expected)


# -- copies and threads


@pytest.mark.parametrize("host", SOME)
@torch.no_grad()
def test_a_copy_is_compressed_by_itself(host):
    spec, model = ENCODERS[host], make(host)
    pixels, other = spec.images(), spec.images(first=7)
    full, _ = bare(spec, model, pixels)
    with vtc.compress(model, RULES["test-pairs"](), **BUDGET) as handle:
        expected = spec.call(model, pixels)
        try:
            twin = copy.deepcopy(model)
        except RuntimeError as error:
            assert "copied" in str(error) or "copy" in str(error)
            return
        records = handle.last
        assert equal(spec.call(twin, pixels), expected)
        spec.call(twin, other)
        assert all(a is b or torch.equal(a.source, b.source) for a, b in zip(handle.last, records))
        own = vtc.api.current(twin)
        assert own is not None and own is not handle
        own.keep = 0.8
        assert handle.keep == 0.4 and equal(spec.call(model, pixels), expected)
    assert equal(spec.call(model, pixels), full)
    assert len(own.last[0].index) < spec.n
    changed = spec.call(twin, pixels)
    assert not equal(tensors(changed)[-1], tensors(full)[-1])
    vtc.restore(twin)
    assert equal(spec.call(twin, pixels), full)


@pytest.mark.parametrize("method", ["test-pairs", "test-turned"])
@over_some
def test_two_threads_at_once(host, method):
    spec, model = ENCODERS[host], shared(host)
    pictures = [spec.images(3), spec.images(2, first=5), spec.images(1, first=9)]
    with vtc.compress(model, RULES[method](), **BUDGET):
        with torch.no_grad():
            expected = [spec.call(model, pixels) for pixels in pictures]
        wrong, start = [], threading.Barrier(len(pictures))

        def work(number):
            try:
                start.wait(10)
                for _ in range(6):
                    with torch.no_grad():
                        found = spec.call(model, pictures[number])
                    if not equal(found, expected[number]):
                        wrong.append(number)
            except BaseException as error:
                wrong.append(repr(error))

        threads = [threading.Thread(target=work, args=(n,)) for n in range(len(pictures))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong


def test_weights_of_a_compressed_model_are_its_own(tmp_path):
    """state_dict() is the model's own; it loads into a bare model, and the other way round."""
    spec, model = ENCODERS["timm-deit"], make("timm-deit")
    other = make("timm-deit", seed=1)
    keys = list(model.state_dict())
    with vtc.compress(model, RULES["test-pairs"](), **BUDGET), torch.no_grad():
        assert list(model.state_dict()) == keys
        torch.save(model.state_dict(), tmp_path / "weights.pt")
        model.load_state_dict(other.state_dict())
        short = spec.call(model, spec.images())
        assert equal(short, compressed(spec, other, spec.images(), RULES["test-pairs"](), **BUDGET)[0])
    other.load_state_dict(torch.load(tmp_path / "weights.pt"))
    with torch.no_grad():
        assert equal(spec.call(other, spec.images()), spec.call(make("timm-deit"), spec.images()))


def test_many_forwards_before_a_backward():
    """As many as are remembered work; beyond, it is an error and no wrong gradient."""
    spec, model = ENCODERS["timm-augreg"], make("timm-augreg").train()
    for module in model.modules():
        if type(module).__name__ == "DropPath":
            module.drop_prob = 0.0
    with vtc.compress(model, RULES["test-pairs"](), **BUDGET):
        pictures = [spec.images(1, first=number).requires_grad_() for number in range(24)]
        expected = gradients(model, loss_of(spec.call(model, pictures[0])), pictures[0])
        model.set_grad_checkpointing(True)
        losses = [loss_of(spec.call(model, pixels)) for pixels in pictures[:8]]
        assert_same(gradients(model, losses[0], pictures[0]), expected)
        losses = [loss_of(spec.call(model, pixels)) for pixels in pictures]
        with pytest.raises(RuntimeError, match="at most 16 forwards later"):
            gradients(model, losses[0], pictures[0])
