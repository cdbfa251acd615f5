"""Options of predict and serve that do not go together are refused with the fix."""

from pathlib import Path
from typing import Any

import pytest

from stitch_ray.config import CONFIGS
from stitch_ray.config.loading import absolute_paths, validate
from stitch_ray.errors import UserError

PRIMARY = {"model": {"path": "m"}}
AUXILIARIES = [{"model": {"path": "a"}}, {"endpoint": {"url": "http://h/v1", "model": "b", "name": "b"}}]
DIALOGUE = {"primary": PRIMARY, "auxiliaries": AUXILIARIES, "route": "dialogue"}
PREDICT = {"data": {"paths": ["q.json"]}, "ensemble": {"primary": PRIMARY}, "scorer": "s", "policy": "p"}
SERVE = {"ensemble": {"primary": PRIMARY}, "scorer": "s", "policy": "p"}
SERVED = {"url": "http://127.0.0.1:8000"}


@pytest.mark.parametrize(
    ("job", "base", "change", "message"),
    [
        ("predict", PREDICT, {"target": SERVED}, "give ensemble or target"),
        ("predict", {"data": PREDICT["data"]}, {}, "give ensemble or target"),
        ("predict", {"data": PREDICT["data"], "target": SERVED}, {"scorer": "s"}, "scorer has no effect with target"),
        ("predict", {"data": PREDICT["data"], "target": SERVED}, {"calibration": True}, "need the models themselves"),
        ("predict", PREDICT, {"scorer": None}, "without one no answer can be given"),
        ("predict", PREDICT, {"policy": None}, "policy is missing"),
        ("predict", PREDICT, {"calibration": True}, "policies with a second stage"),
        ("predict", PREDICT, {"baselines": True}, "with route: dialogue only"),
        ("predict", PREDICT, {"ensemble": {**DIALOGUE, "auxiliaries": AUXILIARIES[:1]}}, "needs two auxiliaries"),
        ("predict", PREDICT, {"ensemble": {**DIALOGUE, "route": "none"}}, "auxiliaries have no effect"),
        ("predict", PREDICT, {"ensemble": {**DIALOGUE, "primary": AUXILIARIES[0]}}, "different names"),
        ("predict", PREDICT, {"ensemble": {"primary": {}}}, "give model or endpoint"),
        (
            "predict",
            PREDICT,
            {"ensemble": {"primary": {**AUXILIARIES[1], "adapters": {"t": "lora"}}}},
            "adapters need a local model",
        ),
        ("predict", PREDICT, {"ensemble": {"primary": PRIMARY, "signals": {"samples": 1}}}, "cannot be compared"),
        ("serve", SERVE, {"http": {"host": "0.0.0.0"}}, "can be reached from other machines and needs http.token_env"),
        ("serve", SERVE, {"http": {"token_env": "T", "token_file": "f"}}, "not both"),
        ("serve", SERVE, {"gateway": {"min_replicas": 3}}, "exceeds max_replicas"),
        ("serve", SERVE, {"gateway": {"max_ongoing_requests": 2}}, "can never be reached"),
    ],
)
def test_what_does_not_go_together_is_refused(
    job: str, base: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        validate(CONFIGS[job], {**base, **change}, "config")


def test_what_goes_together_is_taken() -> None:
    plain = validate(CONFIGS["predict"], PREDICT, "config")
    assert (plain.ensemble.route, plain.scorer, plain.policy, plain.calibration) == ("none", "s", "p", False)
    both = {**PREDICT, "ensemble": DIALOGUE, "policy": None, "calibration": True}
    calibrating = validate(CONFIGS["predict"], both, "config")
    assert [member.name for member in calibrating.ensemble.auxiliaries] == ["a", "b"]
    assert (calibrating.ensemble.route, calibrating.policy, calibrating.calibration) == ("dialogue", None, True)
    remote = validate(CONFIGS["predict"], {"data": PREDICT["data"], "target": SERVED}, "config")
    assert (remote.target.url, remote.ensemble) == (SERVED["url"], None)
    served = validate(CONFIGS["serve"], {**SERVE, "http": {"host": "0.0.0.0", "token_env": "TOKEN"}}, "config")
    assert (served.http.host, served.http.token_env) == ("0.0.0.0", "TOKEN")


def test_paths_of_members_and_adapters_travel(tmp_path: Path) -> None:
    for name in ("m", "a", "lora", "s"):
        (tmp_path / name).mkdir()
    ensemble = {**DIALOGUE, "primary": {**PRIMARY, "adapters": {"sums": "lora"}}}
    config = validate(CONFIGS["predict"], {**PREDICT, "ensemble": ensemble}, "config")
    found = absolute_paths(config, tmp_path)
    assert found["ensemble"]["primary"]["model"]["path"] == str(tmp_path / "m")
    assert found["ensemble"]["primary"]["adapters"] == {"sums": str(tmp_path / "lora")}
    assert found["ensemble"]["auxiliaries"][0]["model"]["path"] == str(tmp_path / "a")
    assert found["scorer"] == str(tmp_path / "s")
    assert found["policy"] == "p"
