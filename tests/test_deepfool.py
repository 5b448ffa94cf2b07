import pytest
import torch
from conftest import TINY
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from uap_dist.data.decode import Geometry
from uap_dist.errors import ConfigError
from uap_dist.method.deepfool import deepfool
from uap_dist.method.log_odds import log_odds, log_odds_sum
from uap_dist.models.accelerate import accelerate
from uap_dist.models.classifier import Classifier
from uap_dist.models.loading import load_classifier

SEEDS = st.integers(0, 2**32 - 1)


def linear(seed, classes):
    rng = torch.Generator().manual_seed(seed)
    weights = torch.randn(classes, 48, generator=rng, dtype=torch.float64)
    pixels = 100 + 50 * torch.rand(5, 3, 4, 4, generator=rng, dtype=torch.float64)
    bias = -weights @ pixels.mean(0).flatten()  # boundaries among the images, far from 0 and 255
    return weights, pixels, lambda x: x.flatten(1) @ weights.T + bias


@given(seed=SEEDS, classes=st.integers(2, 10))
@settings(max_examples=25)
def test_closed_form_on_linear_classifiers(seed, classes):
    weights, pixels, classifier = linear(seed, classes)
    labels = classifier(pixels).argmax(1)
    found = deepfool(classifier, pixels, torch.zeros_like(pixels[0]), labels, candidates=classes, max_iterations=1)
    for pixel, label, step in zip(pixels, labels, found.steps, strict=True):
        scores = classifier(pixel[None])[0]
        normals = (weights[label] - weights)[torch.arange(classes) != label]
        distances = (scores[label] - scores)[torch.arange(classes) != label] / normals.norm(dim=1)
        expected = -1.02 * distances.min() * normals[distances.argmin()] / normals[distances.argmin()].norm()
        assert_close(step.flatten(), expected)
    assert found.is_solved.all() and not found.is_fooled.any()


def saturated(background, share, *, count=60, classes=3, dtype=torch.float32):
    """Random images of which a share of the values is 0, 255 or either, and an affine classifier of known normals."""
    rng = torch.Generator().manual_seed(5)
    normals = torch.randn(classes, 768, generator=rng).to(dtype)
    pixels = 255 * torch.rand(count, 3, 16, 16, generator=rng).to(dtype)
    sides = torch.randint(0, 2, pixels.shape, generator=rng) if background == "both" else int(background == "white")
    edges = 255 * sides * torch.ones_like(pixels)
    pixels = torch.where(torch.rand(pixels.shape, generator=rng) < share, edges, pixels)
    return pixels, normals, lambda x: (x.flatten(1) - 128) @ normals.T


@pytest.mark.parametrize("background", ["black", "white", "both"])
@pytest.mark.parametrize("share", [0.02, 0.05, 0.2, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_saturated_images_are_solved_by_the_shortest_step_inside_the_range(background, share, dtype):
    pixels, normals, classifier = saturated(background, share, dtype=dtype)
    labels = classifier(pixels).argmax(1)
    found = deepfool(classifier, pixels, torch.zeros_like(pixels[0]), labels)
    assert found.is_solved.all() and found.num_evaluations <= 8 * len(pixels)
    after = pixels + found.steps
    assert after.min() >= -1e-3 and after.max() <= 255 + 1e-3
    assert (classifier(after.clamp(0, 255)).argmax(1) != labels).all()
    shortest = shortest_steps(pixels.double(), normals.double(), classifier(pixels).double(), labels)
    lengths = found.steps.double().flatten(1).norm(dim=1)
    assert (lengths > 0.9999 * shortest).all()
    assert (
        lengths < 1.0201 * shortest + 5e-3
    ).all()  # the overshoot, and what a step has to exceed the rounding of pixels by
    assert_close((found.normals.flatten(1) @ normals.T).argmax(1), classifier(after.clamp(0, 255)).argmax(1))


def shortest_steps(pixels, normals, scores, labels):
    """ℓ2 length of the shortest step inside 0..255 onto the nearest affine boundary: clip(−λ w) for the λ that bridges the gap."""
    best = torch.full((len(pixels),), torch.inf, dtype=torch.float64)
    x = pixels.flatten(1)
    for rival in range(len(normals)):
        w, gap = normals[labels] - normals[rival], scores.gather(1, labels[:, None])[:, 0] - scores[:, rival]
        low, high = torch.zeros_like(best), torch.full_like(best, 1e3)
        for _ in range(60):
            middle = (low + high) / 2
            is_short = gap + (w * (-middle[:, None] * w).clamp(-x, 255 - x)).sum(1) > 0
            low, high = torch.where(is_short, middle, low), torch.where(is_short, high, middle)
        lengths = (-high[:, None] * w).clamp(-x, 255 - x).norm(dim=1)
        best = torch.where((labels != rival) & (high < 999), torch.minimum(best, lengths), best)
    return best


def test_pixels_pushed_out_of_the_range_by_v_take_part_in_no_step():
    pixels, normals, classifier = saturated("both", 0.3)
    v = 10 * torch.randint(0, 2, pixels.shape[1:], generator=torch.Generator().manual_seed(0)) * 2.0 - 10
    labels = classifier(pixels).argmax(1)
    found = deepfool(classifier, pixels, v, labels)
    start = pixels + v
    is_outside = (start < 0) | (start > 255)
    assert is_outside.any() and not found.steps[is_outside].any()
    assert found.is_solved.all()
    assert (classifier((start + found.steps).clamp(0, 255)).argmax(1) != labels).all()


def test_images_pushed_out_of_the_range_completely_by_v_are_solved():
    pixels, normals, classifier = saturated("white", 1.0, count=2)
    found = deepfool(classifier, pixels, torch.full_like(pixels[0], 10.0), classifier(pixels).argmax(1))
    assert found.is_solved.all() and (found.steps <= -10).all()  # what the network sees of a step begins at -10


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_image_on_a_boundary_leaves_it(dtype):
    normals = torch.tensor([[1.0], [-1.0]], dtype=dtype) * torch.ones(2, 48, dtype=dtype)
    pixels = torch.full((1, 3, 4, 4), 100.0, dtype=dtype)
    found = deepfool(lambda x: (x.flatten(1) - 100) @ normals.T, pixels, torch.zeros_like(pixels[0]), torch.tensor([0]))
    assert found.is_solved.all() and found.steps.norm() < 1e-2  # both logits are zero
    found = deepfool(
        lambda x: 7 + (x.flatten(1) - 100) @ normals.T, pixels, torch.zeros_like(pixels[0]), torch.tensor([0])
    )
    assert found.is_solved.all() and 0 < found.steps.norm() < 1e-2


@given(seed=SEEDS)
@settings(max_examples=10)
def test_steps_scale_with_the_unit_of_the_pixels(seed):
    weights, pixels, classifier = linear(seed, 4)
    labels = classifier(pixels).argmax(1)
    whole = deepfool(classifier, pixels, torch.zeros_like(pixels[0]), labels, max_iterations=1)
    half = deepfool(lambda x: classifier(2 * x), pixels / 2, torch.zeros_like(pixels[0]), labels, max_iterations=1)
    assert_close(whole.steps, 2 * half.steps)


def test_fooled_images_are_left_alone_and_evaluations_are_what_the_network_saw():
    _, pixels, classifier = linear(0, 6)
    seen = 0

    def counting(x):
        nonlocal seen
        seen += len(x)
        if x.requires_grad:
            x.register_hook(lambda gradient: backwards.append(len(gradient)))
        return classifier(x)

    backwards = []
    labels = classifier(pixels).argmax(1)
    labels[:2] = (labels[:2] + 1) % 6  # as if v had changed these labels
    found = deepfool(counting, pixels, torch.zeros_like(pixels[0]), labels, candidates=6)
    assert found.is_fooled.tolist() == [True, True, False, False, False]
    assert (found.steps[:2] == 0).all() and found.is_solved.all()
    assert found.num_evaluations == seen + sum(backwards)


@given(seed=SEEDS, ratio=st.floats(1.0, 4.0))
@settings(max_examples=25)
def test_candidates_skipped_by_a_valid_slope_ratio_are_never_the_nearest(seed, ratio):
    weights, pixels, _ = linear(seed, 8)
    normals = weights - weights[:1]
    lengths = 1 + (ratio - 1) * torch.rand(8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    normals = (
        lengths[:, None] * normals / normals.norm(dim=1, keepdim=True).clamp(min=1e-9)
    )  # z_0 = 0, slopes within ratio
    bias = -normals @ pixels.flatten(1).T - torch.rand(8, 5, dtype=torch.float64)
    for i in range(5):

        def scores(x, i=i):
            return x.flatten(1) @ normals.T + (bias[:, i] * (torch.arange(8) > 0))

        image, label = pixels[i : i + 1], torch.tensor([0])
        some, all_ = (
            deepfool(scores, image, torch.zeros_like(image[0]), label, max_iterations=1, slope_ratio=r)
            for r in (ratio, torch.inf)
        )
        assert_close(some.steps, all_.steps)
        assert some.num_evaluations <= all_.num_evaluations


class Wrapped(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def classifier_of(function):
    return Classifier(Wrapped(function), name="test", geometry=Geometry())


def test_log_odds_sum_adds_weighted_directions_of_deepfool_steps():
    _, pixels, function = linear(3, 2)  # with two classes the log-odds are linear
    labels = function(pixels).argmax(1)
    zero = torch.zeros_like(pixels[0])
    expected = torch.zeros_like(pixels[0])
    for x, label in zip(pixels, labels, strict=True):
        one = log_odds_sum(classifier_of(function), x[None], zero, label[None], weigh=torch.ones_like)
        step = one.total * one.log_odds / one.total.square().sum()
        after = log_odds(function((x + step)[None]), label[None])
        assert_close(after, torch.zeros(1, dtype=torch.float64))  # on the boundary
        expected += one.total * one.log_odds.square()
    found = log_odds_sum(classifier_of(function), pixels, zero, labels, weigh=torch.square)
    assert_close(found.total, expected)
    assert_close(found.log_odds, log_odds(function(pixels), labels))
    assert found.num_evaluations == 10


def test_an_image_whose_slope_is_not_finite_is_left_out_of_the_sum():
    _, pixels, function = linear(3, 4)
    labels = function(pixels).argmax(1)
    zero = torch.zeros_like(pixels[0])
    broken = classifier_of(lambda x: function(x) / (x.flatten(1).sum(1, keepdim=True) > 0))
    black = torch.cat([pixels, torch.zeros_like(pixels[:1])])  # 0/0 there
    found = log_odds_sum(broken, black, zero, torch.cat([labels, labels[:1]]), weigh=torch.ones_like)
    assert_close(found.total, log_odds_sum(broken, pixels, zero, labels, weigh=torch.ones_like).total)


def test_log_odds_are_the_log_of_p_over_one_minus_p():
    logits = torch.randn(7, 5, dtype=torch.float64)
    labels = torch.arange(7) % 5
    p = logits.softmax(1).gather(1, labels[:, None]).squeeze(1)
    assert_close(log_odds(logits, labels), (p / (1 - p)).log())


@pytest.mark.parametrize(
    "broken",
    [
        lambda x: x.flatten(1)[:, :3] * 0,
        lambda x: (x.flatten(1)[:, :3] * 0).sqrt(),
        lambda x: x.flatten(1)[:, :3] * 1e30,
    ],
)
def test_never_nan(broken):
    pixels = torch.full((2, 3, 4, 4), 100.0)
    labels = broken(pixels).argmax(1)
    zero = torch.zeros(3, 4, 4)
    assert deepfool(broken, pixels, zero, labels).steps.isfinite().all()
    assert log_odds_sum(classifier_of(broken), pixels, zero, labels, weigh=torch.sigmoid).total.isfinite().all()


def test_images_do_not_influence_each_other():
    classifier = load_classifier(TINY)
    pixels = 255 * torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    labels = classifier(pixels).argmax(1)
    together = deepfool(classifier, pixels, torch.zeros(3, 16, 16), labels)
    for i in range(6):
        alone = deepfool(classifier, pixels[i : i + 1], torch.zeros(3, 16, 16), labels[i : i + 1])
        assert_close(alone.steps[0], together.steps[i], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "options", [{"candidates": 1}, {"max_iterations": 0}, {"overshoot": -0.1}, {"slope_ratio": 0.9}]
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ConfigError, match="must be at least"):
        deepfool(lambda x: x.flatten(1), torch.ones(1, 3, 2, 2), torch.zeros(3, 2, 2), torch.tensor([0]), **options)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("model", "weights", "shard", "count"),  # benchmarks/deepfool.py takes 24 of ImageNet, on two networks
    [
        ("torchvision/squeezenet1_0", "squeezenet1_0", "imagenet-sample/train-0000.tar", 6),
        ("{shared}/models/cifar_resnet.py:resnet20", "resnet20", "cifar10/test-0000.tar", 24),
    ],
)
def test_median_norm_agrees_with_foolbox_on_real_images(shared, model, weights, shard, count):
    foolbox = pytest.importorskip("foolbox")
    from uap_dist.data.decode import load_shard

    classifier = load_classifier(model.format(shared=shared), f"{shared}/models/{weights}.safetensors")
    images = load_shard(f"{shared}/data/{shard}", classifier.geometry).images
    pixels = torch.tensor(images[:count], dtype=torch.float32)
    labels = classifier(pixels).argmax(1)
    zero = torch.zeros_like(pixels[0])
    exact = deepfool(classifier, pixels, zero, labels, slope_ratio=torch.inf)
    ours = deepfool(accelerate(classifier, zero.shape), pixels, zero, labels)
    attack = foolbox.attacks.L2DeepFoolAttack(steps=10, candidates=10, overshoot=0.02)
    _, (theirs,), success = attack(foolbox.PyTorchModel(classifier, bounds=(0, 255)), pixels, labels, epsilons=[None])
    # ten iterations miss about one CIFAR image in a hundred, of either's
    assert int(ours.is_solved.sum()) >= count - 1 and abs(int(ours.is_solved.sum()) - int(success.sum())) <= 1
    medians = [x.flatten(1).norm(dim=1).median().item() for x in (exact.steps, ours.steps, theirs - pixels)]
    assert medians[0] == pytest.approx(medians[2], rel=0.02)
    # looking at few candidates finds the same steps for less than half of the evaluations
    assert medians[1] == pytest.approx(medians[0], rel=0.005)
    assert ours.num_evaluations < exact.num_evaluations / 2


@pytest.mark.filterwarnings("ignore")
def test_saturated_images_are_solved_where_foolbox_solves_them_and_more(shared):
    foolbox = pytest.importorskip("foolbox")
    from uap_dist.data.decode import load_shard

    classifier = load_classifier(f"{shared}/models/cifar_resnet.py:resnet20", f"{shared}/models/resnet20.safetensors")
    pixels = torch.tensor(load_shard(f"{shared}/data/cifar10/test-0000.tar", classifier.geometry).images).float()
    shares = ((pixels == 0) | (pixels == 255)).flatten(1).float().mean(1)
    order = shares.argsort(descending=True)
    found = {}
    for name, rows in (("most", order[:12]), ("least", order[-12:])):
        x, labels = pixels[rows], classifier(pixels[rows]).argmax(1)
        found[name] = deepfool(classifier, x, torch.zeros_like(x[0]), labels)
        attack = foolbox.attacks.L2DeepFoolAttack(steps=10, candidates=10, overshoot=0.02)
        _, (theirs,), success = attack(foolbox.PyTorchModel(classifier, bounds=(0, 255)), x, labels, epsilons=[None])
        assert found[name].is_solved.all(), name
        both = success[0]
        norms = [step[both].flatten(1).norm(dim=1).median().item() for step in (found[name].steps, theirs - x)]
        assert both.any() and norms[0] <= 1.03 * norms[1], name
    assert shares[order[11]] > 0.2
    assert found["most"].num_evaluations <= 1.5 * found["least"].num_evaluations
