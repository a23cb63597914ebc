"""A tokenizer's encoder in the place of a host's vision tower."""

import copy

import pytest
import torch
from small import QUESTIONS, small_model, small_processor
from tiny import build as tiny_host
from tiny_tokenizers import TINY

import vtc
from vtc.evaluation.prompts import encode
from vtc.evaluation.scenes import scene
from vtc.tokenizers import Fixed, Policy, TokenSource, build
from vtc.tokenizers.images import load_images


def made(seed=0, **options):
    torch.manual_seed(seed)
    model, processor = small_model(), small_processor()
    tokenizer = build("ordered", **TINY["ordered"] | {"image_size": 24, "tokens": 12}).eval()
    tokenizer.start_from(load_images([scene("train", i).image for i in range(80)], 24))
    return model, processor, TokenSource.for_host(model, processor, tokenizer, **options).eval()


def prompt(processor, n=3):
    return encode(processor, QUESTIONS[:n], [scene("test", i).image for i in range(n)])


class ByLight(Policy):
    """Two tokens for dark pictures, five for others."""

    name = "by-light"

    def choose(self, tokenizer, images):
        return torch.where(images.mean((1, 2, 3)) < images.mean((1, 2, 3)).median(), 2, 5)


def native(model, source, inputs, row, k):
    """Logits of the last word where the prompt had k image tokens from the start."""
    ids, mask = inputs["input_ids"][row], inputs["attention_mask"][row].bool()
    ids = ids[mask]
    pixels = inputs["pixel_values"][row : row + 1]
    tokens, lengths = source(pixels)
    assert int(lengths[0]) >= k
    features = model.model.multi_modal_projector(tokens[:, :k])
    image = ids == model.config.image_token_id
    first = int(image.nonzero()[0])
    words = model.get_input_embeddings()(ids)
    x = torch.cat([words[:first], features[0], words[first:][~image[first:]]])
    return model.lm_head(model.model.language_model(inputs_embeds=x[None]).last_hidden_state[0, -1])


@pytest.mark.parametrize("k", [1, 4, 12])
def test_it_is_a_prompt_with_the_sources_tokens(k):
    model, processor, source = made()
    inputs = prompt(processor)
    with torch.no_grad():
        wanted = [native(model, source, inputs, row, k) for row in range(3)]
        with vtc.compress(model, source, keep=k, positions="repack") as handle:
            logits = model(**inputs).logits
            assert [len(record.index) for record in handle.last] == [k] * 3
            assert [record.index.tolist() for record in handle.last] == [list(range(k))] * 3
    torch.testing.assert_close(logits[:, -1], torch.stack(wanted), atol=1e-4, rtol=1e-4)


def test_a_policy_gives_each_image_its_own_number():
    model, processor, source = made(length=ByLight())
    inputs = prompt(processor)
    with torch.no_grad():
        lengths = source(inputs["pixel_values"])[1].tolist()
        assert sorted(set(lengths)) == [2, 5]
        wanted = [native(model, source, inputs, row, k) for row, k in enumerate(lengths)]
        with vtc.compress(model, source, keep=12, positions="repack") as handle:
            logits = model(**inputs).logits
            assert [len(record.index) for record in handle.last] == lengths
            handle.keep = 3
            model(**inputs)
            assert [len(record.index) for record in handle.last] == [min(k, 3) for k in lengths]
    torch.testing.assert_close(logits[:, -1], torch.stack(wanted), atol=1e-4, rtol=1e-4)


def test_the_tower_does_not_run_and_comes_back():
    model, processor, source = made()
    inputs = prompt(processor)
    ran = []
    model.model.vision_tower.get_input_embeddings().register_forward_hook(lambda *_: ran.append(1))
    with torch.no_grad():
        before = model(**inputs).logits
        assert ran
        ran.clear()
        with vtc.compress(model, source, keep=4):
            answer = model.generate(**inputs, max_new_tokens=2)
            assert not ran
        assert torch.equal(before, model(**inputs).logits)
    assert answer.shape[1] > inputs["input_ids"].shape[1]
    assert "forward" not in vars(model.model.vision_tower)


def test_prefixes_and_pixels():
    _, processor, source = made()
    pixels = prompt(processor)["pixel_values"]
    with torch.no_grad():
        full, lengths = source(pixels)
        short, fewer = source(pixels, 5)
        alone = torch.cat([source(row[None], 5)[0] for row in pixels])
    assert lengths.tolist() == [12] * 3 and fewer.tolist() == [5] * 3
    torch.testing.assert_close(full[:, :5], short)
    torch.testing.assert_close(short, alone)
    seen = []
    source.tokenizer.encode, encode_ = (
        lambda x, length: seen.append(x) or encode_(x, length),
        source.tokenizer.encode,
    )
    source(pixels)
    small = torch.stack(
        [torch.tensor(scene("test", i).pixels).permute(2, 0, 1).float() / 255 for i in range(3)]
    )
    small = torch.nn.functional.interpolate(small, (24, 24), mode="bicubic", antialias=True).clamp(0, 1)
    torch.testing.assert_close(seen[0], small, atol=2e-3, rtol=0)


def test_it_moves_to_another_type():
    _, processor, source = made()
    pixels = prompt(processor)["pixel_values"]
    with torch.no_grad():
        expected, _ = source(pixels, 4)
        tokens, _ = copy.deepcopy(source).double()(pixels, 4)
        torch.testing.assert_close(tokens.float(), expected, atol=1e-3, rtol=1e-3)
        for dtype in (torch.bfloat16, torch.float16):
            moved = copy.deepcopy(source).to(dtype)
            tokens, lengths = moved(pixels.to(dtype), 4)
            assert tokens.dtype == dtype and tokens.isfinite().all() and lengths.tolist() == [4] * 3


def test_it_learns_with_a_frozen_host():
    model, processor, source = made()
    model.requires_grad_(False)
    inputs = prompt(processor)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    trained = [p for p in source.parameters() if p.requires_grad]
    assert all(not p.requires_grad for p in source.tokenizer.parameters())
    optimiser = torch.optim.Adam(trained, 1e-2)
    losses = []
    with vtc.compress(model, source, keep=6):
        for _ in range(15):
            loss = model(**inputs, labels=labels).loss
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained)
    assert losses[-1] < losses[0] - 0.1


def test_a_copy_keeps_working_when_the_model_is_restored():
    model, processor, source = made()
    inputs = prompt(processor)
    handle = vtc.compress(model, source, keep=4)
    with torch.no_grad():
        wanted = model(**inputs).logits
        twin = copy.deepcopy(model)
        handle.remove()
        assert torch.equal(twin(**inputs).logits, wanted)
        vtc.restore(twin)
        assert torch.equal(twin(**inputs).logits, model(**inputs).logits)


def test_what_cannot_be():
    model, processor, source = made()
    for keep in (0.5, 1.0, 13, "p:0.5"):
        with pytest.raises(ValueError, match=r"1 to 12|score"):
            vtc.compress(model, source, keep=keep)
    wrong = TokenSource(source.tokenizer, 48)
    with pytest.raises(ValueError, match="32 numbers to a token, the source makes 48"):
        vtc.compress(model, wrong, keep=4)
    other = tiny_host("qwen2_5_vl")[0]
    with pytest.raises(ValueError, match="takes the place of a tower"):
        vtc.compress(other, source, keep=4)
    with vtc.compress(model, source, keep=4) as handle, pytest.raises(ValueError, match="no plan to save"):
        vtc.save(handle.plan, "/dev/null")
    fixed = TokenSource.for_host(model, processor, source.tokenizer, length=Fixed(40))
    with vtc.compress(model, fixed, keep=4), pytest.raises(ValueError, match="12 tokens at most, not to 40"):
        model(**prompt(processor))


@pytest.mark.parametrize("name", ["llava-clip", "llava-clip-full", "llava-siglip", "vipllava"])
def test_hosts_that_take_one(name):
    """Their projector is given the source's tokens, and nothing of what else is in the row goes on."""
    model, make_inputs = tiny_host(name)
    inputs = make_inputs((1, 2))
    width = model.config.vision_config.hidden_size
    tokenizer = build("ordered", **TINY["ordered"]).eval()
    source = TokenSource(tokenizer, width).eval()
    layers = model.config.vision_feature_layers if name == "vipllava" else [0]
    with torch.no_grad():
        tokens = source(inputs["pixel_values"], 4)[0]
        wanted = model.model.multi_modal_projector(torch.cat([tokens] * len(layers), -1))  # (3, 4, D)
        bare = model(**inputs).logits
        with vtc.compress(model, source, keep=4) as handle:
            features = torch.cat(list(model.model.get_image_features(inputs["pixel_values"]).pooler_output))
            model(**inputs)
            assert [len(record.index) for record in handle.last] == [4] * 3
        assert torch.equal(model(**inputs).logits, bare)
    kept = features.flatten(0, -2)[~features.flatten(0, -2).isnan().any(-1)]
    torch.testing.assert_close(kept.view(3, 4, -1), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("first", ["accelerate", "vtc"])
def test_a_tower_wrapped_by_accelerate_is_given_back(first):
    from accelerate.hooks import ModelHook, add_hook_to_module

    calls = []

    class Counting(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            calls.append(1)
            return args, kwargs

    model, processor, source = made()
    inputs, tower = prompt(processor), model.model.vision_tower
    with torch.no_grad():
        bare = model(**inputs).logits
        if first == "accelerate":
            add_hook_to_module(tower, Counting())
        with vtc.compress(model, source, keep=4):
            compressed = model(**inputs).logits
            assert not calls and not torch.equal(compressed, bare)
            if first == "vtc":
                add_hook_to_module(tower, Counting())
                assert torch.equal(model(**inputs).logits, compressed) and calls.pop()
        assert torch.equal(model(**inputs).logits, bare) and len(calls) == 1


def test_a_part_of_tokens_without_order_is_refused():
    model, processor, _ = made()
    titok = TokenSource.for_host(model, processor, build("titok", **TINY["titok"]).eval())
    most = titok.tokenizer.max_tokens
    inputs = prompt(processor)
    with vtc.compress(model, titok, keep=most), torch.no_grad():
        model(**inputs)
    with (
        vtc.compress(model, titok, keep=most - 1),
        pytest.raises(ValueError, match=f"in no order.*one of its lengths, {most}"),
    ):
        model(**inputs)
