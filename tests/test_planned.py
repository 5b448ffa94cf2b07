"""What a plan is compared with, and what is refused."""

import pytest
from test_job import job_options, write_plan

from uap_dist.errors import ConfigError
from uap_dist.method.config import ComputeConfig
from uap_dist.planning.comparison import Spent, read_plan


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"plan": True, "resume": "x"}, "--plan plans a run from its beginning; leave out --resume"),
        ({"plan": True, "planned": "plan.json"}, "--plan makes what --planned takes"),
        ({"price_per_gpu_hour": 2.0}, "--price-per-gpu-hour belongs to --plan"),
        ({"price_per_gpu_hour": -2.0, "plan": True}, "--price-per-gpu-hour is -2.0; it must be positive"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        job_options(**options)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read a plan from --planned .*: No such file"),
        ("{", "it is not a plan; give the plan.json of --plan"),
        ('{"fooling": 1}', "it is not a plan; give the plan.json of --plan"),
    ],
)
def test_a_file_that_is_not_a_plan_is_refused(tmp_path, content, message):
    if content is not None:
        (tmp_path / "plan.json").write_text(content)
    with pytest.raises(ConfigError, match=message):
        read_plan(tmp_path / "plan.json", {})


def test_a_plan_of_another_job_is_refused_and_what_differs_is_named(tmp_path):
    job = job_options(compute=ComputeConfig(max_evaluations=3000)).costs()
    write_plan(tmp_path / "plan.json", job)
    assert read_plan(tmp_path / "plan.json", job)["planned/seconds"] == 60
    other = job_options(compute=ComputeConfig(max_evaluations=8000), num_perturbations=2).costs()
    message = "of another job: max_evaluations was 3000, is 8000; num_perturbations was 1, is 2; plan again"
    with pytest.raises(ConfigError, match=message):
        read_plan(tmp_path / "plan.json", other)


def test_a_plan_is_of_the_same_job_whether_labels_are_named_or_numbered():
    of_name, of_number = (
        job_options(compute=ComputeConfig(target=target, only_classes=only)).costs()
        for target, only in (("goldfish", ("cat",)), (1, (2, 3)))
    )
    assert of_name == of_number


def test_a_resumed_run_does_not_claim_to_know_its_time():
    spent = Spent.of([{"num_evaluations": 10, "num_solves": 5}] * 2, 4, None)
    assert spent.metrics() == {"spent/evaluations": 20, "spent/solves": 10} and spent.beside({}) == ""
