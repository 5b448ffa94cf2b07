import pytest

from uap_dist.errors import ConfigError
from uap_dist.models.names import ModelChoice, name_models, name_sets, plain_key

OWN = "nets/a.py:build"


@pytest.mark.parametrize(
    ("text", "name", "model", "weights"),
    [
        ("torchvision/resnet50", "", "torchvision/resnet50", None),
        ("efficientnet_lite0", "", "efficientnet_lite0", None),
        ("resnet", "", "resnet", None),  # no network, as whoever loads it will say
        ("torchvision/resnet50=w.pth", "", "torchvision/resnet50", "w.pth"),
        ("efficientnet_lite0=w.pth", "", "efficientnet_lite0", "w.pth"),
        ("efficientnet_lite0=efficientnet_lite0", "", "efficientnet_lite0", "efficientnet_lite0"),
        ("lite=efficientnet_lite0", "lite", "efficientnet_lite0", None),
        ("before=torchvision/resnet50", "before", "torchvision/resnet50", None),
        ("after = tuning=timm/vit=lr=0.1/w=2.pth", None, None, None),
        ("after tuning=timm/vit=lr=0.1/w=2.pth", "after tuning", "timm/vit", "lr=0.1/w=2.pth"),
        ("a=torchvision/x=s3://b/w.pth?region=r&retries=1", "a", "torchvision/x", "s3://b/w.pth?region=r&retries=1"),
        (OWN, "", OWN, None),
        (f"{OWN}=w.pth", "", OWN, "w.pth"),
        (f"own={OWN}=w.pth", "own", OWN, "w.pth"),
        ("package.module:factory=timm/x", "", "package.module:factory", "timm/x"),
        ("/data/lr=0.1/a.py:build=w=1.pth", "", "/data/lr=0.1/a.py:build", "w=1.pth"),
        ("./lr=0.1/a.py:build", "", "./lr=0.1/a.py:build", None),
        (r"C:\lr=0.1\a.py:build=C:\w.pth", "", r"C:\lr=0.1\a.py:build", r"C:\w.pth"),
        (r"before=C:\nets\a.py:build", "before", r"C:\nets\a.py:build", None),
        ("torchvision/resnet50@IMAGENET1K_V1=w.pth", "", "torchvision/resnet50@IMAGENET1K_V1", "w.pth"),
        ("timm/hf-hub:a/b.c_d=w.pth#ema", "", "timm/hf-hub:a/b.c_d", "w.pth#ema"),
        (f"{OWN}?a=1&b=x/y=w=1.pth", "", f"{OWN}?a=1&b=x/y", "w=1.pth"),
        (f"own={OWN}?a=", "own", f"{OWN}?a=", None),
        ("resnet50=w.pth", None, None, None),
        ("torchvision/resnet50=", None, None, None),
        ("=torchvision/resnet50", None, None, None),
        ("before=torchvision/resnet50=", None, None, None),
    ],
)
def test_a_model_option_is_parsed_into_name_model_and_weights(text, name, model, weights):
    if model is None:
        with pytest.raises(ConfigError, match=r"--models .*; give \[NAME=\]MODEL\[=WEIGHTS\], with MODEL as torchvis"):
            ModelChoice.parse(text)
    else:
        assert ModelChoice.parse(text) == ModelChoice(name, model, weights)


def names(*texts):
    return name_models([ModelChoice.parse(text) for text in texts])


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (("torchvision/resnet50", "timm/vit=w.pth", OWN), ["resnet50", "vit", "build"]),
        (("torchvision/resnet50", "timm/resnet50=w.pth"), ["torchvision/resnet50", "timm/resnet50"]),
        (("a/n.py:f?x=a,b", "b/n.py:f?x=a:b"), ["a/n.py/f(x=a,b)", "b/n.py/f(x=a:b)"]),
        ((OWN, "nets/b.py:build", "more/b.py:build"), ["a.py/build", "nets/b.py/build", "more/b.py/build"]),
        ((f"{OWN}?a=1&b=x/y", f"{OWN}?a=2"), ["build(a=1, b=x/y)", "build(a=2)"]),
        (("timm/x=a/c.pth.tar#model", "timm/x=a/c.pth.tar#ema"), ["x, c#model", "x, c#ema"]),
        (("timm/x", "timm/x=w/tuned.safetensors"), ["x, published", "x, tuned"]),
        (("timm/x=a/net.pth", "timm/x=b/net.pth", "timm/y"), ["x, a/net", "x, b/net", "y"]),
        (("timm/x=a/net.pth", "timm/x=a/net.safetensors"), ["x, net.pth", "x, net.safetensors"]),
        (("before=timm/x", "timm/x=w.pth"), ["before", "x"]),
        (("before=timm/x", "after it=timm/x=w.pth"), ["before", "after it"]),
        (("timm/x=s3://b/1/net.pth?region=r", "timm/x=s3://b/2/net.pth?region=r"), ["x, 1/net", "x, 2/net"]),
    ],
)
def test_networks_get_the_shortest_unique_names(texts, expected):
    assert names(*texts) == expected


def test_equal_networks_and_equal_names_are_rejected():
    with pytest.raises(ConfigError, match=r"--models has timm/x twice with the same weights \(published\)"):
        names("timm/x", "timm/x")
    with pytest.raises(ConfigError, match=r"--models has timm/x twice with the same weights \(.*/w.pth\)"):
        names("a=timm/x=w.pth", "b=timm/x=./w.pth")
    with pytest.raises(ConfigError, match="two models are named 'a'; give them other names, as NAME="):
        names("a=timm/x", "a=timm/y")
    with pytest.raises(ConfigError, match="two models are named 'y'"):
        names("y=timm/x", "timm/y")
    with pytest.raises(
        ConfigError, match=r"two models are named 'a\+' and 'a;', which are one name in MLflow; give them"
    ):
        names("a+=timm/x", "a;=timm/y")
    with pytest.raises(
        ConfigError, match=r"two models are named '.*build\(x=a,b\)' and '.*build\(x=a:b\)', which are one"
    ):
        names(f"{OWN}?x=a,b", f"{OWN}?x=a:b")


def test_names_of_sets_are_fit_for_files():
    patterns = ["a/val-{0000..0009}.tar", "b/val-*.tar::c/val-0.tar", "s3://d/test-0.tar?region=eu-west-1"]
    assert name_sets(["", "", ""], patterns) == ["a-val", "b-val", "test"]
    assert name_sets(["mine", "", ""], patterns) == ["mine", "val", "test"]
    assert name_sets(["", ""], ["a/val-0.tar", "a/val-1.tar"]) == ["val-0.tar", "val-1.tar"]
    with pytest.raises(ConfigError, match="two sets of images are named 'val'"):
        name_sets(["val", "val"], patterns[:2])
    with pytest.raises(
        ConfigError, match="two sets of images are named 'val,' and 'val;', which are one name in MLflow"
    ):
        name_sets(["val,", "val;"], patterns[:2])


def test_plain_keys_are_valid_in_mlflow():
    assert plain_key("x, a/net (2)") == "x_ a/net _2_"
