"""The nodes in ComfyUI's older form, for versions without `comfy_api.latest`."""

from __future__ import annotations

from typing import Any

from draftdiff.integrations.comfyui.nodes import CATEGORY, NODES, Input, Node


def _input(given: Input) -> tuple[Any, dict[str, Any]]:
    options = dict(given.options)
    return (options.pop("options") if given.kind == "COMBO" else given.kind), options


def _node(node: Node) -> type:
    def run(self: Any, **given: Any) -> Any:
        results = node.execute(**given)
        return {"ui": {"text": [results[-1]]}, "result": results} if node.is_output else results

    members = {
        "__doc__": node.description,
        "DESCRIPTION": node.description,
        "CATEGORY": CATEGORY,
        "FUNCTION": "run",
        "OUTPUT_NODE": node.is_output,
        "RETURN_TYPES": tuple(kind for kind, _ in node.outputs),
        "RETURN_NAMES": tuple(name for _, name in node.outputs),
        "INPUT_TYPES": classmethod(lambda cls: {"required": {given.name: _input(given) for given in node.inputs}}),
        "run": run,
    }
    return type(node.node_id, (), members)


NODE_CLASS_MAPPINGS = {node.node_id: _node(node) for node in NODES}
NODE_DISPLAY_NAME_MAPPINGS = {node.node_id: node.display_name for node in NODES}
