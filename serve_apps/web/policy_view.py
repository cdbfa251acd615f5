"""The policy in force, as clients see it."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from typing import Any

from serve_apps.web.errors import ApiError
from serve_apps.web.service import Active
from stitch_ray.reliability.policy import UnknownTarget


class PolicyView:
    """Reads the calibration data of a policy once."""

    def __init__(self) -> None:
        self._curves: dict[tuple[str, str | None], dict[str, Any] | None] = {}

    def policy(self, active: Active, model_version: str) -> dict[str, Any]:
        policy = active.policy
        targets = [asdict(target) for target in policy.targets]
        return {
            "version": policy.version,
            "default": targets[0],
            "targets": targets,
            "fingerprints": asdict(policy.fingerprints),
            "joint_delta": policy.joint_delta,
            "scale": None if policy.scale is None else policy.scale.to_dict(),
            "active": asdict(policy.target(None, active.target_risk)) if _for_all(active) else None,
            "model_version": model_version,
        }

    async def curve(self, active: Active, task: str | None) -> dict[str, Any]:
        """Raises ApiError 404 where the calibration data is not beside the policy, or has no such task."""
        key = (active.policy.version, task)
        if key not in self._curves:
            if len(self._curves) > 64:
                self._curves.clear()
            self._curves[key] = await asyncio.to_thread(_points, active.path, task)
        points = self._curves[key]
        if points is None:
            whose = "" if task is None else f" of task {task[:200]!r}"
            raise ApiError(404, "not_found", f"no calibration data{whose} lies beside the policy")
        try:
            target = active.policy.target(task, active.target_risk)
        except UnknownTarget as error:
            raise ApiError(404, "not_found", str(error)) from error
        return {**points, "active": {"threshold": target.threshold, "target_risk": target.target_risk}}


def _points(path: str, task: str | None) -> dict[str, Any] | None:
    # Brings the reports' plotting along, which a gateway that is not asked for a curve has no use for.
    from stitch_ray.reliability.risk import calibration_table

    table = calibration_table.read(path)
    if table is None:
        return None
    try:
        return calibration_table.operating_points(table, task=task).as_dict()
    except ValueError:
        return None


def _for_all(active: Active) -> bool:
    """Whether there is a promise for questions of no particular task."""
    try:
        active.policy.target(None, active.target_risk)
    except UnknownTarget:
        return False
    return True
