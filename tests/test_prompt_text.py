"""The text around each image, against one read off the prompt token by token."""

import copy
import functools
import inspect
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from footprint import footprint
from test_compile import _shallow
from tiny import HOSTS, SUPPRESS, build, gemma_encoders
from tiny.parts import IMAGE, VIDEO
from transformers import DynamicCache

import vtc
from vtc.hosts import open_host
from vtc.stages.prompt import Prompt

FILM_START, FILM_END = 94, 93  # between which GLM writes videos as images
GREEDY = {"max_new_tokens": 2, "do_sample": False, "suppress_tokens": SUPPRESS}
NAMES = [name for name, host in HOSTS.items() if host.works and name != "llama4"]
READERS = ["shieldgemma2", "t5gemma2", "diffusion_gemma"]
VIDEOS = [name for name in NAMES if HOSTS[name].video]
METHODS = [("slime", {"adaptive": False}), ("cdpruner", {}), ("mmtok", {})]
on_methods = pytest.mark.parametrize(("method", "options"), METHODS, ids=[name for name, _ in METHODS])


def opened(name):
    torch.manual_seed(0)
    return getattr(gemma_encoders, name)() if name in READERS else build(name)


class Ear:
    """Asks for the texts of every call for features, of which some are dropped, too."""

    def __init__(self, model, keep=0.4):
        self.model, self.keep, self.heard = model, keep, []

    def __enter__(self):
        self.handle = vtc.compress(self.model, "divprune", keep=self.keep)
        self.vision = open_host(vtc.api.unwrap(self.model))
        self.prompt = Prompt(self.vision)
        self.prompt.install()
        for name, source in self.handle._stages[0].sources.items():
            source.layout = functools.partial(self.hear, name, source.layout)
        return self

    def __exit__(self, *exception):
        self.prompt.remove()
        self.handle.remove()

    def hear(self, name, layout, *args):
        layouts = layout(*args)
        self.heard.append(([layout.length for layout in layouts], self.prompt.texts(name, layouts)))
        return layouts

    def told(self, ids, mask, kinds=(IMAGE,)):
        """Whether it heard, of one kind after the other, what the prompts say. Then it forgets it."""
        assert len(self.heard) == len(kinds)
        for (lengths, found), kind in zip(self.heard, kinds):
            lengths = [1] * len(lengths) if self.vision.host.memory else lengths
            expected = list(restated(ids.tolist(), mask.tolist(), kind, lengths))
            assert len(found) == len(expected) == len(lengths)
            for (text, after), (words, behind) in zip(found, expected):
                assert torch.equal(text, self.embedded(words)) and not text.requires_grad
                assert after.tolist() == behind
        self.heard.clear()

    def embedded(self, words):
        table = self.vision.base.get_input_embeddings()
        return torch.stack([table(torch.tensor([[word]]))[0, 0] for word in words]).detach()


def restated(ids, mask, kind, lengths):
    """For each image of a kind in the prompts: the words of its prompt, and which are behind it."""
    lengths = iter(lengths)
    for row, real in zip(ids, mask):
        words = [place for place, i in enumerate(row) if real[place] and i not in (IMAGE, VIDEO)]
        left, film = 0, False
        for place, i in enumerate(row):
            if IMAGE in row and VIDEO not in row and i in (FILM_START, FILM_END):
                film = i == FILM_START
            if (VIDEO if film and i == IMAGE else i) == kind:
                left = (left or next(lengths)) - 1
                if left == 0:
                    behind = [word > place for word in words]
                    yield [row[word] for word in words], behind if any(behind) else [True] * len(words)
        assert left == 0
    assert not list(lengths)


@pytest.mark.parametrize("name", [*NAMES, *READERS])
@torch.no_grad()
def test_every_host(name):
    model, make_inputs = opened(name)
    with Ear(model) as ear:
        inputs = make_inputs((2, 1, 0), pads=2, side="right")
        model(**inputs)
        ear.told(inputs["input_ids"], inputs["attention_mask"])
        if name == "shieldgemma2":  # says yes or no
            return
        beams = 1 if name in HOSTS and "beams" in HOSTS[name].lacks else 2
        inputs = make_inputs((2, 1), pads=1)
        options = {"max_new_tokens": 1, "num_beams": beams, "num_return_sequences": beams}
        model.generate(**inputs, **GREEDY | options)
        copies = beams if ear.vision.host.memory else 1  # it has no get_image_features
        ids, mask = (inputs[each].repeat_interleave(copies, 0) for each in ("input_ids", "attention_mask"))
        ear.told(ids, mask)


@pytest.mark.parametrize("name", VIDEOS)
@torch.no_grad()
def test_videos_beside_images(name):
    model, make_inputs = build(name)
    mixed = "mixed" not in HOSTS[name].lacks
    inputs = make_inputs((1, 0) if mixed else (0, 0), (0, 2), pads=1)
    kinds = (IMAGE, VIDEO) if mixed else (VIDEO,)
    with Ear(model) as ear:
        model(**inputs)
        ear.told(inputs["input_ids"], inputs["attention_mask"], kinds)
        model.generate(**inputs, **GREEDY)
        ear.told(inputs["input_ids"], inputs["attention_mask"], kinds)


def test_videos_that_come_by_the_method_for_images():
    """Also where there are as many tokens of both kinds, and where only one of them is in the forward."""
    model, make_inputs = build("perception_lm")
    inputs = make_inputs((0, 2), (2, 0))
    (film,) = {len(film) for film in inputs["pixel_values_videos"]}
    pictures = inputs["pixel_values_videos"][:, :film].flip(0)
    count = int((inputs["input_ids"] == VIDEO).sum())
    ids = torch.cat(
        [torch.tensor([[1, 5]] * 2), torch.full((2, count), IMAGE), torch.tensor([[6, 7]] * 2)], 1
    )
    ids[1, 2 : 2 + count] = VIDEO
    ids[1, -1] = 8
    assert count % 2 == 0
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": pictures,
        "pixel_values_videos": inputs["pixel_values_videos"],
    }
    with Ear(model) as ear, torch.no_grad():
        model(**inputs)
        ear.told(ids, inputs["attention_mask"], (IMAGE, VIDEO))
        model.generate(**inputs, **GREEDY)
        ear.told(ids, inputs["attention_mask"], (IMAGE, VIDEO))


@pytest.mark.parametrize(
    "options",
    [
        {"use_cache": False},
        {"prefill_chunk_size": 7},
        {"cache_implementation": "static"},
        {"num_return_sequences": 3, "do_sample": True},
        {"prompt_lookup_num_tokens": 2},
    ],
    ids=str,
)
def test_ways_to_generate(options):
    model, make_inputs = build("llava_next-clip")
    inputs = make_inputs((2,)) if "prompt_lookup_num_tokens" in options else make_inputs((2, 1), pads=2)
    with Ear(model) as ear:
        model.generate(**inputs, **GREEDY | options)
        ear.told(inputs["input_ids"], inputs["attention_mask"])


def test_what_was_generated_is_no_question():
    """Mllama without a cache encodes at every step."""
    model, make_inputs = build("mllama")
    inputs = make_inputs((1, 1), pads=1)
    with Ear(model) as ear:
        model.generate(**inputs, **GREEDY, use_cache=False)
        ear.told(inputs["input_ids"], inputs["attention_mask"], (IMAGE, IMAGE))


def test_padding_that_generate_finds_itself():
    model, make_inputs = build("llava-clip")
    inputs = make_inputs((2, 1), pads=2)
    mask = inputs.pop("attention_mask")
    with Ear(model) as ear:
        model.generate(**inputs, **GREEDY, pad_token_id=0)
        ear.told(inputs["input_ids"], mask)
        model.generate(inputs.pop("input_ids"), **inputs, **GREEDY, pad_token_id=0, eos_token_id=[0, 110])
        ids = make_inputs((2, 1), pads=2)["input_ids"]
        ear.told(ids, torch.ones_like(ids))  # then it may be any word


@pytest.mark.parametrize("name", ["llava-clip", "gemma3", "idefics3"])
def test_embeddings_for_ids(name):
    model, make_inputs = build(name)
    inputs = make_inputs((2, 1), pads=2)
    ids, table = inputs.pop("input_ids"), model.get_input_embeddings()
    with Ear(model) as ear:
        model(inputs_embeds=table(ids), **inputs)
        ear.told(ids, inputs["attention_mask"])
        if name != "gemma3":  # which generates from ids only
            model.generate(inputs_embeds=table(ids), **inputs, **GREEDY)
            ear.told(ids, inputs["attention_mask"])


@pytest.mark.parametrize("positions", ["keep", "repack"])
@pytest.mark.parametrize("name", ["llava_next-clip", "gemma3"])
@torch.no_grad()
def test_a_chat_is_asked_for_what_is_new(name, positions):
    """Images of the second turn only are encoded, whether generate() is given all of the chat or not."""
    model, make_inputs = build(name)
    first, second = make_inputs((2, 1), pads=2), make_inputs((1, 1), first=3)
    with Ear(model) as ear:
        ear.handle._stages[0].shortening.repack = positions == "repack"
        turn = model.generate(**first, **GREEDY, return_dict_in_generate=True)
        ear.told(first["input_ids"], first["attention_mask"])
        said = turn.sequences[:, first["input_ids"].shape[1] :]
        kinds = {n: torch.cat([v, v[:, :2] * 0, second[n]], 1) for n, v in first.items() if "type" in n}
        said = {"input_ids": said, "attention_mask": torch.ones_like(said)}
        whole = {n: torch.cat([first[n], said[n], second[n]], dim=1) for n in said}
        pixels = {n: v for n, v in second.items() if n not in said and "type" not in n}
        # The last word that was said is not in the cache.
        new = {n: v[:, turn.past_key_values.get_seq_length() :] for n, v in whole.items()}
        assert new["input_ids"].shape[1] == 1 + second["input_ids"].shape[1]

        def cache():
            return {"past_key_values": copy.deepcopy(turn.past_key_values)}

        model.generate(**whole, **kinds, **pixels, **cache(), **GREEDY)
        ear.told(**by_name(new))
        only = {n: v[:, -new["input_ids"].shape[1] :] for n, v in kinds.items()}
        part = {"input_ids": new["input_ids"], "attention_mask": whole["attention_mask"]}
        model.generate(**part, **only, **pixels, **cache(), **GREEDY)
        ear.told(**by_name(new))
        model(**part, **only, **pixels, **cache())
        ear.told(**by_name(new))


@torch.no_grad()
def test_a_chat_with_a_longer_second_turn():
    """What is new may be given alone, though it would reach behind the cache if it were all of the chat."""
    model, make_inputs = build("llava-clip")
    first, second = make_inputs((0, 0)), make_inputs((1, 2), pads=1, side="right")
    cache = model(**first, use_cache=True).past_key_values
    assert cache.get_seq_length() < second["input_ids"].shape[1]
    second["attention_mask"][0, 1] = 0
    mask = torch.cat([first["attention_mask"], second["attention_mask"]], dim=1)
    with Ear(model) as ear:
        for call in (model, functools.partial(model.generate, **GREEDY)):
            call(**{**second, "attention_mask": mask}, past_key_values=copy.deepcopy(cache))
            ear.told(**by_name(second))


def by_name(inputs):
    return {"ids": inputs["input_ids"], "mask": inputs["attention_mask"]}


def test_a_prompt_without_words():
    model, make_inputs = build("llava-clip")
    inputs = make_inputs((1,))
    ids = inputs["input_ids"]
    only = ids[ids == IMAGE][None]
    with Ear(model) as ear, torch.no_grad():
        model(input_ids=only, pixel_values=inputs["pixel_values"])
        ((_, [(text, after)]),) = ear.heard
        assert text.shape == (0, 32) and after.shape == (0,)
        ear.heard.clear()
        front = torch.cat([torch.tensor([[1, 5, 6]]), only], dim=1)  # the question in front of the image
        model(input_ids=front, pixel_values=inputs["pixel_values"])
        ((_, [(text, after)]),) = ear.heard
        assert text.shape == (3, 32) and after.all()


def test_what_nobody_can_know():
    model, make_inputs = build("llava-clip")
    inputs = make_inputs((2, 1))
    pixels = {"pixel_values": inputs["pixel_values"]}
    with Ear(model) as ear, torch.no_grad():
        with pytest.raises(RuntimeError, match=r"features are made alone: call the compressed model"):
            model.model.get_image_features(**pixels)
        for call in (model, functools.partial(model.generate, **GREEDY)):
            with pytest.raises(RuntimeError, match=r"holds 48 tokens for 32 features.*all of its images"):
                call(**{**inputs, "pixel_values": inputs["pixel_values"][:2]})
            with pytest.raises(RuntimeError, match="made alone"):  # nothing is known of that call any more
                model.model.get_image_features(**pixels)
        ids = inputs["input_ids"].clone()
        row, place = (ids == IMAGE).nonzero()[0].tolist()
        ids[row, place], ids[1, 0] = 5, IMAGE
        with pytest.raises(RuntimeError, match="image lie in two prompts"):
            model(**{**inputs, "input_ids": ids})
        model(**inputs)
        ear.heard.clear()


def test_refused():
    model, _ = build("llama4")
    with pytest.raises(ValueError, match="Llama4ForConditionalGeneration projects features only when"):
        Prompt(open_host(model))
    with pytest.raises(ValueError, match="does not read the question"):
        vtc.compress(model, "cdpruner", keep=0.4)
    model, _ = build("qwen2_vl")
    model.model.config = SimpleNamespace(video_token_id=VIDEO)
    with pytest.raises(ValueError, match="does not tell which tokens of its prompt are an image's"):
        Prompt(open_host(model))


@pytest.mark.parametrize("name", ["llava-clip", "qwen2_5_vl", "mllama", "shieldgemma2"])
def test_remove_leaves_nothing(name):
    model, _ = opened(name)
    before = footprint(model)
    prompt = Prompt(open_host(model))
    for _ in range(2):
        prompt.install()
        assert footprint(model) != before
        prompt.remove()
        assert footprint(model) == before


def test_wrappers_of_generate_stay():
    model, make_inputs = build("llava-clip")
    inputs, calls = make_inputs((1,)), []

    def counting(original):
        @functools.wraps(original)
        def generate(self, *args, **kwargs):
            calls.append(1)
            return original(self, *args, **kwargs)

        return generate

    bare = model.generate(**inputs, **GREEDY)
    own = model.generate = counting(type(model).generate).__get__(model)
    with Ear(model, keep=1.0) as ear:
        assert inspect.signature(model.generate) == inspect.signature(own)
        assert torch.equal(model.generate(**inputs, **GREEDY), bare)
        ear.told(inputs["input_ids"], inputs["attention_mask"])
        above = model.generate = counting(model.generate.__func__).__get__(model)
    assert model.generate is above and torch.equal(model.generate(**inputs, **GREEDY), bare)
    del model.generate
    model.generate = own
    with Ear(model):
        pass
    assert model.generate == own and len(calls) == 1 + 2


def test_generate_inside_of_generate():
    """What the inner call was given is known until it ends."""
    from transformers import StoppingCriteria

    model, make_inputs = build("llava-clip")
    outer, inner = make_inputs((2,)), make_inputs((1, 1), seed=1)

    class Asking(StoppingCriteria):
        def __call__(self, ids, scores, **kwargs):
            ear.told(outer["input_ids"], outer["attention_mask"])
            model.generate(**inner, **GREEDY)
            ear.told(inner["input_ids"], inner["attention_mask"])
            assert ear.prompt._generate.get().tokens is outer["input_ids"]
            return torch.ones(len(ids), dtype=torch.bool)

    with Ear(model) as ear:
        model.generate(**outer, **GREEDY, stopping_criteria=[Asking()])
        assert not ear.prompt._generate.get()


def test_peft_and_threads():
    from peft import LoraConfig, get_peft_model

    model, make_inputs = build("llava-clip")
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj"])).eval()
    with Ear(wrapped) as ear:
        inputs = make_inputs((2, 1), pads=1)
        wrapped.generate(**inputs, **GREEDY)
        ear.told(inputs["input_ids"], inputs["attention_mask"])
    many = [make_inputs((1 + i % 2, 1), seed=i) for i in range(8)]
    with vtc.compress(wrapped, "cdpruner", keep=0.4):
        expected = [wrapped.generate(**inputs, **GREEDY) for inputs in many]
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda inputs: wrapped.generate(**inputs, **GREEDY), many))
    assert all(torch.equal(a, b) for a, b in zip(found, expected))


@torch.no_grad()
def test_weights_that_are_elsewhere():
    from accelerate import cpu_offload

    model, make_inputs = build("llava-clip")
    inputs = make_inputs((2, 1), pads=1)
    table = build("llava-clip")[0].get_input_embeddings()
    expected = [table(ids) for ids in inputs["input_ids"][:, -4:]]
    cpu_offload(model, execution_device="cpu")
    assert model.get_input_embeddings().weight.device.type == "meta"
    with Ear(model) as ear:
        model(**inputs)
        model.generate(**inputs, **GREEDY)
        for _, found in ear.heard:
            for (text, _), row in zip(found, (0, 0, 1), strict=True):
                assert torch.equal(text[-4:], expected[row])


def test_a_deep_copy_reads_its_own_words():
    model, make_inputs = build("llava-clip")
    inputs = make_inputs((2, 1), pads=1)
    handle = vtc.compress(model, "cdpruner", keep=0.4)
    twin = copy.deepcopy(model)
    handle.remove()
    torch.nn.init.normal_(twin.get_input_embeddings().weight)
    found = twin.generate(**inputs, **GREEDY), twin(**inputs).logits
    vtc.restore(twin)
    assert "generate" not in vars(twin)
    with vtc.compress(twin, "cdpruner", keep=0.4):
        assert torch.equal(twin.generate(**inputs, **GREEDY), found[0])
        torch.testing.assert_close(twin(**inputs).logits, found[1])


@torch.no_grad()
def test_compiled():
    model, make_inputs = _shallow("llava-clip")
    inputs = make_inputs((2, 1), pads=1)
    fast = torch.compile(model, backend="eager")
    with Ear(model, keep=1.0) as ear:
        fast(**inputs)
        ear.told(inputs["input_ids"], inputs["attention_mask"])
        assert not ear.prompt._forward.get()
    torch.compiler.reset()


def kept(model, inputs, handle):
    with torch.no_grad():
        model(**inputs)
    forward = [record.index for record in handle.last]
    model.generate(**inputs, **GREEDY)
    assert all(torch.equal(record.index, index) for record, index in zip(handle.last, forward, strict=True))
    return forward


@on_methods
@pytest.mark.parametrize("name", ["llava-clip", "llava_next-clip", "gemma3", "qwen2_5_vl", "mllama"])
def test_methods_follow_the_question(name, method, options):
    """Another question about the same picture keeps other tokens; a batch keeps what its prompts do alone."""
    model, make_inputs = build(name)
    inputs = make_inputs((1, 1, 1), pads=2)
    with vtc.compress(model, vtc.get_method(method, **options), keep=0.4) as handle:
        batch = kept(model, inputs, handle)
        for row, found in enumerate(batch):
            (alone,) = kept(model, make_inputs((1,), first=row), handle)
            assert torch.equal(alone, found)
        ids = inputs["input_ids"].clone()
        ids[:, -3:] = torch.tensor([71, 13, 44])
        others = kept(model, {**inputs, "input_ids": ids}, handle)
    assert any(not torch.equal(other, found) for other, found in zip(others, batch, strict=True))


@on_methods
@torch.no_grad()
def test_methods_in_half_precision_and_over_a_cache(method, options):
    model, make_inputs = build("llava-clip")
    half = copy.deepcopy(model).to(torch.bfloat16)
    inputs = make_inputs((2, 1), pads=1)
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    with vtc.compress(half, vtc.get_method(method, **options), keep=0.4) as handle:
        out = half(**inputs, past_key_values=DynamicCache(config=model.config.text_config), use_cache=True)
        assert out.logits.isfinite().all() and len(handle.last) == 3
