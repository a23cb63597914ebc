"""Bad input: one sentence that says what is wrong and what to do, and the model left as it was."""

import math

import pytest
import torch
from footprint import footprint
from tiny import LLAMA, SUPPRESS, build

import vtc


@pytest.fixture(scope="module")
def clip():
    return build("llava-clip")


@pytest.fixture(scope="module")
def siglip():
    return build("llava-siglip")


def refused(error, match, model, *args, **kwargs):
    before = footprint(model)
    with pytest.raises(error, match=match) as raised:
        vtc.compress(model, *args, **kwargs)
    assert "\n" not in str(raised.value)
    assert footprint(model) == before


@pytest.mark.parametrize("keep", [0, -1, 0.0, -0.2, 1.5, math.nan, math.inf])
def test_budget_out_of_range(clip, keep):
    refused(ValueError, "keep=", clip[0], "tome", keep=keep)


@pytest.mark.parametrize("keep", [True, "0.5", [0.5], 1j])
def test_budget_of_the_wrong_type(clip, keep):
    refused(TypeError, "keep must be a fraction", clip[0], "tome", keep=keep)


def test_no_budget(clip):
    refused(ValueError, r"'tome' a budget: keep=0\.25", clip[0], "tome")


def test_a_new_budget_is_checked_and_the_old_one_stays(clip):
    with vtc.compress(clip[0], "tome", keep=0.5) as handle:
        with pytest.raises(ValueError, match="leave no token"):
            handle.keep = 0
        with pytest.raises(ValueError, match="no stage"):
            handle.keep = {"decoder": 0.5}
        assert handle.keep == 0.5


@pytest.mark.parametrize(
    ("name", "near"), [("vtc_cls", "vtc-cls"), ("hi-prune", "hiprune"), ("tomee", "tome")]
)
def test_unknown_method_suggests_the_nearest(clip, name, near):
    refused(ValueError, f"no method '{name}'; did you mean .*'{near}'", clip[0], name, keep=0.5)


def test_unknown_method_like_no_other_lists_all(clip):
    refused(ValueError, "known: .*uniform", clip[0], "zzzzzzzz", keep=0.5)


def test_unknown_option(clip):
    refused(
        ValueError, "'hiprune' has no option 'beta'; its options: alpha", clip[0], "hiprune", keep=0.5, beta=1
    )


def test_option_out_of_range(clip):
    refused(ValueError, "alpha=3 must be", clip[0], "hiprune", keep=0.5, alpha=3)
    refused(ValueError, "neighbours must be", clip[0], "hiprune", keep=0.5, neighbours="wrap")


def test_a_layer_that_does_not_exist(clip):
    refused(ValueError, "encoder of 4 blocks", clip[0], "vtc-cls", keep=0.5, layers=(9,))


def test_unknown_stage(clip):
    refused(
        ValueError,
        "does not run at stage 'decoder' of this model: it runs at features",
        clip[0],
        "tome",
        keep=0.5,
        stage="decoder",
    )


def test_two_methods_for_one_stage(clip):
    plan = [("tome", {"keep": 0.5}), ("hiprune", {"keep": 0.5})]
    refused(ValueError, "one method for each stage", clip[0], plan)
    refused(ValueError, "one method for each stage", clip[0], [])
    refused(ValueError, "give keep, stage and options in the list", clip[0], plan, keep=0.5)


def test_options_beside_a_method_object(clip):
    refused(
        ValueError,
        r"belong in the method: HiPrune\(",
        clip[0],
        vtc.get_method("hiprune"),
        keep=0.5,
        alpha=0.2,
    )


def test_a_need_the_host_cannot_serve(siglip):
    refused(
        ValueError,
        "'vtc-cls' needs a CLS token, which SiglipVisionModel has not; .*hiprune",
        siglip[0],
        "vtc-cls",
        keep=0.5,
    )


def test_a_model_that_is_no_host():
    from transformers import LlamaConfig, LlamaForCausalLM

    refused(
        ValueError,
        "LlamaForCausalLM .* is no known host: `vtc hosts` lists",
        LlamaForCausalLM(LlamaConfig(**LLAMA)),
        "tome",
        keep=0.5,
    )
    refused(ValueError, "Linear .* is no known host", torch.nn.Linear(2, 2), "tome", keep=0.5)
    with pytest.raises(TypeError, match="takes a loaded model, not str"):
        vtc.compress("models/tiny-llava", "tome", keep=0.5)


def test_compressing_twice(clip):
    model, make_inputs = clip
    inputs = make_inputs((1,))
    with vtc.compress(model, "tome", keep=0.5) as first, torch.no_grad():
        refused(
            RuntimeError,
            r"compressed already .*vtc.restore\(model\) first, or pass replace=True",
            model,
            "uniform",
            keep=0.5,
        )
        logits = model(**inputs).logits
        refused(ValueError, "no method", model, "tomme", keep=0.5, replace=True)
        refused(ValueError, "encoder of 4 blocks", model, "vtc-cls", keep=0.5, layers=(9,), replace=True)
        assert torch.equal(model(**inputs).logits, logits)  # the first is still on
        second = vtc.compress(model, "uniform", keep=0.25, replace=True)
        first.remove()  # an old handle takes nothing of the new one off
        model(**inputs)
        assert len(second.last[0].index) == 4
        second.remove()


def test_restoring_what_is_not_compressed(clip):
    with pytest.raises(RuntimeError, match="is not compressed"):
        vtc.restore(clip[0])


def test_features_that_overflowed(clip):
    model, make_inputs = clip
    inputs = make_inputs((1,))
    inputs["pixel_values"][0, 0, 0, 0] = float("nan")
    with (
        vtc.compress(model, "uniform", keep=0.5),
        pytest.raises(RuntimeError, match="NaN before any token was dropped"),
    ):
        model(**inputs)


def test_an_input_per_token_that_vtc_does_not_know(clip):
    model, make_inputs = clip
    inputs = make_inputs((1,))
    with vtc.compress(model, "uniform", keep=0.5), pytest.raises(ValueError, match="'extra' of shape"):
        model.model(**inputs, extra=torch.zeros_like(inputs["input_ids"]))


def test_a_wrong_number_of_image_tokens_is_transformers_own_error(clip):
    model, make_inputs = clip
    inputs = make_inputs((1,))
    inputs["input_ids"][0, -1] = 99
    with vtc.compress(model, "uniform", keep=0.5), pytest.raises(ValueError, match="do not match"):
        model.generate(**inputs, max_new_tokens=2, suppress_tokens=SUPPRESS)


def test_downsampling_tiles_to_a_number():
    model, _ = build("llava_next-clip")
    refused(ValueError, "takes keep as a fraction", model, "downsample", keep=8)
    with (
        vtc.compress(model, "downsample", keep=0.5) as handle,
        pytest.raises(ValueError, match="as a fraction"),
    ):
        handle.keep = 8


@pytest.mark.parametrize("index", [[0, 0, 1], [3, 1, 2], [0, 1]], ids=str)
def test_a_method_that_returns_the_wrong_tokens(clip, index):
    from vtc.tokens import Reduction

    class Broken(vtc.Method):
        name = "broken"

        def reduce(self, tokens, k):
            rows = torch.tensor(index).expand(len(tokens.x), -1)
            return Reduction(rows, torch.zeros(len(tokens.x), tokens.n, dtype=torch.long))

    model, make_inputs = clip
    with (
        vtc.compress(model, Broken(), keep=3),
        pytest.raises(RuntimeError, match=r"'broken' returned .* mend its reduce"),
    ):
        model(**make_inputs((1,)))


def test_a_name_in_use_is_not_taken_over():
    with pytest.raises(ValueError, match="'tome' exists already"):

        @vtc.register
        class Other(vtc.Select):
            name = "tome"


def test_a_callers_own_four_dimensional_mask(clip):
    model, make_inputs = clip
    inputs = make_inputs((1,))
    length = inputs["input_ids"].shape[1]
    inputs["attention_mask"] = torch.ones(1, 1, length, length, dtype=torch.bool)
    with (
        vtc.compress(model, "uniform", keep=15),
        pytest.raises(ValueError, match="give one of two dimensions"),
    ):
        model(**inputs)


def test_packed_prompts(clip):
    model, make_inputs = clip
    inputs = make_inputs((1,))
    ids, pixels = inputs["input_ids"].repeat(1, 2), inputs["pixel_values"].repeat(2, 1, 1, 1)
    positions = torch.arange(inputs["input_ids"].shape[1]).repeat(2)[None]
    with vtc.compress(model, "uniform", keep=8), pytest.raises(ValueError, match="packed into one row"):
        model(input_ids=ids, pixel_values=pixels, position_ids=positions, use_cache=False)


@pytest.mark.parametrize("used", [False, True], ids=["new", "used"])
def test_features_that_never_passed_the_stage(clip, used):
    """Nothing compressed is an error, never a silent no-op; whatever was compressed before."""
    model, make_inputs = clip
    inputs = make_inputs((1,))
    with torch.no_grad():
        ready = model.model.get_image_features(inputs["pixel_values"], return_dict=True)
        with vtc.compress(model, "tome", keep=0.5):
            if used:
                model(**inputs)
            with pytest.raises(RuntimeError, match="nothing was compressed"):
                model(input_ids=inputs["input_ids"], mm_encoder_outputs={"image": ready})


def test_calling_forward_past_the_hooks(clip):
    model, make_inputs = clip
    with (
        vtc.compress(model, "tome", keep=0.5),
        pytest.raises(RuntimeError, match=r"call the model, not its forward"),
    ):
        model.model.forward(**make_inputs((1,)))


def test_an_overflow_is_not_taken_for_a_dropped_token(clip):
    model, make_inputs = clip
    inputs = make_inputs((1,))
    inputs["pixel_values"][0, 0, 0, 0] = float("nan")
    with vtc.compress(model, "uniform", keep=1.0) as handle, torch.no_grad():
        assert model(**inputs).logits.isnan().any()
        assert handle.last[0].entering["decoder"] == 16


def test_a_removed_handle(clip):
    handle = vtc.compress(clip[0], "tome", keep=0.5)
    handle.remove()
    assert handle.describe().startswith("removed")
    with pytest.raises(RuntimeError, match="was removed"):
        handle.keep = 8


def test_the_base_model_is_the_same_model(clip):
    model = clip[0]
    with vtc.compress(model.model, "tome", keep=0.5):
        refused(RuntimeError, "compressed already", model, "tome", keep=0.5)
        vtc.restore(model)
    assert "_vtc_handle" not in vars(model.model)


@pytest.mark.parametrize(
    ("method", "options", "match"),
    [
        (["tome"], {}, "a list of methods holds pairs"),
        ("vtc-cls", {"keep": 4, "layers": -2}, "layers is a list of blocks"),
        ("vtc-cls", {"keep": 4, "start": "2"}, "option start of method 'vtc-cls' is a number"),
        ("random", {"keep": 4, "seed": 1.5}, "seed is a whole number"),
    ],
    ids=str,
)
def test_options_of_the_wrong_kind(clip, method, options, match):
    refused(ValueError, match, clip[0], method, **options)


def test_a_score_of_the_wrong_shape(clip):
    class Wrong(vtc.Select):
        name = "wrong"

        def score(self, tokens):
            return tokens.x

    with (
        vtc.compress(clip[0], Wrong(), keep=3),
        pytest.raises(ValueError, match=r"score\(\) of 'wrong' must give"),
    ):
        clip[0](**clip[1]((1,)))


def test_a_method_without_a_name():
    with pytest.raises(ValueError, match="Nameless needs a name"):

        @vtc.register
        class Nameless(vtc.Select):
            pass


def test_a_plan_that_is_none(tmp_path):
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(ValueError, match="is no plan"):
        vtc.load(tmp_path / "plan.json")
