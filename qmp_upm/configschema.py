# SPDX-License-Identifier: GPL-2.0-or-later
"""The configuration as JSON Schema, for editors and for whoever generates one."""

from importlib.metadata import entry_points
from typing import Any

from qmp_upm.config import Config
from qmp_upm.policy import GROUP


def config_schema() -> dict[str, Any]:
    """Of the whole file; a policy's parameters depend on its name."""
    schema = Config.model_json_schema()
    definitions = schema["$defs"]
    policy = definitions["PolicyTable"]
    policy["allOf"] = []
    policies = {entry.name: entry.load() for entry in sorted(entry_points(group=GROUP))}
    for name, found in policies.items():
        parameters = found.Parameters.model_json_schema(ref_template=f"#/$defs/{name}.{{model}}")
        for inner, definition in parameters.pop("$defs", {}).items():
            definitions[f"{name}.{inner}"] = definition
        properties = {"name": {"const": name}} | parameters.get("properties", {})
        policy["allOf"].append(
            {
                "if": _is_policy(name, policy["properties"]["name"]["default"]),
                "then": {
                    "description": parameters.get("description", ""),
                    "properties": properties,
                    "required": parameters.get("required", []),
                    "additionalProperties": False,
                },
            }
        )
    policy["properties"]["name"]["enum"] = list(policies)
    return schema


def _is_policy(name: str, default: str) -> dict[str, Any]:
    named: dict[str, Any] = {"properties": {"name": {"const": name}}}
    return named if name == default else named | {"required": ["name"]}
