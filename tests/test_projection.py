"""Methods that reduce what a projector is given, and tokens that go on in an order of their own."""

from dataclasses import dataclass

import pytest
import torch
from tiny import build

import vtc
from vtc.method import Need
from vtc.tokens import Reduction


@dataclass
class Halves(vtc.Merge):
    """k slots: the first k tokens, each with every k-th one behind it; notes what it sees."""

    name = "halves"
    before_projector = True

    def assign(self, tokens, k):
        self.seen = tokens.x
        index = torch.arange(k).expand(len(tokens.x), k)
        return Reduction(index, (torch.arange(tokens.n) % k).expand(len(tokens.x), -1))


@dataclass
class Backwards(vtc.Select):
    """The first tokens in reverse order."""

    name = "backwards"

    def reduce(self, tokens, k):
        index = torch.arange(k).flip(0).expand(len(tokens.x), k)
        return Reduction.select(index, tokens.n, ordered=True)


@dataclass
class Looks(vtc.Select):
    """Keeps the tokens of the largest input of the projector."""

    name = "looks"

    @property
    def needs(self):
        return (Need("vision"),)

    def score(self, tokens):
        self.seen = tokens.vision
        return tokens.vision.norm(dim=-1)


def given_to_projector(model, inputs):
    seen = []
    projector = model.model.multi_modal_projector
    hook = projector.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        pictures = {name: inputs[name] for name in ("pixel_values", "image_sizes") if name in inputs}
        output = model.model.get_image_features(**pictures, return_dict=True).pooler_output
    hook.remove()
    return seen[0], torch.cat(list(output))


@pytest.mark.parametrize("host", ["llava-clip", "llava-clip-full", "llava-siglip"])
def test_merged_tokens_go_through_the_projector(host):
    model, make_inputs = build(host)
    inputs = make_inputs((2,))
    x, full = given_to_projector(model, inputs)  # (2, M, D'), (all, D)
    patches = x[:, 1:] if host == "llava-clip-full" else x
    method = Halves()
    with vtc.compress(model, method, keep=5) as handle, torch.no_grad():
        features = model.model.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output
        assert torch.equal(method.seen, patches)
        mean = torch.stack([patches[:, slot::5].mean(dim=1) for slot in range(5)], dim=1)  # (2, 5, D')
        expected = model.model.multi_modal_projector(mean)
        for image, feature in enumerate(features):
            kept = feature[~feature[:, 0].isnan()]
            torch.testing.assert_close(kept, expected[image], atol=1e-5, rtol=1e-5)
            behind = torch.stack(
                [full.view(2, -1, full.shape[-1])[image][slot::5].mean(0) for slot in range(5)]
            )
            assert not torch.allclose(kept, behind, atol=1e-3)
    assert all(len(record.index) == 5 for record in handle.last)


def test_tiles_find_their_own_patches():
    model, make_inputs = build("llava_next-clip")
    inputs = make_inputs((3,))
    x, _ = given_to_projector(model, inputs)
    method = Looks()
    with vtc.compress(model, method, keep=0.3) as handle, torch.no_grad():
        model(**inputs)
        kept = handle.last[-1]
    flat = x.flatten(0, 1)
    from vtc.hosts import open_host

    vision = open_host(model)
    items = model.model.get_image_features(
        inputs["pixel_values"], inputs["image_sizes"], return_dict=True
    ).pooler_output
    layouts = vision.host.layout(
        vision, {"pixel_values": inputs["pixel_values"], "image_sizes": inputs["image_sizes"]}, list(items)
    )
    tile, patches = layouts[-1].tiles[-1], layouts[-1].patches[-1]
    k = sum(int(slot in kept.index) for slot in tile.slots)
    own = flat[patches[:, 0]].norm(dim=-1)
    chosen = sorted(own.sort(descending=True, stable=True).indices[:k].tolist())
    assert tile.slots[chosen].tolist() == [int(s) for s in tile.slots if int(s) in kept.index]


@pytest.mark.parametrize("host", ["gemma3", "internvl", "qwen2_5_vl", "idefics2", "llama4"])
def test_where_a_projector_joins_patches_tokens_are_reduced_behind_it(host):
    model, make_inputs = build(host)
    inputs = make_inputs((2, 1))
    method = Halves()
    with vtc.compress(model, method, keep=2) as handle, torch.no_grad():
        out = model(**inputs)
        assert all(len(record.index) == 2 for record in handle.last) and out.logits.isfinite().all()
    looks = Looks()
    with vtc.compress(model, looks, keep=2) as handle, torch.no_grad():
        model(**inputs)
        assert looks.seen.shape[1] == len(handle.last[-1].source)


@pytest.mark.parametrize("positions", ["repack", "keep"])
def test_tokens_may_go_on_in_an_order_of_their_own(positions):
    model, make_inputs = build("llava-clip")
    inputs = make_inputs((1,))
    _, full = given_to_projector(model, inputs)
    with vtc.compress(model, Backwards(), keep=4, positions=positions) as handle, torch.no_grad():
        (features,) = model.model.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output
        assert handle.last[0].index.tolist() == [0, 1, 2, 3]
        expected = full[:4].flip(0) if positions == "repack" else full[:4]
        assert torch.equal(features[:4], expected) and features[4:].isnan().all()


def test_gradients_flow_through_merged_inputs():
    model, make_inputs = build("llava-clip")
    with vtc.compress(model, Halves(), keep=4):
        model(**make_inputs((1,))).logits.square().mean().backward()
    tower = [p.grad for p in model.model.vision_tower.parameters() if p.grad is not None]
    assert tower and all(grad.isfinite().all() for grad in tower) and any(grad.abs().sum() for grad in tower)
