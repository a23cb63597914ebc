"""Metrics agree with plain formulas, tables with what is decoded, policies with their definitions, and
eval/tokenizer.py makes whole rows, none of them twice."""

import importlib.util
import itertools
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from scipy import stats
from torch import nn
from torchmetrics.functional.image.lpips import _LPIPS

from vtc.evaluation import adaptivity, image_metrics
from vtc.evaluation import reconstruction as measured
from vtc.evaluation.image_metrics import FID, inception, lpips, ms_ssim, psnr, scales, ssim
from vtc.evaluation.ranks import bootstrap, rank_correlation, ranks
from vtc.evaluation.reconstruction import Pictures, Reconstruction, reconstruct
from vtc.evaluation.reconstruction_plot import plot_curves, reconstructions
from vtc.evaluation.reconstruction_tables import block, monotone, newest
from vtc.evaluation.results import read_rows
from vtc.tokenizers import TokenSequence
from vtc.tokenizers.errors import wrong
from vtc.tokenizers.systems.ordered import Ordered

ROOT = Path(__file__).parents[1]
C1, C2 = 0.01**2, 0.03**2
SMALL = {
    "image_size": 32,
    "patch": 8,
    "tokens": 6,
    "width": 16,
    "heads": 2,
    "encoder_depth": 1,
    "decoder_depth": 1,
}


def tokenizer(**options):
    torch.manual_seed(0)
    made = Ordered(Ordered.Config(**(SMALL | options)))
    with torch.no_grad():
        for parameter in made.parameters():  # so that pictures depend on how many tokens there are
            parameter.add_(0.3 * torch.randn_like(parameter))
    return made.eval()


def pictures(n=5, size=32, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 3, size, size), generator=draw) / 255


# -- metrics


def test_psnr_is_ten_log_of_peak_over_error():
    images, others = pictures(3, seed=1), pictures(3, seed=2)
    plain = [10 * math.log10(1 / float(((a - b) ** 2).mean())) for a, b in zip(images, others)]
    torch.testing.assert_close(psnr(others, images), torch.tensor(plain))
    assert psnr(images, images).tolist() == [100.0] * 3
    assert float(psnr(images[:1] * 0, images[:1] * 0 + 0.1)) == pytest.approx(20.0, abs=1e-4)


def plain_ssim(one, other):
    """By loops over places, with the window's weights written out."""
    offsets = np.arange(11) - 5
    line = np.exp(-(offsets**2) / (2 * 1.5**2))
    window = np.outer(line, line) / np.outer(line, line).sum()
    found = []
    for a, b in zip(one.double().numpy(), other.double().numpy()):
        a, b = (np.pad(channel, 5, mode="reflect") for channel in (a, b))
        for y, x in itertools.product(*(range(side - 10) for side in a.shape)):
            u, v = a[y : y + 11, x : x + 11], b[y : y + 11, x : x + 11]
            mu, nu = (window * u).sum(), (window * v).sum()
            var_u, var_v = (window * u * u).sum() - mu**2, (window * v * v).sum() - nu**2
            both = (window * u * v).sum() - mu * nu
            found.append((2 * mu * nu + C1) * (2 * both + C2) / ((mu**2 + nu**2 + C1) * (var_u + var_v + C2)))
    return np.mean(found)


def test_ssim_is_the_formula():
    images = pictures(2, size=14)
    others = (images + 0.2 * pictures(2, size=14, seed=3)).clamp(0, 1)
    plain = [plain_ssim(a, b) for a, b in zip(images, others)]
    np.testing.assert_allclose(ssim(others, images), plain, atol=1e-4)


def test_ssim_of_itself_is_one_and_of_grey_levels_their_luminance():
    images, others = pictures(2, 96), pictures(2, 96, seed=4)
    for metric in (ssim, ms_ssim):
        torch.testing.assert_close(metric(images, images), torch.ones(2))
        torch.testing.assert_close(metric(images, others), metric(others, images))
        assert float(metric(images, others).max()) < 0.5
    a, b = 0.25, 0.75
    flat = torch.ones(1, 3, 96, 96).double()
    luminance = (2 * a * b + C1) / (a * a + b * b + C1)
    assert float(ssim(a * flat, b * flat)) == pytest.approx(luminance, abs=1e-6)
    betas = (0.0448, 0.2856, 0.3001)  # of three scales the last has the luminance
    assert float(ms_ssim(a * flat, b * flat)) == pytest.approx(luminance ** (betas[2] / sum(betas)), abs=1e-6)


def test_ms_ssim_takes_the_scales_there_are_pixels_for():
    found = {
        size: scales(torch.zeros(1, 3, size, size))
        for size in (11, 21, 22, 43, 44, 96, 98, 99, 175, 176, 512)
    }
    assert found == {11: 1, 21: 1, 22: 2, 43: 2, 44: 3, 96: 3, 98: 3, 99: 4, 175: 4, 176: 5, 512: 5}
    for size in (11, 22, 44, 99, 176):
        assert torch.isfinite(ms_ssim(pictures(1, size), pictures(1, size, 1))).all()
    with pytest.raises(ValueError, match="11 pixels"):
        ssim(pictures(1, 10), pictures(1, 10))


def test_without_torchmetrics_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics.functional.image", None)
    with pytest.raises(ImportError, match=r"pip install 'vision-token-compression\[eval\]'"):
        psnr(pictures(1), pictures(1))


# -- metrics with other people's weights


@pytest.fixture(scope="module")
def squeezenet(tmp_path_factory):
    torch.manual_seed(1)
    network = torchvision.models.squeezenet1_1(weights=None)
    path = tmp_path_factory.mktemp("weights") / "mine.pth"
    torch.save(network.state_dict(), path)
    return path, network


@pytest.fixture
def offline(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("nothing may be downloaded")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)


def test_lpips_looks_through_the_given_weights(squeezenet, offline):
    path, network = squeezenet
    before = torch.hub.get_dir()
    measure = lpips(path, "squeeze")
    assert torch.hub.get_dir() == before
    images, others = pictures(3, 64), pictures(3, 64, seed=5)
    found = measure(others, images)
    plain = _LPIPS(net="squeeze", pnet_rand=True)  # its heads come with torchmetrics
    own = dict(zip([name for name, _ in plain.net.named_parameters()], network.features.parameters()))
    plain.net.load_state_dict(own)
    torch.testing.assert_close(found, plain(others, images, normalize=True).flatten())
    assert float(found.min()) > 0 and measure(images, images).abs().max() == 0
    torch.testing.assert_close(measure(others[:1], images[:1]), found[:1])


def test_lpips_without_its_weights_is_refused(squeezenet, offline, tmp_path):
    with pytest.raises(OSError, match=r"no file .*torchvision's alexnet, from https://"):
        lpips(tmp_path / "none.pth")
    with pytest.raises(ValueError, match="does not hold the weights of torchvision's alexnet"):
        lpips(squeezenet[0], "alex")
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(ValueError, match="does not hold"):
        lpips(tmp_path / "text.pth")
    with pytest.raises(ValueError, match="alex, vgg, squeeze"):
        lpips(squeezenet[0], "resnet")


class Means(nn.Module):
    """Features that are the mean and the largest value of each colour."""

    num_features = 6

    def forward(self, images):
        assert images.dtype == torch.uint8
        values = images.double().flatten(2)
        return torch.cat([values.mean(2), values.amax(2)], 1)


def plain_fid(images, others):
    features = [Means()((part * 255).round().byte()).numpy() for part in (images, others)]
    (mean, cov), (other_mean, other_cov) = [(f.mean(0), np.cov(f, rowvar=False)) for f in features]
    values, vectors = np.linalg.eigh(cov)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    shared = np.sqrt(np.linalg.eigvalsh(root @ other_cov @ root).clip(0)).sum()
    return ((mean - other_mean) ** 2).sum() + np.trace(cov + other_cov) - 2 * shared


def test_fid_is_the_frechet_distance_of_features():
    images, others, third = pictures(20, 12), pictures(20, 12, seed=6) ** 2, pictures(20, 12, seed=7)
    fid = FID(images, Means(), batch=7)
    for decoded in (others, third):  # one after the other, each in parts
        for part in decoded.split(9):
            fid.add(part)
        assert fid.distance() == pytest.approx(plain_fid(images, decoded), rel=1e-4)
    fid.add(images)
    assert fid.distance() == pytest.approx(0, abs=1e-4)
    with pytest.raises(ValueError, match="2 images"):
        FID(images[:1], Means())


def test_fid_without_torch_fidelity_or_its_weights_is_refused(monkeypatch, tmp_path, offline):
    monkeypatch.setattr(image_metrics.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install torch-fidelity"):
        inception(tmp_path / "none.pth")


# -- ranks


def test_rank_correlation_is_spearmans():
    draw = np.random.default_rng(0)
    for _ in range(5):
        one = draw.integers(1, 5, 60)
        other = one + draw.integers(-3, 4, 60)
        assert rank_correlation(one, other) == pytest.approx(stats.spearmanr(one, other).statistic)
        np.testing.assert_array_equal(ranks(other), stats.rankdata(other))
    assert rank_correlation(np.arange(4), np.array([1, 8, 27, 64])) == 1
    assert rank_correlation(np.arange(4), -np.arange(4)) == -1
    assert rank_correlation(np.arange(4), np.ones(4)) == 0


def test_bootstrap_interval_is_that_of_the_mean():
    values = np.random.default_rng(1).normal(3, 2, 400)
    low, high = bootstrap(np.mean, values)
    half = 1.96 * values.std() / math.sqrt(len(values))
    assert low == pytest.approx(values.mean() - half, abs=0.25 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.25 * half)
    assert bootstrap(np.mean, values) == [low, high]
    pairs = bootstrap(lambda a, b: float((a - b).mean()), values, values - 1)
    assert pairs == pytest.approx([1, 1])


# -- reconstructions


def test_table_is_what_is_decoded_one_by_one():
    made, images = tokenizer(), pictures()
    found = reconstruct(made, images, [1, 2, 3, 6], batch=2)
    assert found.ladder == [1, 2, 6]
    for row, column in itertools.product(range(5), range(4)):
        k = (1, 2, 3, 6)[column]
        with torch.inference_mode():
            decoded = made(images[row : row + 1], k)
        decoded = (decoded * 255).round() / 255
        error = float(((decoded - images[row]) ** 2).mean())
        assert found.mse[row, column] == pytest.approx(error, rel=1e-4)
        assert found.psnr[row, column] == pytest.approx(float(psnr(decoded, images[row : row + 1])), abs=1e-3)
        if k in found.ladder:
            similar = float(ssim(decoded, images[row : row + 1]))
            assert found.metrics["ssim"][row, found.ladder.index(k)] == pytest.approx(similar, abs=1e-4)
    assert len(set(found.mse[0].tolist())) == 4


def test_what_is_no_prefix_is_encoded_anew():
    class Whole(Ordered):
        name, prefix_stable = "whole", False

        def encode_images(self, images, k):
            asked.append(k)
            return super().encode_images(images, k)

    asked = []
    reconstruct(Whole(Ordered.Config(**SMALL)).eval(), pictures(), [1, 3], metrics={})
    assert asked == [1, 3]


def test_fid_is_asked_at_the_steps_of_the_ladder():
    made, images = tokenizer(), pictures(12)
    found = reconstruct(made, images, [1, 3, 6], metrics={}, fid=FID(images, Means()), batch=5)
    with torch.inference_mode():
        plain = [plain_fid(images, made(images, k)) for k in (1, 6)]
    np.testing.assert_allclose(found.fid, plain, rtol=1e-3)


def test_many_lengths_are_thinned_out():
    made = tokenizer()
    assert measured.measured_lengths(made) == [1, 2, 3, 4, 5, 6]
    some = measured.measured_lengths(tokenizer(tokens=200))
    assert some[0] == 1 and some[-1] == 200 and 30 < len(some) <= 64
    assert measured.ladder([32, 64, 96]) == [32, 64, 96]
    assert measured.ladder(range(1, 7)) == [1, 2, 4, 6]


def table(mse, lengths=(1, 2, 3, 4)):
    mse = np.array(mse, dtype=float)
    return Reconstruction(np.array(lengths), list(lengths), mse, mse.round(1), {})  # wrong shares: any


HARD = table([[0.8, 0.4, 0.2, 0.1], [0.04, 0.03, 0.03, 0.03], [0.4, 0.3, 0.1, 0.01]])


def test_fixed_lengths_between_two_are_either_by_chance():
    mse, psnr_, wrong = adaptivity.fixed(HARD, 2.25)
    np.testing.assert_allclose(wrong, 0.75 * HARD.wrong[:, 1] + 0.25 * HARD.wrong[:, 2])
    np.testing.assert_allclose(mse, 0.75 * HARD.mse[:, 1] + 0.25 * HARD.mse[:, 2])
    np.testing.assert_allclose(psnr_, 0.75 * HARD.psnr[:, 1] + 0.25 * HARD.psnr[:, 2])
    np.testing.assert_allclose(adaptivity.fixed(HARD, 4.0)[0], HARD.mse[:, 3])
    gaps = table(HARD.mse, (8, 16, 24, 32))
    np.testing.assert_allclose(adaptivity.fixed(gaps, 12.0)[0], HARD.mse[:, :2].mean(1))


def test_shuffled_is_the_mean_of_all_ways_to_deal():
    chosen = np.array([1, 2, 4])
    told = adaptivity.outcome(HARD, chosen, shuffled=True)
    ways = [adaptivity.outcome(HARD, np.array(way)) for way in itertools.permutations(chosen)]
    assert told["psnr"] == pytest.approx(np.mean([way["psnr"] for way in ways]))
    errors = np.mean([10 ** (-way["of_mean"] / 10) for way in ways])
    assert 10 ** (-told["of_mean"] / 10) == pytest.approx(errors)
    assert told["mean"] == pytest.approx(7 / 3) and told["std"] == pytest.approx(np.std(chosen))


def test_gains_are_over_the_same_mean():
    told = adaptivity.outcome(HARD, np.array([4, 1, 4]))  # the easy picture gives its tokens to the others
    beside = adaptivity.fixed(HARD, 3.0)
    expected = -10 * math.log10((0.1 + 0.04 + 0.01) / 3) + 10 * math.log10(HARD.mse[:, 2].mean())
    np.testing.assert_allclose(beside[0], HARD.mse[:, 2])
    assert told["gain"] == pytest.approx(expected) and told["gain"] > 2
    low, high = told["gain_interval"]
    assert low <= told["gain"] <= high
    none = adaptivity.outcome(HARD, np.array([2, 2, 2]))
    assert none["gain"] == none["psnr_gain"] == none["wrong_gain"] == 0 and none["gain_interval"] == [0, 0]
    wrong = (0.1 + 0.0 + 0.0) / 3 - HARD.wrong[:, 2].mean()
    assert told["wrong_gain"] == pytest.approx(wrong) and told["wrong"] == pytest.approx(0.1 / 3)


def test_lengths_that_were_not_measured_are_rounded_up():
    gaps = table(HARD.mse, (8, 16, 24, 32))
    told = adaptivity.outcome(gaps, np.array([5, 17, 32]))
    assert told["mean"] == pytest.approx((8 + 24 + 32) / 3)


def test_search_reaches_one_error_within_the_mean():
    lengths = adaptivity.at_quality(HARD.lengths, HARD.mse, 3.0)
    assert lengths.mean() <= 3 and lengths[1] == 1
    errors = HARD.mse[np.arange(3), HARD.at(lengths)]
    assert errors[0] < HARD.mse[0, 0]


class Knowing(Ordered):
    """Halts after as many tokens as a picture's first pixel says, more for a smaller epsilon."""

    def halt(self, images, epsilon=None):
        tokens = self.encode_images(images, self.max_tokens)
        lengths = (images[:, 0, 0, 0] * 4 + (epsilon or 1)).round().long().clamp(1, self.max_tokens)
        return TokenSequence(tokens.values, lengths, tokens.ids)


def knowing():
    return Knowing(Ordered.Config(**SMALL)).eval()


def test_objects_are_counted_by_the_tokens_given():
    images, objects = pictures(12), np.array([1, 2, 3, 4] * 3)
    images[:, 0, 0, 0] = torch.from_numpy(objects) / 4
    row = adaptivity.objects_row(knowing(), Pictures("scenes", images, objects), [1.0])
    halting, *others = row["points"]
    assert halting["by"]["1"] == {"n": 3, "mean": 2.0, "std": 0.0} and halting["by"]["4"]["mean"] == 5.0
    assert halting["correlation"] == pytest.approx(1) and halting["interval"] == pytest.approx([1, 1])
    assert halting["mean"] == 3.5
    assert [point["policy"] for point in others] == ["complexity, gradient", "complexity, jpeg"]
    assert all(abs(point["correlation"]) < 0.9 for point in others)


def test_policies_are_compared_at_the_mean_of_the_halting_head():
    images = pictures(12)
    images[:, 0, 0, 0] = torch.arange(12) / 12
    made = knowing()
    found = reconstruct(made, images, list(range(1, 7)), metrics={})
    row = adaptivity.policies_row(made, Pictures("some", images), found, [1.0, 2.0, 3.0])
    for step, point in enumerate(row["points"]):
        lengths = (images[:, 0, 0, 0] * 4 + step + 1).round().clamp(1, 6).numpy()
        assert point["mean"] == point["policies"]["halting"]["mean"] == pytest.approx(lengths.mean())
        assert point["policies"]["halting, shuffled"]["mean"] == pytest.approx(lengths.mean())
        assert point["policies"]["fixed"]["mean"] == pytest.approx(lengths.mean())
        for name in ("complexity, gradient", "complexity, jpeg", "quality", "oracle"):
            assert point["policies"][name]["mean"] <= lengths.mean() + 1e-9
        best = point["policies"]["oracle"]["of_mean"]
        assert all(best >= other["of_mean"] - 1e-2 for other in point["policies"].values())
    plain = adaptivity.policies_row(tokenizer(), Pictures("some", images), found, [])
    assert [point["mean"] for point in plain["points"]] == [1.0, 1.5, 3.0]
    assert "halting" not in plain["points"][0]["policies"]


def test_rises_of_the_error_are_told():
    assert monotone({"mse": [0.4, 0.2, 0.1]}) == "it falls at all of 2 steps"
    assert monotone({"mse": [0.4]}) == "there is one number only"
    assert monotone({"mse": [0.4, 0.2, 0.21]}) == "it falls at 1 of 2 steps and rises by up to 5 %"


# -- the script


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / f"eval/{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


script, drawing = load("tokenizer"), load("tokenizer_pictures")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tokenizer, its rows, and the arguments that made them."""
    base = tmp_path_factory.mktemp("tokenizer")
    tokenizer().save_pretrained(base / "mine")
    arguments = ["--tokenizer", str(base / "mine"), "--out", str(base / "rows.jsonl")]
    script.main([*arguments, "--scenes", "3", "--textures", "2", "--seen", "12"])
    return base, arguments


def test_rows_are_whole_and_made_once(folder, capsys):
    base, arguments = folder
    rows, broken = read_rows(base / "rows.jsonl")
    kinds = [(row["kind"], row["data"]) for row in rows]
    per_set = ["lengths", "codec", "codec"]
    assert not broken and kinds == [
        *((kind, "scenes") for kind in per_set),
        *((kind, "textures") for kind in per_set),
        ("policies", "scenes and textures"),
        ("objects", "scenes"),
    ]
    for row in rows:
        assert row["command"].startswith("python eval/tokenizer.py --tokenizer")
        assert row["versions"]["torchmetrics"] and row["versions"]["libwebp"] and len(row["weights"]) == 12
        assert "NaN" not in json.dumps(row)
    before = (base / "rows.jsonl").read_bytes()
    script.main([*arguments, "--scenes", "3", "--textures", "2", "--seen", "12"])
    assert "0 of 8 rows to make" in capsys.readouterr().out
    assert (base / "rows.jsonl").read_bytes() == before


def test_codecs_are_in_the_budget_of_the_tokens(folder):
    rows, _ = read_rows(folder[0] / "rows.jsonl")
    lengths, jpeg = rows[0], rows[1]
    assert lengths["bits_per_token"] == pytest.approx(math.log2(64000))
    assert jpeg["budgets"][:4] == pytest.approx([k * math.log2(64000) / 8 for k in (1, 2, 4, 6)])
    for row in (row for row in rows if row["kind"] == "codec"):
        for count in ("file", "payload"):
            reached = [cell["psnr"] for cell in row[count]["cells"] if cell["fits"] == row["n"]]
            assert reached == sorted(reached)
            assert all(cell["psnr"] is None for cell in row[count]["cells"] if not cell["fits"])
    assert jpeg["file"]["cells"][3]["fits"] == 0 and jpeg["file"]["least"] > 200


def test_table_and_readme_come_from_the_rows(folder, capsys, tmp_path):
    base, arguments = folder
    script.main([*arguments, "--table"])
    shown = capsys.readouterr().out.rstrip("\n")
    rows, _ = read_rows(base / "rows.jsonl")
    assert shown == block(rows)
    assert "none (≥ " in shown and "| 6 | 12 |" in shown and "rank correlation" in shown
    readme = tmp_path / "README.md"
    readme.write_text("a\n<!-- tokenizer:begin -->\nold\n<!-- tokenizer:end -->\nb\n")
    script.main([*arguments, "--readme", str(readme)])
    assert readme.read_text() == f"a\n<!-- tokenizer:begin -->\n{shown}\n<!-- tokenizer:end -->\nb\n"


def test_rows_of_older_weights_do_not_count(folder):
    rows, _ = read_rows(folder[0] / "rows.jsonl")
    older = [row | {"weights": "0" * 12, "date": "2020-01-01T00:00:00+00:00"} for row in rows]
    assert block([*older, *rows]) == block(rows)
    assert len(newest([*older, *rows])) == len(rows)


def test_sets_that_were_measured_otherwise_have_tables_of_their_own(folder):
    rows, _ = read_rows(folder[0] / "rows.jsonl")
    lengths = [row for row in rows if row["kind"] == "lengths"]
    assert block(lengths).count("| tokens |") == 1
    assert block([lengths[0], lengths[1] | {"ladder": [1, 6]}]).count("| tokens |") == 2


def test_own_pictures_are_measured_and_damaged_ones_told(folder, tmp_path, capsys):
    photos = tmp_path / "photos"
    (photos / "deeper").mkdir(parents=True)
    draw = np.random.default_rng(0)
    for name, shape in {"a.png": (40, 60), "deeper/b.jpg": (33, 33)}.items():
        Image.fromarray(draw.integers(0, 256, (*shape, 3), dtype=np.uint8)).save(photos / name)
    (photos / "broken.png").write_bytes(b"no picture")
    out = tmp_path / "own.jsonl"
    script.main([*folder[1][:2], "--images", str(photos), "--out", str(out)])
    told = capsys.readouterr()
    assert "broken.png" in told.err
    rows, _ = read_rows(out)
    assert {row["data"] for row in rows} == {"photos"} and {row["n"] for row in rows} == {2}
    assert [row["kind"] for row in rows] == ["lengths", "codec", "codec", "policies"]
    assert "rank correlation" not in told.out and "photos: PSNR" in told.out
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no picture"):
        script.main([*folder[1][:2], "--images", str(tmp_path / "empty"), "--out", str(out)])


def test_lpips_is_a_column_where_there_are_weights(folder, squeezenet, offline, tmp_path, capsys):
    # LPIPS needs more pixels than these have with other backbones
    options = ["--lpips", str(squeezenet[0]), "--lpips-net", "squeeze", "--scenes", "2", "--textures", "0"]
    out = tmp_path / "rows.jsonl"
    script.main([*folder[1][:2], "--out", str(out), "--seen", "4", "--lengths", "1", "6", *options])
    assert "LPIPS" in capsys.readouterr().out
    assert len(read_rows(out)[0][0]["lpips"]["mean"]) == 2


# -- pictures


def test_pictures_are_drawn(folder, tmp_path):
    arguments = folder[1]
    drawing.main([*arguments[:2], "--rows", arguments[3], "--out", str(tmp_path)])
    grid = Image.open(tmp_path / "tokenizer-grid.png")
    columns = 2 + len(measured.ladder(range(1, 7)))  # the picture, the ladder, halting
    assert grid.width == columns * (192 + 14) + 14
    curve = Image.open(tmp_path / "tokenizer-curve.png")
    assert curve.width == 1560 and np.asarray(curve).std() > 10


def test_grid_shows_each_picture_and_what_its_tokens_leave():
    made, images = tokenizer(image_size=96), pictures(2, 96)
    sheet = reconstructions(made, images, ["a", "b"])
    pixels = torch.from_numpy(np.array(sheet)).permute(2, 0, 1) / 255
    top, left, side = 2 * 34 + 14, 14, 192
    shown = pixels[:, top : top + side : 2, left : left + side : 2]
    torch.testing.assert_close(shown, images[0])
    left += 2 * (side + 14)
    with torch.inference_mode():
        decoded = made(images[:1], 2)[0]
    shown = pixels[:, top : top + side : 2, left : left + side : 2]
    torch.testing.assert_close(shown, decoded, atol=0.51 / 255, rtol=0)


def test_a_curve_needs_no_codecs(folder, tmp_path):
    rows, _ = read_rows(folder[0] / "rows.jsonl")
    plot_curves([row for row in rows if row["kind"] == "lengths"], tmp_path / "curve.png")
    assert Image.open(tmp_path / "curve.png").size[0] > 1000


def test_wrong_pixels_are_those_of_which_one_channel_is_off():
    images = torch.full((2, 3, 4, 4), 0.5)
    others = images.clone()
    others[0, 0, 0, :3] += 0.16  # three of sixteen
    others[0, 1:, 0, 0] -= 0.3  # one of them again
    others[1] += 0.14  # everywhere, but little
    assert wrong(images, others).tolist() == pytest.approx([3 / 16, 0])
    assert wrong(images, others, 0.1).tolist() == pytest.approx([3 / 16, 1])
