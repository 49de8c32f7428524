import copy
import math

import pytest
import torch
import torch.nn.functional as F

from bt_fast.lab.models import PreActResNet18, SmallCNN, WideResNet, build_model, load_published

SMALL_CNN = {
    "feature_extractor.conv1.weight": (32, 1, 3, 3),
    "feature_extractor.conv1.bias": (32,),
    "feature_extractor.conv2.weight": (32, 32, 3, 3),
    "feature_extractor.conv2.bias": (32,),
    "feature_extractor.conv3.weight": (64, 32, 3, 3),
    "feature_extractor.conv3.bias": (64,),
    "feature_extractor.conv4.weight": (64, 64, 3, 3),
    "feature_extractor.conv4.bias": (64,),
    "classifier.fc1.weight": (200, 64 * 4 * 4),
    "classifier.fc1.bias": (200,),
    "classifier.fc2.weight": (200, 200),
    "classifier.fc2.bias": (200,),
    "classifier.fc3.weight": (10, 200),
    "classifier.fc3.bias": (10,),
}


def norm_shapes(name, planes):
    vectors = {f"{name}.{part}": (planes,) for part in ("weight", "bias", "running_mean", "running_var")}
    return vectors | {f"{name}.num_batches_tracked": ()}


def stage_shapes(name, blocks, before, planes, projection):
    shapes = {}
    for i in range(blocks):
        shapes |= norm_shapes(f"{name}.{i}.bn1", before)
        shapes[f"{name}.{i}.conv1.weight"] = (planes, before, 3, 3)
        shapes |= norm_shapes(f"{name}.{i}.bn2", planes)
        shapes[f"{name}.{i}.conv2.weight"] = (planes, planes, 3, 3)
        if before != planes:
            shapes[f"{name}.{i}.{projection}.weight"] = (planes, before, 1, 1)
        before = planes
    return shapes


def wide_resnet_shapes(depth, factor, *, published=False):
    """Returns names and shapes of a WideResNet; as published, with the unused sub_block1."""
    blocks, planes = (depth - 4) // 6, 16 * factor
    shapes = {"conv1.weight": (16, 3, 3, 3)}
    shapes |= stage_shapes("block1.layer", blocks, 16, planes, "convShortcut")
    if published:
        shapes |= stage_shapes("sub_block1.layer", blocks, 16, planes, "convShortcut")
    shapes |= stage_shapes("block2.layer", blocks, planes, 2 * planes, "convShortcut")
    shapes |= stage_shapes("block3.layer", blocks, 2 * planes, 4 * planes, "convShortcut")
    return shapes | norm_shapes("bn1", 4 * planes) | {"fc.weight": (10, 4 * planes), "fc.bias": (10,)}


def preact_resnet18_shapes():
    shapes = {"conv1.weight": (64, 3, 3, 3)}
    for i, (before, planes) in enumerate([(64, 64), (64, 128), (128, 256), (256, 512)], start=1):
        shapes |= stage_shapes(f"layer{i}", 2, before, planes, "shortcut.0")
    return shapes | {"linear.weight": (10, 512), "linear.bias": (10,)}


def shapes_of(model):
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def random_state(shapes):
    """Returns a checkpoint like after training: no tensor has its initial value, and variances are positive."""
    state = {
        name: torch.tensor(7) if name.endswith("num_batches_tracked") else 0.1 * torch.randn(shape)
        for name, shape in shapes.items()
    }
    return {name: 0.5 + t.abs() if name.endswith("running_var") else t for name, t in state.items()}


def copied_state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_state(model, expected):
    assert model.state_dict().keys() == expected.keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def on_meta(build):
    with torch.device("meta"):
        return build()


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def reference_logits(state, x, stages, projection, *, final_norm, linear):
    """Computes evaluation-mode logits of a pre-activation network by formulas on its checkpoint."""

    def norm_relu(x, name):
        mean, var = state[f"{name}.running_mean"], state[f"{name}.running_var"]
        scale = state[f"{name}.weight"] / torch.sqrt(var + 1e-5)
        column = (1, -1, 1, 1)
        return ((x - mean.view(column)) * scale.view(column) + state[f"{name}.bias"].view(column)).relu()

    x = F.conv2d(x, state["conv1.weight"], padding=1)
    for number, stage in enumerate(stages):
        for i in range(2):
            name = f"{stage}.{i}"
            stride = 2 if number > 0 and i == 0 else 1
            active = norm_relu(x, f"{name}.bn1")
            out = F.conv2d(active, state[f"{name}.conv1.weight"], stride=stride, padding=1)
            out = F.conv2d(norm_relu(out, f"{name}.bn2"), state[f"{name}.conv2.weight"], padding=1)
            if f"{name}.{projection}.weight" in state:
                x = F.conv2d(active, state[f"{name}.{projection}.weight"], stride=stride)
            x = x + out
    x = norm_relu(x, "bn1") if final_norm else x
    return x.mean((2, 3)) @ state[f"{linear}.weight"].T + state[f"{linear}.bias"]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (SmallCNN, SMALL_CNN),
        (PreActResNet18, preact_resnet18_shapes()),
        (lambda: WideResNet(16, 2), wide_resnet_shapes(16, 2)),
        (lambda: WideResNet(34, 10), wide_resnet_shapes(34, 10)),
        (lambda: WideResNet(10, 1), wide_resnet_shapes(10, 1)),
    ],
    ids=["small-cnn", "preactresnet-18", "wrn-16-2", "wrn-34-10", "wrn-10-1"],
)
def test_tensor_names_and_shapes_are_the_published_ones(build, expected):
    assert shapes_of(on_meta(build)) == expected


@pytest.mark.parametrize(
    ("build", "count"),
    [
        (SmallCNN, 312_202),
        (PreActResNet18, 11_171_146),
        (WideResNet, 46_160_474),
        (lambda: WideResNet(40, 2), 2_243_546),
    ],
    ids=["small-cnn", "preactresnet-18", "wrn-34-10", "wrn-40-2"],
)
def test_parameter_counts_are_the_known_ones(build, count):
    assert parameters(on_meta(build)) == count


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32)])
@pytest.mark.parametrize("name", ["small-cnn", "preactresnet-18", "wrn-10-1"])
def test_every_network_gives_one_logit_a_class_for_both_image_shapes(name, shape):
    model = build_model(name, in_channels=shape[0], image_size=shape[1], num_classes=7)
    logits = model(torch.rand(2, *shape))
    assert logits.shape == (2, 7)
    assert logits.dtype == torch.float32


@pytest.mark.parametrize(
    ("build", "shapes", "reference"),
    [
        (
            lambda: WideResNet(16, 2),
            wide_resnet_shapes(16, 2),
            {
                "stages": [f"block{i}.layer" for i in (1, 2, 3)],
                "projection": "convShortcut",
                "final_norm": True,
                "linear": "fc",
            },
        ),
        (
            PreActResNet18,
            preact_resnet18_shapes(),
            {
                "stages": [f"layer{i}" for i in (1, 2, 3, 4)],
                "projection": "shortcut.0",
                "final_norm": False,
                "linear": "linear",
            },
        ),
    ],
    ids=["wrn-16-2", "preactresnet-18"],
)
def test_logits_and_input_gradients_equal_the_formulas(build, shapes, reference):
    model = build().double().eval()
    state = {name: tensor.double() for name, tensor in random_state(shapes).items()}
    model.load_state_dict(state)
    x = torch.rand(2, 3, 16, 16, dtype=torch.float64, requires_grad=True)
    logits, expected = model(x), reference_logits(state, x, **reference)
    assert logits.std() > 0
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)
    weights = torch.randn_like(logits)
    ours, theirs = (torch.autograd.grad((out * weights).sum(), x)[0] for out in (logits, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["small-cnn", "preactresnet-18", "wrn-16-2"])
def test_eval_logits_of_a_sample_do_not_depend_on_its_batch(name):
    model = build_model(name, in_channels=3, image_size=16, num_classes=10).double().eval()
    if isinstance(model, SmallCNN):
        torch.nn.init.normal_(model.classifier.fc3.weight)
    x = torch.rand(3, 3, 16, 16, dtype=torch.float64)
    together, alone = model(x), torch.cat([model(sample[None]) for sample in x])
    assert (together[0] - together[1]).abs().max() > 0
    torch.testing.assert_close(together, alone, rtol=1e-11, atol=1e-11)


def test_a_new_small_cnn_gives_zero_logits():
    logits = SmallCNN()(torch.rand(4, 1, 28, 28))
    assert torch.equal(logits, torch.zeros(4, 10))


def test_convolutions_start_with_the_published_spread():
    small, wide = SmallCNN(), WideResNet(10, 2)
    conv = small.feature_extractor.conv4
    assert conv.weight.std().item() == pytest.approx(math.sqrt(2 / (64 * 9)), rel=0.05)
    assert not conv.bias.any()
    conv = wide.block3.layer[0].conv1
    assert conv.weight.std().item() == pytest.approx(math.sqrt(2 / (128 * 9)), rel=0.05)
    assert not wide.fc.bias.any()


def test_dropout_acts_in_training_mode_only():
    model, x = WideResNet(10, 1, dropout=0.5), torch.rand(2, 3, 8, 8)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


def test_a_published_wide_resnet_loads_and_replaces_every_tensor(tmp_path):
    published = random_state(wide_resnet_shapes(16, 2, published=True))
    torch.save({f"module.{name}": tensor for name, tensor in published.items()}, tmp_path / "wrn.pt")
    model = WideResNet(16, 2)
    before = copied_state(model)
    load_published(model, tmp_path / "wrn.pt")
    for name, tensor in model.state_dict().items():
        assert not torch.equal(tensor, before[name]), name
    assert_state(model, {name: t for name, t in published.items() if not name.startswith("sub_block1.")})


@pytest.mark.parametrize("around", ["", "1."], ids=["bare", "in a Sequential"])
def test_load_state_dict_takes_published_names_strictly_and_keeps_the_given_dict(around):
    published = random_state(wide_resnet_shapes(10, 1, published=True))
    given = {f"{around}module.{name}": tensor for name, tensor in published.items()}
    names = list(given)
    wide = copy.deepcopy(WideResNet(10, 1))
    model = torch.nn.Sequential(torch.nn.Identity(), wide) if around else wide
    model.load_state_dict(given, strict=True)
    assert list(given) == names
    assert_state(wide, {name: t for name, t in published.items() if not name.startswith("sub_block1.")})


def test_load_state_dict_still_refuses_other_names():
    state = random_state(wide_resnet_shapes(10, 1)) | {"sub_block2.weight": torch.zeros(1)}
    with pytest.raises(RuntimeError, match="sub_block2"):
        WideResNet(10, 1).load_state_dict(state)


@pytest.mark.parametrize("key", [None, "state_dict", "model_state_dict"])
def test_a_checkpoint_may_keep_its_state_dict_under_a_key(tmp_path, key):
    state = random_state(SMALL_CNN)
    torch.save({key: state, "epoch": 3} if key else state, tmp_path / "cnn.pt")
    model = SmallCNN()
    load_published(model, tmp_path / "cnn.pt")
    assert_state(model, state)


def test_loading_keeps_the_dtype_of_the_model(tmp_path):
    state = random_state(SMALL_CNN)
    torch.save(state, tmp_path / "cnn.pt")
    model = SmallCNN().double()
    load_published(model, tmp_path / "cnn.pt")
    assert_state(model, {name: tensor.double() for name, tensor in state.items()})


def test_a_checkpoint_without_step_counts_loads_and_leaves_them(tmp_path):
    state = random_state(wide_resnet_shapes(10, 1))
    torch.save({n: t for n, t in state.items() if not n.endswith("tracked")}, tmp_path / "old.pt")
    model = WideResNet(10, 1)
    load_published(model, tmp_path / "old.pt")
    assert_state(model, {n: torch.tensor(0) if n.endswith("tracked") else t for n, t in state.items()})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("classifier.fc2.bias"), r"missing classifier\.fc2\.bias \(of"),
        (lambda state: state.update(extra=torch.zeros(1)), r"unexpected extra \(of"),
        (
            lambda state: state.update({"classifier.fc3.bias": torch.zeros(9)}),
            r"mis-shaped classifier\.fc3\.bias \(9,\) for \(10,\) \(of",
        ),
        (
            lambda state: [state.pop(name) for name in list(state) if not name.endswith("fc3.bias")],
            r"missing \S+conv1\.weight, \S+conv1\.bias, \S+conv2\.weight and 10 more \(of",
        ),
    ],
    ids=["missing", "unexpected", "mis-shaped", "almost empty"],
)
def test_a_checkpoint_that_does_not_fit_is_named_and_changes_nothing(tmp_path, change, message):
    state = random_state(SMALL_CNN)
    change(state)
    torch.save(state, tmp_path / "cnn.pt")
    model = SmallCNN()
    before = copied_state(model)
    with pytest.raises(ValueError, match=r"cnn\.pt does not fit SmallCNN: " + message):
        load_published(model, tmp_path / "cnn.pt")
    assert_state(model, before)


@pytest.mark.parametrize("content", [[1, 2], {}, {"epoch": 3}, {"state_dict": 3}, {0: torch.zeros(1)}, torch.zeros(2)])
def test_a_file_without_a_state_dict_is_named(tmp_path, content):
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other\.pt holds no state_dict"):
        load_published(SmallCNN(), tmp_path / "other.pt")


def test_names_build_the_network_they_say():
    def shapes(name, **kwargs):
        sizes = {"in_channels": 3, "image_size": 32, "num_classes": 10} | kwargs
        return shapes_of(on_meta(lambda: build_model(name, **sizes)))

    assert shapes("wrn-34-10") == wide_resnet_shapes(34, 10)
    assert shapes("preactresnet-18") == preact_resnet18_shapes()
    assert shapes("small-cnn", in_channels=1, image_size=28) == SMALL_CNN
    assert shapes("small-cnn", width=8)["classifier.fc1.weight"] == (200, 16 * 5 * 5)


@pytest.mark.parametrize("name", ["", "resnet-18", "wrn-34", "wrn-34-0", "wrn-34-10-2", "WRN-34-10", "wrn-34-10\n"])
def test_an_unknown_network_is_answered_with_those_that_exist(name):
    with pytest.raises(ValueError, match=r"'small-cnn', 'preactresnet-18' and 'wrn-D-K'"):
        build_model(name, in_channels=3, image_size=32, num_classes=10)


@pytest.mark.parametrize("name", ["preactresnet-18", "wrn-10-1"])
def test_width_is_refused_where_it_does_not_apply(name):
    with pytest.raises(ValueError, match=f"width .*'{name}'"):
        build_model(name, in_channels=3, image_size=32, num_classes=10, width=8)


@pytest.mark.parametrize("depth", [-2, 4, 18, 35])
def test_a_depth_that_no_wide_resnet_has_is_refused(depth):
    with pytest.raises(ValueError, match=f"depth .* got {depth}: take the nearest of these$"):
        WideResNet(depth, 1)


def test_images_too_small_for_the_small_cnn_are_refused():
    assert SmallCNN(image_size=16)(torch.rand(1, 1, 16, 16)).shape == (1, 10)
    with pytest.raises(ValueError, match=r"image_size .* got 15: resize the images$"):
        SmallCNN(image_size=15)
