import subprocess
import sys

import uap_dist


def test_the_package_needs_neither_ray_nor_mlflow():
    code = "import sys, uap_dist; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"ray", "mlflow", "moto"} & set(modules)


def test_public_names_are_what_the_package_lists():
    assert sorted(uap_dist.__all__) == uap_dist.__all__
    for name in uap_dist.__all__:
        assert getattr(uap_dist, name).__doc__, name
