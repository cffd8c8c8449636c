"""Strict schemas of Kubernetes's own resources and of those that KEDA, the Prometheus operator and
KServe add, each from a package of PyPI:

    kubernetes-validate    the OpenAPI schemas of Kubernetes, closed to unknown fields
    cloudcoil.models.*     pydantic models made from the operators' CRDs
    kserve                 the SDK's models, made from KServe's API; read, not imported
"""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import re
from pathlib import Path
from typing import Any

import jsonschema
import pydantic
from kubernetes_validate.utils import schema_contents
from referencing import Registry
from referencing.jsonschema import DRAFT202012

KUBERNETES = "1.34"


class Invalid(Exception):
    """Not what the schema says."""


# ---- KServe

# What its SDK calls otherwise than by a model's name or that of one of Kubernetes.
PLAIN = {"str": {"type": "string"}, "bool": {"type": "boolean"}, "int": {"type": "integer"},
         "float": {"type": "number"}, "object": {},
         "ResourceQuantity": {"type": ["string", "number"]},
         "V1ObjectMeta": {"$ref": "urn:kubernetes#/$defs/"
                                  "io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta"}}  # fmt: skip


@functools.cache
def kserve_folder() -> Path:
    return Path(importlib.util.find_spec("kserve").submodule_search_locations[0]) / "models"


def snake_case(name: str) -> str:
    name = re.sub(r"([A-Z]+)([A-Z][a-z])", r"\1_\2", name)
    return re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", name).lower()


def kserve_type(name: str) -> dict[str, Any]:
    if listed := re.fullmatch(r"list\[(.*)\]", name):
        return {"type": "array", "items": kserve_type(listed[1])}
    if mapped := re.fullmatch(r"dict\(str, (.*)\)", name):
        return {"type": "object", "additionalProperties": kserve_type(mapped[1])}
    if name in PLAIN:
        return PLAIN[name]
    if (kserve_folder() / f"{snake_case(name)}.py").exists():
        return {"$ref": f"urn:kserve:{name}"}
    return {"$ref": f"urn:kubernetes#/$defs/io.k8s.api.core.v1.{name.removeprefix('V1')}"}


def kserve_model(name: str) -> dict[str, Any]:
    """A model of the SDK as a JSON schema. Its class has two tables, and setters that refuse None
    where a field is required."""
    source = (kserve_folder() / f"{snake_case(name)}.py").read_text()
    tables = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
        and node.targets[0].id in ("openapi_types", "attribute_map")
    }  # fmt: skip
    required = re.findall(r"Invalid value for `(\w+)`, must not be `None`", source)
    keys = tables["attribute_map"]
    return {
        "type": "object",
        "properties": {keys[k]: kserve_type(kind) for k, kind in tables["openapi_types"].items()},
        "required": [keys[k] for k in required],
        "additionalProperties": False,
    }


# ---- Kubernetes


@functools.cache
def kubernetes_definitions() -> dict[str, Any]:
    folder = f"kubernetes-json-schema/v{KUBERNETES}.0-local-strict"
    return schema_contents(f"{folder}/_definitions.json", KUBERNETES)


def kubernetes_name(version: str, kind: str) -> str:
    group, _, version = version.rpartition("/")
    wanted = {"group": group, "version": version, "kind": kind}
    (name,) = [name for name, definition in kubernetes_definitions()["$defs"].items()
               if wanted in definition.get("x-kubernetes-group-version-kind", [])
               and "properties" in definition]  # fmt: skip
    return name


@functools.cache
def registry() -> Registry:
    @functools.cache
    def retrieve(uri: str) -> Any:
        if uri == "urn:kubernetes":
            return DRAFT202012.create_resource(kubernetes_definitions())
        return DRAFT202012.create_resource(kserve_model(uri.removeprefix("urn:kserve:")))

    return Registry(retrieve=retrieve)


@functools.cache
def validator(version: str, kind: str) -> jsonschema.Draft202012Validator:
    if (version, kind) in KSERVE:
        uri = f"urn:kserve:{KSERVE[version, kind]}"
    else:
        uri = f"urn:kubernetes#/$defs/{kubernetes_name(version, kind)}"
    return jsonschema.Draft202012Validator({"$ref": uri}, registry=registry())


# ---- all

PYDANTIC = {
    "keda.sh/v1alpha1": "cloudcoil.models.keda.v1alpha1",
    "monitoring.coreos.com/v1": "cloudcoil.models.prometheus_operator.v1",
}
KSERVE = {
    ("serving.kserve.io/v1alpha1", "ServingRuntime"): "V1alpha1ServingRuntime",
    ("serving.kserve.io/v1beta1", "InferenceService"): "V1beta1InferenceService",
}


def validate(resource: dict) -> None:
    """Raises Invalid, with where and why."""
    version, kind = resource["apiVersion"], resource["kind"]
    try:
        if version in PYDANTIC:
            model = getattr(importlib.import_module(PYDANTIC[version]), kind)
            model.model_validate(resource, extra="forbid")
        else:
            validator(version, kind).validate(resource)
    except (jsonschema.ValidationError, pydantic.ValidationError) as error:
        raise Invalid(f"{kind}: {error}") from error
