"""merge="nearest" and merge="restore": the rule against plain loops, the decoder against one that is given
merged tokens, their positions and explicit biases, one prompt at a time and layer by layer."""

import copy
import dataclasses
import math
import pickle

import pytest
import torch
from decoder_oracle import PER_TOKEN, Watch, cut_deepstack, cut_mask, marked
from footprint import footprint
from tiny import IMAGE, SUPPRESS, VIDEO, build

import vtc
from vtc.capture import missing
from vtc.hosts import open_host
from vtc.method import Select
from vtc.restoring import MERGES, Nearest, Restore, get_merge
from vtc.tokens import Reduction, Tokens

STEPS = 4
GREEDY = {"max_new_tokens": STEPS, "do_sample": False, "suppress_tokens": SUPPRESS}
MIXED = {"images": (2, 1, 0), "pads": 2}
LOWEST = torch.finfo(torch.float32).min


# -- the rule


def groups_by_hand(x, kept):
    """Where each token of x goes: the first of the most similar kept ones."""
    units = [[v / (math.hypot(*row) or 1) for v in row] for row in x.tolist()]
    found = []
    for i, unit in enumerate(units):
        best = [sum(a * b for a, b in zip(unit, units[j])) for j in sorted(kept)]
        top = max(best)
        found.append(i if i in kept else sorted(kept)[next(s for s, v in enumerate(best) if v > top - 1e-9)])
    return found


def pictures():
    random = torch.randn(3, 20, 6, dtype=torch.float64)
    doubled = random.clone()
    doubled[:, 10:] = doubled[:, :10]
    lines = torch.eye(6, dtype=torch.float64)[torch.randint(6, (3, 20))]
    nothing = torch.zeros(3, 20, 6, dtype=torch.float64)
    return {"random": random, "doubled": doubled, "lines": lines, "equal": nothing + 1, "zeros": nothing}


@pytest.mark.parametrize("kind", pictures())
@pytest.mark.parametrize("k", [1, 2, 7, 19, 20])
def test_dropped_tokens_join_the_most_similar_one(kind, k):
    x = pictures()[kind].float()
    index = torch.stack([torch.randperm(20)[:k] for _ in x])
    tokens = Tokens(x, (4, 5))
    for rule in (Nearest(), Restore(), Restore(place="kept")):
        reduction = rule.extend(tokens, Reduction.select(index, 20))
        single = rule.extend(Tokens(x[1:2], (4, 5)), Reduction.select(index[1:2], 20))
        assert torch.equal(single.index[0], reduction.index[1])
        assert torch.equal(single.source[0], reduction.source[1])
        new = reduction.apply(x)
        for row in range(len(x)):
            target = groups_by_hand(x[row].double(), index[row].tolist())
            groups = {}
            for token, place in enumerate(target):
                groups.setdefault(place, []).append(token)
            if rule == Restore():  # a group stands at its middle member, the lower of two
                groups = {members[(len(members) - 1) // 2]: members for members in groups.values()}
            assert reduction.index[row].tolist() == sorted(groups)
            for slot, place in enumerate(sorted(groups)):
                members = groups[place]
                assert (reduction.source[row] == slot).nonzero()[:, 0].tolist() == members
                mean = x[row, members].double().mean(dim=0)
                torch.testing.assert_close(new[row, slot].double(), mean, atol=1e-6, rtol=1e-5)
            assert reduction.sizes(tokens.size)[row].sum() == 20


def test_merging_counts_sizes_and_works_in_half_precision():
    x, size = torch.randn(1, 12, 4), torch.arange(1.0, 13)[None]
    reduction = Nearest().extend(Tokens(x, (3, 4), size=size), Reduction.select(torch.tensor([[2, 9]]), 12))
    for slot, new in enumerate(reduction.apply(x)[0]):
        own = (reduction.source[0] == slot).float() * size[0]
        torch.testing.assert_close(new, (own[:, None] * x[0]).sum(dim=0) / own.sum())
    half = Restore().extend(Tokens(x.bfloat16(), (3, 4)), Reduction.select(torch.tensor([[2, 9]]), 12))
    assert half.apply(x.bfloat16()).isfinite().all()


def test_one_token_and_a_reduction_that_merges_already():
    one = Tokens(torch.randn(2, 1, 3), (1, 1))
    assert Restore().extend(one, Reduction.select(torch.zeros(2, 1, dtype=torch.long), 1)).index.tolist() == [
        [0],
        [0],
    ]
    merged = Reduction.merge(torch.tensor([[0]]), torch.zeros(1, 4, dtype=torch.long))
    with pytest.raises(RuntimeError, match="merges already"):
        Nearest().extend(Tokens(torch.randn(1, 4, 3), (2, 2)), merged)


def test_options_are_checked_and_survive_json():
    for rule in (Nearest(), Restore(), Restore(distance=False, place="kept")):
        assert get_merge(rule.shown()) == rule
    assert Restore().shown() == "restore" and set(MERGES) == {"nearest", "restore"}
    assert not Restore(sizes=False, distance=False).biases
    for wrong in ({"place": "first"}, {"tokens": "some"}, {"sizes": 1}, {"distance": "far"}):
        with pytest.raises(ValueError):
            Restore(**wrong)
    for unknown in ("mean", {"name": "restore", "places": 1}):
        with pytest.raises(ValueError):
            get_merge(unknown)


# -- the decoder: a prompt of merged tokens, run layer by layer with biases that are written out


class Oracle:
    """One prompt: merged embeddings (K, D), and for each of them its position, its size, what it counts in
    the first layer, and whether it is corrected as a query."""

    def __init__(self, model, rule):
        self.model, self.rule = model, rule
        self.x, self.positions, self.sizes, self.even, self.whole = [], [], [], [], []

    def text(self, ids):
        """A forward of its own behind the prompt."""
        for token in ids:
            embedding = self.model.get_input_embeddings()(torch.tensor(token)).detach()
            self._add(embedding, self.positions[-1] + 1, 1, 1)
            self.whole.append(self.rule.tokens == "all" and max(self.sizes) > 1)

    def prompt(self, ids, features, records, start=0, repack=False):
        """A forward of a row without padding, with its pictures. Returns which of its columns remain."""
        begin, tokens, stay = len(self.x), [], []
        for feature, record in zip(features, records, strict=True):
            for n in range(len(feature)):
                slot = (record.index == n).nonzero()[:, 0].tolist()
                members = (record.source == slot[0]).nonzero()[:, 0].tolist() if slot else []
                if self.rule.place == "median" and members:
                    assert members[(len(members) - 1) // 2] == n
                tokens.append((feature[members].mean(dim=0), len(members)) if slot else None)
        left, gone = iter(tokens), 0
        for column, token in enumerate(ids):
            found = next(left) if token == IMAGE else None
            stay.append(token != IMAGE or found is not None)
            position = start + column - gone
            if not stay[-1]:
                gone += repack
            elif token == IMAGE:
                self._add(found[0], position, found[1], None)
            else:
                embedding = self.model.get_input_embeddings()(torch.tensor(token)).detach()
                self._add(embedding, position, 1, 1)
        pictures = [i for i in range(begin, len(self.x)) if self.even[i] is None]
        for i in pictures:
            self.even[i] = sum(self.sizes[j] for j in pictures) / len(pictures)
        self.whole += [max(self.sizes) > 1] * (len(self.x) - begin)
        return stay

    def _add(self, x, position, size, even):
        self.x.append(x)
        self.positions.append(position)
        self.sizes.append(size)
        self.even.append(even)

    def cut(self, count):
        for part in (self.x, self.positions, self.sizes, self.even, self.whole):
            del part[-count:]

    def bias(self, first):
        """(K, K)"""
        rows = []
        for q, (at, whole) in enumerate(zip(self.positions, self.whole)):
            row = []
            for k, key in enumerate(self.positions):
                value = math.log(self.even[k] if first and whole else self.sizes[k]) * self.rule.sizes
                if whole and self.rule.distance:
                    angles = [abs(at - key) * 10000 ** (-2 * f / 8) for f in range(4)]
                    value += math.log(2 - sum(map(math.cos, angles)) / 4)
                row.append(value if k <= q else LOWEST)
            rows.append(row)
        return torch.tensor(rows)[None, None]

    @torch.no_grad()
    def logits(self):
        decoder, x = self.model.base_model.get_decoder(), torch.stack(self.x)[None]
        where = torch.tensor(self.positions)[None]
        turns = decoder.rotary_emb(x, position_ids=where)
        for number, layer in enumerate(decoder.layers):
            mask = self.bias(first=number == 0)
            x = layer(x, attention_mask=mask, position_embeddings=turns, position_ids=where)
        return self.model.lm_head(decoder.norm(x))[0]  # (K, vocabulary)

    def greedy(self):
        tokens, logits = [], []
        for _ in range(STEPS):
            logits.append(self.logits()[-1])
            allowed = logits[-1].clone()
            allowed[SUPPRESS] = -float("inf")
            tokens.append(int(allowed.argmax()))
            self.text(tokens[-1:])
        return tokens, torch.stack(logits)


@torch.no_grad()
def bare_features(model, inputs):
    """Of each picture (n, D), made by the model without a compression."""
    vision = {name: inputs[name] for name in ("pixel_values", "image_sizes") if name in inputs}
    return list(model.base_model.get_image_features(**vision, return_dict=True).pooler_output)


def oracles(model, rule, inputs, features, records, repack=False):
    """For each prompt its oracle, and which of its L columns remain."""
    made, features, records = [], iter(features), iter(records)
    for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"]):
        real = mask.nonzero()[:, 0]
        oracle, count, lengths = Oracle(model, rule), int((ids == IMAGE).sum()), []
        own = []
        while sum(lengths) < count:
            own.append((next(features), next(records)))
            lengths.append(len(own[-1][0]))
        kept = oracle.prompt(
            ids[real].tolist(), *([list(part) for part in zip(*own)] or ([], [])), repack=repack
        )
        stay = torch.zeros(len(ids), dtype=torch.bool)
        stay[real] = torch.tensor(kept)
        made.append((oracle, stay))
    return made


@pytest.fixture(params=["llava-clip", "llava_next-clip"], scope="module")
def host(request):
    return build(request.param)


VARIANTS = [
    Restore(),
    Restore(tokens="all"),
    Restore(distance=False),
    Restore(sizes=False),
    Restore(place="kept"),
    Restore(sizes=False, distance=False),
]


@pytest.mark.parametrize("rule", VARIANTS, ids=str)
def test_forward_equals_merged_tokens_with_biases(host, rule):
    model, make_inputs = host
    for attention, positions, side in (
        ("sdpa", "keep", "left"),
        ("eager", "keep", "right"),
        ("sdpa", "repack", "right"),
        ("eager", "repack", "left"),
    ):
        inputs = make_inputs(**MIXED, side=side)
        features = bare_features(model, inputs)
        model.set_attn_implementation(attention)
        try:
            with vtc.compress(model, "divprune", keep=0.3, merge=rule, positions=positions) as handle:
                with torch.no_grad():
                    logits = model(**inputs).logits
                records = handle.last
        finally:
            model.set_attn_implementation("sdpa")
        assert any(
            (record.source.bincount() > 2).any()
            for record in (dataclasses.replace(r, source=r.source[r.source >= 0]) for r in records)
        )
        rows = oracles(model, rule, inputs, features, records, repack=positions == "repack")
        for row, (oracle, stay) in enumerate(rows):
            torch.testing.assert_close(logits[row, stay], oracle.logits(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("tokens", ["prompt", "all"])
def test_generate_equals_the_oracle(host, tokens):
    model, make_inputs = host
    inputs, rule = make_inputs(**MIXED), Restore(tokens=tokens)
    features, length = bare_features(model, inputs), inputs["input_ids"].shape[1]
    ways = [{}, {"cache_implementation": "static"}]
    ways += [{"use_cache": False}] if tokens == "all" else []
    expected = None
    for options in ways:
        with vtc.compress(model, "divprune", keep=0.3, merge=rule) as handle:
            out = model.generate(
                **inputs, **GREEDY, **options, return_dict_in_generate=True, output_logits=True
            )
            records = handle.last
        if expected is None:
            expected = [o.greedy() for o, _ in oracles(model, rule, inputs, features, records)]
        for row, (words, logits) in enumerate(expected):
            assert out.sequences[row, length:].tolist() == words
            own = torch.stack([step[row] for step in out.logits])
            torch.testing.assert_close(own, logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("tokens", ["prompt", "all"])
def test_beams_and_lookups_are_the_same_with_any_cache(host, tokens):
    model, make_inputs = host
    rule = Restore(tokens=tokens)
    beams = {**GREEDY, "num_beams": 3, "num_return_sequences": 2}
    with vtc.compress(model, "divprune", keep=0.3, merge=rule):
        inputs = make_inputs(**MIXED)
        expected = model.generate(**inputs, **beams)
        assert torch.equal(model.generate(**inputs, **beams, cache_implementation="static"), expected)
        if tokens == "all":
            assert torch.equal(model.generate(**inputs, **beams, use_cache=False), expected)
        one = make_inputs((2,))
        plain = model.generate(**one, **GREEDY)
        assert torch.equal(model.generate(**one, **GREEDY, prompt_lookup_num_tokens=2), plain)
        behind = int((one["input_ids"][0] == IMAGE).nonzero().max()) + 1
        if tokens == "all":  # else text in a later chunk is not of the forward that reads the pictures
            assert torch.equal(model.generate(**one, **GREEDY, prefill_chunk_size=behind), plain)


CUT = 2  # words of the first turn that are taken back
CHATS = [(Restore(), "keep"), (Restore(tokens="all"), "keep"), (Restore(), "repack")]


@torch.no_grad()
def add(model, inputs, cache=None, before=None):
    """Another turn over a cache whose tokens have the mask `before`: logits, the cache, the mask of both."""
    start = 0 if before is None else before.sum(dim=1, keepdim=True)
    places = (inputs["attention_mask"].cumsum(dim=1) - 1 + start).clamp_min(0)
    mask = (
        inputs["attention_mask"] if before is None else torch.cat([before, inputs["attention_mask"]], dim=1)
    )
    given = {**inputs, "attention_mask": mask, "position_ids": places}
    out = model(**given, past_key_values=cache, use_cache=True)
    return out.logits, out.past_key_values, mask


def words(*lengths):
    """Prompts of text, padded on the left."""
    ids, most = torch.randint(3, 90, (len(lengths), max(lengths))), max(lengths)
    mask = torch.stack([(torch.arange(most) >= most - length).long() for length in lengths])
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("rule, positions", CHATS, ids=str)
@pytest.mark.parametrize("pictures_first", [True, False])
def test_a_chat_goes_on_from_the_cache(host, rule, positions, pictures_first):
    """Pictures, words and more pictures over one cache that is stored, cropped and reordered in between."""
    model, make_inputs = host
    repack = positions == "repack"
    first = make_inputs((1, 1), pads=1) if pictures_first else words(6, 8)
    text, last = words(3, 5), make_inputs((1, 1), first=2)
    features = bare_features(model, first) if pictures_first else []
    with vtc.compress(model, "divprune", keep=0.3, merge=rule, positions=positions) as handle:
        _, cache, mask = add(model, first)
        records = handle.last if pictures_first else []
        rows = [oracle for oracle, _ in oracles(model, rule, first, features, records, repack)][::-1]
        cache = pickle.loads(pickle.dumps(cache))
        cache.crop(-CUT)
        cache.reorder_cache(torch.tensor([1, 0]))
        second, cache, mask = add(model, text, cache, mask.flip(0)[:, :-CUT])
        third, *_ = add(model, last, cache, mask)
        records = handle.last
    for row, oracle in enumerate(rows):
        oracle.cut(CUT)
        own = text["input_ids"][row, text["attention_mask"][row].bool()].tolist()
        oracle.text(own)
        expected = oracle.logits()[-len(own) :]
        torch.testing.assert_close(second[row, -len(own) :], expected, atol=1e-4, rtol=1e-4)
        real, before = last["attention_mask"][row].bool(), len(oracle.x)
        ids, feature = last["input_ids"][row, real].tolist(), bare_features(model, last)[row]
        kept = oracle.prompt(ids, [feature], [records[row]], oracle.positions[-1] + 1, repack)
        stay = real.clone()
        stay[real] = torch.tensor(kept)
        torch.testing.assert_close(third[row, stay], oracle.logits()[before:], atol=1e-4, rtol=1e-4)


def test_others_refuse_a_cache_of_merged_tokens(host):
    model, make_inputs = host
    with vtc.compress(model, "divprune", keep=0.3, merge="restore"):
        _, cache, mask = add(model, make_inputs((1,)))
    with pytest.raises(RuntimeError, match="compressed"):
        add(model, words(3), copy.deepcopy(cache), mask)
    with vtc.compress(model, "divprune", keep=0.3), pytest.raises(RuntimeError, match="merge="):
        add(model, words(3), copy.deepcopy(cache), mask)


def test_a_forward_that_fails_leaves_no_bias(host):
    model, make_inputs = host
    alone = make_inputs((0,))
    with vtc.compress(model, "divprune", keep=0.3, merge="restore"), torch.no_grad():
        expected = model(**alone).logits

        def fail(*given):
            raise KeyboardInterrupt

        hook = model.base_model.get_decoder().rotary_emb.register_forward_pre_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            model(**make_inputs((1,)))
        hook.remove()
        assert torch.equal(model(**alone).logits, expected)


def test_nearest_is_restore_without_biases_where_tokens_were_kept(host):
    model, make_inputs = host
    inputs, found = make_inputs(**MIXED), []
    for merge in ("nearest", Restore(sizes=False, distance=False, place="kept")):
        with vtc.compress(model, "divprune", keep=0.3, merge=merge, positions="keep"), torch.no_grad():
            found.append(model(**inputs).logits)
    assert torch.equal(*found)


def test_compiled_decoding_over_a_static_cache():
    from transformers import CompileConfig

    model, make_inputs = build("llava-clip")
    inputs = make_inputs(**MIXED)
    config = CompileConfig(backend="eager", fullgraph=True, mode=None)
    config._compile_all_devices = True  # transformers compiles on a GPU only, unless it is told to
    with vtc.compress(model, "divprune", keep=0.3, merge="restore"):
        expected = model.generate(**inputs, **GREEDY)
        torch._dynamo.utils.counters.clear()
        found = model.generate(**inputs, **GREEDY, cache_implementation="static", compile_config=config)
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch.compiler.reset()
    assert torch.equal(found, expected) and graphs >= 1


def test_a_picture_cut_in_two_by_chunks_is_refused(host):
    model, make_inputs = host
    with vtc.compress(model, "divprune", keep=0.3, merge="restore"):
        with pytest.raises(ValueError, match="prefill_chunk_size"):
            model.generate(**make_inputs((2, 1)), **GREEDY, prefill_chunk_size=7)
        with pytest.raises(ValueError, match="input_ids"):
            inputs = make_inputs((1,))
            x = model.get_input_embeddings()(inputs["input_ids"])
            vision = {name: inputs[name] for name in ("pixel_values", "image_sizes") if name in inputs}
            features = model.base_model.get_image_features(**vision, return_dict=True).pooler_output
            x[inputs["input_ids"] == IMAGE] = torch.cat(list(features))
            model(inputs_embeds=x, attention_mask=inputs["attention_mask"])


def test_nothing_dropped_changes_nothing_and_nothing_is_left(host):
    model, make_inputs = host
    inputs = make_inputs(**MIXED)
    with torch.no_grad():
        logits = model(**inputs).logits
        before = footprint(model)
        for merge in ("nearest", "restore"):
            for keep in (1.0, 10_000):
                with vtc.compress(model, "divprune", keep=keep, merge=merge):
                    assert torch.equal(model(**inputs).logits, logits)
            with vtc.compress(model, "divprune", keep=0.3, merge=merge):
                assert not torch.equal(model(**inputs).logits, logits)
            assert footprint(model) == before
            assert torch.equal(model(**inputs).logits, logits)


def test_prompts_that_lose_nothing_are_as_they_were(host):
    model, make_inputs = host
    inputs, alone = make_inputs((1, 0)), make_inputs((0,), first=1)
    with torch.no_grad():
        expected = model(**alone).logits[0]
        with vtc.compress(model, "divprune", keep=0.3, merge="restore"):
            logits = model(**inputs).logits[1, -len(expected) :]
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


def test_every_method_that_drops_can_carry_it(host):
    model, make_inputs = host
    inputs, encoder = make_inputs((2, 1), pads=1), open_host(host[0]).encoder
    names = [name for name in vtc.list_methods("features") if issubclass(type(vtc.get_method(name)), Select)]
    names = [n for n in names if not any(missing(encoder, need) for need in vtc.get_method(n).needs)]
    assert {"divprune", "hiprune", "vtc-cls", "random"} <= set(names)
    for name in names:
        with vtc.compress(model, name, keep=0.3, stage="features", merge="restore") as handle:
            with torch.no_grad():
                assert model(**inputs).logits.isfinite().all(), name
            for record in handle.last:
                for tile in record.tiles:  # nothing is lost, but of tiles without a budget
                    own = record.source[tile.slots] >= 0
                    assert own.all() or not own.any(), name
    with pytest.raises(ValueError, match="merges"):
        vtc.compress(model, "tome", keep=0.3, stage="features", merge="restore")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_gradients_are_finite_and_checkpointing_changes_none(host, attention):
    model, make_inputs = copy.deepcopy(host[0]), host[1]
    model.set_attn_implementation(attention)
    inputs = make_inputs(**MIXED)
    model.train()
    found = []
    with vtc.compress(model, "divprune", keep=0.3, merge="restore"):
        for checkpointing in (False, True):
            if checkpointing:
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.zero_grad()
            labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
            model(**inputs, labels=labels).loss.backward()
            found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert any("vision" in name for name in found[0])
    for name, grad in found[0].items():
        assert grad.isfinite().all()
        torch.testing.assert_close(found[1][name], grad)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_half_precision_holds_the_sizes(host, attention):
    """The groups that arrive are those that left, whatever the precision."""
    model, make_inputs = copy.deepcopy(host[0]), host[1]
    inputs = make_inputs(**MIXED)
    model.set_attn_implementation(attention)
    for dtype in (torch.float16, torch.bfloat16):
        model.to(dtype)
        inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
        with vtc.compress(model, "divprune", keep=0.3, merge="restore") as handle, torch.no_grad():
            out = model(**inputs, use_cache=True)
        assert out.logits.isfinite().all()
        wanted = [int((r.source == slot).sum()) for r in handle.last for slot in range(len(r.index))]
        size = out.past_key_values._vtc_state.groups.size
        assert sorted(size[size > 1].tolist()) == sorted(s for s in wanted if s > 1)
    inputs["pixel_values"] = inputs["pixel_values"].float()
    half = torch.autocast("cpu", dtype=torch.bfloat16)
    with vtc.compress(model.float(), "divprune", keep=0.3, merge="restore"), half, torch.no_grad():
        assert model(**inputs).logits.isfinite().all()


# -- other families: break tokens between rows, masks with blocks, tiles apart, positions of three components


FAMILIES = ["llava-pixtral", "paligemma-gemma", "smolvlm", "llava_onevision", "qwen2_5_vl", "qwen3_vl"]


@pytest.mark.parametrize("name", FAMILIES)
def test_other_families_are_biased_too(name):
    model, make_inputs = build(name)
    vision, inputs = open_host(model), make_inputs((2, 1), pads=2)
    rule = Restore(distance=not vision.mrope)
    if vision.mrope:
        with pytest.raises(ValueError, match="components"):
            vtc.compress(model, "divprune", keep=0.3, merge="restore")
    with Watch(model) as watch, vtc.compress(model, "divprune", keep=0.3, merge=rule) as handle:
        watch.listen()
        with torch.no_grad():
            model(**inputs)
        records = handle.last
    sizes = torch.ones(inputs["input_ids"].shape)
    image = (inputs["input_ids"] == IMAGE) | (inputs["input_ids"] == VIDEO)
    sizes[image] = torch.cat([(r.source[:, None] == r.source).sum(dim=1).float() for r in records])
    given, decoder = watch.given, vision.decoder
    x, dropped = given["inputs_embeds"], marked(given)
    for row in range(len(x)):
        stay = inputs["attention_mask"][row].bool() & ~dropped[row]
        positions = (
            given["position_ids"] if given.get("position_ids") is not None else torch.arange(x.shape[1])[None]
        )
        positions = positions[..., row : row + 1, :] if positions.shape[-2] > 1 else positions
        allowed, size = cut_mask(given.get("attention_mask"), row, stay, decoder.config), sizes[row, stay]
        if allowed.dim() == 2:
            allowed = torch.ones(1, 1, len(size), len(size)).tril().bool()
        allowed = allowed if allowed.dtype == torch.bool else allowed >= 0
        far, at = torch.zeros(len(size), len(size)), positions[..., stay].flatten()
        if rule.distance:
            angles = (at[:, None] - at)[..., None] * decoder.rotary_emb.inv_freq
            far = (2 - angles.cos().mean(dim=-1)).log()
        kept = image[row, stay]
        even = torch.where(kept, size[kept].mean(), 1.0)
        masks = [torch.where(allowed, far + part.log(), LOWEST) for part in (size, even)]

        def first(module, args, kwargs, mask=masks[1]):
            return args, {**kwargs, "attention_mask": mask}

        hook = decoder.layers[0].register_forward_pre_hook(first, with_kwargs=True)
        with torch.no_grad():
            expected = decoder(
                inputs_embeds=x[row : row + 1, stay],
                position_ids=positions[..., stay],
                attention_mask=masks[0],
                use_cache=False,
                **{n: given[n][row : row + 1, stay] for n in PER_TOKEN if given.get(n) is not None},
                **cut_deepstack(given, row, stay),
            )
        hook.remove()
        torch.testing.assert_close(
            watch.hidden[row, stay], expected.last_hidden_state[0], atol=1e-4, rtol=1e-4
        )


@pytest.mark.parametrize(
    "name, why",
    [
        ("gemma3", "sliding_attention"),
        ("qwen3_5", "linear_attention"),
        ("llama4", "features"),
        ("mllama", "cross-attention"),
        ("granite4_vision", "features"),
        ("molmo2", "features"),
    ],
)
def test_what_cannot_be_biased_is_refused(name, why):
    model, make_inputs = build(name)
    before = footprint(model)
    with pytest.raises(ValueError, match=why):
        vtc.compress(model, "divprune", keep=0.3, merge="restore")
    assert footprint(model) == before
    with vtc.compress(model, "divprune", keep=0.3, merge="nearest"), torch.no_grad():
        model(**make_inputs((1,)))


def test_flash_attention_is_refused(host, monkeypatch):
    model, make_inputs = host
    config = model.base_model.get_decoder().config
    with vtc.compress(model, "divprune", keep=0.3, merge="restore"):
        monkeypatch.setattr(config, "_attn_implementation_internal", "flash_attention_2")
        with pytest.raises(RuntimeError, match="attn_implementation='sdpa'"):
            model(**make_inputs((1,)))
    with pytest.raises(ValueError, match="attn_implementation='sdpa'"):
        vtc.compress(model, "divprune", keep=0.3, merge="restore")
