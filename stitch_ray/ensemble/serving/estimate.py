"""What `serve` would start, as text: `--dry-run`."""

from __future__ import annotations

from stitch_ray.config.ensemble import AutoscalingConfig, MemberConfig
from stitch_ray.ensemble.serving.preflight import Ready


def describe(ready: Ready) -> str:
    """One line a deployment with its replicas and what each takes, then the promise."""
    config = ready.config
    ensemble, http = config.ensemble, config.http
    members = [("primary", ensemble.primary), *(("auxiliary", member) for member in ensemble.auxiliaries)]
    lines = [
        f"start  {kind} {member.name}: {_place(member)}, {_replicas(member.autoscaling)}" for kind, member in members
    ]
    lines += [
        f"       scorer: {config.scorer_threads} CPU, {_gpus(config.scorer_gpus)}{_replicas(config.scoring)}",
        f"       gateway: {_replicas(config.gateway)}",
    ]
    if ensemble.route == "dialogue":
        lines.append(f"refine in a dialogue of at most {ensemble.dialogue.max_turns} turns")
    if ensemble.route == "exclude":
        lines.append(f"refine by at most {ensemble.exclude.max_attempts} further answers with the wrong ones excluded")
    token = "a bearer token" if http.token_env or http.token_file else "no token: whoever reaches it may ask"
    lines.append(f"listen http://{http.host}:{http.port}, {token}")
    lines.append(f"policy {promise(ready)}")
    if ready.unchecked:
        lines.append(f"       it does not tell for which {', '.join(ready.unchecked)} it was made")
    return "\n".join(lines)


def promise(ready: Ready) -> str:
    """The promise that is made unless another is asked for."""
    risk = ready.config.target_risk
    target = next(t for t in ready.policy.targets if risk is None or abs(t.target_risk - risk) < 1e-9)
    whose = "" if target.task is None else f" of task {target.task}"
    if target.threshold is None:
        return f"{ready.policy.version}: abstains on everything{whose} ({target.reason})"
    return (
        f"{ready.policy.version}: of the answers given{whose} at most {target.target_risk:g} are wrong, with probability "
        f"{1 - target.delta:g}; confidence from {target.threshold:.4g} on"
    )


def resources(ready: Ready) -> dict[str, float]:
    """CPUs and GPUs that the smallest number of replicas takes, at least one of each."""
    config = ready.config
    needed = {"CPU": 0.0, "GPU": 0.0}
    for member in config.ensemble.members:
        if member.model is not None:
            replicas = max(1, member.autoscaling.min_replicas)
            needed["CPU"] += replicas * member.model.num_threads
            needed["GPU"] += replicas * member.model.num_gpus
    scorers = max(1, config.scoring.min_replicas)
    needed["CPU"] += scorers * config.scorer_threads
    needed["GPU"] += scorers * config.scorer_gpus
    return {name: amount for name, amount in needed.items() if amount}


def _place(member: MemberConfig) -> str:
    model = member.model
    if model is None:
        assert member.endpoint is not None
        return f"at {member.endpoint.url}"
    return f"{model.engine}, {model.num_threads} CPU" + (f", {model.num_gpus:g} GPU" if model.num_gpus else "")


def _gpus(num: float) -> str:
    return f"{num:g} GPU, " if num else ""


def _replicas(scale: AutoscalingConfig) -> str:
    few, many = scale.min_replicas, scale.max_replicas
    return f"{few} replica{'s' if few != 1 else ''}" if few == many else f"{few} to {many} replicas"
