"""What the objects of one job on Kubernetes share: their labels, by which they are found."""

from typing import Any

from vaejob.cluster.manifests.plan import Plan
from vaejob.cluster.manifests.pod_rules import MANAGED_BY

Object = dict[str, Any]


def labels(plan: Plan, component: str | None = None) -> dict[str, str]:
    common = {"app.kubernetes.io/name": "vaejob", "app.kubernetes.io/instance": plan.name, MANAGED_BY: "vaejob"}
    return common | ({"app.kubernetes.io/component": component} if component else {})


def metadata(plan: Plan, name: str, **more: Any) -> Object:
    return {"name": name, "namespace": plan.deploy.namespace, "labels": labels(plan), **more}
