"""The configurations that come with `serve` are valid, and what they leave out has its documented default."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import yaml
from ray.serve import Application
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary
from ray.serve.schema import ServeDeploySchema

from serve_apps.ui import local_url
from stitch_ray.config import ServeConfig, load_config
from stitch_ray.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore::pydantic.PydanticDeprecatedSince20")

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("file", sorted((ROOT / "jobs/configs").glob("serve*.yaml")), ids=lambda path: path.name)
def test_a_configuration_is_valid_and_bounds_every_queue(file: Path) -> None:
    config = load_config(ServeConfig, file)
    scales = [member.autoscaling for member in config.ensemble.members] + [config.scoring, config.gateway]
    assert all(scale.max_queued_requests > 0 for scale in scales)
    assert config.http.host == "127.0.0.1" or config.http.token_env or config.http.token_file
    assert config.gateway.max_ongoing_requests >= config.http.max_in_flight


@pytest.mark.parametrize("file", sorted((ROOT / "serve_apps/configs").glob("*.yaml")), ids=lambda path: path.name)
def test_files_for_serve_deploy_name_builders_that_take_their_arguments(file: Path) -> None:
    schema = ServeDeploySchema.model_validate(yaml.safe_load(file.read_text()))
    assert schema.http_options.request_timeout_s
    for application in schema.applications:
        module, _, name = application.import_path.partition(":")
        builder = getattr(importlib.import_module(module), name)
        # As Serve calls it, which hands over the plain mapping unless it finds a model in the annotations.
        if name == "app_builder" and module.endswith("ui"):
            assert isinstance(call_user_app_builder_with_args_if_necessary(builder, application.args), Application)
        else:
            with pytest.raises(UserError, match="/shared/"):  # it looks for the models, which are not here
                call_user_app_builder_with_args_if_necessary(builder, application.args)
        with pytest.raises(UserError, match=r"args: polcy: unknown key"):
            call_user_app_builder_with_args_if_necessary(builder, {**application.args, "polcy": 1})


def test_replicas_reach_the_proxy_of_their_own_node() -> None:
    assert local_url("0.0.0.0", 8000) == "http://127.0.0.1:8000"
    assert local_url("::1", 80) == "http://[::1]:80"
